"""Statistics and samples of `hidden @ kernel` by kernels for NVIDIA GPUs: Mosaic GPU.

One launch gives the statistics of every row in every split of the classes; they merge
as tiles do. What the kernel cannot read is taken apart: the last classes of a kernel
[V, H] whose V is no multiple of 8 are one tile in plain XLA, at most 7 columns. The
derivative is that of `Statistics`, and forward mode over it XLA's.

Not yet measured on any GPU, hence no function's default.
"""

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxsoft._core import block_sampling, mesh_axes
from jaxsoft._core.numerics import round_up
from jaxsoft._core.registry import Gpu
from jaxsoft.kernels import chips
from jaxsoft.kernels.layer.mosaic_gpu import blackwell, hopper
from jaxsoft.kernels.layer.mosaic_gpu import plan as planning
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.folds.statistics import Columns, Saved, Statistics
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import Tile, compute_tile

__all__ = ["forward", "groups"]

# The kernels, by compute capability. Blackwell's consumer cards, 12.0, have no tensor
# memory.
_KERNELS = {"9.0": hopper, "10.0": blackwell}
# TMA copies multiples of 16 bytes: 8 rows of hidden states, or of a kernel [V, H].
_ROWS = 8
# The narrowest rows of shared memory that wgmma and tcgen05 read, in elements.
_NARROWEST = 16


def forward(fold: Statistics, operands: Operands) -> Saved:
    """Returns the statistics of every row.

    Args:
      fold: which statistics, and what is known of the layer at trace time.
      operands: the arrays.

    Returns:
      The wanted fields, and what their derivative needs beside them.

    Raises:
      NotImplementedError: for what the kernels do not have.
      ImportError: without absl-py, which Pallas imports.
    """
    config, local = fold.config, fold.local(operands)
    chip = _check(config, local)
    of_kernel, of_tail, aligned = _cut(config, local)
    parts = []
    if of_kernel is not None:
        plan, partials = _launch(config, of_kernel, chip, fold.wanted)
        parts.append(_columns(plan, local.hidden.shape[0], partials))
    if of_tail is not None:
        tail = _of_tail(fold, of_tail, aligned)
        parts.append({name: a[None] for name, a in tail.items()})
    columns = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    joined = fold.join(columns, local.temperature(config))
    return fold.finish(joined, local)


def groups(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns what is known of each group of `GROUP` classes, of each row.

    Args:
      config: what is known at trace time; nothing is wanted, no class is sharded.
      operands: the arrays.

    Returns:
      The largest logit, and the sum of exponentials of logits minus that, over τ: [N,
      G] each, -inf and 0 in a group without any kept class.

    Raises:
      NotImplementedError: for what the kernels do not have.
      ImportError: without absl-py, which Pallas imports.
    """
    chip = _check(config, operands)
    of_kernel, of_tail, aligned = _cut(config, operands)
    rows, classes = operands.hidden.shape[0], operands.num_classes(config)
    count = math.ceil(classes / planning.GROUP)
    tops = jnp.full((rows, count), -jnp.inf, jnp.float32)
    sums = jnp.zeros((rows, count), jnp.float32)
    if of_kernel is not None:
        _, partials = _launch(config, of_kernel, chip, groups=True)
        # Beyond its classes the last tile has empty groups.
        tops, sums = (
            _pad(array[:count, :rows].T, count, empty)
            for array, empty in zip(partials.floats, (-jnp.inf, 0.0), strict=True)
        )
    if of_tail is not None:
        u = _tail_logits(config, of_tail).logits
        tau = operands.temperature(config)
        last, top = tops[:, -1:], jnp.max(u, axis=1, keepdims=True)
        whole = jnp.maximum(last, top)
        total = jnp.sum(block_sampling.exponentials(u, whole, tau), axis=1)
        total += sums[:, -1] * block_sampling.exponentials(last, whole, tau)[:, 0]
        tops, sums = tops.at[:, -1].set(whole[:, 0]), sums.at[:, -1].set(total)
    return tops, sums


def _cut(
    config: Config, operands: Operands
) -> tuple[Operands | None, Operands | None, int]:
    """Returns what the kernel reads and the last few classes, which it does not."""
    classes = operands.num_classes(config)
    aligned = classes if config.class_axis == 1 else classes // _ROWS * _ROWS
    if aligned == classes:
        return operands, None, aligned
    first = _classes(config, operands, 0, aligned) if aligned else None
    return first, _classes(config, operands, aligned, classes), aligned


def _check(config: Config, operands: Operands) -> Gpu:
    """Requires what the kernel can do; returns the device."""
    hidden, kernel = operands.hidden, operands.kernel

    def must(rule, got, fix):
        raise NotImplementedError(
            f'{rule} for implementation "mosaic_gpu", got {got}. {fix}, or take "xla".'
        )

    if hidden.dtype != kernel.dtype or hidden.dtype not in (jnp.bfloat16, jnp.float16):
        must(
            "`hidden` and `kernel` must both be bfloat16 or both float16",
            f"{hidden.dtype} and {kernel.dtype}",
            "Convert them",
        )
    if hidden.shape[1] % _NARROWEST:
        must(
            f"`hidden.shape[-1]` must be a multiple of {_NARROWEST}",
            hidden.shape[1],
            "Widen the layer",
        )
    if config.class_axis == 1 and kernel.shape[1] % _NARROWEST:
        must(
            f"The classes of a kernel [H, V] must be a multiple of {_NARROWEST}",
            kernel.shape[1],
            'Store the kernel as [V, H] with kernel_layout="vh", which takes any V, '
            "pad it once and mask the new classes",
        )
    chips.check_mosaic_gpu()
    return chips.supported_gpu(_KERNELS)


def _classes(config: Config, operands: Operands, start: int, stop: int) -> Operands:
    """Returns the operands with some of the classes, which count from 0 again."""
    window = (slice(None), slice(start, stop))

    def cut(row):
        return None if row is None else row[start:stop]

    labels = operands.labels
    if labels is not None:
        inside = (labels >= start) & (labels < stop)
        labels = jnp.where(inside, labels - start, -1)
    return operands._replace(
        kernel=operands.kernel[window if config.class_axis == 1 else window[::-1]],
        bias=cut(operands.bias),
        class_mask=cut(operands.class_mask),
        labels=labels,
    )


def _of_tail(fold: Statistics, operands: Operands, first: int) -> Columns:
    """Returns the statistics of a few classes, as one tile in plain XLA."""
    tile = _tail_logits(fold.config, operands)
    start = fold.start(operands.hidden.shape[0], operands)
    columns = fold.merge(start, tile, operands.temperature(fold.config))
    if "argmax" in columns:
        columns["argmax"] = columns["argmax"] + first
    return columns


def _tail_logits(config: Config, operands: Operands) -> Tile:
    rows, classes = operands.hidden.shape[0], operands.num_classes(config)
    tiles = Tiling(rows, classes, rows, classes)
    return compute_tile(config, operands, tiles, 0)


def _launch(
    config: Config,
    operands: Operands,
    chip: Gpu,
    wanted: Collection[str] = (),
    groups: bool = False,
) -> tuple[planning.GpuPlan, planning.Partials[jax.Array]]:
    """Returns what the kernel was asked for, and what it wrote."""
    (rows, features), classes = operands.hidden.shape, operands.num_classes(config)
    # Rows of shared memory, as wide as they divide those of both arrays. Past the last
    # feature TMA writes zeros.
    widths = math.gcd(features, *([classes] if config.class_axis == 1 else []))
    swizzle = next(s for s in (128, 64, 32) if widths % (s // 2) == 0)
    kernel = _KERNELS[chip.compute_capability]
    tiles, splits = planning.choose_gpu_blocks(
        rows, classes, swizzle, chip.core_count, kernel is blackwell
    )
    scale, factor = chips.static_tau_factors(config.static_tau)
    plan = planning.GpuPlan(
        rows=round_up(rows, tiles.block_rows * tiles.cluster),
        classes=classes,
        features=features,
        transposed=config.class_axis == 0,
        blocks=tiles,
        splits=splits,
        softcap=config.softcap,
        scale=scale,
        factor=factor,
        labels=operands.labels is not None,
        mean="mean" in wanted,
        expected="expected" in wanted,
        argmax="argmax" in wanted,
        groups=groups,
    )
    labels = operands.labels
    if labels is not None:
        labels = _pad(labels[:, 0], plan.rows, -1)
    tau_factors = None
    if factor is None:
        tau_factors = chips.tau_factors(operands.temperature(config), rows)
        tau_factors = _pad(tau_factors, plan.rows, 0.0)
    hidden = _pad(operands.hidden, round_up(rows, _ROWS), 0.0, axis=0)
    inputs = planning.GpuInputs(
        hidden, operands.kernel, _bias(plan, operands), labels, tau_factors
    )
    return plan, mesh_axes.like(kernel.run(plan, inputs), operands)


def _columns(
    plan: planning.GpuPlan, rows: int, partials: planning.Partials[jax.Array]
) -> Columns:
    """Returns what the kernel wrote as columns of `Statistics`, [splits, N, 1] each."""
    columns = dict(zip(plan.floats, partials.floats, strict=True))
    if partials.integers is not None:
        columns |= zip(plan.integers, partials.integers, strict=True)
    if plan.expected:
        # c was in base 2.
        columns["weighted"] *= math.log(2)
    return {name: a[:, :rows, None] for name, a in columns.items()}


def _bias(plan: planning.GpuPlan, operands: Operands) -> jax.Array | None:
    """Returns the bias with -inf at dropped classes, for whole tiles; or None."""
    bias, mask = operands.bias, operands.class_mask
    if bias is None and mask is None:
        return None
    row = jnp.zeros(plan.classes, jnp.float32) if bias is None else bias
    row = row.astype(jnp.float32)
    if mask is not None:
        row = jnp.where(mask, row, -jnp.inf)
    return _pad(row, plan.tiles * plan.blocks.classes, -jnp.inf)


def _pad(array: jax.Array, size: int, value: float, axis: int = -1) -> jax.Array:
    """Returns an array padded to a size; the same where it has it already."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=value)
