"""Log-probabilities of given classes and entropies, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_log_prob, linear_log_prob_at
from tests import truth
from tests.linear import cases

ROWS, FEATURES, CLASSES = 12, 8, 1009
TILE = 4 * 8 * 128
KINDS = ("unit", "zero", "peaked", "offset", "negative")


def logits_of(hidden, kernel):
    return np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)


@jax.jit
def plain_values(hidden, kernel):
    """Returns log-probabilities and entropies by the plain formula at 0.7."""
    tempered = hidden.astype("float32") @ kernel.astype("float32") / 0.7
    log_p = jax.nn.log_softmax(tempered)
    return log_p, -(jnp.exp(log_p) * log_p).sum(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, dtype):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, kind, dtype)
    u = logits_of(hidden, kernel)
    log_prob, entropy = linear_log_prob(
        hidden, kernel, labels, temperature=0.7, tile_bytes=TILE
    )
    plain, plain_entropy = plain_values(hidden, kernel)
    true = truth.log_softmax(u, 0.7)
    rows = np.arange(ROWS)
    # At an offset the rounding of the products themselves is all there is.
    slack = 1e-4 if kind == "offset" else 2e-6
    plain = np.asarray(plain)
    truth.assert_as_good(log_prob, plain[rows, labels], true[rows, labels], slack=slack)
    truth.assert_as_good(entropy, plain_entropy, truth.entropy(u, 0.7), slack=slack)
    assert (np.asarray(log_prob) <= 0).all() and (np.asarray(entropy) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_classes_sum_to_one_and_none_is_above_zero(kind):
    hidden, kernel, _ = cases.layer(4, FEATURES, 200, kind)
    ids = np.broadcast_to(np.arange(200), (4, 200))
    for tau in (0.0, 1e-3, 1.0, 30.0, float("inf")):
        out = linear_log_prob_at(hidden, kernel, ids, temperature=tau, tile_bytes=TILE)
        assert (np.asarray(out) <= 0).all()
        np.testing.assert_allclose(np.exp(out).sum(1), 1, rtol=3e-6)


@pytest.mark.parametrize("layout", ["hv", "vh"])
def test_classes_and_gradients_against_autodiff(layout, x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    labels = np.asarray(labels)
    ids = np.stack([labels, (labels * 3 + 1) % CLASSES, labels], -1)
    bias = np.linspace(-1, 1, CLASSES)
    tau = np.linspace(0.4, 2, ROWS)
    weights = np.cos(np.arange(3.0 * ROWS)).reshape(ROWS, 3)

    def ours(hidden, kernel, bias, tau):
        out = linear_log_prob_at(
            hidden,
            kernel if layout == "hv" else kernel.T,
            ids,
            bias=bias,
            temperature=tau,
            logit_softcap=0.9,
            kernel_layout=layout,
            tile_bytes=TILE,
        )
        return (out * weights).sum()

    def plain(hidden, kernel, bias, tau):
        u = 0.9 * jnp.tanh((hidden @ kernel + bias[None]) / 0.9)
        log_p = jax.nn.log_softmax(u / tau[:, None])
        return (jnp.take_along_axis(log_p, ids, 1) * weights).sum()

    @jax.jit
    def both(*args):
        return [jax.value_and_grad(f, range(4))(*args) for f in (ours, plain)]

    (value, grads), (exact, exact_grads) = both(hidden, kernel, bias, tau)
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    for a, b in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_per_token_temperature_of_log_prob_and_entropy(x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    tau = np.linspace(0.4, 2, ROWS)

    def ours(hidden, kernel, tau):
        log_prob, entropy = linear_log_prob(
            hidden, kernel, labels, temperature=tau, tile_bytes=TILE
        )
        return (log_prob * jnp.cos(tau) + entropy * jnp.sin(tau)).sum()

    def plain(hidden, kernel, tau):
        log_p = jax.nn.log_softmax(hidden @ kernel / tau[:, None])
        entropy = -(jnp.exp(log_p) * log_p).sum(1)
        log_prob = jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
        return (log_prob * jnp.cos(tau) + entropy * jnp.sin(tau)).sum()

    @jax.jit
    def both(*args):
        return [jax.grad(f, range(3))(*args) for f in (ours, plain)]

    for a, b in zip(*both(hidden, kernel, tau), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bad_and_dropped_classes():
    hidden, kernel, _ = cases.layer(2, FEATURES, 300)
    mask = np.arange(300) != 7
    ids = np.asarray([[7, -1, 300, 8], [0, 299, -100, 7]], "int32")

    @jax.jit
    def values_and_gradient(hidden):
        def kept(hidden):
            out = linear_log_prob_at(
                hidden, kernel, ids, class_mask=mask, tile_bytes=TILE
            )
            return jnp.where(jnp.isfinite(out), out, 0).sum(), out

        grad, out = jax.grad(kept, has_aux=True)(hidden)
        return out, grad

    out, grad = values_and_gradient(hidden)
    np.testing.assert_array_equal(
        np.isnan(out), [[False, True, True, False], [False, False, True, False]]
    )
    assert out[0, 0] == -np.inf and out[1, 3] == -np.inf
    assert np.isfinite(grad).all()


def test_offsets_change_nothing():
    rng = np.random.default_rng(0)
    logits = (np.round(rng.standard_normal((1, 300)) * 8) / 8).astype("float32")
    ids, one = np.asarray([[0, 5, 299]]), np.ones((1, 1), "float32")
    plain = linear_log_prob_at(one, logits, ids)
    for offset in (1e4, 1e6, -1e6):
        moved = linear_log_prob_at(one, logits + np.float32(offset), ids)
        np.testing.assert_array_equal(moved, plain)
