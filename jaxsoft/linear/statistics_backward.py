"""The derivative of the statistics, from one pass over the tiles for all losses.

Every derivative by a logit has the same form (`Rows`), so that a tile is turned into it
wherever the tile was computed; what an implementation adds is how tiles are computed
and how their contributions are added up (`accumulate`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._core.temperature import divide_by_temperature, finite, inverse, times
from jaxsoft.linear import sharding, xla_backward
from jaxsoft.linear.operands import Config, Operands
from jaxsoft.linear.running import Saved
from jaxsoft.linear.tile import Tile
from jaxsoft.linear.xla_backward import Gradients, Share, Wanted

__all__ = ["Cotangents", "Rows", "backward", "statistics_share"]


class Cotangents(NamedTuple):
    """Cotangents of the fields that have one; None where they vanish.

    All but `label` [N, K] are [N].
    """

    log_sum: jax.Array | None
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None
    rest: jax.Array | None


class Rows(NamedTuple):
    """What the derivative of the statistics needs of each row; None stands for 0.

    All but `label` [N, K] are [N]. The derivative by the logits is
    p (share + c·slope) + 1[v = label]·label + kept + 1[v ≠ label] exp(c)·rest.
    """

    max: jax.Array
    inverse_total: jax.Array
    share: jax.Array | None
    label: jax.Array | None
    kept: jax.Array | None
    slope: jax.Array | None
    rest: jax.Array | None

    def columns(self) -> "Rows":
        """The same with [N, 1] in place of [N]."""
        others = jax.tree.map(lambda a: a[:, None], self._replace(label=None))
        return others._replace(label=self.label)


def backward(
    config: Config,
    operands: Operands,
    saved: Saved,
    cotangents: Cotangents,
    wanted: Wanted,
) -> Gradients:
    """Returns the cotangents of the operands from those of the statistics.

    Args:
      config: what is known at trace time.
      operands: the arrays of the forward pass.
      saved: what `forward` returned.
      cotangents: the cotangents of the fields.
      wanted: which gradients to compute.

    Returns:
      The wanted gradients; a gradient that is not wanted costs nothing. With sharded
      classes those of `hidden` and `tau` are this shard's part of a sum.
    """
    fields = saved.fields
    operands = sharding.local_classes(config, operands)
    rows = Rows(
        fields.max, 1 / saved.total, *_coefficients(config, operands, saved, cotangents)
    )

    def share(part, part_rows, tile, _):
        columns = part_rows.columns()
        tau = part.temperature(config)
        d, moments = statistics_share(tau, columns, tile, wanted.tau)
        return Share(d, jnp.concatenate(moments, axis=1) if moments else None)

    if config.implementation == "mosaic_tpu":
        # Pallas is imported by those who use it.
        from jaxsoft.kernels.layer.mosaic_tpu import backward as mosaic_tpu_backward

        accumulated = mosaic_tpu_backward.accumulate(config, operands, wanted, rows)
    else:
        number = 2 if cotangents.rest is None else 3
        accumulated = xla_backward.accumulate(
            config, operands, wanted, share, rows, moments=number
        )
    gradients, moments = accumulated
    if moments is not None:
        tau = _tau_cotangent(config, operands, saved, cotangents, moments)
        gradients = gradients._replace(tau=tau)
    return gradients


def _coefficients(config, operands, saved, cotangents: Cotangents):
    """Returns the last five fields of `Rows`."""
    fields = saved.fields
    scale = inverse(operands.temperature(config), saved.total.dtype)
    scale = jnp.broadcast_to(scale, (operands.hidden.shape[0], 1))[:, 0]
    log_sum, label, mean, expected, rest = cotangents
    share, kept = log_sum, None
    if expected is not None:
        more = expected * (1 - fields.expected)
        share = more if share is None else share + more
    if mean is not None:
        assert saved.number is not None
        kept = mean / saved.number
    if rest is not None:
        rest = rest / _or_one(saved.rest)
    share, kept, expected, rest = (
        None if a is None else a * scale for a in (share, kept, expected, rest)
    )
    label = None if label is None else label * scale[:, None]
    return share, label, kept, expected, rest


def statistics_share(
    tau: float | jax.Array, rows: Rows, tile: Tile, moments: bool
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns what a tile contributes to the derivative of the statistics.

    Args:
      tau: the temperature, a float or [R, 1].
      rows: the columns of the rows' coefficients.
      tile: the tile.
      moments: whether the temperature's gradient is wanted.

    Returns:
      The derivative by the logits [R, B], and sums [R, 1] over the classes, none of
      them if not wanted.
    """
    peak = jnp.where(rows.max == -jnp.inf, 0, rows.max)
    u = tile.logits
    c = divide_by_temperature(u, peak, tau)
    weights = jnp.exp(c)
    p = weights * rows.inverse_total
    d = jnp.zeros_like(u)
    if rows.share is not None:
        d = p * rows.share
    if rows.slope is not None:
        d = d + times(p, c) * rows.slope
    if rows.label is not None and tile.labels is not None:
        d = d + tile.place(rows.label)
    if rows.kept is not None:
        d = d + (jnp.where(u == -jnp.inf, 0, rows.kept) if tile.masked else rows.kept)
    if rows.rest is not None:
        weights = tile.without_labels(weights)
        d = d + weights * rows.rest
    if not moments:
        return d, []
    pc = times(p, c)
    parts = [pc, times(pc, c)]
    if rows.rest is not None:
        parts.append(times(weights, c))
    return d, [part.sum(axis=1, keepdims=True) for part in parts]


def _tau_cotangent(config, operands, saved, cotangents, moments) -> jax.Array:
    """Returns the cotangent of the temperature, [N]; a shard's part of it."""
    scale = inverse(operands.temperature(config), moments.dtype)[:, 0]
    fields = saved.fields
    log_sum, label, mean, expected, rest = cotangents
    first, second = moments[:, 0], moments[:, 1]
    once = functools.partial(sharding.once, axes=config.vocab_axes)
    total = jnp.zeros_like(first)
    if log_sum is not None:
        total += log_sum * first
    if label is not None:
        total += once(jnp.sum(label * finite(fields.label), axis=1))
    if mean is not None:
        total += once(mean * finite(fields.mean))
    if expected is not None:
        # Σ p c² - (Σ p c)² + Σ p c, of which `fields` has the second factor.
        total += expected * (second - first * fields.expected + first)
    if rest is not None:
        total += rest * moments[:, 2] / _or_one(saved.rest)
    return -total * scale


def _or_one(sums: jax.Array | None) -> jax.Array:
    """Returns sums, with 1 in place of 0."""
    assert sums is not None
    return jnp.where(sums == 0, 1, sums)
