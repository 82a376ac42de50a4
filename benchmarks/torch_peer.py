"""PyTorch's own linear cross-entropy, on arrays that it shares with JAX."""

import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import machine, timing
from benchmarks.workloads import LinearCase


def program(
    torch: ModuleType, case: LinearCase, arguments: tuple[Any, ...]
) -> timing.Program:
    """Wraps PyTorch's chunked path, with its own choice of chunks.

    It takes as many threads as JAX has cores. Hidden and kernel are shared, not copied;
    a kernel [H, V] is given as the transpose that PyTorch wants. Labels are widened to
    64 bits in every call, which they require.

    Args:
      torch: the package.
      case: what is asked; it has no temperature.
      arguments: hidden, kernel, labels, None and the cotangent.

    Returns:
      A program of these arguments that returns the case's outputs.
    """
    torch.set_num_threads(machine.cores())
    options = torch.nn.LinearCrossEntropyOptions()

    def run(hidden: Any, kernel: Any, labels: Any, _: Any, cotangent: Any) -> Any:
        shared = [torch.from_dlpack(array).detach() for array in (hidden, kernel)]
        for tensor in shared:
            tensor.requires_grad_(case.gradient)
        losses = torch.nn.functional.linear_cross_entropy(
            shared[0],
            shared[1] if case.layout == "vh" else shared[1].T,
            torch.from_dlpack(labels).long(),
            reduction=case.reduction,
            options=options,
        )
        if not case.gradient:
            return jnp.from_dlpack(losses)
        upstream = None
        if case.reduction == "none":
            upstream = torch.from_dlpack(cotangent).to(losses.dtype)
        losses.backward(upstream)
        outputs = (losses.detach(), *(tensor.grad for tensor in shared))
        return tuple(jnp.from_dlpack(output) for output in outputs)

    start = time.perf_counter()
    outputs = run(*arguments)
    seconds = time.perf_counter() - start
    size = sum(output.nbytes for output in jax.tree.leaves(outputs))
    del outputs
    peak = _peak_bytes(torch, run, arguments)
    temporaries = None if peak is None else max(0, peak - size)
    return timing.Program("torch", run, seconds, temporaries, size)


def _peak_bytes(torch: ModuleType, run: Any, arguments: tuple[Any, ...]) -> int | None:
    """The most that PyTorch's allocator held during a call, beside its arguments.

    Args:
      torch: the package.
      run: what to call.
      arguments: of it.

    Returns:
      Bytes, outputs included, summed over the allocations and releases that the
      profiler saw; None where this release does not show them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        outputs = run(*arguments)
    del outputs
    try:
        events = profile.profiler.kineto_results.events()
        changes = [
            (event.start_ns(), event.nbytes())
            for event in events
            if event.name() == "[memory]"
        ]
    except AttributeError:
        return None
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak if changes else None
