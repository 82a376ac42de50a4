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
    return tuple(jnp.asarray(z, dtype) for z in pair)


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


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradients(name, x64):
    ours, plain = PAIRS[name]
    args = (*embeddings("float64"), jnp.float64(0.3))
    for implementation in ("xla", "reference"):
        call = functools.partial(ours, tile_bytes=TILE, implementation=implementation)
        a, b = (jax.value_and_grad(f, range(3))(*args) for f in (call, plain))
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.many_cases
def test_other_dtypes(name, dtype):
    ours, plain = PAIRS[name]
    pair = embeddings(dtype)
    loss, grad = jax.value_and_grad(ours)(*pair, 0.3)
    assert loss.dtype == jnp.float32 and grad.dtype == dtype
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z.astype("float32")), "float64") for z in pair]
        true = plain(*wide, 0.3)
    np.testing.assert_allclose(loss, true, rtol=1e-6 if dtype == "float32" else 2e-2)


def test_symmetry():
    a, b = embeddings()
    for loss in (nt_xent, clip_loss):
        first = jax.grad(loss, (0, 1))(a, b)
        second = jax.grad(loss, (1, 0))(b, a)
        for x, y in zip(first, second, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_without_a_positive_there_is_no_loss():
    z = embeddings()[0]
    grad = jax.value_and_grad(supervised_contrastive)
    for rows in (1, 5, COUNT):
        loss, gradient = grad(z[:rows], jnp.arange(rows))
        assert loss == 0 and (np.asarray(gradient) == 0).all()
    for loss in (nt_xent, clip_loss):
        assert loss(z[:0], z[:0]) == 0
    assert supervised_contrastive(z[:0], jnp.zeros(0, int)) == 0


def test_a_zero_embedding_has_finite_gradients():
    a, b = embeddings()
    for loss in (nt_xent, clip_loss):
        gradients = jax.grad(loss, (0, 1))(a.at[3].set(0), b)
        assert all(np.isfinite(g).all() for g in gradients)
    huge = jax.grad(clip_loss)(a * 1e30, b)
    assert np.isfinite(huge).all()


def test_messages():
    z = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="`positives` must have shape"):
        nt_xent(z, z[:2])
    with pytest.raises(ValueError, match="`temperature` must be a scalar"):
        clip_loss(z, z, jnp.ones(3))
    with pytest.raises(TypeError, match="`labels` must have an integer dtype"):
        supervised_contrastive(z, jnp.ones(3))
    with pytest.raises(ValueError, match=r"`image` must have shape \[N, D\]"):
        clip_loss(z[0], z)
