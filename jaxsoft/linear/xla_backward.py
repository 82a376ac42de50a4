"""The derivative of the statistics of `hidden @ kernel`, tile by tile, in plain XLA.

The tiles are computed again, turned into the derivative by the logits in the dtype of
the operands, and multiplied twice (6·N·H·V flops in all): into a float32 sum for the
rows, and into a tile of dkernel, which is written once, in its own dtype. One pass
serves every loss, because every derivative by a logit has the same form (`_Rows`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.dtypes import compute_dtype
from jaxsoft.linear import tiling, varying
from jaxsoft.linear.operands import Config, Fields, Operands
from jaxsoft.linear.xla import (
    Tile,
    compute_tile,
    dot,
    slice_or_none,
    slice_rows,
    tiles_of,
)
from jaxsoft.temperature import divide_by_temperature, finite, inverse, times

__all__ = ["Cotangents", "Gradients", "Wanted", "backward"]


class Cotangents(NamedTuple):
    """Cotangents of the fields that have one, [N] each; None where they vanish."""

    log_sum: jax.Array | None
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None


class Wanted(NamedTuple):
    """Which cotangents of operands to compute."""

    hidden: bool
    kernel: bool
    bias: bool
    tau: bool


class Gradients(NamedTuple):
    """Cotangents of the operands; None where not wanted.

    Attributes:
      hidden: [N, H] in the dtype of `hidden`.
      kernel: in the shape and dtype of `kernel`.
      bias: [V] in the dtype of `bias`.
      tau: [N].
    """

    hidden: jax.Array | None
    kernel: jax.Array | None
    bias: jax.Array | None
    tau: jax.Array | None


class _Rows(NamedTuple):
    """What the backward pass needs of each row, [N] each; None stands for 0.

    The derivative by the logits is p (share + c·slope) + 1[v = label]·label + kept.
    """

    max: jax.Array
    inverse_total: jax.Array
    share: jax.Array | None
    label: jax.Array | None
    kept: jax.Array | None
    slope: jax.Array | None


def backward(
    config: Config,
    operands: Operands,
    fields: Fields,
    total: jax.Array,
    cotangents: Cotangents,
    wanted: Wanted,
) -> Gradients:
    """Returns the cotangents of the operands from those of the fields.

    Args:
      config: what is known at trace time.
      operands: the arrays of the forward pass.
      fields: its results.
      total: its sums of exponentials, [N].
      cotangents: the cotangents of the fields, [N] each.
      wanted: which gradients to compute.

    Returns:
      The wanted gradients; a gradient that is not wanted costs nothing.
    """
    tiles = tiles_of(config, operands)
    dtype = compute_dtype(operands.hidden, operands.kernel)
    sums = (
        jnp.zeros(operands.hidden.shape, dtype) if wanted.hidden else None,
        jnp.zeros(operands.kernel.shape, operands.kernel.dtype)
        if wanted.kernel
        else None,
        _zeros_like(operands.bias) if wanted.bias else None,
        jnp.zeros((operands.hidden.shape[0], 2), dtype) if wanted.tau else None,
    )
    rows = _Rows(
        fields.max, 1 / total, *_coefficients(config, operands, fields, cotangents)
    )

    def step(index, sums):
        return _backward_classes(config, operands, rows, tiles, index, sums)

    dhidden, dkernel, dbias, moments = lax.fori_loop(
        0, tiles.class_blocks, step, varying.like(sums, operands)
    )
    if dhidden is not None:
        dhidden = dhidden.astype(operands.hidden.dtype)
    dtau = None
    if moments is not None:
        dtau = _tau_cotangent(config, operands, fields, cotangents, moments)
    return Gradients(dhidden, dkernel, dbias, dtau)


def _zeros_like(array: jax.Array | None) -> jax.Array:
    assert array is not None
    return jnp.zeros_like(array)


def _coefficients(config, operands, fields, cotangents: Cotangents):
    """Returns the last four fields of `_Rows`."""
    scale = inverse(operands.temperature(config), fields.log_sum.dtype)
    scale = jnp.broadcast_to(scale, (operands.hidden.shape[0], 1))[:, 0]
    log_sum, label, mean, expected = cotangents
    share, kept = log_sum, None
    if expected is not None:
        more = expected * (1 - fields.expected)
        share = more if share is None else share + more
    if mean is not None:
        kept = mean / _number_kept(config, operands)
    return [None if a is None else a * scale for a in (share, label, kept, expected)]


def _number_kept(config: Config, operands: Operands) -> jax.Array | int:
    """Returns how many classes count, at least 1."""
    kept = jnp.ones(operands.num_classes(config), jnp.bool_)
    if operands.class_mask is not None:
        kept = kept & operands.class_mask
    if operands.bias is not None:
        kept = kept & (operands.bias != -jnp.inf)
    return jnp.maximum(jnp.sum(kept), 1).astype(
        compute_dtype(operands.hidden, operands.kernel)
    )


def _backward_classes(config, operands, rows: _Rows, tiles, index, sums):
    """Adds the tile `index` of classes, of every block of rows, to the gradients."""
    dhidden, dkernel, dbias, moments = sums
    size, axis = tiles.block_classes, config.class_axis
    first = index * size
    start = jnp.minimum(first, tiles.classes - size)
    dtype = rows.max.dtype
    features = operands.hidden.shape[1]
    shape = (features, size) if axis == 1 else (size, features)
    kernel_tile = jnp.zeros(shape, dtype) if dkernel is not None else None
    bias_tile = jnp.zeros(size, dtype) if dbias is not None else None

    def rows_step(block, carry):
        dhidden, kernel_tile, bias_tile, moments = carry
        row = block * tiles.block_rows
        row_start = jnp.minimum(row, tiles.rows - tiles.block_rows)
        part, part_rows = operands, rows
        if tiles.row_blocks > 1:
            part = slice_rows(operands, row_start, tiles.block_rows)
            part_rows = jax.tree.map(
                lambda a: slice_or_none(a, row_start, tiles.block_rows), rows
            )
        fresh_rows = None
        if tiles.rows_overlap:
            fresh_rows = row_start + lax.iota(jnp.int32, tiles.block_rows) >= row
        tile = compute_tile(config, part, tiles, index)
        d, part_moments = _dlogits(config, part, part_rows, tile, moments is not None)
        if fresh_rows is not None:
            d = jnp.where(fresh_rows[:, None], d, 0)
        if bias_tile is not None:
            bias_tile = bias_tile + jnp.sum(d, axis=0)
        d = d.astype(operands.matmul_dtype())
        if dhidden is not None:
            new = dot(d, tile.kernel, (1, axis), config, dtype)
            dhidden = _add_rows(dhidden, new, row_start, tiles)
        if kernel_tile is not None:
            hidden = part.hidden.astype(operands.matmul_dtype())
            pair = (hidden, d) if axis == 1 else (d, hidden)
            new = dot(*pair, (0, 0), config, dtype)
            kernel_tile = new if tiles.row_blocks == 1 else kernel_tile + new
        if moments is not None:
            if fresh_rows is not None:
                part_moments = jnp.where(fresh_rows[:, None], part_moments, 0)
            moments = _add_rows(moments, part_moments, row_start, tiles)
        return dhidden, kernel_tile, bias_tile, moments

    carry = (dhidden, kernel_tile, bias_tile, moments)
    if tiles.row_blocks == 1:
        carry = rows_step(0, carry)
    else:
        carry = lax.fori_loop(
            0, tiles.row_blocks, rows_step, varying.like(carry, operands)
        )
    dhidden, kernel_tile, bias_tile, moments = carry
    fresh = start + lax.iota(jnp.int32, size) >= first
    if dkernel is not None:
        dkernel = _write(dkernel, kernel_tile, start, axis, fresh, tiles)
    if dbias is not None:
        dbias = _write(dbias, bias_tile, start, 0, fresh, tiles)
    return dhidden, dkernel, dbias, moments


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


def _dlogits(config, operands, rows: _Rows, tile: Tile, moments: bool) -> tuple:
    """Returns the derivative by the logits before the cap, and Σ p c and Σ p c²."""
    rows = jax.tree.map(lambda a: a[:, None], rows)
    peak = jnp.where(rows.max == -jnp.inf, 0, rows.max)
    u = tile.logits
    c = divide_by_temperature(u, peak, operands.temperature(config))
    p = jnp.exp(c) * rows.inverse_total
    d = jnp.zeros_like(u)
    if rows.share is not None:
        d = p * rows.share
    if rows.slope is not None:
        d = d + times(p, c) * rows.slope
    if rows.label is not None and tile.is_label is not None:
        picked = tile.is_label
        if tile.masked:
            picked = picked & (u != -jnp.inf)
        d = d + jnp.where(picked, rows.label, 0)
    if rows.kept is not None:
        d = d + (jnp.where(u == -jnp.inf, 0, rows.kept) if tile.masked else rows.kept)
    if tile.slope is not None:
        d = d * tile.slope
    if not moments:
        return d, None
    pc = times(p, c)
    return d, jnp.stack([pc.sum(axis=1), times(pc, c).sum(axis=1)], axis=1)


def _tau_cotangent(config, operands, fields, cotangents, moments) -> jax.Array:
    """Returns the cotangent of the temperature, [N]."""
    scale = inverse(operands.temperature(config), moments.dtype)[:, 0]
    log_sum, label, mean, expected = cotangents
    first, second = moments[:, 0], moments[:, 1]
    total = jnp.zeros_like(first)
    if log_sum is not None:
        total += log_sum * first
    if label is not None:
        total += label * finite(fields.label)
    if mean is not None:
        total += mean * finite(fields.mean)
    if expected is not None:
        total += expected * (second - first * first + first)
    return -total * scale
