"""Softmaxes of rows in Mosaic TPU kernels: one read of HBM and one write.

A block has some rows and, where they fit VMEM, all of their classes: their largest
logit and their sum come from one pass over the block, online, their probabilities from
another. Where eight rows do not fit, blocks of classes stream past twice, and what the
first pass keeps is two numbers a row; the second runs backwards, so that the block
between them is not read again. Backward, from y and g, likewise.

The last block of classes may reach beyond the arrays: its logits there count as -inf, y
and g as 0. The last block of rows may too: its rows there are computed from arbitrary
numbers, and not written.

Not yet measured on any TPU, hence no function's default.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import divide_by_temperature, round_up
from jaxsoft.kernels import chips
from jaxsoft.kernels.rows.binding import RowPlan
from jaxsoft.kernels.rows.mosaic_tpu import gumbel
from jaxsoft.kernels.rows.mosaic_tpu.strips import (
    FOLDING,
    WRITING,
    Strip,
    fold_chunks,
    merge_chunk,
)
from jaxsoft.kernels.typing import ChunkFold, Ref

__all__ = ["RowBlocks", "backward", "choose_row_blocks", "forward"]

# A register has 8 sublanes of 128 lanes; bfloat16 packs two rows in a sublane.
_LANES = 128
_SUBLANES = {2: 16, 4: 8}
# How many registers hold what is worked on at a time.
_REGISTERS = 16
# The most bytes of a block: copies are long enough, and steps many enough to overlap.
_BLOCK_BYTES = 2 * 2**20


# A function of the pass, `FOLDING` or `WRITING`; of whether the block is the first one
# of its rows; of the strip; and of what folds over the chunks of the block's classes.
_Body: TypeAlias = Callable[[int, bool | jax.Array, Strip, ChunkFold], None]


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """The sizes of the blocks of a kernel.

    Attributes:
      rows: of a block, a multiple of a strip.
      classes: of a block: all of them, or a multiple of 128.
      strip: the rows that are worked on at a time.
      vmem_bytes: the most bytes of VMEM that the kernel may take.
      keeps_perturbed: whether perturbed logits stay beside the block, so that no noise
        is drawn twice.
      chunk: the classes that are worked on at a time, a multiple of 256.
    """

    rows: int
    classes: int
    strip: int
    vmem_bytes: int
    keeps_perturbed: bool = False
    chunk: int = 2048


def choose_row_blocks(
    rows: int, classes: int, itemsizes: tuple[int, ...], vmem: int, noisy: bool = False
) -> RowBlocks:
    """Chooses the blocks of a kernel.

    Args:
      rows: R.
      classes: V.
      itemsizes: the bytes of a number of each array [R, V] that is read or written.
      vmem: the bytes of VMEM of a core.
      noisy: whether there are perturbed logits to keep, in float32.

    Returns:
      The blocks: whole rows where the fewest that registers hold fit, and what was
      perturbed where that fits beside them.
    """
    budget = int(vmem * chips.VMEM_SHARE)
    least = max(_SUBLANES[size] for size in itemsizes)
    width = round_up(classes, _LANES)
    # Temperatures and what is kept of rows, padded to lanes; strips in registers.
    spare = 8 * least * _LANES * 4 + 2**20
    # Two of each block in turn.
    a_class = 2 * sum(itemsizes)
    keeps_perturbed = noisy and least * width * (a_class + 4) + spare <= budget
    if least * width * a_class + spare > budget:
        fitting = (budget - spare) // (least * a_class)
        fitting = min(fitting, _BLOCK_BYTES // (least * max(itemsizes)))
        chunk = RowBlocks.chunk
        return RowBlocks(least, fitting // chunk * chunk, least, budget)
    strip = least * max(1, min(8, _REGISTERS * _LANES // min(width, RowBlocks.chunk)))
    strip = min(strip, round_up(rows, least))
    most = max(1, _BLOCK_BYTES // (strip * width * max(itemsizes)))
    block = strip * min(most, math.ceil(rows / strip))
    return RowBlocks(block, classes, strip, budget, keeps_perturbed)


def forward(
    plan: RowPlan, x: jax.Array, tau: jax.Array | None, words: jax.Array | None
) -> jax.Array:
    """Returns softmax(x / τ), or the same of perturbed logits.

    Args:
      plan: what is known of the call.
      x: [R, V] float32 or bfloat16.
      tau: [R, 1] float32, or None where it is static.
      words: [R, 2] uint32, the keys of the rows' noise; None without noise.

    Returns:
      [R, V] in the dtype of `x`.
    """
    if words is None:
        body = functools.partial(_softmax_kernel, plan)
        return _call("jaxsoft_softmax_forward", body, (x,), tau)
    body = functools.partial(gumbel.kernel, plan)
    return _call("jaxsoft_gumbel_softmax_forward", body, (x,), tau, words)


def backward(
    plan: RowPlan, y: jax.Array, g: jax.Array, scale: jax.Array | None
) -> jax.Array:
    """Returns y (g - Σ y g / Σ y) / τ.

    Args:
      plan: what is known of the call.
      y: [R, V] float32 or bfloat16, a softmax.
      g: [R, V] in the same dtype.
      scale: 1/τ [R, 1] float32, or None where τ is static.

    Returns:
      [R, V] in the dtype of `y`.
    """
    body = functools.partial(_slope_kernel, plan)
    return _call("jaxsoft_softmax_backward", body, (y, g), scale)


def _call(
    name: str,
    body: _Body,
    arrays: tuple[jax.Array, ...],
    column: jax.Array | None,
    words: jax.Array | None = None,
) -> jax.Array:
    """Calls a kernel that reads arrays [R, V] and a few columns, and writes [R, V].

    Args:
      name: of the kernel.
      body: runs a pass over a strip, see `_Body`.
      arrays: [R, V] each, in one dtype.
      column: [R, 1] float32, or None.
      words: [R, 2] uint32, or None.

    Returns:
      [R, V] in the dtype of the arrays.
    """
    rows, classes = arrays[0].shape
    itemsize = arrays[0].dtype.itemsize
    sizes = (itemsize,) * (len(arrays) + 1)
    noisy = words is not None
    blocks = choose_row_blocks(rows, classes, sizes, chips.vmem_bytes(), noisy)
    steps = pl.cdiv(classes, blocks.classes)
    # In the second pass blocks come backwards; what is written waits for it.
    if steps == 1:
        grid, place, written = (), lambda r: (r, 0), lambda r: (r, 0)
    else:
        last = steps - 1
        grid = (2, steps)
        place = lambda r, second, c: (r, c + second * (last - 2 * c))  # noqa: E731
        written = lambda r, second, c: (r, last - second * c)  # noqa: E731
    shape = (blocks.rows, blocks.classes)
    specs = [pl.BlockSpec(shape, place) for _ in arrays]
    columns = [a for a in (column, words) if a is not None]
    for array in columns:
        width = (blocks.rows, array.shape[1])
        specs.append(pl.BlockSpec(width, lambda r, *_: (r, 0)))
    dtypes = (
        gumbel.column_dtypes(blocks.keeps_perturbed)
        if noisy
        else (jnp.dtype(jnp.float32),) * 2
    )
    scratch = [pltpu.VMEM((blocks.rows, 1), dtype) for dtype in dtypes]
    if blocks.keeps_perturbed:
        scratch.append(pltpu.VMEM(shape, jnp.float32))
    has = (column is not None, noisy)
    kernel = functools.partial(_kernel, body, blocks, classes, len(arrays), has)
    reads = len(arrays) * (2 if steps > 1 else 1)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, blocks.rows), *grid),
        in_specs=specs,
        out_specs=pl.BlockSpec(shape, written),
        out_shape=mesh_axes.type_of(arrays[0], arrays[0].shape, arrays[0].dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *["arbitrary" for _ in grid]),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * rows * classes,
            transcendentals=rows * classes * (2 if len(arrays) == 1 else 0),
            bytes_accessed=(reads + 1) * rows * classes * itemsize,
        ),
        name=name,
    )(*arrays, *columns)


def _kernel(
    body: _Body,
    blocks: RowBlocks,
    classes: int,
    arrays: int,
    has: tuple[bool, bool],
    *refs: Ref,
) -> None:
    """Runs the two passes over each strip of a block's rows.

    Args:
      body: runs a pass over a strip.
      blocks: the sizes of the blocks.
      classes: V.
      arrays: how many are read.
      has: whether there are a column and keys of rows.
      *refs: blocks of the arrays, of what there is of column and keys, of the result;
        then scratch.
    """
    remaining = iter(refs)
    inputs = [next(remaining) for _ in range(arrays)]
    column, words = (next(remaining) if h else None for h in has)
    out, *kept = remaining
    perturbed = kept.pop() if blocks.keeps_perturbed else None
    steps = pl.cdiv(classes, blocks.classes)

    def run(
        passes: tuple[int, ...], block: int | jax.Array, is_first: bool | jax.Array
    ) -> None:
        def run_strip(index):
            start = pl.multiple_of(index * blocks.strip, blocks.strip)
            rows = pl.Slice(start, blocks.strip)
            first = block * blocks.classes
            strip_column, keys = (
                None if a is None else a[rows, :] for a in (column, words)
            )
            strip = Strip(inputs, out, kept, rows, first, strip_column, keys, perturbed)
            valid = None if steps == 1 else classes - first
            over_chunks = functools.partial(
                fold_chunks, blocks.classes, blocks.chunk, valid
            )
            for pass_number in passes:
                body(pass_number, is_first, strip, over_chunks)

        strips = blocks.rows // blocks.strip
        if strips == 1:
            run_strip(0)
        else:
            pl.loop(0, strips)(run_strip)

    if steps == 1:
        run((FOLDING, WRITING), 0, True)
        return
    index = pl.program_id(2)
    pl.when(pl.program_id(1) == FOLDING)(lambda: run((FOLDING,), index, index == 0))
    # The second pass takes the blocks in the opposite order.
    pl.when(pl.program_id(1) == WRITING)(
        lambda: run((WRITING,), steps - 1 - index, False)
    )


def _softmax_kernel(
    plan: RowPlan,
    pass_number: int,
    is_first: bool | jax.Array,
    strip: Strip,
    over_chunks: ChunkFold,
) -> None:
    """The largest logit and the sum of a strip, then its probabilities."""
    tau = strip.temperature(plan.static_tau)
    lowest = float(jnp.finfo(jnp.float32).min)

    def fold(columns, valid, carry):
        return merge_chunk(strip.load(0, columns, valid, -jnp.inf), tau, carry)

    def write(columns, valid, carry):
        del valid
        x = strip.load(0, columns, None, 0)
        peak, total = carry
        p = jnp.exp(divide_by_temperature(x, peak, tau)) / total
        strip.out[strip.rows, columns] = p.astype(strip.out.dtype)
        return carry

    if pass_number == FOLDING:
        strip.keep(over_chunks(fold, strip.restore(is_first, (lowest, 0.0))))
        return
    peak, total = strip.get()
    over_chunks(write, (peak, jnp.where(total == 0, 1, total)))


def _slope_kernel(
    plan: RowPlan,
    pass_number: int,
    is_first: bool | jax.Array,
    strip: Strip,
    over_chunks: ChunkFold,
) -> None:
    """Σ y g and Σ y of a strip, then y (g - Σ y g / Σ y) / τ."""
    scale = strip.column
    if scale is None:
        assert plan.static_tau is not None
        scale = 1 / plan.static_tau

    def fold(columns, valid, carry):
        y, g = (strip.load(i, columns, valid, 0) for i in range(2))
        return (
            carry[0] + jnp.sum(y * g, axis=1, keepdims=True),
            carry[1] + jnp.sum(y, axis=1, keepdims=True),
        )

    def write(columns, valid, mean):
        del valid
        y, g = (strip.load(i, columns, None, 0) for i in range(2))
        dx = y * (g - mean) * scale
        strip.out[strip.rows, columns] = dx.astype(strip.out.dtype)
        return mean

    if pass_number == FOLDING:
        strip.keep(over_chunks(fold, strip.restore(is_first, (0.0, 0.0))))
        return
    weighted, total = strip.get()
    over_chunks(write, weighted / jnp.where(total == 0, 1, total))
