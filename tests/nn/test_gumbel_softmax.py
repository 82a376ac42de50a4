"""The layer of relaxed samples: annealing, evaluation, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsoft import gumbel_softmax, schedules
from jaxsoft.nn import GumbelSoftmax, LearnableTemperature

LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)


def test_it_is_gumbel_softmax_with_the_keys_of_its_stream():
    layer = GumbelSoftmax(0.5, rngs=nnx.Rngs(gumbel=3))
    stream = nnx.Rngs(gumbel=3)["gumbel"].fork()
    for _ in range(2):
        truth = gumbel_softmax(stream(), LOGITS, 0.5)
        np.testing.assert_array_equal(layer(LOGITS), truth)
    key = jax.random.key(1)
    hard = GumbelSoftmax(0.5, hard=True, axis=0, generator="threefry13")
    truth = gumbel_softmax(key, LOGITS, 0.5, axis=0, hard=True, generator="threefry13")
    np.testing.assert_array_equal(hard(LOGITS, key=key), truth)
    assert layer.step is None


def test_a_schedule_counts_training_steps_under_jit():
    schedule = schedules.linear(4, initial=1.0, final=0.5)
    layer = GumbelSoftmax(schedule, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer, key):
        return layer(LOGITS, key=key)

    key = jax.random.key(0)
    for index in range(6):
        assert layer.current_temperature() == schedule(index)
        truth = gumbel_softmax(key, LOGITS, schedule(index))
        np.testing.assert_allclose(step(layer, key), truth, rtol=1e-6, atol=1e-7)
    layer.eval()
    layer(LOGITS)
    assert layer.step is not None and layer.step[...] == 6
    layer.train()
    layer(LOGITS)
    assert layer.step[...] == 7


def test_optax_schedules_and_learned_temperatures():
    cosine = optax.cosine_decay_schedule(2.0, 10)
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        assert GumbelSoftmax(cosine).current_temperature() == 2.0
    layer = GumbelSoftmax(LearnableTemperature(0.7), rngs=nnx.Rngs(0))
    array = GumbelSoftmax(jnp.float32(0.7), rngs=nnx.Rngs(0))

    @nnx.jit
    def results(layer, array):
        def loss(layer):
            relaxed = layer(LOGITS, key=jax.random.key(0))
            return (relaxed[:, 0] ** 2).sum(), relaxed

        gradient, relaxed = nnx.grad(loss, has_aux=True)(layer)
        return gradient, relaxed, array(LOGITS, key=jax.random.key(0))

    gradient, *relaxed = results(layer, array)
    assert np.abs(gradient["temperature"]["log_temperature"][...]) > 1e-4
    np.testing.assert_allclose(*relaxed)


@pytest.mark.parametrize("axis", [0, -1])
def test_evaluation_takes_the_lowest_argmax(axis):
    layer = GumbelSoftmax(axis=axis, rngs=nnx.Rngs(0))
    layer.eval()
    ties = np.array([[1.0, 2.0, 2.0], [-np.inf, -np.inf, -np.inf]], np.float32)
    logits = ties if axis else ties.T
    where = np.array([True, False, True])
    where = where if axis else where[:, None]

    @nnx.jit
    def results(layer):
        gradient = jax.grad(lambda x: (layer(x) * jnp.cos(x)).sum())(LOGITS)
        drawn = layer(LOGITS, deterministic=False)
        return layer(logits), layer(logits, where=where), gradient, drawn, layer(LOGITS)

    out, masked, gradient, drawn, best = map(np.asarray, results(layer))
    truth = np.array([[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(out if axis else out.T, truth)
    np.testing.assert_array_equal((masked if axis else masked.T)[0], [0, 0, 1])
    assert np.isfinite(gradient).all()
    assert (drawn != best).any()


def test_errors():
    with pytest.raises(ValueError, match="`key` must be given"):
        GumbelSoftmax()(LOGITS)
    with pytest.raises(TypeError, match="`rngs` must be an nnx.Rngs"):
        GumbelSoftmax(rngs=3)  # pyright: ignore[reportArgumentType]
