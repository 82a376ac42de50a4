"""Softmaxes of rows in Mosaic TPU kernels: one read of HBM and one write.

A block has some rows and, where they fit VMEM, all of their classes: their largest
logit and their sum come from one pass over the block, online, their probabilities from
another. Where eight rows do not fit, blocks of classes stream past twice, and what the
first pass keeps is two numbers a row; the second runs backwards, so that the block
between them is not read again. Backward, from y and g, likewise.

Where the last block of classes sticks out its logits are -inf (y and g are 0); rows
that stick out are computed from arbitrary numbers and not written.

Not yet measured on any TPU, hence no function's default.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsoft._core import mesh_axes
from jaxsoft._core.padding import round_up
from jaxsoft._core.temperature import divide_by_temperature
from jaxsoft.kernels import tpu
from jaxsoft.kernels.rows.mosaic_tpu import gumbel
from jaxsoft.kernels.rows.mosaic_tpu.strips import Strip, chunks, merge
from jaxsoft.kernels.rows.primitive import Plan

__all__ = ["Blocks", "backward", "choose", "forward"]

# A register has 8 sublanes of 128 lanes; bfloat16 packs two rows in a sublane.
_LANES = 128
_SUBLANES = {2: 16, 4: 8}
# Registers that hold what is worked on at a time.
_REGISTERS = 16
# The most bytes of a block: copies are long enough, and steps many enough to overlap.
_BLOCK_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The sizes of the blocks of a kernel.

    Attributes:
      rows: of a block, a multiple of a strip.
      classes: of a block: all of them, or a multiple of 128.
      strip: rows that are worked on at a time.
      vmem_bytes: the most bytes of VMEM that the kernel may take.
      keeps: whether perturbed logits stay beside the block, so that no noise is drawn
        twice.
      chunk: classes that are worked on at a time, a multiple of 256.
    """

    rows: int
    classes: int
    strip: int
    vmem_bytes: int
    keeps: bool = False
    chunk: int = 2048


def choose(
    rows: int, classes: int, itemsizes: tuple[int, ...], vmem: int, noisy: bool = False
) -> Blocks:
    """Chooses the blocks of a kernel.

    Args:
      rows: R.
      classes: V.
      itemsizes: the bytes of a number of each array [R, V] that is read or written.
      vmem: the bytes of VMEM of a core.
      noisy: whether there are perturbed logits to keep, in float32.

    Returns:
      The blocks: whole rows where the fewest that registers hold fit, and what was
      perturbed where that fits beside them.
    """
    budget = int(vmem * tpu.VMEM_SHARE)
    least = max(_SUBLANES[size] for size in itemsizes)
    width = round_up(classes, _LANES)
    # Temperatures and what is kept of rows, padded to lanes; strips in registers.
    spare = 8 * least * _LANES * 4 + 2**20
    # Two of each block in turn.
    a_class = 2 * sum(itemsizes)
    keeps = noisy and least * width * (a_class + 4) + spare <= budget
    if least * width * a_class + spare > budget:
        fitting = (budget - spare) // (least * a_class)
        fitting = min(fitting, _BLOCK_BYTES // (least * max(itemsizes)))
        chunk = Blocks.chunk
        return Blocks(least, fitting // chunk * chunk, least, budget)
    strip = least * max(1, min(8, _REGISTERS * _LANES // min(width, Blocks.chunk)))
    strip = min(strip, round_up(rows, least))
    most = max(1, _BLOCK_BYTES // (strip * width * max(itemsizes)))
    block = strip * min(most, math.ceil(rows / strip))
    return Blocks(block, classes, strip, budget, keeps)


def forward(plan: Plan, x: jax.Array, tau: Any, words: Any) -> jax.Array:
    """Returns softmax(x / τ), or the same of perturbed logits.

    Args:
      plan: what is known of the call.
      x: [R, V] float32 or bfloat16.
      tau: [R, 1] float32, or None where it is static.
      words: [R, 2] uint32, the keys of the rows' noise; None without noise.

    Returns:
      [R, V] in the dtype of `x`.
    """
    if words is None:
        body = functools.partial(_softmax_kernel, plan)
        return _call("jaxsoft_softmax_forward", body, (x,), tau)
    body = functools.partial(gumbel.kernel, plan)
    return _call("jaxsoft_gumbel_softmax_forward", body, (x,), tau, words)


def backward(plan: Plan, y: jax.Array, g: jax.Array, scale: Any) -> jax.Array:
    """Returns y (g - Σ y g / Σ y) / τ.

    Args:
      plan: what is known of the call.
      y: [R, V] float32 or bfloat16, a softmax.
      g: [R, V] in the same dtype.
      scale: 1/τ [R, 1] float32, or None where τ is static.

    Returns:
      [R, V] in the dtype of `y`.
    """
    body = functools.partial(_slope_kernel, plan)
    return _call("jaxsoft_softmax_backward", body, (y, g), scale)


def _call(
    name: str,
    body: Any,
    wide: tuple[jax.Array, ...],
    column: Any,
    words: Any = None,
) -> jax.Array:
    """Calls a kernel that reads arrays [R, V] and a few columns, and writes [R, V].

    Args:
      name: of the kernel.
      body: a function of the pass, 0 or 1; of whether the first pass begins; of the
        strip; and of what folds over the chunks of its classes.
      wide: the arrays.
      column: [R, 1] float32, or None.
      words: [R, 2] uint32, or None.

    Returns:
      [R, V] in the dtype of the arrays.
    """
    rows, classes = wide[0].shape
    itemsize = wide[0].dtype.itemsize
    sizes = (itemsize,) * (len(wide) + 1)
    noisy = words is not None
    blocks = choose(rows, classes, sizes, tpu.vmem_bytes(), noisy)
    steps = pl.cdiv(classes, blocks.classes)
    # In the second pass blocks come backwards; what is written waits for it.
    if steps == 1:
        grid, place, written = (), lambda r: (r, 0), lambda r: (r, 0)
    else:
        last = steps - 1
        grid = (2, steps)
        place = lambda r, second, c: (r, c + second * (last - 2 * c))  # noqa: E731
        written = lambda r, second, c: (r, last - second * c)  # noqa: E731
    shape = (blocks.rows, blocks.classes)
    specs = [pl.BlockSpec(shape, place) for _ in wide]
    given = [a for a in (column, words) if a is not None]
    for array in given:
        width = (blocks.rows, array.shape[1])
        specs.append(pl.BlockSpec(width, lambda r, *_: (r, 0)))
    dtypes = gumbel.kept(blocks.keeps) if noisy else (jnp.float32,) * 2
    scratch = [pltpu.VMEM((blocks.rows, 1), dtype) for dtype in dtypes]
    if blocks.keeps:
        scratch.append(pltpu.VMEM(shape, jnp.float32))
    has = (column is not None, noisy)
    kernel = functools.partial(_kernel, body, blocks, classes, len(wide), has)
    reads = len(wide) * (2 if steps > 1 else 1)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, blocks.rows), *grid),
        in_specs=specs,
        out_specs=pl.BlockSpec(shape, written),
        out_shape=mesh_axes.type_of(wide[0], wide[0].shape, wide[0].dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *["arbitrary" for _ in grid]),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * rows * classes,
            transcendentals=rows * classes * (2 if len(wide) == 1 else 0),
            bytes_accessed=(reads + 1) * rows * classes * itemsize,
        ),
        name=name,
    )(*wide, *given)


def _kernel(body, blocks: Blocks, classes: int, arrays: int, has, *refs) -> None:
    """Runs the two passes over each strip of a block's rows."""
    rest = iter(refs)
    wide = [next(rest) for _ in range(arrays)]
    column, words = (next(rest) if h else None for h in has)
    out, *kept = rest
    noisy = kept.pop() if blocks.keeps else None
    steps = pl.cdiv(classes, blocks.classes)

    def run(passes: tuple[int, ...], block: Any, begins: Any) -> None:
        def strip(index):
            rows = pl.ds(
                pl.multiple_of(index * blocks.strip, blocks.strip), blocks.strip
            )
            first = block * blocks.classes
            own, key = (None if a is None else a[rows, :] for a in (column, words))
            state = Strip(wide, out, kept, rows, first, own, key, noisy)
            valid = None if steps == 1 else classes - first
            over = functools.partial(chunks, blocks.classes, blocks.chunk, valid)
            for number in passes:
                body(number, begins, state, over)

        number = blocks.rows // blocks.strip
        if number == 1:
            strip(0)
        else:
            pl.loop(0, number)(strip)

    if steps == 1:
        run((0, 1), 0, True)
        return
    index = pl.program_id(2)
    pl.when(pl.program_id(1) == 0)(lambda: run((0,), index, index == 0))
    pl.when(pl.program_id(1) == 1)(lambda: run((1,), steps - 1 - index, False))


def _softmax_kernel(plan: Plan, number: int, begins, strip: Strip, over) -> None:
    """The largest logit and the sum of a strip, then its probabilities."""
    tau: Any = plan.static_tau if strip.column is None else strip.column
    lowest = float(jnp.finfo(jnp.float32).min)

    def fold(columns, valid, carry):
        return merge(strip.load(0, columns, valid, -jnp.inf), tau, carry)

    def write(columns, valid, carry):
        del valid
        x = strip.load(0, columns, None, 0)
        peak, total = carry
        p = jnp.exp(divide_by_temperature(x, peak, tau)) / total
        strip.out[strip.rows, columns] = p.astype(strip.out.dtype)
        return carry

    if number == 0:
        strip.keep(over(fold, strip.restore(begins, (lowest, 0.0))))
        return
    peak, total = strip.get()
    over(write, (peak, jnp.where(total == 0, 1, total)))


def _slope_kernel(plan: Plan, number: int, begins, strip: Strip, over) -> None:
    """Σ y g and Σ y of a strip, then y (g - Σ y g / Σ y) / τ."""
    scale: Any = strip.column
    if scale is None:
        assert plan.static_tau is not None
        scale = 1 / plan.static_tau

    def fold(columns, valid, carry):
        y, g = (strip.load(i, columns, valid, 0) for i in range(2))
        return (
            carry[0] + jnp.sum(y * g, axis=1, keepdims=True),
            carry[1] + jnp.sum(y, axis=1, keepdims=True),
        )

    def write(columns, valid, mean):
        del valid
        y, g = (strip.load(i, columns, None, 0) for i in range(2))
        dx = y * (g - mean) * scale
        strip.out[strip.rows, columns] = dx.astype(strip.out.dtype)
        return mean

    if number == 0:
        strip.keep(over(fold, strip.restore(begins, (0.0, 0.0))))
        return
    weighted, total = strip.get()
    over(write, weighted / jnp.where(total == 0, 1, total))
