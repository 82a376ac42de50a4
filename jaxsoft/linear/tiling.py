"""How large a tile of logits is, from the shapes and a byte budget alone."""

import dataclasses
import math

from jaxsoft._core.padding import round_up

__all__ = ["Tiling", "choose", "default_tile_bytes"]

# A tile may take this share of the bytes of hidden and kernel, within these bounds:
# the workspace stays small beside what the caller holds already, tiles of small
# layers stay in cache, and those of large ones keep an accelerator's matrix units
# busy (8,192 rows × 1,024 classes).
_SHARE = 1 / 16
_LEAST = 4 * 2**20
_MOST = 32 * 2**20

# Sizes are multiples of what matrix units want.
_CLASS_MULTIPLE = 128
_ROW_MULTIPLE = 8

# Below this many classes a tile is too thin for an efficient product; rows are
# split before.
_THIN = 512

# The slice of the kernel that a tile needs may take so many tiles: with fewer rows than
# features it is the larger one, and XLA copies it on GPUs.
_SLICES = 2


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


def default_tile_bytes(operand_bytes: int) -> int:
    """Returns the budget of a tile, from the bytes of hidden and kernel together."""
    return int(min(max(operand_bytes * _SHARE, _LEAST), _MOST))


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
