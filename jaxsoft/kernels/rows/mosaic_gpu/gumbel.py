"""Gumbel-softmax of rows as kernels for GPUs compute it, noise included.

Noise comes from the row's key and the class, the bits of `jaxsoft.noise`. Two
neighbouring lines share a cipher, which is computed once for both: threads hold one
number of each of 8 lines. A perturbed logit is the exact sum of a logit and its noise,
which both passes find alike.

A cipher of 20 rounds takes some 80 integer instructions, and the noise of its two
classes as many again: more time than copying the classes through the device's memory.
So the noise of a row that fits the shared memory of a cluster together with its noise
is drawn once and kept, 4 bytes a class (of up to 196,608 float32 classes, 262,144 of 16
bits); that of longer rows is drawn again in the second pass.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import noise
from jaxsoft._core.exact_sum import LOWEST, above, exact_sum, gap
from jaxsoft.kernels.rows.mosaic_gpu.tasks import LINE, Chunk, full

__all__ = ["Gumbel", "gumbel"]

_BEYOND = 2**30
# -log(1 - u) = u P(u) below _SMALL; from a least-squares fit of relative errors.
_SMALL = 0.25
_LOG = (
    1.0,
    0.499999106,
    0.33338955,
    0.248693898,
    0.214223862,
    0.0896221027,
    0.33377340,
)


def gumbel(bits: jax.Array) -> jax.Array:
    """Returns noise from bits; the hardware's logarithm is coarse beside 1.

    Args:
      bits: uint32 of any shape.

    Returns:
      float32, that of `noise.gumbel_of_bits` to some 5e-7 of 1 or of itself.
    """
    u = jnp.minimum(noise.unit_of_bits(bits), 1 - 2.0**-24)
    series = jnp.full(u.shape, _LOG[-1], u.dtype)
    for coefficient in _LOG[-2::-1]:
        series = series * u + coefficient
    found = -jnp.log(jnp.where(u < _SMALL, u * series, -jnp.log(1 - u)))
    # Of a logarithm in base 2 this is a product, and without a sum of its own compilers
    # fuse it with the next: unrounded noise in one pass, rounded noise in the other.
    return found + 0.0


class _Best(NamedTuple):
    """What was found, by each thread or of a row.

    Attributes:
      top: the largest perturbed logit, rounded.
      rest: what rounding has taken of it.
      total: Σ exp((x - top) / τ).
      best: its lowest class, or None.
    """

    top: Any
    rest: Any
    total: Any
    best: Any


class _Result(NamedTuple):
    """What probabilities are made of.

    Attributes:
      top: the largest perturbed logit, rounded.
      rest: what rounding has taken of it.
      best: its lowest class, or None.
      best_weight: what exp((x - top) / τ) is multiplied by for the best class.
      weight: and for the others.
    """

    top: Any
    rest: Any
    best: Any
    best_weight: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class Gumbel:
    """The largest perturbed logit and the sum of a row, then its probabilities.

    Attributes:
      static: the factors of `nvidia.temper`, None for 1, if they are static.
      generator: of the bits.
      hard: whether the result is one-hot.
    """

    static: Any
    generator: noise.Generator
    hard: bool

    # What columns beyond a row are; those of TMA are 0.
    fill = -math.inf
    # A thread reads of shared memory what copies or it itself has written: there is
    # nothing to wait for before and after each line.
    private = True

    @property
    def _chooses(self) -> bool:
        """Whether the best class counts: a temperature that is not known may be 0."""
        return self.hard or self.static is None

    def start(self, lines: int, itemsize: int) -> _Best:
        """Returns what each thread has found before the first chunk."""
        del lines

        def line(value):
            return full((LINE,), value, itemsize)

        best = line(jnp.int32(_BEYOND)) if self._chooses else None
        top, rest, total = (line(jnp.float32(v)) for v in (*LOWEST, 0.0))
        return _Best(top, rest, total, best)

    def fold(self, chunk: Chunk, found: _Best) -> _Best:
        """Merges a chunk into what was found; keeps its noise if there is room."""

        def merge(first, found):
            lines = list(self._lines(chunk, first, draws=True))
            new = found
            for line, top, rest in lines:
                ids = None if new.best is None else self._ids(chunk, line)
                new = _higher(new, _Best(top, rest, None, ids))
            total = found.total * _weight(chunk.temper, found.top, found.rest, new)
            for _, top, rest in lines:
                total = total + _weight(chunk.temper, top, rest, new)
            return new._replace(total=total)

        return _each_piece(chunk, merge, found)

    def meet(self, temper: Any, found: _Best) -> tuple[Any, ...]:
        """Returns the largest perturbed logit, the sum and the best of a block."""
        top = jnp.max(found.top)
        rest = jnp.max(jnp.where(found.top == top, found.rest, LOWEST[0]))
        row = _Best(top, rest, None, None)
        total = jnp.sum(found.total * _weight(temper, found.top, found.rest, row))
        if found.best is None:
            return top, rest, total
        here = (found.top == top) & (found.rest == rest)
        best = jnp.min(jnp.where(here, found.best, _BEYOND))
        # In two halves: a float32 has 24 bits.
        halves = (lax.shift_right_logical(best, 16), best & 0xFFFF)
        return top, rest, total, *(half.astype(jnp.float32) for half in halves)

    def finish(self, temper: Any, each: list[tuple[Any, ...]]) -> _Result:
        """Returns what the row's probabilities are made of."""
        blocks = []
        for top, rest, total, *halves in each:
            best = None
            if halves:
                high, low = (half.astype(jnp.int32) for half in halves)
                best = high * 2**16 + low
            blocks.append(_Best(top, rest, total, best))
        found = functools.reduce(functools.partial(_together, temper), blocks)
        top, rest, total, best = found
        inverse = 1 / jnp.where(total == 0, 1.0, total)
        if best is None:
            return _Result(top, rest, None, inverse, inverse)
        # In a row with NaN the sum is NaN, and all that it touches.
        lost = inverse - inverse
        if self.hard:
            return _Result(top, rest, best, 1 + lost, lost)
        # Of `nvidia.temper`; 1 or less but at τ = 0.
        zero = temper[2] > 1
        weights = (jnp.where(zero, w, inverse) for w in (1 + lost, lost))
        return _Result(top, rest, best, *weights)

    def write(self, chunk: Chunk, result: _Result) -> None:
        """Overwrites a chunk by its probabilities."""
        stage = chunk.stages[0]

        def write(first, _):
            if self.hard:
                lines = [(first + i, None, None) for i in range(chunk.piece)]
            else:
                lines = self._lines(chunk, first, draws=not chunk.keeps)
            for line, top, rest in lines:
                p = result.weight
                if result.best is not None:
                    here = self._ids(chunk, line) == result.best
                    p = jnp.where(here, result.best_weight, p)
                if not self.hard:
                    p = _weight(chunk.temper, top, rest, result) * p
                stage[chunk.slot, line] = p.astype(stage.dtype)

        _each_piece(chunk, write, None)

    def _lines(self, chunk: Chunk, first: Any, draws: bool):
        """Yields a piece's lines with their perturbed logits, as exact sums.

        Args:
          chunk: where they are.
          first: of the piece in the chunk.
          draws: whether noise is drawn, and kept if there is room, or was kept.
        """
        for pair in range(0, chunk.piece, 2):
            lines = [first + i for i in range(pair, min(pair + 2, chunk.piece))]
            if draws:
                # Without a second word for a line that has no neighbour.
                drawn = self._pair(chunk, lines[0])[: len(lines)]
            else:
                drawn = [chunk.noise[chunk.slot, line] for line in lines]
            for line, own in zip(lines, drawn, strict=True):
                if draws and chunk.keeps:
                    chunk.noise[chunk.slot, line] = own
                (x,) = chunk.load((chunk.slot, line))
                yield line, *exact_sum(x, own)

    def _pair(self, chunk: Chunk, line: Any) -> list[jax.Array]:
        """Returns the noise of a line of the chunk and of the next."""
        counters = (chunk.first + line) * (LINE // 2) + _iota()
        counters = counters.astype(jnp.uint32)
        pair = noise.pair_bits(chunk.words, noise.CLASSES, counters, self.generator)
        return [gumbel(bits) for bits in pair]

    def _ids(self, chunk: Chunk, line: Any) -> jax.Array:
        """Returns the classes of a line of the chunk."""
        return (chunk.first + line) * LINE + _iota()


def _each_piece(chunk: Chunk, function: Any, carry: Any) -> Any:
    """Folds a function over the first lines of the chunk's pieces.

    In a loop: ciphers are long, and those of a chunk would not fit the multiprocessor's
    cache of instructions.
    """
    if chunk.lines == chunk.piece:
        return function(0, carry)

    def step(index, carry):
        return function(index * chunk.piece, carry)

    return lax.fori_loop(0, chunk.lines // chunk.piece, step, carry)


def _weight(temper: Any, top: Any, rest: Any, peak: Any) -> jax.Array:
    """Returns exp((x - peak) / τ) of perturbed logits and what they are centred on."""
    c = gap(top, rest, peak.top, peak.rest)
    for factor in temper:
        c = c if factor is None else c * factor
    return jnp.exp2(c)


def _higher(one: _Best, other: _Best) -> _Best:
    """Returns the higher peak, of equal ones the first, without a total."""
    higher = above(other.top, other.rest, one.top, one.rest)
    top = jnp.where(higher, other.top, one.top)
    rest = jnp.where(higher, other.rest, one.rest)
    best = None if one.best is None else jnp.where(higher, other.best, one.best)
    return _Best(top, rest, None, best)


def _together(temper: Any, one: _Best, other: _Best) -> _Best:
    """Returns what two blocks found, the one of lower classes first."""
    row = _higher(one, other)
    total = one.total * _weight(temper, one.top, one.rest, row)
    total = total + other.total * _weight(temper, other.top, other.rest, row)
    return row._replace(total=total)


def _iota() -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WG_STRIDED((LINE,), vec_size=1)
    return plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=layout)
