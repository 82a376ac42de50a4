"""How large the blocks of the Mosaic TPU kernels are: from shapes, dtypes and VMEM."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from jaxsoft._core.numerics import round_up
from jaxsoft.kernels.chips import SMALLEST_VMEM, VMEM_SHARE

__all__ = ["LANES", "LayerShape", "TpuBlocks", "choose_backward", "choose_forward"]

# A vector register has 8 sublanes of 128 lanes; bfloat16 packs two rows in a sublane.
LANES = 128
_ROW_MULTIPLE = 16

# The most statistics of a row that run along, of every lane.
_RUNNING = 8

# The compiler unrolls a step, and computes exponentials of one part of its tile beside
# products of another: the more rows there are, the more products for each part of the
# kernel that a matrix unit is loaded with, and the fewer ends at which it idles.
_ROWS = (1024, 768, 512, 256, 128, 64, 32, 16)
# Backward they are in two products more of the same step.
_MOST_ROWS_BACKWARD = 512
_CLASSES = (1024, 768, 512, 384, 256, 128)

# The cost of a choice is _KEPT over the size of the block that stays in VMEM plus
# _STREAMED over that of the blocks that stream past it. What stays is read once, what
# streams once for each block that stays: chips have time for some 400 products for each
# number read. Along the other axis a matrix unit wants 128 rows or more for each of its
# loads.
_KEPT = 400
_STREAMED = 128

# The float32 tiles of logits that a step holds at once, beside its operands; backward
# those of parts.
_TILES_FORWARD = 3
_TILES_BACKWARD = 6

# The features of a chunk, where products are added up chunk by chunk.
CHUNK = 512

# The classes of a part of a tile whose exponentials are computed beside the products of
# another: as many as a matrix unit has columns.
PART = 256


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """The sizes of the blocks of a kernel.

    Attributes:
      rows: of a block, a multiple of 16.
      classes: of a block, a multiple of 128.
      vmem_bytes: the most bytes of VMEM that the kernel may take.
    """

    rows: int
    classes: int
    vmem_bytes: int

    def __post_init__(self):
        """Requires what the tiles of registers and of HBM require."""
        if self.rows < 1 or self.rows % _ROW_MULTIPLE:
            raise ValueError(f"`rows` must be a multiple of 16, got {self.rows}.")
        if self.classes < 1 or self.classes % LANES:
            raise ValueError(
                f"`classes` must be a multiple of 128, got {self.classes}."
            )
        if self.vmem_bytes < 1:
            raise ValueError(f"`vmem_bytes` must be positive, got {self.vmem_bytes}.")


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The sizes that a choice of blocks depends on.

    Attributes:
      rows: N.
      features: H.
      classes: V.
      hidden_bytes: of a number of `hidden`.
      kernel_bytes: of a number of the kernel.
      product_bytes: of a number in the matrix products.
    """

    rows: int
    features: int
    classes: int
    hidden_bytes: int
    kernel_bytes: int
    product_bytes: int

    @property
    def width(self) -> int:
        """H as registers hold it, a multiple of 128."""
        return round_up(self.features, LANES)

    def operand_bytes(self, rows: int, classes: int) -> int:
        """The bytes of a block of `hidden` and one of the kernel: two of each in turn.

        Where the dtypes differ a copy of the narrower one is made.
        """
        total = 0
        for size, itemsize in ((rows, self.hidden_bytes), (classes, self.kernel_bytes)):
            copy = self.product_bytes if itemsize != self.product_bytes else 0
            total += size * self.width * (2 * itemsize + copy)
        return total


def choose_forward(layer: LayerShape, vmem: int = SMALLEST_VMEM) -> TpuBlocks:
    """Chooses the blocks of the forward kernel.

    Args:
      layer: the sizes.
      vmem: the bytes of VMEM of a core.

    Returns:
      The blocks; they are balanced, so that the last one is not a sliver.

    Raises:
      NotImplementedError: if not even the smallest blocks fit.
    """

    def used(rows: int, classes: int) -> int:
        # Labels, temperatures and two outputs, padded to lanes, two of each in turn.
        columns = (4 * 2 + _RUNNING) * rows * LANES * 4
        tiles = _TILES_FORWARD * rows * classes * 4
        return layer.operand_bytes(rows, classes) + columns + tiles

    return _choose(layer, vmem, used, lambda r, c: _KEPT / r + _STREAMED / c, _ROWS)


def choose_backward(
    layer: LayerShape, hidden: bool, kernel: bool, vmem: int = SMALLEST_VMEM
) -> TpuBlocks:
    """Chooses the blocks of the backward kernel.

    Args:
      layer: the sizes.
      hidden: whether dhidden is computed.
      kernel: whether dkernel is computed.
      vmem: the bytes of VMEM of a core.

    Returns:
      The blocks; they are balanced, so that the last one is not a sliver.

    Raises:
      NotImplementedError: if not even the smallest blocks fit.
    """

    def used(rows: int, classes: int) -> int:
        # Labels, temperatures and coefficients, two blocks in turn.
        columns = 2 * rows * LANES * 4
        total = layer.operand_bytes(rows, classes) + columns
        # The derivative by the logits, and float32 logits of parts.
        total += rows * classes * layer.product_bytes
        total += _TILES_BACKWARD * rows * min(PART, classes) * 4
        # Two slots of float32 sums, and the moments.
        total += 2 * rows * ((layer.width if hidden else 0) + LANES) * 4
        if kernel:
            # The float32 sum, the block that is written, two in turn.
            total += classes * layer.width * (4 + 2 * layer.kernel_bytes)
        # The products of a chunk of features.
        return total + (rows + classes) * min(CHUNK, layer.width) * 4

    rows = [size for size in _ROWS if size <= _MOST_ROWS_BACKWARD]
    return _choose(layer, vmem, used, lambda r, c: _KEPT / c + _STREAMED / r, rows)


def _choose(
    layer: LayerShape,
    vmem: int,
    used: Callable[[int, int], int],
    cost: Callable[[int, int], float],
    all_rows: Sequence[int],
) -> TpuBlocks:
    """Returns the blocks of the least cost among those that fit."""
    budget = int(vmem * VMEM_SHARE)
    pairs = itertools.product(all_rows, _CLASSES)
    for rows, classes in sorted(pairs, key=lambda pair: cost(*pair)):
        rows = _balanced(layer.rows, rows, _ROW_MULTIPLE)
        classes = _balanced(layer.classes, classes, LANES)
        if used(rows, classes) <= budget:
            return TpuBlocks(rows, classes, budget)
    raise NotImplementedError(
        f"`hidden` must have fewer features H for the mosaic_tpu implementation, got "
        f"{layer.features}: the smallest blocks take {used(_ROW_MULTIPLE, LANES)} "
        f'bytes of VMEM, of {budget}. Use implementation="xla".'
    )


def _balanced(size: int, block: int, multiple: int) -> int:
    """Returns the smallest block that covers `size` in as many blocks."""
    return round_up(math.ceil(size / math.ceil(size / block)), multiple)
