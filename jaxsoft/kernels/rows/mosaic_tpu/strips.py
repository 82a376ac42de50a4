"""What kernels for rows on TPUs work on at a time: rows that fit a register.

A pass folds a function over the chunks of a block's classes, of which a strip of rows
lies in registers; between passes and blocks a few columns are kept.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsoft._core.numerics import divide_by_temperature
from jaxsoft.kernels.typing import ChunkStep, Ref, Scalar, Tau

__all__ = ["FOLDING", "WRITING", "Strip", "fold_chunks", "merge_chunk"]

# The passes over a row: the first folds its classes into columns that are kept, the
# second writes the result.
FOLDING, WRITING = 0, 1

_Carry = TypeVar("_Carry")


@dataclasses.dataclass
class Strip:
    """References to blocks, and which of their rows are worked on.

    Attributes:
      inputs: the blocks of the arrays.
      out: the block of the result.
      kept: columns [R, 1] of scratch, which the first pass fills.
      rows: the slice of the rows.
      first: the block's first class.
      column: the strip's rows of the column [R, 1], or None.
      words: the strip's keys [R, 2], or None.
      perturbed: where the block's perturbed logits stay, or None.
    """

    inputs: list[Ref]
    out: Ref
    kept: list[Ref]
    rows: pl.Slice
    first: Scalar
    column: jax.Array | None
    words: jax.Array | None
    perturbed: Ref | None

    def temperature(self, static_tau: float | None) -> Tau:
        """Returns the rows' temperatures, or the one that is static."""
        if self.column is not None:
            return self.column
        assert static_tau is not None
        return static_tau

    def shape(self, columns: pl.Slice) -> tuple[int, int]:
        """Returns the shape of a chunk."""
        rows, classes = self.rows.size, columns.size
        assert isinstance(rows, int) and isinstance(classes, int)
        return rows, classes

    def load(
        self, number: int, columns: pl.Slice, valid: Scalar | None, fill: float
    ) -> jax.Array:
        """Returns a chunk of an array in float32, with `fill` beyond its classes.

        Args:
          number: which of the arrays.
          columns: the chunk's classes in their block.
          valid: how many classes there are from the block's first on; None if nothing
            is to be filled.
          fill: what classes beyond those are.
        """
        x = self.inputs[number][self.rows, columns].astype(jnp.float32)
        if valid is None:
            return x
        ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(ids < valid - columns.start, x, fill)

    def restore(
        self, is_first: bool | jax.Array, starts: tuple[float, ...]
    ) -> tuple[jax.Array, ...]:
        """Returns the columns that were kept, or in a row's first block the starts."""
        start = tuple(
            jnp.full((self.rows.size, 1), s, ref.dtype)
            for s, ref in zip(starts, self.kept, strict=True)
        )
        if is_first is True:
            return start
        return tuple(
            jnp.where(is_first, s, ref[self.rows, :])
            for s, ref in zip(start, self.kept, strict=True)
        )

    def keep(self, columns: tuple[jax.Array, ...]) -> None:
        """Keeps columns of the rows."""
        for ref, value in zip(self.kept, columns, strict=True):
            ref[self.rows, :] = value

    def get(self) -> tuple[jax.Array, ...]:
        """Returns the columns that were kept of the rows."""
        return tuple(ref[self.rows, :] for ref in self.kept)


def fold_chunks(
    classes: int,
    chunk: int,
    valid: Scalar | None,
    step: ChunkStep[_Carry],
    carry: _Carry,
) -> _Carry:
    """Folds a step over the chunks of a block's classes.

    Args:
      classes: of a block.
      chunk: the classes of a chunk.
      valid: how many classes there are from the block's first on, or None if the block
        has no more than these.
      step: what is folded.
      carry: what it starts from.

    Returns:
      The last carry.
    """
    whole = classes // chunk

    def whole_chunk(index, carry):
        start = pl.multiple_of(index * chunk, chunk)
        return step(pl.Slice(start, chunk), valid, carry)

    carry = lax.fori_loop(0, whole, whole_chunk, carry)
    rest = classes - whole * chunk
    return step(pl.Slice(whole * chunk, rest), valid, carry) if rest else carry


def merge_chunk(
    x: jax.Array, tau: Tau, carry: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Merges logits into the largest of a row and its sum, [R, 1] each."""
    peak, total = carry
    top = jnp.maximum(peak, jnp.max(x, axis=1, keepdims=True))
    weights = jnp.exp(divide_by_temperature(x, top, tau))
    total = total * jnp.exp(divide_by_temperature(peak, top, tau))
    return top, total + jnp.sum(weights, axis=1, keepdims=True)
