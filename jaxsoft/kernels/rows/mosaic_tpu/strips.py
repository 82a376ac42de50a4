"""What kernels for rows on TPUs work on at a time: rows that fit a register.

A pass folds a function over the chunks of a block's classes, of which a strip of rows
lies in registers; between passes and blocks a few columns are kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsoft._core.temperature import divide_by_temperature

__all__ = ["Strip", "chunks", "merge"]


@dataclasses.dataclass
class Strip:
    """References to blocks, and which of their rows are worked on.

    Attributes:
      wide: of the arrays.
      out: of the result.
      kept: columns [R, 1] of scratch, which the first pass fills.
      rows: the slice.
      first: the block's first class.
      column: the strip's rows of the column [R, 1], or None.
      words: the strip's keys [R, 2], or None.
      noisy: of perturbed logits, or None.
    """

    wide: Any
    out: Any
    kept: Any
    rows: Any
    first: Any
    column: Any
    words: Any
    noisy: Any

    def load(self, number: int, columns: Any, valid: Any, fill: float) -> jax.Array:
        """Returns a chunk of an array in float32, with `fill` beyond its classes."""
        x = self.wide[number][self.rows, columns].astype(jnp.float32)
        if valid is None:
            return x
        ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(ids < valid - columns.start, x, fill)

    def restore(self, begins: Any, starts: tuple[float, ...]) -> Any:
        """Returns what was kept of the rows before, or where they start."""
        start = tuple(
            jnp.full((self.rows.size, 1), s, ref.dtype)
            for s, ref in zip(starts, self.kept, strict=True)
        )
        if begins is True:
            return start
        return tuple(
            jnp.where(begins, s, ref[self.rows, :])
            for s, ref in zip(start, self.kept, strict=True)
        )

    def keep(self, columns: Any) -> None:
        """Keeps columns of the rows."""
        for ref, value in zip(self.kept, columns, strict=True):
            ref[self.rows, :] = value

    def get(self) -> Any:
        """Returns the columns that were kept of the rows."""
        return tuple(ref[self.rows, :] for ref in self.kept)


def chunks(classes: int, chunk: int, valid: Any, function: Any, carry: Any) -> Any:
    """Folds a function over the chunks of a block's classes.

    Args:
      classes: of a block.
      chunk: of classes.
      valid: the classes from the block's first on, or None if the block is all.
      function: of the slice of classes, `valid` and the carry.
      carry: what is folded.

    Returns:
      The last carry.
    """
    whole = classes // chunk

    def step(index, carry):
        start = pl.multiple_of(index * chunk, chunk)
        return function(pl.ds(start, chunk), valid, carry)

    carry = lax.fori_loop(0, whole, step, carry)
    rest = classes - whole * chunk
    return function(pl.ds(whole * chunk, rest), valid, carry) if rest else carry


def merge(x: jax.Array, tau: Any, carry: Any) -> tuple[jax.Array, jax.Array]:
    """Merges logits into the largest of a row and its sum, [R, 1] each."""
    peak, total = carry
    top = jnp.maximum(peak, jnp.max(x, axis=1, keepdims=True))
    weights = jnp.exp(divide_by_temperature(x, top, tau))
    total = total * jnp.exp(divide_by_temperature(peak, top, tau))
    return top, total + jnp.sum(weights, axis=1, keepdims=True)
