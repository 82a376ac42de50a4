"""How rows pass through the shared memory of Hopper's kernels.

A block of 128 threads works on one row after another. Chunks of a row arrive in shared
memory (TMA), and a task folds each as it arrives into a few numbers a thread, which
meet once a row. Then the chunks are overwritten by the task's result and copied out,
from the last to the first: those that shared memory still holds are not read again.
While they are copied out, chunks of the next row come into their places.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsoft.logits.mosaic_gpu_tasks import LINE, PIECE, Chunk
from jaxsoft.padding import round_up

__all__ = ["Refs", "Ring", "choose", "stream"]

# Of a chunk; TMA copies at most 256 lines at a time.
_CHUNK_BYTES = 16 * 2**10
# Shared memory of a multiprocessor that blocks can have, and what is left beside a
# ring: barriers, reductions, and a KiB that the hardware takes of each block.
_SHARED_BYTES = 227 * 2**10
_SPARE_BYTES = 3 * 2**10
# More blocks on a multiprocessor would not make it busier.
_MOST_BLOCKS = 8
_NOISE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a row passes through the shared memory of a block of threads.

    Attributes:
      lines: of a row, 128 numbers each.
      chunk: lines of a chunk.
      slots: chunks that fit, at most those of a row.
      blocks: of threads, on a multiprocessor.
      keeps: whether each slot has its noise beside it, so that none is drawn twice.
    """

    lines: int
    chunk: int
    slots: int
    blocks: int
    keeps: bool = False

    def __post_init__(self):
        """Requires what the order of copies requires."""
        if self.slots < min(2, self.chunks):
            raise ValueError(
                f"`slots` must be 2 or more, or a row's chunks, got {self.slots}."
            )
        if self.chunk % min(PIECE, self.chunk):
            raise ValueError(f"`chunk` must be a multiple of 8, got {self.chunk}.")
        if self.keeps and self.slots < self.chunks:
            raise ValueError(
                f"`slots` must be {self.chunks} to keep noise, got {self.slots}."
            )

    @property
    def chunks(self) -> int:
        """The chunks of a row, of which the last may stick out."""
        return math.ceil(self.lines / self.chunk)

    @property
    def reads(self) -> float:
        """How often a row is read, on average of its chunks."""
        return 2 - self.slots / self.chunks


def choose(classes: int, itemsize: int, arrays: int, noisy: bool = False) -> Ring:
    """Chooses the ring.

    Args:
      classes: V.
      itemsize: the bytes of a number.
      arrays: how many arrays are read.
      noisy: whether there is noise to keep.

    Returns:
      The ring; a whole row stays where it fits, and its noise where both fit.
    """
    lines = math.ceil(classes / LINE)
    chunk = min(lines, _CHUNK_BYTES // (LINE * itemsize))
    if chunk > PIECE:
        chunk = round_up(chunk, PIECE)
    chunks = math.ceil(lines / chunk)
    for keeps in (True, False)[not noisy :]:
        slot = (arrays * itemsize + keeps * _NOISE_BYTES) * chunk * LINE
        slots = min(chunks, (_SHARED_BYTES - _SPARE_BYTES) // slot)
        if slots == chunks or not keeps:
            blocks = _SHARED_BYTES // (slots * slot + _SPARE_BYTES)
            return Ring(lines, chunk, slots, min(_MOST_BLOCKS, blocks), keeps)
    raise AssertionError


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
    """

    inputs: Any
    out: Any
    temper: Any
    words: Any
    stages: Any
    noise: Any
    full: Any


def stream(task: Any, ring: Ring, rows: int, blocks: int, refs: Refs) -> None:
    """Streams the rows of a block of threads through its shared memory.

    Args:
      task: what to fold and what to write.
      ring: how a row passes.
      rows: of the arrays.
      blocks: of threads, on all multiprocessors.
      refs: the arrays.
    """
    block = lax.axis_index("block")
    count = lax.div(rows - block + (blocks - 1), blocks)

    def row(index):
        temper, words, number = task.static, None, block + index * blocks
        if refs.temper is not None:
            temper = tuple(refs.temper[i, number] for i in range(refs.temper.shape[0]))
        if refs.words is not None:
            words = tuple(refs.words[number, i] for i in range(2))
        place = _Place(index, number, blocks, count)
        return _Row(task, ring, refs, place, temper, words)

    def each_row(index, _):
        row(index).run()

    first = _Row(task, ring, refs, _Place(0, block, blocks, count), None, None)
    lax.fori_loop(0, ring.slots, lambda p, _: first.copy(block, p, p), None)
    lax.fori_loop(0, count, each_row, None)


class _Place(NamedTuple):
    """Which row it is: its number among the block's, and in the arrays.

    Attributes:
      index: among those of the block.
      row: in the arrays.
      step: from a row of the block to its next.
      count: of the block's rows.
    """

    index: Any
    row: Any
    step: int
    count: Any


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row that passes through shared memory.

    Attributes:
      task: what to fold and what to write.
      ring: how it passes.
      refs: the arrays.
      place: which row it is.
      temper: the numbers of the row that the task needs.
      words: of its key, or None.
    """

    task: Any
    ring: Ring
    refs: Refs
    place: _Place
    temper: Any
    words: Any

    def run(self) -> None:
        """Folds the row, writes it, and lets the next one in."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        chunks = self.ring.chunks
        start = self.task.start(self.ring.chunk, self.refs.stages[0].dtype.itemsize)
        found = lax.fori_loop(0, chunks, self.fold, start)
        result = self.task.finish(self.temper, found)
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
        slots = self.ring.slots
        odd, slot = lax.rem(self.place.index, 2), lax.rem(chunk, slots)
        return slot + odd * (slots - 1 - 2 * slot)

    def chunk(self, chunk: Any, slot: Any) -> Chunk:
        """Returns what the task sees of a chunk."""
        refs, first = self.refs, chunk * self.ring.chunk
        return Chunk(refs.stages, refs.noise, slot, first, self.temper, self.words)

    def lines(self, chunk: Any) -> Any:
        """Returns the lines of a chunk in its row."""
        from jax.experimental import pallas as pl

        return pl.ds(chunk * self.ring.chunk, self.ring.chunk)

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
        if ring.slots < ring.chunks:

            @pl.when(chunk + ring.slots < ring.chunks)
            def _():
                # Past this no thread still reads the slot.
                plgpu.commit_smem()
                self.copy(self.place.row, chunk + ring.slots, slot)

        return found

    def fill_beyond(self, chunk: Any, slot: Any) -> None:
        """Fills the lines of the last chunk that are beyond the row."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, stage = self.ring, self.refs.stages[0]
        held = ring.lines - (ring.chunks - 1) * ring.chunk
        if held == ring.chunk or self.task.fill == 0:
            return

        @pl.when(chunk == ring.chunks - 1)
        def _():
            for line in range(held, ring.chunk):
                stage[slot, line] = jnp.full((LINE,), self.task.fill, stage.dtype)
            plgpu.commit_smem()

    def write(self, step: Any, result: Any) -> Any:
        """Overwrites a chunk by its result and copies it out, the last chunk first."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, refs = self.ring, self.refs
        chunk = ring.chunks - 1 - step
        slot = self.slot(chunk)
        if ring.slots < ring.chunks:

            @pl.when(chunk < ring.chunks - ring.slots)
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

        slots, slot = self.ring.slots, self.slot(chunk)
        _, row, step, _ = self.place

        @pl.when(chunk >= slots)
        def _():
            self.copy(row, chunk - slots, slot)

        @pl.when((chunk < slots) & (self.place.index + 1 < self.place.count))
        def _():
            self.copy(row + step, slots - 1 - chunk, slot)
