"""Gradients of the linear room against float64 autodiff of the plain formula."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_cross_entropy, linear_statistics
from tests import truth
from tests.linear import cases

TILE = 4 * 8 * 128
PAIRS = list(itertools.combinations(cases.OPTIONS, 2))
ROWS, CLASSES = 20, 300
MOVING = ("bias", "temperature", "weights")
# What an option is where it is not chosen.
ABSENT = {
    "bias": np.zeros(CLASSES),
    "class_mask": np.ones(CLASSES, bool),
    "label_smoothing": np.float64(0),
    "temperature": np.ones(ROWS),
    "weights": np.ones(ROWS),
    "z_loss": np.float64(0),
}


def _cast(tree, dtype):
    """Returns the arrays of a tree, the floating ones in a dtype."""

    def cast(a):
        a = np.asarray(a)
        return a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a

    return jax.tree.map(cast, tree)


def _total(losses):
    """Sums the losses of tokens by a cotangent that is 0 for the first three."""
    cotangent = np.random.default_rng(1).standard_normal(ROWS)
    cotangent[:3] = 0
    return (losses * cotangent.astype(losses.dtype)).sum()


@functools.cache
def _plain_gradients(softcap):
    """Compiles the plain formula's gradients once for all options but the softcap."""

    def total(hidden, kernel, moving, fixed, labels):
        options = fixed | moving | {"logit_softcap": softcap}
        return _total(cases.plain_loss(hidden, kernel, labels, **options))

    return jax.jit(jax.grad(total, (0, 1, 2)))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.many_cases
def test_every_pair_of_options(pair, x64):
    hidden, kernel, labels = cases.layer(ROWS, 8, CLASSES)
    options = cases.OPTIONS[pair[0]] | cases.OPTIONS[pair[1]]
    options = cases.arrays(options, ROWS, CLASSES, labels)
    moving = {k: options.pop(k) for k in MOVING if k in options}
    if isinstance(moving.get("temperature"), float):
        # One a row: a sum over rows of either sign would only measure its rounding.
        moving["temperature"] = jnp.full(ROWS, moving["temperature"], "float32")
    # Both layouts take their turn; each option meets both.
    layout = ("hv", "vh")[PAIRS.index(pair) % 2]

    def ours(hidden, kernel, moving):
        losses = linear_cross_entropy(
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            reduction="none",
            kernel_layout=layout,
            workspace_bytes=TILE,
            **(options | moving),
        )
        return _total(losses)

    def plain(dtype):
        fixed = ABSENT | options | moving
        softcap = fixed.pop("logit_softcap", None)
        every = {k: fixed.pop(k) for k in MOVING}
        args = _cast((hidden, kernel, every, fixed), dtype)
        *grads, by_every = _plain_gradients(softcap)(*args, labels)
        return *grads, {k: by_every[k] for k in moving}

    got = jax.jit(jax.grad(ours, (0, 1, 2)))(hidden, kernel, moving)
    for mine, theirs, truly in zip(
        *map(jax.tree.leaves, (got, plain("float32"), plain("float64"))), strict=True
    ):
        truth.assert_as_good(mine, theirs, truly, slack=2e-6)
    assert (np.asarray(got[0])[:3] == 0).all()


FIELDS = ("lse", "log_prob", "entropy", "label_logit")


def _plain_field(name, labels, hidden, kernel, tau):
    u = hidden @ kernel / tau[:, None]
    log_p = jax.nn.log_softmax(u)
    rows = np.arange(ROWS)
    return {
        "lse": jax.nn.logsumexp(u, axis=1),
        "log_prob": log_p[rows, labels],
        "entropy": -(jnp.exp(log_p) * log_p).sum(1),
        "label_logit": u[rows, labels],
    }[name]


def _streamed_field(implementation, name, labels, hidden, kernel, tau):
    statistics = linear_statistics(
        hidden,
        kernel,
        labels,
        temperature=tau,
        workspace_bytes=TILE,
        implementation=implementation,
    )
    return getattr(statistics, name)


@functools.cache
def _gradients_of_fields(function, dtype):
    """Returns the gradients of each field of the statistics, of one program."""
    hidden, kernel, labels = cases.layer(ROWS, 8, CLASSES)
    tau = np.random.default_rng(2).uniform(0.3, 2, ROWS).astype("float32")
    cotangent = np.random.default_rng(3).standard_normal(ROWS)

    def gradients(name, args):
        def total(*args):
            value = function(name, labels, *args)
            return (value * cotangent.astype(value.dtype)).sum()

        # That of the label's logit by the temperature is left to the fields that
        # it is made of.
        numbers = (0, 1) if name == "label_logit" else (0, 1, 2)
        return jax.grad(total, numbers)(*args)

    program = jax.jit(lambda *args: {name: gradients(name, args) for name in FIELDS})
    return program(*_cast((hidden, kernel, tau), dtype))


streamed_field = functools.cache(
    lambda implementation: functools.partial(_streamed_field, implementation)
)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_statistics(name, implementation, x64):
    got = _gradients_of_fields(streamed_field(implementation), "float32")[name]
    same = _gradients_of_fields(_plain_field, "float32")[name]
    exact = _gradients_of_fields(_plain_field, "float64")[name]
    for mine, theirs, truly in zip(got, same, exact, strict=True):
        truth.assert_as_good(mine, theirs, truly, slack=2e-6)


def test_float64_to_float64(x64):
    hidden, kernel, labels = cases.layer(9, 8, 300, dtype="float64")

    @jax.jit
    def both(hidden):
        def ours(hidden):
            return linear_cross_entropy(hidden, kernel, labels, workspace_bytes=TILE)

        def plain(hidden):
            return cases.plain_loss(hidden, kernel, labels).mean()

        return [jax.value_and_grad(f)(hidden) for f in (ours, plain)]

    for mine, truly in zip(*both(hidden), strict=True):
        assert mine.dtype == jnp.float64
        assert truth.error(mine, truly) < 1e-14


def test_upstream_cotangent():
    hidden, kernel, labels = cases.layer(9, 8, 300)

    @jax.jit
    @jax.grad
    def gradient(hidden, scale):
        return scale * linear_cross_entropy(hidden, kernel, labels)

    np.testing.assert_allclose(
        gradient(hidden, 2.0), 2 * gradient(hidden, 1.0), rtol=1e-6
    )


def test_error_does_not_grow_with_the_number_of_tiles():
    """Neither dhidden nor dkernel is accumulated in bfloat16."""
    hidden, kernel, labels = cases.layer(64, 16, 4096, dtype="bfloat16")

    def grads(tile):
        loss = functools.partial(linear_cross_entropy, workspace_bytes=tile)
        return jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel, labels)

    def plain(hidden, kernel, labels):
        return cases.plain_loss(hidden, kernel, labels).mean()

    wide = jax.jit(jax.grad(plain, (0, 1)))(
        hidden.astype("float32"), kernel.astype("float32"), labels
    )
    few, many = grads(2**30), grads(1)
    for a, b, exact in zip(few, many, wide, strict=True):
        errors = [truth.error(np.asarray(g, "float64"), exact) for g in (a, b)]
        assert errors[1] <= errors[0] * 1.05 + 1e-4


def test_gradients_at_temperature_limits():
    hidden, kernel, labels = cases.layer(9, 8, 300)

    @jax.jit
    def gradients(hidden, kernel, tau):
        def total(hidden, kernel, tau):
            out = linear_statistics(hidden, kernel, labels, temperature=tau)
            return out.entropy.sum() + out.log_sum.sum()

        return jax.grad(total, (0, 1, 2))(hidden, kernel, tau)

    for tau in (0.0, 1e-40, float("inf")):
        grads = gradients(hidden, kernel, np.float32(tau))
        assert all((np.asarray(g) == 0).all() for g in grads)


def test_softcap_derivative_on_large_logits(x64):
    hidden, kernel, labels = cases.layer(9, 8, 300, "peaked")

    @jax.jit
    def gradients(hidden, wide):
        def plain(hidden):
            return cases.plain_loss(
                hidden, kernel.astype(hidden.dtype), labels, logit_softcap=0.7
            ).mean()

        def ours(hidden):
            return linear_cross_entropy(hidden, kernel, labels, logit_softcap=0.7)

        return jax.grad(ours)(hidden), jax.grad(plain)(hidden), jax.grad(plain)(wide)

    truth.assert_as_good(*gradients(hidden, hidden.astype("float64")), slack=2e-6)


def test_weights_have_gradients():
    hidden, kernel, labels = cases.layer(6, 8, 50)
    weights = np.asarray([1.0, 2, 0, 1, 1, 3], "float32")

    @jax.jit
    def losses_and_gradient(weights):
        def loss(weights):
            return linear_cross_entropy(hidden, kernel, labels, weights=weights)

        losses = linear_cross_entropy(hidden, kernel, labels, reduction="none")
        return losses, jax.grad(loss)(weights)

    per_token, grad = map(np.asarray, losses_and_gradient(weights))
    mean = (per_token * weights).sum() / weights.sum()
    expected = (per_token - mean) / weights.sum()
    live = weights != 0
    np.testing.assert_allclose(grad[live], expected[live], rtol=1e-5)
    # What a masked token holds may not matter, so its loss counts as 0.
    np.testing.assert_allclose(grad[~live], -mean / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("dropped", ["class_mask", "bias"])
def test_rows_without_classes_have_no_slope(dropped):
    """The loss and all gradients are 0, by a temperature for each row too."""
    hidden, kernel, labels = jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.array([0, 1, 0])
    mask = {"class_mask": jnp.zeros(4, bool), "bias": jnp.full(4, -jnp.inf)}[dropped]
    options: dict[str, Any] = {dropped: mask}

    def loss(hidden, kernel, tau):
        return linear_cross_entropy(
            hidden,
            kernel,
            labels,
            temperature=tau,
            z_loss=0.5,
            reduction="sum",
            **options,
        )

    def lse(hidden, kernel, tau):
        found = linear_statistics(hidden, kernel, temperature=tau, **options)
        return jnp.where(jnp.isfinite(found.lse), found.lse, 0).sum()

    for tau in (jnp.array([0.5, 1.0, 2.0]), jnp.array([0.0, 1.0, jnp.inf])):
        for function in (loss, lse):
            value, slopes = jax.value_and_grad(function, (0, 1, 2))(hidden, kernel, tau)
            assert value == 0
            for slope in slopes:
                np.testing.assert_array_equal(slope, 0)
