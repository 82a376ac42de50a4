"""Statistics of `hidden @ kernel`, tile by tile, in plain XLA.

Two nested loops run over blocks of rows and of classes. A tile of the kernel is a
slice in place; its logits live in one buffer of the tile's size, and are merged into
running statistics of their rows: 2·N·H·V flops, one read of the kernel for each block
of rows. `xla_backward.py` has the derivative.

Where the last block would stick out it starts earlier instead, and what it covers a
second time is left out: no operand is padded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.dtypes import compute_dtype
from jaxsoft.linear import running, sharding, tiling
from jaxsoft.linear.operands import Config, Operands
from jaxsoft.linear.running import Saved
from jaxsoft.linear.tile import Tile, capped, columns_of, scatter

__all__ = [
    "compute_tile",
    "dot",
    "fold",
    "forward",
    "slice_rows",
    "tiles_of",
]


def tiles_of(config: Config, operands: Operands, multiple: int = 1) -> tiling.Tiling:
    """Returns the tiles of a call; see `tiling.choose` for `multiple`."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    return tiling.choose(
        operands.hidden.shape[0],
        operands.num_classes(config),
        dtype.itemsize,
        config.tile_bytes,
        multiple,
        max(operands.hidden.shape[1], 1) * operands.matmul_dtype().itemsize,
    )


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision, dtype):
    """Contracts one axis of each matrix, accumulating in `dtype`."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )


def slice_rows(tree: Any, start: jax.Array, rows: int) -> Any:
    """Returns rows from `start` of every array, of `Operands` where they have rows."""

    def cut(node):
        if not isinstance(node, Operands):
            return lax.dynamic_slice_in_dim(node, start, rows)
        parts = (node.hidden, node.tau, node.labels, node.excluded)
        hidden, tau, labels, excluded = jax.tree.map(cut, parts)
        return node._replace(hidden=hidden, tau=tau, labels=labels, excluded=excluded)

    return jax.tree.map(cut, tree, is_leaf=lambda node: isinstance(node, Operands))


def compute_tile(
    config: Config,
    operands: Operands,
    tiles: tiling.Tiling,
    index: Any,
    shift: jax.Array | int = 0,
) -> Tile:
    """Computes tile `index` of the classes for the rows in `operands`.

    The tile is responsible for `block_classes` classes from `index · block_classes -
    shift`; where its slice of the kernel would stick out it starts elsewhere, and the
    classes of other tiles have logit -inf.
    """
    size = tiles.block_classes
    first = index * size - shift
    start = jnp.clip(first, 0, tiles.classes - size)
    kernel, u, slope = _logits(config, operands, start, size)
    masked = operands.bias is not None
    if operands.class_mask is not None:
        mask = lax.dynamic_slice_in_dim(operands.class_mask, start, size)
        u = jnp.where(mask[None], u, -jnp.inf)
        masked = True
    classes = start + lax.iota(jnp.int32, size)
    ours = None
    if tiles.classes_overlap or not isinstance(shift, int):
        ours = (classes >= first) & (classes < first + size)
        u = jnp.where(ours[None], u, -jnp.inf)
        masked = True
    if operands.excluded is not None:
        dropped = columns_of(operands.excluded, start, size)
        u = scatter(u, dropped, "set", -jnp.inf)
        masked = True
    labels = None
    if operands.labels is not None:
        labels = columns_of(operands.labels, start, size)
        if ours is not None:
            inside = (operands.labels >= first) & (operands.labels < first + size)
            labels = jnp.where(inside, labels, -1)
    return Tile(start, kernel, u, masked, labels, slope)


def _logits(config: Config, operands: Operands, start, size: int) -> tuple:
    """Returns a slice of the kernel, its logits [R, size] and the soft-cap's slope."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    kernel = lax.dynamic_slice_in_dim(operands.kernel, start, size, config.class_axis)
    operand_dtype = operands.matmul_dtype()
    kernel = kernel.astype(operand_dtype)
    hidden = operands.hidden.astype(operand_dtype)
    u = dot(hidden, kernel, (1, 1 - config.class_axis), config.precision, dtype)
    bias = None
    if operands.bias is not None:
        bias = lax.dynamic_slice_in_dim(operands.bias, start, size)
        bias = bias.astype(dtype)[None]
    return kernel, *capped(u, bias, config.softcap)


def fold(
    config: Config,
    operands: Operands,
    start: Callable[[int], Any],
    step: Callable[..., Any],
    rows: Any = None,
    tiles: tiling.Tiling | None = None,
) -> Any:
    """Folds all tiles of every row into a carry.

    Args:
      config: what is known at trace time.
      operands: the arrays.
      start: gives the carry of R rows before the first tile: a pytree of arrays whose
        first axis is R.
      step: gives the next carry from the operands of R rows, their part of `rows`, the
        index of the tile and the carry.
      rows: further arrays whose first axis is N.
      tiles: the tiles, if not those of `tiles_of`.

    Returns:
      The carry of all N rows.
    """
    plan = tiles_of(config, operands) if tiles is None else tiles

    def run(part, more):
        carry = mesh_axes.like(start(part.hidden.shape[0]), (part, more))
        body = lambda index, carry: step(part, more, index, carry)  # noqa: E731
        return lax.fori_loop(0, plan.class_blocks, body, carry)

    if plan.row_blocks == 1:
        return run(operands, rows)

    def block(index):
        first = jnp.minimum(index * plan.block_rows, plan.rows - plan.block_rows)
        return run(*slice_all(first))

    def slice_all(first):
        size = plan.block_rows
        return slice_rows(operands, first, size), slice_rows(rows, first, size)

    blocks = lax.map(block, jnp.arange(plan.row_blocks))
    return jax.tree.map(lambda carry: _join_rows(carry, plan), blocks)


def _join_rows(blocks: jax.Array, tiles: tiling.Tiling) -> jax.Array:
    """Returns [N, …] from [blocks, R, …], without what the last block repeats."""
    again = tiles.row_blocks * tiles.block_rows - tiles.rows
    rows = blocks[:-1].reshape((-1, *blocks.shape[2:]))
    return jnp.concatenate([rows, blocks[-1, again:]])


def forward(config: Config, operands: Operands) -> Saved:
    """Returns the statistics of every row.

    Args:
      config: what is known at trace time.
      operands: the arrays.

    Returns:
      The wanted fields, and what their derivative needs beside them.
    """
    dtype = compute_dtype(operands.hidden, operands.kernel)
    local = sharding.local_classes(config, operands)
    tiles = tiles_of(config, local)

    labels = None if local.labels is None else local.labels.shape[1]

    def step(part, _, index, statistics):
        tile = compute_tile(config, part, tiles, index)
        return running.merge(part.temperature(config), statistics, tile)

    def start(rows):
        return running.start(config, rows, labels, dtype)

    return running.finish(config, local, fold(config, local, start, step))
