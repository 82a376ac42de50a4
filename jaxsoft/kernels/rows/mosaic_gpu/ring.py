"""Into which chunks rows are cut for GPUs, and how many of them shared memory holds."""

import dataclasses
import math

from jaxsoft._core.numerics import round_up
from jaxsoft.kernels.rows.mosaic_gpu.tasks import LINE, PIECE

__all__ = ["Ring", "choose_fold_ring", "choose_ring"]

# The bytes of a chunk of one array: at most 64 lines, of the 256 that TMA copies at a
# time.
_CHUNK_BYTES = 16 * 2**10
# The shared memory of a multiprocessor that its blocks can have.
_SHARED_BYTES = 227 * 2**10
# The bytes that a block needs beside its ring: barriers, reductions, and a KiB that the
# hardware takes of each block.
_SPARE_BYTES = 3 * 2**10
# More blocks than these on a multiprocessor would not make it busier.
_MOST_BLOCKS = 8
# How many blocks can share a row. Every GPU that has this kernel can place 8.
_CLUSTERS = (1, 2, 4, 8)
# The multiprocessors of a GPU come in groups of neighbours, at least this many in each;
# a cluster lies within one group.
_NEIGHBOURS = 16
# The bytes of a number of noise.
_NOISE_BYTES = 4
# Of a block that writes nothing: the lines of a chunk, all in registers at once beside
# several sums, and the bytes in flight.
_FOLD_LINES, _FOLD_BYTES = 32, 64 * 2**10


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a row passes through the shared memory of a block of threads.

    Attributes:
      lines: of a row, 128 numbers each.
      chunk: lines of a chunk.
      slots: chunks that fit, at most the share of a block.
      blocks: of threads, on a multiprocessor.
      keeps_noise: whether each slot has its noise beside it, so that none is drawn
        twice.
      cluster: blocks that share a row.
    """

    lines: int
    chunk: int
    slots: int
    blocks: int
    keeps_noise: bool = False
    cluster: int = 1

    def __post_init__(self):
        """Requires what the order of copies requires."""
        if self.cluster > self.chunks:
            raise ValueError(
                f"`cluster` must be at most {self.chunks}, the chunks of a row, got "
                f"{self.cluster}."
            )
        if self.slots < min(2, self.share):
            raise ValueError(
                f"`slots` must be 2 or more, or a block's chunks, got {self.slots}."
            )
        if self.chunk % min(PIECE, self.chunk):
            raise ValueError(f"`chunk` must be a multiple of 8, got {self.chunk}.")
        if self.keeps_noise and self.slots < self.share:
            raise ValueError(
                f"`slots` must be {self.share} to keep noise, got {self.slots}."
            )

    @property
    def chunks(self) -> int:
        """The chunks of a row; the last one may have fewer lines than a chunk."""
        return math.ceil(self.lines / self.chunk)

    @property
    def share(self) -> int:
        """The most chunks of a row that one block has."""
        return math.ceil(self.chunks / self.cluster)

    @property
    def reads(self) -> float:
        """How often a row is read that is written, on average of its chunks."""
        return 2 - self.slots / self.share

    def groups(self, multiprocessors: int) -> int:
        """Returns how many blocks, or clusters of them, run at the same time."""
        if self.cluster == 1:
            return multiprocessors * self.blocks
        # Rows are dealt out in advance: a cluster that had to wait would double the
        # time.
        neighbours = multiprocessors - multiprocessors % _NEIGHBOURS
        return max(1, neighbours * self.blocks // self.cluster)


def choose_ring(classes: int, itemsize: int, arrays: int, noisy: bool = False) -> Ring:
    """Chooses the ring.

    Args:
      classes: V.
      itemsize: the bytes of a number.
      arrays: how many arrays are read.
      noisy: whether there is noise to keep.

    Returns:
      The ring. A whole row stays in a block where it fits, or in the fewest blocks that
      leave room for another row's on their multiprocessors, which hides how long they
      take to meet; else in the fewest that it fits. Its noise stays with it.
    """
    lines, chunk, chunks = _chunks(classes, _CHUNK_BYTES // (LINE * itemsize))

    def ring(cluster: int, keeps_noise: bool) -> Ring | None:
        slot = (arrays * itemsize + keeps_noise * _NOISE_BYTES) * chunk * LINE
        share = math.ceil(chunks / cluster)
        spare = _spare(cluster)
        slots = min(share, (_SHARED_BYTES - spare) // slot)
        if keeps_noise and slots < share:
            return None
        blocks = min(_MOST_BLOCKS, _SHARED_BYTES // (slots * slot + spare))
        return Ring(lines, chunk, slots, blocks, keeps_noise, cluster)

    clusters = [cluster for cluster in _CLUSTERS if cluster <= chunks]
    rings = [ring(cluster, noisy) for cluster in clusters]
    whole = [r for r in rings if r is not None and r.slots == r.share]
    roomy = [r for r in whole if r.cluster == 1 or r.blocks > 1]
    if whole:
        return (roomy or whole)[0]
    largest_cluster = ring(clusters[-1], False)
    assert largest_cluster is not None
    return largest_cluster


def choose_fold_ring(
    rows: int, classes: int, itemsize: int, multiprocessors: int
) -> Ring:
    """Chooses the ring of a fold, which writes no chunk and so holds but a few.

    Args:
      rows: R >= 1.
      classes: V.
      itemsize: the bytes of a number.
      multiprocessors: of the device.

    Returns:
      The ring. Few rows are shared by blocks of clusters, by as many as leave every row
      a cluster at the same time; many have a block each.
    """
    lines, chunk, chunks = _chunks(classes, _FOLD_LINES)
    most = _FOLD_BYTES // (chunk * LINE * itemsize)

    def ring(cluster: int) -> Ring:
        slots = min(math.ceil(chunks / cluster), most)
        held = slots * chunk * LINE * itemsize + _spare(cluster)
        blocks = min(_MOST_BLOCKS, _SHARED_BYTES // held)
        return Ring(lines, chunk, slots, blocks, cluster=cluster)

    rings = [ring(cluster) for cluster in _CLUSTERS if cluster <= chunks]
    at_once = [r for r in rings if r.groups(multiprocessors) >= rows]
    return at_once[-1] if at_once else rings[0]


def _chunks(classes: int, most: int) -> tuple[int, int, int]:
    """Returns the lines of a row and of a chunk, and the chunks of a row."""
    lines = math.ceil(classes / LINE)
    chunk = min(lines, most)
    if chunk > PIECE:
        chunk = round_up(chunk, PIECE)
    return lines, chunk, math.ceil(lines / chunk)


def _spare(cluster: int) -> int:
    """Returns the bytes of shared memory that a block needs beside its ring."""
    # A cluster's blocks also hold the lines in which they meet.
    return _SPARE_BYTES + (cluster > 1) * (1 + cluster) * LINE * 4
