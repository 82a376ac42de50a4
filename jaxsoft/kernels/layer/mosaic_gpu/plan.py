"""What the Mosaic GPU kernels are asked for, and into which tiles they cut it."""

import dataclasses
import math
from typing import Generic, NamedTuple, TypeVar

from jaxsoft.kernels.chips import MULTIPROCESSORS

__all__ = [
    "COMPUTING",
    "GROUP",
    "SHARED_MEMORY",
    "GpuBlocks",
    "GpuInputs",
    "GpuPlan",
    "Partials",
    "choose_gpu_blocks",
]

# The bytes of shared memory that a block may take on an H100, an H200 and a B200.
SHARED_MEMORY = 232448
# The warpgroups of a block that multiply on Hopper; one more copies.
COMPUTING = 2
# The classes of a group, whose maximum and sum samples are drawn from. Their blocks of
# classes have a whole number of groups, and so has every tile.
GROUP = 32

_Array = TypeVar("_Array")


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
    """The tiles of the kernel.

    Attributes:
      rows: rows of a warpgroup that merges; a block of threads has twice as many on
        Hopper, and as many on Blackwell.
      classes: classes of a tile of logits.
      features: features that one step multiplies.
      stages: tiles in flight.
      cluster: how many row tiles share each tile of the kernel, by TMA multicast.
      swizzle: bytes of a row of shared memory that are permuted together.
      tensor_memory: whether products are accumulated there, as on Blackwell, and not
        in registers.
    """

    rows: int = 64
    classes: int = 256
    features: int = 64
    stages: int = 4
    cluster: int = 1
    swizzle: int = 128
    tensor_memory: bool = False

    def __post_init__(self):
        """Requires what the matrix unit, its accumulators and the ring can hold."""
        if self.rows % 64 or self.classes % 64 or not 64 <= self.classes <= 256:
            raise ValueError(
                "`rows` must be a multiple of 64, and `classes` one up to 256, got "
                f"{self}."
            )
        if self.tensor_memory and (self.rows != 128 or self.cluster != 1):
            raise ValueError(
                f"`rows` must be 128 and `cluster` 1 with tensor memory, got {self}."
            )
        if not self.tensor_memory and self.rows * self.classes > 64 * 256:
            raise ValueError(
                f"`rows · classes` must be at most 64 · 256 registers, got {self}."
            )
        if self.swizzle not in (32, 64, 128) or self.features * 2 % self.swizzle:
            raise ValueError(
                "`swizzle` must be 32, 64 or 128 bytes and divide those of `features`, "
                f"got {self}."
            )
        if self.cluster not in (1, 2) or self.stages < 2:
            raise ValueError(
                f"`cluster` must be 1 or 2, `stages` at least 2, got {self}."
            )
        if self.ring_bytes > SHARED_MEMORY - 8192:
            raise ValueError(
                f"`stages` must fit {SHARED_MEMORY - 8192} bytes of shared memory, got "
                f"{self.ring_bytes} in {self}."
            )

    @property
    def warpgroups(self) -> int:
        """The warpgroups of a block that merge logits, each those of its rows."""
        return 1 if self.tensor_memory else COMPUTING

    @property
    def layout(self) -> str:
        """The name, in Pallas, of how their threads share an accumulator."""
        return "TCGEN05_TMEM_NATIVE" if self.tensor_memory else "WGMMA"

    @property
    def block_rows(self) -> int:
        """The rows of a block of threads."""
        return self.warpgroups * self.rows

    @property
    def ring_bytes(self) -> int:
        """The bytes of the tiles in flight, of 2 bytes an element."""
        return self.stages * self.features * (self.block_rows + self.classes) * 2


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """All that is known when the kernel is traced.

    Attributes:
      rows: N, of the rows of results: a multiple of those of a block, or of a cluster.
      classes: V.
      features: H.
      transposed: whether the kernel is [V, H].
      blocks: the tiles.
      splits: into how many parts the classes are split.
      softcap: the soft-cap, or None.
      scale: by what logits are multiplied before they are centred; see `GpuInputs`.
      factor: by what they are multiplied then, in base 2; None if a row has its own.
      labels: whether there are labels.
      mean: whether the mean is wanted.
      expected: whether Σ p c is wanted.
      argmax: whether the argmax is wanted.
      groups: whether the maximum and the sum of every group of classes are wanted, and
        nothing of the splits.
    """

    rows: int
    classes: int
    features: int
    transposed: bool
    blocks: GpuBlocks
    splits: int
    softcap: float | None
    scale: float
    factor: float | None
    labels: bool
    mean: bool
    expected: bool
    argmax: bool
    groups: bool = False

    @property
    def tiles(self) -> int:
        """The number of tiles of classes."""
        return math.ceil(self.classes / self.blocks.classes)

    @property
    def steps(self) -> int:
        """The number of steps that a tile of logits takes."""
        return math.ceil(self.features / self.blocks.features)

    @property
    def floats(self) -> tuple[str, ...]:
        """The fields of `Running` that are float32, in the order of the results."""
        wanted = [("label", self.labels), ("gap", self.mean)]
        wanted += [("weighted", self.expected)]
        return ("max", "sum", *(name for name, w in wanted if w))

    @property
    def integers(self) -> tuple[str, ...]:
        """The fields of `Running` that are int32, in the order of the results."""
        wanted = [("number", self.mean), ("argmax", self.argmax)]
        return tuple(name for name, w in wanted if w)


class GpuInputs(NamedTuple, Generic[_Array]):
    """The arrays that the kernel reads, or references to them.

    Attributes:
      hidden: [M, H] bfloat16 or float16, M a multiple of 8 and at least N.
      kernel: [H, V] or [V, H] in the same dtype.
      bias: [tiles · classes of a tile] float32, -inf at dropped classes and beyond V;
        or None.
      labels: [rows of results] int32, or None.
      tau_factors: [3, rows of results] float32, or None. With a, b and c the three of a
        row a logit u and the row's maximum m count as ((u·a - m·a)·b)·c in base 2.
    """

    hidden: _Array
    kernel: _Array
    bias: _Array | None
    labels: _Array | None
    tau_factors: _Array | None


class Partials(NamedTuple, Generic[_Array]):
    """What the kernel writes: the fields of `Running`, of each split and row.

    These are arrays, their types, or references to them.

    Attributes:
      floats: [fields, splits, rows of results], in the order of `GpuPlan.floats`; the
        sums of exponentials are in base 2, as is c in `weighted`. [2, groups, rows of
        results], maximum and sum, where the plan wants groups.
      integers: likewise, in the order of `GpuPlan.integers`; None if there are none.
    """

    floats: _Array
    integers: _Array | None


def choose_gpu_blocks(
    rows: int,
    classes: int,
    swizzle: int,
    multiprocessors: int = MULTIPROCESSORS,
    tensor_memory: bool = False,
) -> tuple[GpuBlocks, int]:
    """Returns the tiles of a problem, and into how many parts its classes are split.

    Args:
      rows: N >= 1.
      classes: V >= 1.
      swizzle: what the alignment of the kernel allows.
      multiprocessors: of the device.
      tensor_memory: whether it has some.

    Returns:
      The blocks, and the smallest number of splits that takes the least time, by the
      tiles that the busiest multiprocessor computes.
    """
    width = 256 if classes > 256 * multiprocessors // 2 else 128
    blocks = GpuBlocks(classes=width, swizzle=swizzle)
    if tensor_memory:
        blocks = dataclasses.replace(blocks, rows=128, tensor_memory=True)
    row_tiles = math.ceil(rows / blocks.block_rows)
    if row_tiles % 2 == 0 and not tensor_memory:
        blocks = dataclasses.replace(blocks, cluster=2)
    tiles = math.ceil(classes / width)

    def time(splits):
        waves = math.ceil(row_tiles * splits / multiprocessors)
        # Filling the ring and merging the splits cost about a quarter of a tile.
        return waves * (math.ceil(tiles / splits) + 0.25)

    splits = min(range(1, min(tiles, multiprocessors) + 1), key=time)
    return blocks, splits
