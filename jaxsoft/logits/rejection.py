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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import block_sampling, mesh_axes
from jaxsoft._core.numerics import divide_by_temperature, finite_peak, is_zero
from jaxsoft.logits.filters import Filters, amount, bound, is_heavy, out_of_range

__all__ = ["draw", "heavy_weights", "judge", "prepare", "start_bracket"]

# How often a lower bound of the k-th class is improved: to some three digits.
_HALVINGS = 20
# The groups of classes whose maxima give that bound: so many, or where top_k is known
# so many times as many as it keeps, of no fewer classes.
_GROUPS = 512
_GROUPS_EACH = 4
_LEAST_GROUP = 8


class Prepared(NamedTuple):
    """Rows of logits and of their weights.

    Attributes:
      logits: [R, V].
      least: [R, 1] or [1, 1], what no class that top_k keeps is smaller than.
      weights: [R, V] exp((logit - largest) / τ), 0 where the logit is smaller.
      top: [R, 1] the largest logits.
      total: [R, 1] the sum of the weights.
    """

    logits: jax.Array
    least: jax.Array
    weights: jax.Array
    top: jax.Array
    total: jax.Array


class Bracket(NamedTuple):
    """Two numbers between which the k-th logit lies, [R, 1] each.

    Attributes:
      low: the `_ordered` integer of one with at least k classes from it on, if a row
        has as many.
      high: that of one with at most k.
      number_low: how many classes there are from the low one on.
      number_high: and from the high one on.
      mass_low: the sum of their weights from the low one on.
      mass_high: and from the high one on.
    """

    low: jax.Array
    high: jax.Array
    number_low: jax.Array
    number_high: jax.Array
    mass_low: jax.Array
    mass_high: jax.Array


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


def prepare(
    x: jax.Array, tau: float | jax.Array, filters: Filters, most: int | None = None
) -> Prepared:
    """Returns what draws are made of.

    Args:
      x: [R, V] logits, -inf at classes that are dropped already.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep.
      most: what no row's top_k is larger than, if that is known.
    """
    top = jnp.max(x, axis=1, keepdims=True)
    weights = jnp.exp(divide_by_temperature(x, finite_peak(top), tau))
    least = jnp.full((1, 1), -jnp.inf, x.dtype)
    if filters.top_k is not None:
        least = _least_of_first(x, filters.top_k, most)
        # What is no number stays, and tells that its row has no sample.
        weights = jnp.where(x < least, 0, weights)
    weights = lax.optimization_barrier(weights)
    total = jnp.sum(_block_sums(weights), axis=1, keepdims=True)
    return Prepared(x, least, weights, top, total)


def _least_of_first(x: jax.Array, top_k: jax.Array, most: int | None) -> jax.Array:
    """Returns a number that no class which top_k keeps is smaller than, [R, 1]."""
    rows, classes = x.shape
    number = min(max(classes // 4, 1), _GROUPS)
    if most is not None and most * _GROUPS_EACH * _LEAST_GROUP <= classes:
        number = max(number, most * _GROUPS_EACH)
    size = classes // number
    # A bound for some of the classes is one for all of them.
    groups = x[:, : size * number].reshape(rows, size, number)
    keys = _ordered(jnp.max(groups, axis=1))
    low, high = (f(keys, axis=1, keepdims=True) for f in (jnp.min, jnp.max))

    def halve(_, bounds):
        low, high = bounds
        middle = _middle(low, high)
        number_reached = jnp.sum(keys >= middle, axis=1, keepdims=True, dtype=jnp.int32)
        reached = number_reached >= top_k
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    start = mesh_axes.like((low, high + 1), (keys, top_k))
    low, _ = lax.fori_loop(0, _HALVINGS, halve, start)
    known = (top_k > 0) & (top_k <= number)
    return jnp.where(known, _number(low, x.dtype), -jnp.inf)


def draw(
    words: jax.Array,
    x: jax.Array,
    tau: float | jax.Array,
    filters: Filters,
    most: int | None = None,
) -> jax.Array:
    """Draws a class of each row.

    Args:
      words: [R, 2], see `noise.row_words`.
      x: [R, V] logits, -inf at classes that are dropped already.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep; the first class of the order always is.
      most: what no row's top_k is larger than, if that is known.

    Returns:
      [R] int32; -1 where there is no class, a NaN or +inf, or a filter out of range.
    """
    rows = prepare(x, tau, filters, most)
    lost = ~(jnp.abs(rows.top) < jnp.inf) | jnp.isnan(rows.total)
    lost |= out_of_range(filters)
    start = _Attempt(
        jnp.zeros((), jnp.int32),
        _block_sums(heavy_weights(rows, tau, filters)),
        jnp.full_like(rows.top, -jnp.inf),
        jnp.full_like(lost, 0, jnp.int32),
        lost,
        start_bracket(rows, filters),
    )
    step = functools.partial(_attempt, words, rows, tau, filters)
    if filters.top_k is None and filters.top_p is None:
        drawn = step(start)
    else:
        start = mesh_axes.like(start, (rows, start, filters, tau))
        drawn = lax.while_loop(lambda state: ~jnp.all(state.done), step, start)
    return jnp.where(lost, -1, drawn.class_id)[:, 0]


def heavy_weights(
    rows: Prepared, tau: float | jax.Array, filters: Filters
) -> jax.Array:
    """Returns the weights, [R, V], 0 where min_p drops a class."""
    if filters.min_p is None:
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
    logit = jnp.take_along_axis(rows.logits, class_id, axis=1)
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
    block = block_sampling.block_size(rows.logits.shape[1])
    zero = is_zero(tau, rows.logits.dtype)
    drawn, at = block_sampling.bits(
        words, state.sums.shape[1], zero, state.sums.dtype, state.number
    )
    scores = block_sampling.scores(state.sums, drawn, zero)
    best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)
    columns = best * block + lax.iota(jnp.int32, block)[None]

    def take(array: jax.Array, fill: float) -> jax.Array:
        return jnp.take_along_axis(array, columns, axis=1, mode="fill", fill_value=fill)

    x, weights = take(rows.logits, -jnp.inf), take(rows.weights, 0)
    kept = _before(x, columns, state.logit, state.class_id)
    if filters.min_p is not None:
        c = divide_by_temperature(x, finite_peak(rows.top), tau)
        kept &= is_heavy(x, c, rows.top, filters.min_p)
    weights = at.order(jnp.where(kept, weights, 0))
    found = block_sampling.invert(weights, at.share * jnp.sum(weights, axis=1))
    return best * block + at.column(found, block)[:, None]


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
    before = _before(rows.logits, ids, logit, class_id)
    sums = _block_sums(jnp.where(before, rows.weights, 0))
    kept = jnp.ones_like(done)
    if filters.top_k is not None:
        number = jnp.sum(before, axis=1, keepdims=True, dtype=jnp.int32)
        kept &= number < bound(filters.top_k)
    if filters.top_p is None:
        return kept, sums, bracket
    mass = jnp.sum(sums, axis=1, keepdims=True)
    if bracket is None or filters.top_k is None:
        return kept & (mass < amount(filters.top_p, rows.total)), sums, None
    share, top_k = filters.top_p, bound(filters.top_k)
    limits = functools.partial(_limits, rows, tau, top_k)

    def unclear(bracket: Bracket) -> jax.Array:
        least, most = (amount(share, limit) for limit in limits(bracket))
        return ~done & kept & (mass >= least) & (mass < most)

    def narrow(bracket: Bracket) -> Bracket:
        return _narrower(rows, top_k, unclear(bracket), bracket)

    bracket = lax.while_loop(lambda b: jnp.any(unclear(b)), narrow, bracket)
    return kept & (mass < amount(share, limits(bracket)[0])), sums, bracket


def start_bracket(rows: Prepared, filters: Filters) -> Bracket | None:
    """Returns the bracket of all classes that may be kept, where one is needed."""
    if filters.top_k is None or filters.top_p is None:
        return None
    x = rows.logits
    kept = (x >= rows.least) & (x > -jnp.inf)
    lowest = jnp.min(jnp.where(kept, x, jnp.inf), axis=1, keepdims=True)
    number = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
    return Bracket(
        _ordered(lowest),
        _ordered(rows.top) + 1,
        number,
        jnp.zeros_like(number),
        rows.total,
        jnp.zeros_like(rows.total),
    )


def _narrower(
    rows: Prepared, top_k: jax.Array, wanted: jax.Array, old: Bracket
) -> Bracket:
    """Halves the bracket of some rows."""
    middle = _near_kth(top_k, old)
    above = rows.logits >= _number(middle, rows.logits.dtype)
    number = jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    sums = _block_sums(jnp.where(above, rows.weights, 0))
    mass = jnp.sum(sums, axis=1, keepdims=True)
    up, down = wanted & (number >= top_k), wanted & (number <= top_k)
    return Bracket(
        jnp.where(up, middle, old.low),
        jnp.where(down, middle, old.high),
        jnp.where(up, number, old.number_low),
        jnp.where(down, number, old.number_high),
        jnp.where(up, mass, old.mass_low),
        jnp.where(down, mass, old.mass_high),
    )


def _near_kth(top_k: jax.Array, bracket: Bracket) -> jax.Array:
    """Returns an integer between the ends, near the low one if the k-th class seems so.

    Most classes of a bracket lie near its low end.
    """
    surplus = bracket.number_low - top_k
    between = bracket.number_low - bracket.number_high
    shift = jnp.where(
        surplus < between // 16, 4, jnp.where(surplus < between // 4, 2, 1)
    )
    shift = shift.astype(bracket.low.dtype)
    step = (bracket.high >> shift) - (bracket.low >> shift)
    return bracket.low + jnp.maximum(step, 1)


def _limits(
    rows: Prepared, tau: float | jax.Array, top_k: jax.Array, bracket: Bracket
) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the most that the k first classes weigh, [R, 1] each.

    They are equal where only equal classes are left between the ends of the bracket.
    """
    lowest = _number(bracket.low, rows.logits.dtype)
    weight = jnp.exp(divide_by_temperature(lowest, finite_peak(rows.top), tau))
    few = bracket.number_low <= top_k
    # Of the classes between the ends the first weigh no less than their part of them,
    # and each of the last no less than the lowest.
    between = jnp.maximum(bracket.number_low - bracket.number_high, 1)
    missing, between, surplus = (
        number.astype(weight.dtype)
        for number in (
            top_k - bracket.number_high,
            between,
            bracket.number_low - top_k,
        )
    )
    part = (bracket.mass_low - bracket.mass_high) * missing / between
    least = jnp.where(few, bracket.mass_low, bracket.mass_high + part)
    most = bracket.mass_low - surplus * weight
    closed = few | (bracket.high <= bracket.low + 1)
    return least, jnp.where(closed, least, most)


def _before(
    x: jax.Array, ids: jax.Array, logit: jax.Array, class_id: jax.Array
) -> jax.Array:
    """Tells which classes come before one of each row, [R, 1]."""
    return (x > logit) | ((x == logit) & (ids < class_id))


def _block_sums(weights: jax.Array) -> jax.Array:
    """Returns the sums of the weights of the blocks, [R, n]."""
    rows, classes = weights.shape
    block = block_sampling.block_size(classes)
    whole = classes // block * block
    parts = []
    if whole:
        parts.append(weights[:, :whole].reshape(rows, whole // block, block).sum(2))
    if whole < classes:
        parts.append(jnp.sum(weights[:, whole:], axis=1, keepdims=True))
    return jnp.concatenate(parts, axis=1)


def _ordered(x: jax.Array) -> jax.Array:
    """Returns integers in the order of floating-point numbers, without NaN."""
    kind = jnp.dtype(jnp.int64 if x.dtype == jnp.float64 else jnp.int32)
    bits = lax.bitcast_convert_type(x, kind)
    # -0.0, the least integer, is equal to 0.0. XLA leaves a sum x + 0.0 out.
    bits = jnp.where(bits == kind.type(jnp.iinfo(kind).min), 0, bits)
    return jnp.where(bits < 0, bits ^ kind.type(jnp.iinfo(kind).max), bits)


def _number(key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the floating-point numbers of such integers."""
    largest = key.dtype.type(jnp.iinfo(key.dtype).max)
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ largest, key), dtype)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the mean of integers, rounded down, without an overflow."""
    return (low & high) + ((low ^ high) >> 1)
