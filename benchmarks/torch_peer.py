"""What the packages of PyTorch offer, on arrays that they share with JAX."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import machine, timing
from benchmarks.workloads import LinearCase

# Of PyTorch, hidden [N, H], weight [V, H], labels and the reduction.
Loss = Callable[..., Any]


def torch_loss(
    torch: Any, hidden: Any, weight: Any, labels: Any, reduction: str
) -> Any:
    """PyTorch's chunked path, with its own choice of chunks."""
    return torch.nn.functional.linear_cross_entropy(
        hidden,
        weight,
        labels,
        reduction=reduction,
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def liger_loss(
    torch: Any, hidden: Any, weight: Any, labels: Any, reduction: str
) -> Any:
    """Liger's chunked path: gradients are made with the value."""
    del torch
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

    return LigerFusedLinearCrossEntropyLoss(reduction=reduction)(weight, hidden, labels)


def cce_loss(torch: Any, hidden: Any, weight: Any, labels: Any, reduction: str) -> Any:
    """Cut cross-entropy, which leaves out gradients that it deems too small."""
    del torch
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

    return linear_cross_entropy(hidden, weight, labels, reduction=reduction)


def quack_loss(
    torch: Any, hidden: Any, weight: Any, labels: Any, reduction: str
) -> Any:
    """QuACK's chunked path."""
    del torch
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore

    return chunked_linear_cross_entropy(hidden, weight, labels, reduction=reduction)


def absent(torch: ModuleType) -> str:
    """Why PyTorch cannot work where JAX does; empty where it can."""
    platform = jax.default_backend()
    if platform == "cpu":
        return ""
    if platform != "gpu":
        return "takes part on a CPU or a GPU only, where it shares memory with JAX"
    return "" if torch.cuda.is_available() else "finds no GPU"  # pyright: ignore


def program(
    torch: ModuleType,
    case: LinearCase,
    arguments: tuple[Any, ...],
    name: str = "torch",
    loss: Loss = torch_loss,
) -> timing.Program:
    """Wraps a linear cross-entropy.

    On a CPU it takes as many threads as JAX has cores. Hidden and kernel are shared,
    not copied; a kernel [H, V] is given as the transpose that PyTorch wants. Labels are
    widened to 64 bits in every call, which they require.

    Args:
      torch: the package.
      case: what is asked; it has no temperature.
      arguments: hidden, kernel, labels, None and the cotangent.
      name: the contender's.
      loss: what is wrapped.

    Returns:
      A program of these arguments that returns the case's outputs.
    """

    def run(hidden: Any, kernel: Any, labels: Any, _: Any, cotangent: Any) -> Any:
        shared = [torch.from_dlpack(array).detach() for array in (hidden, kernel)]
        for tensor in shared:
            tensor.requires_grad_(case.gradient)
        losses = loss(
            torch,
            shared[0],
            shared[1] if case.layout == "vh" else shared[1].T,
            torch.from_dlpack(labels).long(),
            case.reduction,
        )
        if not case.gradient:
            return _to_jax(torch, losses)
        upstream = None
        if case.reduction == "none":
            upstream = torch.from_dlpack(cotangent).to(losses.dtype)
        losses.backward(upstream)
        return _to_jax(torch, losses.detach(), *(tensor.grad for tensor in shared))

    return wrap(torch, run, arguments, name)


def softmax_program(
    torch: ModuleType,
    softmax: Callable[[Any], Any],
    arguments: tuple[Any, ...],
    name: str,
    temperature: float,
    *,
    value: bool,
    gradient: bool,
) -> timing.Program:
    """Wraps a softmax over the last axis, of logits divided by a temperature.

    Args:
      torch: the package.
      softmax: of a tensor.
      arguments: logits, labels, None and the cotangent.
      name: the contender's.
      temperature: by which every call divides.
      value: whether the probabilities are returned; without them they were computed
        before the gradient is timed.
      gradient: whether the gradient of the logits is.

    Returns:
      A program of these arguments.
    """
    leaf = torch.from_dlpack(arguments[0]).detach().requires_grad_(gradient)
    kept = None if value else softmax(leaf / temperature)

    def run(logits: Any, labels: Any, none: Any, cotangent: Any) -> Any:
        del logits, labels, none
        probs = softmax(leaf / temperature) if kept is None else kept
        outputs: list[Any] = [probs.detach()] if value else []
        if gradient:
            outputs += torch.autograd.grad(
                probs, leaf, torch.from_dlpack(cotangent), retain_graph=not value
            )
        found = _to_jax(torch, *outputs)
        return (found,) if len(outputs) == 1 and gradient else found

    return wrap(torch, run, arguments, name)


def wrap(
    torch: ModuleType, run: Callable[..., Any], arguments: tuple[Any, ...], name: str
) -> timing.Program:
    """Makes a program of a function of these arguments; its first call compiles."""
    torch.set_num_threads(machine.cores())
    start = time.perf_counter()
    outputs = run(*arguments)
    seconds = time.perf_counter() - start
    size = sum(output.nbytes for output in jax.tree.leaves(outputs))
    del outputs
    peak = _peak_bytes(torch, run, arguments)
    temporaries = None if peak is None else max(0, peak - size)
    return timing.Program(name, run, seconds, temporaries, size)


def _to_jax(torch: Any, *tensors: Any) -> Any:
    """Shares results with JAX, once they are there."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
    found = [jnp.from_dlpack(tensor.detach()) for tensor in tensors]
    return tuple(found) if len(found) > 1 else found[0]


def _peak_bytes(torch: Any, run: Any, arguments: tuple[Any, ...]) -> int | None:
    """The most that PyTorch's allocator held during a call, beside its arguments.

    Args:
      torch: the package.
      run: what to call.
      arguments: of it.

    Returns:
      Bytes, outputs included: on a GPU as its allocator counts them, on a CPU summed
      over the allocations and releases that the profiler saw; None where this release
      does not show them.
    """
    if jax.default_backend() == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run(*arguments)
        peak = torch.cuda.max_memory_allocated() - before
        del outputs
        return peak
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
