"""A tile of logits inside a Mosaic TPU kernel, and what it is computed from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsoft._core.numerics import is_ordinary
from jaxsoft.kernels.layer.mosaic_tpu.blocks import LayerShape, TpuBlocks
from jaxsoft.kernels.typing import Ref, Tau
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.tiles import Tile, capped, columns_of, dot

__all__ = [
    "Problem",
    "TpuInputs",
    "compute_tile",
    "each_block",
    "input_specs",
    "inside",
    "problem_and_inputs",
]


_Array = TypeVar("_Array")


class TpuInputs(NamedTuple, Generic[_Array]):
    """What tiles are computed from: arrays, references to their blocks, or their specs.

    Attributes:
      hidden: [N, H].
      kernel: [H, V] or [V, H].
      offsets: [1, V] float32, the bias, with -inf at classes that the mask drops; or
        None.
      tau: [N, 1] float32, or None where it is static.
      labels: [N, 1] int32, -1 for none; or None.
    """

    hidden: _Array
    kernel: _Array
    offsets: _Array | None
    tau: _Array | None
    labels: _Array | None

    def temperature(self: "TpuInputs[Ref]", config: Config) -> Tau:
        """The temperature of a block's rows, as a float or as [R, 1]."""
        if self.tau is not None:
            return self.tau[...]
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
      dtype: of the operands of the matrix products.
    """

    config: Config
    layer: LayerShape
    biased: bool
    dropping: bool
    dtype: jnp.dtype


def problem_and_inputs(
    config: Config, operands: Operands
) -> tuple[Problem, TpuInputs[jax.Array]]:
    """Returns what is known of a kernel's work, and what it reads."""
    hidden, kernel, bias, tau, labels, mask, *_ = operands
    rows, features = hidden.shape
    assert labels is None or labels.shape[1] == 1
    static = config.static_tau
    if static is not None and not is_ordinary(static):
        # At τ = 0 and τ = ∞ more than a division is needed, and the kernels do it for
        # temperatures that are arrays alone.
        tau = jnp.full(rows, static, jnp.float32)
        config = dataclasses.replace(config, static_tau=None)
    offsets = None if bias is None else bias.astype(jnp.float32)
    if mask is not None:
        offsets = jnp.where(mask, 0.0 if offsets is None else offsets, -jnp.inf)
    dtype = operands.matmul_dtype()
    layer = LayerShape(
        rows,
        features,
        operands.num_classes(config),
        hidden.dtype.itemsize,
        kernel.dtype.itemsize,
        dtype.itemsize,
    )
    inputs = TpuInputs(
        hidden,
        kernel,
        None if offsets is None else offsets.astype(jnp.float32)[None],
        None if tau is None else tau.astype(jnp.float32)[:, None],
        labels,
    )
    problem = Problem(config, layer, bias is not None, mask is not None, dtype)
    return problem, inputs


def input_specs(
    problem: Problem,
    inputs: TpuInputs[jax.Array],
    blocks: TpuBlocks,
    row_axis: int,
) -> TpuInputs[pl.BlockSpec]:
    """Returns the specifications of the inputs' blocks.

    Args:
      problem: what is known of the work.
      inputs: the arrays.
      blocks: the sizes of the blocks.
      row_axis: the axis of the grid of two that runs over blocks of rows.

    Returns:
      Those of the inputs that there are.
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
    specs = TpuInputs(rows(features), kernel, classes(1), rows(1), rows(1))
    return specs._replace(
        **{name: None for name, array in inputs._asdict().items() if array is None}
    )


def each_block(axis: int, size: int, block: int, step: Callable[[bool], None]) -> None:
    """Runs a step, told whether its block is ragged.

    A block is ragged if it reaches beyond the array, as the last one may.

    Args:
      axis: of the grid.
      size: of the array's axis.
      block: of the block's.
      step: a function of whether the block is ragged.
    """
    if size % block == 0:
        step(False)
        return
    last = pl.num_programs(axis) - 1
    if size > block:
        pl.when(pl.program_id(axis) != last)(functools.partial(step, False))
    pl.when(pl.program_id(axis) == last)(functools.partial(step, True))


def compute_tile(
    problem: Problem,
    inputs: TpuInputs[Ref],
    blocks: TpuBlocks,
    block: jax.Array,
    ragged: bool,
    labels: jax.Array | None,
    part: slice | None = None,
) -> Tile:
    """Computes the tile of the rows and classes that are in VMEM.

    Args:
      problem: what is known of the work.
      inputs: references to the blocks.
      blocks: their sizes.
      block: the index of the block of classes.
      ragged: whether that block reaches beyond the kernel: what it holds there is
        arbitrary, and counts for nothing.
      labels: [R, 1] int32, -1 for none; or None.
      part: the classes of the block that the tile has, all of them if None.

    Returns:
      The tile.
    """
    config, part = problem.config, part or slice(0, blocks.classes)
    start, size = block * blocks.classes + part.start, part.stop - part.start
    hidden = inputs.hidden[...].astype(problem.dtype)
    at = (slice(None), part) if config.class_axis == 1 else (part, slice(None))
    kernel = inputs.kernel[at].astype(problem.dtype)
    axes = (1, 1 - config.class_axis)
    u = dot(hidden, kernel, axes, config.precision, jnp.float32)
    offsets = None if inputs.offsets is None else inputs.offsets[:, part]
    u, slope = capped(u, offsets if problem.biased else None, config.softcap)
    if problem.dropping:
        assert offsets is not None
        u = jnp.where(offsets == -jnp.inf, -jnp.inf, u)
    if ragged:
        u = inside(problem, start, u, 1, -jnp.inf)
        slope = None if slope is None else inside(problem, start, slope, 1, 0)
    if labels is not None:
        labels = columns_of(labels, start, size)
    masked = ragged or offsets is not None
    return Tile(start, kernel, u, masked, labels, slope)


def inside(
    problem: Problem, start: jax.Array, array: jax.Array, axis: int, fill: float
) -> jax.Array:
    """Returns a block whose axis runs over classes from `start`, filled beyond V."""
    ids = lax.broadcasted_iota(jnp.int32, array.shape, axis)
    return jnp.where(ids < problem.layer.classes - start, array, fill)
