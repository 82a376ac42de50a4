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
    values = rng.standard_normal((CLASSES, WIDTH)).astype(dtype)
    bias = rng.standard_normal(CLASSES).astype(dtype)
    tau = np.linspace(0.4, 2, ROWS).astype("float64" if dtype == "float64" else "f")
    return *map(np.asarray, (hidden, kernel, values, bias)), tau


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
        workspace_bytes=TILE,
        **options,
    )


@jax.jit
def plain_values(hidden, kernel, values):
    logits = jnp.matmul(hidden, kernel, preferred_element_type="float32")
    return jax.nn.softmax(logits / 0.7).astype(values.dtype) @ values


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(kind, dtype):
    hidden, kernel, _ = cases.layer(ROWS, FEATURES, CLASSES, kind, dtype)
    values = layer(dtype)[2]
    out = linear_expected(hidden, kernel, values, temperature=0.7, workspace_bytes=TILE)
    assert out.dtype == values.dtype
    u = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    true = truth.softmax(u, 0.7) @ np.asarray(values, np.float64)
    plain = plain_values(hidden, kernel, values)
    truth.assert_as_good(
        np.asarray(out, "float32"),
        np.asarray(plain, "float32"),
        true,
        slack=2e-6 if dtype == "float32" else 4e-3,
    )


@pytest.mark.parametrize("seed", [None, 0])
def test_gradients(seed, x64):
    args = layer("float64")
    key = None if seed is None else jax.random.key(seed)
    weights = np.cos(np.arange(ROWS * WIDTH)).reshape(ROWS, WIDTH)

    @jax.jit
    def both(*args):
        def total(function, *args):
            return (function(*args, key=key) * weights).sum()

        step = jax.value_and_grad(total, range(1, 6))
        return step(streamed, *args), step(stored, *args)

    for a, b in zip(*map(jax.tree.leaves, both(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_straight_through():
    args, key = layer(), jax.random.key(0)
    _, _, values, _, _ = args

    @jax.jit
    def samples(hidden, kernel, values, bias, tau):
        args = (hidden, kernel, values, bias, tau)
        u = 0.9 * jnp.tanh((hidden @ kernel + bias[None]) / 0.9)
        best = [jnp.argmax(logits, 1) for logits in (u + gumbel(key, u.dtype), u)]
        drawn = [streamed(*args, key=k, hard=True) for k in (key, None)]
        return drawn, best

    for drawn, best in zip(*samples(*args), strict=True):
        np.testing.assert_array_equal(drawn, values[np.asarray(best)])

    def hard(*args):
        return jnp.sin(streamed(*args, key=key, hard=True)).sum()

    def through(*args):
        soft = streamed(*args, key=key)
        picked = streamed(*args, key=key, hard=True)
        return jnp.sin(soft + jax.lax.stop_gradient(picked - soft)).sum()

    # With respect to all but the values, whose gradient is that of the mixture too.
    both = jax.jit(
        lambda *args: [jax.grad(f, range(5))(*args) for f in (hard, through)]
    )
    for a, b in zip(*both(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_noise_does_not_depend_on_tiles():
    args, key = layer(), jax.random.key(7)
    for hard in (False, True):
        whole = linear_expected(*args[:3], key=key, hard=hard, workspace_bytes=2**25)
        tiled = linear_expected(*args[:3], key=key, hard=hard, workspace_bytes=TILE)
        np.testing.assert_allclose(whole, tiled, rtol=1e-5, atol=1e-6)


def test_limits_masks_and_shapes():
    hidden, kernel, values, _, _ = layer()
    best = np.argmax(hidden @ kernel, 1)
    cold = linear_expected(hidden, kernel, values, temperature=0.0)
    np.testing.assert_array_equal(cold, values[best])
    hot = linear_expected(hidden, kernel, values, temperature=float("inf"))
    mean = np.broadcast_to(values.mean(0), hot.shape)
    np.testing.assert_allclose(hot, mean, atol=1e-6)
    none = np.zeros(CLASSES, bool)
    for options in ({}, {"key": jax.random.key(0), "hard": True}):
        call = functools.partial(linear_expected, class_mask=none, **options)

        def total(*args, call=call):
            mixture = call(*args)
            return mixture.sum(), mixture

        step = jax.jit(jax.grad(total, range(3), has_aux=True))
        grads, mixture = step(hidden, kernel, values)
        np.testing.assert_array_equal(mixture, 0)
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

    mapped = jax.jit(jax.grad(total))
    np.testing.assert_allclose(
        mapped(kernel), jax.jit(jax.grad(whole))(kernel), atol=1e-6
    )
    text = str(mapped.trace(kernel).jaxpr)
    assert f"[3,{FEATURES},{CLASSES}]" not in text
