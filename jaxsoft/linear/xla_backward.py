"""The derivative of what is folded over the tiles of `hidden @ kernel`, in plain XLA.

The tiles are computed again, turned into the derivative by the logits in the dtype of
the operands, and multiplied twice (6·N·H·V flops in all): into a float32 sum for the
rows, and into a tile of dkernel, which is written once, in its own dtype. For the
statistics one pass serves every loss, because every derivative by a logit has the same
form (`_Rows`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft import varying
from jaxsoft.dtypes import compute_dtype
from jaxsoft.linear import sharding, tiling
from jaxsoft.linear.operands import Config, Operands
from jaxsoft.linear.xla import Saved, Tile, compute_tile, dot, slice_rows, tiles_of
from jaxsoft.temperature import divide_by_temperature, finite, inverse, times

__all__ = ["Cotangents", "Gradients", "Share", "Wanted", "accumulate", "backward"]


class Cotangents(NamedTuple):
    """Cotangents of the fields that have one; None where they vanish.

    All but `label` [N, K] are [N].
    """

    log_sum: jax.Array | None
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None
    rest: jax.Array | None


class Wanted(NamedTuple):
    """Which cotangents of operands to compute."""

    hidden: bool
    kernel: bool
    bias: bool
    tau: bool
    values: bool = False

    @classmethod
    def of(cls, moving: Operands, values: Any = False) -> "Wanted":
        """Returns what is wanted where some operands, and maybe values, move."""
        floats = (moving.hidden, moving.kernel, moving.bias, moving.tau, values)
        return cls._make(map(bool, floats))

    def roles(self, config: Config) -> "Gradients":
        """The roles of the gradients; see `operands.py`."""
        roles = ("nh", config.kernel_layout, "v", "n", "vd")
        pairs = zip(self, roles, strict=True)
        return Gradients._make(role if wanted else None for wanted, role in pairs)


class Gradients(NamedTuple):
    """Cotangents of the operands; None where not wanted.

    Attributes:
      hidden: [N, H] in the dtype of `hidden`.
      kernel: in the shape and dtype of `kernel`.
      bias: [V] in the dtype of `bias`.
      tau: [N].
      values: in the shape and dtype of an array [V, D] that is mixed.
    """

    hidden: Any
    kernel: Any
    bias: Any
    tau: Any
    values: Any = None

    def of_operands(self) -> Operands:
        """Returns the cotangents in the places of their operands."""
        return Operands(
            self.hidden, self.kernel, self.bias, self.tau, labels=None, class_mask=None
        )


class Share(NamedTuple):
    """What a tile of R rows and B classes contributes to the gradients.

    Attributes:
      logits: [R, B], by the logits u after the soft-cap.
      moments: [R, M], sums over the classes, for the temperature; None if not wanted.
      mix: weights [R, B] and rows [R, D] whose product, summed over R, is the gradient
        of the tile's values; None if not wanted.
    """

    logits: jax.Array
    moments: jax.Array | None
    mix: tuple[jax.Array, jax.Array] | None = None


class _Rows(NamedTuple):
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
      saved: what `xla.forward` returned.
      cotangents: the cotangents of the fields.
      wanted: which gradients to compute.

    Returns:
      The wanted gradients; a gradient that is not wanted costs nothing. With sharded
      classes those of `hidden` and `tau` are this shard's part of a sum.
    """
    fields = saved.fields
    operands = sharding.local_classes(config, operands)
    rows = _Rows(
        fields.max, 1 / saved.total, *_coefficients(config, operands, saved, cotangents)
    )

    def share(part, part_rows, tile, _):
        return _statistics_share(config, part, part_rows, tile, wanted.tau)

    number = 2 if cotangents.rest is None else 3
    gradients, moments = accumulate(
        config, operands, wanted, share, rows, moments=number
    )
    if moments is not None:
        tau = _tau_cotangent(config, operands, saved, cotangents, moments)
        gradients = gradients._replace(tau=tau)
    return gradients


def _coefficients(config, operands, saved, cotangents: Cotangents):
    """Returns the last five fields of `_Rows`."""
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


def accumulate(
    config: Config,
    operands: Operands,
    wanted: Wanted,
    share: Callable[..., Share],
    rows: Any,
    *,
    moments: int = 1,
    values: jax.Array | None = None,
    tiles: tiling.Tiling | None = None,
) -> tuple[Gradients, jax.Array | None]:
    """Adds up what tiles contribute to gradients.

    Args:
      config: what is known at trace time.
      operands: the arrays, their classes those of this shard.
      wanted: which gradients to compute.
      share: gives a tile's contribution from the operands of R rows, their part of
        `rows`, the tile and its index.
      rows: further arrays whose first axis is N.
      moments: M, how many sums over classes the temperature's gradient needs.
      values: an array like the gradient `values`.
      tiles: the tiles, if not those of `tiles_of`.

    Returns:
      The gradients but `tau`, and the moments [N, M], None if not wanted.
    """
    plan = tiles_of(config, operands) if tiles is None else tiles
    dtype = compute_dtype(operands.hidden, operands.kernel)
    count = operands.hidden.shape[0]
    sums = _Sums(
        jnp.zeros(operands.hidden.shape, dtype) if wanted.hidden else None,
        jnp.zeros_like(operands.kernel) if wanted.kernel else None,
        None
        if operands.bias is None or not wanted.bias
        else jnp.zeros_like(operands.bias),
        jnp.zeros((count, moments), dtype) if wanted.tau else None,
        jnp.zeros_like(values) if wanted.values and values is not None else None,
    )

    def step(index, sums):
        return _accumulate_classes(config, operands, share, rows, plan, index, sums)

    start = varying.like(sums, (operands, rows))
    sums = lax.fori_loop(0, plan.class_blocks, step, start)
    hidden = sums.hidden
    if hidden is not None:
        hidden = hidden.astype(operands.hidden.dtype)
    return Gradients(hidden, sums.kernel, sums.bias, None, sums.values), sums.moments


class _Sums(NamedTuple):
    """Gradients as they grow; `hidden` and `moments` in the dtype of the statistics."""

    hidden: jax.Array | None
    kernel: jax.Array | None
    bias: jax.Array | None
    moments: jax.Array | None
    values: jax.Array | None


def _accumulate_classes(config, operands, share, rows, tiles, index, sums: _Sums):
    """Adds the tile `index` of classes, of every block of rows, to the gradients."""
    size, axis = tiles.block_classes, config.class_axis
    first = index * size
    start = jnp.minimum(first, tiles.classes - size)
    dtype = compute_dtype(operands.hidden, operands.kernel)
    features = operands.hidden.shape[1]
    shape = (features, size) if axis == 1 else (size, features)
    of_tile = _Sums(
        sums.hidden,
        None if sums.kernel is None else jnp.zeros(shape, dtype),
        None if sums.bias is None else jnp.zeros(size, dtype),
        sums.moments,
        None
        if sums.values is None
        else jnp.zeros((size, *sums.values.shape[1:]), dtype),
    )

    def rows_step(block, of_tile):
        row = block * tiles.block_rows
        row_start = jnp.minimum(row, tiles.rows - tiles.block_rows)
        part, part_rows = operands, rows
        if tiles.row_blocks > 1:
            part, part_rows = (
                slice_rows(tree, row_start, tiles.block_rows) for tree in (part, rows)
            )
        tile = compute_tile(config, part, tiles, index)
        d, moments, mix = share(part, part_rows, tile, index)
        if tile.slope is not None:
            d = d * tile.slope
        if tiles.rows_overlap:
            fresh = (row_start + lax.iota(jnp.int32, tiles.block_rows) >= row)[:, None]
            d = jnp.where(fresh, d, 0)
            moments = None if moments is None else jnp.where(fresh, moments, 0)
            mix = None if mix is None else (mix[0], jnp.where(fresh, mix[1], 0))
        return _add(config, part, tiles, row_start, of_tile, tile, d, moments, mix)

    if tiles.row_blocks == 1:
        of_tile = rows_step(0, of_tile)
    else:
        of_tile = varying.like(of_tile, (operands, rows))
        of_tile = lax.fori_loop(0, tiles.row_blocks, rows_step, of_tile)
    fresh = start + lax.iota(jnp.int32, size) >= first

    def write(total, tile, axis):
        return None if total is None else _write(total, tile, start, axis, fresh, tiles)

    return _Sums(
        of_tile.hidden,
        write(sums.kernel, of_tile.kernel, axis),
        write(sums.bias, of_tile.bias, 0),
        of_tile.moments,
        write(sums.values, of_tile.values, 0),
    )


def _add(config, part, tiles, row_start, sums: _Sums, tile, d, moments, mix):
    """Adds a block of rows to the gradients of one tile of classes."""
    dtype, axis = d.dtype, config.class_axis
    hidden, kernel, bias, all_moments, all_values = sums
    if bias is not None:
        bias = bias + jnp.sum(d, axis=0)
    d = d.astype(part.matmul_dtype())
    if hidden is not None:
        new = dot(d, tile.kernel, (1, axis), config.precision, dtype)
        hidden = _add_rows(hidden, new, row_start, tiles)
    if kernel is not None:
        rows = part.hidden.astype(part.matmul_dtype())
        pair = (rows, d) if axis == 1 else (d, rows)
        new = dot(*pair, (0, 0), config.precision, dtype)
        kernel = new if tiles.row_blocks == 1 else kernel + new
    if all_moments is not None:
        all_moments = _add_rows(all_moments, moments, row_start, tiles)
    if all_values is not None:
        weights, of_rows = mix
        weights = weights.astype(of_rows.dtype)
        all_values += dot(weights, of_rows, (0, 0), config.precision, dtype)
    return _Sums(hidden, kernel, bias, all_moments, all_values)


def _add_rows(total: jax.Array, new: jax.Array, start, tiles: tiling.Tiling):
    """Adds a block of rows to a sum over tiles."""
    if tiles.row_blocks == 1:
        return total + new
    old = lax.dynamic_slice_in_dim(total, start, new.shape[0])
    return lax.dynamic_update_slice_in_dim(total, old + new, start, 0)


def _write(total, tile, start, axis: int, fresh, tiles: tiling.Tiling):
    """Writes a tile of classes, except where it covers classes again."""
    tile = tile.astype(total.dtype)
    if tiles.classes_overlap:
        old = lax.dynamic_slice_in_dim(total, start, tile.shape[axis], axis)
        shape = [1] * tile.ndim
        shape[axis] = tile.shape[axis]
        tile = jnp.where(fresh.reshape(shape), tile, old)
    return lax.dynamic_update_slice_in_dim(total, tile, start, axis)


def _statistics_share(config, operands, rows: _Rows, tile: Tile, moments: bool):
    """Returns what a tile contributes to the derivative of the statistics."""
    label = rows.label
    rows = jax.tree.map(lambda a: a[:, None], rows._replace(label=None))
    peak = jnp.where(rows.max == -jnp.inf, 0, rows.max)
    u = tile.logits
    c = divide_by_temperature(u, peak, operands.temperature(config))
    weights = jnp.exp(c)
    p = weights * rows.inverse_total
    d = jnp.zeros_like(u)
    if rows.share is not None:
        d = p * rows.share
    if rows.slope is not None:
        d = d + times(p, c) * rows.slope
    if label is not None and tile.labels is not None:
        d = d + tile.place(label)
    if rows.kept is not None:
        d = d + (jnp.where(u == -jnp.inf, 0, rows.kept) if tile.masked else rows.kept)
    if rows.rest is not None:
        weights = tile.without_labels(weights)
        d = d + weights * rows.rest
    if not moments:
        return Share(d, None)
    pc = times(p, c)
    sums = [pc.sum(axis=1), times(pc, c).sum(axis=1)]
    if rows.rest is not None:
        sums.append(times(weights, c).sum(axis=1))
    return Share(d, jnp.stack(sums, axis=1))


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
