"""The sum of the weights of the classes that filters keep, of many classes.

A draw never needs it, but the probability of its class among them does. The kept
classes are the first of the order by descending logit: a bisection of the numbers that
logits can be finds where they end. Equal ones weigh the same, so that it is enough to
know how many of them are kept. Nothing is sorted, and nothing stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import divide_by_temperature, finite_peak
from jaxsoft.logits.filters import Filters, amount, bound
from jaxsoft.logits.rejection import (
    Prepared,
    count,
    from_ordered,
    heavy_weights,
    mass,
    ordered,
)

__all__ = ["kept_sum"]

# Of two classes in a bracket, each weighs as much as its low end at least.
_ONE_CLASS = 1.5


class _Bracket(NamedTuple):
    """Two logits between which the kept classes end, [R, 1] each.

    Attributes:
      low: its `ordered` integer. From it on there is enough, if the row has it.
      high: that from which on there is not enough.
      from_low: how many classes there are from the low one on, or what they weigh.
      from_high: the same of the high one.
    """

    low: jax.Array
    high: jax.Array
    from_low: jax.Array
    from_high: jax.Array


def kept_sum(rows: Prepared, tau: float | jax.Array, filters: Filters) -> jax.Array:
    """Returns the sum of the weights of the classes that filters keep, [R, 1].

    Args:
      rows: what `rejection.prepare` returned.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep.
    """
    total = rows.total
    if filters.top_k is not None:
        total = _sum_of_first(rows, bound(filters.top_k))
    if filters.top_p is not None:
        share = amount(filters.top_p, total)
        total = jnp.minimum(_sum_of_share(rows, tau, share), total)
        if filters.min_p is not None:
            # Either filter keeps first classes: both together keep the fewer ones.
            heavy = mass(heavy_weights(rows, tau, filters), rows.shard)
            total = jnp.minimum(heavy, total)
    return total


def _sum_of_first(rows: Prepared, top_k: jax.Array) -> jax.Array:
    """Returns what the k first classes weigh."""

    def is_closed(bracket: _Bracket) -> jax.Array:
        return bracket.from_low <= top_k

    numbers = functools.partial(count, rows=rows)
    end = _end(rows, numbers, top_k, is_closed)
    low, high = _from_ends(functools.partial(_mass, rows), rows, end)
    last = end.from_low - end.from_high
    return _sum_until(low, high, last, top_k - end.from_high)


def _sum_of_share(
    rows: Prepared, tau: float | jax.Array, share: jax.Array
) -> jax.Array:
    """Returns what the first classes weigh that reach a sum of weights."""

    def is_closed(bracket: _Bracket) -> jax.Array:
        lowest = from_ordered(bracket.low, rows.logits.dtype)
        c = divide_by_temperature(lowest, finite_peak(rows.top), tau)
        between = bracket.from_low - bracket.from_high
        return between <= _ONE_CLASS * jnp.exp(c)

    end = _end(rows, functools.partial(_mass, rows), share, is_closed)
    numbers = functools.partial(count, rows=rows)
    low, high = _from_ends(numbers, rows, end)
    last = jnp.maximum(low - high, 1)
    each = (end.from_low - end.from_high) / last.astype(share.dtype)
    steps = jnp.ceil((share - end.from_high) / jnp.where(each > 0, each, 1))
    steps = jnp.clip(steps, 1, last.astype(share.dtype)).astype(jnp.int32)
    return _sum_until(end.from_low, end.from_high, last, steps)


def _sum_until(
    low: jax.Array, high: jax.Array, last: jax.Array, steps: jax.Array
) -> jax.Array:
    """Returns the sum of the weights up to some of the last classes, one at least."""
    last = jnp.maximum(last, 1)
    part = jnp.clip(steps, 1, last).astype(low.dtype)
    return high + (low - high) * part / last.astype(low.dtype)


def _from(rows: Prepared, key: jax.Array) -> jax.Array:
    """Tells which classes have logits from an `ordered` integer on."""
    return rows.logits >= from_ordered(key, rows.logits.dtype)


def _from_ends(measure, rows: Prepared, end: _Bracket) -> tuple[jax.Array, jax.Array]:
    """Measures the classes from both ends of a bracket on."""
    low, high = (measure(_from(rows, key)) for key in (end.low, end.high))
    # Beside 0 the high end may be so small that 0 seems to be as large.
    return low, jnp.where(end.from_high > 0, high, 0)


def _mass(rows: Prepared, kept: jax.Array) -> jax.Array:
    """Returns what some classes weigh, [R, 1]."""
    return mass(jnp.where(kept, rows.weights, 0), rows.shard)


def _end(rows: Prepared, measure, enough: jax.Array, is_closed) -> _Bracket:
    """Returns where the kept classes of each row end.

    Args:
      rows: what `rejection.prepare` returned.
      measure: gives the number or the mass of the classes that are True, [R, 1].
      enough: [R, 1] or [1, 1], how much of it the kept classes have.
      is_closed: tells of which brackets the kept classes are all from the low end on;
        of others they are some of those that equal it.

    Returns:
      The brackets, any for a row without a sample.
    """
    x = rows.logits
    kept = (x >= rows.least) & (x > -jnp.inf)
    lowest = jnp.min(jnp.where(kept, x, jnp.inf), axis=1, keepdims=True)
    low = ordered(rows.shard.smallest(lowest))
    whole = measure(kept)
    # Where there is not more than enough, all are kept, and nothing is looked for.
    high = jnp.where(whole <= enough, low, ordered(rows.top)) + 1
    start = _Bracket(low, high, whole, jnp.zeros_like(whole))

    def is_open(bracket: _Bracket) -> jax.Array:
        # In a row with NaN the low end may be the largest integer.
        is_wide = (bracket.low < bracket.high) & (bracket.low + 1 < bracket.high)
        return is_wide & ~is_closed(bracket)

    def narrower(old: _Bracket) -> _Bracket:
        middle = old.low + jnp.maximum((old.high >> 1) - (old.low >> 1), 1)
        from_middle = measure(_from(rows, middle))
        up = is_open(old) & (from_middle >= enough)
        down = is_open(old) & ~(from_middle >= enough)
        return _Bracket(
            jnp.where(up, middle, old.low),
            jnp.where(down, middle, old.high),
            jnp.where(up, from_middle, old.from_low),
            jnp.where(down, from_middle, old.from_high),
        )

    start = mesh_axes.like(start, (start, enough, is_open(start)))
    return lax.while_loop(lambda bracket: jnp.any(is_open(bracket)), narrower, start)
