"""The statistics of `hidden @ kernel` in one kernel for Hopper GPUs, by Mosaic GPU.

A block of threads owns a tile of rows and every class of one split of the classes. Its
third warpgroup streams tiles of `hidden` and of the kernel through a ring in shared
memory (TMA), the other two multiply them (wgmma), each for half of the rows, and merge
every tile of logits from the accumulator's registers into running statistics of their
rows: 2·N·H·V flops, the kernel is read once from HBM for all row tiles that run side by
side, and of the logits nothing is ever written. What is written are the statistics of
each row in each split; `mosaic_gpu.py` merges those.

Not yet measured: nothing here has run on a GPU. It was compiled for one, read as
machine code, and interpreted.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.linear import mosaic_gpu_merge as merging
from jaxsoft.linear.mosaic_gpu_plan import COMPUTING, Inputs, Partials, Plan

__all__ = ["KERNEL_NAME", "run"]

KERNEL_NAME = "jaxsoft_statistics_hopper"

# 128 · (2 · 232 + 40) registers are the 64,512 that the hardware can hand out.
_COMPUTE_REGISTERS = 232
_COPY_REGISTERS = 40


def run(plan: Plan, inputs: Inputs) -> Partials:
    """Returns the statistics of every row in every split, from one launch."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    result = (plan.splits, plan.rows)
    floats = jax.ShapeDtypeStruct((len(plan.floats), *result), jnp.float32)
    integers = None
    if plan.integers:
        integers = jax.ShapeDtypeStruct((len(plan.integers), *result), jnp.int32)
    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("cluster",)}
    out_type: Any = Partials(floats, integers)  # pyright: ignore
    return plgpu.kernel(
        functools.partial(_statistics_kernel, plan),
        out_type=out_type,
        scratch_types=_scratch(plan, inputs),
        # Rows vary fastest: blocks that run side by side read the same classes.
        grid=(plan.rows // (blocks.block_rows * blocks.cluster), plan.splits),
        grid_names=("row", "split"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        # ex2.approx is as good as exp2; nothing else here has an approximation.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **(cluster if blocks.cluster > 1 else {}),
    )(*inputs)


def _scratch(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Returns the shared memory and the barriers of a block of threads, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks, dtype, barrier = plan.blocks, inputs.hidden.dtype, plgpu.Barrier
    stages, rows = blocks.stages, blocks.rows
    tile = (blocks.features, blocks.classes)
    transforms = (
        plgpu.TilingTransform((8, blocks.swizzle // 2)),
        plgpu.SwizzleTransform(blocks.swizzle),
    )

    def ring(*shape):
        return plgpu.SMEM((stages, *shape), dtype, transforms=transforms)

    empty: Any = barrier(num_arrivals=COMPUTING, num_barriers=stages)
    if blocks.cluster > 1:
        # A tile of the kernel lands in both blocks: both must have room.
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=COMPUTING, num_barriers=stages
        )
    found = {
        "hidden_tiles": ring(blocks.block_rows, blocks.features),
        "kernel_tiles": ring(*(tile[::-1] if plan.transposed else tile)),
        "full": barrier(num_arrivals=2, num_barriers=stages),
        "empty": empty,
        "floats_out": plgpu.SMEM((COMPUTING, len(plan.floats), rows), jnp.float32),
    }
    if plan.integers:
        shape = (COMPUTING, len(plan.integers), rows)
        found["integers_out"] = plgpu.SMEM(shape, jnp.int32)
    if inputs.bias is not None:
        found["bias_tiles"] = plgpu.SMEM((2, blocks.classes), jnp.float32)
        found["bias_full"] = barrier(num_barriers=2)
        found["bias_empty"] = barrier(num_arrivals=COMPUTING, num_barriers=2)
    if inputs.labels is not None:
        found["labels_in"] = plgpu.SMEM((COMPUTING, rows), jnp.int32)
        found["labels_full"] = barrier(num_barriers=COMPUTING)
    if inputs.temper is not None:
        found["temper_in"] = plgpu.SMEM((COMPUTING, 3, rows), jnp.float32)
        found["temper_full"] = barrier(num_arrivals=3, num_barriers=COMPUTING)
    return found


def _statistics_kernel(plan: Plan, *refs, **scratch) -> None:
    """Streams the classes of one split past one tile of rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    number = len(Inputs._fields)
    inputs, results = Inputs(*refs[:number]), Partials(*refs[number:])
    blocks = plan.blocks
    warpgroup = lax.axis_index("warpgroup")
    row_tile = lax.axis_index("row")
    if blocks.cluster > 1:
        row_tile = row_tile * blocks.cluster + lax.axis_index("cluster")
    split = lax.axis_index("split")
    part = math.ceil(plan.tiles / plan.splits)
    first = split * part
    place = _Place(
        split=split,
        row=row_tile * blocks.block_rows,
        first=first,
        tiles=jnp.clip(plan.tiles - first, 0, part),
    )

    @pl.when(warpgroup == COMPUTING)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        _copy_tiles(plan, place, inputs, **scratch)

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _fold_tiles(plan, place, warpgroup, inputs, results, **scratch)


class _Place(NamedTuple):
    """Where a block of threads works; int32 scalars.

    Attributes:
      split: the index of its split of the classes.
      row: its first row.
      first: its first tile of classes.
      tiles: how many it has.
    """

    split: Any
    row: Any
    first: Any
    tiles: Any


def _copy_tiles(plan: Plan, place: _Place, inputs: Any, **scratch) -> None:
    """Keeps the ring full, until all that was copied was used."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    full, empty = scratch["full"], scratch["empty"]
    total = place.tiles * plan.steps
    multicast = "cluster" if blocks.cluster > 1 else None

    def copy(step, slot):
        tile, part = lax.div(step, plan.steps), lax.rem(step, plan.steps)
        if inputs.bias is not None:

            @pl.when(part == 0)
            def _():
                _copy_bias(plan, place, tile, inputs.bias, **scratch)

        features = pl.ds(part * blocks.features, blocks.features)
        classes = pl.ds((place.first + tile) * blocks.classes, blocks.classes)
        rows = pl.ds(place.row, blocks.block_rows)
        window = (classes, features) if plan.transposed else (features, classes)
        plgpu.copy_gmem_to_smem(
            inputs.hidden.at[rows, features],
            scratch["hidden_tiles"].at[slot],
            full.at[slot],
        )
        plgpu.copy_gmem_to_smem(
            inputs.kernel.at[window],
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


def _copy_bias(plan: Plan, place: _Place, tile, bias, **scratch) -> None:
    """Copies the bias of a tile of classes; two are in flight at most."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = plan.blocks.classes
    slot = lax.rem(tile, 2)

    @pl.when(tile >= 2)
    def _():
        plgpu.barrier_wait(scratch["bias_empty"].at[slot])

    plgpu.copy_gmem_to_smem(
        bias.at[pl.ds((place.first + tile) * size, size)],
        scratch["bias_tiles"].at[slot],
        scratch["bias_full"].at[slot],
    )


def _fold_tiles(plan, place: _Place, warpgroup, inputs, results, **scratch) -> None:
    """Merges the tiles of one warpgroup's rows, and writes their statistics."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    first_row = place.row + warpgroup * blocks.rows
    rows = pl.ds(first_row, blocks.rows)
    row = _row(plan, warpgroup, rows, inputs, **scratch)

    def step(tile, running):
        logits = _product(plan, tile * plan.steps, warpgroup, **scratch)
        start = (place.first + tile) * blocks.classes
        chunks = _chunks(plan, tile, start, logits, **scratch)
        running = merging.merge(start, chunks, running, row)
        if inputs.bias is not None:
            # Ordinary loads come before the next copy only past this fence.
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch["bias_empty"].at[lax.rem(tile, 2)])
        return running

    running = lax.fori_loop(0, place.tiles, step, merging.start(plan))
    floats, integers = scratch["floats_out"], scratch.get("integers_out")
    outputs = [(floats, results.floats, plan.floats)]
    if integers is not None:
        outputs.append((integers, results.integers, plan.integers))
    for shared, _, names in outputs:
        for index, name in enumerate(names):
            shared[warpgroup, index] = getattr(running, name)
    plgpu.commit_smem()
    for shared, result, names in outputs:
        for index in range(len(names)):
            plgpu.copy_smem_to_gmem(
                shared.at[warpgroup, index], result.at[index, place.split, rows]
            )
    plgpu.wait_smem_to_gmem(0)


def _row(plan: Plan, warpgroup, rows, inputs: Any, **scratch) -> merging.Row:
    """Returns what is known of the rows, read through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    label = None
    temper: Any = (plan.scale if plan.scale != 1 else None, plan.factor, None)
    if inputs.labels is not None:
        shared, full = scratch["labels_in"].at[warpgroup], scratch["labels_full"]
        plgpu.copy_gmem_to_smem(inputs.labels.at[rows], shared, full.at[warpgroup])
        plgpu.barrier_wait(full.at[warpgroup])
        label = _load(shared, merging.layout(1))
    if inputs.temper is not None:
        shared, full = scratch["temper_in"].at[warpgroup], scratch["temper_full"]
        for index in range(3):
            plgpu.copy_gmem_to_smem(
                inputs.temper.at[index, rows], shared.at[index], full.at[warpgroup]
            )
        plgpu.barrier_wait(full.at[warpgroup])
        temper = tuple(_load(shared.at[index], merging.layout(1)) for index in range(3))
    return merging.Row(label, temper)


def _product(plan: Plan, first_step, warpgroup, **scratch) -> jax.Array:
    """Returns the tile of products [R, B] that starts with a step of the ring.

    A slot is released one step late, when its wgmma is known to have ended.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    full, empty = scratch["full"], scratch["empty"]
    rows = pl.ds(warpgroup * blocks.rows, blocks.rows)

    def multiply(accumulator):
        def body(part, _):
            slot = lax.rem(first_step + part, blocks.stages)
            plgpu.barrier_wait(full.at[slot])
            kernel = scratch["kernel_tiles"].at[slot]
            if plan.transposed:
                kernel = _transposed(kernel)
            plgpu.wgmma(accumulator, scratch["hidden_tiles"].at[slot, rows], kernel)
            plgpu.wgmma_wait(1)

            @pl.when(part > 0)
            def _():
                before = lax.rem(first_step + part - 1, blocks.stages)
                plgpu.barrier_arrive(empty.at[before])

        lax.fori_loop(0, plan.steps, body, None)
        return accumulator[...]

    shape = (blocks.rows, blocks.classes)
    products = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    last = lax.rem(first_step + plan.steps - 1, blocks.stages)
    plgpu.barrier_arrive(empty.at[last])
    return products


def _chunks(plan: Plan, tile, start, products, **scratch) -> list[jax.Array]:
    """Returns a tile's logits, `CHUNK` columns each, -inf at dropped classes."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks, masked = plan.blocks, "bias_tiles" in scratch
    slot = lax.rem(tile, 2)
    if masked:
        plgpu.barrier_wait(scratch["bias_full"].at[slot])
    chunks = []
    for column in range(0, blocks.classes, merging.CHUNK):
        u = products[:, column : column + merging.CHUNK]
        if masked:
            place = scratch["bias_tiles"].at[slot, pl.ds(column, merging.CHUNK)]
            bias = lax.broadcast_in_dim(_load(place, merging.layout(0)), u.shape, [1])
            u = u + bias
        if plan.softcap is not None:
            u = plan.softcap * merging.tanh(u * (1 / plan.softcap))
        if masked:
            u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
        elif plan.classes % blocks.classes:
            beyond = merging.iota(u.shape) >= plan.classes - start - column
            u = jnp.where(beyond, -jnp.inf, u)
        chunks.append(u)
    return chunks


def _load(ref: Any, layout: Any) -> jax.Array:
    """Loads shared memory; JAX 0.10 takes another argument."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout)  # pyright: ignore
    return plgpu.load(ref, layout=layout)  # pyright: ignore


def _transposed(ref: Any) -> Any:
    """Returns a view [b, a] of [a, b]; JAX 0.10 has it elsewhere."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))  # pyright: ignore
    return ref.transpose((1, 0))
