"""Logits over a temperature, as logits: what any softmax may follow."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, numerics
from jaxsoft._core.numerics import divide_by_temperature, is_zero, over_temperature

__all__ = ["scaled_logits"]

# Above it a rounding of float32 quotients is more than 2^-14 nats.
_LARGEST = 1024.0


def scaled_logits(logits: ArrayLike, temperature: jax.Array) -> jax.Array:
    """Returns x / τ, or (x - max x) / τ in rows where |x| / τ exceeds 1024.

    Args:
      logits: [..., V], any floating dtype.
      temperature: τ, a scalar array.

    Returns:
      [..., V] float32 (float64 for float64 logits).
    """
    logits = checks.floating("logits", logits)
    checks.class_axis(-1, logits)
    dtype = numerics.compute_dtype(logits)
    x = logits.astype(dtype)
    tau = temperature.astype(dtype).reshape((1,) * x.ndim)
    # The limit at τ = 0 has no gradient.
    x = jnp.where(is_zero(tau, dtype), jax.lax.stop_gradient(x), x)
    kept = x != -jnp.inf
    size = jnp.max(jnp.where(kept, jnp.abs(x), 0), axis=-1, keepdims=True)
    peak = jnp.max(jnp.where(kept, x, -jnp.inf), axis=-1, keepdims=True)
    centred = over_temperature(size, tau) > _LARGEST
    peak = jnp.where(centred & (peak != -jnp.inf), peak, 0)
    return divide_by_temperature(x, jax.lax.stop_gradient(peak), tau)
