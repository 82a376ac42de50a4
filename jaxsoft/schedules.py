"""Temperature schedules: functions from a step to a temperature, as Optax's schedules.

Each takes a step, a Python int or an integer or floating array, traced or not, and
returns a float32 array of its shape. Steps below 0 count as 0. Every function of Optax
that takes a schedule takes these.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsoft._core import checks

__all__ = ["Schedule", "cosine", "exponential", "inverse_time", "linear"]

Schedule = Callable[[ArrayLike], jax.Array]


def exponential(
    rate: float,
    minimum: float = 0.5,
    *,
    initial: float = 1.0,
    update_every: int = 1,
) -> Schedule:
    """Exponential annealing down to a minimum, as of the Gumbel-softmax.

    `τ(t) = max(minimum, initial · exp(-rate · n · ⌊t / n⌋))` with n = `update_every`:
    the temperature changes once every n steps.

    Args:
      rate: r >= 0, per step; Jang et al. try 1e-5 and 1e-4.
      minimum: the lowest temperature, >= 0; 0.5 in Jang et al.
      initial: τ(0), >= `minimum`; 1 in Jang et al.
      update_every: n, the number of steps between changes; 500 or 1000 in Jang et al.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is no number, or `update_every` no int.
      ValueError: if an argument is out of its range.

    Notes:
      `optax.exponential_decay` with a decay of 1/e in 1/r steps, so that a small rate
      loses no digits.

    Example:
      >>> from jaxsoft import schedules
      >>> temperature = schedules.exponential(1e-4, 0.5, update_every=1000)
      >>> print([round(float(temperature(t)), 4) for t in (0, 999, 1000, 10**6)])
      [1.0, 1.0, 0.9048, 0.5]

    References:
      Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144.
    """
    rate = checks.scalar_in("rate", rate, 0, float("inf"))
    initial, minimum = _falling("initial", initial, "minimum", minimum)
    period = checks.positive_integer("update_every", update_every)
    if rate == 0:
        return _schedule(optax.constant_schedule(initial), initial, initial)
    decay = optax.exponential_decay(
        initial,
        transition_steps=1 / rate,  # pyright: ignore[reportArgumentType]
        decay_rate=1 / math.e,
    )
    return _schedule(decay, minimum, initial, period)


def linear(steps: int, *, initial: float = 1.0, final: float = 0.0) -> Schedule:
    """Linear change over the first steps, constant afterwards.

    `τ(t) = initial + (final - initial) · min(t / steps, 1)`.

    For self-play that explores in its first moves, as AlphaZero's, which samples moves
    by visit counts at τ = 1 for the first 30 and then takes the best: a final
    temperature of 0 is exactly the argmax everywhere in jaxsoft.

    Args:
      steps: how many steps the change takes, at least 1.
      initial: τ(0), >= 0.
      final: τ(steps) and after, >= 0.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is no number, or `steps` no int.
      ValueError: if an argument is out of its range.

    Notes:
      `optax.linear_schedule`.

    Example:
      >>> from jaxsoft import schedules
      >>> temperature = schedules.linear(30)
      >>> print([float(temperature(t)) for t in (0, 15, 30, 31)])
      [1.0, 0.5, 0.0, 0.0]

    References:
      Silver et al., Mastering Chess and Shogi by Self-Play with a General
      Reinforcement Learning Algorithm, arXiv:1712.01815.
    """
    steps = checks.positive_integer("steps", steps)
    initial = checks.scalar_in("initial", initial, 0, float("inf"))
    final = checks.scalar_in("final", final, 0, float("inf"))
    change = optax.linear_schedule(initial, final, steps)
    return _schedule(change, min(initial, final), max(initial, final))


def inverse_time(initial: float = 1.0, minimum: float = 0.0) -> Schedule:
    """Temperature in inverse proportion to time.

    `τ(t) = max(minimum, initial / max(t, 1))`: exactly τ₀ / t from step 1 on, and τ₀ at
    step 0 as at step 1, where τ₀ / t has no value.

    Args:
      initial: τ₀, the temperature at steps 0 and 1, >= `minimum`.
      minimum: the lowest temperature, >= 0.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is no number.
      ValueError: if an argument is out of its range.

    Notes:
      The fast cooling of simulated annealing. Optax has no schedule of this form.

    Example:
      >>> from jaxsoft import schedules
      >>> temperature = schedules.inverse_time(2.0)
      >>> print([float(temperature(t)) for t in (0, 1, 2, 8)])
      [2.0, 2.0, 1.0, 0.25]

    References:
      Szu and Hartley, Fast Simulated Annealing, Physics Letters A 122, 1987.
    """
    initial, minimum = _falling("initial", initial, "minimum", minimum)
    return _schedule(lambda step: initial / jnp.maximum(step, 1), minimum, initial)


def cosine(steps: int, *, initial: float = 1.0, final: float = 0.0) -> Schedule:
    """Half a cosine from one temperature down to another, constant afterwards.

    `τ(t) = final + (initial - final) · (1 + cos(π · min(t / steps, 1))) / 2`.

    Args:
      steps: how many steps the change takes, at least 1.
      initial: τ(0), > 0.
      final: τ(steps) and after, in [0, `initial`].

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is no number, or `steps` no int.
      ValueError: if an argument is out of its range.

    Notes:
      `optax.cosine_decay_schedule`.

    Example:
      >>> from jaxsoft import schedules
      >>> temperature = schedules.cosine(100, final=0.5)
      >>> print([round(float(temperature(t)), 4) for t in (0, 50, 100, 200)])
      [1.0, 0.75, 0.5, 0.5]

    References:
      Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts,
      arXiv:1608.03983.
    """
    steps = checks.positive_integer("steps", steps)
    initial, final = _falling("initial", initial, "final", final)
    decay = optax.cosine_decay_schedule(initial, steps, final / initial)
    return _schedule(decay, final, initial)


def _falling(
    high_name: str, high: float, low_name: str, low: float
) -> tuple[float, float]:
    """Returns two temperatures, of which the first must be positive and the larger."""
    high = checks.scalar_in(high_name, high, 0, float("inf"))
    low = checks.scalar_in(low_name, low, 0, float("inf"))
    if high == 0:
        raise ValueError(f"`{high_name}` must be positive, got 0.")
    if low > high:
        raise ValueError(f"`{low_name}` must be at most {high:g}, got {low:g}.")
    return high, low


def _schedule(
    of_float: optax.Schedule, lowest: float, highest: float, period: int = 1
) -> Schedule:
    """Returns `of_float` for steps of any kind, held for `period` steps.

    Values are kept in [lowest, highest], which compiled arithmetic may leave by a
    rounding: below a final temperature of 0 there would be NaN.
    """

    def schedule(step: ArrayLike) -> jax.Array:
        if isinstance(step, numbers.Real) and not isinstance(step, bool):
            step = float(step) // period * period
        else:
            step = _array(step)
            if period > 1:
                step = step // jnp.asarray(period, step.dtype) * period
        value = of_float(jnp.maximum(jnp.asarray(step, jnp.float32), 0))
        value = jnp.clip(jnp.asarray(value, jnp.float32), lowest, highest)
        return jnp.broadcast_to(value, jnp.shape(step))

    return schedule


def _array(step: ArrayLike) -> jax.Array:
    """Returns a step as an array of integers or floating-point numbers."""
    array = jnp.asarray(step)
    if not (
        jnp.issubdtype(array.dtype, jnp.integer)
        or jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise TypeError(f"`step` must be a real number, got dtype {array.dtype}.")
    return array
