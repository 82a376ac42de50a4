"""The first classes of each row, by the groups of classes that they lie in.

The first are those of the largest logits, equal ones by ascending id: what `top_k`
keeps. Consecutive classes are groups, and k groups that are first in the same order, by
their largest logit and their number, hold the k first classes: any other group has k
classes before its own, one in each of them. So a short selection leaves few classes, of
which another takes the first.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core.numerics import block_maxima, compute_dtype
from jaxsoft.logits.class_shards import WHOLE, ClassShard
from jaxsoft.logits.rows import Rows

__all__ = ["first_classes", "first_groups", "group_size"]

# Groups are looked for where they leave one in so many classes, or fewer. The more
# groups there are, the longer the selection takes beside passes over all classes.
_LEAST_GAIN = 4
_MOST_GAIN = 16


def group_size(classes: int, count: int) -> int | None:
    """Returns the classes of a group, for the first `count` classes of a row.

    As many groups as there are classes in `count` of them; None where those would be
    too large a part of all classes.
    """
    size = 2 ** round(math.log2(max(classes / count, 1)) / 2)
    gain = min(max(count // _LEAST_GAIN, _LEAST_GAIN), _MOST_GAIN)
    return size if size * count * gain <= classes else None


def first_classes(
    rows: Rows, count: int, size: int, shard: ClassShard = WHOLE
) -> tuple[jax.Array, jax.Array]:
    """Returns the first `count` classes of each row, in their order.

    Args:
      rows: the logits.
      count: how many, at most as many as there are groups.
      size: the classes of a group.
      shard: which classes these are.

    Returns:
      [R, count] logits as they are computed with, -inf at dropped classes, and all +inf
      in a row with a NaN; and their classes, int32.
    """
    some, ids, least = first_groups(rows, count, size, shard)
    # So many classes are not less: told at once, fewer take a place before others do.
    best, places = _top_k(jnp.where(some < least, -jnp.inf, some), count)
    return best, jnp.take_along_axis(ids, places, axis=1)


def first_groups(
    rows: Rows, count: int, size: int, shard: ClassShard = WHOLE
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the classes of the groups that the first `count` classes lie in.

    Args:
      rows: the logits.
      count: how many, at most as many as there are groups.
      size: the classes of a group.
      shard: which classes these are.

    Returns:
      [R, count·size] logits as they are computed with, -inf at dropped classes, and
      all +inf in a row with a NaN; their classes, int32, ascending; and [R, 1] the
      largest logit of the last group in the order.
    """
    x = _masked(rows.logits, rows.where)
    tops, groups = _top_k(_largest(x, size, shard), count)
    least = tops[:, -1:]
    ids = jnp.sort(groups, axis=1)[:, :, None] * size
    ids = ids + lax.iota(jnp.int32, size)[None, None]
    ids = ids.reshape(ids.shape[0], count * size)

    if shard.axes:
        some = shard.take(x, ids)
        return jnp.where(_with_nan(x, shard), jnp.inf, some), ids, least

    def take(array: jax.Array, fill: float | bool) -> jax.Array:
        return jnp.take_along_axis(array, ids, axis=1, mode="fill", fill_value=fill)

    where = rows.where
    if where is not None:
        where = take(jnp.broadcast_to(where, rows.logits.shape), False)
    some = _masked(take(rows.logits, -jnp.inf), where).astype(tops.dtype)
    return jnp.where(_with_nan(x, shard), jnp.inf, some), ids, least


def _masked(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    return logits if where is None else jnp.where(where, logits, -jnp.inf)


def _largest(x: jax.Array, size: int, shard: ClassShard) -> jax.Array:
    """Returns the largest logit of each group, [R, n]."""
    x, shard = shard.aligned(x, size)
    tops = block_maxima(x, size).astype(compute_dtype(x))
    return shard.largest(shard.spread(tops, size, -jnp.inf))


def _top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns `lax.top_k`, which takes -0.0 to be less than 0.0, of equal zeros."""
    best, places = lax.top_k(jnp.where(x == 0, 0, x), count)
    # Without the barrier XLA would sort where the best are sliced.
    return lax.optimization_barrier(best), places


def _with_nan(x: jax.Array, shard: ClassShard) -> jax.Array:
    """Tells which rows have a NaN, [R, 1].

    XLA's own maximum on CPUs leaves NaN out in loops that it vectorises, a sum never.
    """
    total = jnp.sum(x, axis=1, keepdims=True, dtype=compute_dtype(x))
    # Or infinities of both signs, which may be sums of large numbers.
    suspect = jnp.isnan(total)
    found = lax.cond(
        jnp.any(suspect),
        lambda: jnp.any(jnp.isnan(x), axis=1, keepdims=True),
        lambda: suspect,
    )
    return shard.add(found.astype(jnp.int32)) > 0 if shard.axes else found
