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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, dtype):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, kind, dtype)
    u = logits_of(hidden, kernel)
    log_prob, entropy = linear_log_prob(
        hidden, kernel, labels, temperature=0.7, tile_bytes=TILE
    )
    tempered = hidden.astype("float32") @ kernel.astype("float32") / 0.7
    plain = jax.nn.log_softmax(tempered)
    true = truth.log_softmax(u, 0.7)
    rows = np.arange(ROWS)
    # At an offset the rounding of the products themselves is all there is.
    slack = 1e-4 if kind == "offset" else 2e-6
    truth.assert_as_good(log_prob, plain[rows, labels], true[rows, labels], slack=slack)
    plain_entropy = -(jnp.exp(plain) * plain).sum(1)
    truth.assert_as_good(entropy, plain_entropy, truth.entropy(u, 0.7), slack=slack)
    assert (np.asarray(log_prob) <= 0).all() and (np.asarray(entropy) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_classes_sum_to_one_and_none_is_above_zero(kind):
    hidden, kernel, _ = cases.layer(4, FEATURES, 200, kind)
    ids = jnp.broadcast_to(jnp.arange(200), (4, 200))
    for tau in (0.0, 1e-3, 1.0, 30.0, float("inf")):
        out = linear_log_prob_at(hidden, kernel, ids, temperature=tau, tile_bytes=TILE)
        assert (np.asarray(out) <= 0).all()
        np.testing.assert_allclose(np.exp(out).sum(1), 1, rtol=3e-6)


@pytest.mark.parametrize("layout", ["hv", "vh"])
def test_classes_and_gradients_against_autodiff(layout, x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    ids = jnp.stack([labels, (labels * 3 + 1) % CLASSES, labels], -1)
    bias = jnp.linspace(-1, 1, CLASSES)
    tau = jnp.linspace(0.4, 2, ROWS)
    weights = jnp.cos(jnp.arange(3.0 * ROWS)).reshape(ROWS, 3)

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

    args = (hidden, kernel, bias, tau)
    np.testing.assert_allclose(ours(*args), plain(*args), rtol=1e-12)
    for a, b in zip(
        jax.grad(ours, range(4))(*args), jax.grad(plain, range(4))(*args), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_per_token_temperature_of_log_prob_and_entropy(x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    tau = jnp.linspace(0.4, 2, ROWS)

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

    args = (hidden, kernel, tau)
    for a, b in zip(
        jax.grad(ours, range(3))(*args), jax.grad(plain, range(3))(*args), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bad_and_dropped_classes():
    hidden, kernel, _ = cases.layer(2, FEATURES, 300)
    mask = jnp.arange(300) != 7
    ids = jnp.asarray([[7, -1, 300, 8], [0, 299, -100, 7]])
    out = linear_log_prob_at(hidden, kernel, ids, class_mask=mask, tile_bytes=TILE)
    np.testing.assert_array_equal(
        np.isnan(out), [[False, True, True, False], [False, False, True, False]]
    )
    assert out[0, 0] == -np.inf and out[1, 3] == -np.inf

    def kept(hidden):
        out = linear_log_prob_at(hidden, kernel, ids, class_mask=mask, tile_bytes=TILE)
        return jnp.where(jnp.isfinite(out), out, 0).sum()

    assert np.isfinite(jax.grad(kept)(hidden)).all()


def test_offsets_change_nothing():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(np.round(rng.standard_normal((1, 300)) * 8) / 8, jnp.float32)
    ids = jnp.asarray([[0, 5, 299]])
    plain = linear_log_prob_at(jnp.ones((1, 1)), logits, ids)
    for offset in (1e4, 1e6, -1e6):
        moved = linear_log_prob_at(jnp.ones((1, 1)), logits + offset, ids)
        np.testing.assert_array_equal(moved, plain)
