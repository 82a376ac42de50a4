"""The derivative of the statistics of `hidden @ kernel` in one Mosaic TPU kernel.

The grid has blocks of classes and, inside, of rows. Each tile of logits is computed
again, turned into the derivative by the logits and multiplied twice, in the dtype of
the operands: 6·N·H·V flops. A block of dkernel adds up in float32 in VMEM while all
rows stream past it, and is written once, in its own dtype. The float32 sums of the
rows, dhidden and what the temperature needs, live in HBM: those of a block of rows are
fetched and written back by copies that run beside the products. What is not wanted is
neither computed nor stored.

The compiler unrolls a step, and computes what is not a product beside products that do
not need it. So the classes of a tile come in parts: before the derivative of a part the
program has the logits of the next one, and before that of the last part dkernel of all
others. Columns of numbers of each row come as one array.

The last block of classes may reach beyond the arrays: its derivative and its part of
the kernel are 0 there. Rows are padded where they do not fill their blocks.
"""

import functools
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsoft._core import mesh_axes
from jaxsoft.kernels import chips
from jaxsoft.kernels.layer.mosaic_tpu import tile as tiles
from jaxsoft.kernels.layer.mosaic_tpu.blocks import (
    CHUNK,
    LANES,
    PART,
    TpuBlocks,
    choose_backward,
)
from jaxsoft.kernels.layer.mosaic_tpu.tile import Problem, TpuInputs
from jaxsoft.kernels.typing import Barrier, Index, Ref
from jaxsoft.linear.arguments import Operands
from jaxsoft.linear.folds.statistics import Rows, Statistics
from jaxsoft.linear.gradients import Gradients, Wanted
from jaxsoft.linear.tiles import dot

__all__ = ["accumulate"]


_Array = TypeVar("_Array")


class _Columns(NamedTuple):
    """What the kernel reads of each row beside its hidden states, [N, 1] each.

    Attributes:
      tau: float32, or None where the temperature is static.
      labels: int32, or None.
      rows: the coefficients.
    """

    tau: Any
    labels: Any
    rows: Any


class _Results(NamedTuple, Generic[_Array]):
    """Gradients, their types, or references to them; None where not wanted.

    Attributes:
      sums: [N', W] float32 with N' rows of whole blocks: dhidden, if wanted, in H lanes
        padded to registers, then the moments, if wanted, in the lanes of a register.
      kernel: dkernel, in its shape and dtype.
      bias: [1, V] float32.
    """

    sums: _Array | None
    kernel: _Array | None
    bias: _Array | None


def accumulate(
    fold: Statistics, operands: Operands, wanted: Wanted, rows: Rows
) -> tuple[Gradients, jax.Array | None]:
    """Adds up what tiles contribute to gradients.

    Args:
      fold: which statistics, and what is known of the layer at trace time.
      operands: the arrays, their classes those of this shard.
      wanted: which gradients to compute.
      rows: what the derivative needs of each row.

    Returns:
      The gradients but `tau`, and the moments [N, 1], None if not wanted.
    """
    problem, inputs = tiles.problem_and_inputs(fold.config, operands)
    layer = problem.layer
    wanted = wanted._replace(bias=wanted.bias and operands.bias is not None)
    blocks = choose_backward(layer, wanted.hidden, wanted.kernel, chips.vmem_bytes())
    missing = -layer.rows % blocks.rows
    inputs, rows = _padded(inputs, rows.columns(), missing)
    inputs, rows = mesh_axes.like((inputs, rows), (inputs, rows))
    width = layer.width if wanted.hidden else 0
    shape = (layer.rows + missing, width + (LANES if wanted.tau else 0))
    results = _Results(
        mesh_axes.type_of(inputs.hidden, shape, jnp.float32) if shape[1] else None,
        mesh_axes.type_of(inputs.hidden, inputs.kernel.shape, inputs.kernel.dtype)
        if wanted.kernel
        else None,
        mesh_axes.type_of(inputs.hidden, (1, layer.classes), jnp.float32)
        if wanted.bias
        else None,
    )
    gradients = _call(fold, problem, inputs, rows, results, blocks, wanted)
    hidden = moments = None
    if gradients.sums is not None and wanted.hidden:
        hidden = gradients.sums[: layer.rows, : layer.features]
        hidden = hidden.astype(operands.hidden.dtype)
    if gradients.sums is not None and wanted.tau:
        moments = gradients.sums[: layer.rows, width : width + 1]
    bias = None
    if operands.bias is not None and gradients.bias is not None:
        bias = gradients.bias[0].astype(operands.bias.dtype)
    return Gradients(hidden, gradients.kernel, bias, None), moments


def _padded(
    inputs: TpuInputs[jax.Array], rows: Rows, missing: int
) -> tuple[TpuInputs[jax.Array], Rows]:
    """Returns rows of whole blocks; those that are added contribute nothing.

    Their hidden states are 0, their largest logit is infinite, so that all their
    probabilities vanish, and so do their coefficients.
    """
    if not missing:
        return inputs, rows

    def pad(array, fill):
        if array is None:
            return None
        width = ((0, missing), (0, 0))
        return jnp.pad(array, width, constant_values=jnp.asarray(fill, array.dtype))

    inputs = inputs._replace(
        hidden=pad(inputs.hidden, 0),
        tau=pad(inputs.tau, 1),
        labels=pad(inputs.labels, -1),
    )
    rest = jax.tree.map(lambda a: pad(a, 0), rows._replace(max=None))
    return inputs, rest._replace(max=pad(rows.max, jnp.inf))


def _call(
    fold: Statistics,
    problem: Problem,
    inputs: TpuInputs[jax.Array],
    rows: Rows,
    results: _Results[jax.ShapeDtypeStruct],
    blocks: TpuBlocks,
    wanted: Wanted,
) -> _Results[jax.Array]:
    """Calls the kernel."""
    layer = problem.layer
    grid = (
        pl.cdiv(layer.classes, blocks.classes),
        inputs.hidden.shape[0] // blocks.rows,
    )
    columns = _Columns(inputs.tau, inputs.labels, rows)
    packed = _packed(columns)
    inputs = inputs._replace(tau=None, labels=None)
    specs = tiles.input_specs(problem, inputs, blocks, row_axis=1)
    width = packed.shape[1]
    columns_spec = pl.BlockSpec((blocks.rows, width), lambda _, row: (row, 0))
    out_specs = _Results(
        None if results.sums is None else pl.BlockSpec(memory_space=pl.ANY),
        None if results.kernel is None else specs.kernel,
        None if results.bias is None else specs.offsets,
    )
    scratch = {"d_ref": pltpu.VMEM((blocks.rows, blocks.classes), problem.dtype)}
    if results.sums is not None:
        slots = (2, blocks.rows, results.sums.shape[1])
        scratch["slots_ref"] = pltpu.VMEM(slots, jnp.float32)
        scratch["reads"] = pltpu.SemaphoreType.DMA((2,))
        scratch["writes"] = pltpu.SemaphoreType.DMA((2,))
    if results.kernel is not None:
        total = (blocks.classes, layer.features)
        scratch["total_ref"] = pltpu.VMEM(total, jnp.float32)
    # The sums of a row are touched by every block of classes, one after another.
    classes = "parallel" if results.sums is None else "arbitrary"
    products = 1 + wanted.hidden + wanted.kernel
    work = layer.rows * layer.features * layer.classes
    passes = grid[0] * (inputs.hidden.nbytes + _bytes(results.sums) * 2)
    (gradients,) = pl.pallas_call(
        functools.partial(
            _gradients_kernel,
            fold=fold,
            problem=problem,
            blocks=blocks,
            wanted=wanted,
            dtypes=jax.tree.map(lambda column: column.dtype, columns),
        ),
        grid=grid,
        in_specs=[specs, columns_spec],
        out_specs=(out_specs,),
        out_shape=(results,),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(classes, "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * work,
            transcendentals=layer.rows * layer.classes,
            bytes_accessed=passes + inputs.kernel.nbytes + _bytes(results.kernel),
        ),
        name="jaxsoft_statistics_backward",
    )(inputs, packed)
    return gradients


def _packed(columns: _Columns) -> jax.Array:
    """Returns columns [N, 1] of 32 bits as one array [N, C] of int32.

    Each on its own would fill all lanes of its registers, in HBM too.
    """
    bits = [lax.bitcast_convert_type(a, jnp.int32) for a in jax.tree.leaves(columns)]
    return jnp.concatenate(bits, axis=1)


def _unpacked(packed_ref: Ref, dtypes: _Columns) -> _Columns:
    """Returns the columns that were packed, of a block of rows."""
    leaves, tree = jax.tree.flatten(dtypes)
    columns = [
        lax.bitcast_convert_type(packed_ref[:, i : i + 1], dtype)
        for i, dtype in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, columns)


def _bytes(result: jax.ShapeDtypeStruct | None) -> int:
    """Returns the bytes of a result, 0 if it is not wanted."""
    return 0 if result is None else result.size * result.dtype.itemsize


def _gradients_kernel(
    inputs: TpuInputs[Ref],
    columns_ref: Ref,
    results: _Results[Ref],
    *,
    slots_ref: Ref | None = None,
    reads: Barrier | None = None,
    writes: Barrier | None = None,
    total_ref: Ref | None = None,
    d_ref: Ref,
    fold: Statistics,
    problem: Problem,
    blocks: TpuBlocks,
    wanted: Wanted,
    dtypes: _Columns,
) -> None:
    """Adds the contribution of one tile.

    Args:
      inputs: references to blocks; those of columns are not there.
      columns_ref: [R, C] int32, what `_packed` returned.
      results: references: the sums in HBM, blocks of the others.
      slots_ref: [2, R, W] float32, the sums of this block of rows and of its neighbour.
      reads: a semaphore for each slot.
      writes: a semaphore for each slot.
      total_ref: [B, H] float32, the block of dkernel as it grows, classes first.
      d_ref: [R, B] in the dtype of the products, the derivative by the logits.
      fold: which statistics.
      problem: what is known of the work.
      blocks: the sizes of the blocks.
      wanted: which gradients to compute.
      dtypes: those of the columns.
    """
    block, row_block = pl.program_id(0), pl.program_id(1)
    columns = _unpacked(columns_ref, dtypes)
    tau = problem.config.static_tau if columns.tau is None else columns.tau
    assert tau is not None
    parts = _parts(blocks.classes)
    # The last derivative is computed beside products of all others.
    last = parts[-1].start
    sums = None
    if slots_ref is not None:
        assert results.sums is not None and reads is not None and writes is not None
        sums = _RowSums(results.sums, slots_ref, reads, writes, blocks.rows)

    def step(ragged: bool) -> None:
        moments = None

        def tile_of(part):
            return tiles.compute_tile(
                problem, inputs, blocks, block, ragged, columns.labels, part
            )

        following = tile_of(parts[0])
        for index, part in enumerate(parts):
            tile = following
            if index + 1 < len(parts):
                following = tile_of(parts[index + 1])
            elif total_ref is not None and last:
                _add_to_kernel(problem, inputs, total_ref, d_ref, slice(0, last))
            d, of_part = fold.slope(tau, columns.rows, tile, wanted.tau)
            if tile.slope is not None:
                d = d * tile.slope
            if of_part is not None:
                moments = of_part if moments is None else moments + of_part
            if results.bias is not None:
                new = jnp.sum(d, axis=0, keepdims=True)
                _add(results.bias, (slice(None), part), new, row_block == 0)
            d_ref[:, part] = d.astype(problem.dtype)
        if total_ref is not None:
            _add_to_kernel(
                problem, inputs, total_ref, d_ref, slice(last, blocks.classes)
            )
        if sums is None:
            return
        slot_ref = sums.take()
        if wanted.hidden:
            start = block * blocks.classes
            _add_to_hidden(problem, inputs, slot_ref, d_ref, start, ragged)
        if moments is not None:
            lane = slot_ref.shape[1] - LANES
            _add(slot_ref, (slice(None), pl.ds(lane, 1)), moments, block == 0)
        sums.give()

    # Masks run beside products, and a step for full blocks would double the program.
    step(problem.layer.classes % blocks.classes != 0)
    if total_ref is not None and results.kernel is not None:
        kernel_ref = results.kernel

        @pl.when(row_block == pl.num_programs(1) - 1)
        def _():
            _write_kernel(problem, kernel_ref, total_ref)


class _RowSums(NamedTuple):
    """The sums of rows in HBM, and two slots in VMEM that they pass through.

    Steps take the slots in turn. While a step computes its tile its sums are fetched
    and those of the step before are written; then it starts to fetch those of the step
    after it, which were written before.

    Attributes:
      hbm_ref: [N', W].
      slots_ref: [2, R, W].
      reads: a semaphore for each slot.
      writes: a semaphore for each slot.
      rows: R.
    """

    hbm_ref: Ref
    slots_ref: Ref
    reads: Barrier
    writes: Barrier
    rows: int

    def take(self) -> Ref:
        """Returns the slot of this step, its sums there but for the first classes."""
        if self._blocks() == 1:
            return self.slots_ref.at[0]
        step = self._step()
        following = step + 1
        pl.when(step > 0)(lambda: self._write(step - 1).wait())
        more = (following >= self._blocks()) & (following < self._steps())
        pl.when(more)(lambda: self._read(following).start())
        pl.when(step >= self._blocks())(lambda: self._read(step).wait())
        return self.slots_ref.at[step % 2]

    def give(self) -> None:
        """Writes the slot of this step back; the last one waits for it."""
        step = self._step()
        if self._blocks() > 1:
            self._write(step).start()

        @pl.when(step == self._steps() - 1)
        def _():
            if self._blocks() == 1:
                # They stayed in their slot all the time.
                pltpu.sync_copy(self.slots_ref.at[0], self.hbm_ref)
            else:
                self._write(step).wait()

    def _blocks(self) -> int:
        return self.hbm_ref.shape[0] // self.rows

    def _steps(self) -> int | jax.Array:
        return pl.num_programs(0) * self._blocks()

    def _step(self) -> jax.Array:
        return pl.program_id(0) * self._blocks() + pl.program_id(1)

    def _read(self, step: jax.Array):
        slot = step % 2
        return pltpu.make_async_copy(
            self._of(step), self.slots_ref.at[slot], self.reads.at[slot]
        )

    def _write(self, step: jax.Array):
        slot = step % 2
        return pltpu.make_async_copy(
            self.slots_ref.at[slot], self._of(step), self.writes.at[slot]
        )

    def _of(self, step: jax.Array) -> Ref:
        start = pl.multiple_of(step % self._blocks() * self.rows, self.rows)
        return self.hbm_ref.at[pl.ds(start, self.rows), :]


def _parts(classes: int) -> list[slice]:
    """Returns the parts of a block whose derivatives are computed one by one."""
    return [slice(i, min(i + PART, classes)) for i in range(0, classes, PART)]


def _chunks(features: int) -> list[slice]:
    """Returns slices that cover the features."""
    return [slice(i, min(i + CHUNK, features)) for i in range(0, features, CHUNK)]


def _add(ref: Ref, at: Index, new: jax.Array, first: jax.Array) -> None:
    """Adds to what a reference holds, which before the first time is arbitrary."""
    ref[at] = jnp.where(first, 0, ref[at]) + new


def _add_to_kernel(
    problem: Problem, inputs: TpuInputs[Ref], total_ref: Ref, d_ref: Ref, part: slice
) -> None:
    """Adds what a part of a tile contributes to the block of dkernel."""
    first = pl.program_id(1) == 0
    d = d_ref[:, part]
    for chunk in _chunks(problem.layer.features):
        hidden = inputs.hidden[:, chunk].astype(d.dtype)
        new = dot(d, hidden, (0, 0), problem.config.precision, jnp.float32)
        _add(total_ref, (part, chunk), new, first)


def _add_to_hidden(
    problem: Problem,
    inputs: TpuInputs[Ref],
    slot_ref: Ref,
    d_ref: Ref,
    start: jax.Array,
    ragged: bool,
) -> None:
    """Adds what a tile contributes to the sums of its rows."""
    d, first, axis = d_ref[...], pl.program_id(0) == 0, problem.config.class_axis
    for chunk in _chunks(problem.layer.features):
        at = (chunk, slice(None)) if axis == 1 else (slice(None), chunk)
        kernel = inputs.kernel[at].astype(d_ref.dtype)
        if ragged:
            kernel = tiles.inside(problem, start, kernel, axis, 0)
        new = dot(d, kernel, (1, axis), problem.config.precision, jnp.float32)
        _add(slot_ref, (slice(None), chunk), new, first)


def _write_kernel(problem: Problem, kernel_ref: Ref, total_ref: Ref) -> None:
    """Writes the block of dkernel in its layout and dtype."""
    for chunk in _chunks(problem.layer.features):
        total = total_ref[:, chunk].astype(kernel_ref.dtype)
        if problem.config.class_axis == 1:
            kernel_ref[chunk, :] = total.T
        else:
            kernel_ref[:, chunk] = total
