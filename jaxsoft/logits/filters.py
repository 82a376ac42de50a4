"""What top-k, top-p and min-p leave of a row of logits.

Each keeps the first classes of one order: larger logits first, equal ones by id. So a
class is kept where few enough classes, and little enough of their probability, come
before it. Nothing is sorted. Of a few classes each is compared with each other, here;
of many only those that are drawn are judged, in `rejection.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core.numerics import divide_by_temperature, finite_peak

__all__ = ["NONE", "Filters", "amount", "bound", "is_heavy", "keep", "out_of_range"]


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


def keep(x: jax.Array, tau: float | jax.Array, filters: Filters) -> jax.Array:
    """Drops classes: by top_k, then by top_p of those that are left, then by min_p.

    Every class is compared with every other: V² comparisons a row.

    Args:
      x: [R, V] logits, -inf at classes that are dropped already, without NaN.
      tau: the temperature, a float or [R, 1] or [1, 1].
      filters: what to keep; the first class of the order always is.

    Returns:
      [R, V] exp((logit - largest) / τ), 0 at dropped classes.
    """
    top = jnp.max(x, axis=1, keepdims=True)
    c = divide_by_temperature(x, finite_peak(top), tau)
    weights = jnp.exp(c)
    if filters.top_k is not None or filters.top_p is not None:
        shape = (*x.shape, x.shape[1])
        ids, others = (lax.broadcasted_iota(jnp.int32, shape, i) for i in (1, 2))
        # Whether the second class comes before the first.
        mine, theirs = x[:, :, None], x[:, None, :]
        before = (theirs > mine) | ((theirs == mine) & (others < ids))
    if filters.top_k is not None:
        number = jnp.sum(before, axis=2, dtype=jnp.int32)
        weights = jnp.where(number < bound(filters.top_k), weights, 0)
    if filters.top_p is not None:
        total = jnp.sum(weights, axis=1, keepdims=True)
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
    return bad
