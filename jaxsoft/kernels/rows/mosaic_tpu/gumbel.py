"""Gumbel-softmax of rows as the kernels for TPUs compute it, noise included.

Where a row's perturbed logits fit VMEM beside it they stay there, and noise is drawn
once. Of longer rows noise is drawn again in the second pass, and a perturbed logit is
the exact sum of a logit and its noise: the first pass streams, and cannot know the
largest logit. Noise takes more time than reading: drawing it twice is what such rows
pay.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import noise
from jaxsoft._core.exact_sum import LOWEST, exact_sum, gap
from jaxsoft._core.temperature import divide_by_temperature, is_zero
from jaxsoft.kernels.rows.mosaic_tpu.strips import Strip, merge
from jaxsoft.kernels.rows.primitive import Plan

__all__ = ["kept", "kernel"]

_BEYOND = jnp.iinfo(jnp.int32).max


def kept(keeps: bool) -> tuple[Any, ...]:
    """Returns the dtypes of the columns that a row keeps between passes.

    Args:
      keeps: whether perturbed logits are kept too.
    """
    return (jnp.float32,) * 2 if keeps else (*(jnp.float32,) * 3, jnp.int32)


def kernel(plan: Plan, number: int, begins: Any, strip: Strip, over: Any) -> None:
    """Runs a pass over a strip.

    Args:
      plan: what is known of the call.
      number: of the pass, 0 or 1.
      begins: whether the first pass begins.
      strip: the rows.
      over: what folds over the chunks of classes.
    """
    tau: Any = plan.static_tau if strip.column is None else strip.column
    if number:
        write = _write if strip.noisy is not None else _write_again
        write(plan, tau, strip, over)
    elif strip.noisy is not None:
        _perturb(plan, tau, strip, over)
    else:
        _stream(plan, tau, begins, strip, over)


def _chooses(plan: Plan) -> bool:
    """Whether the best class counts: a temperature that is not known may be 0."""
    return plan.hard or plan.static_tau is None


def _drawn(plan: Plan, strip: Strip, columns: Any) -> jax.Array:
    """Returns the noise of a chunk."""
    assert plan.generator is not None
    words = [strip.words[:, i : i + 1] for i in range(2)]
    start = strip.first + columns.start
    bits = noise.span_bits(words, noise.CLASSES, start, columns.size, plan.generator)
    return noise.gumbel_of_bits(bits)


def _ids(strip: Strip, columns: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns the classes of a chunk."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) + (strip.first + columns.start)


def _perturb(plan: Plan, tau: Any, strip: Strip, over: Any) -> None:
    """The perturbed logits of a strip, their largest, and their sum."""
    start = strip.restore(True, (LOWEST[0], 0.0))

    def highest(columns, valid, peak):
        del valid
        x = strip.load(0, columns, None, 0)
        return jnp.maximum(peak, jnp.max(x, axis=1, keepdims=True))

    def perturb(peak, columns, valid, carry):
        del valid
        x = strip.load(0, columns, None, 0)
        x = x - peak + _drawn(plan, strip, columns)
        strip.noisy[strip.rows, columns] = x
        return merge(x, tau, carry)

    peak = over(highest, start[0])
    strip.keep(over(functools.partial(perturb, peak), start))


def _write(plan: Plan, tau: Any, strip: Strip, over: Any) -> None:
    """Probabilities from perturbed logits that were kept."""
    peak, total = strip.get()
    total = jnp.where(total == 0, 1, total)
    best = _lowest_best(strip, peak, over) if _chooses(plan) else None

    def write(columns, valid, carry):
        del valid
        x = strip.noisy[strip.rows, columns]
        weights = None if plan.hard else jnp.exp(divide_by_temperature(x, peak, tau))
        _put(plan, tau, strip, columns, weights, total, best)
        return carry

    over(write, 0)


def _lowest_best(strip: Strip, peak: jax.Array, over: Any) -> jax.Array:
    """Returns the lowest class with the largest perturbed logit, [R, 1]."""

    def find(columns, valid, best):
        del valid
        x = strip.noisy[strip.rows, columns]
        ids = jnp.where(x == peak, _ids(strip, columns, x.shape), _BEYOND)
        return jnp.minimum(best, jnp.min(ids, axis=1, keepdims=True))

    return over(find, jnp.full(peak.shape, _BEYOND, jnp.int32))


def _stream(plan: Plan, tau: Any, begins: Any, strip: Strip, over: Any) -> None:
    """The largest perturbed logit, its class, and the sum, of what streams past."""

    def fold(columns, valid, carry):
        x = strip.load(0, columns, valid, -jnp.inf)
        x, rest = exact_sum(x, _drawn(plan, strip, columns))
        old, old_rest, total, best = carry
        top = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        # Of those that are the largest when rounded.
        top_rest = jnp.maximum(
            jnp.where(old == top, old_rest, LOWEST[0]),
            jnp.max(jnp.where(x == top, rest, LOWEST[0]), axis=1, keepdims=True),
        )
        weights = _weights(x, rest, (top, top_rest), tau)
        total = total * _weights(old, old_rest, (top, top_rest), tau)
        total = total + jnp.sum(weights, axis=1, keepdims=True)
        if _chooses(plan):
            here = (x == top) & (rest == top_rest)
            ids = jnp.where(here, _ids(strip, columns, x.shape), _BEYOND)
            found = jnp.min(ids, axis=1, keepdims=True)
            best = jnp.where((old == top) & (old_rest == top_rest), best, found)
        return top, top_rest, total, best

    strip.keep(over(fold, strip.restore(begins, (*LOWEST, 0.0, _BEYOND))))


def _write_again(plan: Plan, tau: Any, strip: Strip, over: Any) -> None:
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

    over(write, 0)


def _weights(x: jax.Array, rest: jax.Array, peak: Any, tau: Any) -> jax.Array:
    """Returns exp((x - peak) / τ) of exact sums."""
    below = gap(x, rest, *peak)
    return jnp.exp(divide_by_temperature(below, jnp.zeros_like(below), tau))


def _put(plan: Plan, tau: Any, strip: Strip, columns, weights, total, best) -> None:
    """Writes a chunk: weights over their total, or one-hot where τ = 0 or `hard`."""
    p: Any = None
    if not plan.hard:
        p = weights / total
    if best is not None:
        shape = (strip.rows.size, columns.size)
        # In a row with NaN the sum is NaN, and all that it divides.
        hard = jnp.where(_ids(strip, columns, shape) == best, 1.0, 0.0)
        hard = hard * (total / total)
        p = hard if p is None else jnp.where(is_zero(tau, p.dtype), hard, p)
    strip.out[strip.rows, columns] = p.astype(strip.out.dtype)
