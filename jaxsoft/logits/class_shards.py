"""Which classes of a row are here, where shards of a mesh have the others.

Inside `jax.shard_map` each shard draws as one device would: what it computes of its own
classes is summed, or the largest of it taken, over all shards, a few numbers a row or
those of a block of classes. All shards have the same result then. Without a mesh every
function here is the identity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import block_sampling, mesh_axes
from jaxsoft._core.numerics import compute_dtype, round_up

__all__ = ["WHOLE", "ClassShard"]


class ClassShard(NamedTuple):
    """The classes that are the columns of an array [R, C].

    Attributes:
      axes: the mesh axes of the classes.
      first: the class of the first column.
      total: V, of all shards; None for C.
    """

    axes: tuple[str, ...] = ()
    first: jax.Array | int = 0
    total: int | None = None

    @classmethod
    def of(
        cls, x: jax.Array, axes: tuple[str, ...], total: int | None = None
    ) -> "ClassShard":
        """Returns that of logits [R, C] of which each shard has as many.

        Args:
          x: the logits.
          axes: the mesh axes of the classes.
          total: V, where the last shards have padding, -inf; else None.
        """
        if not axes:
            return WHOLE
        classes = x.shape[1]
        first = mesh_axes.offset(axes, classes)
        return cls(axes, first, total or classes * mesh_axes.size(axes))

    def classes(self, x: jax.Array) -> int:
        """Returns V."""
        return x.shape[1] if self.total is None else self.total

    def block(self, x: jax.Array) -> int:
        """Returns the classes of a block of all V."""
        return block_sampling.block_size(self.classes(x))

    def add(self, values: jax.Array) -> jax.Array:
        """Returns the sums of the shards' numbers."""
        return lax.psum(values, self.axes) if self.axes else values

    def largest(self, values: jax.Array) -> jax.Array:
        """Returns the largest of the shards' numbers, NaN where one is."""
        return mesh_axes.maximum(values, self.axes)

    def smallest(self, values: jax.Array) -> jax.Array:
        """Returns the smallest of the shards' numbers, which are not NaN."""
        return mesh_axes.lowest(values, self.axes)

    def aligned(self, x: jax.Array, unit: int) -> tuple[jax.Array, "ClassShard"]:
        """Returns logits [R, C] as whole units of classes of the row, and their place.

        Others' classes in the first and the last unit are -inf. Without a mesh the last
        unit is what it is.
        """
        rows, classes = x.shape
        if not self.axes or classes % unit == 0:
            return x, self
        before = self.first % unit
        width = round_up(classes + unit - 1, unit)
        empty = jnp.full((rows, width), -jnp.inf, x.dtype)
        empty = mesh_axes.like(empty, (x, before))
        x = lax.dynamic_update_slice_in_dim(empty, x, before, axis=1)
        return x, self._replace(first=self.first - before)

    def spread(self, parts: jax.Array, unit: int, fill: float) -> jax.Array:
        """Returns numbers of units of classes at the places that they have in the row.

        Args:
          parts: [R, m] of the units of `aligned` logits.
          unit: the classes of each.
          fill: what stands at others' units.

        Returns:
          [R, n] for all units of V, not yet joined with those of other shards.
        """
        if not self.axes:
            return parts
        assert self.total is not None
        rows, number = parts.shape
        units = -(-self.total // unit)
        whole = jnp.full((rows, units + number), fill, parts.dtype)
        whole = mesh_axes.like(whole, (parts, self.first))
        whole = lax.dynamic_update_slice_in_dim(
            whole, parts, self.first // unit, axis=1
        )
        return whole[:, :units]

    def take(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """Returns logits of K classes of each row, [R, K] as they are computed with.

        Args:
          x: [R, C] logits of this shard.
          ids: [R, K] classes from 0 on; those that are none have -inf.
        """
        local = ids - self.first
        # An index beyond the last is none; one below the first would count from there.
        local = jnp.where(local < 0, x.shape[1], local)
        some = jnp.take_along_axis(x, local, axis=1, mode="fill", fill_value=-jnp.inf)
        return self.largest(some.astype(compute_dtype(x)))

    def gathered(self, x: jax.Array) -> jax.Array:
        """Returns the logits [R, V] of few classes, those of all shards."""
        return self.largest(self.spread(x, 1, -jnp.inf))


WHOLE = ClassShard()
