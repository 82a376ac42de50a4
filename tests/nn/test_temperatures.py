"""Modules that hold a temperature: fitted after training, or trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsoft
from jaxsoft.nn import LearnableTemperature, SoftmaxHead, TemperatureScaling

BAD: Any = "a"
RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((400, 8)).astype("float32")
KERNEL = RNG.standard_normal((8, 10)).astype("float32")
LOGITS = HIDDEN @ KERNEL
LABELS = (LOGITS / 3 + RNG.gumbel(size=LOGITS.shape)).argmax(1).astype("int32")


@functools.cache
def fitted() -> Any:
    """Returns the temperature of the logits, for tests alone that need it."""
    return jaxsoft.fit_temperature(LOGITS, LABELS)


@jax.jit
def mean_loss(logits, tau=1.0):
    return jaxsoft.softmax_cross_entropy(logits, LABELS, tau).mean()


def test_scaling_fits_and_divides():
    scaling = TemperatureScaling()
    np.testing.assert_array_equal(scaling(LOGITS), LOGITS)
    before, best = mean_loss(scaling(LOGITS)), fitted()
    assert scaling.fit(LOGITS, LABELS) == best and 2 < best.temperature < 4
    assert scaling.temperature[...] == best.temperature
    np.testing.assert_allclose(scaling(LOGITS), LOGITS / best.temperature, rtol=1e-6)
    after = mean_loss(scaling(LOGITS))
    np.testing.assert_allclose(after, best.nll, rtol=1e-6)
    assert after < before - 0.05
    other = TemperatureScaling(2.0)
    fit = other.fit_linear(HIDDEN, KERNEL.T, LABELS, kernel_layout="vh")
    np.testing.assert_allclose(fit.temperature, best.temperature, rtol=1e-5)
    assert other.temperature[...] == fit.temperature
    weights, where = np.arange(400) > 200, np.arange(10)[None] < 10
    fit = other.fit(LOGITS, LABELS, where=where, weights=weights, bounds=(0.1, 0.2))
    assert fit.at_bound == 1 and other.temperature[...] == np.float32(0.2)
    assert not jax.tree.leaves(nnx.state(scaling, nnx.Param))


def test_scaling_under_jit_and_a_bad_label():
    @nnx.jit
    def fit(scaling, logits, labels):
        scaling.fit(logits, labels)
        return scaling(logits.astype("bfloat16"))

    scaling = TemperatureScaling()
    scaled = fit(scaling, LOGITS, LABELS)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(
        scaling.temperature[...], fitted().temperature, rtol=1e-6
    )
    fit(scaling, LOGITS, np.where(np.arange(400) == 0, 10, LABELS).astype("int32"))
    assert np.isnan(scaling.temperature[...])


@nnx.jit
def scaled_and_gradient(scaling, logits):
    """Returns scaled logits, and the gradient of their softmax's first class."""
    gradient = jax.grad(lambda x: jax.nn.softmax(scaling(x))[:, 0].sum())(logits)
    return scaling(logits), gradient


@pytest.mark.parametrize("tau", [0.0, 0.07, 1.3, 1e4, np.inf])
@pytest.mark.parametrize("scale", [1.0, 1e9, 3e38])
def test_scaled_logits_have_the_tempered_softmax(tau, scale):
    """Compiled too, and with -inf logits; x / τ exactly wherever that is harmless."""
    logits = np.array([[1, 0.5, -1], [1, 1, -np.inf], [-1, -0.5, 0]], "float32")
    logits *= np.float32(scale)
    scaling = TemperatureScaling(tau)
    expected = jaxsoft.softmax(logits, temperature=np.float32(tau))
    compiled, gradient = scaled_and_gradient(scaling, logits)
    for scaled in map(np.asarray, (scaling(logits), compiled)):
        assert not np.isnan(scaled).any()
        np.testing.assert_allclose(jax.nn.softmax(scaled), expected, rtol=1e-5)
        assert scaled[1, 2] == -np.inf
        if scale == 1 and 0 < tau < np.inf:
            np.testing.assert_allclose(scaled, logits / np.float32(tau), rtol=1e-6)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and (tau > 0 or (gradient == 0).all())


def test_an_offset_survives_scaling():
    coarse = np.round(LOGITS * 4) / 4
    scaling = TemperatureScaling(1.3)
    np.testing.assert_allclose(
        jax.nn.softmax(scaling(coarse + np.float32(1e6))),
        jax.nn.softmax(scaling(coarse)),
        1e-5,
    )


def loss(temperature, logits=LOGITS):
    return jaxsoft.softmax_cross_entropy(logits, LABELS, temperature()).mean()


def train(temperature, steps, optimizer, loss=loss):
    """Returns the module's temperatures on the way."""
    optimizer = nnx.Optimizer(temperature, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(temperature, optimizer):
        optimizer.update(temperature, nnx.grad(loss)(temperature))

    taus = []
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        for _ in range(steps):
            step(temperature, optimizer)
            taus.append(float(temperature()))
    return taus


def test_training_ends_at_the_fit():
    taus = train(LearnableTemperature(), 150, optax.adam(0.1))
    np.testing.assert_allclose(taus[-1], fitted().temperature, rtol=1e-3)


def test_momentum_beyond_a_bound_and_back():
    """The optimum is beyond the bound at first, then inside: the parameter returns."""
    temperature = LearnableTemperature(1.9, bounds=(0.5, 2.0))
    taus = train(temperature, 20, optax.sgd(0.5, momentum=0.9))
    assert max(taus) == 2.0
    out = float(temperature.log_temperature[...])
    assert out > np.log(2.0) + 1e-3
    # Nothing pushes it on: without momentum it stays where it is.
    assert train(temperature, 3, optax.sgd(1.0)) == [2.0] * 3
    assert float(temperature.log_temperature[...]) == np.float32(out)
    back = train(
        temperature, 100, optax.adam(0.05), lambda module: loss(module, LOGITS / 2)
    )
    np.testing.assert_allclose(back[-1], fitted().temperature / 2, rtol=1e-2)
    assert back[-1] < 1.9


def test_gradients_at_both_bounds():
    slope = nnx.jit(nnx.grad(lambda module, sign: sign * module()))

    def gradient(log_tau, sign):
        module = LearnableTemperature(bounds=(0.5, 2.0))
        module.log_temperature[...] = jnp.float32(log_tau)
        return float(jax.tree.leaves(slope(module, np.float32(sign)))[0])

    for sign in (1.0, -1.0):
        np.testing.assert_allclose(gradient(0.1, sign), sign * np.exp(0.1), rtol=1e-6)
    assert gradient(1.0, 1.0) == 2.0 and gradient(1.0, -1.0) == 0
    assert gradient(-1.0, -1.0) == -0.5 and gradient(-1.0, 1.0) == 0
    assert gradient(200.0, 1.0) == 2.0 and gradient(-200.0, -1.0) == -0.5


def test_a_learnable_temperature_of_functions_and_heads():
    """Given to a method, or to the head, whose parameter it becomes."""
    temperature = LearnableTemperature(0.5)
    head = SoftmaxHead(8, 10, temperature=temperature, rngs=nnx.Rngs(0))
    assert head.kernel is not None
    head.kernel[...] = jnp.asarray(KERNEL)
    plain = SoftmaxHead(8, 10, rngs=nnx.Rngs(0))
    plain.kernel = head.kernel

    @nnx.jit
    def results(temperature, head, plain):
        tau = temperature()
        return (
            jaxsoft.linear_cross_entropy(HIDDEN, KERNEL, LABELS, temperature=tau),
            nnx.value_and_grad(lambda head: head.loss(HIDDEN, LABELS))(head),
            plain.loss(HIDDEN, LABELS, temperature=tau),
            jax.value_and_grad(mean_loss, 1)(LOGITS, 0.5),
        )

    of_function, (loss, grads), of_plain, (expected, slope) = results(
        temperature, head, plain
    )
    np.testing.assert_allclose(of_function, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, of_plain, rtol=1e-6)
    (grad,) = jax.tree.leaves(grads["temperature"])
    np.testing.assert_allclose(grad, 0.5 * slope, rtol=1e-4)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: TemperatureScaling(-1.0), ValueError, "`temperature` must not be neg"),
        (lambda: TemperatureScaling(BAD), TypeError, "`temperature` must be a real"),
        (
            lambda: TemperatureScaling(jnp.ones(2)),
            ValueError,
            "`temperature` must have",
        ),
        (lambda: TemperatureScaling()(LABELS), TypeError, "`logits` must have a float"),
        (
            lambda: LearnableTemperature(11),
            ValueError,
            r"must lie in \[0.01, 10\], got",
        ),
        (lambda: LearnableTemperature(BAD), TypeError, "`temperature` must be a Pyth"),
        (
            lambda: LearnableTemperature(bounds=(0, 1)),
            ValueError,
            r"`bounds` must lie in \[1e-30",
        ),
    ],
)
def test_messages(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
