"""Tiles of the logits of `hidden @ kernel`, in plain XLA: forward and backward.

Two nested loops run over blocks of rows and of classes. A tile of the kernel is a
slice in place, and its logits live in one buffer of the tile's size: `fold` merges them
into a carry of their rows (2·N·H·V flops, one read of the kernel for each block of
rows), `accumulate` computes them again, turns them into the derivative by the logits
and multiplies that twice (6·N·H·V flops), into a float32 sum for the rows and into a
tile of dkernel, which is written once, in its own dtype.

The last block of an axis that its blocks do not divide starts earlier instead, and what
it covers a second time is left out: no operand is padded.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype, round_up
from jaxsoft.linear.arguments import Config, Operands, axes_of, has_axes

__all__ = [
    "Gradients",
    "Share",
    "Tile",
    "Tiling",
    "Wanted",
    "accumulate",
    "capped",
    "choose",
    "columns_of",
    "compute_tile",
    "dot",
    "fold_tiles",
    "scatter",
    "slice_rows",
    "tiles_of",
]

Tree = TypeVar("Tree")
Carry = TypeVar("Carry")

# Sizes are multiples of what matrix units want.
_CLASS_MULTIPLE = 128
_ROW_MULTIPLE = 8

# Below this many classes a tile is too thin for an efficient product; rows are
# split before.
_THIN = 512

# The slice of the kernel that a tile needs may take so many tiles: with fewer rows than
# features it is the larger one, and XLA copies it on GPUs.
_SLICES = 2


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
        placed = scatter(jnp.zeros_like(self.logits), self.labels, "add", values)
        return jnp.where(self.logits == -jnp.inf, 0, placed) if self.masked else placed

    def without_labels(self, values: jax.Array) -> jax.Array:
        """Returns values [R, B] with 0 at the labels."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            return jnp.where(self._is_label(), 0, values)
        return scatter(values, self.labels, "set", 0)

    def _is_label(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, self.logits.shape, 1) == self.labels


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


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A cover of `rows` × `classes` by tiles; the last of each kind may overlap.

    Attributes:
      rows: N.
      classes: V.
      block_rows: rows of a tile, at most N.
      block_classes: classes of a tile, at most V.
      extra: by how many classes the first tile may start before the first class.
    """

    rows: int
    classes: int
    block_rows: int
    block_classes: int
    extra: int = 0

    def __post_init__(self):
        """Requires at least one row and one class, and tiles within the matrix."""
        if not 1 <= self.block_rows <= self.rows:
            raise ValueError(f"`block_rows` must lie in [1, {self.rows}], got {self}.")
        if not 1 <= self.block_classes <= self.classes:
            raise ValueError(
                f"`block_classes` must lie in [1, {self.classes}], got {self}."
            )

    @property
    def row_blocks(self) -> int:
        """The number of blocks of rows."""
        return math.ceil(self.rows / self.block_rows)

    @property
    def class_blocks(self) -> int:
        """The number of blocks of classes."""
        return math.ceil((self.classes + self.extra) / self.block_classes)

    @property
    def rows_overlap(self) -> bool:
        """Whether the last block of rows covers rows of the one before again."""
        return self.rows % self.block_rows != 0

    @property
    def classes_overlap(self) -> bool:
        """Whether some block of classes covers classes of another one again."""
        return self.extra > 0 or self.classes % self.block_classes != 0


def choose(
    rows: int,
    classes: int,
    itemsize: int,
    tile_bytes: int,
    multiple: int = 1,
    column_bytes: int = 1,
) -> Tiling:
    """Chooses the tiles of a [rows, classes] matrix of logits.

    Whole columns of rows are preferred, since every tile of the kernel is then read
    once; rows are split when that would leave tiles thinner than 512 classes.

    Args:
      rows: N >= 1.
      classes: V >= 1.
      itemsize: bytes of one logit.
      tile_bytes: the most bytes that a tile may take. Tiles of 8 rows × 128 classes
        are the smallest, whatever the budget.
      multiple: what the classes of a tile must be a multiple of, unless there is but
        one tile of them.
      column_bytes: bytes of the kernel's vector of a class. Slices of it take no more
        than two tiles, unless that would leave them thinner than 512 classes.

    Returns:
      The tiling; its sizes are balanced, so that the last tile is not a sliver.
    """
    multiple = math.lcm(multiple, _CLASS_MULTIPLE)
    elements = max(tile_bytes // itemsize, multiple * _ROW_MULTIPLE)
    thin = min(max(_THIN, multiple), round_up(classes, multiple))
    block_rows = max(_ROW_MULTIPLE, elements // thin // _ROW_MULTIPLE * _ROW_MULTIPLE)
    block_rows = min(rows, block_rows)
    block_rows = _balance(rows, block_rows, _ROW_MULTIPLE)
    block_classes = max(multiple, elements // block_rows)
    if block_classes < classes:
        most = max(_SLICES * tile_bytes // column_bytes, thin)
        block_classes = min(block_classes, most)
    block_classes = block_classes // multiple * multiple
    block_classes = _balance(classes, min(classes, block_classes), multiple)
    return Tiling(rows, classes, block_rows, block_classes)


def _balance(size: int, block: int, multiple: int) -> int:
    """Returns the smallest multiple that covers `size` in as many blocks."""
    blocks = math.ceil(size / block)
    return min(size, round_up(math.ceil(size / blocks), multiple))


def tiles_of(config: Config, operands: Operands, multiple: int = 1) -> Tiling:
    """Returns the tiles of a call; see `choose` for `multiple`."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    return choose(
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


def slice_rows(tree: Tree, start: jax.Array, rows: int) -> Tree:
    """Returns rows from `start` of every array that has rows.

    Args:
      tree: arrays in named tuples whose fields say their axes; an array elsewhere has
        its rows first.
      start: the first row.
      rows: how many.

    Returns:
      The tree; an array without rows is the same.
    """

    def cut(axes, array):
        return lax.dynamic_slice_in_dim(array, start, rows) if axes[0] == "n" else array

    def cut_node(node):
        if has_axes(node):
            return jax.tree.map(cut, axes_of(node), node)
        return cut("n", node)

    return jax.tree.map(cut_node, tree, is_leaf=has_axes)


def compute_tile(
    config: Config,
    operands: Operands,
    tiles: Tiling,
    index: jax.Array | int,
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


def fold_tiles(
    arrays: Tree,
    tiles: Tiling,
    start: Callable[[int], Carry],
    step: Callable[[Carry, Tree, jax.Array], Carry],
) -> Carry:
    """Folds all tiles of every row into a carry.

    Args:
      arrays: what the tiles are computed from; see `slice_rows`.
      tiles: the tiles.
      start: gives the carry of R rows before the first tile: a pytree of arrays whose
        first axis is R.
      step: gives the next carry from the carry, the part of `arrays` of R rows, and the
        index of the tile.

    Returns:
      The carry of all N rows.
    """

    def run(part, rows):
        carry = mesh_axes.like(start(rows), part)
        body = lambda index, carry: step(carry, part, index)  # noqa: E731
        return lax.fori_loop(0, tiles.class_blocks, body, carry)

    if tiles.row_blocks == 1:
        return run(arrays, tiles.rows)

    def block(index):
        first = jnp.minimum(index * tiles.block_rows, tiles.rows - tiles.block_rows)
        return run(slice_rows(arrays, first, tiles.block_rows), tiles.block_rows)

    blocks = lax.map(block, jnp.arange(tiles.row_blocks))
    return jax.tree.map(lambda carry: _join_rows(carry, tiles), blocks)


def _join_rows(blocks: jax.Array, tiles: Tiling) -> jax.Array:
    """Returns [N, …] from [blocks, R, …], without what the last block repeats."""
    again = tiles.row_blocks * tiles.block_rows - tiles.rows
    rows = blocks[:-1].reshape((-1, *blocks.shape[2:]))
    return jnp.concatenate([rows, blocks[-1, again:]])


class Wanted(NamedTuple):
    """Which cotangents of operands to compute."""

    hidden: bool
    kernel: bool
    bias: bool
    tau: bool
    values: bool = False

    @classmethod
    def of(cls, moving: Operands, values: object = False) -> "Wanted":
        """Returns what is wanted where some operands, and maybe values, move."""
        floats = (moving.hidden, moving.kernel, moving.bias, moving.tau, values)
        return cls._make(map(bool, floats))


class Gradients(NamedTuple):
    """Cotangents of the operands; None where not wanted.

    Attributes:
      hidden: [N, H] in the dtype of `hidden`.
      kernel: in the shape and dtype of `kernel`.
      bias: [V] in the dtype of `bias`.
      tau: [N].
      values: in the shape and dtype of an array [V, D] that is mixed.
    """

    hidden: jax.Array | None
    kernel: jax.Array | None
    bias: jax.Array | None
    tau: jax.Array | None
    values: jax.Array | None = None

    def of_operands(self) -> Operands:
        """Returns the cotangents in the places of their operands."""
        return Operands.gradients(
            hidden=self.hidden, kernel=self.kernel, bias=self.bias, tau=self.tau
        )


class Share(NamedTuple):
    """What a tile of R rows and B classes contributes to the gradients.

    Attributes:
      logits: [R, B], by the logits u after the soft-cap.
      moments: [R, 1], a sum over the classes for the temperature: that of `logits`
        times the centred logits c, or what else the fold makes τ's gradient of; None if
        not wanted.
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
    rows: object,
    *,
    values: jax.Array | None = None,
    tiles: Tiling | None = None,
) -> tuple[Gradients, jax.Array | None]:
    """Adds up what tiles contribute to gradients.

    Args:
      config: what is known at trace time.
      operands: the arrays, their classes those of this shard.
      wanted: which gradients to compute.
      share: gives a tile's contribution from the operands of R rows, their part of
        `rows`, the tile and its index.
      rows: further arrays; see `slice_rows`.
      values: an array like the gradient `values`.
      tiles: the tiles, if not those of `tiles_of`.

    Returns:
      The gradients but `tau`, and the moments [N, 1], None if not wanted.
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
        jnp.zeros((count, 1), dtype) if wanted.tau else None,
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


def _add_rows(total: jax.Array, new: jax.Array, start, tiles: Tiling):
    """Adds a block of rows to a sum over tiles."""
    if tiles.row_blocks == 1:
        return total + new
    old = lax.dynamic_slice_in_dim(total, start, new.shape[0])
    return lax.dynamic_update_slice_in_dim(total, old + new, start, 0)


def _write(total, tile, start, axis: int, fresh, tiles: Tiling):
    """Writes a tile of classes, except where it covers classes again."""
    tile = tile.astype(total.dtype)
    if tiles.classes_overlap:
        old = lax.dynamic_slice_in_dim(total, start, tile.shape[axis], axis)
        shape = [1] * tile.ndim
        shape[axis] = tile.shape[axis]
        tile = jnp.where(fresh.reshape(shape), tile, old)
    return lax.dynamic_update_slice_in_dim(total, tile, start, axis)
