"""Softmaxes of rows in kernels for Hopper GPUs, by Mosaic GPU.

One read and one write of the device's memory for a row that fits shared memory, of up
to some 57,000 float32 numbers; of a longer row the rest is read twice (a cluster of
multiprocessors could hold it; a later step). Backward, from y and g, likewise. Of
perturbed logits: noise is made in the kernel, once where it fits beside its row.

Not yet measured: nothing here has run on a GPU. It was compiled for one, read as
machine code, and interpreted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoft import nvidia, varying
from jaxsoft.logits.kernel_rows import Plan
from jaxsoft.logits.mosaic_gpu_gumbel import Gumbel
from jaxsoft.logits.mosaic_gpu_ring import Refs, Ring, choose, stream
from jaxsoft.logits.mosaic_gpu_tasks import LINE, Slope, Softmax

__all__ = ["Ring", "backward", "choose", "forward"]

_CAPABILITIES = ("9.0",)


def forward(plan: Plan, x: jax.Array, tau: Any, words: Any) -> jax.Array:
    """Returns softmax(x / τ), or the same of perturbed logits.

    Args:
      plan: what is known of the call.
      x: [R, V] float32, bfloat16 or float16.
      tau: [R, 1] float32, or None where it is static.
      words: [R, 2] uint32, the keys of the rows' noise; None without noise.

    Returns:
      [R, V] in the dtype of `x`.

    Raises:
      NotImplementedError: on GPUs other than Hopper's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static, rows = None, None
    if tau is None:
        scale, factor = nvidia.static_temper(plan.static_tau)
        static = (scale if scale != 1 else None, factor, None)
    else:
        rows = nvidia.temper(tau, x.shape[0])
    if words is None:
        return _call("jaxsoft_softmax_forward", Softmax(static), (x,), rows)
    assert plan.generator is not None
    task = Gumbel(static, plan.generator, plan.hard)
    return _call("jaxsoft_gumbel_softmax_forward", task, (x,), rows, words)


def backward(plan: Plan, y: jax.Array, g: jax.Array, scale: Any) -> jax.Array:
    """Returns y (g - Σ y g / Σ y) / τ.

    Args:
      plan: what is known of the call.
      y: [R, V] float32, bfloat16 or float16, a softmax.
      g: [R, V] in the same dtype.
      scale: 1/τ [R, 1] float32, or None where τ is static.

    Returns:
      [R, V] in the dtype of `y`.

    Raises:
      NotImplementedError: on GPUs other than Hopper's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static = None if plan.static_tau is None else (1 / plan.static_tau,)
    rows = None if scale is None else scale[:, 0][None]
    return _call("jaxsoft_softmax_backward", Slope(static), (y, g), rows)


def _call(
    name: str,
    task: Any,
    arrays: tuple[jax.Array, ...],
    temper: Any,
    words: Any = None,
) -> jax.Array:
    """Runs a task over rows.

    Args:
      name: of the kernel.
      task: what to fold and what to write.
      arrays: [R, V] each, in one dtype.
      temper: [K, R], numbers for each row; None where the task has them.
      words: [R, 2] uint32, or None.

    Returns:
      [R, V] in the dtype of the arrays.
    """
    nvidia.check_pallas()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype = arrays[0].dtype
    rows, classes = arrays[0].shape
    ring = choose(classes, dtype.itemsize, len(arrays), words is not None)
    width = ring.lines * LINE
    if width > classes:
        # TMA needs rows of 16 bytes, and lines are whole.
        missing = ((0, 0), (0, width - classes))
        fill = jnp.asarray(task.fill, dtype)
        padded = [jnp.pad(a, missing, constant_values=fill) for a in arrays]
    else:
        padded = arrays
    shaped = [a.reshape(rows, ring.lines, LINE) for a in padded]
    out_type: Any = jax.ShapeDtypeStruct(shaped[0].shape, dtype)
    blocks = min(rows, nvidia.chip(_CAPABILITIES).core_count * ring.blocks)
    numbers = [a for a in (temper, words) if a is not None]
    has = (temper is not None, words is not None)
    found = plgpu.kernel(
        functools.partial(_kernel, task, ring, has, rows, blocks),
        out_type=out_type,
        scratch_types=_scratch(ring, len(arrays), dtype),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        # ex2.approx is as good as exp2; what takes a logarithm knows how coarse it is.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=task.private,
        ),
    )(*shaped, *numbers)
    found = varying.like(found, arrays)
    return found.reshape(rows, width)[:, :classes]


def _scratch(ring: Ring, arrays: int, dtype: jnp.dtype) -> dict[str, Any]:
    """Returns the shared memory and barriers of a ring, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    slots = (ring.slots, ring.chunk, LINE)
    scratch: dict[str, Any] = {
        f"slots{i}": plgpu.SMEM(slots, dtype) for i in range(arrays)
    }
    if ring.keeps:
        scratch["noise"] = plgpu.SMEM(slots, jnp.float32)
    scratch["full"] = plgpu.Barrier(num_arrivals=arrays, num_barriers=ring.slots)
    return scratch


def _kernel(task, ring: Ring, has, rows: int, blocks: int, *refs, full, **scratch):
    """Streams rows, by arguments as Pallas gives them."""
    noise = scratch.pop("noise", None)
    stages = [scratch[f"slots{i}"] for i in range(len(scratch))]
    rest = iter(refs)
    inputs = [next(rest) for _ in stages]
    temper, words = (next(rest) if h else None for h in has)
    gathered = Refs(inputs, next(rest), temper, words, stages, noise, full)
    stream(task, ring, rows, blocks, gathered)
