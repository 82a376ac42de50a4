"""A tile of logits inside a Mosaic TPU kernel, and what it is computed from."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsoft._core.dtypes import operand_dtype
from jaxsoft._core.temperature import is_ordinary
from jaxsoft.kernels.layer.mosaic_tpu.blocks import Blocks, Layer
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.tiles import Tile, capped, columns_of, dot

__all__ = [
    "Inputs",
    "Problem",
    "compute_tile",
    "each_block",
    "each_strip",
    "input_specs",
    "inside",
    "prepare",
]


class Inputs(NamedTuple):
    """What tiles are computed from: arrays, or references to their blocks.

    Attributes:
      hidden: [N, H].
      kernel: [H, V] or [V, H].
      offsets: [1, V] float32, the bias, with -inf at classes that the mask drops; or
        None.
      tau: [N, 1] float32, or None where it is static.
      labels: [N, 1] int32, -1 for none; or None.
    """

    hidden: Any
    kernel: Any
    offsets: Any
    tau: Any
    labels: Any

    def temperature(self, config: Config, strip: Any) -> float | jax.Array:
        """The temperature of a strip's rows, as a float or as [R, 1]."""
        if self.tau is not None:
            return self.tau[strip, :]
        assert config.static_tau is not None
        return config.static_tau


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a kernel's work when it is traced.

    Attributes:
      config: of the call; its temperature is static only where that is an ordinary
        number.
      layer: the sizes.
      biased: whether there is a bias.
      dropping: whether there is a class mask.
    """

    config: Config
    layer: Layer
    biased: bool
    dropping: bool


def prepare(config: Config, operands: Operands) -> tuple[Problem, Inputs]:
    """Returns the problem and the inputs of a kernel."""
    hidden, kernel, bias, tau, labels, mask, _ = operands
    rows, features = hidden.shape
    assert labels is None or labels.shape[1] == 1
    static = config.static_tau
    if static is not None and not is_ordinary(static):
        # The limits take more than a division, and that is written for arrays.
        tau = jnp.full(rows, static, jnp.float32)
        config = dataclasses.replace(config, static_tau=None)
    offsets = None if bias is None else bias.astype(jnp.float32)
    if mask is not None:
        offsets = jnp.where(mask, 0.0 if offsets is None else offsets, -jnp.inf)
    layer = Layer(
        rows,
        features,
        operands.num_classes(config),
        hidden.dtype.itemsize,
        kernel.dtype.itemsize,
        operands.matmul_dtype().itemsize,
    )
    inputs = Inputs(
        hidden,
        kernel,
        None if offsets is None else offsets.astype(jnp.float32)[None],
        None if tau is None else tau.astype(jnp.float32)[:, None],
        labels,
    )
    return Problem(config, layer, bias is not None, mask is not None), inputs


def input_specs(problem: Problem, inputs: Inputs, blocks: Blocks, row_axis: int):
    """Returns the specifications of the inputs' blocks.

    Args:
      problem: what is known of the work.
      inputs: the arrays.
      blocks: the sizes of the blocks.
      row_axis: the axis of the grid of two that runs over blocks of rows.

    Returns:
      `Inputs` of block specifications.
    """
    features = problem.layer.features

    def rows(width):
        return pl.BlockSpec((blocks.rows, width), lambda *grid: (grid[row_axis], 0))

    def classes(height):
        shape = (height, blocks.classes)
        return pl.BlockSpec(shape, lambda *grid: (0, grid[1 - row_axis]))

    kernel = classes(features)
    if problem.config.class_axis == 0:
        shape = (blocks.classes, features)
        kernel = pl.BlockSpec(shape, lambda *grid: (grid[1 - row_axis], 0))
    specs = Inputs(rows(features), kernel, classes(1), rows(1), rows(1))
    return Inputs(
        *(
            None if array is None else spec
            for spec, array in zip(specs, inputs, strict=True)
        )
    )


def each_block(axis: int, size: int, block: int, step) -> None:
    """Runs a step, told whether its block sticks out: the last one may.

    Args:
      axis: of the grid.
      size: of the array's axis.
      block: of the block's.
      step: a function of whether the block sticks out.
    """
    if size % block == 0:
        step(False)
        return
    last = pl.num_programs(axis) - 1
    if size > block:
        pl.when(pl.program_id(axis) != last)(functools.partial(step, False))
    pl.when(pl.program_id(axis) == last)(functools.partial(step, True))


def each_strip(blocks: Blocks, step) -> None:
    """Runs a step for the slice of every strip of rows of a block."""
    size = blocks.strip
    if size == blocks.rows:
        step(pl.ds(0, size))
        return

    @pl.loop(0, blocks.rows // size)
    def _(index):
        step(pl.ds(pl.multiple_of(index * size, size), size))


def compute_tile(
    problem: Problem,
    inputs: Inputs,
    blocks: Blocks,
    block: jax.Array,
    strip: Any,
    ragged: bool,
) -> Tile:
    """Computes the tile of a strip of the rows that are in VMEM.

    Args:
      problem: what is known of the work.
      inputs: references to the blocks.
      blocks: their sizes.
      block: the index of the block of classes.
      strip: the slice of the rows.
      ragged: whether that block sticks out of the kernel: what it holds there is
        arbitrary, and counts for nothing.

    Returns:
      The tile.
    """
    config, size = problem.config, blocks.classes
    dtype = operand_dtype(inputs.hidden, inputs.kernel)
    start = block * size
    hidden = inputs.hidden[strip, :].astype(dtype)
    kernel = inputs.kernel[...].astype(dtype)
    axes = (1, 1 - config.class_axis)
    u = dot(hidden, kernel, axes, config.precision, jnp.float32)
    offsets = None if inputs.offsets is None else inputs.offsets[...]
    u, slope = capped(u, offsets if problem.biased else None, config.softcap)
    if problem.dropping:
        u = jnp.where(offsets == -jnp.inf, -jnp.inf, u)
    if ragged:
        u = inside(problem, start, u, 1, -jnp.inf)
        slope = None if slope is None else inside(problem, start, slope, 1, 0)
    labels = None
    if inputs.labels is not None:
        labels = columns_of(inputs.labels[strip, :], start, size)
    masked = ragged or offsets is not None
    return Tile(start, kernel, u, masked, labels, slope)


def inside(problem: Problem, start: jax.Array, array: jax.Array, axis: int, fill):
    """Returns a block whose axis runs over classes from `start`, filled beyond V."""
    ids = lax.broadcasted_iota(jnp.int32, array.shape, axis)
    return jnp.where(ids < problem.layer.classes - start, array, fill)
