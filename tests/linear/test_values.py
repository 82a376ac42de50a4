"""Values of the linear room against float64, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsoft import linear_cross_entropy, linear_statistics
from tests import truth
from tests.linear import cases

IMPLEMENTATIONS = ("xla", "reference")
TILE = 4 * 8 * 128  # the smallest tile: 8 rows × 128 classes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("classes", [1, 129, 1009])
def test_statistics_match_float64(implementation, kind, classes):
    hidden, kernel, labels = cases.layer(13, 16, classes, kind)
    u = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    plain = np.asarray(hidden) @ np.asarray(kernel)
    tau = 0.7
    got = linear_statistics(
        hidden,
        kernel,
        labels,
        temperature=tau,
        workspace_bytes=TILE,
        return_argmax=True,
        implementation=implementation,
    )
    rows = np.arange(13)
    log_p = truth.log_softmax(u, tau)
    same = truth.log_softmax(plain, np.float32(tau)).astype("f")
    slack = 1e-6
    if classes > 1:
        label_log_p = same[rows, labels], log_p[rows, labels]
        truth.assert_as_good(got.log_prob, *label_log_p, slack)
    else:
        np.testing.assert_array_equal(got.log_prob, np.zeros(13))
    lse, entropy = truth.logsumexp(u, tau), truth.entropy(u, tau)
    assert (
        truth.error(got.lse, lse) < truth.error(truth.logsumexp(plain, tau), lse) + 1e-6
    )
    assert (
        truth.error(got.entropy, entropy)
        < truth.error(truth.entropy(plain, tau), entropy) + 2e-6
    )
    assert (np.asarray(got.log_prob) <= 0).all()
    np.testing.assert_allclose(got.label_logit - got.lse, got.log_prob, atol=0.1)
    best = u[rows, np.asarray(got.argmax)]
    np.testing.assert_allclose(best, u.max(1), rtol=1e-5)
    if kind == "zero":
        np.testing.assert_array_equal(got.argmax, np.zeros(13))
        np.testing.assert_allclose(got.lse, np.full(13, np.log(classes)), rtol=1e-6)


def assert_loss_matches_float64(name, layout, tile, implementation):
    """Holds the loss of each token against float64, under an option of `cases`."""
    rows, classes = 13, 1009
    hidden, kernel, labels = cases.layer(rows, 16, classes)
    options = cases.arrays(cases.OPTIONS[name], rows, classes, labels)
    exact, plain = _plain_losses(name)
    loss = linear_cross_entropy(
        hidden,
        kernel if layout == "hv" else kernel.T,
        labels,
        reduction="none",
        kernel_layout=layout,
        workspace_bytes=tile,
        implementation=implementation,
        **options,
    )
    assert loss.dtype == jnp.float32
    truth.assert_as_good(loss, plain, exact, slack=6e-7)


@functools.cache
def _plain_losses(name):
    """Returns the plain loss of each token in float64 and in float32."""
    rows, classes = 13, 1009
    hidden, kernel, labels = cases.layer(rows, 16, classes)
    options = cases.arrays(cases.OPTIONS[name], rows, classes, labels)
    wide = jax.tree.map(
        lambda a: a.astype("float64") if a.dtype == "float32" else a,
        {k: v for k, v in options.items() if hasattr(v, "dtype")},
    )
    exact = cases.plain_loss(
        hidden.astype("float64"), kernel.astype("float64"), labels, **(options | wide)
    )
    plain = cases.plain_loss(hidden, kernel, labels, **options)
    return np.asarray(exact), np.asarray(plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", cases.OPTIONS)
def test_losses_match_float64_for_every_option(implementation, name, x64):
    assert_loss_matches_float64(name, "hv", TILE, implementation)


def _optax_loss(hidden, kernel, labels):
    logits = (hidden @ kernel).astype("float32")
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _plain_loss(hidden, kernel, labels):
    return cases.plain_loss(hidden, kernel, labels).mean()


def _streamed_loss(hidden, kernel, labels):
    return linear_cross_entropy(hidden, kernel, labels, workspace_bytes=100 * 1024)


@functools.cache
def _value_and_grads(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_large_odd_shape_in_every_dtype(dtype, scale):
    """N and V prime: errors of value and gradients at most the plain formula's."""
    rows, features, classes = 211, 64, 5021
    hidden, kernel, labels = map(
        np.asarray, cases.layer(rows, features, classes, dtype=dtype)
    )
    hidden = hidden * np.asarray(scale, dtype)
    with jax.enable_x64(True):
        wide = (hidden.astype("float64"), kernel.astype("float64"))
        value, grads = _value_and_grads(_plain_loss)(*wide, labels)
        exact = [np.asarray(a) for a in (value, *grads)]

    largest = float(np.abs(hidden.astype("float32") @ kernel.astype("float32")).max())
    plain = _value_and_grads(_optax_loss)(hidden, kernel, labels)
    got = _value_and_grads(_streamed_loss)(hidden, kernel, labels)
    for mine, theirs, truly in zip(
        (got[0], *got[1]), (plain[0], *plain[1]), exact, strict=True
    ):
        slack = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 8e-3}[dtype]
        slack = slack if mine.ndim else 1e-6
        # A product of another shape rounds differently: by 1/3 ulp of the logits.
        slack += 2e-8 * largest
        truth.assert_as_good(
            np.asarray(mine, "float64"), np.asarray(theirs, "float64"), truly, slack
        )
    assert got[1][0].dtype == hidden.dtype and got[1][1].dtype == kernel.dtype


def test_weights_and_mean_are_exact_at_20011_bfloat16_tokens():
    rows = 20011
    hidden, kernel, labels = cases.layer(rows, 4, 61, dtype="bfloat16")
    weights = np.ones(rows, "bfloat16")
    loss = linear_cross_entropy(hidden, kernel, labels, weights=weights)
    per_token = linear_cross_entropy(hidden, kernel, labels, reduction="none")
    np.testing.assert_allclose(loss, np.asarray(per_token, "float64").mean(), rtol=1e-5)
    total = linear_cross_entropy(
        hidden * 0, kernel, labels, weights=weights, reduction="sum"
    )
    np.testing.assert_allclose(total, rows * np.log(61), rtol=1e-5)
