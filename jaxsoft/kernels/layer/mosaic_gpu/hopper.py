"""The statistics of `hidden @ kernel` in one kernel for Hopper GPUs, by Mosaic GPU.

A block of threads owns a tile of rows and every class of one split of the classes. Its
third warpgroup streams tiles of `hidden` and of the kernel through a ring in shared
memory (TMA), the other two multiply them (wgmma), each for half of the rows, and merge
every tile of logits from the accumulator's registers into running statistics of their
rows: 2·N·H·V flops, the kernel is read once from HBM for all row tiles that run side by
side, and of the logits nothing is ever written. What is written are the statistics of
each row in each split; `call.py` merges those.

Not yet measured: nothing here has run on a GPU. It was compiled for one, read as
machine code, and interpreted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.kernels.layer.mosaic_gpu import body
from jaxsoft.kernels.layer.mosaic_gpu import merge as merging
from jaxsoft.kernels.layer.mosaic_gpu.plan import (
    COMPUTING,
    GpuInputs,
    GpuPlan,
    Partials,
)
from jaxsoft.kernels.typing import Ref, Scalar, Scratch

__all__ = ["KERNEL_NAME", "SAMPLE_NAME", "run"]

KERNEL_NAME = "jaxsoft_statistics_hopper"
SAMPLE_NAME = "jaxsoft_sample_hopper"

# 128 · (2 · 232 + 40) registers are the 64,512 that the hardware can hand out.
_COMPUTE_REGISTERS = 232
_COPY_REGISTERS = 40


def run(plan: GpuPlan, inputs: GpuInputs[jax.Array]) -> Partials[jax.Array]:
    """Returns the statistics of every row in every split or group, in one launch."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        functools.partial(_statistics_kernel, plan),
        out_type=body.results(plan),
        scratch_types=_scratch(plan, inputs),
        # Rows vary fastest: blocks that run side by side read the same classes.
        grid=(plan.rows // (blocks.block_rows * blocks.cluster), plan.splits),
        grid_names=("row", "split"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name=SAMPLE_NAME if plan.groups else KERNEL_NAME,
        # ex2.approx is as good as exp2; nothing else here has an approximation.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **(cluster if blocks.cluster > 1 else {}),
    )(*inputs)


def _scratch(plan: GpuPlan, inputs: GpuInputs[jax.Array]) -> Scratch:
    """Returns the shared memory and the barriers of a block of threads, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    stages = plan.blocks.stages
    if plan.blocks.cluster == 1:
        empty = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    else:
        # A tile of the kernel lands in both blocks: both must have room.
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=COMPUTING, num_barriers=stages
        )
    return {
        **body.ring_scratch(plan, inputs.hidden.dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": empty,
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

    @pl.when(warpgroup == COMPUTING)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        _copy_tiles(plan, assigned, inputs, **scratch)

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _fold_tiles(plan, assigned, warpgroup, inputs, results, **scratch)


def _copy_tiles(
    plan: GpuPlan, assigned: body.Assignment, inputs: GpuInputs[Ref], **scratch: Ref
) -> None:
    """Keeps the ring full, until all that was copied was used."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    full, empty = scratch["full"], scratch["empty"]
    total = assigned.tiles * plan.steps
    multicast = "cluster" if blocks.cluster > 1 else None

    def copy(step, slot):
        tile, part = lax.div(step, plan.steps), lax.rem(step, plan.steps)
        bias = inputs.bias
        if bias is not None:

            @pl.when(part == 0)
            def _():
                body.copy_bias(plan, assigned, tile, bias, **scratch)

        of_hidden, of_kernel = body.windows(plan, assigned, tile, part)
        plgpu.copy_gmem_to_smem(
            inputs.hidden.at[of_hidden],
            scratch["hidden_tiles"].at[slot],
            full.at[slot],
        )
        plgpu.copy_gmem_to_smem(
            inputs.kernel.at[of_kernel],
            scratch["kernel_tiles"].at[slot],
            full.at[slot],
            collective_axes=multicast,
        )

    def fill(step, _):
        copy(step, step)

    def refill(step, _):
        slot = lax.rem(step, blocks.stages)
        plgpu.barrier_wait(empty.at[slot])
        copy(step, slot)

    def drain(step, _):
        plgpu.barrier_wait(empty.at[lax.rem(step, blocks.stages)])

    ahead = jnp.minimum(total, blocks.stages)
    lax.fori_loop(0, ahead, fill, None)
    lax.fori_loop(ahead, total, refill, None)
    lax.fori_loop(jnp.maximum(total - blocks.stages, 0), total, drain, None)
    body.drain_bias(assigned, **scratch)


def _fold_tiles(
    plan: GpuPlan,
    assigned: body.Assignment,
    warpgroup: Scalar,
    inputs: GpuInputs[Ref],
    results: Partials[Ref],
    **scratch: Ref,
) -> None:
    """Merges the tiles of one warpgroup's rows, and writes their statistics."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    rows = pl.ds(assigned.row + warpgroup * blocks.rows, blocks.rows)
    row = body.load_row_facts(plan, warpgroup, rows, inputs, **scratch)

    def step(tile, running):
        products = _product(plan, tile * plan.steps, warpgroup, **scratch)
        body.wait_for_bias(tile, **scratch)
        logits = body.tile_logits(plan, tile, assigned, 0, products, **scratch)
        start = (assigned.first + tile) * blocks.classes
        if plan.groups:
            plgpu.wait_smem_to_gmem(0)
            groups = merging.tile_groups(logits, row)
            body.store_groups(warpgroup, 0, groups, **scratch)
            body.copy_groups(plan, assigned, tile, warpgroup, rows, results, **scratch)
        else:
            running = merging.merge_tile(start, logits, running, row)
        body.release_bias(tile, **scratch)
        return running

    first = None if plan.groups else merging.initial_statistics(plan)
    running = lax.fori_loop(0, assigned.tiles, step, first)
    if running is None:
        plgpu.wait_smem_to_gmem(0)
        return
    body.write(plan, assigned, warpgroup, rows, running, results, **scratch)


def _product(
    plan: GpuPlan, first_step: Scalar, warpgroup: Scalar, **scratch: Ref
) -> jax.Array:
    """Returns the tile of products [R, B] that starts with a step of the ring.

    A slot is released one step late, when its wgmma is known to have ended.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    full, empty = scratch["full"], scratch["empty"]
    rows = pl.ds(warpgroup * blocks.rows, blocks.rows)

    def multiply(accumulator):
        def step(part, _):
            slot = lax.rem(first_step + part, blocks.stages)
            plgpu.barrier_wait(full.at[slot])
            kernel = scratch["kernel_tiles"].at[slot]
            if plan.transposed:
                kernel = body.transposed(kernel)
            plgpu.wgmma(accumulator, scratch["hidden_tiles"].at[slot, rows], kernel)
            plgpu.wgmma_wait(1)

            @pl.when(part > 0)
            def _():
                before = lax.rem(first_step + part - 1, blocks.stages)
                plgpu.barrier_arrive(empty.at[before])

        lax.fori_loop(0, plan.steps, step, None)
        return accumulator[...]

    shape = (blocks.rows, blocks.classes)
    products = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    last = lax.rem(first_step + plan.steps - 1, blocks.stages)
    plgpu.barrier_arrive(empty.at[last])
    return products
