"""Which implementations each operation has, where they run, and which one a call takes.

A name asks for exactly that implementation or an error. `None` takes the first that the
operation has, never what happens to suit the default backend; where `defaults.py` has
evidence for a kernel, a program that is compiled for that chip has it in the place of
XLA's loops. Dispatch, `jaxsoft devices`, tests and benchmarks all read this one table.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsoft._core.exporting import PyTree

__all__ = [
    "TPUS",
    "Gpu",
    "Implementation",
    "Tpu",
    "check_dtype",
    "check_platforms",
    "compiling_for",
    "gpus",
    "implementations",
    "kernel",
    "platform_of",
    "resolve",
    "tpu",
]

Implementation = Literal["reference", "xla", "mosaic_tpu", "mosaic_gpu"]

_XLA: tuple[Implementation, ...] = ("xla",)
_STREAMED: tuple[Implementation, ...] = ("xla", "reference")
_STATISTICS: tuple[Implementation, ...] = (*_STREAMED, "mosaic_tpu", "mosaic_gpu")
_ROWS: tuple[Implementation, ...] = ("xla", "mosaic_tpu", "mosaic_gpu")
_XLA_OR_GPU: tuple[Implementation, ...] = ("xla", "mosaic_gpu")

# The implementations of every public function that takes `implementation`; the default
# is the first.
_OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "softmax": _ROWS,
    "log_softmax": _XLA_OR_GPU,
    "logsumexp": _XLA_OR_GPU,
    "entropy": _XLA_OR_GPU,
    "softmax_cross_entropy": _XLA_OR_GPU,
    "gumbel_softmax": _ROWS,
    "linear_statistics": _STATISTICS,
    "linear_cross_entropy": _STATISTICS,
    "linear_log_prob": _STATISTICS,
    "linear_log_prob_at": _STREAMED,
    "linear_fit_temperature": _STREAMED,
    "linear_distillation": _XLA,
    "linear_distillation_top_k": _STREAMED,
    "linear_expected": _XLA,
    "linear_sample": _XLA_OR_GPU,
    "linear_top_k": _XLA,
    "nt_xent": _STREAMED,
    "clip_loss": _STREAMED,
    "supervised_contrastive": _STREAMED,
    "in_batch_cross_entropy": _STREAMED,
    "hierarchical_log_prob": _XLA,
    "hierarchical_log_probs": _XLA,
    "hierarchical_sample": _XLA,
    "hierarchical_top_k": _XLA,
    "hierarchical_value_and_row_grad": _XLA,
    "adaptive_log_prob": _XLA,
    "adaptive_log_probs": _XLA,
    "adaptive_sample": _XLA,
    "adaptive_top_k": _XLA,
    "sampled_softmax_loss": _XLA,
}

# The one platform that an implementation is for; the others run anywhere.
_PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}


class _Kernel(NamedTuple):
    """A kernel.

    Attributes:
      function: the function that calls it, as "module:name". Pallas is imported with
        that module, by those alone who use it.
      dtypes: of the arrays that it reads; () where the function itself refuses others.
    """

    function: str
    dtypes: tuple[str, ...] = ()


_LAYER, _OF_ROWS = "jaxsoft.kernels.layer", "jaxsoft.kernels.rows"
_TPU = ("float32", "bfloat16")
_GPU_ROWS = (*_TPU, "float16")

# What has a kernel, by the step of an operation and the implementation.
_KERNELS: dict[tuple[str, str], _Kernel] = {
    ("statistics", "mosaic_tpu"): _Kernel(f"{_LAYER}.mosaic_tpu.forward:forward", _TPU),
    ("statistics_gradient", "mosaic_tpu"): _Kernel(
        f"{_LAYER}.mosaic_tpu.backward:accumulate", _TPU
    ),
    ("statistics", "mosaic_gpu"): _Kernel(f"{_LAYER}.mosaic_gpu.call:forward"),
    ("draw", "mosaic_gpu"): _Kernel(f"{_LAYER}.mosaic_gpu.sample:sample"),
    ("rows", "mosaic_tpu"): _Kernel(f"{_OF_ROWS}.mosaic_tpu.call:forward", _TPU),
    ("rows_slope", "mosaic_tpu"): _Kernel(f"{_OF_ROWS}.mosaic_tpu.call:backward"),
    ("rows", "mosaic_gpu"): _Kernel(f"{_OF_ROWS}.mosaic_gpu.call:forward", _GPU_ROWS),
    ("rows_slope", "mosaic_gpu"): _Kernel(f"{_OF_ROWS}.mosaic_gpu.call:backward"),
    ("rows_log", "mosaic_gpu"): _Kernel(
        f"{_OF_ROWS}.mosaic_gpu.call:log_forward", _GPU_ROWS
    ),
    ("rows_statistics", "mosaic_gpu"): _Kernel(
        f"{_OF_ROWS}.mosaic_gpu.call:statistics", _GPU_ROWS
    ),
} | {
    # Functions of rows share primitives and their derivatives, whatever the chip.
    (name, implementation): _Kernel(f"{_OF_ROWS}.{module}:{name}")
    for module, implementations, names in (
        ("primitive", _ROWS[1:], ("softmax", "gumbel_softmax")),
        (
            "statistics",
            _XLA_OR_GPU[1:],
            ("log_softmax", "logsumexp", "entropy", "cross_entropy_statistics"),
        ),
    )
    for name in names
    for implementation in implementations
}


class Gpu(NamedTuple):
    """An NVIDIA GPU, with the attributes that JAX's devices have.

    Attributes:
      compute_capability: such as "9.0".
      core_count: its multiprocessors.
    """

    compute_capability: str
    core_count: int


class Tpu(NamedTuple):
    """A TPU.

    Attributes:
      name: such as "v6e".
      vmem_bytes: of a core.
    """

    name: str
    vmem_bytes: int


TPUS = {
    tpu.name: tpu
    for tpu in (Tpu("v5e", 128 * 2**20), Tpu("v6e", 128 * 2**20), Tpu("7x", 64 * 2**20))
}
# Their names, by the kinds of JAX's devices.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}

_elsewhere: contextvars.ContextVar[Gpu | Tpu | None] = contextvars.ContextVar(
    "jaxsoft_elsewhere", default=None
)


def implementations(operation: str) -> tuple[Implementation, ...]:
    """Returns the implementations that a public function has, the default first."""
    return _OPERATIONS[operation]


def resolve(operation: str, implementation: Implementation | None) -> Implementation:
    """Returns the implementation that runs `operation`.

    Args:
      operation: the public function's name.
      implementation: what the caller asked for; None takes the default.

    Returns:
      One of `implementations(operation)`.

    Raises:
      ValueError: if `implementation` is no implementation's name.
      NotImplementedError: if the operation lacks that implementation.
    """
    available = implementations(operation)
    if implementation is None:
        return available[0]
    if implementation not in get_args(Implementation):
        names = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(
            f"`implementation` must be None or one of {names}, got {implementation!r}."
        )
    if implementation not in available:
        names = " or ".join(map(repr, available))
        raise NotImplementedError(
            f"`implementation` must be {names} for {operation}, "
            f"got {implementation!r}. Leave it None to take the default."
        )
    return implementation


def kernel(step: str, implementation: str) -> Callable[..., PyTree] | None:
    """Returns the function that calls a kernel; None where plain XLA does the step."""
    entry = _KERNELS.get((step, implementation))
    if entry is None:
        return None
    module, name = entry.function.split(":")
    return getattr(importlib.import_module(module), name)


def check_dtype(step: str, implementation: str, name: str, dtype: DTypeLike) -> None:
    """Requires a dtype that a kernel reads.

    Args:
      step: of the operation.
      implementation: of the kernel, if the step has one.
      name: the argument's, for the message.
      dtype: the argument's.

    Raises:
      NotImplementedError: for another dtype.
    """
    entry = _KERNELS.get((step, implementation))
    dtypes = entry.dtypes if entry else ()
    if dtypes and jnp.dtype(dtype).name not in dtypes:
        raise NotImplementedError(
            f"`{name}` must have dtype {' or '.join(dtypes)} with implementation "
            f'"{implementation}", got {dtype}. Use implementation="xla".'
        )


def platform_of(implementation: str) -> str | None:
    """Returns the one platform that an implementation runs on; None for any."""
    return _PLATFORMS.get(implementation)


def check_platforms(implementation: str, platforms: Sequence[str]) -> None:
    """Requires the one platform of a kernel.

    Args:
      implementation: what runs.
      platforms: those that a program is lowered for.

    Raises:
      NotImplementedError: if one of them is another.
    """
    only = platform_of(implementation)
    if only is not None and set(platforms) != {only}:
        raise NotImplementedError(
            f'`implementation` must be None or "xla" on {", ".join(platforms)}, '
            f"got {implementation!r}, which is for {only}."
        )


@contextlib.contextmanager
def compiling_for(chip: Gpu | Tpu | None) -> Iterator[None]:
    """Has kernels take a chip that is not here for the one that they will run on.

    Args:
      chip: that GPU or TPU; None for those of this process.
    """
    if chip is None:
        yield
        return
    # What was traced for another chip must not be taken for this one.
    jax.clear_caches()
    token = _elsewhere.set(chip)
    try:
        yield
    finally:
        _elsewhere.reset(token)
        jax.clear_caches()


def gpus() -> Sequence[Any]:
    """Returns the GPUs that a kernel will run on, perhaps none.

    Each has the attributes of `Gpu`.
    """
    elsewhere = _elsewhere.get()
    if elsewhere is not None:
        return [elsewhere] if isinstance(elsewhere, Gpu) else []
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def tpu() -> Tpu | None:
    """Returns the TPU that a program is compiled for; None if none is known."""
    elsewhere = _elsewhere.get()
    if elsewhere is not None:
        return elsewhere if isinstance(elsewhere, Tpu) else None
    try:
        kinds = {device.device_kind for device in jax.local_devices(backend="tpu")}
    except RuntimeError:
        return None
    names = {_KINDS.get(kind, "") for kind in kinds}
    return TPUS.get(names.pop()) if len(names) == 1 else None
