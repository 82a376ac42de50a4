"""The derivative of what is folded over the tiles of `hidden @ kernel`, in plain XLA.

The tiles are computed again, turned into the derivative by the logits in the dtype of
the operands, and multiplied twice (6·N·H·V flops in all): into a float32 sum for the
rows, and into a tile of dkernel, which is written once, in its own dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.dtypes import compute_dtype
from jaxsoft.linear import tiling
from jaxsoft.linear.operands import Config, Operands
from jaxsoft.linear.xla import compute_tile, dot, slice_rows, tiles_of

__all__ = ["Gradients", "Share", "Wanted", "accumulate"]


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

    start = mesh_axes.like(sums, (operands, rows))
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
        of_tile = mesh_axes.like(of_tile, (operands, rows))
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
