"""Softmaxes of rows in kernels for Hopper and Blackwell GPUs, by Mosaic GPU.

One read and one write of the device's memory for a row that fits the shared memory of
a multiprocessor, of up to some 57,000 float32 numbers, or of a cluster of up to eight;
of a longer row the rest is read twice. Backward, from y and g, likewise. Of perturbed
logits: noise is made in the kernel, once where it fits beside its row.

Not yet measured: nothing here has run on a GPU. It was compiled for them, read as
machine code, and interpreted.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsoft._core import mesh_axes
from jaxsoft.kernels import chips
from jaxsoft.kernels.rows.mosaic_gpu.gumbel import Gumbel
from jaxsoft.kernels.rows.mosaic_gpu.ring import (
    Meeting,
    Refs,
    Ring,
    choose_ring,
    stream,
)
from jaxsoft.kernels.rows.mosaic_gpu.tasks import LINE, Slope, Softmax, Task
from jaxsoft.kernels.rows.primitive import RowPlan
from jaxsoft.kernels.typing import Barrier, Ref, Scratch

__all__ = ["Ring", "backward", "choose_ring", "forward"]

_CAPABILITIES = ("9.0", "10.0")
# The multiprocessors of a GPU come in groups of neighbours, at least this many in each;
# a cluster lies within one group.
_NEIGHBOURS = 16


def forward(
    plan: RowPlan, x: jax.Array, tau: jax.Array | None, words: jax.Array | None
) -> jax.Array:
    """Returns softmax(x / τ), or the same of perturbed logits.

    Args:
      plan: what is known of the call.
      x: [R, V] float32, bfloat16 or float16.
      tau: [R, 1] float32, or None where it is static.
      words: [R, 2] uint32, the keys of the rows' noise; None without noise.

    Returns:
      [R, V] in the dtype of `x`.

    Raises:
      NotImplementedError: on GPUs other than Hopper's and Blackwell's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static = of_rows = None
    if tau is None:
        scale, factor = chips.static_tau_factors(plan.static_tau)
        static = (scale if scale != 1 else None, factor, None)
    else:
        of_rows = chips.tau_factors(tau, x.shape[0])
    if words is None:
        return _call("jaxsoft_softmax_forward", Softmax(static), (x,), of_rows)
    assert plan.generator is not None
    task = Gumbel(static, plan.generator, plan.hard)
    return _call("jaxsoft_gumbel_softmax_forward", task, (x,), of_rows, words)


def backward(
    plan: RowPlan, y: jax.Array, g: jax.Array, scale: jax.Array | None
) -> jax.Array:
    """Returns y (g - Σ y g / Σ y) / τ.

    Args:
      plan: what is known of the call.
      y: [R, V] float32, bfloat16 or float16, a softmax.
      g: [R, V] in the same dtype.
      scale: 1/τ [R, 1] float32, or None where τ is static.

    Returns:
      [R, V] in the dtype of `y`.

    Raises:
      NotImplementedError: on GPUs other than Hopper's and Blackwell's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static = None if plan.static_tau is None else (1 / plan.static_tau,)
    of_rows = None if scale is None else scale[:, 0][None]
    return _call("jaxsoft_softmax_backward", Slope(static), (y, g), of_rows)


def _call(
    name: str,
    task: Task,
    arrays: tuple[jax.Array, ...],
    factors: jax.Array | None,
    words: jax.Array | None = None,
) -> jax.Array:
    """Runs a task over rows.

    Args:
      name: of the kernel.
      task: what to fold and what to write.
      arrays: [R, V] each, in one dtype.
      factors: [K, R], numbers for each row; None where the task has them.
      words: [R, 2] uint32, or None.

    Returns:
      [R, V] in the dtype of the arrays.
    """
    chips.check_mosaic_gpu()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype = arrays[0].dtype
    rows, classes = arrays[0].shape
    ring = choose_ring(classes, dtype.itemsize, len(arrays), words is not None)
    width = ring.lines * LINE
    if width > classes:
        # TMA needs rows of 16 bytes, and lines are whole.
        missing = ((0, 0), (0, width - classes))
        fill = jnp.asarray(task.fill, dtype)
        padded = [jnp.pad(a, missing, constant_values=fill) for a in arrays]
    else:
        padded = arrays
    shaped = [a.reshape(rows, ring.lines, LINE) for a in padded]
    out_type = (jax.ShapeDtypeStruct(shaped[0].shape, dtype),)
    groups = min(rows, _groups(ring))
    cluster = {}
    if ring.cluster > 1:
        table = (groups, 2, ring.cluster, LINE)
        out_type += (jax.ShapeDtypeStruct(table, jnp.float32),)
        cluster = {"cluster": (ring.cluster,), "cluster_names": ("part",)}
    numbers = [a for a in (factors, words) if a is not None]
    has = (factors is not None, words is not None)
    out, *_ = plgpu.kernel(
        functools.partial(_kernel, task, ring, has, rows, groups),
        out_type=out_type,
        scratch_types=_scratch(ring, len(arrays), dtype),
        grid=(groups,),
        grid_names=("group",),
        **cluster,
        kernel_name=name,
        # ex2.approx is as good as exp2; what takes a logarithm knows how coarse it is.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=task.private,
        ),
    )(*shaped, *numbers)
    out = mesh_axes.like(out, arrays)
    return out.reshape(rows, width)[:, :classes]


def _groups(ring: Ring) -> int:
    """Returns how many blocks, or clusters of them, run at the same time."""
    cores = chips.supported_gpu(_CAPABILITIES).core_count
    if ring.cluster == 1:
        return cores * ring.blocks
    # Rows are dealt out in advance: a cluster that had to wait would double the time.
    neighbours = cores - cores % _NEIGHBOURS
    return max(1, neighbours * ring.blocks // ring.cluster)


def _scratch(ring: Ring, arrays: int, dtype: jnp.dtype) -> Scratch:
    """Returns the shared memory and barriers of a ring, by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    slots = (ring.slots, ring.chunk, LINE)
    scratch: Scratch = {f"slots{i}": plgpu.SMEM(slots, dtype) for i in range(arrays)}
    if ring.keeps_noise:
        scratch["noise"] = plgpu.SMEM(slots, jnp.float32)
    scratch["full"] = plgpu.Barrier(num_arrivals=arrays, num_barriers=ring.slots)
    if ring.cluster > 1:
        scratch["meeting"] = [
            plgpu.SMEM((LINE,), jnp.float32),
            plgpu.SMEM((ring.cluster, LINE), jnp.float32),
            plgpu.ClusterBarrier(collective_axes=("part",)),
            plgpu.Barrier(),
        ]
    return scratch


def _kernel(
    task: Task,
    ring: Ring,
    has: tuple[bool, bool],
    rows: int,
    groups: int,
    *refs: Ref,
    full: Barrier,
    **scratch,
) -> None:
    """Streams rows, by arguments as Pallas gives them.

    Args:
      task: what to fold and what to write.
      ring: how a row passes.
      has: whether there are factors and keys of rows.
      rows: of the arrays.
      groups: of blocks.
      *refs: the arrays, what there is of factors and keys, the result, and the table of
        a cluster.
      full: a barrier for each slot.
      **scratch: the rest of `_scratch`.
    """
    places = scratch.pop("meeting", None)
    noise = scratch.pop("noise", None)
    stages = [scratch[f"slots{i}"] for i in range(len(scratch))]
    remaining = iter(refs)
    inputs = [next(remaining) for _ in stages]
    factors, words = (next(remaining) if h else None for h in has)
    out = next(remaining)
    meeting = None if places is None else Meeting(next(remaining), *places)
    gathered = Refs(inputs, out, factors, words, stages, noise, full, meeting)
    stream(task, ring, rows, groups, gathered)
