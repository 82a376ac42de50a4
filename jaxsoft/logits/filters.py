"""What top-k, top-p and min-p leave of a row of logits.

Each keeps the first classes of one order: larger logits first, equal ones by id. So
what they keep is given by a threshold: every class above a logit, and those of exactly
that logit whose id is below a bound. Both are found by bisection, of the bits of a
floating-point number and of those of an id, in as many passes over a row: nothing is
sorted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core.numerics import divide_by_temperature, finite_peak

__all__ = ["NONE", "Filters", "apply"]


class Filters(NamedTuple):
    """The filters of a call, each [R, 1] or [1, 1], or None.

    Attributes:
      top_k: int32, how many classes are kept, at least 0; 0 keeps all.
      top_p: the probability that the kept classes reach, in [0, 1].
      min_p: the least probability of a kept class over the largest, in [0, 1].
    """

    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None


NONE = Filters(None, None, None)


def apply(x: jax.Array, tau: float | jax.Array, filters: Filters) -> jax.Array:
    """Drops classes: by top_k, then by top_p of those that are left, then by min_p.

    Args:
      x: [R, V] logits, -inf at classes that are dropped already, without NaN.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep; the first class of the order always is.

    Returns:
      [R, V] logits, -inf at dropped classes.
    """
    top = jnp.max(x, axis=1, keepdims=True)
    peak = finite_peak(top)
    if filters.top_k is not None:
        ones = (x != -jnp.inf).astype(jnp.int32)
        # No row has as many classes as the largest int32.
        every = jnp.iinfo(jnp.int32).max
        x = _first(x, ones, jnp.where(filters.top_k > 0, filters.top_k, every))
    if filters.top_p is not None:
        weights = jnp.exp(divide_by_temperature(x, peak, tau))
        total = jnp.sum(weights, axis=1, keepdims=True)
        least = jnp.finfo(x.dtype).tiny
        amount = jnp.maximum(filters.top_p * total, least)
        # Not even a rounded sum reaches a share of 1 before the last class.
        x = _first(x, weights, jnp.where(filters.top_p < 1, amount, jnp.inf))
    if filters.min_p is not None:
        c = divide_by_temperature(x, peak, tau)
        x = jnp.where((c >= jnp.log(filters.min_p)) | (x == top), x, -jnp.inf)
    return x


def _first(x: jax.Array, weights: jax.Array, amount: jax.Array) -> jax.Array:
    """Keeps the fewest first classes whose weights reach an amount, else all.

    That is, every class before which the weights do not reach it.
    """
    keys = _ordered(x)

    def weight_where(condition: jax.Array) -> jax.Array:
        chosen = jnp.where(condition, weights, 0)
        return jnp.sum(chosen, axis=1, keepdims=True, dtype=weights.dtype)

    lowest, highest = (f(keys, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    bits = keys.dtype.itemsize * 8
    key = _least(lambda key: weight_where(keys > key) < amount, lowest, highest, bits)
    above = weight_where(keys > key)
    tied = keys == key
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    classes = jnp.full_like(above, x.shape[1], jnp.int32)

    def bound():
        return _least(
            lambda id: above + weight_where(tied & (ids < id)) >= amount,
            jnp.zeros_like(classes),
            classes,
            x.shape[1].bit_length(),
        )

    alone = jnp.max(jnp.sum(tied, axis=1)) == 1
    before = lax.cond(alone, lambda: classes, bound)
    return jnp.where((keys > key) | (tied & (ids < before)), x, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """Returns integers in the order of floating-point numbers, without NaN."""
    kind = jnp.dtype(jnp.int64 if x.dtype == jnp.float64 else jnp.int32)
    bits = lax.bitcast_convert_type(x, kind)
    # -0.0, the least integer, is equal to 0.0. XLA leaves a sum x + 0.0 out.
    bits = jnp.where(bits == kind.type(jnp.iinfo(kind).min), 0, bits)
    return jnp.where(bits < 0, bits ^ kind.type(jnp.iinfo(kind).max), bits)


def _least(
    holds: Callable[[jax.Array], jax.Array],
    low: jax.Array,
    high: jax.Array,
    halvings: int,
) -> jax.Array:
    """Returns the least integer from which on a condition holds.

    Args:
      holds: of [R, 1] integers; never asked for `high`, where it counts as true.
      low: [R, 1] the least integers.
      high: [R, 1] the largest.
      halvings: as many as 2^halvings > high - low needs.

    Returns:
      [R, 1] integers.
    """

    def halve(_, bounds):
        low, high = bounds
        # The mean, rounded down, without an overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        met = holds(middle) | (low == high)
        return jnp.where(met, low, middle + 1), jnp.where(met, middle, high)

    return lax.fori_loop(0, halvings, halve, (low, high))[1]
