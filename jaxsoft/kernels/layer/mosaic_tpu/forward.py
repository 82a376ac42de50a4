"""Statistics of `hidden @ kernel`, tile by tile, in one Mosaic TPU kernel.

The grid has blocks of rows and, inside, of classes. A block of `hidden` stays in VMEM
while blocks of the kernel stream past it; each tile of logits lives in VMEM alone and
is merged into running statistics of its rows: 2·N·H·V flops, one read of the kernel for
each block of rows, a few hundred bytes a row written. `backward.py` has the derivative.

Every lane has statistics of its own, of the classes that fall into it: nothing moves
across lanes before the last block, where the lanes are joined.

The last block of classes may reach beyond the arrays: its logits there are -inf. The
last block of rows may too: its rows there are computed from arbitrary numbers, and not
written.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsoft._core import mesh_axes
from jaxsoft.kernels import chips
from jaxsoft.kernels.layer.mosaic_tpu import tile as tiles
from jaxsoft.kernels.layer.mosaic_tpu.blocks import LANES, TpuBlocks, choose_forward
from jaxsoft.kernels.layer.mosaic_tpu.tile import Problem, TpuInputs
from jaxsoft.kernels.typing import Ref
from jaxsoft.linear.arguments import Operands
from jaxsoft.linear.folds.statistics import Columns, Saved, Statistics

__all__ = ["forward"]


def forward(fold: Statistics, operands: Operands) -> Saved:
    """Returns the statistics of every row.

    Args:
      fold: which statistics, and what is known of the layer at trace time.
      operands: the arrays, in bfloat16 or float32; at most one label a row.

    Returns:
      The wanted fields, and what their derivative needs beside them.
    """
    local = fold.local(operands)
    return fold.finish(_run(fold, local), local)


def _run(fold: Statistics, operands: Operands) -> Columns:
    """Calls the kernel."""
    problem, inputs = tiles.problem_and_inputs(fold.config, operands)
    # The kernel's temperature may be an array where that of the call is static.
    fold = dataclasses.replace(fold, config=problem.config)
    inputs = mesh_axes.like(inputs, inputs)
    layer = problem.layer
    blocks = choose_forward(layer, chips.vmem_bytes())
    floats, integers = _names(_initial(fold, inputs, 1))
    rows = pl.BlockSpec((blocks.rows, LANES), lambda row, _: (row, 0))
    shape = (layer.rows, LANES)
    types = [mesh_axes.type_of(inputs.hidden, shape, jnp.float32)]
    if integers:
        types.append(mesh_axes.type_of(inputs.hidden, shape, jnp.int32))
    running = [
        pltpu.VMEM((blocks.rows, LANES), column.dtype)
        for column in _initial(fold, inputs, 1).values()
    ]
    body = functools.partial(
        _statistics_kernel, fold=fold, problem=problem, blocks=blocks, types=len(types)
    )
    row_blocks = pl.cdiv(layer.rows, blocks.rows)
    outputs = pl.pallas_call(
        body,
        grid=(row_blocks, pl.cdiv(layer.classes, blocks.classes)),
        in_specs=[tiles.input_specs(problem, inputs, blocks, row_axis=0)],
        out_specs=[rows] * len(types),
        out_shape=types,
        scratch_shapes=running,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * layer.rows * layer.features * layer.classes,
            transcendentals=layer.rows * layer.classes,
            bytes_accessed=inputs.hidden.nbytes + row_blocks * inputs.kernel.nbytes,
        ),
        name="jaxsoft_statistics_forward",
    )(inputs)
    columns = dict(zip(floats, _columns(outputs[0], len(floats)), strict=True))
    if integers:
        columns |= zip(integers, _columns(outputs[1], len(integers)), strict=True)
    return columns


def _columns(array: jax.Array, number: int) -> list[jax.Array]:
    """Returns the first columns [N, 1] of an array."""
    return [array[:, lane : lane + 1] for lane in range(number)]


def _initial(fold: Statistics, inputs: TpuInputs, rows: int) -> Columns:
    """Returns the statistics of rows before their first tile."""
    labels = 0 if inputs.labels is None else 1
    return fold.empty(rows, labels, jnp.dtype(jnp.float32))


def _names(columns: Columns) -> tuple[list[str], list[str]]:
    """Returns the columns of the float and of the integer output, by their lanes."""
    integers = [name for name, a in columns.items() if a.dtype == jnp.int32]
    return [name for name in columns if name not in integers], integers


def _statistics_kernel(
    inputs: TpuInputs[Ref],
    *refs: Ref,
    fold: Statistics,
    problem: Problem,
    blocks: TpuBlocks,
    types: int,
) -> None:
    """Merges the tiles of one step into the statistics of their rows.

    Args:
      inputs: references to blocks.
      *refs: references to the results: [R, 128] float32, with one statistic a lane, and
        where some are integers [R, 128] int32; then to running statistics [R, 128].
      fold: which statistics.
      problem: what is known of the work.
      blocks: the sizes of the blocks.
      types: how many results there are.
    """
    block = pl.program_id(1)
    start = _initial(fold, inputs, 1)
    outputs, running = refs[:types], dict(zip(start, refs[types:], strict=True))

    @pl.when(block == 0)
    def _():
        for name, ref in running.items():
            ref[...] = jnp.broadcast_to(start[name], ref.shape)

    tau = inputs.temperature(problem.config)

    def step(ragged: bool) -> None:
        labels = None if inputs.labels is None else inputs.labels[...]
        tile = tiles.compute_tile(problem, inputs, blocks, block, ragged, labels)
        old = {name: ref[...][None] for name, ref in running.items()}
        by_row = tau[None] if isinstance(tau, jax.Array) else tau
        new = fold.merge(old, tile.by_lanes(LANES), by_row)
        for name, ref in running.items():
            ref[...] = new[name][0]

    tiles.each_block(1, problem.layer.classes, blocks.classes, step)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        columns = {name: ref[...] for name, ref in running.items()}
        joined = fold.join_lanes(columns, tau)
        for names, ref in zip(_names(start), outputs, strict=False):
            for lane, name in enumerate(names):
                ref[:, lane : lane + 1] = joined[name]
