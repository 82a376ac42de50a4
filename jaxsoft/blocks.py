"""The one sampling algorithm: a block of classes first, then a class inside it.

Classes come in blocks of about √V. A block is drawn by the Gumbel-max rule over the
logarithms of the blocks' sums, one random number a block; a class inside it by
inversion of its cumulative sum, one random number a row. The bits depend on the key,
the row and the block, and the size of a block on V alone: every tile size,
implementation and sharding draws the same classes, up to ties within rounding.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft import noise
from jaxsoft.temperature import divide_by_temperature, is_zero

__all__ = ["Drawn", "block_size", "draw", "invert", "later", "place", "scores"]

_LEAST = 128


class Drawn(NamedTuple):
    """The best block so far and the class drawn in it, for each row, [R] each.

    Attributes:
      max: the largest logit met; -inf before the first kept class.
      score: (log of the block's sum, centred on `max` and divided by τ) plus noise.
      class_id: int32; -1 before the first kept class.
    """

    max: jax.Array
    score: jax.Array
    class_id: jax.Array


def block_size(num_classes: int) -> int:
    """Returns the classes of a block: a power of two near √V, at least 128."""
    return max(_LEAST, 2 ** math.ceil(math.log2(max(num_classes, 1)) / 2))


def scores(
    sums: jax.Array, words: jax.Array, blocks: jax.Array, zero: jax.Array
) -> jax.Array:
    """Returns log-sums of blocks plus noise; without either where τ is 0.

    Args:
      sums: [R, n] sums of exponentials.
      words: [R, 2], see `noise.row_words`.
      blocks: [n] numbers of the blocks.
      zero: where τ is 0, broadcastable to [R, 1].

    Returns:
      [R, n]; -inf for an empty block.
    """
    perturbed = jnp.log(sums) + noise.gumbel(words, noise.BLOCKS, blocks, sums.dtype)
    alone = jnp.where(sums > 0, 0.0, -jnp.inf).astype(sums.dtype)
    return jnp.where(zero, alone, perturbed)


def place(words: jax.Array, zero: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns how far into its block's sum each row's class lies, [R]; 0 at τ = 0."""
    return jnp.where(zero, 0, noise.uniform(words, dtype)[:, None])[:, 0]


def invert(weights: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the class whose part of the cumulative sum contains the target.

    Args:
      weights: [R, B] non-negative.
      target: [R].

    Returns:
      [R] int32; the last class of positive weight where rounding puts the target
      beyond the sum.
    """
    inside = jnp.sum(jnp.cumsum(weights, axis=1) <= target[:, None], axis=1)
    positive = weights > 0
    last = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    return jnp.minimum(inside, last).astype(jnp.int32)


def draw(
    logits: jax.Array,
    tau: float | jax.Array,
    words: jax.Array,
    first_block: jax.Array | int,
    block: int,
    whole: jax.Array | None = None,
) -> Drawn:
    """Draws a class from consecutive blocks, in one pass over their logits.

    Args:
      logits: [R, C], -inf at dropped classes; the first one begins a block.
      tau: the temperature, a float or [R, 1].
      words: [R, 2], see `noise.row_words`.
      first_block: the number of the first block.
      block: B, the classes of a block.
      whole: [⌈C / B⌉] booleans, False for blocks that do not take part; None for all.

    Returns:
      The drawn classes, numbered as `first_block` is.
    """
    columns = logits.shape[1]
    tops, sums = _summaries(logits, tau, block)
    if whole is not None:
        tops = jnp.where(whole[None], tops, -jnp.inf)
        sums = jnp.where(whole[None], sums, 0)
    blocks = first_block + lax.iota(jnp.int32, sums.shape[1])
    zero = is_zero(tau, logits.dtype)
    largest = jnp.max(tops, axis=1, keepdims=True)
    peak = jnp.where(largest == -jnp.inf, 0, largest)
    perturbed = scores(sums, words, blocks, zero)
    perturbed += divide_by_temperature(tops, peak, tau)
    best = jnp.argmax(perturbed, axis=1).astype(jnp.int32)
    score = jnp.max(perturbed, axis=1)
    size = min(block, columns)
    start = jnp.minimum(best * block, columns - size)
    part = jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, size))
    chosen = part(logits, start)
    # The last block may have begun before the last B columns.
    place_in = start[:, None] + lax.iota(jnp.int32, size)[None]
    inside = place_in >= best[:, None] * block
    top, total = (jnp.take_along_axis(a, best[:, None], axis=1) for a in (tops, sums))
    weights = _weights(jnp.where(inside, chosen, -jnp.inf), top, tau)
    target = place(words, zero, logits.dtype) * total[:, 0]
    class_id = first_block * block + start + invert(weights, target)
    return Drawn(largest[:, 0], score, jnp.where(score == -jnp.inf, -1, class_id))


def _weights(u: jax.Array, top: jax.Array, tau: float | jax.Array) -> jax.Array:
    return jnp.exp(divide_by_temperature(u, jnp.where(top == -jnp.inf, 0, top), tau))


def _summaries(
    logits: jax.Array, tau: float | jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Returns each block's largest logit and its sum of exponentials, [R, n] each.

    A block's own maximum centres it, so that its logits are read from memory once.
    """
    rows, columns = logits.shape
    full = columns // block
    parts = [logits[:, : full * block].reshape(rows, full, block)]
    if full * block < columns:
        parts.append(logits[:, None, full * block :])
    tau = tau[:, :, None] if isinstance(tau, jax.Array) else tau
    tops = [jnp.max(part, axis=2, keepdims=True) for part in parts]
    sums = [
        jnp.sum(_weights(part, top, tau), axis=2)
        for part, top in zip(parts, tops, strict=True)
    ]
    return jnp.concatenate([t[:, :, 0] for t in tops], 1), jnp.concatenate(sums, 1)


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
    peak = jnp.where(largest == -jnp.inf, 0, largest)
    before = old.score + divide_by_temperature(old.max, peak, tau)
    after = new.score + divide_by_temperature(new.max, peak, tau)
    better = after > before
    return Drawn(
        largest,
        jnp.where(better, after, before),
        jnp.where(better, new.class_id, old.class_id),
    )
