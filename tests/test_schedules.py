"""Temperature schedules: their formulas, under jit, and inside Optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft
from jaxsoft import schedules

BAD: Any = "a"
STEPS = np.array([0, 1, 2, 29, 30, 31, 499, 500, 7001, 100_000, 10_000_000])
T = STEPS.astype(np.float64)

CASES = {
    "exponential": (
        schedules.exponential(1e-4, 0.05),
        np.maximum(0.05, np.exp(-1e-4 * T)),
    ),
    "exponential slow": (
        schedules.exponential(1e-7, 0.1, initial=2.0),
        np.maximum(0.1, 2 * np.exp(-1e-7 * T)),
    ),
    "exponential every 500": (
        schedules.exponential(1e-4, 0.05, update_every=500),
        np.maximum(0.05, np.exp(-1e-4 * (STEPS // 500 * 500))),
    ),
    "exponential rate 0": (schedules.exponential(0), np.ones(len(T))),
    "linear": (schedules.linear(30), 1 - np.minimum(T / 30, 1)),
    "linear up": (
        schedules.linear(500, initial=0.5, final=2),
        0.5 + 1.5 * np.minimum(T / 500, 1),
    ),
    "inverse_time": (schedules.inverse_time(3.0), 3 / np.maximum(T, 1)),
    "inverse_time, minimum": (
        schedules.inverse_time(3.0, 0.25),
        np.maximum(0.25, 3 / np.maximum(T, 1)),
    ),
    "cosine": (
        schedules.cosine(500, initial=2.0, final=0.5),
        0.5 + 0.75 * (1 + np.cos(np.pi * np.minimum(T / 500, 1))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    """Of Python ints, of an array, and of a traced scalar; steps below 0 are 0."""
    schedule, truth = CASES[name]
    assert np.ptp(truth) > 0 or name == "exponential rate 0"
    array = schedule(STEPS)
    assert array.dtype == jnp.float32
    np.testing.assert_allclose(array, truth, rtol=3e-6, atol=1e-7)
    one_by_one = [schedule(int(step)) for step in STEPS]
    assert all(a.dtype == jnp.float32 and a.shape == () for a in one_by_one)
    np.testing.assert_allclose(one_by_one, truth, rtol=3e-6, atol=1e-7)
    compiled = jax.jit(schedule)
    traced = [compiled(jnp.int32(step)) for step in STEPS]
    np.testing.assert_allclose(traced, truth, rtol=3e-6, atol=1e-7)
    assert schedule(-5) == schedule(0)


def test_ends_are_exact():
    assert schedules.linear(30)(30) == 0
    assert schedules.exponential(1e-3, 0.5)(10**9) == 0.5
    assert schedules.cosine(10)(10) == 0
    assert schedules.inverse_time(2.0)(0) == schedules.inverse_time(2.0)(1) == 2
    held = schedules.exponential(1e-3, 0.1, update_every=100)
    assert held(100) == held(199) > held(200)
    assert held(1e2) == held(jnp.float32(150)) == held(jnp.uint8(150))


def test_float32_with_x64(x64):
    schedule = jax.jit(schedules.exponential(1e-3, 0.1))
    assert schedule(jnp.int64(7)).dtype == jnp.float32


def test_inside_optax():
    schedule = schedules.exponential(0.5, 0.1)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    scale = optax.scale_by_schedule(schedule)
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        params = jnp.zeros(2)
        state, scale_state = optimizer.init(params), scale.init(params)
        for step in range(3):
            update, state = jax.jit(optimizer.update)(jnp.ones(2), state)
            scaled, scale_state = jax.jit(scale.update)(jnp.ones(2), scale_state)
            expected = np.exp(-0.5 * step)
            np.testing.assert_allclose(update, [-expected] * 2, rtol=1e-6)
            np.testing.assert_allclose(scaled, [expected] * 2, rtol=1e-6)
        joined = optax.join_schedules([schedules.linear(10), lambda _: 0.25], [10])
        assert jax.jit(joined)(5) == 0.5 and jax.jit(joined)(11) == 0.25


def test_as_a_temperature():
    """At the end of a linear schedule a softmax is the argmax."""
    schedule, logits = schedules.linear(10), jnp.array([1.0, 3.0])

    @jax.jit
    def policy(step):
        return jaxsoft.softmax(logits, temperature=schedule(step))

    np.testing.assert_allclose(policy(5)[1], 1 / (1 + np.exp(-4)), rtol=1e-6)
    assert policy(10).tolist() == [0, 1]


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: schedules.exponential(-1.0), ValueError, "`rate` must be finite, >="),
        (lambda: schedules.exponential(BAD), TypeError, "`rate` must be a Python num"),
        (lambda: schedules.exponential(1.0, 2.0), ValueError, "`minimum` must be at m"),
        (lambda: schedules.exponential(1.0, 0, initial=0), ValueError, "be positive"),
        (
            lambda: schedules.exponential(1.0, update_every=0),
            ValueError,
            "`update_every` must be at least 1",
        ),
        (lambda: schedules.linear(0), ValueError, "`steps` must be at least 1, got 0"),
        (lambda: schedules.linear(BAD), TypeError, "`steps` must be an int, got 'a'"),
        (lambda: schedules.linear(2, final=-1), ValueError, "`final` must be finite, "),
        (lambda: schedules.inverse_time(1, 2), ValueError, "`minimum` must be at most"),
        (lambda: schedules.cosine(5, final=2), ValueError, "`final` must be at most 1"),
        (lambda: schedules.linear(5)(True), TypeError, "`step` must be a real number"),
        (lambda: schedules.linear(5)(1j), TypeError, "`step` must be a real number"),
    ],
)
def test_messages(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
