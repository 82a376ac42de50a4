"""Softmaxes of rows in kernels for Hopper GPUs, by Mosaic GPU.

A block of 128 threads works on one row after another. Chunks of a row arrive in shared
memory (TMA), and each is folded as it arrives into a largest logit and a sum for every
thread, which meet once a row. Then the chunks are overwritten by their probabilities
and copied out, from the last to the first: those that shared memory still holds are not
read again, which is all of a row of up to some 57,000 float32 numbers; of a longer row
the rest is read twice (a cluster of multiprocessors could hold it; a later step). While
they are copied out, chunks of the next row come into their places. Backward, from
chunks of y and g, likewise.

Not yet measured: nothing here has run on a GPU. It was compiled for one, read as
machine code, and interpreted.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft import nvidia, varying
from jaxsoft.logits.kernel_rows import Plan

__all__ = ["Ring", "backward", "choose", "forward"]

_CAPABILITIES = ("9.0",)
# Numbers in a line; a piece is what threads hold at a time, 8 numbers each.
_LINE = 128
_PIECE = 8
# Of a chunk; TMA copies at most 256 lines at a time.
_CHUNK_BYTES = 16 * 2**10
# Shared memory of a multiprocessor that blocks can have, and what is left beside a
# ring: barriers, reductions, and a KiB that the hardware takes of each block.
_SHARED_BYTES = 227 * 2**10
_SPARE_BYTES = 3 * 2**10
# More blocks on a multiprocessor would not make it busier.
_MOST_BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a row passes through the shared memory of a block of threads.

    Attributes:
      lines: of a row, 128 numbers each.
      chunk: lines of a chunk.
      slots: chunks that fit, at most those of a row.
      blocks: of threads, on a multiprocessor.
    """

    lines: int
    chunk: int
    slots: int
    blocks: int

    def __post_init__(self):
        """Requires what the order of copies requires."""
        if self.slots < min(2, self.chunks):
            raise ValueError(
                f"`slots` must be 2 or more, or a row's chunks, got {self.slots}."
            )
        if self.chunk % self.piece:
            raise ValueError(
                f"`chunk` must be a multiple of {self.piece}, got {self.chunk}."
            )

    @property
    def chunks(self) -> int:
        """The chunks of a row, of which the last may stick out."""
        return math.ceil(self.lines / self.chunk)

    @property
    def piece(self) -> int:
        """The lines of a piece, of which a chunk has a whole number."""
        return min(_PIECE, self.chunk)

    @property
    def reads(self) -> float:
        """How often a row is read, on average of its chunks."""
        return 2 - self.slots / self.chunks


def choose(classes: int, itemsize: int, arrays: int) -> Ring:
    """Chooses the ring.

    Args:
      classes: V.
      itemsize: the bytes of a number.
      arrays: how many arrays are read.

    Returns:
      The ring; a whole row stays where it fits.
    """
    lines = math.ceil(classes / _LINE)
    chunk = min(lines, _CHUNK_BYTES // (_LINE * itemsize))
    if chunk > _PIECE:
        chunk = math.ceil(chunk / _PIECE) * _PIECE
    slot = arrays * chunk * _LINE * itemsize
    fitting = (_SHARED_BYTES - _SPARE_BYTES) // slot
    slots = min(math.ceil(lines / chunk), fitting)
    blocks = _SHARED_BYTES // (slots * slot + _SPARE_BYTES)
    return Ring(lines, chunk, slots, min(_MOST_BLOCKS, blocks))


def forward(plan: Plan, x: jax.Array, tau: Any, words: Any) -> jax.Array:
    """Returns softmax(x / τ).

    Args:
      plan: what is known of the call.
      x: [R, V] float32, bfloat16 or float16.
      tau: [R, 1] float32, or None where it is static.
      words: None.

    Returns:
      [R, V] in the dtype of `x`.

    Raises:
      NotImplementedError: on GPUs other than Hopper's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    del words
    scale, factor = nvidia.static_temper(plan.static_tau)
    static = (scale if scale != 1 else None, factor, None)
    rows = None if tau is None else nvidia.temper(tau, x.shape[0])
    return _call("jaxsoft_softmax_forward", _Softmax(static), (x,), rows)


def backward(plan: Plan, y: jax.Array, g: jax.Array, scale: Any) -> jax.Array:
    """Returns y (g - Σ y g / Σ y) / τ.

    Args:
      plan: what is known of the call.
      y: [R, V] float32, bfloat16 or float16, a softmax.
      g: [R, V] in the same dtype.
      scale: 1/τ [R, 1] float32, or None where τ is static.

    Returns:
      [R, V] in the dtype of `y`.

    Raises:
      NotImplementedError: on GPUs other than Hopper's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static = None if plan.static_tau is None else (1 / plan.static_tau,)
    rows = None if scale is None else scale[:, 0][None]
    return _call("jaxsoft_softmax_backward", _Slope(static), (y, g), rows)


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """The largest logit and the sum of a row, then its probabilities.

    Attributes:
      static: the factors of `nvidia.temper`, None for 1, if they are static.
    """

    static: Any

    # What columns beyond a row are; those of TMA are 0.
    fill = -math.inf

    def start(self, full: Any) -> Any:
        """Returns what each thread has found before the first chunk."""
        return full(float(jnp.finfo(jnp.float32).min)), full(0.0)

    def fold(self, row, found, pieces):
        """Merges pieces ([1, P, 128] of each array) into what was found."""
        peak, total = found
        xs = [x for (x,) in pieces]
        top = functools.reduce(jnp.maximum, xs, peak)
        total = total * jnp.exp2(_centred(row, peak, top))
        for x in xs:
            total = total + jnp.exp2(_centred(row, x, top))
        return top, total

    def finish(self, row, found):
        """Returns the row's largest logit, and one over its sum."""
        peak, total = found
        top = jnp.max(peak)
        total = jnp.sum(total * jnp.exp2(_centred(row, peak, top)))
        return top, 1 / jnp.where(total == 0, 1.0, total)

    def write(self, row, result, x):
        """Returns the probabilities of a piece."""
        top, inverse = result
        return jnp.exp2(_centred(row, x, top)) * inverse


@dataclasses.dataclass(frozen=True)
class _Slope:
    """Σ y g and Σ y of a row, then y (g - Σ y g / Σ y) / τ.

    Attributes:
      static: 1/τ, if it is static.
    """

    static: Any
    fill = 0.0

    def start(self, full: Any) -> Any:
        """Returns what each thread has found before the first chunk."""
        return full(0.0), full(0.0)

    def fold(self, row, found, pieces):
        """Adds up pieces of y and g."""
        del row
        weighted, total = found
        for y, g in pieces:
            weighted, total = weighted + y * g, total + y
        return weighted, total

    def finish(self, row, found):
        """Returns the mean of g."""
        del row
        weighted, total = (jnp.sum(a) for a in found)
        return weighted / jnp.where(total == 0, 1.0, total)

    def write(self, row, mean, y, g):
        """Returns the product with a piece."""
        (scale,) = row
        return y * (g - mean) * scale


def _centred(row: Any, x: jax.Array, peak: jax.Array) -> jax.Array:
    """Returns (x - peak) / τ in base 2."""
    before, factor, again = row
    c = x - peak if before is None else x * before - peak * before
    c = c * factor
    return c if again is None else c * again


def _call(name: str, task: Any, arrays: tuple[jax.Array, ...], temper: Any):
    """Runs a task over rows.

    Args:
      name: of the kernel.
      task: what to fold and what to write.
      arrays: [R, V] each, in one dtype.
      temper: [K, R], numbers for each row; None where the task has them.

    Returns:
      [R, V] in the dtype of the arrays.
    """
    nvidia.check_pallas()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype = arrays[0].dtype
    rows, classes = arrays[0].shape
    ring = choose(classes, dtype.itemsize, len(arrays))
    width = ring.lines * _LINE
    if width > classes:
        # TMA needs rows of 16 bytes, and lines are whole.
        missing = ((0, 0), (0, width - classes))
        fill = jnp.asarray(task.fill, dtype)
        padded = [jnp.pad(a, missing, constant_values=fill) for a in arrays]
    else:
        padded = arrays
    shaped = [a.reshape(rows, ring.lines, _LINE) for a in padded]
    slots = (ring.slots, ring.chunk, _LINE)
    scratch: dict[str, Any] = {
        f"slots{i}": plgpu.SMEM(slots, dtype) for i in range(len(arrays))
    }
    scratch["full"] = plgpu.Barrier(num_arrivals=len(arrays), num_barriers=ring.slots)
    out_type: Any = jax.ShapeDtypeStruct(shaped[0].shape, dtype)
    blocks = min(rows, nvidia.chip(_CAPABILITIES).core_count * ring.blocks)
    body = functools.partial(_kernel, task, ring, temper is not None, rows, blocks)
    found = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        # ex2.approx is as good as exp2; nothing else here has an approximation.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*shaped, *([] if temper is None else [temper]))
    found = varying.like(found, arrays)
    return found.reshape(rows, width)[:, :classes]


def _kernel(task, ring: Ring, tempered, rows: int, blocks: int, *refs, full, **slots):
    """Streams the rows of a block of threads through its shared memory.

    Chunk p of the block's even rows has slot p mod S, of its odd rows slot
    S - 1 - p mod S: slots that the end of a row leaves are those that the next row
    wants first.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *inputs, out = refs
    temper = inputs.pop() if tempered else None
    stages = [slots[f"slots{i}"] for i in range(len(inputs))]
    block = lax.axis_index("block")
    count = lax.div(rows - block + (blocks - 1), blocks)

    def lines(chunk):
        return pl.ds(chunk * ring.chunk, ring.chunk)

    def copy(row, chunk, slot):
        for ref, stage in zip(inputs, stages, strict=True):
            window = ref.at[row, lines(chunk)]
            plgpu.copy_gmem_to_smem(window, stage.at[slot], full.at[slot])

    lax.fori_loop(0, ring.slots, lambda p, _: copy(block, p, p), None)

    def each_row(index, _):
        odd, row = lax.rem(index, 2), block + index * blocks

        def place(chunk):
            slot = lax.rem(chunk, ring.slots)
            return slot + odd * (ring.slots - 1 - 2 * slot)

        numbers = task.static
        if temper is not None:
            numbers = tuple(temper[i, row] for i in range(temper.shape[0]))
        stream = _Stream(task, ring, numbers, stages)

        def fold(chunk, found):
            slot = place(chunk)
            plgpu.barrier_wait(full.at[slot])
            stream.fill_beyond(chunk, slot)
            found = stream.fold(slot, found)
            if ring.slots < ring.chunks:

                @pl.when(chunk + ring.slots < ring.chunks)
                def _():
                    # Past this no thread still reads the slot.
                    plgpu.commit_smem()
                    copy(row, chunk + ring.slots, slot)

            return found

        def refill(chunk):
            """Copies what comes next into the slot that a chunk had."""
            slot = place(chunk)

            @pl.when(chunk >= ring.slots)
            def _():
                copy(row, chunk - ring.slots, slot)

            @pl.when((chunk < ring.slots) & (index + 1 < count))
            def _():
                copy(row + blocks, ring.slots - 1 - chunk, slot)

        def write(step, result):
            chunk = ring.chunks - 1 - step
            slot = place(chunk)
            if ring.slots < ring.chunks:

                @pl.when(chunk < ring.chunks - ring.slots)
                def _():
                    plgpu.barrier_wait(full.at[slot])

            stream.write(slot, result)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stages[0].at[slot], out.at[row, lines(chunk)])

            @pl.when(step > 0)
            def _():
                # The copy before this one has left its slot.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                refill(chunk + 1)

            return result

        found = lax.fori_loop(0, ring.chunks, fold, stream.start())
        result = task.finish(numbers, found)
        lax.fori_loop(0, ring.chunks, write, result)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        # Zero, but not when traced: the last chunk of a row sticks out.
        refill(lax.rem(index, 1))

    lax.fori_loop(0, count, each_row, None)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """A row's chunks in shared memory.

    Attributes:
      task: what to fold and what to write.
      ring: where chunks are.
      row: the numbers of the row that the task needs.
      stages: the slots of each array, [S, C, 128].
    """

    task: Any
    ring: Ring
    row: Any
    stages: Any

    def start(self) -> Any:
        """Returns what was found before the first chunk, as pieces lie in registers."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        piece = self.ring.piece
        vector = min(8 // self.stages[0].dtype.itemsize, piece)
        shape = (piece, _LINE)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)

        def full(value):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        return self.task.start(full)

    def pieces(self, slot: Any) -> list[Any]:
        """Returns the pieces of a chunk: of each array, in float32."""
        return [
            [stage[where].astype(jnp.float32) for stage in self.stages]
            for where in self._windows(slot)
        ]

    def _windows(self, slot: Any) -> list[Any]:
        from jax.experimental import pallas as pl

        starts = range(0, self.ring.chunk, self.ring.piece)
        return [(slot, pl.ds(start, self.ring.piece)) for start in starts]

    def fold(self, slot: Any, found: Any) -> Any:
        """Merges a chunk into what was found."""
        return self.task.fold(self.row, found, self.pieces(slot))

    def write(self, slot: Any, result: Any) -> None:
        """Overwrites the first array's chunk by the result."""
        stage = self.stages[0]
        for where in self._windows(slot):
            piece = [stage[where].astype(jnp.float32) for stage in self.stages]
            new = self.task.write(self.row, result, *piece)
            stage[where] = new.astype(stage.dtype)

    def fill_beyond(self, chunk: Any, slot: Any) -> None:
        """Fills the lines of the last chunk that are beyond the row."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        ring, stage = self.ring, self.stages[0]
        held = ring.lines - (ring.chunks - 1) * ring.chunk
        if held == ring.chunk or self.task.fill == 0:
            return

        @pl.when(chunk == ring.chunks - 1)
        def _():
            for line in range(held, ring.chunk):
                fill = jnp.full((_LINE,), self.task.fill, stage.dtype)
                stage[slot, line] = fill
            plgpu.commit_smem()
