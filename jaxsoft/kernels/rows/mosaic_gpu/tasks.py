"""What GPUs' kernels for rows do with the chunks that pass through shared memory.

A task finds a few numbers of a row, chunk after chunk, and writes chunks from them. A
piece is what threads hold at a time: of 8 lines, 8 numbers each.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["LINE", "PIECE", "Chunk", "Slope", "Softmax", "centred", "full"]

# Numbers in a line, and the most lines of a piece.
LINE = 128
PIECE = 8


class Chunk(NamedTuple):
    """A chunk of a row in shared memory.

    Attributes:
      stages: the slots of each array, [S, C, 128].
      noise: those of noise, float32, if it is kept.
      slot: where the chunk is.
      first: its first line in the row.
      temper: the numbers of the row that the task needs.
      words: the two words of the row's key, if there is one.
    """

    stages: Any
    noise: Any
    slot: Any
    first: Any
    temper: Any
    words: Any

    @property
    def keeps(self) -> bool:
        """Whether noise is kept."""
        return self.noise is not None

    @property
    def lines(self) -> int:
        """The lines of a chunk."""
        return self.stages[0].shape[1]

    @property
    def piece(self) -> int:
        """The lines of a piece, of which a chunk has a whole number."""
        return min(PIECE, self.lines)

    def windows(self) -> list[Any]:
        """Returns where each piece is."""
        from jax.experimental import pallas as pl

        starts = range(0, self.lines, self.piece)
        return [(self.slot, pl.ds(start, self.piece)) for start in starts]

    def load(self, where: Any) -> list[jax.Array]:
        """Returns a window of each array, in float32."""
        return [stage[where].astype(jnp.float32) for stage in self.stages]


def full(shape: tuple[int, ...], value: Any, itemsize: int) -> jax.Array:
    """Returns a constant as threads hold what they load.

    Args:
      shape: of a piece.
      value: the constant, of a dtype of JAX.
      itemsize: the bytes of a number that is loaded.

    Returns:
      The array.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    vector = min(8 // itemsize, math.prod(shape) // LINE)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)
    return plgpu.layout_cast(jnp.full(shape, value), layout)


def centred(temper: Any, x: jax.Array, peak: Any) -> jax.Array:
    """Returns (x - peak) / τ in base 2."""
    before, factor, again = temper
    c = x - peak if before is None else x * before - peak * before
    c = c * factor
    return c if again is None else c * again


class _Pieces(abc.ABC):
    """A task that takes pieces as threads load them fastest."""

    # Whether a thread reads of shared memory nothing that other threads wrote.
    private = False
    starts: ClassVar[tuple[float, float]]

    @abc.abstractmethod
    def merge(self, temper: Any, found: Any, pieces: Any) -> Any:
        """Merges pieces ([P, 128] of each array) into what was found."""

    @abc.abstractmethod
    def meet(self, temper: Any, found: Any) -> tuple[Any, ...]:
        """Returns what a block's threads found together, in float32 numbers."""

    @abc.abstractmethod
    def finish(self, temper: Any, each: list[tuple[Any, ...]]) -> Any:
        """Returns what `result` needs of the row from what each of its blocks found."""

    @abc.abstractmethod
    def result(self, temper: Any, result: Any, *piece: jax.Array) -> jax.Array:
        """Returns what overwrites a piece of the first array."""

    def start(self, lines: int, itemsize: int) -> Any:
        """Returns what each thread has found before the first chunk."""
        shape = (min(PIECE, lines), LINE)
        return tuple(full(shape, jnp.float32(v), itemsize) for v in self.starts)

    def fold(self, chunk: Chunk, found: Any) -> Any:
        """Merges a chunk into what was found."""
        pieces = [chunk.load(where) for where in chunk.windows()]
        return self.merge(chunk.temper, found, pieces)

    def write(self, chunk: Chunk, result: Any) -> None:
        """Overwrites the first array's chunk by the result."""
        stage = chunk.stages[0]
        for where in chunk.windows():
            new = self.result(chunk.temper, result, *chunk.load(where))
            stage[where] = new.astype(stage.dtype)


@dataclasses.dataclass(frozen=True)
class Softmax(_Pieces):
    """The largest logit and the sum of a row, then its probabilities.

    Attributes:
      static: the factors of `nvidia.temper`, None for 1, if they are static.
    """

    static: Any

    # What columns beyond a row are; those of TMA are 0.
    fill = -math.inf
    starts: ClassVar = (float(jnp.finfo(jnp.float32).min), 0.0)

    def merge(self, temper, found, pieces):
        """Merges the largest logits and the sums."""
        peak, total = found
        xs = [x for (x,) in pieces]
        top = functools.reduce(jnp.maximum, xs, peak)
        total = total * jnp.exp2(centred(temper, peak, top))
        for x in xs:
            total = total + jnp.exp2(centred(temper, x, top))
        return top, total

    def meet(self, temper, found):
        """Returns the largest logit and the sum of a block."""
        peak, total = found
        top = jnp.max(peak)
        return top, jnp.sum(total * jnp.exp2(centred(temper, peak, top)))

    def finish(self, temper, each):
        """Returns the row's largest logit, and one over its sum."""
        (top, total), *others = each
        for peak, more in others:
            both = jnp.maximum(top, peak)
            total = total * jnp.exp2(centred(temper, top, both))
            total = total + more * jnp.exp2(centred(temper, peak, both))
            top = both
        return top, 1 / jnp.where(total == 0, 1.0, total)

    def result(self, temper, result, *piece):
        """Returns the probabilities of a piece."""
        (x,) = piece
        top, inverse = result
        return jnp.exp2(centred(temper, x, top)) * inverse


@dataclasses.dataclass(frozen=True)
class Slope(_Pieces):
    """Σ y g and Σ y of a row, then y (g - Σ y g / Σ y) / τ.

    Attributes:
      static: 1/τ, if it is static.
    """

    static: Any
    fill = 0.0
    starts: ClassVar = (0.0, 0.0)

    def merge(self, temper, found, pieces):
        """Adds up pieces of y and g."""
        del temper
        weighted, total = found
        for y, g in pieces:
            weighted, total = weighted + y * g, total + y
        return weighted, total

    def meet(self, temper, found):
        """Returns both sums of a block."""
        del temper
        return tuple(jnp.sum(a) for a in found)

    def finish(self, temper, each):
        """Returns the mean of g."""
        del temper
        weighted, total = (sum(numbers) for numbers in zip(*each, strict=True))
        return weighted / jnp.where(total == 0, 1.0, total)

    def result(self, temper, result, *piece):
        """Returns the product with a piece."""
        (scale,), (y, g) = temper, piece
        return y * (g - result) * scale
