"""What GPUs' kernels for rows do with the chunks that pass through shared memory.

A fold finds a few numbers of a row, chunk after chunk; a task then writes chunks from
them. A piece is what threads hold at a time: of 8 lines, 8 numbers each.
"""

import abc
import dataclasses
import functools
import math
from typing import ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxsoft.kernels.typing import Factors, Index, Ref, Scalar

__all__ = [
    "LINE",
    "PIECE",
    "Chunk",
    "PieceFold",
    "RowFold",
    "Slope",
    "Softmax",
    "Task",
    "centred",
    "full",
]

# Numbers in a line, and the most lines of a piece.
LINE = 128
PIECE = 8

_Carry = TypeVar("_Carry")
_Result = TypeVar("_Result")


class Chunk(NamedTuple):
    """A chunk of a row in shared memory.

    Attributes:
      stages: the slots of each array, [S, C, 128].
      noise: the slots of noise, float32, if it is kept.
      slot: where the chunk is.
      first: its first line in the row.
      factors: the numbers of the row that the task needs.
      words: the two words of the row's key, if there is one.
    """

    stages: list[Ref]
    noise: Ref | None
    slot: Scalar
    first: Scalar
    factors: Factors
    words: tuple[jax.Array, ...] | None

    @property
    def lines(self) -> int:
        """The lines of a chunk."""
        return self.stages[0].shape[1]

    @property
    def piece(self) -> int:
        """The lines of a piece, of which a chunk has a whole number."""
        return min(PIECE, self.lines)

    def windows(self) -> list[Index]:
        """Returns where each piece is."""
        from jax.experimental import pallas as pl

        starts = range(0, self.lines, self.piece)
        return [(self.slot, pl.ds(start, self.piece)) for start in starts]

    def load(self, window: Index) -> list[jax.Array]:
        """Returns a window of each array, in float32."""
        return [stage[window].astype(jnp.float32) for stage in self.stages]


def full(shape: tuple[int, ...], value: jax.Array, itemsize: int) -> jax.Array:
    """Returns a constant as threads hold what they load.

    Args:
      shape: of a piece.
      value: the constant, a scalar.
      itemsize: the bytes of a number that is loaded.

    Returns:
      The array.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    vector = min(8 // itemsize, math.prod(shape) // LINE)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)
    return plgpu.layout_cast(jnp.full(shape, value), layout)


def centred(factors: Factors, x: jax.Array, peak: jax.Array) -> jax.Array:
    """Returns (x - peak) / τ in base 2, by the factors of `chips.tau_factors`."""
    before, *others = factors
    c = x - peak if before is None else x * before - peak * before
    for factor in others:
        c = c if factor is None else c * factor
    return c


class RowFold(abc.ABC, Generic[_Carry, _Result]):
    """What a kernel finds of rows, chunk after chunk.

    Threads fold by themselves; those of a block meet once a row, then the blocks that
    share the row. A subclass is a frozen dataclass: a fold is part of the program.

    Attributes:
      static: the factors of all rows, None if each row has its own.
      fill: what numbers beyond a row's last class are; those that TMA writes are 0.
      private: whether a thread reads of shared memory nothing that another thread
        wrote.
    """

    static: Factors | None
    fill: ClassVar[float]
    private: ClassVar[bool] = False

    @property
    def recorded(self) -> int:
        """How many numbers of each row the kernel returns."""
        return 0

    @abc.abstractmethod
    def start(self, lines: int, itemsize: int) -> _Carry:
        """Returns what each thread has found before the first chunk.

        Args:
          lines: of a chunk.
          itemsize: the bytes of a number that is loaded.
        """

    @abc.abstractmethod
    def fold(self, chunk: Chunk, carry: _Carry) -> _Carry:
        """Returns what each thread has found with one more chunk."""

    @abc.abstractmethod
    def meet(self, factors: Factors, carry: _Carry) -> tuple[jax.Array, ...]:
        """Returns what a block's threads found together, in float32 numbers."""

    @abc.abstractmethod
    def finish(
        self, factors: Factors, of_blocks: list[tuple[jax.Array, ...]]
    ) -> _Result:
        """Returns what is known of a row.

        Args:
          factors: of the row.
          of_blocks: what `meet` returned in each block that has a part of the row.
        """

    def record(self, result: _Result) -> tuple[jax.Array, ...]:
        """Returns the numbers of a row that the kernel returns, float32."""
        del result
        return ()


class Task(RowFold[_Carry, _Result]):
    """What a kernel does with rows that it overwrites: it folds chunks, then writes."""

    @abc.abstractmethod
    def write(self, chunk: Chunk, result: _Result) -> None:
        """Overwrites the first array's chunk by the result."""


class PieceFold(RowFold[tuple[jax.Array, ...], _Result]):
    """A fold that takes pieces as threads load them fastest."""

    @abc.abstractmethod
    def starts(self) -> tuple[float, ...]:
        """Returns what each thread starts from, for each number that it finds."""

    @abc.abstractmethod
    def merge_pieces(
        self,
        factors: Factors,
        carry: tuple[jax.Array, ...],
        pieces: list[list[jax.Array]],
    ) -> tuple[jax.Array, ...]:
        """Returns the carry with pieces, [P, 128] of each array."""

    def start(self, lines: int, itemsize: int) -> tuple[jax.Array, ...]:
        """Returns the starts, as pieces."""
        shape = (min(PIECE, lines), LINE)
        return tuple(full(shape, jnp.float32(v), itemsize) for v in self.starts())

    def fold(self, chunk: Chunk, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Merges the pieces of a chunk."""
        pieces = [chunk.load(window) for window in chunk.windows()]
        return self.merge_pieces(chunk.factors, carry, pieces)


class _PieceTask(PieceFold[_Result], Task[tuple[jax.Array, ...], _Result]):
    """A task that takes pieces as threads load them fastest."""

    @abc.abstractmethod
    def result(self, factors: Factors, result: _Result, *piece: jax.Array) -> jax.Array:
        """Returns what overwrites a piece of the first array."""

    def write(self, chunk: Chunk, result: _Result) -> None:
        """Overwrites each piece of the chunk."""
        stage = chunk.stages[0]
        for window in chunk.windows():
            new = self.result(chunk.factors, result, *chunk.load(window))
            stage[window] = new.astype(stage.dtype)


@dataclasses.dataclass(frozen=True)
class Softmax(_PieceTask[tuple[jax.Array, ...]]):
    """The largest logit and the sum of a row, then its probabilities.

    Attributes:
      static: the factors of `chips.tau_factors`, if they are static.
    """

    static: Factors | None

    fill: ClassVar = -math.inf

    def weight(self, factors: Factors, x: jax.Array, peak: jax.Array) -> jax.Array:
        """Returns exp((x - peak) / τ)."""
        return jnp.exp2(centred(factors, x, peak))

    def starts(self):
        """Returns the lowest finite number, and no sum."""
        return float(jnp.finfo(jnp.float32).min), 0.0

    def merge_pieces(self, factors, carry, pieces):
        """Merges the largest logits and the sums."""
        peak, total = carry
        xs = [x for (x,) in pieces]
        top = functools.reduce(jnp.maximum, xs, peak)
        total = total * self.weight(factors, peak, top)
        for x in xs:
            total = total + self.weight(factors, x, top)
        return top, total

    def meet(self, factors, carry):
        """Returns the largest logit and the sum of a block."""
        peak, total = carry
        top = jnp.max(peak)
        return top, jnp.sum(total * self.weight(factors, peak, top))

    def finish(self, factors, of_blocks):
        """Returns what `known` does."""
        (top, total), *others = of_blocks
        for peak, block_total in others:
            both = jnp.maximum(top, peak)
            total = total * self.weight(factors, top, both)
            total = total + block_total * self.weight(factors, peak, both)
            top = both
        return self.known(top, total)

    def known(self, top: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the row's largest logit, and one over its sum."""
        return top, 1 / jnp.where(total == 0, 1.0, total)

    def result(self, factors, result, *piece):
        """Returns the probabilities of a piece."""
        (x,) = piece
        top, inverse = result
        return self.weight(factors, x, top) * inverse


@dataclasses.dataclass(frozen=True)
class Slope(_PieceTask[jax.Array]):
    """Σ y g and Σ y of a row, then y (g - Σ y g / Σ y) / τ.

    Attributes:
      static: 1/τ alone, if it is static.
    """

    static: Factors | None

    fill: ClassVar = 0.0

    def starts(self):
        """Returns no sums."""
        return 0.0, 0.0

    def merge_pieces(self, factors, carry, pieces):
        """Adds up pieces of y and g."""
        del factors
        weighted, total = carry
        for y, g in pieces:
            weighted, total = weighted + y * g, total + y
        return weighted, total

    def meet(self, factors, carry):
        """Returns both sums of a block."""
        del factors
        return tuple(jnp.sum(a) for a in carry)

    def finish(self, factors, of_blocks):
        """Returns the mean of g."""
        del factors
        weighted, total = (sum(of_one) for of_one in zip(*of_blocks, strict=True))
        return weighted / jnp.where(total == 0, 1.0, total)

    def result(self, factors, result, *piece):
        """Returns the product with a piece."""
        (scale,), (y, g) = factors, piece
        assert scale is not None
        return y * (g - result) * scale
