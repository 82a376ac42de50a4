"""Gumbel-softmax of rows as the kernels for TPUs compute it, noise included.

Where a row's perturbed logits fit VMEM beside it they stay there, and noise is drawn
once. Of longer rows noise is drawn again in the second pass, and a perturbed logit is
the exact sum of a logit and its noise: the first pass streams, and cannot know the
largest logit. Noise takes more time than reading: drawing it twice is what such rows
pay.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsoft._core import noise
from jaxsoft._core.exact_sum import LOWEST, exact_sum, gap
from jaxsoft._core.numerics import divide_by_temperature, is_zero
from jaxsoft.kernels.rows.binding import RowPlan
from jaxsoft.kernels.rows.mosaic_tpu.strips import WRITING, Strip, merge_chunk
from jaxsoft.kernels.typing import ChunkFold, Tau

__all__ = ["column_dtypes", "kernel"]

# The class of no number; any class is lower.
_NO_CLASS = jnp.iinfo(jnp.int32).max


def column_dtypes(keeps_perturbed: bool) -> tuple[jnp.dtype, ...]:
    """Returns the dtypes of the columns that a row keeps between passes.

    Args:
      keeps_perturbed: whether perturbed logits stay in VMEM too. If they do not, what
        rounding took of the largest one, and its class, are kept as well.
    """
    number = jnp.dtype(jnp.float32)
    if keeps_perturbed:
        return (number, number)
    return (number, number, number, jnp.dtype(jnp.int32))


def kernel(
    plan: RowPlan,
    pass_number: int,
    is_first: bool | jax.Array,
    strip: Strip,
    over_chunks: ChunkFold,
) -> None:
    """Runs a pass over a strip.

    Args:
      plan: what is known of the call.
      pass_number: `FOLDING` or `WRITING`.
      is_first: whether the block is its rows' first.
      strip: the rows.
      over_chunks: folds over the chunks of the block's classes.
    """
    tau = strip.temperature(plan.static_tau)
    if pass_number == WRITING:
        write = _write if strip.perturbed is not None else _write_again
        write(plan, tau, strip, over_chunks)
    elif strip.perturbed is not None:
        _perturb(plan, tau, strip, over_chunks)
    else:
        _stream(plan, tau, is_first, strip, over_chunks)


def _chooses(plan: RowPlan) -> bool:
    """Whether the best class counts: a temperature that is not known may be 0."""
    return plan.hard or plan.static_tau is None


def _drawn(plan: RowPlan, strip: Strip, columns: pl.Slice) -> jax.Array:
    """Returns the noise of a chunk."""
    assert plan.generator is not None and strip.words is not None
    words = [strip.words[:, i : i + 1] for i in range(2)]
    start = strip.first + columns.start
    _, size = strip.shape(columns)
    bits = noise.span_bits(words, noise.CLASSES, start, size, plan.generator)
    return noise.gumbel_of_bits(bits)


def _ids(strip: Strip, columns: pl.Slice, shape: tuple[int, ...]) -> jax.Array:
    """Returns the classes of a chunk."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) + (strip.first + columns.start)


def _perturb(plan: RowPlan, tau: Tau, strip: Strip, over_chunks: ChunkFold) -> None:
    """The perturbed logits of a strip, their largest, and their sum."""
    perturbed = strip.perturbed
    assert perturbed is not None
    start = strip.restore(True, (LOWEST[0], 0.0))

    def highest(columns, valid, peak):
        del valid
        x = strip.load(0, columns, None, 0)
        return jnp.maximum(peak, jnp.max(x, axis=1, keepdims=True))

    def perturb(peak, columns, valid, carry):
        del valid
        x = strip.load(0, columns, None, 0)
        x = x - peak + _drawn(plan, strip, columns)
        perturbed[strip.rows, columns] = x
        return merge_chunk(x, tau, carry)

    peak = over_chunks(highest, start[0])
    strip.keep(over_chunks(functools.partial(perturb, peak), start))


def _write(plan: RowPlan, tau: Tau, strip: Strip, over_chunks: ChunkFold) -> None:
    """Probabilities from perturbed logits that were kept."""
    perturbed = strip.perturbed
    assert perturbed is not None
    peak, total = strip.get()
    total = jnp.where(total == 0, 1, total)
    best = _lowest_best(strip, peak, over_chunks) if _chooses(plan) else None

    def write(columns, valid, carry):
        del valid
        x = perturbed[strip.rows, columns]
        weights = None if plan.hard else jnp.exp(divide_by_temperature(x, peak, tau))
        _put(plan, tau, strip, columns, weights, total, best)
        return carry

    over_chunks(write, 0)


def _lowest_best(strip: Strip, peak: jax.Array, over_chunks: ChunkFold) -> jax.Array:
    """Returns the lowest class with the largest perturbed logit, [R, 1]."""
    perturbed = strip.perturbed
    assert perturbed is not None

    def find(columns, valid, best):
        del valid
        x = perturbed[strip.rows, columns]
        ids = jnp.where(x == peak, _ids(strip, columns, x.shape), _NO_CLASS)
        return jnp.minimum(best, jnp.min(ids, axis=1, keepdims=True))

    return over_chunks(find, jnp.full(peak.shape, _NO_CLASS, jnp.int32))


def _stream(
    plan: RowPlan,
    tau: Tau,
    is_first: bool | jax.Array,
    strip: Strip,
    over_chunks: ChunkFold,
) -> None:
    """The largest perturbed logit, its class, and the sum, of what streams past."""

    def fold(columns, valid, carry):
        x = strip.load(0, columns, valid, -jnp.inf)
        x, rest = exact_sum(x, _drawn(plan, strip, columns))
        old, old_rest, total, best = carry
        top = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        # Several sums may be the largest when rounded: the rest decides between them.
        top_rest = jnp.maximum(
            jnp.where(old == top, old_rest, LOWEST[0]),
            jnp.max(jnp.where(x == top, rest, LOWEST[0]), axis=1, keepdims=True),
        )
        weights = _weights(x, rest, (top, top_rest), tau)
        total = total * _weights(old, old_rest, (top, top_rest), tau)
        total = total + jnp.sum(weights, axis=1, keepdims=True)
        if _chooses(plan):
            is_best = (x == top) & (rest == top_rest)
            ids = jnp.where(is_best, _ids(strip, columns, x.shape), _NO_CLASS)
            lowest = jnp.min(ids, axis=1, keepdims=True)
            best = jnp.where((old == top) & (old_rest == top_rest), best, lowest)
        return top, top_rest, total, best

    strip.keep(over_chunks(fold, strip.restore(is_first, (*LOWEST, 0.0, _NO_CLASS))))


def _write_again(plan: RowPlan, tau: Tau, strip: Strip, over_chunks: ChunkFold) -> None:
    """Probabilities from logits, and from noise that is drawn again."""
    top, rest, total, best = strip.get()
    total = jnp.where(total == 0, 1, total)

    def write(columns, valid, carry):
        del valid
        weights = None
        if not plan.hard:
            x = strip.load(0, columns, None, 0)
            x = exact_sum(x, _drawn(plan, strip, columns))
            weights = _weights(*x, (top, rest), tau)
        chosen = best if _chooses(plan) else None
        _put(plan, tau, strip, columns, weights, total, chosen)
        return carry

    over_chunks(write, 0)


def _weights(
    x: jax.Array, rest: jax.Array, peak: tuple[jax.Array, jax.Array], tau: Tau
) -> jax.Array:
    """Returns exp((x - peak) / τ) of exact sums."""
    below = gap(x, rest, *peak)
    return jnp.exp(divide_by_temperature(below, jnp.zeros_like(below), tau))


def _put(
    plan: RowPlan,
    tau: Tau,
    strip: Strip,
    columns: pl.Slice,
    weights: jax.Array | None,
    total: jax.Array,
    best: jax.Array | None,
) -> None:
    """Writes a chunk: weights over their total, or one-hot where τ = 0 or `hard`."""
    p = None if weights is None else weights / total
    if best is not None:
        ids = _ids(strip, columns, strip.shape(columns))
        one_hot = jnp.where(ids == best, 1.0, 0.0)
        # In a row with a NaN the sum is NaN, and so is this quotient, which is 1
        # otherwise.
        one_hot = one_hot * (total / total)
        p = one_hot if p is None else jnp.where(is_zero(tau, p.dtype), one_hot, p)
    assert p is not None
    strip.out[strip.rows, columns] = p.astype(strip.out.dtype)
