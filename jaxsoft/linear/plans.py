"""How the work of a call is divided: tiles, and which plan its derivative follows.

Pure functions of shapes, bytes of dtypes and the bytes of temporary memory that a call
may take, its workspace. In units of N·H·V flops a value takes 2, and value and gradient

- *recompute*: 8, since every logit is computed twice; a few tiles of memory;
- *keep*: from 8 down to 6: what the forward pass keeps of a part of the classes is not
  computed again;
- *chunks*: 6, for losses that are reduced inside the call: blocks of tokens, each with
  all of its logits kept, whose gradient is taken in the forward pass.
"""

import dataclasses
import math
from typing import Literal

from jaxsoft._core.numerics import round_up

__all__ = ["CLASS_MULTIPLE", "Layer", "Plan", "Tiling", "choose", "tiling_of"]

MIB = 2**20
# A tile may take this share of the bytes of hidden and kernel, within these bounds:
# tiles of small layers stay in cache, and those of large ones keep an accelerator's
# matrix units busy (8,192 rows × 1,024 classes).
_SHARE = 1 / 16
_LEAST_TILE, _MOST_TILE = 4 * MIB, 32 * MIB
# The workspace of a call that names none: this share of the logits in the dtype of the
# statistics, within these bounds.
_SHARE_OF_LOGITS = 1 / 4
_LEAST_WORKSPACE, _MOST_WORKSPACE = 96 * MIB, 512 * MIB
# So many tiles, and slices of the kernel, are what a backward pass takes beside what it
# keeps; slices may be twice as large as tiles.
_TILES, _TILES_AND_SLICES = 2, 6

# The numbers of a chunk of rows take most of the workspace, and its tiles this share.
_SHARE_OF_CHUNK = 1 / 32

# A call that names no workspace and stores rows for a few passes over their logits
# takes no more than this for a layer; rows that are drawn from take this share of it,
# and what passes give the rest.
_STORED, _SHARE_OF_STORED = 256 * MIB, 7 / 16

# Sizes are multiples of what matrix units want.
CLASS_MULTIPLE = 128
_ROW_MULTIPLE = 8

# Below this many classes a tile is too thin for an efficient product; rows are
# split before.
_THIN = 512

# Blocks that leave no rest may be smaller than others by so much.
_NEARLY_FULL, _EVEN = 0.75, 0.375

# The slice of the kernel that a tile needs may take so many tiles: with fewer rows than
# features it is the larger one, and XLA copies it on GPUs.
_SLICES = 2

# A chunk reads and writes the sum of the kernel's gradient, 8·H·V bytes, in the time of
# so many flops a byte: for this many rows that is as much as two products. One that has
# no such sum reads the kernel, 4·H·V, and spares a product.
_ROWS_OF_A_SUM = 150


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
    even: bool = True,
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
      even: whether tiles that leave no rest are taken even where they are much smaller.

    Returns:
      The tiling; its sizes are balanced, so that the last tile is not a sliver.
    """
    multiple = math.lcm(multiple, CLASS_MULTIPLE)
    elements = max(tile_bytes // itemsize, multiple * _ROW_MULTIPLE)
    thin = min(max(_THIN, multiple), round_up(classes, multiple))
    block_rows = max(_ROW_MULTIPLE, elements // thin // _ROW_MULTIPLE * _ROW_MULTIPLE)
    block_rows = balance(rows, min(rows, block_rows), _ROW_MULTIPLE)
    block_classes = max(multiple, elements // block_rows // multiple * multiple)
    if block_classes < classes:
        most = max(_SLICES * tile_bytes // column_bytes, thin)
        block_classes = min(block_classes, most) // multiple * multiple
    # A last tile that is shifted takes a loop of its own on TPUs; on GPUs narrow tiles
    # leave multiprocessors idle.
    most = min(classes, block_classes)
    least = max(_EVEN if even else _NEARLY_FULL, (thin - 1) / most)
    block_classes = balance(classes, most, multiple, least)
    return Tiling(rows, classes, block_rows, block_classes)


def balance(size: int, most: int, multiple: int, least: float = _NEARLY_FULL) -> int:
    """Returns the size of blocks that cover `size` and are a multiple, at most `most`.

    It is one that leaves no rest, where one of at least that share of `most` does, or
    the smallest that covers in as few blocks.
    """
    for block in range(
        most // multiple * multiple, math.ceil(most * least) - 1, -multiple
    ):
        if size % block == 0:
            return block
    blocks = math.ceil(size / most)
    return min(size, round_up(math.ceil(size / blocks), multiple))


def tiling_of(rows: int, classes: int, blocks: tuple[int, int]) -> Tiling:
    """Returns tiles of so many rows and classes, where there are as many."""
    block_rows, block_classes = blocks
    return Tiling(rows, classes, min(block_rows, rows), min(block_classes, classes))


@dataclasses.dataclass(frozen=True)
class Layer:
    """The sizes of a layer that plans are made of.

    Attributes:
      rows: N, at least 1.
      features: H.
      classes: V, at least 1, those of one shard.
      logit_bytes: of a number in the dtype of the statistics.
      operand_bytes: of one in the dtype of the operands of products.
      hidden_bytes: of one of `hidden`.
      kernel_bytes: of one of the kernel.
      layers: how many such layers are streamed at once and share the workspace.
      tile_share: the share of the workspace that a tile may take.
      even: whether tiles that leave no rest are taken even where they are much smaller.
    """

    rows: int
    features: int
    classes: int
    logit_bytes: int = 4
    operand_bytes: int = 4
    hidden_bytes: int = 4
    kernel_bytes: int = 4
    layers: int = 1
    tile_share: float = 1
    even: bool = True

    def _chunk(self, rows: int) -> "Layer":
        """Returns the sizes of a chunk of rows."""
        return dataclasses.replace(self, rows=rows, tile_share=_SHARE_OF_CHUNK)

    def _chunk_tiling(self, given: int | None, rows: int) -> Tiling:
        """Returns the tiles of a chunk, within the workspace of all rows."""
        return self._chunk(rows).tiling(self.workspace(given))

    def _streamed(self, given: int | None, rows: int) -> int:
        """Returns the bytes that a backward pass over a chunk's tiles takes."""
        return self._chunk(rows).streamed(self._chunk_tiling(given, rows))

    def shared(self, rows: int, classes: int) -> "Layer":
        """Returns the sizes of one of so many shards of rows, and of classes."""
        return dataclasses.replace(
            self,
            rows=math.ceil(self.rows / rows),
            classes=math.ceil(self.classes / classes),
        )

    def workspace(self, given: int | None) -> int:
        """Returns the bytes that a call may take, from what its caller gave."""
        if given is not None:
            return given
        logits = self.rows * self.classes * self.logit_bytes * self.layers
        share = int(logits * _SHARE_OF_LOGITS)
        return min(max(share, _LEAST_WORKSPACE), _MOST_WORKSPACE)

    def room(self, given: int | None) -> int:
        """Returns the bytes that one of a call's tiles, slices or copies may take."""
        parts = _TILES_AND_SLICES if self.layers == 1 else _TILES_AND_SLICES + _TILES
        return self.workspace(given) // parts

    def tiling(self, given: int | None, multiple: int = 1) -> Tiling:
        """Returns the tiles; see `choose` for `multiple`."""
        operands = self.rows * self.features * self.hidden_bytes
        operands += self.features * self.classes * self.kernel_bytes
        share = min(max(int(operands * _SHARE), _LEAST_TILE), _MOST_TILE)
        most = int(self.workspace(given) * self.tile_share)
        tile_bytes = max(min(share, self.room(given), most) // self.layers, 1)
        return choose(
            self.rows,
            self.classes,
            self.logit_bytes,
            tile_bytes,
            multiple,
            max(self.features, 1) * self.logit_bytes,
            self.even,
        )

    def streamed(self, tiles: Tiling) -> int:
        """Returns the bytes that a backward pass over tiles takes."""
        tile = tiles.block_rows * tiles.block_classes * self.logit_bytes
        # One tile of all classes is no slice.
        cut = self.features * tiles.block_classes * self.logit_bytes
        cut = 0 if tiles.class_blocks == 1 else cut
        # Two layers' tiles are compared in a few more of them.
        tiles_at_once = _TILES if self.layers == 1 else 2 * _TILES
        return self.layers * (tiles_at_once * tile + _TILES * cut)

    def plan(
        self,
        given: int | None,
        *,
        kept_bytes: int | None,
        reduced: bool = False,
        kernel: bool = True,
        some: bool = True,
    ) -> "Plan":
        """Chooses the plan of a derivative.

        Args:
          given: the bytes that the caller gave, or None.
          kept_bytes: of what may be kept of a logit; None if nothing can be.
          reduced: whether the loss is reduced inside the call.
          kernel: whether the kernel's gradient is wanted.
          some: whether something may be kept of a part of the classes.
        """
        tiles = self.tiling(given)
        if kept_bytes is None:
            return Plan("recompute", tiles)
        kept = self._kept_classes(given, tiles, kept_bytes)
        kept = kept if some or kept >= self.classes else 0
        plan = Plan("keep", tiles, kept) if kept else Plan("recompute", tiles)
        rows = self._chunk_rows(given, kept_bytes, kernel) if reduced else 0
        if not rows:
            return plan
        more = 2 * _ROWS_OF_A_SUM / rows if kernel and rows < self.rows else 0
        if more >= 2 - 2 * kept / self.classes and kept < self.classes:
            return plan
        return Plan("chunks", self._chunk_tiling(given, rows), self.classes, rows)

    def rows_read_twice(self, given: int | None) -> tuple[int, Tiling] | None:
        """Returns how a value whose logits are needed twice computes them once.

        Args:
          given: the bytes that the caller gave, or None.

        Returns:
          The rows whose logits are all stored at once, and their tiles; None where
          the workspace has room for too few.
        """
        room = self.workspace(given)
        if given is None:
            room = min(room, self.layers * _STORED)
        rows = self._chunk_rows(room, self.logit_bytes, kernel=False)
        if rows < min(_ROWS_OF_A_SUM, self.rows):
            return None
        return rows, self._chunk_tiling(room, rows)

    def stored_rows(self, given: int | None, whole: bool) -> Tiling:
        """Returns tiles of so many rows that the workspace holds all of their logits.

        Args:
          given: the bytes that the caller gave, or None.
          whole: whether a tile has all classes.
        """
        room = _STORED if given is None else given
        most = int(room * _SHARE_OF_STORED) // (self.classes * self.logit_bytes)
        most = max(most // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
        rows = balance(self.rows, min(most, self.rows), _ROW_MULTIPLE)
        classes = self.classes
        if not whole:
            classes = self._chunk_tiling(given, rows).block_classes
        return Tiling(self.rows, self.classes, rows, classes)

    def _kept_classes(self, given: int | None, tiles: Tiling, kept_bytes: int) -> int:
        """Returns of how many classes there is room to keep something."""
        room = self.workspace(given) - self.streamed(tiles)
        classes = room // (self.rows * kept_bytes * self.layers)
        count = min(classes // tiles.block_classes, tiles.class_blocks)
        return max(count, 0) * tiles.block_classes

    def _chunk_rows(self, given: int | None, kept_bytes: int, kernel: bool) -> int:
        """Returns the rows of a chunk; 0 where none has room."""
        room = self.workspace(given)
        if kernel and given is not None and self.kernel_bytes != self.logit_bytes:
            room -= self.features * self.classes * self.logit_bytes
        row = self.classes * kept_bytes * self.layers
        rows = min(room // row, self.rows)
        if rows < min(_ROW_MULTIPLE, self.rows):
            return 0
        rows = min((room - self._streamed(given, rows)) // row, self.rows)
        if rows < min(_ROW_MULTIPLE, self.rows):
            return 0
        if rows < self.rows:
            rows = rows // _ROW_MULTIPLE * _ROW_MULTIPLE
        rows = balance(self.rows, rows, _ROW_MULTIPLE)
        # Fewer rows may have wider tiles.
        while rows > _ROW_MULTIPLE and rows * row + self._streamed(given, rows) > room:
            rows = round_up(rows - _ROW_MULTIPLE, _ROW_MULTIPLE)
        return rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a derivative does.

    Attributes:
      kind: which of the plans.
      tiles: of all rows, or of a chunk's.
      kept_classes: of how many classes something is kept.
      chunk_rows: the rows of a chunk; 0 without chunks.
    """

    kind: Literal["recompute", "keep", "chunks"]
    tiles: Tiling
    kept_classes: int = 0
    chunk_rows: int = 0
