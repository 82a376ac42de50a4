"""A temperature that is trained, kept between bounds that it can come back from."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxsoft._core import checks, numerics
from jaxsoft._core.temperature_fit import check_bounds

__all__ = ["LearnableTemperature"]


class LearnableTemperature(nnx.Module):
    """A temperature as a parameter: its logarithm, so that no step makes it negative.

    Calling it gives `τ = clip(exp(log_temperature), low, high)`, for `temperature=` of
    any function or head of jaxsoft.

    At a bound and beyond it the gradient is 0 if a descent along it would lead further
    out, and `τ · dτ` if it leads back: an optimizer whose momentum carries the
    parameter out of the bounds is not pushed on, and returns once the loss asks for it.

    Attributes:
      log_temperature: the parameter log τ, a scalar.
      bounds: the lowest and the highest τ.

    Args:
      temperature: the initial τ, within the bounds.
      bounds: the lowest and the highest τ, positive.
      param_dtype: dtype of the parameter.

    Raises:
      TypeError: if an argument is no number, or `bounds` no pair.
      ValueError: if the bounds do not increase, or do not hold the initial τ.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import jaxsoft
      >>> from jaxsoft.nn import LearnableTemperature
      >>> logits = 2 * jax.random.normal(jax.random.key(0), (1000, 10))
      >>> labels = jax.random.categorical(jax.random.key(1), logits)
      >>> def loss(temperature):
      ...     return jaxsoft.softmax_cross_entropy(
      ...         3 * logits, labels, temperature()
      ...     ).mean()
      >>> temperature = LearnableTemperature()
      >>> optimizer = nnx.Optimizer(temperature, optax.sgd(1.0), wrt=nnx.Param)
      >>> for _ in range(10):
      ...     _ = optimizer.update(temperature, nnx.grad(loss)(temperature))
      >>> print(f"{temperature():.1f}")
      2.9
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        bounds: tuple[float, float] = (0.01, 10.0),
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Makes the parameter; see the class for the arguments."""
        low, _, high = check_bounds(bounds)
        value = checks.scalar_in("temperature", temperature, low, high)
        self.bounds = (low, high)
        self.log_temperature = nnx.Param(jnp.asarray(math.log(value), param_dtype))

    def __call__(self) -> jax.Array:
        """Returns τ, a float32 scalar (float64 for a float64 parameter)."""
        log_tau = self.log_temperature[...]
        log_tau = log_tau.astype(numerics.compute_dtype(log_tau))
        return _clipped_exp(*self.bounds, log_tau)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _clipped_exp(low: float, high: float, log_tau: jax.Array) -> jax.Array:
    """Returns exp(log_tau) in the bounds, which stop gradients that lead outward."""
    return jnp.clip(jnp.exp(log_tau), low, high)


def _fwd(low: float, high: float, log_tau: jax.Array):
    tau = _clipped_exp(low, high, log_tau)
    return tau, tau


def _bwd(low: float, high: float, tau: jax.Array, cotangent: jax.Array):
    """Descent moves against the gradient: up where it is negative."""
    outward = ((tau <= low) & (cotangent > 0)) | ((tau >= high) & (cotangent < 0))
    return (jnp.where(outward, 0, cotangent * tau),)


_clipped_exp.defvjp(_fwd, _bwd)
