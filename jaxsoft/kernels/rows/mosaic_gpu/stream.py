"""How rows pass through the shared memory of GPUs.

A block of 128 threads works on one row after another. Chunks of a row arrive in shared
memory (TMA), and a fold takes each as it arrives into a few numbers a thread, which
meet once a row. If these numbers are all that is wanted, the next chunk takes the place
of the one that was folded. If not, the chunks are overwritten by the task's result and
copied out, from the last to the first: those that shared memory still holds are not
read again. While they are copied out, chunks of the next row come into their places.

A row that does not fit a multiprocessor, or has more of them to itself, is shared by
the blocks of a cluster, which run at the same time on neighbouring multiprocessors:
each folds some of its chunks, and they tell each other what they found.
"""

import abc
import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.kernels.rows.mosaic_gpu.ring import Ring
from jaxsoft.kernels.rows.mosaic_gpu.tasks import LINE, Chunk, RowFold, Task
from jaxsoft.kernels.typing import Barrier, Factors, Index, Ref, Scalar

__all__ = ["Meeting", "Refs", "stream"]

_Carry = TypeVar("_Carry")
_Result = TypeVar("_Result")


class Meeting(NamedTuple):
    """Where the blocks of a cluster tell each other what they found of a row.

    Attributes:
      table: in the device's memory, [G, 2, B, 128]: a line of each of the B blocks of G
        clusters, for rows of even and of odd index.
      line: the block's line, in shared memory, [128].
      lines: those of all blocks of the cluster, in shared memory, [B, 128].
      written: the cluster's barrier: every block has written its line to the table.
      arrived: the block's barrier: the lines have arrived in its shared memory.
    """

    table: Ref
    line: Ref
    lines: Ref
    written: Barrier
    arrived: Barrier


class Refs(NamedTuple):
    """The arrays of a kernel, in the device's memory and in shared memory.

    Attributes:
      inputs: [R, L, 128] each.
      out: [R, L, 128], or None if nothing is written.
      recorded: [K, R] float32, what is returned of each row, or None.
      factors: [K, R], numbers for each row, or None.
      words: [R, 2], keys for each row, or None.
      stages: a ring for each input, [S, C, 128].
      noise: a ring for noise, or None.
      full: a barrier for each slot.
      meeting: where the blocks of a cluster meet, or None without clusters.
    """

    inputs: list[Ref]
    out: Ref | None
    recorded: Ref | None
    factors: Ref | None
    words: Ref | None
    stages: list[Ref]
    noise: Ref | None
    full: Barrier
    meeting: Meeting | None


def stream(task: RowFold, ring: Ring, rows: int, groups: int, refs: Refs) -> None:
    """Streams the rows of a block, or of a cluster of them, through shared memory.

    Args:
      task: what to find, and what to write if anything is written.
      ring: how a row passes.
      rows: of the arrays.
      groups: clusters on all multiprocessors, or blocks that share nothing.
      refs: the arrays.
    """
    group = lax.axis_index("group")
    count = lax.div(rows - group + (groups - 1), groups)
    part = _part(ring)

    def row_pass(position, factors, words) -> _RowPass:
        given = ring, refs, position, part, factors, words
        if isinstance(task, Task):
            return _RowStream(task, *given)
        return _FoldStream(task, *given)

    def stream_row(index, _):
        factors, words, row = task.static, None, group + index * groups
        if refs.factors is not None:
            number = refs.factors.shape[0]
            factors = tuple(refs.factors[i, row] for i in range(number))
        if refs.words is not None:
            words = tuple(refs.words[row, i] for i in range(2))
        assert factors is not None
        row_pass(_RowPosition(index, row, groups, count), factors, words).run()

    first = row_pass(_RowPosition(0, group, groups, count), (), None)
    lax.fori_loop(0, part.slots, lambda p, _: first.copy(group, p, p), None)
    lax.fori_loop(0, count, stream_row, None)


class _Part(NamedTuple):
    """The part of each row that one block has.

    Attributes:
      first: its first chunk.
      chunks: how many it has.
      slots: how many of them fit.
    """

    first: Scalar
    chunks: Scalar
    slots: Scalar


def _part(ring: Ring) -> _Part:
    """Returns the part of this block."""
    if ring.cluster == 1:
        return _Part(0, ring.chunks, ring.slots)
    # The blocks' parts are whole chunks, and differ by one chunk at most.
    block = lax.axis_index("part")
    first, end = (
        lax.div(number * ring.chunks, ring.cluster) for number in (block, block + 1)
    )
    return _Part(first, end - first, lax.min(end - first, ring.slots))


class _RowPosition(NamedTuple):
    """Which row it is, of those that a group streams one after another.

    Attributes:
      index: its number among the group's rows.
      row: its number in the arrays.
      step: from a row of the group to its next, in the arrays.
      count: of the group's rows.
    """

    index: Scalar
    row: Scalar
    step: int
    count: Scalar


@dataclasses.dataclass(frozen=True)
class _RowPass(abc.ABC, Generic[_Carry, _Result]):
    """The way of one row through the shared memory of one block.

    The block has a part of the row, whose chunks are numbered from 0 and are folded in
    this order.

    Attributes:
      task: what to find, and what to write if anything is written.
      ring: how the row passes.
      refs: the arrays.
      position: which row it is.
      part: what the block has of it.
      factors: the numbers of the row that the fold needs.
      words: the words of its key, or None.
    """

    task: RowFold[_Carry, _Result]
    ring: Ring
    refs: Refs
    position: _RowPosition
    part: _Part
    factors: Factors
    words: tuple[jax.Array, ...] | None

    @abc.abstractmethod
    def run(self) -> None:
        """Does all that is to be done with the row, and lets the next one in."""

    @abc.abstractmethod
    def slot(self, chunk: Scalar) -> Scalar:
        """Returns the slot of a chunk."""

    @abc.abstractmethod
    def replace(self, chunk: Scalar, slot: Scalar) -> None:
        """Copies what comes next into the slot of a chunk that was folded."""

    def find(self) -> _Result:
        """Folds the row, and returns what is known of it."""
        lines, stage = self.ring.chunk, self.refs.stages[0]
        start = self.task.start(lines, stage.dtype.itemsize)
        carry = lax.fori_loop(0, self.part.chunks, self.fold, start)
        of_block = self.task.meet(self.factors, carry)
        result = self.task.finish(self.factors, self.exchange(of_block))
        self.record(self.task.record(result))
        return result

    def record(self, numbers: tuple[jax.Array, ...]) -> None:
        """Writes what is returned of the row, which every thread knows."""
        from jax.experimental import pallas as pl

        recorded = self.refs.recorded
        if recorded is None:
            return

        def write():
            for index, number in enumerate(numbers):
                recorded[index, self.position.row] = number

        if self.ring.cluster == 1:
            write()
        else:
            pl.when(lax.axis_index("part") == 0)(write)

    def chunk(self, chunk: Scalar, slot: Scalar) -> Chunk:
        """Returns what the task sees of a chunk."""
        refs, first = self.refs, self.first_line(chunk)
        return Chunk(refs.stages, refs.noise, slot, first, self.factors, self.words)

    def first_line(self, chunk: Scalar) -> Scalar:
        """Returns the first line of a chunk in its row."""
        return (self.part.first + chunk) * self.ring.chunk

    def lines(self, chunk: Scalar) -> Index:
        """Returns the lines of a chunk in its row."""
        from jax.experimental import pallas as pl

        return pl.ds(self.first_line(chunk), self.ring.chunk)

    def copy(self, row: Scalar, chunk: Scalar, slot: Scalar) -> None:
        """Starts to copy a chunk of each input into a slot."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        refs = self.refs
        for ref, stage in zip(refs.inputs, refs.stages, strict=True):
            window = ref.at[row, self.lines(chunk)]
            plgpu.copy_gmem_to_smem(window, stage.at[slot], refs.full.at[slot])

    def fold(self, chunk: Scalar, carry: _Carry) -> _Carry:
        """Waits for a chunk and folds it; copies the one that takes its slot."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        slot = self.slot(chunk)
        plgpu.barrier_wait(self.refs.full.at[slot])
        self.fill_beyond(chunk, slot)
        carry = self.task.fold(self.chunk(chunk, slot), carry)
        self.replace(chunk, slot)
        return carry

    def fill_beyond(self, chunk: Scalar, slot: Scalar) -> None:
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

    def exchange(self, of_block: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
        """Returns what each block of the cluster found of the row."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        meeting = self.refs.meeting
        if meeting is None:
            return [of_block]
        layout = plgpu.Layout.WG_STRIDED((LINE,), vec_size=1)
        lane = plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=layout)
        line = jnp.zeros((LINE,), jnp.float32)
        for index, number in enumerate(of_block):
            line = jnp.where(lane == index, number, line)
        meeting.line[...] = line
        plgpu.commit_smem()
        # A block is at most one row ahead of another, which may still read the lines of
        # its own row: even and odd rows have lines of their own.
        table = meeting.table.at[
            lax.axis_index("group"), lax.rem(self.position.index, 2)
        ]
        plgpu.copy_smem_to_gmem(meeting.line, table.at[lax.axis_index("part")])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(meeting.written)
        plgpu.barrier_wait(meeting.written)
        plgpu.copy_gmem_to_smem(table, meeting.lines, meeting.arrived)
        plgpu.barrier_wait(meeting.arrived)
        blocks, numbers = range(self.ring.cluster), range(len(of_block))
        return [tuple(meeting.lines[b, i] for i in numbers) for b in blocks]


@dataclasses.dataclass(frozen=True)
class _FoldStream(_RowPass[_Carry, _Result]):
    """The way of a row of which nothing is written.

    The chunks of all rows of the block follow one another in the same order through
    slots that each of them leaves as soon as it is folded.
    """

    def run(self) -> None:
        """Folds the row."""
        self.find()

    def slot(self, chunk: Scalar) -> Scalar:
        """Returns the slot of a chunk, counted from the block's first row."""
        chunks, slots = self.part.chunks, self.part.slots
        return lax.rem(lax.rem(self.position.index * chunks, slots) + chunk, slots)

    def replace(self, chunk: Scalar, slot: Scalar) -> None:
        """Copies a chunk of this row or of the next one into the slot."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        following, chunks = chunk + self.part.slots, self.part.chunks
        row, step = self.position.row, self.position.step
        # Past this no thread still reads the slot.
        plgpu.commit_smem()

        @pl.when(following < chunks)
        def _():
            self.copy(row, following, slot)

        @pl.when(
            (following >= chunks) & (self.position.index + 1 < self.position.count)
        )
        def _():
            self.copy(row + step, following - chunks, slot)


@dataclasses.dataclass(frozen=True)
class _RowStream(_RowPass[_Carry, _Result]):
    """The way of a row whose chunks are overwritten.

    A chunk that has no slot yet is copied into the slot of the chunk that was just
    folded. Then the chunks are written in the opposite order, and copies refill the
    slots that they leave: first with chunks of this row that gave their slots up, which
    have to be written too, then with the next row's first chunks.
    """

    task: Task[_Carry, _Result]

    def run(self) -> None:
        """Folds the row, writes it, and lets the next one in."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        result = self.find()
        lax.fori_loop(0, self.part.chunks, self.write, result)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        # This is chunk 0, as a traced number. With a Python 0 Pallas would check the
        # copies' bounds when it traces them, and refuse the last chunk of a row, which
        # may reach beyond the array.
        self.refill(lax.rem(self.position.index, 1))

    def slot(self, chunk: Scalar) -> Scalar:
        """Returns the slot of a chunk.

        Chunk p of the block's even rows has slot p mod S, of its odd rows slot
        S - 1 - p mod S: slots that the end of a row leaves are those that the next row
        wants first.
        """
        slots = self.part.slots
        odd, slot = lax.rem(self.position.index, 2), lax.rem(chunk, slots)
        return slot + odd * (slots - 1 - 2 * slot)

    def replace(self, chunk: Scalar, slot: Scalar) -> None:
        """Copies a chunk that has no slot yet, if there is one."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if self.ring.slots == self.ring.share:
            return
        following = chunk + self.part.slots

        @pl.when(following < self.part.chunks)
        def _():
            # Past this no thread still reads the slot.
            plgpu.commit_smem()
            self.copy(self.position.row, following, slot)

    def write(self, step: Scalar, result: _Result) -> _Result:
        """Overwrites a chunk by its result and copies it out, the last chunk first."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, refs, out = self.ring, self.refs, self.refs.out
        assert out is not None
        chunk = self.part.chunks - 1 - step
        slot = self.slot(chunk)
        if ring.slots < ring.share:

            @pl.when(chunk < self.part.chunks - self.part.slots)
            def _():
                plgpu.barrier_wait(refs.full.at[slot])

        self.task.write(self.chunk(chunk, slot), result)
        plgpu.commit_smem()
        window = out.at[self.position.row, self.lines(chunk)]
        plgpu.copy_smem_to_gmem(refs.stages[0].at[slot], window)

        @pl.when(step > 0)
        def _():
            # The copy before this one has left its slot.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.refill(chunk + 1)

        return result

    def refill(self, chunk: Scalar) -> None:
        """Copies what comes next into the slot that a chunk had."""
        from jax.experimental import pallas as pl

        slots, slot = self.part.slots, self.slot(chunk)
        row, step = self.position.row, self.position.step

        @pl.when(chunk >= slots)
        def _():
            self.copy(row, chunk - slots, slot)

        @pl.when((chunk < slots) & (self.position.index + 1 < self.position.count))
        def _():
            self.copy(row + step, slots - 1 - chunk, slot)
