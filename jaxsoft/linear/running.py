"""Statistics of rows while tiles of their logits are merged into them, and after."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core.temperature import divide_by_temperature, over_temperature, times
from jaxsoft.linear import sharding
from jaxsoft.linear.operands import Config, Fields, Operands
from jaxsoft.linear.tile import Tile

__all__ = ["Running", "Saved", "finish", "join", "merge", "start"]


class Running(NamedTuple):
    """Running statistics of R rows, [R, 1] each but `label`.

    Attributes:
      max: m so far, -inf before the first kept class.
      sum: Σ exp(c).
      label: [R, K] the logits of the labels, not centred; -inf before they were met.
      gap: Σ (u - m) over kept classes, not divided.
      number: how many classes were kept, int32.
      weighted: Σ exp(c) c.
      argmax: int32.
      rest: Σ exp(c) over classes that are no labels.
    """

    max: jax.Array
    sum: jax.Array
    label: jax.Array | None
    gap: jax.Array | None
    number: jax.Array | None
    weighted: jax.Array | None
    argmax: jax.Array | None
    rest: jax.Array | None


class Saved(NamedTuple):
    """What the derivative needs of the forward pass, [N] each.

    Attributes:
      fields: the statistics.
      total: Σ exp(c), whose logarithm has fewer digits.
      number: how many classes are kept; None where the mean is not wanted.
      rest: Σ exp(c) over classes that are no labels; None where not wanted.
    """

    fields: Fields
    total: jax.Array
    number: jax.Array | None
    rest: jax.Array | None


def start(config: Config, rows: int, labels: int | None, dtype: jnp.dtype) -> Running:
    """Returns the statistics of rows before their first tile.

    Args:
      config: what is known at trace time.
      rows: R.
      labels: K, or None without labels.
      dtype: of the statistics.

    Returns:
      What `merge` starts from.
    """
    column = (rows, 1)
    return Running(
        max=jnp.full(column, -jnp.inf, dtype),
        sum=jnp.zeros(column, dtype),
        label=None if labels is None else jnp.full((rows, labels), -jnp.inf, dtype),
        gap=jnp.zeros(column, dtype) if config.mean else None,
        number=jnp.zeros(column, jnp.int32) if config.mean else None,
        weighted=jnp.zeros(column, dtype) if config.expected else None,
        argmax=jnp.zeros(column, jnp.int32) if config.argmax else None,
        rest=jnp.zeros(column, dtype) if config.rest else None,
    )


def merge(tau: float | jax.Array, running: Running, tile: Tile) -> Running:
    """Merges a tile of logits into the running statistics."""
    u = tile.logits
    new = jnp.maximum(running.max, jnp.max(u, axis=1, keepdims=True))
    # A row without any kept class so far is centred on 0: all its c are -inf.
    peak = jnp.where(new == -jnp.inf, 0, new)
    c = divide_by_temperature(u, peak, tau)
    weights = jnp.exp(c)
    back = divide_by_temperature(running.max, peak, tau)
    rescale = jnp.exp(back)
    _, _, label, gap, number, weighted, argmax, rest = running
    if tile.labels is not None and label is not None:
        label = jnp.maximum(label, tile.pick())
    if gap is not None and number is not None:
        kept = u != -jnp.inf
        moved = jnp.where(number == 0, 0, running.max - peak)
        gap = gap + number.astype(u.dtype) * moved
        gap += jnp.sum(jnp.where(kept, u - peak, 0), axis=1, keepdims=True)
        number += jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
    if weighted is not None:
        moved = jnp.where(rescale == 0, 0, back)
        weighted = rescale * (weighted + running.sum * moved)
        weighted += jnp.sum(times(weights, c), axis=1, keepdims=True)
    if argmax is not None:
        best = tile.start + lax.argmax(u, 1, jnp.int32)[:, None]
        argmax = jnp.where(new > running.max, best, argmax)
    if rest is not None:
        others = tile.without_labels(weights)
        rest = rescale * rest + jnp.sum(others, axis=1, keepdims=True)
    total = rescale * running.sum + jnp.sum(weights, axis=1, keepdims=True)
    return Running(new, total, label, gap, number, weighted, argmax, rest)


def join(tau: float | jax.Array, parts: Running) -> Running:
    """Merges the statistics of rows in P parts of the classes, [P, R, 1] each.

    Args:
      tau: the temperature, a float or [R, 1].
      parts: the statistics, of parts in the order of their classes.

    Returns:
      The statistics in all classes.
    """
    largest = jnp.max(parts.max, axis=0)
    peak = jnp.where(largest == -jnp.inf, 0, largest)[None]
    tau = tau[None] if isinstance(tau, jax.Array) else tau
    back = divide_by_temperature(parts.max, peak, tau)
    rescale = jnp.exp(back)
    _, total, label, gap, number, weighted, argmax, rest = parts
    if label is not None:
        label = jnp.max(label, axis=0)
    if gap is not None and number is not None:
        moved = jnp.where(number == 0, 0, parts.max - peak)
        gap = jnp.sum(gap + number.astype(gap.dtype) * moved, axis=0)
        number = jnp.sum(number, axis=0)
    if weighted is not None:
        moved = jnp.where(rescale == 0, 0, back)
        weighted = jnp.sum(rescale * (weighted + total * moved), axis=0)
    if argmax is not None:
        none = jnp.iinfo(jnp.int32).max
        argmax = jnp.min(jnp.where(parts.max == largest[None], argmax, none), axis=0)
        # NaN logits equal no maximum.
        argmax = jnp.where(argmax == none, 0, argmax)
    if rest is not None:
        rest = jnp.sum(rescale * rest, axis=0)
    total = jnp.sum(rescale * total, axis=0)
    return Running(largest, total, label, gap, number, weighted, argmax, rest)


def finish(config: Config, operands: Operands, running: Running) -> Saved:
    """Turns running statistics into fields and what belongs to them.

    Where the classes are sharded this is where the shards meet: one maximum, and one
    sum of all that adds up.
    """
    tau = operands.temperature(config)
    axes = config.vocab_axes
    largest = sharding.maximum(running.max, axes)
    empty = largest == -jnp.inf
    peak = jnp.where(empty, 0, largest)
    back = divide_by_temperature(running.max, peak, tau)
    rescale = jnp.exp(back)
    classes = sharding.num_classes(config, operands)
    sums = {"total": rescale * running.sum}
    if running.label is not None:
        label = divide_by_temperature(running.label, peak, tau)
        if axes and operands.labels is not None:
            label = jnp.where(operands.labels >= 0, label, 0)
        sums["label"] = label
    if running.gap is not None and running.number is not None:
        number = running.number.astype(running.gap.dtype)
        moved = jnp.where(number == 0, 0, running.max - peak)
        gap = running.gap + number * moved
        # Divided by V first: the sum itself may be too large to divide by τ.
        sums["number"] = number
        sums["gap"] = over_temperature(gap / classes, tau)
    if running.weighted is not None:
        moved = jnp.where(rescale == 0, 0, back)
        sums["weighted"] = rescale * (running.weighted + running.sum * moved)
    if running.rest is not None:
        sums["rest"] = rescale * running.rest
    sums = sharding.add(sums, axes)
    total = jnp.where(empty, 1, sums["total"])
    mean = expected = argmax = number = None
    if running.gap is not None:
        number = jnp.maximum(sums["number"], 1)[:, 0]
        mean = sums["gap"][:, 0] * (classes / number)
    if running.weighted is not None:
        expected = (sums["weighted"] / total)[:, 0]
    if running.argmax is not None:
        argmax = sharding.lowest_argmax(config, operands, running, largest)[:, 0]
    total = total[:, 0]
    rest = sums["rest"][:, 0] if config.rest else None
    fields = Fields(
        largest[:, 0],
        jnp.log(total),
        sums.get("label"),
        mean,
        expected,
        argmax,
        None if rest is None else jnp.log(rest),
    )
    return Saved(fields, total, number, rest)
