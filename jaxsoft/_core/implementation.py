"""Names of implementations, and which of them an operation has.

A name asks for exactly that implementation or an error. `None` leaves the choice
to jaxsoft, which decides by shape, dtype and platform, never by what happens to be
the default backend.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Gpu",
    "Implementation",
    "check_platforms",
    "compiling_for",
    "gpus",
    "platform_of",
    "recorded",
    "resolve",
]

Implementation = Literal["reference", "xla", "mosaic_tpu", "mosaic_gpu"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    "reference",
    "xla",
    "mosaic_tpu",
    "mosaic_gpu",
)
# The one platform that a kernel is for; the others run anywhere.
_PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `resolve` decided.

    Attributes:
      operation: the public function's name.
      chosen: the implementation that runs it.
      available: those that may be asked for.
    """

    operation: str
    chosen: Implementation
    available: tuple[Implementation, ...]


class Gpu(NamedTuple):
    """An NVIDIA GPU, with the attributes that JAX's devices have.

    Attributes:
      compute_capability: such as "9.0".
      core_count: its multiprocessors.
    """

    compute_capability: str
    core_count: int


_choices: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "jaxsoft_choices", default=None
)
_elsewhere: contextvars.ContextVar[Gpu | None] = contextvars.ContextVar(
    "jaxsoft_elsewhere", default=None
)


def resolve(
    operation: str,
    implementation: Implementation | None,
    available: tuple[Implementation, ...],
) -> Implementation:
    """Returns the implementation that runs `operation`.

    Args:
      operation: the public function's name, for the error message.
      implementation: what the caller asked for; None takes the default.
      available: the implementations that the operation has, the default first.

    Returns:
      One of `available`.

    Raises:
      ValueError: if `implementation` is no implementation's name.
      NotImplementedError: if the operation lacks that implementation.
    """
    chosen = _chosen(operation, implementation, available)
    record = _choices.get()
    if record is not None:
        record.append(Choice(operation, chosen, available))
    return chosen


def _chosen(
    operation: str,
    implementation: Implementation | None,
    available: tuple[Implementation, ...],
) -> Implementation:
    """The rule of `resolve`."""
    if implementation is None:
        return available[0]
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
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


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Keeps what `resolve` decides.

    Yields:
      The choices, as they are made.
    """
    choices: list[Choice] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


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
def compiling_for(gpu: Gpu | None) -> Iterator[None]:
    """Has kernels take a GPU that is not here for the one that they will run on.

    Args:
      gpu: that GPU; None for those of this process.
    """
    if gpu is None:
        yield
        return
    # What was traced for another GPU must not be taken for this one.
    jax.clear_caches()
    token = _elsewhere.set(gpu)
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
        return [elsewhere]
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []
