"""Derivatives of the logits room against differences: both modes, twice.

These are of the formulas and not of the machine code, so their file is one that is
compiled quickly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests import truth
from tests.logits.test_gradients import NAMES, ours

WHERE = np.array([True, True, False, True, True])
# The step and the bound of `jax.test_util.check_grads` in float64.
STEP, BOUND = 1e-4, 1e-5


def _pairs(function, args, order):
    """Returns pairs of trees that must be close, as `check_grads` makes them.

    All of them are of one traced program. Derivatives in forward and in reverse mode
    are held against differences; those of second order are of either by either.
    """
    rng = np.random.default_rng(0)

    def normal(a):
        return jnp.asarray(rng.standard_normal(a.shape), a.dtype)

    def dot(a, b):
        products = jax.tree.map(lambda a, b: (a * b).sum(), a, b)
        return sum(jax.tree.leaves(products))

    tangents = jax.tree.map(normal, args)
    ends = jax.tree.map(
        lambda a, t: jnp.stack([a + STEP * t, a - STEP * t]), args, tangents
    )
    difference = jax.tree.map(
        lambda a: (a[0] - a[1]) / (2 * STEP), jax.vmap(function)(*ends)
    )
    value, along = jax.jvp(function, args, tangents)
    again, pull = jax.vjp(function, *args)
    cotangents = jax.tree.map(normal, again)
    pairs = [
        (value, function(*args)),
        (again, value),
        (along, difference),
        (dot(pull(cotangents), tangents), dot(cotangents, difference)),
    ]
    if order == 1:
        return pairs

    def forward(args, tangents):
        return jax.jvp(function, args, tangents)

    def reverse(*args):
        out, pull = jax.vjp(function, *args)
        return pull(out)

    return pairs + _pairs(forward, (args, args), 1) + _pairs(reverse, args, 1)


def _assert_close(pairs):
    for derivatives, expected in pairs:
        for a, b in zip(*map(jax.tree.leaves, (derivatives, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.many_cases
def test_both_modes_and_second_order(name, x64):
    order = 1 if name in ("forward_kl", "reverse_kl", "jensen_shannon") else 2

    @jax.jit
    def pairs(x, tau):
        by_both = _pairs(lambda x, tau: ours(name, x, tau), (x, tau), order)
        return by_both, _pairs(lambda x: ours(name, x, 1.0), (x,), order)

    x = np.asarray(truth.logits("unit", (3, 5)), "float64")
    for by in pairs(x, np.asarray([[0.6], [1.0], [2.5]])):
        _assert_close(by)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "entropy"])
@pytest.mark.many_cases
def test_masked_second_order(name, x64):
    def function(x, tau):
        out = getattr(jaxsoft, name)(x, temperature=tau, where=WHERE[None])
        return jnp.where(jnp.isinf(out), 0, out)

    @jax.jit
    def pairs_and_gradient(x, tau):
        gradient = jax.grad(lambda x: (function(x, 0.7) ** 2).sum())(x)
        return _pairs(function, (x, tau), 2), gradient

    x = np.asarray(truth.logits("unit", (3, 5)), "float64")
    pairs, grad = pairs_and_gradient(x, np.full((3, 1), 0.7))
    _assert_close(pairs)
    # Only the kept classes move the result.
    assert (np.asarray(grad)[:, ~WHERE] == 0).all()
    assert (np.asarray(grad)[:, WHERE] != 0).any()
