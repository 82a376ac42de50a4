"""Co-distillation against float64 NumPy: values, gradients, limits, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests import truth

WHERE = np.array([True, True, False, True, True, True])


def _consensus(x, tau, where=None):
    """Returns log q_h, [M, ..., V] in float64."""
    log_p = truth.log_softmax(x, tau, where)
    others = [np.delete(log_p, h, 0) for h in range(len(log_p))]
    with np.errstate(divide="ignore"):
        return np.stack([np.logaddexp.reduce(o) - np.log(len(o)) for o in others])


def _truth(x, tau, where=None):
    x = np.asarray(x, np.float64)
    tau = np.broadcast_to(np.asarray(tau, np.float64), (*x.shape[:-1], 1))
    log_q, log_p = _consensus(x, tau, where), truth.log_softmax(x, tau, where)
    q = np.exp(log_q)
    with np.errstate(invalid="ignore"):
        terms = np.where(q == 0, 0, q * (log_q - log_p))
    return tau[..., 0] ** 2 * terms.sum(-1)


@functools.partial(jax.jit, static_argnames="static_tau")
def _loss_and_grads(x, tau, weights, where=None, static_tau=None):
    def total(x, tau):
        temperature = tau if static_tau is None else static_tau
        loss = jaxsoft.codistillation_loss(x, temperature, where=where)
        return (weights * loss).sum(), loss

    grads, loss = jax.grad(total, (0, 1), has_aux=True)(x, tau)
    return loss, *grads


@pytest.mark.parametrize("where", [None, WHERE])
@pytest.mark.parametrize("heads", [2, 5])
@pytest.mark.parametrize("kind", ["unit", "peaked", "offset", "negative", "range"])
def test_values_and_gradients_match_float64(kind, heads, where):
    x = truth.logits(kind, (heads, 3, 6))
    tau = np.array([[0.5], [1.0], [3.0]], "float32")
    weights = np.random.default_rng(2).standard_normal((heads, 3)).astype("float32")
    loss, by_x, by_tau = _loss_and_grads(x, tau, weights, where)
    assert loss.dtype == np.float32 and (np.asarray(loss) >= 0).all()
    assert truth.error(loss, _truth(x, tau, where)) < 2e-6
    # The consensus is a constant: a head's gradient is that of its own loss.
    q, p = np.exp(_consensus(x, tau, where)), truth.softmax(x, tau, where)
    assert truth.error(by_x, weights[..., None] * tau * (p - q)) < 3e-6
    # τ² Σ q (log q - log p_τ) with q fixed.
    c = truth.centred(x, tau, where)
    c = np.where(np.isinf(c), 0, c)
    slope = 2 * _truth(x, tau, where) / tau[:, 0] + tau[:, 0] * ((q - p) * c).sum(-1)
    slope = (weights * slope).sum(0)[:, None]
    assert truth.error(by_tau, slope) < 1e-5


def test_high_temperatures_lose_no_digits():
    x = truth.logits("unit", (4, 2, 50))
    centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    others = np.stack([np.delete(centred, h, 0).mean(0) for h in range(4)])
    limit = (centred - others).var(-1) / 2, (centred - others) / 50

    def exact(tau):
        p, q = truth.softmax(x, tau), np.exp(_consensus(x, tau))
        return _truth(x, tau), tau * (p - q)

    ones = np.ones((4, 2), "float32")
    for tau, (value, slope) in (
        (20.0, exact(20.0)),
        (1e3, exact(1e3)),
        (1e8, limit),
        (1e38, limit),
        (np.inf, limit),
    ):
        traced = np.full((1, 1, 1), tau, "float32")
        for static_tau in (None, tau) if tau in (20, np.inf) else (None,):
            loss, grad, _ = _loss_and_grads(x, traced, ones, static_tau=static_tau)
            assert truth.error(loss, value) < 3e-6
            assert truth.error(grad, slope) < 3e-6


def test_high_temperatures_where_the_first_head_and_a_class_are_dropped():
    x = truth.logits("unit", (4, 2, 50))
    x[..., 7] = -np.inf
    kept = np.delete(x, 7, -1)
    x[0, 1] = -np.inf
    for tau in (1e3, 1e8):
        loss = jaxsoft.codistillation_loss(x, tau)
        all_heads = jaxsoft.codistillation_loss(kept[:, 0], tau)
        others = jaxsoft.codistillation_loss(kept[1:, 1], tau)
        assert truth.error(loss[:, 0], np.asarray(all_heads, np.float64)) < 3e-6
        assert loss[0, 1] == 0
        assert truth.error(loss[1:, 1], np.asarray(others, np.float64)) < 3e-6


def test_a_dominant_head_drowns_no_other():
    """The sum of all heads less a peaked one would leave the others no digit."""
    x = np.zeros((3, 1, 3), "float32")
    x[0, 0] = [0, -40, -60]
    x[1, 0], x[2, 0] = [-70, -30, 0], [-80, 0, -35]
    loss = jaxsoft.codistillation_loss(x)
    assert truth.error(loss, _truth(x, 1.0)) < 1e-6
    # Beyond float32's range of probabilities the consensus keeps its logarithm.
    far = np.array([[[0, -200, -300]], [[0, -200, -310]], [[0, -250, -300]]], "float32")
    loss = np.asarray(jaxsoft.codistillation_loss(far, 50.0))
    assert (np.abs(loss / _truth(far, 50.0) - 1) < 1e-5).all()


def test_two_heads_teach_each_other():
    x = truth.logits("unit", (2, 4, 6))
    loss = jaxsoft.codistillation_loss(x, 2.0)
    for head in range(2):
        exact = jaxsoft.distillation_loss(x[head], x[1 - head], 2.0)
        np.testing.assert_allclose(loss[head], exact, rtol=1e-5)


def test_equal_heads_have_no_loss():
    x = np.broadcast_to(truth.logits("unit", (1, 4, 6)), (3, 4, 6))
    for tau in (0.5, 1.0, 100.0, np.inf):
        loss = jaxsoft.codistillation_loss(x, jnp.float32(tau))
        assert np.abs(loss).max() < 1e-6


@pytest.mark.parametrize("tau", [0.0, 1e-40, 1.2e-38, 1e-3, 1e10, 3e38])
@pytest.mark.parametrize("size", [1.0, 1e20, 1e38])
def test_extreme_inputs_are_never_nan(tau, size):
    x = truth.logits("unit", (3, 2, 5)) / 4 * np.float32(size)
    x[:, 0, 0] = -np.inf
    tau = jnp.full((2, 1), tau, "float32")
    parts = _loss_and_grads(x, tau, np.ones((3, 2), "float32"))
    assert not any(np.isnan(part).any() for part in parts)
    if tau[0, 0] < 1e-39:
        assert all((np.asarray(part) == 0).all() for part in parts)


def test_heads_and_rows_without_classes():
    x = truth.logits("unit", (3, 3, 4))
    x[:, 0] = -np.inf
    x[1, 1] = -np.inf
    where = np.ones((3, 1), bool)
    where[2] = False

    def total(x):
        loss = jaxsoft.codistillation_loss(x, 2.0, where=where)
        return loss.sum(), loss

    grad, loss = jax.jit(jax.grad(total, has_aux=True))(x)
    assert (np.asarray(loss)[:, [0, 2]] == 0).all() and loss[1, 1] == 0
    assert (np.asarray(grad)[:, [0, 2]] == 0).all() and (grad[1, 1] == 0).all()
    # The two other heads teach each other alone.
    exact = jaxsoft.codistillation_loss(x[[0, 2], 1], 2.0)
    np.testing.assert_allclose(np.asarray(loss)[[0, 2], 1], exact, rtol=1e-6)


def test_mass_on_a_class_that_a_head_lacks_is_infinite():
    x = np.zeros((3, 1, 3), "float32")
    x[0, 0, 1] = -np.inf
    loss = jaxsoft.codistillation_loss(x)
    assert np.isinf(loss[0, 0]) and np.isfinite(loss[1:]).all()
    assert truth.error(loss, _truth(x, 1.0)) < 1e-6


def test_axes_batches_and_dtypes():
    x = truth.logits("unit", (2, 7, 3)).astype(jnp.bfloat16)
    loss = jaxsoft.codistillation_loss(x, 2.0, head_axis=-1, axis=1)
    assert loss.shape == (2, 3) and loss.dtype == jnp.float32
    moved = np.transpose(x, (2, 0, 1))
    np.testing.assert_allclose(
        loss.T, jaxsoft.codistillation_loss(moved, 2.0), rtol=1e-5
    )
    mapped = jax.jit(jax.vmap(jaxsoft.codistillation_loss, (1, 0), 1))
    np.testing.assert_allclose(mapped(moved, np.full(2, 2, "f")), loss.T, rtol=1e-5)
    grad = jax.jit(jax.grad(lambda x: jaxsoft.codistillation_loss(x).sum()))(moved)
    assert grad.dtype == jnp.bfloat16


X = np.zeros((2, 3, 4), "float32")
CALLS = [
    ((X.astype(int),), {}, TypeError, "`logits` must have a floating"),
    ((X[:1],), {}, ValueError, r"`logits` must have at least two heads, got shape \(1"),
    ((X,), {"head_axis": 2}, ValueError, "`head_axis` must not be the class axis, got"),
    ((X,), {"head_axis": 3}, ValueError, "`head_axis` must name one of the 3 axes of"),
    ((X,), {"head_axis": 0.0}, TypeError, "`head_axis` must be an int, got 0.0"),
    ((X,), {"axis": 5}, ValueError, "`axis` must name one of the 3 axes"),
    ((X, -1.0), {}, ValueError, "`temperature` must not be negative or NaN"),
    (
        (X, np.ones((2, 1, 1), "f")),
        {},
        ValueError,
        r"`temperature` must have size 1 on the head axis, got shape \(2, 1, 1\)",
    ),
    ((X,), {"where": X}, TypeError, "`where` must have dtype bool"),
]


@pytest.mark.parametrize("args, options, kind, message", CALLS)
def test_messages(args, options, kind, message):
    with pytest.raises(kind, match=message):
        jaxsoft.codistillation_loss(*args, **options)
