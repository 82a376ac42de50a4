"""Statistics of `hidden @ kernel`, tile by tile, in plain XLA.

Two nested loops run over blocks of rows and of classes. A tile of the kernel is a
slice in place; its logits live in one buffer of the tile's size, and are merged into
running statistics of their rows: 2·N·H·V flops, one read of the kernel for each block
of rows. `xla_backward.py` has the derivative.

Where the last block would stick out it starts earlier instead, and what it covers a
second time is left out: no operand is padded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft import varying
from jaxsoft.dtypes import compute_dtype
from jaxsoft.linear import sharding, tiling
from jaxsoft.linear.operands import Config, Fields, Operands
from jaxsoft.temperature import divide_by_temperature, over_temperature, times

__all__ = [
    "Saved",
    "Tile",
    "compute_tile",
    "dot",
    "fold",
    "forward",
    "slice_rows",
    "tiles_of",
]


class Tile(NamedTuple):
    """One tile of logits.

    Attributes:
      start: the first class of the slice of the kernel.
      kernel: the slice of the kernel, in the dtype of the matrix products.
      logits: [R, B] u, with -inf at dropped classes and at those of other tiles.
      masked: whether some logits can be -inf on purpose.
      labels: [R, K] the labels' columns in this tile, -1 for none; None without
        labels.
      slope: [R, B] derivative of the soft-cap; None without one.
    """

    start: jax.Array
    kernel: jax.Array
    logits: jax.Array
    masked: bool
    labels: jax.Array | None
    slope: jax.Array | None

    def pick(self) -> jax.Array:
        """Returns the labels' logits, [R, K]; -inf for labels of other tiles."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            picked = jnp.where(self._is_label(), self.logits, -jnp.inf)
            return jnp.max(picked, axis=1, keepdims=True)
        columns = jnp.maximum(self.labels, 0)
        picked = jnp.take_along_axis(self.logits, columns, axis=1, mode="clip")
        return jnp.where(self.labels >= 0, picked, -jnp.inf)

    def place(self, values: jax.Array) -> jax.Array:
        """Returns [R, B] with values [R, K] added at the labels that are kept."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            here = self._is_label()
            if self.masked:
                here = here & (self.logits != -jnp.inf)
            return jnp.where(here, values, 0)
        placed = _scatter(jnp.zeros_like(self.logits), self.labels, "add", values)
        return jnp.where(self.logits == -jnp.inf, 0, placed) if self.masked else placed

    def without_labels(self, values: jax.Array) -> jax.Array:
        """Returns values [R, B] with 0 at the labels."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            return jnp.where(self._is_label(), 0, values)
        return _scatter(values, self.labels, "set", 0)

    def _is_label(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, self.logits.shape, 1) == self.labels


class _Running(NamedTuple):
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


def tiles_of(config: Config, operands: Operands, multiple: int = 1) -> tiling.Tiling:
    """Returns the tiles of a call; see `tiling.choose` for `multiple`."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    return tiling.choose(
        operands.hidden.shape[0],
        operands.num_classes(config),
        dtype.itemsize,
        config.tile_bytes,
        multiple,
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
        columns = _columns(operands.excluded, start, size)
        u = _scatter(u, columns, "set", -jnp.inf)
        masked = True
    labels = None
    if operands.labels is not None:
        labels = _columns(operands.labels, start, size)
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
        u = u + bias
    if config.softcap is None:
        return kernel, u, None
    bent = jnp.tanh(u / config.softcap)
    u = config.softcap * bent
    if bias is not None:
        # The cap would lift the -inf of a masked class.
        u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
    # From the tanh itself: the rounded u would cost digits where it saturates.
    return kernel, u, 1 - bent * bent


def _columns(classes: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns the columns of classes in a tile from `start`, -1 for those outside."""
    columns = classes - start
    return jnp.where((classes >= start) & (columns < size), columns, -1)


def _scatter(array: jax.Array, columns: jax.Array, how: str, values) -> jax.Array:
    """Sets or adds values [R, K] at columns of array [R, B]; -1 is left out."""
    rows = lax.broadcasted_iota(jnp.int32, columns.shape, 0)
    columns = jnp.where(columns < 0, array.shape[1], columns)
    return getattr(array.at[rows, columns], how)(values, mode="drop")


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
        carry = varying.like(start(part.hidden.shape[0]), (part, more))
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

    def start(rows):
        column = (rows, 1)
        labels = local.labels
        return _Running(
            max=jnp.full(column, -jnp.inf, dtype),
            sum=jnp.zeros(column, dtype),
            label=None
            if labels is None
            else jnp.full((rows, labels.shape[1]), -jnp.inf, dtype),
            gap=jnp.zeros(column, dtype) if config.mean else None,
            number=jnp.zeros(column, jnp.int32) if config.mean else None,
            weighted=jnp.zeros(column, dtype) if config.expected else None,
            argmax=jnp.zeros(column, jnp.int32) if config.argmax else None,
            rest=jnp.zeros(column, dtype) if config.rest else None,
        )

    def step(part, _, index, running):
        tile = compute_tile(config, part, tiles, index)
        return _merge(config, part, running, tile)

    return _finish(config, local, fold(config, local, start, step))


def _merge(config, operands, running: _Running, tile: Tile) -> _Running:
    """Merges a tile of logits into the running statistics."""
    u, tau = tile.logits, operands.temperature(config)
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
    return _Running(new, total, label, gap, number, weighted, argmax, rest)


def _finish(config: Config, operands: Operands, running: _Running) -> Saved:
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
