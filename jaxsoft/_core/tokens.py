"""The weights of tokens, and what becomes of their losses."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks

__all__ = [
    "Reduction",
    "keep_labels",
    "keep_temperature",
    "keep_tokens",
    "labelled_tokens",
    "reduce_losses",
    "token_shares",
    "token_weights",
    "weigh_tokens",
]

Reduction = Literal["mean", "sum", "none"]


def token_weights(
    rows: tuple[int, ...],
    weights: ArrayLike | None,
    labels: ArrayLike | None = None,
    ignore_label: int | None = None,
    legend: str = "hidden.shape[:-1]",
) -> jax.Array | None:
    """Returns one float32 weight a token, or None if all are 1.

    Args:
      rows: the shape that weights must have.
      weights: [...] booleans or reals, or None.
      labels: [...] integers as they were given, of any width, or None.
      ignore_label: the label whose tokens have weight 0, or None.
      legend: what `rows` is, for messages.

    Returns:
      [...] float32, or float64 where the weights are.
    """
    result = None
    if weights is not None:
        result = jnp.asarray(weights)
        if result.dtype != jnp.bool_:
            result = checks.floating("weights", result)
        if result.ndim == 1 and result.shape != rows:
            raise ValueError(
                f"`weights` must have shape {legend} = {rows}, got {result.shape}. "
                "Weights of the classes are `weights[labels]` of the tokens."
            )
        checks.shape("weights", result, rows, legend)
        wide = result.dtype == jnp.float64
        result = result.astype(jnp.float64 if wide else jnp.float32)
    if labels is None or ignore_label is None:
        return result
    ignore_label = checks.python_integer("ignore_label", ignore_label)
    given = labels if isinstance(labels, np.ndarray) else jnp.asarray(labels)
    bounds = jnp.iinfo(given.dtype)
    if not bounds.min <= ignore_label <= bounds.max:
        return result
    keep = jnp.asarray(given != np.asarray(ignore_label, given.dtype))
    return keep.astype(jnp.float32) if result is None else jnp.where(keep, result, 0)


def keep_tokens(
    token_weight: jax.Array | None, array: jax.Array, other: float = 0
) -> jax.Array:
    """Returns an array with `other` at all tokens without weight.

    What a token holds that does not count, NaN included, must reach neither a matrix
    product nor a gradient: 0 times NaN is NaN.

    Args:
      token_weight: [...] what `token_weights` returned.
      array: [..., *], of tokens first.
      other: what stands in the place of a token's numbers.
    """
    if token_weight is None:
        return array
    ones = (1,) * (array.ndim - token_weight.ndim)
    return jnp.where(token_weight.reshape(token_weight.shape + ones) != 0, array, other)


def keep_labels(
    labels: ArrayLike | None,
    rows: tuple[int, ...],
    weights: ArrayLike | None,
    ignore_label: int | None = None,
    legend: str = "hidden.shape[:-1]",
) -> tuple[jax.Array | None, jax.Array | None]:
    """Checks the labels and the weights of tokens.

    Args:
      labels: [...] integers, or None.
      rows: their shape.
      weights: [...] booleans or reals, or None.
      ignore_label: the label whose tokens have weight 0, or None.
      legend: what `rows` is, for messages.

    Returns:
      Labels, 0 where the weight is, and what `token_weights` returns.
    """
    ids = None
    if labels is not None:
        ids = checks.integer("labels", labels)
        checks.shape("labels", ids, rows, legend)
    weight = token_weights(rows, weights, labels, ignore_label, legend)
    return None if ids is None else keep_tokens(weight, ids), weight


def labelled_tokens(
    hidden: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None,
    ignore_label: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checks tokens and leaves out those without weight.

    Args:
      hidden: [..., H] floating-point.
      labels: [...] integers.
      weights: [...] booleans or reals, or None.
      ignore_label: the label whose tokens have weight 0, or None.

    Returns:
      Hidden states and labels, both 0 where the weight is, and what `token_weights`
      returns.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape is not `hidden.shape[:-1]`.
    """
    hidden = checks.floating("hidden", hidden)
    ids, weight = keep_labels(labels, hidden.shape[:-1], weights, ignore_label)
    assert ids is not None
    return keep_tokens(weight, hidden), ids, weight


def keep_temperature(
    token_weight: jax.Array | None, temperature: ArrayLike
) -> ArrayLike:
    """Returns a temperature, one a token, with 1 at all tokens without weight."""
    if token_weight is None or not jnp.ndim(temperature):
        return temperature
    dtype = checks.floating("temperature", temperature).dtype
    rows = checks.row_temperature(temperature, dtype, token_weight.shape)
    return keep_tokens(token_weight, jnp.asarray(rows), 1)


def weigh_tokens(token_weight: jax.Array | None, array: jax.Array) -> jax.Array:
    """Returns the numbers of tokens times their weights, 0 where the weight is.

    Args:
      token_weight: [...] what `token_weights` returned.
      array: [..., *], of tokens first.
    """
    if token_weight is None:
        return array
    weight = token_weight.astype(array.dtype)
    weight = weight.reshape(weight.shape + (1,) * (array.ndim - weight.ndim))
    return weight * jnp.where(weight == 0, 0, array)


def reduce_losses(
    loss: jax.Array,
    weights: jax.Array | None,
    reduction: Reduction,
    token_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Weights the losses of tokens, then reduces them over all shards of tokens."""

    def total(values):
        values = jnp.sum(values)
        return jax.lax.psum(values, token_axes) if token_axes else values

    if weights is None:
        if reduction == "none":
            return loss
        shards = math.prod(jax.lax.axis_size(axis) for axis in token_axes)
        count = loss.size * shards
        return total(loss) / max(count, 1) if reduction == "mean" else total(loss)
    weighted = weigh_tokens(weights, loss)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return total(weighted)
    weight = total(weights.astype(loss.dtype))
    return total(weighted) / jnp.where(weight == 0, 1, weight)


def token_shares(
    weights: jax.Array | None,
    reduction: Reduction,
    count: int,
    dtype: DTypeLike,
    token_axes: tuple[str, ...] = (),
) -> tuple[jax.Array | None, float]:
    """Returns what the losses of tokens are multiplied by in their reduction.

    Args:
      weights: what `token_weights` returned.
      reduction: "mean" or "sum".
      count: the number of tokens of this shard.
      dtype: of the losses.
      token_axes: the mesh axes of the tokens.

    Returns:
      A weight for each token, None where all have the same, and a factor of all.
    """
    if weights is None:
        shards = math.prod(jax.lax.axis_size(axis) for axis in token_axes)
        return None, 1 / max(count * shards, 1) if reduction == "mean" else 1.0
    weights = weights.astype(dtype)
    if reduction == "sum":
        return weights, 1.0
    weight = jnp.sum(weights)
    weight = jax.lax.psum(weight, token_axes) if token_axes else weight
    return weights / jnp.where(weight == 0, 1, weight), 1.0
