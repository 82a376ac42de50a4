"""Statistics of `hidden @ kernel`, tile by tile, in one Mosaic TPU kernel.

The grid has blocks of rows and, inside, of classes. A block of `hidden` stays in VMEM
while blocks of the kernel stream past it; each tile of logits lives in VMEM alone and
is merged into running statistics of its rows, one a lane of the output's block:
2·N·H·V flops, one read of the kernel for each block of rows, a few hundred bytes a row
written. `backward.py` has the derivative.

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
    body = functools.partial(
        _statistics_kernel, fold=fold, problem=problem, blocks=blocks
    )
    row_blocks = pl.cdiv(layer.rows, blocks.rows)
    outputs = pl.pallas_call(
        body,
        grid=(row_blocks, pl.cdiv(layer.classes, blocks.classes)),
        in_specs=[tiles.input_specs(problem, inputs, blocks, row_axis=0)],
        out_specs=[rows] * len(types),
        out_shape=types,
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
    *outputs: Ref,
    fold: Statistics,
    problem: Problem,
    blocks: TpuBlocks,
) -> None:
    """Merges the tile of one step into the statistics of its rows.

    Args:
      inputs: references to blocks.
      *outputs: references to running statistics: [R, 128] float32 and, where some are
        integers, [R, 128] int32.
      fold: which statistics.
      problem: what is known of the work.
      blocks: the sizes of the blocks.
    """
    block = pl.program_id(1)
    start = _initial(fold, inputs, blocks.rows)
    columns = [
        (name, ref, lane)
        for names, ref in zip(_names(start), outputs, strict=False)
        for lane, name in enumerate(names)
    ]

    @pl.when(block == 0)
    def _():
        for name, ref, lane in columns:
            ref[:, lane : lane + 1] = start[name]

    def step(ragged: bool) -> None:
        tiles.each_strip(blocks, functools.partial(merge, ragged))

    def merge(ragged: bool, strip: pl.Slice) -> None:
        tile = tiles.compute_tile(problem, inputs, blocks, block, strip, ragged)
        old = {name: ref[strip, lane : lane + 1] for name, ref, lane in columns}
        new = fold.merge(old, tile, inputs.temperature(problem.config, strip))
        for name, ref, lane in columns:
            ref[strip, lane : lane + 1] = new[name]

    tiles.each_block(1, problem.layer.classes, blocks.classes, step)
