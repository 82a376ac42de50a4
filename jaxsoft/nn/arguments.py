"""What heads do alike with initial kernels, temperatures, dtypes and weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.tokens import Reduction, reduce_losses

__all__ = [
    "KERNEL_INIT",
    "StoredTemperature",
    "Temperature",
    "current",
    "promoted",
    "reduced",
    "stored",
    "stream",
]

KERNEL_INIT = nnx.initializers.lecun_normal()

# A module, such as `LearnableTemperature`, gives its temperature when it is called.
Temperature = float | jax.Array | nnx.Module
StoredTemperature = float | nnx.Variable | nnx.Module


def stored(temperature: Temperature) -> StoredTemperature:
    """Returns a module's temperature: an array becomes a variable, no parameter."""
    if isinstance(temperature, (int, float, nnx.Module)):
        return temperature
    return nnx.Variable(jnp.asarray(temperature))


def current(own: StoredTemperature, given: ArrayLike | None) -> ArrayLike:
    """Returns the temperature of a call: the given one, or else the module's."""
    if given is not None:
        return given
    if isinstance(own, nnx.Module):
        return own()  # pyright: ignore[reportCallIssue]
    return own[...] if isinstance(own, nnx.Variable) else own


def stream(rngs: nnx.Rngs | None) -> nnx.Rngs:
    """Returns the source of new parameters' keys, which there must be."""
    if rngs is None:
        raise TypeError("`rngs` must be an nnx.Rngs to make parameters, got None.")
    return rngs


def promoted(dtype: DTypeLike | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays in the dtype of matrix products; None leaves theirs."""
    if dtype is None:
        return arrays
    return tuple(flax_dtypes.promote_dtype(arrays, dtype=dtype))


def reduced(
    loss: jax.Array, weights: jax.Array | None, reduction: Reduction
) -> jax.Array:
    """Returns the losses of tokens, weighted and reduced."""
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    return reduce_losses(loss, weights, reduction)
