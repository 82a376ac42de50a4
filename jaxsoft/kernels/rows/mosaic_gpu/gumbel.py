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
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import noise
from jaxsoft._core.exact_sum import LOWEST, above, exact_sum, gap
from jaxsoft.kernels.rows.mosaic_gpu.tasks import LINE, Chunk, Task, full
from jaxsoft.kernels.typing import Factors, Scalar

__all__ = ["Gumbel", "gumbel"]

# The class of no number; any class is lower.
_NO_CLASS = 2**30
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

_Carry = TypeVar("_Carry")


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
    drawn = -jnp.log(jnp.where(u < _SMALL, u * series, -jnp.log(1 - u)))
    # The outer logarithm is a product, since the hardware's has base 2. Compilers would
    # fuse that product with the sum that follows, in one pass and not in the other: one
    # pass alone would round the noise. This sum is there to be fused instead.
    return drawn + 0.0


class _Peak(NamedTuple):
    """The largest perturbed logit, an exact sum, that a thread or a row has.

    Attributes:
      top: the logit, rounded.
      rest: what rounding has taken of it.
      best: its lowest class, or None.
    """

    top: jax.Array
    rest: jax.Array
    best: jax.Array | None


class _Best(NamedTuple):
    """What a thread or a block has found of a row: its peak and its sum.

    Attributes:
      top: the largest perturbed logit, rounded.
      rest: what rounding has taken of it.
      total: Σ exp((x - top) / τ).
      best: the peak's lowest class, or None.
    """

    top: jax.Array
    rest: jax.Array
    total: jax.Array
    best: jax.Array | None

    @property
    def peak(self) -> _Peak:
        """The peak alone."""
        return _Peak(self.top, self.rest, self.best)


class _Result(NamedTuple):
    """What probabilities are made of.

    Attributes:
      peak: the row's largest perturbed logit.
      best_weight: what exp((x - peak) / τ) is multiplied by for the best class.
      weight: what it is multiplied by for the others.
    """

    peak: _Peak
    best_weight: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class Gumbel(Task[_Best, _Result]):
    """The largest perturbed logit and the sum of a row, then its probabilities.

    Attributes:
      static: the factors of `chips.tau_factors`, if they are static.
      generator: of the bits.
      hard: whether the result is one-hot.
    """

    static: Factors | None
    generator: noise.Generator
    hard: bool

    fill: ClassVar = -math.inf
    # A thread reads of shared memory what copies or it itself has written: there is
    # nothing to wait for before and after each line.
    private: ClassVar = True

    @property
    def _chooses(self) -> bool:
        """Whether the best class counts: a temperature that is not known may be 0."""
        return self.hard or self.static is None

    def start(self, lines: int, itemsize: int) -> _Best:
        """Returns what each thread has found before the first chunk."""
        del lines

        def line(value):
            return full((LINE,), value, itemsize)

        best = line(jnp.int32(_NO_CLASS)) if self._chooses else None
        top, rest, total = (line(jnp.float32(v)) for v in (*LOWEST, 0.0))
        return _Best(top, rest, total, best)

    def fold(self, chunk: Chunk, carry: _Best) -> _Best:
        """Merges a chunk into the carry; keeps its noise if there is room."""

        def merge(first, old):
            lines = list(self._lines(chunk, first, draws=True))
            peak = old.peak
            for line, top, rest in lines:
                ids = None if peak.best is None else self._ids(chunk, line)
                peak = _higher(peak, _Peak(top, rest, ids))
            total = old.total * _weight(chunk.factors, old.top, old.rest, peak)
            for _, top, rest in lines:
                total = total + _weight(chunk.factors, top, rest, peak)
            return _Best(peak.top, peak.rest, total, peak.best)

        return _fold_pieces(chunk, merge, carry)

    def meet(self, factors: Factors, carry: _Best) -> tuple[jax.Array, ...]:
        """Returns the largest perturbed logit, the sum and the best of a block."""
        top = jnp.max(carry.top)
        rest = jnp.max(jnp.where(carry.top == top, carry.rest, LOWEST[0]))
        peak = _Peak(top, rest, None)
        total = jnp.sum(carry.total * _weight(factors, carry.top, carry.rest, peak))
        if carry.best is None:
            return top, rest, total
        is_peak = (carry.top == top) & (carry.rest == rest)
        best = jnp.min(jnp.where(is_peak, carry.best, _NO_CLASS))
        # A class goes in two halves: a float32 holds integers of 24 bits.
        halves = (lax.shift_right_logical(best, 16), best & 0xFFFF)
        return top, rest, total, *(half.astype(jnp.float32) for half in halves)

    def finish(
        self, factors: Factors, of_blocks: list[tuple[jax.Array, ...]]
    ) -> _Result:
        """Returns what the row's probabilities are made of."""
        blocks = []
        for top, rest, total, *halves in of_blocks:
            best = None
            if halves:
                high, low = (half.astype(jnp.int32) for half in halves)
                best = high * 2**16 + low
            blocks.append(_Best(top, rest, total, best))
        row = functools.reduce(functools.partial(_join, factors), blocks)
        inverse = 1 / jnp.where(row.total == 0, 1.0, row.total)
        if row.best is None:
            return _Result(row.peak, inverse, inverse)
        # In a row with a NaN the sum is NaN. Then so is this difference, which is 0
        # otherwise, and with it every weight of the row.
        zero_or_nan = inverse - inverse
        if self.hard:
            return _Result(row.peak, 1 + zero_or_nan, zero_or_nan)
        # The third of `chips.tau_factors` is above 1 at τ = 0 alone.
        third = factors[2]
        assert third is not None
        is_zero = third > 1
        weights = (
            jnp.where(is_zero, w, inverse) for w in (1 + zero_or_nan, zero_or_nan)
        )
        return _Result(row.peak, *weights)

    def write(self, chunk: Chunk, result: _Result) -> None:
        """Overwrites a chunk by its probabilities."""
        stage = chunk.stages[0]

        def weight(line: Scalar) -> jax.Array:
            if result.peak.best is None:
                return result.weight
            is_best = self._ids(chunk, line) == result.peak.best
            return jnp.where(is_best, result.best_weight, result.weight)

        def write(first: Scalar, _: None) -> None:
            if self.hard:
                for line in [first + i for i in range(chunk.piece)]:
                    stage[chunk.slot, line] = weight(line).astype(stage.dtype)
                return
            draws = chunk.noise is None
            for line, top, rest in self._lines(chunk, first, draws):
                p = weight(line)
                p = _weight(chunk.factors, top, rest, result.peak) * p
                stage[chunk.slot, line] = p.astype(stage.dtype)

        _fold_pieces(chunk, write, None)

    def _lines(
        self, chunk: Chunk, first: Scalar, draws: bool
    ) -> Iterator[tuple[Scalar, jax.Array, jax.Array]]:
        """Yields a piece's lines with their perturbed logits, as exact sums.

        Args:
          chunk: where they are.
          first: the piece's first line in the chunk.
          draws: whether noise is drawn, and kept if there is room, or was kept.
        """
        kept = chunk.noise
        for pair in range(0, chunk.piece, 2):
            lines = [first + i for i in range(pair, min(pair + 2, chunk.piece))]
            if draws or kept is None:
                # A line without a neighbour leaves half of the words unused.
                drawn = self._pair(chunk, lines[0])[: len(lines)]
            else:
                drawn = [kept[chunk.slot, line] for line in lines]
            for line, line_noise in zip(lines, drawn, strict=True):
                if draws and kept is not None:
                    kept[chunk.slot, line] = line_noise
                (x,) = chunk.load((chunk.slot, line))
                yield line, *exact_sum(x, line_noise)

    def _pair(self, chunk: Chunk, line: Scalar) -> list[jax.Array]:
        """Returns the noise of a line of the chunk and of the next."""
        assert chunk.words is not None
        counters = (chunk.first + line) * (LINE // 2) + _iota()
        counters = counters.astype(jnp.uint32)
        pair = noise.pair_bits(chunk.words, noise.CLASSES, counters, self.generator)
        return [gumbel(bits) for bits in pair]

    def _ids(self, chunk: Chunk, line: Scalar) -> jax.Array:
        """Returns the classes of a line of the chunk."""
        return (chunk.first + line) * LINE + _iota()


def _fold_pieces(
    chunk: Chunk, function: Callable[[Scalar, _Carry], _Carry], carry: _Carry
) -> _Carry:
    """Folds a function over the first lines of the chunk's pieces.

    It is a loop: ciphers are long, and those of a chunk would not fit the
    multiprocessor's cache of instructions.
    """
    if chunk.lines == chunk.piece:
        return function(0, carry)

    def step(index, carry):
        return function(index * chunk.piece, carry)

    return lax.fori_loop(0, chunk.lines // chunk.piece, step, carry)


def _weight(
    factors: Factors, top: jax.Array, rest: jax.Array, peak: _Peak
) -> jax.Array:
    """Returns exp((x - peak) / τ) of perturbed logits x, which are exact sums."""
    c = gap(top, rest, peak.top, peak.rest)
    for factor in factors:
        c = c if factor is None else c * factor
    return jnp.exp2(c)


def _higher(one: _Peak, other: _Peak) -> _Peak:
    """Returns the higher peak, of equal ones the first."""
    higher = above(other.top, other.rest, one.top, one.rest)
    top = jnp.where(higher, other.top, one.top)
    rest = jnp.where(higher, other.rest, one.rest)
    if one.best is None or other.best is None:
        return _Peak(top, rest, None)
    return _Peak(top, rest, jnp.where(higher, other.best, one.best))


def _join(factors: Factors, one: _Best, other: _Best) -> _Best:
    """Returns what two blocks found, the one of lower classes first."""
    peak = _higher(one.peak, other.peak)
    total = one.total * _weight(factors, one.top, one.rest, peak)
    total = total + other.total * _weight(factors, other.top, other.rest, peak)
    return _Best(peak.top, peak.rest, total, peak.best)


def _iota() -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WG_STRIDED((LINE,), vec_size=1)
    return plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=layout)
