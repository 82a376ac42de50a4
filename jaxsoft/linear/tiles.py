"""Tiles of the logits of `hidden @ kernel`, in plain XLA.

Two nested loops run over blocks of rows and of classes. A tile of the kernel is a
slice in place, and its logits live in one buffer of the tile's size: `fold_tiles`
merges them into a carry of their rows (2·N·H·V flops, one read of the kernel for each
block of rows), and keeps what it is asked to for the derivative.

The last block of an axis that its blocks do not divide starts earlier instead, and what
it covers a second time is left out: no operand is padded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxsoft._core import mesh_axes
from jaxsoft._core.listed import FEW, at_listed, is_listed
from jaxsoft._core.numerics import compute_dtype
from jaxsoft.linear.arguments import Config, Operands, axes_of, has_axes
from jaxsoft.linear.kept import (
    Kept,
    KeptTile,
    Place,
    loaded,
    stored,
    stored_dtype,
    tiles_in_all,
)
from jaxsoft.linear.plans import Layer, Tiling, tiling_of

__all__ = [
    "Tile",
    "capped",
    "columns_of",
    "compute_tile",
    "dot",
    "fold_tiles",
    "kernel_slice",
    "layer_of",
    "lora_slice",
    "map_rows",
    "number_slice",
    "scale_slice",
    "scatter",
    "slice_of",
    "slice_rows",
    "tiles_of",
    "tiles_of_layer",
    "turned",
    "whole_kernel",
]

Tree = TypeVar("Tree")
Carry = TypeVar("Carry")


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
      product: [R, B] of the states and the kernel, with what adapters add unless a
        scale a class multiplies it first; None for kept weights.
      peak: [R, 1] what kept weights are about. `logits` are then those weights,
        exp((u - peak) / τ); None for logits.
      is_of_xla: whether it is no tile of a kernel's.
      alike: [R, B] whether a class is of the row's group; None without groups.
      axis: of the classes in `logits`, 1; or 0 where these are [B / L, R, L], labels
        [1, R, 1], and every lane of L is merged on its own.
    """

    start: jax.Array
    kernel: jax.Array
    logits: jax.Array
    masked: bool
    labels: jax.Array | None
    slope: jax.Array | None
    product: jax.Array | None = None
    peak: jax.Array | None = None
    is_of_xla: bool = False
    alike: jax.Array | None = None
    axis: int = 1

    def by_lanes(self, lanes: int) -> "Tile":
        """Returns the tile with logits [B / L, R, L], for statistics of every lane."""
        size = self.logits.shape[1]
        parts = [self.logits[:, i : i + lanes] for i in range(0, size, lanes)]
        labels = None if self.labels is None else self.labels[None]
        return self._replace(logits=jnp.stack(parts), labels=labels, axis=0)

    def sum(self, values: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Adds up values of classes: [R, 1], or [1, R, L] for every lane."""
        return jnp.sum(values, self.axis, dtype=dtype, keepdims=True)

    def largest(self) -> jax.Array:
        """Returns the largest logits: [R, 1], or [1, R, L] for every lane."""
        return jnp.max(self.logits, self.axis, keepdims=True)

    def argmax(self) -> jax.Array:
        """Returns the lowest classes with the largest logits: [R, 1] or [1, R, L]."""
        if self.axis == 1:
            return self.start + lax.argmax(self.logits, 1, jnp.int32)[:, None]
        best = self.logits[:1]
        at = jnp.zeros(best.shape, jnp.int32)
        for index in range(1, self.logits.shape[0]):
            part = self.logits[index : index + 1]
            at = jnp.where(part > best, index, at)
            best = jnp.maximum(part, best)
        lane = lax.broadcasted_iota(jnp.int32, at.shape, 2)
        return self.start + at * at.shape[2] + lane

    def pick(self) -> jax.Array:
        """Returns the labels' logits, [R, K]; -inf for labels of other tiles."""
        assert self.labels is not None
        if self.labels.shape[-1] > 1:
            return _gathered(self.logits, self.labels)
        if self.axis == 0:
            return _selected_by_lanes(self.logits, self.labels)
        if not self.is_of_xla:
            return _selected(self.logits, self.labels)
        # A compiler for GPUs and TPUs selects in the pass that takes the maximum.
        return lax.platform_dependent(
            self.logits, self.labels, cpu=_gathered, default=_selected
        )

    def kept(self) -> jax.Array | None:
        """Returns [R, B] whether a class counts in means; None where every one does."""
        if not self.masked:
            return self.alike
        kept = self.logits != -jnp.inf
        return kept if self.alike is None else kept & self.alike

    def with_added(self, slopes: jax.Array, values: jax.Array) -> jax.Array:
        """Adds values [R, K] at the labels that are kept to slopes [R, B]."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            here = self._is_label()
            if self.masked:
                here = here & (self.logits != -jnp.inf)
            return slopes + jnp.where(here, values, 0)
        if self.labels.shape[1] > FEW:
            return self._scattered(slopes, values)
        # In a pass over all classes XLA for CPUs computes the values once a class.
        return lax.platform_dependent(
            slopes, values, cpu=self._scattered, default=self._compared
        )

    def _scattered(self, slopes: jax.Array, values: jax.Array) -> jax.Array:
        """Returns the same as `with_added`, one label after another."""
        assert self.labels is not None
        if self.masked:
            dropped = _gathered(self.logits, self.labels) == -jnp.inf
            values = jnp.where(dropped, 0, values)
        return scatter(slopes, self.labels, "add", values)

    def _compared(self, slopes: jax.Array, values: jax.Array) -> jax.Array:
        """Returns the same as `with_added`, in a pass over all classes."""
        assert self.labels is not None
        placed = at_listed(self.labels, values, self.logits.shape, 1)
        if self.masked:
            placed = jnp.where(self.logits == -jnp.inf, 0, placed)
        return slopes + placed

    def without_labels(self, values: jax.Array) -> jax.Array:
        """Returns values [R, B] with 0 at the labels."""
        assert self.labels is not None
        if self.labels.shape[-1] == 1:
            return jnp.where(self._is_label(), 0, values)
        if self.labels.shape[1] <= FEW:
            return jnp.where(is_listed(self.labels, values.shape, 1), 0, values)
        return scatter(values, self.labels, "set", 0)

    def at_label(self, label: jax.Array, values: jax.Array) -> jax.Array:
        """Returns values [R, B] with those of the one label, [R, 1], at its place."""
        return jnp.where(self._is_label(), label, values)

    def _is_label(self) -> jax.Array:
        assert self.labels is not None
        return _is_label(self.logits, self.labels)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if logits.ndim == 2:
        return lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels
    parts, lane = (lax.broadcasted_iota(jnp.int32, logits.shape, i) for i in (0, 2))
    return parts * logits.shape[2] + lane == labels


def _selected(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits at one label a row, in a pass over all of them."""
    picked = jnp.where(_is_label(logits, labels), logits, -jnp.inf)
    return jnp.max(picked, axis=1, keepdims=True)


def _selected_by_lanes(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits at one label a row, [1, R, L], -inf in all other lanes.

    A class costs one comparison with a constant; the lane is compared once.
    """
    lanes = logits.shape[2]
    picked = jnp.full((1, *logits.shape[1:]), -jnp.inf, logits.dtype)
    labels = jnp.broadcast_to(labels, picked.shape)
    # `lanes` is a power of two; kernels do not divide integers.
    part, lane = labels >> (lanes.bit_length() - 1), labels & (lanes - 1)
    for index in range(logits.shape[0]):
        picked = jnp.where(part == index, logits[index : index + 1], picked)
    here = lax.broadcasted_iota(jnp.int32, picked.shape, 2) == lane
    return jnp.where(here, picked, -jnp.inf)


def _gathered(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits at the labels."""
    columns = jnp.maximum(labels, 0)
    picked = jnp.take_along_axis(logits, columns, axis=1, mode="clip")
    return jnp.where(labels >= 0, picked, -jnp.inf)


def capped(
    u: jax.Array, bias: jax.Array | None, softcap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the logits with their bias and soft-cap, and the slope of the soft-cap.

    Args:
      u: [R, B] products.
      bias: [1, B] in the same dtype, or None.
      softcap: the cap, or None.

    Returns:
      The logits, and their derivative by what was capped, None without a soft-cap.
    """
    if bias is not None:
        u = u + bias
    if softcap is None:
        return u, None
    bent = jnp.tanh(u / softcap)
    u = softcap * bent
    if bias is not None:
        # The cap would lift the -inf of a masked class.
        u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
    # From the tanh itself: the rounded u would cost digits where it saturates.
    return u, 1 - bent * bent


def columns_of(classes: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns the columns of classes in a tile from `start`, -1 for those outside."""
    columns = classes - start
    return jnp.where((classes >= start) & (columns < size), columns, -1)


def scatter(array: jax.Array, columns: jax.Array, how: str, values) -> jax.Array:
    """Sets or adds values [R, K] at columns of array [R, B]; -1 is left out."""
    rows = lax.broadcasted_iota(jnp.int32, columns.shape, 0)
    columns = jnp.where(columns < 0, array.shape[1], columns)
    return getattr(array.at[rows, columns], how)(values, mode="drop")


def layer_of(config: Config, operands: Operands, layers: int = 1) -> Layer:
    """Returns the sizes of a layer, of so many that are streamed at once."""
    hidden, kernel = operands.hidden, operands.kernel
    return Layer(
        rows=hidden.shape[0],
        features=hidden.shape[1],
        classes=operands.num_classes(config),
        logit_bytes=compute_dtype(hidden, kernel).itemsize,
        operand_bytes=operands.matmul_dtype().itemsize,
        hidden_bytes=hidden.dtype.itemsize,
        kernel_bytes=kernel.dtype.itemsize,
        layers=layers,
        even=not config.for_gpu,
    )


def tiles_of(config: Config, operands: Operands, multiple: int = 1) -> Tiling:
    """Returns the tiles of a call; see `choose` for `multiple`."""
    return tiles_of_layer(config, layer_of(config, operands), multiple)


def tiles_of_layer(config: Config, layer: Layer, multiple: int = 1) -> Tiling:
    """Returns the tiles of a layer of known sizes."""
    if config.blocks is not None:
        return tiling_of(layer.rows, layer.classes, config.blocks)
    return layer.tiling(config.workspace_bytes, multiple)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision, dtype):
    """Contracts one axis of each matrix, accumulating in `dtype`."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )


def slice_rows(
    tree: Tree, start: jax.Array | int, rows: int, by_bits: bool = False
) -> Tree:
    """Returns rows from `start` of every array that has rows.

    Args:
      tree: arrays in named tuples whose fields say their axes; an array elsewhere has
        its rows first.
      start: the first row.
      rows: how many.
      by_bits: see `slice_of`.

    Returns:
      The tree; an array without rows is the same.
    """

    def cut(axes, array):
        if axes[0] != "n":
            return array
        return slice_of(array, start, rows, by_bits=by_bits)

    def cut_node(node):
        if has_axes(node):
            return jax.tree.map(cut, axes_of(node), node)
        return cut("n", node)

    return jax.tree.map(cut_node, tree, is_leaf=has_axes)


def kernel_slice(
    config: Config, operands: Operands, tiles: Tiling, start: jax.Array | int
) -> jax.Array:
    """Returns a tile's classes of the kernel, in the dtype of the matrix products."""
    numbers = number_slice(config, operands, tiles, start)
    return _for_products(config, operands, numbers, start)


def number_slice(
    config: Config, operands: Operands, tiles: Tiling, start: jax.Array | int
) -> jax.Array:
    """Returns a tile's classes of the kernel as they are stored."""
    kernel, size = operands.kernel, tiles.block_classes
    if tiles.class_blocks == 1:
        return kernel
    axis, by_bits = config.class_axis, config.moves_bits
    return slice_of(kernel, start, size, axis, by_bits=by_bits)


def slice_of(
    array: jax.Array,
    start: jax.Array | int,
    size: int,
    axis: int = 0,
    *,
    by_bits: bool = False,
) -> jax.Array:
    """Returns a part of a large array along an axis.

    Args:
      array: the array.
      start: where the part starts.
      size: of the part.
      axis: the axis.
      by_bits: whether to move 16-bit floats as bits; see `Config.moves_bits`.
    """
    dtype = array.dtype
    if by_bits and stored_dtype(dtype) != dtype:
        # XLA would take the bits of all of it before a loop, in a copy.
        array, start = lax.optimization_barrier((array, start))
        array = stored(array)
    return loaded(lax.dynamic_slice_in_dim(array, start, size, axis), dtype)


def whole_kernel(config: Config, operands: Operands) -> jax.Array:
    """Returns the kernel as `kernel_slice` does, of all classes."""
    return _for_products(config, operands, operands.kernel, 0)


def _for_products(
    config: Config, operands: Operands, kernel: jax.Array, start: jax.Array | int
) -> jax.Array:
    """Returns classes of the kernel as they are multiplied, with scales of blocks."""
    if operands.kernel_scale is not None and not operands.has_scale_of_class():
        scale = scale_slice(operands, start, kernel.shape[config.class_axis])
        features = kernel.shape[1 - config.class_axis]
        whole = jnp.repeat(scale, features // scale.shape[0], axis=0)
        whole = whole if config.class_axis == 1 else whole.T
        kernel = kernel.astype(scale.dtype) * whole
    return kernel.astype(operands.matmul_dtype())


def scale_slice(operands: Operands, start: jax.Array | int, size: int) -> jax.Array:
    """Returns the scales [S, B] of some classes, in the dtype of the statistics."""
    assert operands.kernel_scale is not None
    scale = lax.dynamic_slice_in_dim(operands.kernel_scale, start, size, 1)
    return scale.astype(compute_dtype(operands.hidden, operands.kernel))


def lora_slice(
    config: Config, operands: Operands, start: jax.Array | int, size: int
) -> jax.Array:
    """Returns some classes of the adapters' kernel, in the dtype of their states."""
    assert operands.lora_kernel is not None and operands.lora_hidden is not None
    by_bits = config.moves_bits
    columns = slice_of(operands.lora_kernel, start, size, 1, by_bits=by_bits)
    return columns.astype(operands.lora_hidden.dtype)


def compute_tile(
    config: Config,
    operands: Operands,
    tiles: Tiling,
    index: jax.Array | int,
    shift: jax.Array | int = 0,
    kept: KeptTile | None = None,
) -> Tile:
    """Computes tile `index` of the classes for the rows in `operands`.

    The tile is responsible for `block_classes` classes from `index · block_classes -
    shift`; where its slice of the kernel would stick out it starts elsewhere, and the
    classes of other tiles have logit -inf. What was kept of it is not computed again.
    """
    size = tiles.block_classes
    first = index * size - shift
    start = jnp.clip(first, 0, tiles.classes - size)
    classes = start + lax.iota(jnp.int32, size)
    ours = None
    if tiles.classes_overlap or not isinstance(shift, int):
        ours = (classes >= first) & (classes < first + size)
    labels = None
    if operands.labels is not None:
        labels = columns_of(operands.labels, start, size)
        if ours is not None:
            inside = (operands.labels >= first) & (operands.labels < first + size)
            labels = jnp.where(inside, labels, -1)
    kernel = kernel_slice(config, operands, tiles, start)
    dtype = compute_dtype(operands.hidden, operands.kernel)
    if kept is not None and kept.peak is not None:
        weights = kept.numbers.astype(dtype)
        weights = weights if ours is None else jnp.where(ours[None], weights, 0)
        return Tile(start, kernel, weights, False, labels, None, None, kept.peak)
    if kept is None:
        hidden = operands.hidden.astype(kernel.dtype)
        product = dot(
            hidden, kernel, (1, 1 - config.class_axis), config.precision, dtype
        )
    else:
        product = kept.numbers
    summed, is_scaled = product, operands.has_scale_of_class()
    if is_scaled:
        summed = summed * scale_slice(operands, start, size)
    if operands.lora_hidden is not None and operands.lora_kernel is not None:
        if kept is None or is_scaled:
            states = operands.lora_hidden
            columns = lora_slice(config, operands, start, size)
            summed = summed + dot(states, columns, (1, 0), config.precision, dtype)
    # The derivative by scales needs the product that they multiply.
    product = product if is_scaled else summed
    bias = None
    if operands.bias is not None:
        bias = lax.dynamic_slice_in_dim(operands.bias, start, size)
        bias = bias.astype(dtype)[None]
    u, slope = capped(summed, bias, config.softcap)
    masked = operands.bias is not None
    if operands.class_mask is not None:
        mask = lax.dynamic_slice_in_dim(operands.class_mask, start, size)
        u = jnp.where(mask[None], u, -jnp.inf)
        masked = True
    bits = operands.kept_bits(config, start, size)
    if bits is not None:
        u = jnp.where(bits, u, -jnp.inf)
        masked = True
    if ours is not None:
        u = jnp.where(ours[None], u, -jnp.inf)
        masked = True
    if operands.excluded is not None:
        dropped = columns_of(operands.excluded, start, size)
        u = scatter(u, dropped, "set", -jnp.inf)
        masked = True
    alike = None
    if operands.group is not None:
        assert operands.class_groups is not None
        groups = lax.dynamic_slice_in_dim(operands.class_groups, start, size)
        alike = operands.group == groups[None]
        if config.drops_group:
            if labels is not None:
                alike &= ~_is_label(u, labels)
            u, alike, masked = jnp.where(alike, -jnp.inf, u), None, True
    tile = Tile(start, kernel, u, masked, labels, slope, product, is_of_xla=True)
    return tile._replace(alike=alike)


def turned(config: Config, operands: Operands, tiles: Tiling) -> Operands:
    """Returns operands whose states lie feature by feature on TPUs.

    XLA for TPUs writes a tile class by class, for sums over the classes. From states
    that lie row by row it transposes a slice of the kernel for every window of rows;
    turned states are one copy, which all tiles of their rows share.

    Args:
      config: what is known of the layer.
      operands: those of the rows of a tile.
      tiles: the tiles.

    Returns:
      The operands; they are the same where one tile has all classes, and where the
      copy would take more than its part of the workspace.
    """
    hidden = operands.hidden
    room = layer_of(config, operands).room(config.workspace_bytes)
    if tiles.class_blocks == 1 or hidden.size * hidden.dtype.itemsize > room:
        return operands
    hidden = lax.platform_dependent(hidden, tpu=_turned, default=lambda same: same)
    return operands._replace(hidden=hidden)


def _turned(matrix: jax.Array) -> jax.Array:
    """Returns a matrix that lies column by column."""
    # Without the barrier XLA would undo both transpositions.
    return lax.optimization_barrier(matrix.T).T


def fold_tiles(
    arrays: Any,
    tiles: Tiling,
    start: Callable[[int], Carry],
    step: Callable[..., tuple[Carry, tuple[KeptTile, ...]]],
    room: tuple[Kept, ...] = (),
    kept: tuple[Kept, ...] = (),
    close: Callable[[Carry, Any], Any] | None = None,
) -> tuple[Any, tuple[Kept, ...]]:
    """Folds all tiles of every row into a carry.

    Args:
      arrays: what the tiles are computed from; see `slice_rows`.
      tiles: the tiles.
      start: gives the carry of R rows before the first tile: a pytree of arrays whose
        first axis is R.
      step: gives the next carry from the carry, the part of `arrays` of R rows, the
        place of the tile, and what an earlier stream kept of it; and what this stream
        keeps of it, if it does.
      room: for what this stream keeps of its first tiles; () to keep nothing.
      kept: what an earlier stream kept of its first tiles; () for nothing.
      close: gives what is left of a carry after the last tile of its rows, from it and
        their part of `arrays`; None leaves all of it.

    Returns:
      What is left of the carry of all N rows, and what was kept.
    """
    count = tiles_in_all((*room, *kept), tiles)

    def run(part, rows, row, room) -> Any:
        def first_tile(index, state):
            carry, room = state
            place = Place(row, index)
            read = tuple(each.read(place, tiles) for each in kept)
            carry, new = step(carry, part, place, read)
            pairs = zip(room, new, strict=True)
            return carry, tuple(each.write(place, tiles, tile) for each, tile in pairs)

        def other_tile(index, carry):
            return step(carry, part, Place(row, index), ())[0]

        carry = mesh_axes.like(start(rows), part)
        if count:
            carry, room = lax.fori_loop(0, count, first_tile, (carry, room))
        if count + 1 == tiles.class_blocks:
            carry = other_tile(count, carry)
        elif count < tiles.class_blocks:
            carry = lax.fori_loop(count, tiles.class_blocks, other_tile, carry)
        return carry if close is None else close(carry, part), room

    if tiles.row_blocks == 1:
        return run(arrays, tiles.rows, 0, room)

    def block(room, index):
        first = jnp.minimum(index * tiles.block_rows, tiles.rows - tiles.block_rows)
        part = slice_rows(arrays, first, tiles.block_rows)
        carry, room = run(part, tiles.block_rows, first, room)
        return room, carry

    room, blocks = lax.scan(block, room, jnp.arange(tiles.row_blocks))
    joined = jax.tree.map(lambda carry: _join_rows(carry, tiles), blocks)
    return cast(Any, joined), room


def map_rows(
    function: Callable[[Tree], Any],
    tree: Tree,
    rows: int,
    size: int,
    by_bits: bool = False,
) -> Any:
    """Returns what a function gives for one block of rows after another.

    Args:
      function: gives arrays of R rows from those of R rows.
      tree: the arrays; see `slice_rows`.
      rows: N, at least 1.
      size: R; the last block may start earlier, over rows of the one before.
      by_bits: see `slice_of`.

    Returns:
      The arrays of N rows.
    """
    if size >= rows:
        return function(tree)
    blocks = Tiling(rows, 1, size, 1)

    def block(index):
        first = jnp.minimum(index * size, rows - size)
        return function(slice_rows(tree, first, size, by_bits))

    found = lax.map(block, jnp.arange(blocks.row_blocks))
    return jax.tree.map(lambda a: _join_rows(a, blocks), found)


def _join_rows(blocks: jax.Array, tiles: Tiling) -> jax.Array:
    """Returns [N, …] from [blocks, R, …], without what the last block repeats."""
    again = tiles.row_blocks * tiles.block_rows - tiles.rows
    rows = blocks[:-1].reshape((-1, *blocks.shape[2:]))
    return jnp.concatenate([rows, blocks[-1, again:]])
