"""The statistics of `hidden @ kernel` in one kernel for Blackwell GPUs, by Mosaic GPU.

As `hopper.py`, on a machine whose matrix unit works by itself: one warp
streams tiles of `hidden` and of the kernel through a ring in shared memory (TMA), one
has them multiplied (tcgen05) into one of two accumulators in tensor memory, and a
warpgroup merges the other meanwhile. Each of its threads has a row to itself: nothing
is exchanged between threads.

Not yet measured: nothing here has run on a GPU. It was compiled for one, read as
machine code, and interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.kernels.layer.mosaic_gpu import body
from jaxsoft.kernels.layer.mosaic_gpu import merge as merging
from jaxsoft.kernels.layer.mosaic_gpu.plan import GpuInputs, GpuPlan, Partials
from jaxsoft.kernels.typing import Ref, Scratch

__all__ = ["KERNEL_NAME", "SAMPLE_NAME", "run"]

KERNEL_NAME = "jaxsoft_statistics_blackwell"
SAMPLE_NAME = "jaxsoft_sample_blackwell"

# The warpgroup whose first two warps feed the matrix unit, and the one that merges.
_FEEDING, _MERGING = 0, 1
_COPYING_WARP, _MULTIPLYING_WARP = 0, 1
# Columns that are read from tensor memory at a time, a register each.
_COLUMNS = 64


def run(plan: GpuPlan, inputs: GpuInputs[jax.Array]) -> Partials[jax.Array]:
    """Returns the statistics of every row in every split or group, in one launch."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.kernel(
        functools.partial(_statistics_kernel, plan),
        out_type=body.results(plan),
        scratch_types=_scratch(plan, inputs),
        # Rows vary fastest: blocks that run side by side read the same classes.
        grid=(plan.rows // plan.blocks.block_rows, plan.splits),
        grid_names=("row", "split"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name=SAMPLE_NAME if plan.groups else KERNEL_NAME,
        # ex2.approx is as good as exp2; nothing else here has an approximation.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*inputs)


def _scratch(plan: GpuPlan, inputs: GpuInputs[jax.Array]) -> Scratch:
    """Returns the memory and the barriers of a block of threads, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks

    def matrix_unit_barrier(number):
        return plgpu.Barrier(num_barriers=number, orders_tensor_core=True)

    return {
        **body.ring_scratch(plan, inputs.hidden.dtype),
        "accumulators": plgpu.TMEM((blocks.rows, 2 * blocks.classes), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "empty": matrix_unit_barrier(blocks.stages),
        # An accumulator is done when it holds the products of a tile, and free when
        # they were read.
        "done": matrix_unit_barrier(2),
        "free": matrix_unit_barrier(2),
        **body.side_scratch(plan, inputs),
    }


def _statistics_kernel(plan: GpuPlan, *refs: Ref, **scratch: Ref) -> None:
    """Streams the classes of one split past one tile of rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    number = len(GpuInputs._fields)
    inputs, results = GpuInputs(*refs[:number]), Partials(*refs[number:])
    warpgroup = lax.axis_index("warpgroup")
    assigned = body.assignment_of_block(plan)

    @pl.when(warpgroup == _FEEDING)
    def _():
        @plgpu.warp_map
        def run_warp(warp):
            @pl.when(warp == _COPYING_WARP)
            def _():
                _copy_tiles(plan, assigned, inputs, **scratch)

            @pl.when(warp == _MULTIPLYING_WARP)
            def _():
                _multiply_tiles(plan, assigned, **scratch)

    @pl.when(warpgroup == _MERGING)
    def _():
        _fold_tiles(plan, assigned, inputs, results, **scratch)


def _copy_tiles(
    plan: GpuPlan, assigned: body.Assignment, inputs: GpuInputs[Ref], **scratch: Ref
) -> None:
    """Keeps the ring full."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks, full = plan.blocks, scratch["full"]

    def step(number, _):
        tile, part = lax.div(number, plan.steps), lax.rem(number, plan.steps)
        slot = lax.rem(number, blocks.stages)

        @pl.when(number >= blocks.stages)
        def _():
            plgpu.barrier_wait(scratch["empty"].at[slot])

        bias = inputs.bias
        if bias is not None:

            @pl.when(part == 0)
            def _():
                body.copy_bias(plan, assigned, tile, bias, **scratch)

        of_hidden, of_kernel = body.windows(plan, assigned, tile, part)
        for ref, window, name in (
            (inputs.hidden, of_hidden, "hidden_tiles"),
            (inputs.kernel, of_kernel, "kernel_tiles"),
        ):
            tiles = scratch[name].at[slot]
            plgpu.copy_gmem_to_smem(ref.at[window], tiles, full.at[slot])

    lax.fori_loop(0, assigned.tiles * plan.steps, step, None)
    body.drain_bias(assigned, **scratch)


def _multiply_tiles(plan: GpuPlan, assigned: body.Assignment, **scratch: Ref) -> None:
    """Has every tile multiplied; the matrix unit releases what it has read."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks

    def step(number, _):
        tile, part = lax.div(number, plan.steps), lax.rem(number, plan.steps)
        slot, own = lax.rem(number, blocks.stages), lax.rem(tile, 2)

        @pl.when((part == 0) & (tile >= 2))
        def _():
            plgpu.barrier_wait(scratch["free"].at[own])

        plgpu.barrier_wait(scratch["full"].at[slot])
        kernel = scratch["kernel_tiles"].at[slot]
        if plan.transposed:
            kernel = body.transposed(kernel)
        columns = pl.ds(own * blocks.classes, blocks.classes)
        plgpu.tcgen05_mma(
            scratch["accumulators"].at[:, columns],
            scratch["hidden_tiles"].at[slot],
            kernel,
            scratch["empty"].at[slot],
            accumulate=part > 0,
        )

        @pl.when(part == plan.steps - 1)
        def _():
            plgpu.tcgen05_commit_arrive(scratch["done"].at[own])

    lax.fori_loop(0, assigned.tiles * plan.steps, step, None)


def _fold_tiles(
    plan: GpuPlan,
    assigned: body.Assignment,
    inputs: GpuInputs[Ref],
    results: Partials[Ref],
    **scratch: Ref,
) -> None:
    """Merges the tiles of the rows, and writes their statistics."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    rows = pl.ds(assigned.row, blocks.rows)
    row = body.load_row_facts(plan, 0, rows, inputs, **scratch)

    def step(tile, running):
        own = lax.rem(tile, 2)
        plgpu.barrier_wait(scratch["done"].at[own])
        body.wait_for_bias(tile, **scratch)

        def part(index, running):
            column = index * _COLUMNS
            columns = pl.ds(own * blocks.classes + column, _COLUMNS)
            products = plgpu.async_load_tmem(
                scratch["accumulators"].at[:, columns],
                layout=merging.layout(blocks.layout),
            )
            logits = body.tile_logits(plan, tile, assigned, column, products, **scratch)
            if plan.groups:
                groups = merging.tile_groups(logits, row)
                return body.store_groups(0, column, groups, **scratch)
            start = (assigned.first + tile) * blocks.classes + column
            return merging.merge_tile(start, logits, running, row)

        if plan.groups:
            plgpu.wait_smem_to_gmem(0)
        running = lax.fori_loop(0, blocks.classes // _COLUMNS, part, running)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(scratch["free"].at[own])
        body.release_bias(tile, **scratch)
        if plan.groups:
            body.copy_groups(plan, assigned, tile, 0, rows, results, **scratch)
        return running

    first = None if plan.groups else merging.initial_statistics(plan)
    running = lax.fori_loop(0, assigned.tiles, step, first)
    if running is None:
        plgpu.wait_smem_to_gmem(0)
        return
    body.write(plan, assigned, 0, rows, running, results, **scratch)
