"""Checks of the arguments that functions of stored logits share."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxsoft._core import checks, numerics
from jaxsoft._core.tokens import token_weights

__all__ = [
    "check_temperature",
    "check_where",
    "has_no_tangent",
    "keep_rows",
    "number_of_rows",
    "pick_temperature",
    "row_weights",
]


def check_where(where: ArrayLike | None, logits: jax.Array) -> jax.Array | None:
    """Returns the class mask as an array of the rank of `logits`, or None."""
    if where is None:
        return None
    where = checks.boolean("where", where)
    checks.broadcasts_to("where", where, logits.shape)
    return where.reshape((1,) * (logits.ndim - where.ndim) + where.shape)


def check_temperature(
    temperature: ArrayLike, logits: jax.Array, axis: int, prefix: str = ""
) -> float | jax.Array:
    """Returns the temperature as a float or an array of the rank of `logits`."""
    tau = checks.temperature(temperature, numerics.compute_dtype(logits), prefix)
    if not isinstance(tau, jax.Array):
        return tau
    return number_of_rows(f"{prefix}temperature", tau, logits, axis)


def number_of_rows(
    name: str, array: jax.Array, logits: jax.Array, axis: int
) -> jax.Array:
    """Returns a number of all rows, or one of each, as an array of the logits' rank."""
    if array.ndim == 0:
        return array.reshape((1,) * logits.ndim)
    if array.shape == logits.shape[:axis] + logits.shape[axis + 1 :]:
        return jax.lax.expand_dims(array, (axis,))
    rows = tuple(1 if i == axis else n for i, n in enumerate(logits.shape))
    try:
        checks.broadcasts_to(name, array, rows)
    except ValueError as error:
        raise ValueError(
            f"{error} Its class axis must have size 1; an array without that axis is "
            "one number a row."
        ) from None
    return array.reshape((1,) * (logits.ndim - array.ndim) + array.shape)


def pick_temperature(
    static_tau: float | None, tau: jax.Array | None
) -> float | jax.Array:
    """Returns whichever of the two forms of a temperature was given."""
    if static_tau is not None:
        return static_tau
    assert tau is not None
    return tau


def has_no_tangent(tangent: object) -> bool:
    """Tells whether a tangent is known to vanish."""
    return tangent is None or isinstance(tangent, SymbolicZero)


def row_weights(
    weights: ArrayLike | None,
    logits: jax.Array,
    axis: int,
    labels: ArrayLike | None = None,
    ignore_label: int | None = None,
) -> jax.Array | None:
    """Returns one weight a row, or None if all are 1; see `token_weights`."""
    rows = logits.shape[:axis] + logits.shape[axis + 1 :]
    legend = "logits.shape without the class axis"
    return token_weights(rows, weights, labels, ignore_label, legend)


def keep_rows(
    keep: jax.Array | None, array: jax.Array, axis: int, other: float = 0
) -> jax.Array:
    """Returns an array with `other` in all rows that do not count, classes on `axis`.

    Args:
      keep: [...] which rows count, or None for all.
      array: [..., V].
      axis: the class axis.
      other: what stands in the place of a row's numbers.
    """
    if keep is None:
        return array
    return jnp.where(jnp.expand_dims(keep, axis), array, other)
