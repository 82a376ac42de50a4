"""Mixtures of values: against stored probabilities, with noise and straight through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_expected
from jaxsoft._core import noise
from tests import truth
from tests.linear import cases

ROWS, FEATURES, CLASSES, WIDTH = 12, 8, 601, 5
TILE = 4 * 8 * 128


def layer(dtype="float32"):
    hidden, kernel, _ = cases.layer(ROWS, FEATURES, CLASSES, dtype=dtype)
    rng = np.random.default_rng(4)
    values = jnp.asarray(rng.standard_normal((CLASSES, WIDTH)), dtype)
    bias = jnp.asarray(rng.standard_normal(CLASSES), dtype)
    tau = jnp.linspace(0.4, 2, ROWS, dtype="float64" if dtype == "float64" else None)
    return hidden, kernel, values, bias, tau


def gumbel(key, dtype):
    words = noise.row_words(key, ROWS)
    return noise.paired_gumbel(words, noise.CLASSES, jnp.arange(CLASSES), dtype)


def stored(hidden, kernel, values, bias, tau, key=None):
    u = 0.9 * jnp.tanh((hidden @ kernel + bias[None]) / 0.9)
    if key is not None:
        u = u + gumbel(key, u.dtype)
    return jax.nn.softmax(u / tau[:, None]) @ values


def streamed(hidden, kernel, values, bias, tau, key=None, **options):
    return linear_expected(
        hidden,
        kernel,
        values,
        key=key,
        bias=bias,
        temperature=tau,
        logit_softcap=0.9,
        tile_bytes=TILE,
        **options,
    )


@pytest.mark.parametrize("kind", ["unit", "zero", "peaked", "offset", "negative"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(kind, dtype):
    hidden, kernel, _ = cases.layer(ROWS, FEATURES, CLASSES, kind, dtype)
    values = layer(dtype)[2]
    out = linear_expected(hidden, kernel, values, temperature=0.7, tile_bytes=TILE)
    assert out.dtype == values.dtype
    u = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    true = truth.softmax(u, 0.7) @ np.asarray(values, np.float64)
    logits = jnp.matmul(hidden, kernel, preferred_element_type="float32")
    plain = jax.nn.softmax(logits / 0.7).astype(dtype) @ values
    truth.assert_as_good(
        out.astype("float32"),
        plain.astype("float32"),
        true,
        slack=2e-6 if dtype == "float32" else 4e-3,
    )


@pytest.mark.parametrize("seed", [None, 0])
def test_gradients(seed, x64):
    args = layer("float64")
    key = None if seed is None else jax.random.key(seed)
    weights = jnp.cos(jnp.arange(float(ROWS * WIDTH))).reshape(ROWS, WIDTH)
    pairs = [
        jax.value_and_grad(lambda *a, f=f: (f(*a, key=key) * weights).sum(), range(5))(
            *args
        )
        for f in (streamed, stored)
    ]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_straight_through():
    args, key = layer(), jax.random.key(0)
    hidden, kernel, values, bias, _ = args
    hard = streamed(*args, key=key, hard=True)
    u = 0.9 * jnp.tanh((hidden @ kernel + bias[None]) / 0.9) + gumbel(key, "float32")
    np.testing.assert_array_equal(hard, values[jnp.argmax(u, 1)])
    np.testing.assert_array_equal(
        streamed(*args, hard=True), values[jnp.argmax(u - gumbel(key, "float32"), 1)]
    )

    def total(*a, hard):
        return jnp.sin(streamed(*a, key=key, hard=hard)).sum()

    def through(*a):
        soft = streamed(*a, key=key)
        picked = streamed(*a, key=key, hard=True)
        return jnp.sin(soft + jax.lax.stop_gradient(picked - soft)).sum()

    # With respect to all but the values, whose gradient is that of the mixture too.
    ours = jax.grad(functools.partial(total, hard=True), range(5))(*args)
    for a, b in zip(ours, jax.grad(through, range(5))(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_noise_does_not_depend_on_tiles():
    args, key = layer(), jax.random.key(7)
    for hard in (False, True):
        whole = linear_expected(*args[:3], key=key, hard=hard, tile_bytes=2**25)
        tiled = linear_expected(*args[:3], key=key, hard=hard, tile_bytes=TILE)
        np.testing.assert_allclose(whole, tiled, rtol=1e-5, atol=1e-6)


def test_limits_masks_and_shapes():
    hidden, kernel, values, _, _ = layer()
    best = jnp.argmax(hidden @ kernel, 1)
    cold = linear_expected(hidden, kernel, values, temperature=0.0)
    np.testing.assert_array_equal(cold, values[best])
    hot = linear_expected(hidden, kernel, values, temperature=float("inf"))
    mean = jnp.broadcast_to(values.mean(0), hot.shape)
    np.testing.assert_allclose(hot, mean, atol=1e-6)
    none = jnp.zeros(CLASSES, bool)
    for options in ({}, {"key": jax.random.key(0), "hard": True}):
        call = functools.partial(linear_expected, class_mask=none, **options)
        np.testing.assert_array_equal(call(hidden, kernel, values), 0)
        grads = jax.grad(lambda *a, c=call: c(*a).sum(), range(3))(
            hidden, kernel, values
        )
        assert all((np.asarray(g) == 0).all() for g in grads)
    folded = linear_expected(hidden.reshape(3, 4, FEATURES), kernel, values)
    assert folded.shape == (3, 4, WIDTH)
    with pytest.raises(ValueError, match="`values` must have shape"):
        linear_expected(hidden, kernel, values[:-1])


def test_vmap_folds_rows():
    hidden, kernel, values, _, _ = layer()
    hidden = hidden.reshape(3, 4, FEATURES)

    def total(kernel):
        mapped = jax.vmap(lambda h: linear_expected(h, kernel, values))
        return jnp.sin(mapped(hidden)).sum()

    def whole(kernel):
        return jnp.sin(linear_expected(hidden, kernel, values)).sum()

    np.testing.assert_allclose(
        jax.grad(total)(kernel), jax.grad(whole)(kernel), atol=1e-6
    )
    text = str(jax.make_jaxpr(jax.grad(total))(kernel))
    assert f"[3,{FEATURES},{CLASSES}]" not in text
