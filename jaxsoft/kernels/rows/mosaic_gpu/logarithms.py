"""Log-softmax of rows, and what their log-sum-exp, entropy and losses are made of.

Differences of logits are divided in base e here: at τ = 1 they are exact. What is known
of a row leaves the kernel, a few numbers, so that no derivative looks for it again.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.kernels.rows.mosaic_gpu.tasks import PieceFold, Softmax, centred
from jaxsoft.kernels.typing import Factors

__all__ = ["LogSoftmax", "Statistics", "logarithm"]

# A finite number in place of -inf: its product with 0 is 0, its exponential is 0.
_LOWEST = -1e3
_MIN = float(jnp.finfo(jnp.float32).min)
# The bits of 0.75, and how many a float32's significand has.
_THREE_QUARTERS, _SIGNIFICAND = 0x3F400000, 23
# log(f) = 2 s (1 + s²/3 + s⁴/5 + …) with s = (f - 1) / (f + 1); |s| is at most 0.2.
_ODD = tuple(1 / n for n in range(1, 11, 2))


def logarithm(total: jax.Array) -> jax.Array:
    """Returns log(total) to 2.5e-7 of itself; the hardware's is coarse near 1.

    Args:
      total: a scalar float32, 1 or more, or NaN.
    """
    bits = lax.bitcast_convert_type(total, jnp.int32)
    exponent = lax.shift_right_arithmetic(bits - _THREE_QUARTERS, _SIGNIFICAND)
    # From 3/4 to 3/2: beside 1 the sum of both logarithms would lose digits.
    bits = bits - exponent * 2**_SIGNIFICAND
    fraction = lax.bitcast_convert_type(bits, jnp.float32)
    s = (fraction - 1) / (fraction + 1)
    series = jnp.float32(_ODD[-1])
    for coefficient in _ODD[-2::-1]:
        series = series * (s * s) + coefficient
    found = exponent.astype(jnp.float32) * math.log(2) + 2 * s * series
    # A NaN's bits are those of a number to what is above.
    return found + (total - total)


@dataclasses.dataclass(frozen=True)
class LogSoftmax(Softmax):
    """The largest logit and the sum of a row, then its log-probabilities.

    Attributes:
      static: the factors of `chips.tau_factors` in base e, if they are static.
    """

    @property
    def recorded(self) -> int:
        """The largest logit and the sum."""
        return 2

    def weight(self, factors: Factors, x: jax.Array, peak: jax.Array) -> jax.Array:
        """Returns exp((x - peak) / τ)."""
        return jnp.exp(centred(factors, x, peak))

    def known(self, top: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the row's largest logit, its sum and the sum's logarithm."""
        return top, total, logarithm(jnp.where(total == 0, 1.0, total))

    def record(self, result):
        """Returns the largest logit and the sum."""
        top, total, _ = result
        return top, total

    def result(self, factors, result, *piece):
        """Returns the log-probabilities of a piece."""
        (x,) = piece
        top, _, log_total = result
        return centred(factors, x, top) - log_total


class _Found(NamedTuple):
    """What a thread, a block or a row has; with c the centred logits, over τ.

    Attributes:
      peak: the largest logit, the lowest finite number if there is none.
      total: Σ exp(c).
      weighted: Σ exp(c) c, or None.
      gap: Σ c over the kept classes, or None.
      number: how many these are, or None.
    """

    peak: jax.Array
    total: jax.Array
    weighted: jax.Array | None
    gap: jax.Array | None
    number: jax.Array | None

    def given(self) -> tuple[jax.Array, ...]:
        """Returns those that are not None."""
        return tuple(number for number in self if number is not None)

    def about(self, factors: Factors, top: jax.Array) -> "_Found":
        """Returns the same about a peak that is as high or higher."""
        moved = centred(factors, self.peak, top)
        weight = jnp.exp(moved)
        weighted, gap, number = self.weighted, self.gap, self.number
        if weighted is not None:
            weighted = (weighted + self.total * jnp.maximum(moved, _LOWEST)) * weight
        if gap is not None and number is not None:
            gap = gap + number * jnp.where(number == 0, 0.0, moved)
        return _Found(top, self.total * weight, weighted, gap, number)

    def with_piece(self, factors: Factors, x: jax.Array) -> "_Found":
        """Returns the same with logits that are none above the peak."""
        c = centred(factors, x, self.peak)
        weight = jnp.exp(c)
        weighted, gap, number = self.weighted, self.gap, self.number
        if weighted is not None:
            weighted = weighted + weight * jnp.maximum(c, _LOWEST)
        if gap is not None and number is not None:
            # With -inf the compiler would compare 16-bit floats as such, and hold all
            # of them in registers of their own.
            kept = x >= _MIN
            gap = gap + jnp.where(kept, c, 0.0)
            number = number + jnp.where(kept, 1.0, 0.0)
        return _Found(self.peak, self.total + weight, weighted, gap, number)


@dataclasses.dataclass(frozen=True)
class Statistics(PieceFold[_Found]):
    """The numbers of a row that its log-sum-exp, entropy and losses are made of.

    Attributes:
      static: the factors of `chips.tau_factors` in base e, if they are static.
      expected: whether Σ exp(c) c is wanted.
      mean: whether Σ c and the number of the kept classes are wanted.
    """

    static: Factors | None
    expected: bool
    mean: bool

    fill: ClassVar = -math.inf

    @property
    def recorded(self) -> int:
        """The fields of `_Found` that are wanted."""
        return 2 + self.expected + 2 * self.mean

    def starts(self) -> tuple[float, ...]:
        """Returns the lowest finite number, and no sums."""
        return (_MIN, *(0.0 for _ in range(self.recorded - 1)))

    def merge_pieces(self, factors, carry, pieces):
        """Merges pieces about the largest logit of all."""
        found, xs = self._found(carry), [x for (x,) in pieces]
        found = found.about(factors, functools.reduce(jnp.maximum, xs, found.peak))
        for x in xs:
            found = found.with_piece(factors, x)
        return found.given()

    def meet(self, factors, carry):
        """Returns what a block's threads found together."""
        found = self._found(carry)
        top = jnp.max(found.peak)
        _, *sums = found.about(factors, top).given()
        return top, *(jnp.sum(number) for number in sums)

    def finish(self, factors, of_blocks):
        """Returns what the blocks found together."""
        blocks = [self._found(block) for block in of_blocks]
        top = functools.reduce(jnp.maximum, [block.peak for block in blocks])
        moved = [block.about(factors, top).given()[1:] for block in blocks]
        sums = [functools.reduce(jnp.add, each) for each in zip(*moved, strict=True)]
        return self._found((top, *sums))

    def record(self, result):
        """Returns the wanted fields, in their order."""
        return result.given()

    def _found(self, given: Sequence[jax.Array]) -> _Found:
        """Names numbers in the order of `_Found`."""
        numbers = iter(given)
        wanted = (True, True, self.expected, self.mean, self.mean)
        return _Found(*(next(numbers) if w else None for w in wanted))  # pyright: ignore
