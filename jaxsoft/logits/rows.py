"""Logits as rows: what functions that draw for a row and a class work on."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft.logits.arguments import check_temperature, check_where

__all__ = ["Rows", "in_tiles", "tile_rows", "to_rows"]

Arrays = TypeVar("Arrays")
Result = TypeVar("Result")

# What a tile of a few arrays may hold so that it stays in a CPU's second-level cache.
_TILE = 2**17


class Rows(NamedTuple):
    """Logits of R rows of V classes.

    Attributes:
      logits: [R, V] in the dtype of the caller.
      tau: the temperature, [R, 1] or [1, 1], or None if it is static.
      where: which classes are kept, [R, V] or [1, V], or None for all.
    """

    logits: jax.Array
    tau: jax.Array | None
    where: jax.Array | None

    def temperature(self, static_tau: float | None) -> float | jax.Array:
        """The temperature in either of its forms."""
        if self.tau is None:
            assert static_tau is not None
            return static_tau
        return self.tau

    def numbers(self) -> jax.Array:
        """The logits [R, V] as they are computed with, -inf at dropped classes."""
        x = self.logits.astype(numerics.compute_dtype(self.logits))
        return x if self.where is None else jnp.where(self.where, x, -jnp.inf)


def to_rows(
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    prefix: str = "",
) -> tuple[float | None, Rows, Callable[[jax.Array], jax.Array]]:
    """Checks the arguments of a function of stored logits and makes rows of them.

    Rows are numbered in the order of the axes other than `axis`.

    Args:
      logits: [..., V] with the classes on `axis`.
      temperature: a scalar, or an array that broadcasts with size 1 on the class axis.
      axis: the class axis.
      where: booleans that broadcast to `logits`, or None.
      prefix: what the names of logits and temperature start with.

    Returns:
      The static temperature or None; the rows; and what turns [R, V] back into the
      shape of the logits, or [R] into that without the class axis.
    """
    logits = checks.floating(f"{prefix}logits", logits)
    axis = checks.class_axis(axis, logits)
    mask = check_where(where, logits)
    tau = check_temperature(temperature, logits, axis, prefix)
    static_tau, row_tau = (None, tau) if isinstance(tau, jax.Array) else (tau, None)
    moved = jnp.moveaxis(logits, axis, -1)
    rows = moved.shape[:-1]

    def flat(array: jax.Array | None, size: int) -> jax.Array | None:
        if array is None:
            return None
        array = jnp.moveaxis(array, axis, -1)
        if math.prod(array.shape[:-1]) == 1:
            return jnp.broadcast_to(array.reshape(1, array.shape[-1]), (1, size))
        return jnp.broadcast_to(array, (*rows, size)).reshape(-1, size)

    def back(array: jax.Array) -> jax.Array:
        if array.ndim == 1:
            return array.reshape(rows)
        return jnp.moveaxis(array.reshape(*rows, array.shape[1]), -1, axis)

    size = moved.shape[-1]
    count = math.prod(rows)
    return (
        static_tau,
        Rows(moved.reshape(count, size), flat(row_tau, 1), flat(mask, size)),
        back,
    )


def tile_rows(num_classes: int, least_rows: int = 1, numbers: int = _TILE) -> int:
    """Returns the rows of a tile.

    Args:
      num_classes: V, or how many numbers there are of a row.
      least_rows: the least rows of a tile, however many classes there are.
      numbers: how many the others have at most; those of the default fit into cache.
    """
    return max(least_rows, numbers // max(num_classes, 1))


def in_tiles(
    function: Callable[[Arrays], Result], arrays: Arrays, num_rows: int, size: int
) -> Result:
    """Computes a function of rows, a tile of rows at a time.

    The last tile starts earlier where it would stick out: its first rows are computed
    twice.

    Args:
      function: takes the pytree `arrays` with fewer rows, returns a pytree of arrays
        with as many.
      arrays: a pytree of arrays with R rows, or with one that serves all.
      num_rows: R.
      size: the rows of a tile, see `tile_rows`.

    Returns:
      What the function gives for all rows.
    """
    if num_rows <= size:
        return function(arrays)

    def part(start):
        return jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, start, size) if a.shape[0] > 1 else a,
            arrays,
        )

    # Compiled by itself it is traced once, for its shapes and for the loop.
    function = jax.jit(function, inline=True)
    shapes = jax.eval_shape(function, jax.eval_shape(part, 0))
    empty = jax.tree.map(lambda s: jnp.zeros((num_rows, *s.shape[1:]), s.dtype), shapes)

    def step(index, whole):
        start = jnp.minimum(index * size, num_rows - size)
        return jax.tree.map(
            lambda a, new: lax.dynamic_update_slice_in_dim(a, new, start, 0),
            whole,
            function(part(start)),
        )

    tiles = -(-num_rows // size)
    return lax.fori_loop(0, tiles, step, mesh_axes.like(empty, arrays))
