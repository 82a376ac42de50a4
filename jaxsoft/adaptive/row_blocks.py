"""Work on the rows that need it alone, under static shapes."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes

__all__ = ["RowBlocks", "take"]

Carry = TypeVar("Carry")

# Rows of a block: this part of all, and no fewer than this many.
_PARTS = 16
_LEAST = 128


class RowBlocks:
    """Some of N rows, sorted to the front and cut into blocks of equal size.

    A program has one shape however many rows there are; the number of blocks that it
    works on is not a part of that.

    Args:
      member: [N] booleans, the rows that need work.

    Example:
      >>> import jax.numpy as jnp
      >>> blocks = RowBlocks(jnp.array([False, True, True]))
      >>> def double(block, total):
      ...     return total.at[block].add(2, mode="drop")
      >>> print(blocks.fold(double, jnp.zeros(3)))
      [0. 2. 2.]
    """

    def __init__(self, member: jax.Array):
        """Sorts the rows."""
        self.num_rows = member.shape[0]
        parts = -(-self.num_rows // (_PARTS * _LEAST)) * _LEAST
        self.size = max(min(parts, self.num_rows), 1)
        self.count = jnp.sum(member, dtype=jnp.int32)
        order = jnp.argsort(~member, stable=True).astype(jnp.int32)
        place = lax.iota(jnp.int32, self.num_rows)
        order = jnp.where(place < self.count, order, self.num_rows)
        self._order = jnp.pad(order, (0, self.size), constant_values=self.num_rows)

    def fold(self, step: Callable[[jax.Array, Carry], Carry], start: Carry) -> Carry:
        """Folds the blocks.

        Args:
          step: from the row numbers of a block [size], N where there is no row, and
            the carry, to the next carry.
          start: the first carry.

        Returns:
          The last carry. Without a derivative.
        """
        if not self.num_rows:
            return start

        def body(index, carry):
            rows = lax.dynamic_slice(self._order, (index * self.size,), (self.size,))
            return mesh_axes.like(step(rows, carry), (carry, self._order))

        start = mesh_axes.like(start, self._order)
        blocks = (self.count + self.size - 1) // self.size
        return lax.fori_loop(0, blocks, body, start)


def take(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the rows of an array, zeros where there is none."""
    return array.at[rows].get(mode="fill", fill_value=0)
