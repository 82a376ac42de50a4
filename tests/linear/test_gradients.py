"""Gradients of the linear room against float64 autodiff of the plain formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_cross_entropy, linear_statistics
from tests import truth
from tests.linear import cases

TILE = 4 * 8 * 128
PAIRS = list(itertools.combinations(cases.OPTIONS, 2))


def _ours(hidden, kernel, labels, layout, tile, options):
    return linear_cross_entropy(
        hidden,
        kernel if layout == "hv" else kernel.T,
        labels,
        reduction="none",
        kernel_layout=layout,
        tile_bytes=tile,
        **options,
    )


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("rows, classes", [(20, 300)])
@pytest.mark.many_cases
def test_every_pair_of_options(pair, rows, classes, x64):
    hidden, kernel, labels = cases.layer(rows, 8, classes)
    options = cases.OPTIONS[pair[0]] | cases.OPTIONS[pair[1]]
    options = cases.arrays(options, rows, classes, labels)
    floats = ("bias", "temperature", "weights")
    moving = {k: options.pop(k) for k in floats if k in options}
    if isinstance(moving.get("temperature"), float):
        # One a row: a sum over rows of either sign would only measure its rounding.
        moving["temperature"] = jnp.full(rows, moving["temperature"], "float32")
    cotangent = np.random.default_rng(1).standard_normal(rows)
    cotangent[:3] = 0

    def total(loss, hidden, kernel, moving):
        out = loss(hidden, kernel, labels, options | moving)
        return (out * cotangent.astype(out.dtype)).sum()

    def plain(hidden, kernel, labels, options):
        return cases.plain_loss(hidden, kernel, labels, **options)

    args = (hidden, kernel, moving)
    wide = jax.tree.map(lambda a: a.astype("float64"), args)
    exact = jax.grad(total, (1, 2, 3))(plain, *wide)
    same = jax.grad(total, (1, 2, 3))(plain, *args)
    # Both layouts take their turn; each option meets both.
    layout = ("hv", "vh")[PAIRS.index(pair) % 2]

    def ours(hidden, kernel, labels, options):
        return _ours(hidden, kernel, labels, layout, TILE, options)

    got = jax.grad(total, (1, 2, 3))(ours, *args)
    for mine, theirs, truly in zip(
        *map(jax.tree.leaves, (got, same, exact)), strict=True
    ):
        truth.assert_as_good(mine, theirs, truly, slack=2e-6)
    assert (np.asarray(got[0])[:3] == 0).all()


@pytest.mark.parametrize("name", ["lse", "log_prob", "entropy", "label_logit"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_statistics(name, implementation, x64):
    hidden, kernel, labels = cases.layer(20, 8, 300)
    tau = jnp.asarray(np.random.default_rng(2).uniform(0.3, 2, 20), "float32")
    cotangent = np.random.default_rng(3).standard_normal(20)

    def plain(hidden, kernel, tau):
        u = hidden @ kernel / tau[:, None]
        log_p = jax.nn.log_softmax(u)
        lse = jax.nn.logsumexp(u, axis=1)
        rows = np.arange(20)
        value = {
            "lse": lse,
            "log_prob": log_p[rows, labels],
            "entropy": -(jnp.exp(log_p) * log_p).sum(1),
            "label_logit": u[rows, labels],
        }[name]
        return (value * cotangent.astype(value.dtype)).sum()

    def ours(hidden, kernel, tau):
        statistics = linear_statistics(
            hidden,
            kernel,
            labels,
            temperature=tau,
            tile_bytes=TILE,
            implementation=implementation,
        )
        return (getattr(statistics, name) * cotangent.astype("float32")).sum()

    args = (hidden, kernel, tau)
    if name == "label_logit":
        # Its gradient by the temperature is left to the fields it is made of.
        numbers = (0, 1)
    else:
        numbers = (0, 1, 2)
    wide = jax.tree.map(lambda a: a.astype("float64"), args)
    exact = jax.grad(plain, numbers)(*wide)
    same = jax.grad(plain, numbers)(*args)
    got = jax.grad(ours, numbers)(*args)
    for mine, theirs, truly in zip(got, same, exact, strict=True):
        truth.assert_as_good(mine, theirs, truly, slack=2e-6)


def test_float64_to_float64(x64):
    hidden, kernel, labels = cases.layer(9, 8, 300, dtype="float64")
    exact = jax.value_and_grad(lambda h: cases.plain_loss(h, kernel, labels).mean())
    ours = jax.value_and_grad(
        lambda h: linear_cross_entropy(h, kernel, labels, tile_bytes=TILE)
    )
    for mine, truly in zip(ours(hidden), exact(hidden), strict=True):
        assert mine.dtype == jnp.float64
        assert truth.error(mine, truly) < 1e-14


def test_upstream_cotangent():
    hidden, kernel, labels = cases.layer(9, 8, 300)

    def loss(hidden, scale):
        return scale * linear_cross_entropy(hidden, kernel, labels)

    np.testing.assert_allclose(
        jax.grad(loss)(hidden, 2.0), 2 * jax.grad(loss)(hidden, 1.0), rtol=1e-6
    )


def test_error_does_not_grow_with_the_number_of_tiles():
    """Neither dhidden nor dkernel is accumulated in bfloat16."""
    hidden, kernel, labels = cases.layer(64, 16, 4096, dtype="bfloat16")

    def grads(tile):
        return jax.grad(
            lambda h, w: linear_cross_entropy(h, w, labels, tile_bytes=tile), (0, 1)
        )(hidden, kernel)

    wide = jax.grad(lambda h, w: cases.plain_loss(h, w, labels).mean(), (0, 1))(
        hidden.astype("float32"), kernel.astype("float32")
    )
    few, many = grads(2**30), grads(1)
    for a, b, exact in zip(few, many, wide, strict=True):
        errors = [truth.error(np.asarray(g, "float64"), exact) for g in (a, b)]
        assert errors[1] <= errors[0] * 1.05 + 1e-4


def test_gradients_at_temperature_limits():
    hidden, kernel, labels = cases.layer(9, 8, 300)
    for tau in (0.0, 1e-40, float("inf")):

        def loss(hidden, kernel, tau):
            out = linear_statistics(hidden, kernel, labels, temperature=tau)
            return out.entropy.sum() + out.log_sum.sum()

        grads = jax.grad(loss, (0, 1, 2))(hidden, kernel, jnp.float32(tau))
        assert all((np.asarray(g) == 0).all() for g in grads)


def test_softcap_derivative_on_large_logits(x64):
    hidden, kernel, labels = cases.layer(9, 8, 300, "peaked")

    def plain(hidden):
        return cases.plain_loss(
            hidden, kernel.astype(hidden.dtype), labels, logit_softcap=0.7
        ).mean()

    def ours(hidden):
        return linear_cross_entropy(hidden, kernel, labels, logit_softcap=0.7)

    exact = jax.grad(plain)(hidden.astype("float64"))
    plain_grad = jax.grad(plain)(hidden)
    truth.assert_as_good(jax.grad(ours)(hidden), plain_grad, exact, slack=2e-6)


def test_weights_have_gradients():
    hidden, kernel, labels = cases.layer(6, 8, 50)
    weights = jnp.asarray([1.0, 2, 0, 1, 1, 3])
    per_token = linear_cross_entropy(hidden, kernel, labels, reduction="none")

    def loss(weights):
        return linear_cross_entropy(hidden, kernel, labels, weights=weights)

    mean = (per_token * weights).sum() / weights.sum()
    expected = (per_token - mean) / weights.sum()
    grad = np.asarray(jax.grad(loss)(weights))
    live = np.asarray(weights) != 0
    np.testing.assert_allclose(grad[live], np.asarray(expected)[live], rtol=1e-5)
    # What a masked token holds may not matter, so its loss counts as 0.
    np.testing.assert_allclose(grad[~live], -mean / weights.sum(), rtol=1e-5)
