"""Derivatives of the logits room against float64 autodiff of plain formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests import truth

LABELS = np.array([0, 4, 3], "int32")


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

    if name in truth.DIVERGENCES:
        of_t, of_p, share_t, share_p = truth.DIVERGENCES[name][1]
        log_m = jnp.log(share_t * t + share_p * p)
        return squared * (of_t * _kl(t, log_t, log_m) + of_p * _kl(p, log_p, log_m))
    return {
        "softmax": p,
        "log_softmax": log_p,
        "logsumexp": lse,
        "entropy": -(p * log_p).sum(-1),
        "cross_entropy": -0.8 * picked - 0.2 * log_p.mean(-1) + 0.1 * lse**2,
        "targets": -(t * log_p).sum(-1),
    }[name]


def ours(name, x, tau):
    other = jnp.asarray(truth.logits("unit", x.shape, seed=5)).astype(x.dtype)
    if name in ("softmax", "log_softmax", "logsumexp", "entropy"):
        return getattr(jaxsoft, name)(x, temperature=tau)
    if name == "cross_entropy":
        return jaxsoft.softmax_cross_entropy(
            x, LABELS, tau, label_smoothing=0.2, z_loss=0.1
        )
    if name == "targets":
        targets = jaxsoft.softmax(other, temperature=tau)
        return jaxsoft.softmax_cross_entropy(x, None, tau, targets=targets)
    return jaxsoft.distillation_loss(x, other, tau, **truth.DIVERGENCES[name][0])


NAMES = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "entropy",
    "cross_entropy",
    "targets",
    *truth.DIVERGENCES,
)


@functools.cache
def _gradients_of_all(function):
    """Compiles the gradients of every result by logits and temperature together."""

    def weighted(name, x, tau):
        out = function(name, x, tau)
        cotangent = np.random.default_rng(7).standard_normal(out.shape)
        cotangent[0] = 0
        return (out * cotangent.astype(out.dtype)).sum()

    gradient = jax.grad(weighted, (1, 2))
    return jax.jit(lambda x, tau: {name: gradient(name, x, tau) for name in NAMES})


@functools.cache
def _gradients(function, kind, dtype):
    """Returns what the program above makes of a kind of logits."""
    x = np.asarray(truth.logits(kind, (3, 5)), dtype)
    tau = np.asarray([[0.6], [1.0], [2.5]], dtype)
    return jax.tree.map(np.asarray, _gradients_of_all(function)(x, tau))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["unit", "zero", "peaked", "negative"])
def test_reverse_mode_matches_float64_autodiff(name, kind, x64):
    exact = _gradients(_plain_loss, kind, "float64")[name]
    for dtype, bound in (("float64", 1e-9), ("float32", 3e-6)):
        grads = _gradients(ours, kind, dtype)[name]
        for grad, expected in zip(grads, exact, strict=True):
            assert grad.dtype == dtype
            gap = np.asarray(grad, "float64") - expected
            assert np.abs(gap).max() < bound * (np.abs(expected).max() + 0.05)
        assert (grads[0][0] == 0).all()


def test_dropped_classes_have_no_part_in_the_gradient_of_cross_entropy():
    x = truth.logits("unit", (3, 5))
    tau = np.asarray([[0.6], [1.0], [2.5]], "float32")
    where = np.array([True, False, True, True, True])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(x, tau):
        return jaxsoft.softmax_cross_entropy(
            x, LABELS, tau, where=where, label_smoothing=0.2, z_loss=0.1
        ).sum()

    by_x, by_tau = gradients(x, tau)
    p, lse = truth.softmax(x, tau, where), truth.logsumexp(x, tau, where)
    goal = 0.8 * np.eye(5)[LABELS] + 0.2 * where / 4
    expected = (p - goal + 0.2 * lse[:, None] * p) / tau
    assert truth.error(by_x, expected) < 1e-6
    np.testing.assert_array_equal(by_x[:, ~where], 0)
    # The loss is a function of x / τ.
    assert truth.error(by_tau, -(expected * x / tau).sum(-1, keepdims=True)) < 1e-6


@jax.jit
def _gradients_of_finite_results(x, tau):
    def total(name, x, tau):
        out = ours(name, x, tau)
        return jnp.where(jnp.isfinite(out), out, 0).sum()

    gradient = jax.grad(total, (1, 2))
    return {name: gradient(name, x, tau) for name in NAMES}


@pytest.mark.parametrize("tau", [0.0, 1e-40, float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_vanish_at_the_limits(name, tau):
    x = truth.logits("unit", (3, 5))
    gradients = _gradients_of_finite_results(x, np.full((3, 1), tau, "float32"))
    by_x, by_tau = gradients[name]
    assert not np.isnan(by_x).any() and (np.asarray(by_tau) == 0).all()
    if tau < 1 or name not in truth.DIVERGENCES:
        assert (np.asarray(by_x) == 0).all()
    else:
        # The loss tends to half the variance of the difference of the logits.
        assert (np.asarray(by_x) != 0).any()


@jax.jit
def _gradients_of_one_row(x, tau):
    labels = jnp.asarray([1])
    gradients = []
    for function in (
        jaxsoft.softmax,
        jaxsoft.log_softmax,
        jaxsoft.logsumexp,
        jaxsoft.entropy,
        lambda x, temperature: jaxsoft.softmax_cross_entropy(x, labels, temperature),
        lambda x, temperature: jaxsoft.distillation_loss(x, x[:, ::-1], temperature),
    ):

        def total(x, tau, function=function):
            out = function(x, temperature=tau)
            return jnp.where(jnp.isfinite(out), out, 0).sum()

        gradients.append(jax.grad(total, (0, 1))(x, tau))
    return gradients


@pytest.mark.parametrize("size", [1.0, 1e20, 3e38])
@pytest.mark.parametrize("tau", [1.2e-38, 1e-3, 1.0, 1e10, 3e38])
def test_gradients_of_extreme_inputs_are_never_nan(size, tau):
    x = np.asarray([[1.0, 0.9, -1.0, 0.0]], "float32") * np.float32(size)
    for grads in _gradients_of_one_row(x, np.full((1, 1), tau, "float32")):
        for grad in grads:
            assert not np.isnan(grad).any()


def test_empty_rows_have_no_gradient():
    x = np.zeros((2, 3), "float32")
    x[0] = -np.inf

    @jax.jit
    def gradients(x, tau):
        def total(x, tau):
            labels = jnp.asarray([0, 1])
            loss = jaxsoft.softmax_cross_entropy(x, labels, tau, z_loss=0.1)
            return loss.sum() + jaxsoft.entropy(x, temperature=tau).sum()

        return jax.value_and_grad(total, (0, 1))(x, tau)

    value, (by_x, by_tau) = gradients(x, np.ones((2, 1), "float32"))
    assert np.isfinite(value) and np.isfinite(by_x).all()
    assert (np.asarray(by_x)[0] == 0).all() and by_tau[0] == 0


def test_upstream_cotangent_scales_the_gradient():
    x = truth.logits("unit", (3, 5))

    @jax.jit
    @jax.grad
    def gradient(x, scale):
        return scale * jaxsoft.softmax_cross_entropy(x, LABELS, 0.5).sum()

    np.testing.assert_allclose(gradient(x, 2.0), 2 * gradient(x, 1.0), rtol=1e-6)


def test_targets_have_a_gradient_even_at_zero():
    x = truth.logits("unit", (1, 4))
    targets = np.asarray([[0.0, 1.0, 0.0, 0.0]], "float32")

    @jax.jit
    @jax.grad
    def gradient(targets):
        return jaxsoft.softmax_cross_entropy(x, targets=targets)[0]

    np.testing.assert_allclose(gradient(targets), -jaxsoft.log_softmax(x), rtol=1e-6)


def test_bfloat16_logits_get_bfloat16_gradients():
    @jax.jit
    def gradients(x):
        return [
            jax.grad(lambda x, f=function: f(x)[0].sum().astype("float32"))(x)
            for function in (jaxsoft.softmax, jaxsoft.entropy)
        ]

    x = truth.logits("unit", (3, 5)).astype(jnp.bfloat16)
    for grad in gradients(x):
        assert grad.dtype == jnp.bfloat16
