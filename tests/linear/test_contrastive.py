"""Contrastive losses against stored similarities, and without any positive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import clip_loss, nt_xent, supervised_contrastive

COUNT, WIDTH = 33, 7
TILE = 4 * 8 * 128
LABELS = np.random.default_rng(2).integers(0, 9, COUNT)


def embeddings(dtype="float32"):
    rng = np.random.default_rng(0)
    pair = rng.standard_normal((2, COUNT, WIDTH))
    return tuple(z.astype(dtype) for z in pair)


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def plain_nt_xent(anchors, positives, tau):
    z = unit(jnp.concatenate([anchors, positives]))
    own = jnp.eye(2 * COUNT, dtype=bool)
    log_p = jax.nn.log_softmax(jnp.where(own, -jnp.inf, z @ z.T / tau))
    rows = jnp.arange(2 * COUNT)
    return -log_p[rows, jnp.roll(rows, COUNT)].mean()


def plain_clip(image, text, tau):
    u = unit(image) @ unit(text).T / tau
    rows = jnp.arange(COUNT)
    return -sum(jax.nn.log_softmax(a)[rows, rows].mean() for a in (u, u.T)) / 2


def plain_supervised(z, _, tau):
    z, labels = unit(z), jnp.asarray(LABELS)
    own = jnp.eye(COUNT, dtype=bool)
    log_p = jax.nn.log_softmax(jnp.where(own, -1e30, z @ z.T / tau))
    positive = (labels[:, None] == labels[None]) & ~own
    number = positive.sum(1).astype(z.dtype)
    loss = -jnp.where(positive, log_p, 0).sum(1) / jnp.maximum(number, 1)
    return jnp.where(number > 0, loss, 0).sum() / (number > 0).sum().astype(z.dtype)


PAIRS = {
    "nt_xent": (nt_xent, plain_nt_xent),
    "clip_loss": (clip_loss, plain_clip),
    "supervised_contrastive": (
        lambda z, _, tau, **o: supervised_contrastive(z, jnp.asarray(LABELS), tau, **o),
        plain_supervised,
    ),
}


@functools.cache
def gradients(loss):
    """Compiles the gradients of a loss of two kinds of embeddings."""
    return jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradients(name, x64):
    ours, plain = PAIRS[name]

    @jax.jit
    def step(*args):
        calls = [
            functools.partial(ours, workspace_bytes=TILE, implementation=implementation)
            for implementation in ("xla", "reference")
        ]
        return [jax.value_and_grad(f, range(3))(*args) for f in (plain, *calls)]

    exact, *found = step(*embeddings("float64"), np.float64(0.3))
    for result in found:
        for x, y in zip(*map(jax.tree.leaves, (result, exact)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.many_cases
def test_other_dtypes(name, dtype):
    ours, plain = PAIRS[name]
    pair = embeddings(dtype)
    loss, grad = jax.jit(jax.value_and_grad(lambda *pair: ours(*pair, 0.3)))(*pair)
    assert loss.dtype == jnp.float32 and grad.dtype == dtype
    with jax.enable_x64(True):
        wide = [z.astype("float64") for z in pair]
        true = jax.jit(plain)(*wide, 0.3)
    np.testing.assert_allclose(loss, true, rtol=1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("loss", [nt_xent, clip_loss])
def test_symmetry(loss):
    a, b = embeddings()
    first = gradients(loss)(a, b)
    second = gradients(loss)(b, a)[::-1]
    for x, y in zip(first, second, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_without_a_positive_there_is_no_loss():
    z = embeddings()[0]
    grad = jax.jit(jax.value_and_grad(supervised_contrastive))
    for rows in (1, COUNT):
        loss, gradient = grad(z[:rows], np.arange(rows))
        assert loss == 0 and (np.asarray(gradient) == 0).all()
    for loss in (nt_xent, clip_loss):
        assert loss(z[:0], z[:0]) == 0
    assert supervised_contrastive(z[:0], np.zeros(0, int)) == 0


def test_a_zero_embedding_has_finite_gradients():
    a, b = embeddings()
    zero = a.copy()
    zero[3] = 0
    for loss in (nt_xent, clip_loss):
        assert all(np.isfinite(g).all() for g in gradients(loss)(zero, b))
    huge, _ = gradients(clip_loss)(a * np.float32(1e30), b)
    assert np.isfinite(huge).all()


def test_messages():
    z = np.ones((3, 2), "float32")
    with pytest.raises(ValueError, match="`positives` must have shape"):
        nt_xent(z, z[:2])
    with pytest.raises(ValueError, match="`temperature` must be a scalar"):
        clip_loss(z, z, np.ones(3, "float32"))
    with pytest.raises(TypeError, match="`labels` must have an integer dtype"):
        supervised_contrastive(z, np.ones(3, "float32"))
    with pytest.raises(ValueError, match=r"`image` must have shape \[N, D\]"):
        clip_loss(z[0], z)
