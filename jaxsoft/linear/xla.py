"""Statistics of `hidden @ kernel`, tile by tile, in plain XLA.

Two nested loops run over blocks of rows and of classes. A tile of the kernel is a
slice in place; its logits live in one buffer of the tile's size, and are merged into
running statistics of their rows: 2·N·H·V flops, one read of the kernel for each block
of rows. `xla_backward.py` has the derivative.

Where the last block would stick out it starts earlier instead, and what it covers a
second time is left out: no operand is padded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.dtypes import compute_dtype
from jaxsoft.linear import tiling, varying
from jaxsoft.linear.operands import Config, Fields, Operands
from jaxsoft.temperature import divide_by_temperature, over_temperature, times

__all__ = [
    "Tile",
    "compute_tile",
    "dot",
    "forward",
    "slice_or_none",
    "slice_rows",
    "tiles_of",
]


class Tile(NamedTuple):
    """One tile of logits.

    Attributes:
      kernel: the slice of the kernel, in the dtype of the matrix products.
      logits: [R, B] u, with -inf at masked classes and at those covered before.
      masked: whether some logits can be -inf on purpose.
      is_label: [R, B] whether the class is the row's label; None without labels.
      slope: [R, B] derivative of the soft-cap; None without one.
    """

    kernel: jax.Array
    logits: jax.Array
    masked: bool
    is_label: jax.Array | None
    slope: jax.Array | None


class _Running(NamedTuple):
    """Running statistics of R rows, [R, 1] each.

    Attributes:
      max: m so far, -inf before the first kept class.
      sum: Σ exp(c).
      label: the logit of the label, not centred; -inf before it was met.
      gap: Σ (u - m) over kept classes, not divided.
      number: how many classes were kept, int32.
      weighted: Σ exp(c) c.
      argmax: int32.
    """

    max: jax.Array
    sum: jax.Array
    label: jax.Array | None
    gap: jax.Array | None
    number: jax.Array | None
    weighted: jax.Array | None
    argmax: jax.Array | None


def tiles_of(config: Config, operands: Operands) -> tiling.Tiling:
    """Returns the tiles of a call."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    return tiling.choose(
        operands.hidden.shape[0],
        operands.num_classes(config),
        dtype.itemsize,
        config.tile_bytes,
    )


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], config, dtype):
    """Contracts one axis of each matrix, accumulating in `dtype`."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=config.precision,
        preferred_element_type=dtype,
    )


def slice_rows(operands: Operands, start: jax.Array, rows: int) -> Operands:
    """Returns the operands of `rows` rows from `start`."""
    return operands._replace(
        hidden=lax.dynamic_slice_in_dim(operands.hidden, start, rows),
        tau=slice_or_none(operands.tau, start, rows),
        labels=slice_or_none(operands.labels, start, rows),
    )


def slice_or_none(array: Any, start: jax.Array, size: int) -> Any:
    """Returns `size` rows from `start`, or None for None."""
    return None if array is None else lax.dynamic_slice_in_dim(array, start, size)


def compute_tile(
    config: Config, operands: Operands, tiles: tiling.Tiling, index
) -> Tile:
    """Computes tile `index` of the classes for the rows in `operands`."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    size = tiles.block_classes
    first = index * size
    start = jnp.minimum(first, tiles.classes - size)
    kernel = lax.dynamic_slice_in_dim(operands.kernel, start, size, config.class_axis)
    operand_dtype = operands.matmul_dtype()
    kernel = kernel.astype(operand_dtype)
    hidden = operands.hidden.astype(operand_dtype)
    u = dot(hidden, kernel, (1, 1 - config.class_axis), config, dtype)
    bias = None
    if operands.bias is not None:
        bias = slice_or_none(operands.bias, start, size).astype(dtype)[None]
        u = u + bias
    slope = None
    if config.softcap is not None:
        bent = jnp.tanh(u / config.softcap)
        # From the tanh itself: the rounded u would cost digits where it saturates.
        slope = 1 - bent * bent
        u = config.softcap * bent
        if bias is not None:
            # The cap would lift the -inf of a masked class.
            u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
    masked = operands.bias is not None
    if operands.class_mask is not None:
        u = jnp.where(
            slice_or_none(operands.class_mask, start, size)[None], u, -jnp.inf
        )
        masked = True
    classes = start + lax.iota(jnp.int32, size)
    fresh = None
    if tiles.classes_overlap:
        fresh = classes >= first
        u = jnp.where(fresh[None], u, -jnp.inf)
        masked = True
    is_label = None
    if operands.labels is not None:
        labels = operands.labels
        if fresh is not None:
            labels = jnp.where(labels >= first, labels, -1)
        is_label = classes[None] == labels[:, None]
    return Tile(kernel, u, masked, is_label, slope)


def forward(config: Config, operands: Operands) -> tuple[Fields, jax.Array]:
    """Returns the statistics of every row.

    Args:
      config: what is known at trace time.
      operands: the arrays.

    Returns:
      The wanted fields, [N] each, and Σ exp(c) [N], whose logarithm has fewer digits.
    """
    tiles = tiles_of(config, operands)
    if tiles.row_blocks == 1:
        return _forward_rows(config, operands, tiles)

    def block(index):
        start = jnp.minimum(index * tiles.block_rows, tiles.rows - tiles.block_rows)
        part = slice_rows(operands, start, tiles.block_rows)
        return _forward_rows(config, part, tiles)

    blocks = lax.map(block, jnp.arange(tiles.row_blocks))
    return jax.tree.map(lambda field: _join_rows(field, tiles), blocks)


def _join_rows(blocks: jax.Array, tiles: tiling.Tiling) -> jax.Array:
    """Returns [N] from [blocks, R], leaving out what the last block repeats."""
    again = tiles.row_blocks * tiles.block_rows - tiles.rows
    return jnp.concatenate([blocks[:-1].reshape(-1), blocks[-1, again:]])


def _forward_rows(config: Config, operands: Operands, tiles: tiling.Tiling):
    """Returns the statistics of one block of rows."""
    rows = operands.hidden.shape[0]
    dtype = compute_dtype(operands.hidden, operands.kernel)
    column = (rows, 1)
    start = _Running(
        max=jnp.full(column, -jnp.inf, dtype),
        sum=jnp.zeros(column, dtype),
        label=None if operands.labels is None else jnp.full(column, -jnp.inf, dtype),
        gap=jnp.zeros(column, dtype) if config.mean else None,
        number=jnp.zeros(column, jnp.int32) if config.mean else None,
        weighted=jnp.zeros(column, dtype) if config.expected else None,
        argmax=jnp.zeros(column, jnp.int32) if config.argmax else None,
    )

    def step(index, running):
        tile = compute_tile(config, operands, tiles, index)
        return _merge(config, operands, tiles, running, tile, index)

    running = lax.fori_loop(0, tiles.class_blocks, step, varying.like(start, operands))
    return _finish(config, operands, running)


def _merge(config, operands, tiles, running: _Running, tile: Tile, index) -> _Running:
    """Merges a tile of logits into the running statistics."""
    u, tau = tile.logits, operands.temperature(config)
    new = jnp.maximum(running.max, jnp.max(u, axis=1, keepdims=True))
    # A row without any kept class so far is centred on 0: all its c are -inf.
    peak = jnp.where(new == -jnp.inf, 0, new)
    c = divide_by_temperature(u, peak, tau)
    weights = jnp.exp(c)
    back = divide_by_temperature(running.max, peak, tau)
    rescale = jnp.exp(back)
    _, _, label, gap, number, weighted, argmax = running
    if tile.is_label is not None and label is not None:
        here = jnp.max(jnp.where(tile.is_label, u, -jnp.inf), axis=1, keepdims=True)
        label = jnp.maximum(label, here)
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
        start = jnp.minimum(
            index * tiles.block_classes, tiles.classes - tiles.block_classes
        )
        best = start + lax.argmax(u, 1, jnp.int32)[:, None]
        argmax = jnp.where(new > running.max, best, argmax)
    total = rescale * running.sum + jnp.sum(weights, axis=1, keepdims=True)
    return _Running(new, total, label, gap, number, weighted, argmax)


def _finish(config: Config, operands: Operands, running: _Running):
    """Turns running statistics into fields and the sum of exponentials."""
    tau = operands.temperature(config)
    empty = running.max == -jnp.inf
    total = jnp.where(empty, 1, running.sum)
    label = mean = expected = argmax = None
    peak = jnp.where(empty, 0, running.max)
    if running.label is not None:
        label = divide_by_temperature(running.label, peak, tau)[:, 0]
    if running.gap is not None and running.number is not None:
        number = jnp.maximum(running.number, 1).astype(running.gap.dtype)
        mean = over_temperature(running.gap / number, tau)[:, 0]
    if running.weighted is not None:
        expected = (running.weighted / total)[:, 0]
    if running.argmax is not None:
        argmax = running.argmax[:, 0]
    total = total[:, 0]
    fields = Fields(running.max[:, 0], jnp.log(total), label, mean, expected, argmax)
    return fields, total
