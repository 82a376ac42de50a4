"""Draws from what filters leave of many classes, by drawing until one is kept.

A class is drawn without the filters, and one pass over its row counts the classes that
come before it, and their probability: this tells whether the filters keep it. Where
they do not, they keep none after it either, and the next is drawn from those before
it. So each class that the filters keep comes at its rate, nothing is sorted, and few
rows are ever drawn from more than twice.

Two numbers that depend on the k-th class are never looked for, but bounded. Of groups
of classes, k have a class at least as large as the k-th largest of their maxima: no
smaller one can be kept. And the probability of the k first classes, of which top-p
keeps a share, is bisected as far as a drawn class needs it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import block_sampling, mesh_axes
from jaxsoft._core.numerics import divide_by_temperature, finite_peak, is_zero, round_up
from jaxsoft.logits.class_shards import WHOLE, ClassShard
from jaxsoft.logits.filters import (
    Filters,
    amount,
    bound,
    is_heavy,
    out_of_range,
    reach,
    within,
)

__all__ = [
    "Prepared",
    "block_sums",
    "count",
    "draw",
    "from_ordered",
    "heavy_weights",
    "judge",
    "mass",
    "ordered",
    "prepare",
    "start_bracket",
    "whole_blocks",
]

# So many bits of a lower bound of the k-th class are found: some three digits.
_BITS = 20
# The groups of classes whose maxima give that bound: so many, or where top_k is known
# so many times as many as it keeps, of no fewer classes.
_GROUPS = 512
_GROUPS_EACH = 4
_LEAST_GROUP = 8
# A row has so many times the classes that it may be filled up with.
_LEAST_SHARE = 8


class Prepared(NamedTuple):
    """Rows of logits and of their weights.

    Attributes:
      logits: [R, V], -inf where top_n_sigma drops a class, too.
      least: [R, 1] or [1, 1], what no class that top_k keeps is smaller than.
      weights: [R, V] exp((logit - largest) / τ), 0 where the logit is smaller than
        `least`, or where min_p drops it and there is no top_p, a share of all.
      top: [R, 1] the largest logits.
      total: [R, 1] the sum of the weights.
      shard: which classes these are; `top` and `total` are those of all.
    """

    logits: jax.Array
    least: jax.Array
    weights: jax.Array
    top: jax.Array
    total: jax.Array
    shard: ClassShard = WHOLE


class Bracket(NamedTuple):
    """Two numbers between which the k-th logit lies, in the two columns of [R, 2].

    Attributes:
      ends: the `ordered` integers of one with at least k classes from it on, if a row
        has as many, and of one with at most k.
      numbers: how many classes there are from each on.
      masses: the sums of their weights.
    """

    ends: jax.Array
    numbers: jax.Array
    masses: jax.Array


class _Attempt(NamedTuple):
    """The state of rows that are drawn from again and again.

    Attributes:
      number: how many attempts there were before.
      sums: [R, n] of the weights of the blocks, of the classes before `class_id`.
      logit: [R, 1] of the class drawn last.
      class_id: [R, 1] int32, the class drawn last.
      done: [R, 1] whether it is kept, or whether the row has none.
      bracket: of the k-th class, where it is needed.
    """

    number: jax.Array
    sums: jax.Array
    logit: jax.Array
    class_id: jax.Array
    done: jax.Array
    bracket: Bracket | None


def whole_blocks(x: jax.Array) -> jax.Array:
    """Returns logits [R, V] with as many more classes, -inf, as fill the last block.

    Sums of blocks are one reduction then. Not where it were much more to compute.
    """
    rows, classes = x.shape
    rest = -classes % block_sampling.block_size(classes)
    if rest * _LEAST_SHARE > classes:
        return x
    return jnp.concatenate([x, jnp.full((rows, rest), -jnp.inf, x.dtype)], axis=1)


def prepare(
    x: jax.Array,
    tau: float | jax.Array,
    filters: Filters,
    most: int | None = None,
    shard: ClassShard = WHOLE,
) -> Prepared:
    """Returns what draws are made of.

    Args:
      x: [R, V] logits, -inf at classes that are dropped already.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep.
      most: what no row's top_k is larger than, if that is known.
      shard: which classes these are, whole blocks where there are others.
    """
    top = shard.largest(jnp.max(x, axis=1, keepdims=True))
    if filters.top_n_sigma is not None:
        x = within(x, top, reach(x, top, filters.top_n_sigma, shard))
    c = divide_by_temperature(x, finite_peak(top), tau)
    weights = jnp.exp(c)
    least = jnp.full((1, 1), -jnp.inf, x.dtype)
    if filters.top_k is not None:
        least = _least_of_first(x, filters.top_k, most, shard)
        # What is no number stays, and tells that its row has no sample.
        weights = jnp.where(x < least, 0, weights)
    if filters.min_p is not None and filters.top_p is None:
        light = ~is_heavy(x, c, top, filters.min_p) & (x < top)
        weights = jnp.where(light, 0, weights)
    weights = lax.optimization_barrier(weights)
    return Prepared(x, least, weights, top, mass(weights, shard), shard)


def _least_of_first(
    x: jax.Array, top_k: jax.Array, most: int | None, shard: ClassShard
) -> jax.Array:
    """Returns a number that no class which top_k keeps is smaller than, [R, 1]."""
    classes = shard.classes(x)
    # The groups, and so the classes drawn, are the same with the last block filled up.
    filled = round_up(classes, block_sampling.block_size(classes))
    number = min(filled // 4, _GROUPS, classes)
    if most is not None and most * _GROUPS_EACH * _LEAST_GROUP <= filled:
        number = max(number, most * _GROUPS_EACH)
    keys = ordered(_largest_of_groups(x, number, shard))
    dtype, bits = keys.dtype, jnp.iinfo(keys.dtype).bits

    # The first bits of the bound are set, one by one, where k groups still reach it.
    def set_bit(place, low):
        bit = lax.shift_left(dtype.type(1), (bits - 1 - place).astype(dtype))
        reached = jnp.sum((keys >= low + bit).astype(x.dtype), axis=1, keepdims=True)
        return jnp.where(reached.astype(jnp.int32) >= top_k, low + bit, low)

    low = jnp.full((x.shape[0], 1), jnp.iinfo(dtype).min, dtype)
    low = lax.fori_loop(0, _BITS, set_bit, mesh_axes.like(low, (keys, top_k)))
    # Below -inf are no numbers.
    low = jnp.maximum(low, ordered(jnp.full((), -jnp.inf, x.dtype)))
    known = (top_k > 0) & (top_k <= number)
    return jnp.where(known, from_ordered(low, x.dtype), -jnp.inf)


def _largest_of_groups(x: jax.Array, number: int, shard: ClassShard) -> jax.Array:
    """Returns the largest logits of n groups, each of every n-th class, [R, n]."""
    rows, classes = x.shape
    whole = classes // number * number
    if not whole:
        missing = ((0, 0), (0, number - classes))
        largest = jnp.pad(x, missing, constant_values=-jnp.inf)
    else:
        largest = jnp.max(x[:, :whole].reshape(rows, -1, number), axis=1)
        if whole < classes:
            missing = ((0, 0), (0, whole + number - classes))
            rest = jnp.pad(x[:, whole:], missing, constant_values=-jnp.inf)
            largest = jnp.maximum(largest, rest)
    if not shard.axes:
        return largest
    return shard.largest(jnp.roll(largest, shard.first % number, axis=1))


def draw(
    words: jax.Array, rows: Prepared, tau: float | jax.Array, filters: Filters
) -> jax.Array:
    """Draws a class of each row.

    Args:
      words: [R, 2], see `noise.row_words`.
      rows: what `prepare` returned.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep; the first class of the order always is.

    Returns:
      [R] int32; -1 where there is no class, a NaN or +inf, or a filter out of range.
    """
    lost = ~(jnp.abs(rows.top) < jnp.inf) | jnp.isnan(rows.total)
    lost |= out_of_range(filters)
    start = _Attempt(
        jnp.zeros((), jnp.int32),
        block_sums(heavy_weights(rows, tau, filters), rows.shard),
        jnp.full_like(rows.top, -jnp.inf),
        jnp.full_like(lost, 0, jnp.int32),
        lost,
        start_bracket(rows, filters),
    )
    step = functools.partial(_attempt, words, rows, tau, filters)
    if filters.top_k is None and filters.top_p is None:
        drawn = step(start)
    else:
        start = mesh_axes.like(start, (words, rows.total, start, filters, tau))
        drawn = lax.while_loop(lambda state: ~jnp.all(state.done), step, start)
    return jnp.where(lost, -1, drawn.class_id)[:, 0]


def heavy_weights(
    rows: Prepared, tau: float | jax.Array, filters: Filters
) -> jax.Array:
    """Returns the weights, [R, V], 0 where min_p drops a class."""
    if filters.min_p is None or filters.top_p is None:
        return rows.weights
    c = divide_by_temperature(rows.logits, finite_peak(rows.top), tau)
    heavy = is_heavy(rows.logits, c, rows.top, filters.min_p)
    return jnp.where(heavy, rows.weights, 0)


def _attempt(
    words: jax.Array,
    rows: Prepared,
    tau: float | jax.Array,
    filters: Filters,
    state: _Attempt,
) -> _Attempt:
    """Draws from rows that are not done, and judges what it draws."""
    class_id = _draw_before(words, rows, tau, filters, state)
    if rows.shard.axes:
        logit = rows.shard.take(rows.logits, class_id)
    else:
        *_, take = block_sampling.columns(class_id, 1, rows.logits.shape[1])
        logit = take(rows.logits)
    kept, sums, bracket = judge(
        rows, tau, filters, logit, class_id, state.bracket, state.done
    )

    def update(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(state.done, old, new)

    return _Attempt(
        state.number + 1,
        sums,
        update(logit, state.logit),
        update(class_id, state.class_id),
        state.done | kept,
        bracket,
    )


def _draw_before(
    words: jax.Array,
    rows: Prepared,
    tau: float | jax.Array,
    filters: Filters,
    state: _Attempt,
) -> jax.Array:
    """Draws from the classes before those drawn last, [R, 1]."""
    shard, block = rows.shard, rows.shard.block(rows.logits)
    zero = is_zero(tau, rows.logits.dtype)
    drawn, at = block_sampling.bits(
        words, state.sums.shape[1], zero, state.sums.dtype, state.number
    )
    scores = block_sampling.scores(state.sums, drawn, zero)
    best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)
    ids, kept, take = _columns_of(best, block, rows)
    x, weights = take(rows.logits), take(rows.weights)
    kept &= _before(x, ids, state.logit, state.class_id)
    if filters.min_p is not None and filters.top_p is not None:
        c = divide_by_temperature(x, finite_peak(rows.top), tau)
        kept &= is_heavy(x, c, rows.top, filters.min_p)
    weights = at.order(shard.add(jnp.where(kept, weights, 0)))
    found = block_sampling.invert(weights, at.share * jnp.sum(weights, axis=1))
    first = best * block if shard.axes else ids[:, :1]
    return first + at.column(found, ids.shape[1])[:, None]


def _columns_of(
    number: jax.Array, block: int, rows: Prepared
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns where a block of each row is, as `block_sampling.columns`.

    Of a block that is on other shards no class is told to be of it.
    """
    width = rows.logits.shape[1]
    if not rows.shard.axes:
        return block_sampling.columns(number, block, width)
    local = number - rows.shard.first // block
    is_here = (local >= 0) & (local < width // block)
    local = jnp.where(is_here, local, 0)
    ids, _, take = block_sampling.columns(local, block, width)
    return ids + rows.shard.first, jnp.broadcast_to(is_here, ids.shape), take


def judge(
    rows: Prepared,
    tau: float | jax.Array,
    filters: Filters,
    logit: jax.Array,
    class_id: jax.Array,
    bracket: Bracket | None,
    done: jax.Array,
) -> tuple[jax.Array, jax.Array, Bracket | None]:
    """Tells whether top_k and top_p keep a class of each row.

    Args:
      rows: what `prepare` returned.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep.
      logit: [R, 1] of the class.
      class_id: [R, 1] int32, the class.
      bracket: of the k-th class, if there are both top_k and top_p.
      done: [R, 1] rows whose class need not be judged.

    Returns:
      [R, 1] whether it is kept; [R, n] the sums of the weights of the blocks before
      it; and a narrower bracket.
    """
    ids = lax.broadcasted_iota(jnp.int32, rows.logits.shape, 1)
    ids = ids + rows.shard.first if rows.shard.axes else ids
    before = _before(rows.logits, ids, logit, class_id)
    sums = block_sums(jnp.where(before, rows.weights, 0), rows.shard)
    kept = jnp.ones_like(done)
    if filters.top_k is not None:
        number = count(before, rows)
        kept &= number < bound(filters.top_k)
    if filters.top_p is None:
        return kept, sums, bracket
    weight = jnp.sum(sums, axis=1, keepdims=True)
    if bracket is None or filters.top_k is None:
        return kept & (weight < amount(filters.top_p, rows.total)), sums, None
    share, top_k = filters.top_p, bound(filters.top_k)
    limits = functools.partial(_limits, rows, tau, top_k)

    def unclear(bracket: Bracket) -> jax.Array:
        least, most = (amount(share, limit) for limit in limits(bracket))
        return ~done & kept & (weight >= least) & (weight < most)

    def narrow(state: tuple[jax.Array, Bracket]) -> tuple[jax.Array, Bracket]:
        bracket = _narrower(rows, top_k, *state)
        return unclear(bracket), bracket

    start = (unclear(bracket), bracket)
    _, bracket = lax.while_loop(lambda state: jnp.any(state[0]), narrow, start)
    return kept & (weight < amount(share, limits(bracket)[0])), sums, bracket


def start_bracket(rows: Prepared, filters: Filters) -> Bracket | None:
    """Returns the bracket of all classes that may be kept, where one is needed."""
    if filters.top_k is None or filters.top_p is None:
        return None
    x = rows.logits
    kept = (x >= rows.least) & (x > -jnp.inf)
    lowest = jnp.min(jnp.where(kept, x, jnp.inf), axis=1, keepdims=True)
    lowest = rows.shard.smallest(lowest)
    number = count(kept, rows)
    return Bracket(
        _pair(ordered(lowest), ordered(rows.top) + 1),
        _pair(number, 0),
        _pair(rows.total, 0),
    )


def _narrower(
    rows: Prepared, top_k: jax.Array, wanted: jax.Array, old: Bracket
) -> Bracket:
    """Halves the bracket of some rows."""
    middle = _near_kth(top_k, old)
    above = rows.logits >= from_ordered(middle, rows.logits.dtype)
    number = count(above, rows)
    weight = mass(jnp.where(above, rows.weights, 0), rows.shard)
    is_new = wanted & _pair(number >= top_k, number <= top_k)
    new = Bracket(middle, number, weight)
    return Bracket(*(jnp.where(is_new, *pair) for pair in zip(new, old, strict=True)))


def _near_kth(top_k: jax.Array, bracket: Bracket) -> jax.Array:
    """Returns an integer between the ends, near the low one if the k-th class seems so.

    Most classes of a bracket lie near its low end.
    """
    low, high = _columns(bracket.ends)
    number_low, number_high = _columns(bracket.numbers)
    surplus, between = number_low - top_k, number_low - number_high
    shift = jnp.where(
        surplus < between // 16, 4, jnp.where(surplus < between // 4, 2, 1)
    )
    shift = shift.astype(low.dtype)
    return low + jnp.maximum((high >> shift) - (low >> shift), 1)


def _limits(
    rows: Prepared, tau: float | jax.Array, top_k: jax.Array, bracket: Bracket
) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the most that the k first classes weigh, [R, 1] each.

    They are equal where only equal classes are left between the ends of the bracket.
    """
    (low, high), (number_low, number_high), (mass_low, mass_high) = map(
        _columns, bracket
    )
    lowest = from_ordered(low, rows.logits.dtype)
    weight = jnp.exp(divide_by_temperature(lowest, finite_peak(rows.top), tau))
    few = number_low <= top_k
    # Of the classes between the ends the first weigh no less than their part of them,
    # and each of the last no less than the lowest.
    missing, between, surplus = (
        number.astype(weight.dtype)
        for number in (
            top_k - number_high,
            jnp.maximum(number_low - number_high, 1),
            number_low - top_k,
        )
    )
    part = (mass_low - mass_high) * missing / between
    least = jnp.where(few, mass_low, mass_high + part)
    closed = few | (high <= low + 1)
    return least, jnp.where(closed, least, mass_low - surplus * weight)


def _pair(low: jax.Array, high: ArrayLike) -> jax.Array:
    """Returns two columns [R, 1] beside each other, [R, 2]."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, (1, 2), 1) == 0, low, high)


def _columns(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the two columns of an array [R, 2], [R, 1] each."""
    return pair[:, :1], pair[:, 1:]


def _before(
    x: jax.Array, ids: jax.Array, logit: jax.Array, class_id: jax.Array
) -> jax.Array:
    """Tells which classes come before one of each row, [R, 1]."""
    return (x > logit) | ((x == logit) & (ids < class_id))


def block_sums(weights: jax.Array, shard: ClassShard) -> jax.Array:
    """Returns the sums of the weights of the blocks, [R, n]."""
    block = shard.block(weights)
    return shard.add(shard.spread(_own_sums(weights, block), block, 0))


def mass(weights: jax.Array, shard: ClassShard) -> jax.Array:
    """Returns the sum of the weights, [R, 1]."""
    sums = _own_sums(weights, shard.block(weights))
    return shard.add(jnp.sum(sums, axis=1, keepdims=True))


def count(kept: jax.Array, rows: Prepared) -> jax.Array:
    """Returns how many classes there are, [R, 1] int32.

    Blocks are counted in the dtype of their sums, as a CPU reduces both without a
    program of its own; integers, which it adds in two, are exact for all of them.
    """
    block = rows.shard.block(kept)
    number = _own_sums(kept.astype(rows.total.dtype), block).astype(jnp.int32)
    return rows.shard.add(jnp.sum(number, axis=1, keepdims=True, dtype=jnp.int32))


def _own_sums(weights: jax.Array, block: int) -> jax.Array:
    """Returns the sums of the blocks that are here, [R, m]."""
    rows, classes = weights.shape
    whole = classes // block * block
    parts = []
    if whole:
        parts.append(weights[:, :whole].reshape(rows, whole // block, block).sum(2))
    if whole < classes:
        parts.append(jnp.sum(weights[:, whole:], axis=1, keepdims=True))
    return jnp.concatenate(parts, axis=1)


def ordered(x: jax.Array) -> jax.Array:
    """Returns integers in the order of floating-point numbers, without NaN."""
    kind = jnp.dtype(jnp.int64 if x.dtype == jnp.float64 else jnp.int32)
    bits = lax.bitcast_convert_type(x, kind)
    # -0.0, the least integer, is equal to 0.0. XLA leaves a sum x + 0.0 out.
    bits = jnp.where(bits == kind.type(jnp.iinfo(kind).min), 0, bits)
    return jnp.where(bits < 0, bits ^ kind.type(jnp.iinfo(kind).max), bits)


def from_ordered(key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the floating-point numbers of such integers."""
    largest = key.dtype.type(jnp.iinfo(key.dtype).max)
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ largest, key), dtype)
