"""What the statistics kernels for all NVIDIA GPUs do alike, besides multiplying.

The bias of a tile of classes comes through shared memory, two tiles in flight; labels
and temperatures once, before the first tile; and the statistics leave the registers
through shared memory at the end.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.kernels.layer.mosaic_gpu import merge as merging
from jaxsoft.kernels.layer.mosaic_gpu.merge import Running
from jaxsoft.kernels.layer.mosaic_gpu.plan import (
    GROUP,
    GpuInputs,
    GpuPlan,
    Partials,
)
from jaxsoft.kernels.typing import Factors, Index, Ref, Scalar, Scratch

__all__ = [
    "Assignment",
    "assignment_of_block",
    "copy_bias",
    "copy_groups",
    "drain_bias",
    "load_row_facts",
    "release_bias",
    "results",
    "ring_scratch",
    "side_scratch",
    "store_groups",
    "tile_logits",
    "transposed",
    "wait_for_bias",
    "windows",
    "write",
]


class Assignment(NamedTuple):
    """Which rows and classes a block of threads works on; int32 scalars.

    Attributes:
      split: the index of its split of the classes.
      row: its first row.
      first: its first tile of classes.
      tiles: how many it has.
    """

    split: Scalar
    row: Scalar
    first: Scalar
    tiles: Scalar


def assignment_of_block(plan: GpuPlan) -> Assignment:
    """Returns what this block of threads works on, by the grid's and cluster's axes."""
    blocks = plan.blocks
    row_tile = lax.axis_index("row")
    if blocks.cluster > 1:
        row_tile = row_tile * blocks.cluster + lax.axis_index("cluster")
    split = lax.axis_index("split")
    part = math.ceil(plan.tiles / plan.splits)
    first = split * part
    return Assignment(
        split=split,
        row=row_tile * blocks.block_rows,
        first=first,
        tiles=jnp.clip(plan.tiles - first, 0, part),
    )


def results(plan: GpuPlan) -> Partials[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of what the kernel writes."""
    if plan.groups:
        shape = (2, plan.tiles * plan.blocks.classes // GROUP, plan.rows)
        return Partials(jax.ShapeDtypeStruct(shape, jnp.float32), None)
    result = (plan.splits, plan.rows)
    floats = jax.ShapeDtypeStruct((len(plan.floats), *result), jnp.float32)
    integers = None
    if plan.integers:
        integers = jax.ShapeDtypeStruct((len(plan.integers), *result), jnp.int32)
    return Partials(floats, integers)


def ring_scratch(plan: GpuPlan, dtype: jnp.dtype) -> Scratch:
    """Returns the shared memory of the tiles in flight, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    tile = (blocks.features, blocks.classes)
    transforms = (
        plgpu.TilingTransform((8, blocks.swizzle // 2)),
        plgpu.SwizzleTransform(blocks.swizzle),
    )

    def tiles(*shape):
        return plgpu.SMEM((blocks.stages, *shape), dtype, transforms=transforms)

    return {
        "hidden_tiles": tiles(blocks.block_rows, blocks.features),
        "kernel_tiles": tiles(*(tile[::-1] if plan.transposed else tile)),
    }


def side_scratch(plan: GpuPlan, inputs: GpuInputs[jax.Array]) -> Scratch:
    """Returns the shared memory and barriers of all but the products, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks, barrier = plan.blocks, plgpu.Barrier
    groups, rows = blocks.warpgroups, blocks.rows
    shape = (groups, len(plan.floats), rows)
    if plan.groups:
        shape = (groups, 2, blocks.classes // GROUP, rows)
    scratch: Scratch = {"floats_out": plgpu.SMEM(shape, jnp.float32)}
    if plan.integers:
        shape = (groups, len(plan.integers), rows)
        scratch["integers_out"] = plgpu.SMEM(shape, jnp.int32)
    if inputs.bias is not None:
        scratch["bias_tiles"] = plgpu.SMEM((2, blocks.classes), jnp.float32)
        scratch["bias_full"] = barrier(num_barriers=2)
        scratch["bias_empty"] = barrier(num_arrivals=groups, num_barriers=2)
    if inputs.labels is not None:
        scratch["labels_in"] = plgpu.SMEM((groups, rows), jnp.int32)
        scratch["labels_full"] = barrier(num_barriers=groups)
    if inputs.tau_factors is not None:
        scratch["tau_factors_in"] = plgpu.SMEM((groups, 3, rows), jnp.float32)
        scratch["tau_factors_full"] = barrier(num_arrivals=3, num_barriers=groups)
    return scratch


def windows(
    plan: GpuPlan, assigned: Assignment, tile: Scalar, part: Scalar
) -> tuple[Index, Index]:
    """Returns the windows of hidden and of the kernel that a step multiplies."""
    from jax.experimental import pallas as pl

    blocks = plan.blocks
    features = pl.ds(part * blocks.features, blocks.features)
    classes = pl.ds((assigned.first + tile) * blocks.classes, blocks.classes)
    rows = pl.ds(assigned.row, blocks.block_rows)
    of_kernel = (classes, features) if plan.transposed else (features, classes)
    return (rows, features), of_kernel


def copy_bias(
    plan: GpuPlan, assigned: Assignment, tile: Scalar, bias: Ref, **scratch: Ref
) -> None:
    """Copies the bias of a tile of classes; two are in flight at most."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = plan.blocks.classes
    slot = lax.rem(tile, 2)

    @pl.when(tile >= 2)
    def _():
        plgpu.barrier_wait(scratch["bias_empty"].at[slot])

    plgpu.copy_gmem_to_smem(
        bias.at[pl.ds((assigned.first + tile) * size, size)],
        scratch["bias_tiles"].at[slot],
        scratch["bias_full"].at[slot],
    )


def drain_bias(assigned: Assignment, **scratch: Ref) -> None:
    """Waits until all that was copied by `copy_bias` was read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if "bias_empty" in scratch:
        lax.fori_loop(
            jnp.maximum(assigned.tiles - 2, 0),
            assigned.tiles,
            lambda tile, _: plgpu.barrier_wait(
                scratch["bias_empty"].at[lax.rem(tile, 2)]
            ),
            None,
        )


def wait_for_bias(tile: Scalar, **scratch: Ref) -> None:
    """Waits for the bias of a tile, if there is one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if "bias_full" in scratch:
        plgpu.barrier_wait(scratch["bias_full"].at[lax.rem(tile, 2)])


def release_bias(tile: Scalar, **scratch: Ref) -> None:
    """Lets the bias of a tile be overwritten, if there is one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if "bias_empty" in scratch:
        # Only past this fence do the loads of this tile come before the next copy.
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["bias_empty"].at[lax.rem(tile, 2)])


def load_row_facts(
    plan: GpuPlan,
    warpgroup: Scalar,
    rows: Index,
    inputs: GpuInputs[Ref],
    **scratch: Ref,
) -> merging.RowFacts:
    """Returns what is known of the rows, read through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    label = None
    name = plan.blocks.layout
    factors: Factors = (plan.scale if plan.scale != 1 else None, plan.factor, None)
    if inputs.labels is not None:
        shared, full = scratch["labels_in"].at[warpgroup], scratch["labels_full"]
        plgpu.copy_gmem_to_smem(inputs.labels.at[rows], shared, full.at[warpgroup])
        plgpu.barrier_wait(full.at[warpgroup])
        label = _load(shared, merging.layout(name, 1))
    if inputs.tau_factors is not None:
        shared, full = (
            scratch["tau_factors_in"].at[warpgroup],
            scratch["tau_factors_full"],
        )
        for index in range(3):
            plgpu.copy_gmem_to_smem(
                inputs.tau_factors.at[index, rows], shared.at[index], full.at[warpgroup]
            )
        plgpu.barrier_wait(full.at[warpgroup])
        factors = tuple(
            _load(shared.at[index], merging.layout(name, 1)) for index in range(3)
        )
    return merging.RowFacts(label, factors, name)


def tile_logits(
    plan: GpuPlan,
    tile: Scalar,
    assigned: Assignment,
    column: Scalar,
    products: jax.Array,
    **scratch: Ref,
) -> list[jax.Array]:
    """Returns logits of products, `CHUNK` columns each, -inf at dropped classes.

    Args:
      plan: what is known when the kernel is traced.
      tile: the index of the tile among this block's.
      assigned: what this block works on.
      column: of the tile, at which the products start.
      products: [R, some columns of the tile].
      **scratch: with the tile's bias, if there is one.

    Returns:
      A list of [R, CHUNK].
    """
    from jax.experimental import pallas as pl

    blocks = plan.blocks
    start = (assigned.first + tile) * blocks.classes
    logits = []
    for offset in range(0, products.shape[1], merging.CHUNK):
        u = products[:, offset : offset + merging.CHUNK]
        at = column + offset
        bias = None
        if "bias_tiles" in scratch:
            of_bias = scratch["bias_tiles"].at[
                lax.rem(tile, 2), pl.ds(at, merging.CHUNK)
            ]
            bias = _load(of_bias, merging.layout(blocks.layout, 0))
            bias = lax.broadcast_in_dim(bias, u.shape, [1])
            u = u + bias
        if plan.softcap is not None:
            u = plan.softcap * merging.tanh(u * (1 / plan.softcap))
        if bias is not None:
            u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
        elif plan.classes % blocks.classes:
            beyond = merging.iota(u.shape, blocks.layout) >= plan.classes - start - at
            u = jnp.where(beyond, -jnp.inf, u)
        logits.append(u)
    return logits


def write(
    plan: GpuPlan,
    assigned: Assignment,
    warpgroup: Scalar,
    rows: Index,
    running: Running,
    out: Partials[Ref],
    **scratch: Ref,
) -> None:
    """Writes the statistics of a warpgroup's rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    floats, integers = scratch["floats_out"], scratch.get("integers_out")
    outputs = [(floats, out.floats, plan.floats)]
    if integers is not None and out.integers is not None:
        outputs.append((integers, out.integers, plan.integers))
    for shared, _, names in outputs:
        for index, name in enumerate(names):
            shared[warpgroup, index] = getattr(running, name)
    plgpu.commit_smem()
    for shared, result, names in outputs:
        for index in range(len(names)):
            plgpu.copy_smem_to_gmem(
                shared.at[warpgroup, index], result.at[index, assigned.split, rows]
            )
    plgpu.wait_smem_to_gmem(0)


def store_groups(
    warpgroup: Scalar,
    column: Scalar,
    groups: list[tuple[jax.Array, jax.Array]],
    **scratch: Ref,
) -> None:
    """Keeps what is known of groups of a tile, from a column, in shared memory."""
    for index, group in enumerate(groups):
        for field, value in enumerate(group):
            scratch["floats_out"][warpgroup, field, column // GROUP + index] = value


def copy_groups(
    plan: GpuPlan,
    assigned: Assignment,
    tile: Scalar,
    warpgroup: Scalar,
    rows: Index,
    out: Partials[Ref],
    **scratch: Ref,
) -> None:
    """Writes what is known of a tile's groups; to be waited for before the next."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    count = plan.blocks.classes // GROUP
    groups = pl.ds((assigned.first + tile) * count, count)
    plgpu.commit_smem()
    for field in range(2):
        plgpu.copy_smem_to_gmem(
            scratch["floats_out"].at[warpgroup, field],
            out.floats.at[field, groups, rows],
        )


def _load(ref: Ref, layout: object) -> jax.Array:
    """Loads shared memory; JAX 0.10 takes another argument."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout)  # pyright: ignore
    return plgpu.load(ref, layout=layout)  # pyright: ignore


def transposed(ref: Ref) -> Ref:
    """Returns a view [b, a] of [a, b]; JAX 0.10 has it elsewhere."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))  # pyright: ignore
    return ref.transpose((1, 0))
