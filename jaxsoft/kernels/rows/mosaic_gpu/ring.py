"""How rows pass through the shared memory of GPUs.

A block of 128 threads works on one row after another. Chunks of a row arrive in shared
memory (TMA), and a task folds each as it arrives into a few numbers a thread, which
meet once a row. Then the chunks are overwritten by the task's result and copied out,
from the last to the first: those that shared memory still holds are not read again.
While they are copied out, chunks of the next row come into their places.

A row that does not fit a multiprocessor is shared by the blocks of a cluster, which run
at the same time on neighbouring multiprocessors: each folds some of its chunks, and
they tell each other what they found.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsoft._core.padding import round_up
from jaxsoft.kernels.rows.mosaic_gpu.tasks import LINE, PIECE, Chunk

__all__ = ["Refs", "Ring", "choose", "stream"]

# Of a chunk; TMA copies at most 256 lines at a time.
_CHUNK_BYTES = 16 * 2**10
# Shared memory of a multiprocessor that blocks can have, and what is left beside a
# ring: barriers, reductions, and a KiB that the hardware takes of each block.
_SHARED_BYTES = 227 * 2**10
_SPARE_BYTES = 3 * 2**10
# More blocks on a multiprocessor would not make it busier.
_MOST_BLOCKS = 8
# Of blocks that share a row: as many as every such GPU can place.
_CLUSTERS = (1, 2, 4, 8)
_NOISE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a row passes through the shared memory of a block of threads.

    Attributes:
      lines: of a row, 128 numbers each.
      chunk: lines of a chunk.
      slots: chunks that fit, at most the share of a block.
      blocks: of threads, on a multiprocessor.
      keeps: whether each slot has its noise beside it, so that none is drawn twice.
      cluster: blocks that share a row.
    """

    lines: int
    chunk: int
    slots: int
    blocks: int
    keeps: bool = False
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
        if self.keeps and self.slots < self.share:
            raise ValueError(
                f"`slots` must be {self.share} to keep noise, got {self.slots}."
            )

    @property
    def chunks(self) -> int:
        """The chunks of a row, of which the last may stick out."""
        return math.ceil(self.lines / self.chunk)

    @property
    def share(self) -> int:
        """The most chunks of a row that one block has."""
        return math.ceil(self.chunks / self.cluster)

    @property
    def reads(self) -> float:
        """How often a row is read, on average of its chunks."""
        return 2 - self.slots / self.share


def choose(classes: int, itemsize: int, arrays: int, noisy: bool = False) -> Ring:
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
    lines = math.ceil(classes / LINE)
    chunk = min(lines, _CHUNK_BYTES // (LINE * itemsize))
    if chunk > PIECE:
        chunk = round_up(chunk, PIECE)
    chunks = math.ceil(lines / chunk)

    def ring(cluster: int, keeps: bool) -> Ring | None:
        slot = (arrays * itemsize + keeps * _NOISE_BYTES) * chunk * LINE
        share = math.ceil(chunks / cluster)
        # Lines of `Meeting`.
        spare = _SPARE_BYTES + (cluster > 1) * (1 + cluster) * LINE * 4
        slots = min(share, (_SHARED_BYTES - spare) // slot)
        if keeps and slots < share:
            return None
        blocks = min(_MOST_BLOCKS, _SHARED_BYTES // (slots * slot + spare))
        return Ring(lines, chunk, slots, blocks, keeps, cluster)

    clusters = [cluster for cluster in _CLUSTERS if cluster <= chunks]
    rings = [ring(cluster, noisy) for cluster in clusters]
    whole = [one for one in rings if one is not None and one.slots == one.share]
    roomy = [one for one in whole if one.cluster == 1 or one.blocks > 1]
    for one in roomy or whole:
        return one
    longest = ring(clusters[-1], False)
    assert longest is not None
    return longest


class Meeting(NamedTuple):
    """What the blocks of a cluster tell each other of a row through.

    Attributes:
      table: in the device's memory, [G, 2, B, 128]: of G clusters' B blocks, for rows
        of even and of odd index.
      own: a line of it in shared memory, [128].
      all: those of a row in shared memory, [B, 128].
      written: the cluster's barrier.
      arrived: the block's.
    """

    table: Any
    own: Any
    all: Any
    written: Any
    arrived: Any


class Refs(NamedTuple):
    """The arrays of a kernel, in the device's memory and in shared memory.

    Attributes:
      inputs: [R, L, 128] each.
      out: the same.
      temper: [K, R], numbers for each row, or None.
      words: [R, 2], keys for each row, or None.
      stages: a ring for each input, [S, C, 128].
      noise: a ring for noise, or None.
      full: a barrier for each slot.
      meeting: of the blocks of a cluster, or None.
    """

    inputs: Any
    out: Any
    temper: Any
    words: Any
    stages: Any
    noise: Any
    full: Any
    meeting: Meeting | None


def stream(task: Any, ring: Ring, rows: int, groups: int, refs: Refs) -> None:
    """Streams the rows of a block, or of a cluster of them, through shared memory.

    Args:
      task: what to fold and what to write.
      ring: how a row passes.
      rows: of the arrays.
      groups: clusters on all multiprocessors, or blocks that share nothing.
      refs: the arrays.
    """
    group = lax.axis_index("group")
    count = lax.div(rows - group + (groups - 1), groups)
    part = _part(ring)

    def row(index):
        temper, words, number = task.static, None, group + index * groups
        if refs.temper is not None:
            temper = tuple(refs.temper[i, number] for i in range(refs.temper.shape[0]))
        if refs.words is not None:
            words = tuple(refs.words[number, i] for i in range(2))
        place = _Place(index, number, groups, count)
        return _Row(task, ring, refs, place, part, temper, words)

    def each_row(index, _):
        row(index).run()

    start = _Place(0, group, groups, count)
    first = _Row(task, ring, refs, start, part, None, None)
    lax.fori_loop(0, part.slots, lambda p, _: first.copy(group, p, p), None)
    lax.fori_loop(0, count, each_row, None)


class _Part(NamedTuple):
    """What a block has of each row.

    Attributes:
      first: its first chunk.
      chunks: how many.
      slots: how many of them fit.
    """

    first: Any
    chunks: Any
    slots: Any


def _part(ring: Ring) -> _Part:
    """Returns the part of this block."""
    if ring.cluster == 1:
        return _Part(0, ring.chunks, ring.slots)
    # Parts of whole chunks, alike but for one.
    block = lax.axis_index("part")
    first, end = (
        lax.div(number * ring.chunks, ring.cluster) for number in (block, block + 1)
    )
    return _Part(first, end - first, lax.min(end - first, ring.slots))


class _Place(NamedTuple):
    """Which row it is: its number among the group's, and in the arrays.

    Attributes:
      index: among those of the group.
      row: in the arrays.
      step: from a row of the group to its next.
      count: of the group's rows.
    """

    index: Any
    row: Any
    step: int
    count: Any


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of which a block's part passes through its shared memory.

    Chunks are numbered in the part.

    Attributes:
      task: what to fold and what to write.
      ring: how it passes.
      refs: the arrays.
      place: which row it is.
      part: what the block has of it.
      temper: the numbers of the row that the task needs.
      words: of its key, or None.
    """

    task: Any
    ring: Ring
    refs: Refs
    place: _Place
    part: _Part
    temper: Any
    words: Any

    def run(self) -> None:
        """Folds the row, writes it, and lets the next one in."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        chunks = self.part.chunks
        start = self.task.start(self.ring.chunk, self.refs.stages[0].dtype.itemsize)
        found = lax.fori_loop(0, chunks, self.fold, start)
        found = self.task.meet(self.temper, found)
        result = self.task.finish(self.temper, self.exchange(found))
        lax.fori_loop(0, chunks, self.write, result)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        # Zero, but not when traced: the last chunk of a row sticks out.
        self.refill(lax.rem(self.place.index, 1))

    def slot(self, chunk: Any) -> Any:
        """Returns the slot of a chunk.

        Chunk p of the block's even rows has slot p mod S, of its odd rows slot
        S - 1 - p mod S: slots that the end of a row leaves are those that the next row
        wants first.
        """
        slots = self.part.slots
        odd, slot = lax.rem(self.place.index, 2), lax.rem(chunk, slots)
        return slot + odd * (slots - 1 - 2 * slot)

    def chunk(self, chunk: Any, slot: Any) -> Chunk:
        """Returns what the task sees of a chunk."""
        refs, first = self.refs, self.first_line(chunk)
        return Chunk(refs.stages, refs.noise, slot, first, self.temper, self.words)

    def first_line(self, chunk: Any) -> Any:
        """Returns the first line of a chunk in its row."""
        return (self.part.first + chunk) * self.ring.chunk

    def lines(self, chunk: Any) -> Any:
        """Returns the lines of a chunk in its row."""
        from jax.experimental import pallas as pl

        return pl.ds(self.first_line(chunk), self.ring.chunk)

    def copy(self, row: Any, chunk: Any, slot: Any) -> None:
        """Starts to copy a chunk of each input into a slot."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        refs = self.refs
        for ref, stage in zip(refs.inputs, refs.stages, strict=True):
            window = ref.at[row, self.lines(chunk)]
            plgpu.copy_gmem_to_smem(window, stage.at[slot], refs.full.at[slot])

    def fold(self, chunk: Any, found: Any) -> Any:
        """Waits for a chunk and folds it; copies the one that takes its slot."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, slot = self.ring, self.slot(chunk)
        plgpu.barrier_wait(self.refs.full.at[slot])
        self.fill_beyond(chunk, slot)
        found = self.task.fold(self.chunk(chunk, slot), found)
        if ring.slots < ring.share:
            following = chunk + self.part.slots

            @pl.when(following < self.part.chunks)
            def _():
                # Past this no thread still reads the slot.
                plgpu.commit_smem()
                self.copy(self.place.row, following, slot)

        return found

    def fill_beyond(self, chunk: Any, slot: Any) -> None:
        """Fills the lines of the last chunk that are beyond the row."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, stage = self.ring, self.refs.stages[0]
        held = ring.lines - (ring.chunks - 1) * ring.chunk
        if held == ring.chunk or self.task.fill == 0:
            return

        @pl.when(self.part.first + chunk == ring.chunks - 1)
        def _():
            for line in range(held, ring.chunk):
                stage[slot, line] = jnp.full((LINE,), self.task.fill, stage.dtype)
            plgpu.commit_smem()

    def exchange(self, found: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Returns what each block of the cluster found of the row."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        meeting = self.refs.meeting
        if meeting is None:
            return [found]
        layout = plgpu.Layout.WG_STRIDED((LINE,), vec_size=1)
        lane = plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=layout)
        line = jnp.zeros((LINE,), jnp.float32)
        for index, number in enumerate(found):
            line = jnp.where(lane == index, number, line)
        meeting.own[...] = line
        plgpu.commit_smem()
        # A block is at most one row ahead of another, which may still read its row's.
        table = meeting.table.at[lax.axis_index("group"), lax.rem(self.place.index, 2)]
        plgpu.copy_smem_to_gmem(meeting.own, table.at[lax.axis_index("part")])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(meeting.written)
        plgpu.barrier_wait(meeting.written)
        plgpu.copy_gmem_to_smem(table, meeting.all, meeting.arrived)
        plgpu.barrier_wait(meeting.arrived)
        blocks, numbers = range(self.ring.cluster), range(len(found))
        return [tuple(meeting.all[b, i] for i in numbers) for b in blocks]

    def write(self, step: Any, result: Any) -> Any:
        """Overwrites a chunk by its result and copies it out, the last chunk first."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, refs = self.ring, self.refs
        chunk = self.part.chunks - 1 - step
        slot = self.slot(chunk)
        if ring.slots < ring.share:

            @pl.when(chunk < self.part.chunks - self.part.slots)
            def _():
                plgpu.barrier_wait(refs.full.at[slot])

        self.task.write(self.chunk(chunk, slot), result)
        plgpu.commit_smem()
        window = refs.out.at[self.place.row, self.lines(chunk)]
        plgpu.copy_smem_to_gmem(refs.stages[0].at[slot], window)

        @pl.when(step > 0)
        def _():
            # The copy before this one has left its slot.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.refill(chunk + 1)

        return result

    def refill(self, chunk: Any) -> None:
        """Copies what comes next into the slot that a chunk had."""
        from jax.experimental import pallas as pl

        slots, slot = self.part.slots, self.slot(chunk)
        _, row, step, _ = self.place

        @pl.when(chunk >= slots)
        def _():
            self.copy(row, chunk - slots, slot)

        @pl.when((chunk < slots) & (self.place.index + 1 < self.place.count))
        def _():
            self.copy(row + step, slots - 1 - chunk, slot)
