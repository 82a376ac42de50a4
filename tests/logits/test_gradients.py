"""Derivatives of the logits room against float64 autodiff of plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsoft
from tests import truth

WHERE = np.array([True, True, False, True, True])
LABELS = np.array([0, 4, 3])


def _plain(x, tau):
    return jax.nn.log_softmax(x / tau)


def _kl(p, log_p, log_q):
    return (p * (log_p - log_q)).sum(-1)


def _plain_loss(name, x, tau):
    other = jnp.asarray(truth.logits("unit", x.shape, seed=5)).astype(x.dtype)
    log_p, log_t = _plain(x, tau), _plain(other, tau)
    p, t = jnp.exp(log_p), jnp.exp(log_t)
    lse = jax.nn.logsumexp(x / tau, axis=-1)
    picked = log_p[np.arange(len(LABELS)), LABELS]
    squared = tau[..., 0] ** 2
    log_r = jnp.log((p + t) / 2)
    return {
        "softmax": p,
        "log_softmax": log_p,
        "logsumexp": lse,
        "entropy": -(p * log_p).sum(-1),
        "cross_entropy": -0.8 * picked - 0.2 * log_p.mean(-1) + 0.1 * lse**2,
        "targets": -(t * log_p).sum(-1),
        "forward_kl": squared * _kl(t, log_t, log_p),
        "reverse_kl": squared * _kl(p, log_p, log_t),
        "jensen_shannon": squared * (_kl(t, log_t, log_r) + _kl(p, log_p, log_r)) / 2,
    }[name]


def _ours(name, x, tau):
    other = jnp.asarray(truth.logits("unit", x.shape, seed=5)).astype(x.dtype)
    if name in ("softmax", "log_softmax", "logsumexp", "entropy"):
        return getattr(jaxsoft, name)(x, tau)
    if name == "cross_entropy":
        return jaxsoft.softmax_cross_entropy(
            x, LABELS, tau, label_smoothing=0.2, z_loss=0.1
        )
    if name == "targets":
        targets = jaxsoft.softmax(other, tau)
        return jaxsoft.softmax_cross_entropy(x, None, tau, targets=targets)
    return jaxsoft.distillation_loss(x, other, tau, divergence=name)


NAMES = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "entropy",
    "cross_entropy",
    "targets",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["unit", "zero", "peaked", "negative"])
@pytest.mark.many_cases
def test_reverse_mode_matches_float64_autodiff(name, kind, x64):
    x = truth.logits(kind, (3, 5))
    tau = np.array([[0.6], [1.0], [2.5]])

    def weighted(function, x, tau):
        out = function(name, x, tau)
        cotangent = np.random.default_rng(7).standard_normal(out.shape)
        cotangent[0] = 0
        return (out * cotangent.astype(out.dtype)).sum()

    exact = jax.grad(weighted, (1, 2))(_plain_loss, jnp.asarray(x, "float64"), tau)
    for dtype, bound in (("float64", 1e-9), ("float32", 3e-6)):
        args = (jnp.asarray(x, dtype), jnp.asarray(tau, dtype))
        grads = jax.jit(jax.grad(weighted, (1, 2)), static_argnums=0)(_ours, *args)
        for grad, expected in zip(grads, exact, strict=True):
            assert grad.dtype == dtype
            gap = np.asarray(grad, "float64") - np.asarray(expected)
            assert np.abs(gap).max() < bound * (np.abs(expected).max() + 0.05)
        assert (np.asarray(grads[0])[0] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.many_cases
def test_both_modes_and_second_order(name, x64):
    x = jnp.asarray(truth.logits("unit", (3, 5)), "float64")
    tau = jnp.asarray([[0.6], [1.0], [2.5]])
    order = 1 if name in ("forward_kl", "reverse_kl", "jensen_shannon") else 2
    by_both = jax.jit(lambda x, tau: _ours(name, x, tau))
    check_grads(by_both, (x, tau), order, modes=["fwd", "rev"])
    by_x = jax.jit(lambda x: _ours(name, x, 1.0))
    check_grads(by_x, (x,), order, modes=["fwd", "rev"])


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "entropy"])
@pytest.mark.many_cases
def test_masked_second_order(name, x64):
    x = jnp.asarray(truth.logits("unit", (3, 5)), "float64")

    @jax.jit
    def function(x, tau):
        out = getattr(jaxsoft, name)(x, tau, where=WHERE[None])
        return jnp.where(jnp.isinf(out), 0, out)

    check_grads(function, (x, jnp.full((3, 1), 0.7)), 2, modes=["fwd", "rev"])
    # Only the kept classes move the result.
    grad = jax.grad(lambda x: (function(x, 0.7) ** 2).sum())(x)
    assert (np.asarray(grad)[:, ~WHERE] == 0).all()
    assert (np.asarray(grad)[:, WHERE] != 0).any()


@pytest.mark.parametrize("tau", [0.0, 1e-40, float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_vanish_at_the_limits(name, tau):
    x = jnp.asarray(truth.logits("unit", (3, 5)))

    def total(x, tau):
        out = _ours(name, x, tau)
        return jnp.where(jnp.isfinite(out), out, 0).sum()

    by_x, by_tau = jax.grad(total, (0, 1))(x, jnp.full((3, 1), tau, "float32"))
    assert not np.isnan(by_x).any() and (np.asarray(by_tau) == 0).all()
    if tau < 1 or name not in ("forward_kl", "reverse_kl", "jensen_shannon"):
        assert (np.asarray(by_x) == 0).all()
    else:
        # The loss tends to half the variance of the difference of the logits.
        assert (np.asarray(by_x) != 0).any()


@pytest.mark.parametrize("size", [1.0, 1e20, 3e38])
@pytest.mark.parametrize("tau", [1.2e-38, 1e-3, 1.0, 1e10, 3e38])
def test_gradients_of_extreme_inputs_are_never_nan(size, tau):
    x = jnp.asarray([[1.0, 0.9, -1.0, 0.0]], "float32") * np.float32(size)
    labels = jnp.asarray([1])
    for function in (
        jaxsoft.softmax,
        jaxsoft.log_softmax,
        jaxsoft.logsumexp,
        jaxsoft.entropy,
        lambda x, tau: jaxsoft.softmax_cross_entropy(x, labels, tau),
        lambda x, tau: jaxsoft.distillation_loss(x, x[:, ::-1], tau),
    ):

        def total(x, tau, function=function):
            out = function(x, tau)
            return jnp.where(jnp.isfinite(out), out, 0).sum()

        for grad in jax.grad(total, (0, 1))(x, jnp.full((1, 1), tau, "float32")):
            assert not np.isnan(grad).any()


def test_empty_rows_have_no_gradient():
    x = jnp.full((2, 3), -jnp.inf).at[1].set(0.0)

    def total(x, tau):
        loss = jaxsoft.softmax_cross_entropy(x, jnp.asarray([0, 1]), tau, z_loss=0.1)
        return loss.sum() + jaxsoft.entropy(x, tau).sum()

    value, (by_x, by_tau) = jax.value_and_grad(total, (0, 1))(x, jnp.ones((2, 1)))
    assert np.isfinite(value) and np.isfinite(by_x).all()
    assert (np.asarray(by_x)[0] == 0).all() and by_tau[0] == 0


def test_upstream_cotangent_scales_the_gradient():
    x = jnp.asarray(truth.logits("unit", (3, 5)))

    def loss(x, scale):
        return scale * jaxsoft.softmax_cross_entropy(x, LABELS, 0.5).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(x, 2.0), 2 * jax.grad(loss)(x, 1.0), rtol=1e-6
    )


def test_targets_have_a_gradient_even_at_zero():
    x = jnp.asarray(truth.logits("unit", (1, 4)))
    targets = jnp.asarray([[0.0, 1.0, 0.0, 0.0]])

    def loss(targets):
        return jaxsoft.softmax_cross_entropy(x, targets=targets)[0]

    grad = jax.grad(loss)(targets)
    np.testing.assert_allclose(grad, -jaxsoft.log_softmax(x), rtol=1e-6)


def test_bfloat16_logits_get_bfloat16_gradients():
    x = jnp.asarray(truth.logits("unit", (3, 5)), jnp.bfloat16)
    for function in (jaxsoft.softmax, jaxsoft.entropy):
        grad = jax.grad(lambda x, f=function: f(x)[0].sum().astype("float32"))(x)
        assert grad.dtype == jnp.bfloat16
