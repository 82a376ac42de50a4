"""What top-n-sigma, top-k, top-p and min-p leave of a row of logits.

Each keeps the first classes of one order: larger logits first, equal ones by id. So a
class is kept where few enough classes, and little enough of their probability, come
before it. Nothing is sorted. Top-n-sigma, which knows no order of equal logits, drops
classes before all else. Of a few classes each is compared with each other, here; of
many only those that are drawn are judged, in `rejection.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core.block_sampling import sums_before
from jaxsoft._core.numerics import divide_by_temperature, finite_peak
from jaxsoft.logits.class_shards import WHOLE, ClassShard

__all__ = [
    "NONE",
    "Filters",
    "amount",
    "bound",
    "is_heavy",
    "keep",
    "out_of_range",
    "reach",
    "within",
]


class Filters(NamedTuple):
    """The filters of a call, each [R, 1] or [1, 1], or None.

    Attributes:
      top_k: int32, how many classes are kept, at least 0; 0 keeps all.
      top_p: the probability that the kept classes reach, in [0, 1].
      min_p: the least probability of a kept class over the largest, in [0, 1].
      top_n_sigma: how many standard deviations of the row's logits a kept class is
        below the largest at most, in [0, ∞].
    """

    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    top_n_sigma: jax.Array | None = None


NONE = Filters(None, None, None)


def reach(
    x: jax.Array, top: jax.Array, top_n_sigma: jax.Array, shard: ClassShard = WHOLE
) -> jax.Array:
    """Returns how far below the largest logit top_n_sigma keeps a class.

    The standard deviation is that of the classes that are not dropped already, all
    alike, whatever the temperature.

    Args:
      x: [R, V] logits, -inf at classes that are dropped already.
      top: [R, 1] the largest, of all shards.
      top_n_sigma: [R, 1] or [1, 1].
      shard: which classes these are.

    Returns:
      [R, 1], half of the distance, as `within` takes it: that of any finite logits is
      finite. Negative where top_n_sigma is out of its range.
    """
    kept = x > -jnp.inf
    below = jnp.where(kept, _half_below(x, top), 0)
    widest = shard.largest(jnp.max(below, axis=1, keepdims=True))
    # By a power of two, which rounds nothing: squares neither overflow nor vanish.
    most = 2.0 ** (jnp.finfo(x.dtype).maxexp - 4)
    scale = 1 / jnp.clip(_power_of_two(widest), 1 / most, most)
    below *= scale

    def total(values: jax.Array) -> jax.Array:
        return shard.add(jnp.sum(values, axis=1, keepdims=True))

    number = jnp.maximum(total(kept.astype(x.dtype)), 1)
    mean = total(below) / number
    squares = jnp.where(kept, jnp.square(below - mean), 0)
    deviation = jnp.sqrt(total(squares) / number) / scale
    distance = jnp.where(top_n_sigma < jnp.inf, top_n_sigma * deviation, jnp.inf)
    return jnp.where(top_n_sigma >= 0, distance, -1)


def _power_of_two(x: jax.Array) -> jax.Array:
    """Returns the largest power of two up to numbers that are normal, 0 for others.

    JAX 0.12 cannot lower `jnp.frexp` inside a primitive of ours.
    """
    digits = jnp.finfo(x.dtype).nmant
    kind = jnp.dtype(jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32)
    bits = lax.bitcast_convert_type(x, kind)
    cleared = bits & kind.type(jnp.iinfo(kind).max - (2**digits - 1))
    return lax.bitcast_convert_type(cleared, x.dtype)


def within(x: jax.Array, top: jax.Array, half: jax.Array) -> jax.Array:
    """Returns logits [R, V], -inf further below the largest than what `reach` gave."""
    # What is no number stays, and tells that its row has no sample.
    return jnp.where(_half_below(x, top) > half, -jnp.inf, x)


def _half_below(x: jax.Array, top: jax.Array) -> jax.Array:
    """Returns half of the distance of logits from the largest."""
    return finite_peak(top) * 0.5 - x * 0.5


def keep(
    x: jax.Array, tau: float | jax.Array, filters: Filters, is_sorted: bool = False
) -> jax.Array:
    """Drops classes: by each filter in turn, of those that the one before it left.

    The turns are those of top_n_sigma, top_k, top_p and min_p.

    Every class is compared with every other: V² comparisons a row, unless they are in
    order.

    Args:
      x: [R, V] logits, -inf at classes that are dropped already, without NaN.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep; the first class of the order always is.
      is_sorted: whether the classes are in the order.

    Returns:
      [R, V] exp((logit - largest) / τ), 0 at dropped classes.
    """
    top = x[:, :1] if is_sorted else jnp.max(x, axis=1, keepdims=True)
    if filters.top_n_sigma is not None:
        x = within(x, top, reach(x, top, filters.top_n_sigma))
    c = divide_by_temperature(x, finite_peak(top), tau)
    weights = jnp.exp(c)
    before = None
    if not is_sorted and (filters.top_k is not None or filters.top_p is not None):
        shape = (*x.shape, x.shape[1])
        ids, others = (lax.broadcasted_iota(jnp.int32, shape, i) for i in (1, 2))
        # Whether the second class comes before the first.
        mine, theirs = x[:, :, None], x[:, None, :]
        before = (theirs > mine) | ((theirs == mine) & (others < ids))
    if filters.top_k is not None:
        if before is None:
            number = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
        else:
            number = jnp.sum(before, axis=2, dtype=jnp.int32)
        weights = jnp.where(number < bound(filters.top_k), weights, 0)
    if filters.top_p is not None:
        total = jnp.sum(weights, axis=1, keepdims=True)
        if before is None:
            mass = sums_before(weights)
        else:
            mass = jnp.sum(jnp.where(before, weights[:, None, :], 0), axis=2)
        weights = jnp.where(mass < amount(filters.top_p, total), weights, 0)
    if filters.min_p is not None:
        weights = jnp.where(is_heavy(x, c, top, filters.min_p), weights, 0)
    return weights


def bound(top_k: jax.Array) -> jax.Array:
    """Returns before how many classes a class has to come."""
    # No row has as many classes as the largest int32.
    return jnp.where(top_k > 0, top_k, jnp.iinfo(jnp.int32).max)


def amount(top_p: jax.Array, total: jax.Array) -> jax.Array:
    """Returns which sum the weights before a class must not reach."""
    least = jnp.finfo(total.dtype).tiny
    # Not even a rounded sum reaches a share of 1 before the last class.
    return jnp.where(top_p < 1, jnp.maximum(top_p * total, least), jnp.inf)


def is_heavy(x: jax.Array, c: jax.Array, top: jax.Array, min_p: jax.Array) -> jax.Array:
    """Tells which logits x, which are c when centred and divided, min_p keeps."""
    return (c >= jnp.log(min_p)) | (x == top)


def out_of_range(filters: Filters) -> jax.Array:
    """Tells where a filter has a value that it must not have, [R, 1] or [1, 1]."""
    bad = jnp.zeros((1, 1), bool)
    if filters.top_k is not None:
        bad |= filters.top_k < 0
    for value in (filters.top_p, filters.min_p):
        if value is not None:
            bad |= ~((value >= 0) & (value <= 1))
    if filters.top_n_sigma is not None:
        bad |= ~(filters.top_n_sigma >= 0)
    return bad
