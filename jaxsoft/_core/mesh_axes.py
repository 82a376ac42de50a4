"""Mesh axes that values vary over, inside `jax.shard_map`."""

from typing import Any

import jax
from jax import lax

__all__ = ["axes", "like", "type_of"]


def axes(array: jax.Array) -> frozenset[str]:
    """Returns the mesh axes that an array varies over; none outside shard_map."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def like(tree: Any, reference: Any) -> Any:
    """Makes every array of `tree` vary over all axes that any of `reference` does.

    A loop's carry must start with the type that it ends with. For an argument the
    transpose of this is a sum over the mesh axes: what shared parameters need.

    Args:
      tree: a pytree of arrays.
      reference: a pytree of arrays.

    Returns:
      `tree`, the same object outside shard_map.
    """
    wanted = frozenset().union(*map(axes, jax.tree.leaves(reference)))
    if not wanted:
        return tree

    def vary(array):
        missing = tuple(sorted(wanted - axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, tree)


def type_of(
    reference: jax.Array, shape: tuple[int, ...], dtype: Any
) -> jax.ShapeDtypeStruct:
    """Returns the type of a result that varies over the mesh axes of an array."""
    axes = jax.typeof(reference).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
