"""Softmaxes of rows in kernels for Hopper and Blackwell GPUs, by Mosaic GPU.

One read and one write of the device's memory for a row that fits the shared memory of
a multiprocessor, of up to some 57,000 float32 numbers, or of a cluster of up to eight;
of a longer row the rest is read twice. Backward, from y and g, likewise. Of perturbed
logits: noise is made in the kernel, once where it fits beside its row. Log-softmax
likewise; and one read alone where a few numbers of a row are all that is wanted.

Not yet measured: nothing here has run on a GPU. It was compiled for them, read as
machine code, and interpreted.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsoft._core import mesh_axes
from jaxsoft.kernels import chips
from jaxsoft.kernels.rows.binding import RowPlan
from jaxsoft.kernels.rows.mosaic_gpu.gumbel import Gumbel
from jaxsoft.kernels.rows.mosaic_gpu.logarithms import LogSoftmax, Statistics
from jaxsoft.kernels.rows.mosaic_gpu.ring import Ring, choose_fold_ring, choose_ring
from jaxsoft.kernels.rows.mosaic_gpu.stream import Meeting, Refs, stream
from jaxsoft.kernels.rows.mosaic_gpu.tasks import (
    LINE,
    RowFold,
    Slope,
    Softmax,
    Task,
)
from jaxsoft.kernels.typing import Barrier, Factors, Ref, Scratch

__all__ = [
    "Ring",
    "backward",
    "choose_fold_ring",
    "choose_ring",
    "forward",
    "log_forward",
    "statistics",
]

_CAPABILITIES = ("9.0", "10.0")


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
    static, of_rows = _factors(plan, x, tau)
    if words is None:
        name, task = "jaxsoft_softmax_forward", Softmax(static)
    else:
        assert plan.generator is not None
        name = "jaxsoft_gumbel_softmax_forward"
        task = Gumbel(static, plan.generator, plan.hard)
    (y,) = _call(name, task, (x,), of_rows, words)
    return y


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
    (result,) = _call("jaxsoft_softmax_backward", Slope(static), (y, g), of_rows)
    return result


def log_forward(
    plan: RowPlan, x: jax.Array, tau: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns log softmax(x / τ), and what its derivative needs of rows.

    Args:
      plan: what is known of the call.
      x: [R, V] float32, bfloat16 or float16.
      tau: [R, 1] float32, or None where it is static.

    Returns:
      [R, V] in the dtype of `x`; and [R, 2] float32: the largest logit m, and
      Σ exp((x - m) / τ).

    Raises:
      NotImplementedError: on GPUs other than Hopper's and Blackwell's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static, of_rows = _factors(plan, x, tau, natural=True)
    name = "jaxsoft_log_softmax_forward"
    y, found = _call(name, LogSoftmax(static), (x,), of_rows)
    return y, found


def statistics(plan: RowPlan, x: jax.Array, tau: jax.Array | None) -> jax.Array:
    """Returns numbers that the losses of rows are made of, with c = (x - m) / τ.

    Args:
      plan: what is known of the call, and what is wanted.
      x: [R, V] float32, bfloat16 or float16.
      tau: [R, 1] float32, or None where it is static.

    Returns:
      [R, K] float32: the largest logit m, the lowest finite number if there is none;
      Σ exp(c); Σ exp(c) c where the plan wants `expected`; and where it wants `mean`
      the sum of c over the kept classes and their number.

    Raises:
      NotImplementedError: on GPUs other than Hopper's and Blackwell's.
      ModuleNotFoundError: without absl-py, which Pallas imports.
    """
    static, of_rows = _factors(plan, x, tau, natural=True)
    task = Statistics(static, plan.expected, plan.mean)
    (found,) = _call("jaxsoft_row_statistics_forward", task, (x,), of_rows)
    return found


def _factors(
    plan: RowPlan, x: jax.Array, tau: jax.Array | None, natural: bool = False
) -> tuple[Factors | None, jax.Array | None]:
    """Returns the factors of `chips.tau_factors`: static ones, or [3, R]."""
    if tau is not None:
        return None, chips.tau_factors(tau, x.shape[0], natural)
    scale, factor = chips.static_tau_factors(plan.static_tau, natural)
    if factor == 1:
        factor = None
    return (scale if scale != 1 else None, factor, None), None


def _call(
    name: str,
    task: RowFold,
    arrays: tuple[jax.Array, ...],
    factors: jax.Array | None,
    words: jax.Array | None = None,
) -> list[jax.Array]:
    """Runs a task over rows.

    Args:
      name: of the kernel.
      task: what to find, and what to write if anything is written.
      arrays: [R, V] each, in one dtype.
      factors: [K, R], numbers for each row; None where the task has them.
      words: [R, 2] uint32, or None.

    Returns:
      [R, V] in the dtype of the arrays if anything is written; and [R, K] float32 if
      anything is returned of each row.
    """
    chips.check_mosaic_gpu()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype = arrays[0].dtype
    rows, classes = arrays[0].shape
    cores = chips.supported_gpu(_CAPABILITIES).core_count
    writes = isinstance(task, Task)
    if writes:
        ring = choose_ring(classes, dtype.itemsize, len(arrays), words is not None)
    else:
        ring = choose_fold_ring(rows, classes, dtype.itemsize, cores)
    width = ring.lines * LINE
    if width > classes:
        # TMA needs rows of 16 bytes, and lines are whole.
        missing = ((0, 0), (0, width - classes))
        fill = jnp.asarray(task.fill, dtype)
        padded = [jnp.pad(a, missing, constant_values=fill) for a in arrays]
    else:
        padded = arrays
    shaped = [a.reshape(rows, ring.lines, LINE) for a in padded]
    groups = min(rows, ring.groups(cores))
    out_type = []
    if writes:
        out_type.append(jax.ShapeDtypeStruct(shaped[0].shape, dtype))
    if task.recorded:
        out_type.append(jax.ShapeDtypeStruct((task.recorded, rows), jnp.float32))
    cluster = {}
    if ring.cluster > 1:
        table = (groups, 2, ring.cluster, LINE)
        out_type.append(jax.ShapeDtypeStruct(table, jnp.float32))
        cluster = {"cluster": (ring.cluster,), "cluster_names": ("part",)}
    numbers = [a for a in (factors, words) if a is not None]
    has = (factors is not None, words is not None, writes, task.recorded > 0)
    results = plgpu.kernel(
        functools.partial(_kernel, task, ring, has, rows, groups),
        out_type=tuple(out_type),
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
    remaining = iter(mesh_axes.like(results, arrays))
    found = []
    if writes:
        found.append(next(remaining).reshape(rows, width)[:, :classes])
    if task.recorded:
        found.append(next(remaining).T)
    return found


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
    task: RowFold,
    ring: Ring,
    has: tuple[bool, bool, bool, bool],
    rows: int,
    groups: int,
    *refs: Ref,
    full: Barrier,
    **scratch,
) -> None:
    """Streams rows, by arguments as Pallas gives them.

    Args:
      task: what to find, and what to write if anything is written.
      ring: how a row passes.
      has: whether there are factors of rows, keys of rows, an array that is written,
        and numbers that are returned of rows.
      rows: of the arrays.
      groups: of blocks.
      *refs: the arrays, what there is of these four, and the table of a cluster.
      full: a barrier for each slot.
      **scratch: the rest of `_scratch`.
    """
    places = scratch.pop("meeting", None)
    noise = scratch.pop("noise", None)
    stages = [scratch[f"slots{i}"] for i in range(len(scratch))]
    remaining = iter(refs)
    inputs = [next(remaining) for _ in stages]
    factors, words, out, recorded = (next(remaining) if h else None for h in has)
    meeting = None if places is None else Meeting(next(remaining), *places)
    gathered = Refs(inputs, out, recorded, factors, words, stages, noise, full, meeting)
    stream(task, ring, rows, groups, gathered)
