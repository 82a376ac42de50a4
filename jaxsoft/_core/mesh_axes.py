"""Mesh axes inside `jax.shard_map`: what values vary over, and how shards agree.

Every shard of the classes holds as many; those of shard i follow those of shard i - 1.
With no axes every function of shards here is the identity.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

__all__ = [
    "Classes",
    "add",
    "check_axes",
    "like",
    "lowest",
    "lowest_argmax",
    "maximum",
    "names",
    "offset",
    "once",
    "size",
    "type_of",
    "varying_axes",
]

Axes = tuple[str, ...]
Tree = TypeVar("Tree")


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Returns the mesh axes that an array varies over; none outside shard_map."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def like(tree: Tree, reference: object) -> Tree:
    """Makes every array of `tree` vary over all axes that any of `reference` does.

    A loop's carry must start with the type that it ends with. For an argument the
    transpose of this is a sum over the mesh axes: what shared parameters need.

    Args:
      tree: a pytree of arrays.
      reference: a pytree of arrays.

    Returns:
      `tree`, the same object outside shard_map.
    """
    wanted = frozenset().union(*map(varying_axes, jax.tree.leaves(reference)))
    if not wanted:
        return tree

    def vary(array):
        missing = tuple(sorted(wanted - varying_axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, tree)


def type_of(
    reference: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Returns the type of a result that varies over the mesh axes of an array."""
    axes = jax.typeof(reference).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


class Classes(NamedTuple):
    """Mesh axes of classes whose last shards have padding; see `over_mesh`.

    Attributes:
      axes: the mesh axes.
      number: V, without the padding.
    """

    axes: Axes
    number: int


def names(value: "str | Sequence[str] | Classes | None") -> Axes:
    """Returns mesh axes, given as one or several, as a tuple."""
    if isinstance(value, Classes):
        return value.axes
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def check_axes(name: str, value: "str | Sequence[str] | Classes | None") -> Axes:
    """Returns mesh axes as a tuple, which must be those of an enclosing shard_map."""
    axes = names(value)
    for axis in axes:
        try:
            index = lax.axis_index(axis)
        except NameError:
            raise ValueError(
                f"`{name}` must name axes of an enclosing jax.shard_map, got "
                f"{axis!r}. Under plain jit leave it out: sharded arguments are "
                "enough."
            ) from None
        if axis not in varying_axes(index):
            raise ValueError(
                f"`{name}` must be used with shard_map's check_vma=True, got "
                f"{axis!r} without it: gradients would be scaled or left unsummed. "
                "Use jaxsoft.over_mesh, or leave check_vma at its default."
            )
    return axes


def size(axes: Axes) -> int:
    """Returns the number of shards."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def offset(axes: Axes, number: int) -> jax.Array | int:
    """Returns the first of this shard's things, if each shard has `number` of them."""
    return lax.axis_index(axes) * number if axes else 0


def maximum(values: jax.Array, axes: Axes) -> jax.Array:
    """Returns the largest of the shards' values; no gradient flows through it."""
    return lax.pmax(lax.stop_gradient(values), axes) if axes else values


def lowest(values: jax.Array, axes: Axes) -> jax.Array:
    """Returns the smallest of the shards' values."""
    return lax.pmin(values, axes) if axes else values


def add(sums: dict[str, jax.Array], axes: Axes) -> dict[str, jax.Array]:
    """Returns the sums of [N, K] arrays over the shards, in one collective."""
    if not axes:
        return sums
    total = lax.psum(jnp.concatenate(list(sums.values()), axis=1), axes)
    widths = [a.shape[1] for a in sums.values()]
    starts = [sum(widths[:i]) for i in range(1, len(widths))]
    return dict(zip(sums, jnp.split(total, starts, axis=1), strict=True))


def once(values: jax.Array, axes: Axes) -> jax.Array:
    """Returns what every shard has on the first shard, and 0 on the others."""
    if not axes:
        return values
    return jnp.where(lax.axis_index(axes) == 0, values, 0)


def lowest_argmax(
    argmax: jax.Array, reached: jax.Array, number: int, axes: Axes
) -> jax.Array:
    """Returns the lowest class, of all shards, whose logit is the largest.

    Args:
      argmax: the class of this shard with its largest logit, counted from its first.
      reached: whether that is the largest logit of all shards.
      number: of the classes of a shard.
      axes: the mesh axes of the classes.
    """
    if not axes:
        return argmax
    none = jnp.iinfo(jnp.int32).max
    best = lowest(jnp.where(reached, argmax + offset(axes, number), none), axes)
    # NaN logits equal no maximum.
    return jnp.where(best == none, 0, best)
