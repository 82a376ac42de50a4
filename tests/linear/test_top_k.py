"""The best classes: exact, normalised, differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_top_k
from tests import truth
from tests.linear import cases

TILE = 4 * 8 * 256


@functools.partial(jax.jit, static_argnums=2)
def best_of_stored(hidden, kernel, k):
    """Returns the logits, and which of them are the largest."""
    u = hidden @ kernel
    return u, jax.lax.top_k(u, k)[1]


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("classes, k", [(1, 1), (20, 20), (300, 1), (1009, 50)])
def test_top_k_is_exact(classes, k, kind):
    hidden, kernel, _ = cases.layer(13, 8, classes, kind=kind)
    log_probs, ids = linear_top_k(
        hidden, kernel, k, temperature=0.7, workspace_bytes=TILE
    )
    u, best = best_of_stored(hidden, kernel, k)
    np.testing.assert_array_equal(ids, best)
    true = truth.log_softmax(np.asarray(u, np.float64), 0.7)
    true = np.take_along_axis(true, np.asarray(ids), 1)
    plain = truth.log_softmax(np.asarray(u), np.float32(0.7)).astype("float32")
    plain = np.take_along_axis(plain, np.asarray(ids), 1)
    truth.assert_as_good(log_probs, plain, true, slack=3e-6)
    assert (np.asarray(log_probs) <= 0).all()


def test_top_k_with_fewer_classes_than_k():
    hidden, kernel, _ = cases.layer(3, 8, 300)
    mask = np.isin(np.arange(300), [4, 200])
    log_probs, ids = linear_top_k(
        hidden, kernel, 4, class_mask=mask, workspace_bytes=TILE
    )
    log_probs, ids = np.asarray(log_probs), np.asarray(ids)
    assert set(ids[0, :2].tolist()) == {4, 200}
    np.testing.assert_array_equal(ids[:, 2:], -1)
    np.testing.assert_array_equal(log_probs[:, 2:], -np.inf)
    np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("workspace_bytes", [TILE, 2**16, None])
@pytest.mark.parametrize("classes, k", [(1009, 7), (3001, 7), (3001, 40)])
def test_equal_logits_come_by_class(classes, k, workspace_bytes):
    """Whether they lie in one block of classes, in several, or in several tiles."""
    random = np.random.default_rng(classes + k)
    hidden = random.integers(-1, 2, (13, 8)).astype("float32")
    kernel = random.integers(-1, 2, (8, classes)).astype("float32")
    mask = random.random(classes) < 0.6
    _, ids = linear_top_k(
        hidden, kernel, k, class_mask=mask, workspace_bytes=workspace_bytes
    )
    logits = np.where(mask, hidden @ kernel, -np.inf)
    # A stable sort of negative logits keeps equal ones in order.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, best)


@pytest.mark.parametrize("workspace_bytes", [2**16, None])
def test_best_of_blocks_whose_classes_are_not_kept(workspace_bytes):
    """Blocks without any kept class fill the places, and are told apart from none."""
    hidden, kernel, _ = cases.layer(13, 8, 3001)
    mask = np.isin(np.arange(3001), [7, 1600, 3000])
    log_probs, ids = linear_top_k(
        hidden, kernel, 7, class_mask=mask, workspace_bytes=workspace_bytes
    )
    np.testing.assert_array_equal(np.sort(ids[:, :3], axis=1), [[7, 1600, 3000]] * 13)
    np.testing.assert_array_equal(ids[:, 3:], -1)
    np.testing.assert_array_equal(log_probs[:, 3:], -np.inf)
    np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, rtol=1e-6)


def test_top_k_gradients():
    hidden, kernel, _ = cases.layer(6, 8, 300)
    tau = np.full(6, 0.8, "float32")

    def ours(hidden, kernel, tau):
        log_probs, _ = linear_top_k(
            hidden, kernel, 5, temperature=tau, workspace_bytes=TILE
        )
        return (log_probs * jnp.arange(5.0)[None]).sum()

    def plain(hidden, kernel, tau):
        log_p = jax.nn.log_softmax(hidden @ kernel / tau[:, None])
        return (jax.lax.top_k(log_p, 5)[0] * jnp.arange(5.0)[None]).sum()

    @jax.jit
    def both(*args):
        return [jax.grad(f, (0, 1, 2))(*args) for f in (ours, plain)]

    for a, b in zip(*both(hidden, kernel, tau), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_messages():
    hidden, kernel, _ = cases.layer(6, 8, 30)
    with pytest.raises(ValueError, match="`k` must be at most V = 30, got 31"):
        linear_top_k(hidden, kernel, 31)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        linear_top_k(hidden, kernel, 0)
