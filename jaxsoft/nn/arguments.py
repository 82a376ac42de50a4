"""What heads do alike with initial kernels, temperatures, dtypes and weights."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.tokens import Reduction, reduce_losses, token_weights

__all__ = [
    "KERNEL_INIT",
    "StoredTemperature",
    "Temperature",
    "current",
    "live_tokens",
    "promoted",
    "reduced",
    "stored",
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


def promoted(dtype: DTypeLike | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays in the dtype of matrix products; None leaves theirs."""
    if dtype is None:
        return arrays
    return tuple(flax_dtypes.promote_dtype(arrays, dtype=dtype))


def live_tokens(
    hidden: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None,
    ignore_label: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns hidden states and labels, 0 where the weight is, and the weights."""
    hidden = checks.floating("hidden", hidden)
    labels = checks.integer("labels", labels)
    rows = hidden.shape[:-1]
    checks.shape("labels", labels, rows, "hidden.shape[:-1]")
    token_weight = token_weights(rows, weights, labels, ignore_label)
    if token_weight is None:
        return hidden, labels, None
    live = token_weight != 0
    hidden = jnp.where(live[..., None], hidden, 0)
    return hidden, jnp.where(live, labels, 0), token_weight


def reduced(
    loss: jax.Array, weights: jax.Array | None, reduction: Reduction
) -> jax.Array:
    """Returns the losses of tokens, weighted and reduced."""
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    return reduce_losses(loss, weights, reduction)
