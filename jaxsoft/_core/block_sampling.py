"""The one sampling algorithm: a block of classes first, then a class inside it.

Classes come in blocks of about √V. A block is drawn by the Gumbel-max rule over the
logarithms of the blocks' sums, one random number a block; a class inside it by
inversion of its cumulative sum, one random number a row. The bits depend on the key,
the row and the block, and the size of a block on V alone: every tile size,
implementation and sharding draws the same classes, up to ties within rounding.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import noise
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    finite_peak,
    is_zero,
    maximum_or_nan,
)

__all__ = [
    "Drawn",
    "Place",
    "bits",
    "block_size",
    "columns",
    "draw",
    "draw_row",
    "exponentials",
    "invert",
    "invert_once",
    "later",
    "place",
    "scores",
    "sums_before",
]

_LEAST = 128


class Drawn(NamedTuple):
    """The best block so far and the class drawn in it, for each row, [R] each.

    Attributes:
      max: the largest logit met; -inf before the first kept class.
      score: (log of the block's sum, centred on `max` and divided by τ) plus noise.
      class_id: int32; -1 before the first kept class.
      total: Σ exp((u - max) / τ) of all logits u met, at least 1 from the first kept
        class on; None where no log-probability is asked for.
      logit: u of the class, -inf before the first kept one; None likewise.
    """

    max: jax.Array
    score: jax.Array
    class_id: jax.Array
    total: jax.Array | None = None
    logit: jax.Array | None = None

    def without_nan(self) -> "Drawn":
        """Returns the same with class -1 in rows that have met a NaN or +inf."""
        lost = jnp.isnan(self.max) | jnp.isnan(self.score)
        return self._replace(class_id=jnp.where(lost, -1, self.class_id))

    def log_prob(self, tau: float | jax.Array) -> jax.Array:
        """Returns the classes' log-probabilities, never above 0, -inf without a class.

        Args:
          tau: the temperature, a float, [R] or [1].
        """
        assert self.total is not None and self.logit is not None
        c = divide_by_temperature(self.logit, finite_peak(self.max), tau)
        return jnp.where(self.class_id < 0, -jnp.inf, c - jnp.log(self.total))


def block_size(num_classes: int) -> int:
    """Returns the classes of a block: a power of two near √V, at least 128."""
    return max(_LEAST, 2 ** math.ceil(math.log2(max(num_classes, 1)) / 2))


def scores(sums: jax.Array, drawn: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns log-sums of blocks plus their noise; without either where τ is 0.

    Args:
      sums: [R, n] sums of exponentials.
      drawn: [R, n], the noise of `bits`.
      zero: where τ is 0, broadcastable to [R, 1].

    Returns:
      [R, n]; -inf for an empty block.
    """
    alone = jnp.where(sums > 0, 0.0, -jnp.inf).astype(sums.dtype)
    return jnp.where(zero, alone, jnp.log(sums) + drawn)


class Place(NamedTuple):
    """Where in its block's sum each row's class lies, [R] each.

    Measured from the nearer end: beside a class of nearly all the probability, those
    before it keep their share, and those after it too.

    Attributes:
      share: how far from the end, of the whole sum; 0 at τ = 0.
      reverse: whether the end is that of the last class.
    """

    share: jax.Array
    reverse: jax.Array

    @classmethod
    def of(cls, uniform: tuple[jax.Array, jax.Array], zero: jax.Array) -> "Place":
        """Returns that of numbers from `noise`; the first class where τ is 0."""
        share, reverse = uniform
        still = jnp.broadcast_to(zero, (share.shape[0], 1))[:, 0]
        return cls(jnp.where(still, 0, share), reverse & ~still)

    def order(self, weights: jax.Array) -> jax.Array:
        """Returns weights [R, B] from the end that the row starts at."""
        return jnp.where(self.reverse[:, None], weights[:, ::-1], weights)

    def column(self, found: jax.Array, size: int) -> jax.Array:
        """Returns which of B columns was found after `order`, [R]."""
        return jnp.where(self.reverse, size - 1 - found, found)


def place(
    words: jax.Array, zero: jax.Array, dtype: jnp.dtype, attempt: jax.Array | int = 0
) -> Place:
    """Returns where in its block's sum each row's class lies, at some attempt."""
    return Place.of(noise.uniform(words, dtype, attempt), zero)


def bits(
    words: jax.Array,
    blocks: jax.Array | int,
    zero: jax.Array,
    dtype: jnp.dtype,
    attempt: jax.Array | int = 0,
) -> tuple[jax.Array, Place]:
    """Returns all that is random about a draw from blocks of classes.

    One cipher gives both: most of the time to compile a draw is that of its ciphers.

    Args:
      words: [R, 2], see `noise.row_words`.
      blocks: the numbers of n blocks, or how many of the first ones.
      zero: where τ is 0, broadcastable to [R, 1].
      dtype: float32 or float64.
      attempt: how often these rows were drawn from before.

    Returns:
      The blocks' noise, [R, n]; and what `place` returns.
    """
    drawn, uniform, _ = noise.block_gumbel(words, blocks, dtype, attempt)
    return drawn, Place.of(uniform, zero)


def columns(
    number: jax.Array, block: int, classes: int
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns where a block of each row is.

    Args:
      number: [R, 1] int32, of the block.
      block: B, the classes of a block.
      classes: V.

    Returns:
      [R, b] consecutive classes with those of the block among them, of min(B, V); which
      of them are of the block; and what takes them from an array [R, V].
    """
    size = min(block, classes)
    first = number * block
    start = jnp.minimum(first, classes - size)
    ids = start + lax.iota(jnp.int32, size)[None]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,),
        collapsed_slice_dims=(),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )

    def take(array: jax.Array) -> jax.Array:
        return lax.gather(
            array,
            start,
            numbers,
            (1, size),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    return ids, ids >= first, take


def invert(weights: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the class whose part of the cumulative sum contains the target.

    Args:
      weights: [R, B] non-negative.
      target: [R], non-negative.

    Returns:
      [R] int32; where rounding puts the target beyond the sum, the class that makes
      it whole. However sums are rounded, it is one with a weight, if there is one.
    """
    return lax.platform_dependent(
        weights, target, cpu=_invert_all, default=_invert_by_groups
    )


def _invert_all(weights: jax.Array, target: jax.Array) -> jax.Array:
    """Returns `invert` by the sums before all columns, in few programs to compile.

    It is the last column with a weight whose sum before it is not beyond the target.
    """
    columns = weights.shape[1]
    size = math.isqrt(columns - 1) + 1
    # As many groups as each has columns: both sums are of the same places.
    padded = jnp.pad(weights, ((0, 0), (0, size * size - columns)))
    parts = padded.reshape(-1, size, size)
    ahead = sums_before(jnp.sum(parts, axis=2))[:, :, None] + sums_before(parts)
    ahead = ahead.reshape(-1, size * size)[:, :columns]
    is_reached = (weights > 0) & (ahead <= target[:, None])
    # Floats: XLA for CPUs compiles a reduction of integers as several programs.
    number = lax.broadcasted_iota(weights.dtype, weights.shape, 1)
    return jnp.max(jnp.where(is_reached, number, 0), axis=1).astype(jnp.int32)


def _invert_by_groups(weights: jax.Array, target: jax.Array) -> jax.Array:
    """Returns `invert` by a group of columns, then one of its columns."""
    rows, columns = weights.shape
    groups = 2 ** (columns.bit_length() // 2)
    size = -(-columns // groups)
    padded = jnp.pad(weights, ((0, 0), (0, groups * size - columns)))
    parts = padded.reshape(rows, groups, size)
    group, before = invert_once(jnp.sum(parts, axis=2), target)
    is_chosen = lax.broadcasted_iota(jnp.int32, parts.shape, 1) == group[:, None, None]
    chosen = jnp.sum(jnp.where(is_chosen, parts, 0), axis=1)
    inside, _ = invert_once(chosen, target - before)
    return group * size + inside


def sums_before(weights: jax.Array) -> jax.Array:
    """Returns the sum of all weights before each one along the last axis."""
    # The sum of a selection stores what is selected on CPUs, and that of a product
    # becomes a library's call there which crashes with 20,000 rows.
    size = weights.shape[-1]
    is_before = jnp.triu(jnp.ones((size, size), weights.dtype), 1)
    return jnp.matmul(weights, is_before, precision="highest")


def invert_once(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `invert` by comparing all columns, and the sum before what it found.

    Every sum adds up the same columns in the same order, those beyond it as 0: it is no
    smaller than the one before, and not larger where a weight is 0.
    """
    shape = (1, weights.shape[1], weights.shape[1])
    of_sum, added = (lax.broadcasted_iota(jnp.int32, shape, i) for i in (1, 2))
    until = jnp.sum(jnp.where(added <= of_sum, weights[:, None], 0), axis=2)
    passed = (until <= target[:, None]) & (until < until[:, -1:])
    found = jnp.sum(passed, axis=1, dtype=jnp.int32)
    return found, jnp.max(jnp.where(passed, until, 0), axis=1)


def draw(
    logits: jax.Array,
    tau: float | jax.Array,
    words: jax.Array,
    first_block: jax.Array | int,
    block: int,
    where: jax.Array | None = None,
    with_log_prob: bool = False,
) -> Drawn:
    """Draws a class from consecutive blocks.

    Args:
      logits: [R, C] of any floating dtype, -inf at dropped classes; the first one
        begins a block.
      tau: the temperature, a float or [R, 1].
      words: [R, 2], see `noise.row_words`.
      first_block: the number of the first block.
      block: B, the classes of a block.
      where: [R, C] or [1, C] booleans, False drops a class; None keeps all.
      with_log_prob: whether to return what log-probabilities are made of.

    Returns:
      The drawn classes, numbered as `first_block` is.
    """
    dtype = compute_dtype(logits)
    zero = is_zero(tau, dtype)
    blocks = -(-logits.shape[1] // block)
    if not isinstance(first_block, int) or first_block:
        blocks = first_block + lax.iota(jnp.int32, blocks)
    drawn, at = bits(words, blocks, zero, dtype)
    parts = _parts(logits, block, where, dtype)
    best, of_block = _best_block(parts, tau, drawn, zero)
    inside = _inside(logits, where, tau, at, block, best)
    is_none = of_block.score == -jnp.inf
    class_id = jnp.where(is_none, -1, first_block * block + inside)
    if not with_log_prob:
        return of_block._replace(class_id=class_id, total=None)
    *_, take = columns(inside[:, None], 1, logits.shape[1])
    logit = jnp.where(is_none, -jnp.inf, take(logits)[:, 0].astype(dtype))
    return of_block._replace(class_id=class_id, logit=logit)


class _Best(NamedTuple):
    """The drawn block of each row.

    Attributes:
      number: [R, 1] int32, counted from the first block.
      peak: [R, 1] what its exponentials are centred on.
      sum: [R, 1] of them.
    """

    number: jax.Array
    peak: jax.Array
    sum: jax.Array


def _best_block(
    parts: list[jax.Array], tau: float | jax.Array, drawn: jax.Array, zero: jax.Array
) -> tuple[_Best, Drawn]:
    """Draws a block of each row by its noise [R, n]; the block stands for a class."""
    # Each is used more than once: none of it is to be computed again.
    tops, sums = lax.optimization_barrier(_summaries(parts, tau))
    # A block's maximum may have left NaN out; its sum never does.
    tops = jnp.where(jnp.isnan(sums), sums, tops)
    largest = jnp.max(tops, axis=1, keepdims=True)
    perturbed = scores(sums, drawn, zero)
    perturbed += divide_by_temperature(tops, finite_peak(largest), tau)
    best = jnp.argmax(perturbed, axis=1, keepdims=True).astype(jnp.int32)
    *_, take = columns(best, 1, tops.shape[1])
    best_score = maximum_or_nan(perturbed, axis=1)
    total = jnp.sum(sums * exponentials(tops, largest, tau), axis=1)
    of_block = Drawn(largest[:, 0], best_score, best[:, 0], total)
    return _Best(best, take(tops), take(sums)), of_block


def _inside(logits, where, tau, at: Place, block, best: _Best) -> jax.Array:
    """Returns which class of its best block each row draws, [R]."""
    ids, kept, take = columns(best.number, block, logits.shape[1])
    chosen = take(logits).astype(best.sum.dtype)
    if where is not None:
        kept &= take(jnp.broadcast_to(where, logits.shape))
    chosen = jnp.where(kept, chosen, -jnp.inf)
    weights = at.order(exponentials(chosen, best.peak, tau))
    found = invert(weights, at.share * best.sum[:, 0])
    return ids[:, 0] + at.column(found, ids.shape[1])


def draw_row(
    logits: jax.Array,
    where: jax.Array | None,
    tau: float | jax.Array,
    words: jax.Array,
    block: int,
) -> jax.Array:
    """Draws a class of each row from all its blocks.

    As `draw`, but the exponentials of a row are centred on the largest logit of its
    first block, which the compiler need not look for in all of them before: one pass
    less. Where that overflows in some row, or is no number, it is the largest of all.
    Blocks that vanish beside it are further from the best than noise reaches.

    Args:
      logits: [R, V] of any floating dtype: what is computed from them is wider, and
        never stored.
      where: [R, V] or [1, V] booleans, False drops a class; None keeps all.
      tau: the temperature, a float, [R, 1] or [1, 1].
      words: [R, 2], see `noise.row_words`.
      block: B, the classes of a block.

    Returns:
      [R] int32; -1 for a row without any kept class, or with a NaN or +inf.
    """
    dtype = compute_dtype(logits)
    zero = is_zero(tau, dtype)
    parts = _parts(logits, block, where, dtype)

    def about(peak: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = _sums(parts, [peak[:, :, None]] * len(parts), tau)
        return peak, lax.optimization_barrier(sums)

    def about_largest() -> tuple[jax.Array, jax.Array]:
        tops = [jnp.max(part, axis=(1, 2)) for part in parts]
        return about(functools.reduce(jnp.maximum, tops)[:, None])

    quick = about(jnp.max(parts[0][:, 0], axis=1, keepdims=True))
    # The first block of a row may have no kept class.
    is_unfit = zero | ~jnp.isfinite(quick[0])
    total = jnp.sum(quick[1], axis=1, keepdims=True)
    is_usable = jnp.isfinite(jnp.sum(jnp.where(is_unfit, jnp.nan, total)))
    peak, sums = lax.cond(is_usable, lambda: quick, about_largest)
    total = jnp.sum(sums, axis=1)
    lost = ~jnp.isfinite(total) | ~jnp.isfinite(peak[:, 0])
    drawn, at = bits(words, sums.shape[1], zero, dtype)
    number = jnp.argmax(scores(sums, drawn, zero), axis=1, keepdims=True)
    number = number.astype(jnp.int32)
    *_, take = columns(number, 1, sums.shape[1])
    best = _Best(number, peak, take(sums))
    class_id = _inside(logits, where, tau, at, block, best)
    return jnp.where(lost, -1, class_id)


def exponentials(u: jax.Array, top: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns exp((u - top) / τ) of logits up to `top`; 0 where all are -inf."""
    # The lowest finite number, without a select, serves where all are -inf.
    peak = jnp.maximum(top, jnp.finfo(top.dtype).min)
    return jnp.exp(divide_by_temperature(u, peak, tau))


def _parts(
    logits: jax.Array, block: int, where: jax.Array | None, dtype: jnp.dtype
) -> list[jax.Array]:
    """Returns the whole blocks [R, n, B] and, if there is one, the rest [R, 1, b]."""
    columns = logits.shape[1]
    full = columns // block

    def cut(array: jax.Array) -> list[jax.Array]:
        rows = array.shape[0]
        parts = [array[:, : full * block].reshape(rows, full, block)] if full else []
        return parts + [array[:, None, full * block :]] * (full * block < columns)

    parts = [part.astype(dtype) for part in cut(logits)]
    if where is None:
        return parts
    kept = zip(cut(where), parts, strict=True)
    return [jnp.where(keep, part, -jnp.inf) for keep, part in kept]


def _sums(
    parts: list[jax.Array], peaks: list[jax.Array], tau: float | jax.Array
) -> jax.Array:
    """Returns each block's sum of exponentials, [R, n]."""
    tau = tau[:, :, None] if isinstance(tau, jax.Array) else tau
    pairs = zip(parts, peaks, strict=True)
    return jnp.concatenate(
        [jnp.sum(exponentials(u, m, tau), axis=2) for u, m in pairs], 1
    )


def _summaries(
    parts: list[jax.Array], tau: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each block's largest logit and its sum of exponentials, [R, n] each."""
    tops = [jnp.max(part, axis=2, keepdims=True) for part in parts]
    sums = _sums(parts, tops, tau)
    return jnp.concatenate([top[:, :, 0] for top in tops], 1), sums


def later(old: Drawn, new: Drawn, tau: float | jax.Array) -> Drawn:
    """Returns the better of two draws; the old one where they are equal.

    Args:
      old: draws from lower classes.
      new: draws from higher classes.
      tau: the temperature, a float or [R].

    Returns:
      The better draw of each row.
    """
    largest = jnp.maximum(old.max, new.max)
    peak = finite_peak(largest)
    before = old.score + divide_by_temperature(old.max, peak, tau)
    after = new.score + divide_by_temperature(new.max, peak, tau)
    better = (after > before) | jnp.isnan(after)
    both = Drawn(
        largest,
        jnp.where(better, after, before),
        jnp.where(better, new.class_id, old.class_id),
    )
    if old.total is None or old.logit is None:
        return both
    assert new.total is not None and new.logit is not None
    total = old.total * exponentials(old.max, largest, tau)
    total += new.total * exponentials(new.max, largest, tau)
    logit = jnp.where(better, new.logit, old.logit)
    return both._replace(total=total, logit=logit)
