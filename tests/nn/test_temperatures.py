"""Modules that hold a temperature: fitted after training, or trained."""

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
HIDDEN = jnp.asarray(RNG.standard_normal((400, 8)), "float32")
KERNEL = jnp.asarray(RNG.standard_normal((8, 10)), "float32")
LOGITS = HIDDEN @ KERNEL
LABELS = jnp.asarray((LOGITS / 3 + RNG.gumbel(size=LOGITS.shape)).argmax(1))
FIT = jaxsoft.fit_temperature(LOGITS, LABELS)


def test_scaling_fits_and_divides():
    scaling = TemperatureScaling()
    np.testing.assert_array_equal(scaling(LOGITS), LOGITS)
    before = jaxsoft.softmax_cross_entropy(scaling(LOGITS), LABELS).mean()
    assert scaling.fit(LOGITS, LABELS) == FIT and 2 < FIT.temperature < 4
    assert scaling.temperature[...] == FIT.temperature
    np.testing.assert_allclose(scaling(LOGITS), LOGITS / FIT.temperature, rtol=1e-6)
    after = jaxsoft.softmax_cross_entropy(scaling(LOGITS), LABELS).mean()
    np.testing.assert_allclose(after, FIT.nll, rtol=1e-6)
    assert after < before - 0.05
    other = TemperatureScaling(2.0)
    fit = other.fit_linear(HIDDEN, KERNEL.T, LABELS, kernel_layout="vh")
    np.testing.assert_allclose(fit.temperature, FIT.temperature, rtol=1e-5)
    assert other.temperature[...] == fit.temperature
    weights, where = jnp.arange(400) > 200, jnp.arange(10)[None] < 10
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
    np.testing.assert_allclose(scaling.temperature[...], FIT.temperature, rtol=1e-6)
    fit(scaling, LOGITS, LABELS.at[0].set(10))
    assert np.isnan(scaling.temperature[...])


@pytest.mark.parametrize("tau", [0.0, 0.07, 1.3, 1e4, np.inf])
@pytest.mark.parametrize("scale", [1.0, 1e9, 3e38])
def test_scaled_logits_have_the_tempered_softmax(tau, scale):
    """Compiled too, and with -inf logits; x / τ exactly wherever that is harmless."""
    logits = np.array([[1, 0.5, -1], [1, 1, -np.inf], [-1, -0.5, 0]], "float32")
    logits *= np.float32(scale)
    scaling = TemperatureScaling(tau)
    expected = jaxsoft.softmax(logits, tau)
    for call in (scaling, jax.jit(lambda x: scaling(x))):
        scaled = call(logits)
        assert not np.isnan(scaled).any()
        np.testing.assert_allclose(jax.nn.softmax(scaled), expected, rtol=1e-5)
        assert scaled[1, 2] == -np.inf
        if scale == 1 and 0 < tau < np.inf:
            np.testing.assert_allclose(scaled, logits / np.float32(tau), rtol=1e-6)
    gradient = jax.grad(lambda x: jax.nn.softmax(scaling(x))[:, 0].sum())(logits)
    assert np.isfinite(gradient).all() and (tau > 0 or (gradient == 0).all())


def test_an_offset_survives_scaling():
    coarse = jnp.round(LOGITS * 4) / 4
    scaling = TemperatureScaling(1.3)
    np.testing.assert_allclose(
        jax.nn.softmax(scaling(coarse + 1e6)), jax.nn.softmax(scaling(coarse)), 1e-5
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
    np.testing.assert_allclose(taus[-1], FIT.temperature, rtol=1e-3)


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
    np.testing.assert_allclose(back[-1], FIT.temperature / 2, rtol=1e-2)
    assert back[-1] < 1.9


def test_gradients_at_both_bounds():
    def gradient(log_tau, sign):
        module = LearnableTemperature(bounds=(0.5, 2.0))
        module.log_temperature[...] = jnp.float32(log_tau)
        grads = nnx.grad(lambda module: sign * module())(module)
        return float(jax.tree.leaves(grads)[0])

    for sign in (1.0, -1.0):
        np.testing.assert_allclose(gradient(0.1, sign), sign * np.exp(0.1), rtol=1e-6)
    assert gradient(1.0, 1.0) == 2.0 and gradient(1.0, -1.0) == 0
    assert gradient(-1.0, -1.0) == -0.5 and gradient(-1.0, 1.0) == 0
    assert gradient(200.0, 1.0) == 2.0 and gradient(-200.0, -1.0) == -0.5


def test_a_learnable_temperature_of_functions_and_heads():
    """Given to a method, or to the head, whose parameter it becomes."""
    temperature = LearnableTemperature(0.5)
    np.testing.assert_allclose(
        jaxsoft.linear_cross_entropy(HIDDEN, KERNEL, LABELS, temperature=temperature()),
        jaxsoft.softmax_cross_entropy(LOGITS, LABELS, 0.5).mean(),
        rtol=1e-5,
    )
    head = SoftmaxHead(8, 10, temperature=temperature, rngs=nnx.Rngs(0))
    assert head.kernel is not None
    head.kernel[...] = KERNEL
    plain = SoftmaxHead(8, 10, rngs=nnx.Rngs(0))
    plain.kernel = head.kernel
    np.testing.assert_allclose(
        head.loss(HIDDEN, LABELS),
        plain.loss(HIDDEN, LABELS, temperature=temperature()),
        rtol=1e-6,
    )
    grads = nnx.grad(lambda head: head.loss(HIDDEN, LABELS))(head)
    (grad,) = jax.tree.leaves(grads["temperature"])
    expected = jax.grad(
        lambda t: jaxsoft.softmax_cross_entropy(LOGITS, LABELS, t).mean()
    )(0.5)
    np.testing.assert_allclose(grad, 0.5 * expected, rtol=1e-4)


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
