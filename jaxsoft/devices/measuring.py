"""What a function runs on a device, what else it could, and the memory of each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxsoft._core import registry
from jaxsoft._core.exporting import PyTree
from jaxsoft._core.registry import platform_of
from jaxsoft.devices.operations import operations
from jaxsoft.devices.programs import Operation, Program, Shapes

__all__ = ["Device", "Found", "Ran", "describe", "here"]


@dataclasses.dataclass(frozen=True)
class Device:
    """What to compile for.

    Attributes:
      platform: as `jax.lax.platform_dependent` has it.
      description: in words.
      device: one of JAX's, perhaps an abstract one; None to compile nothing.
    """

    platform: str
    description: str
    device: Any = None


@dataclasses.dataclass(frozen=True)
class Ran:
    """An implementation on a device.

    Attributes:
      name: the implementation's.
      temporaries: bytes beside arguments and results, by "value" and
        "value_and_grad"; None where the platform does not tell.
      refused: why it cannot run there, or cannot at these shapes; None if it can.
    """

    name: str
    temporaries: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """A function on a device.

    Attributes:
      operation: its name.
      uses: the implementation that it uses unless told otherwise.
      implementations: all that it has, that one first.
    """

    operation: str
    uses: str
    implementations: tuple[Ran, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Found":
        """Returns what `dataclasses.asdict` took apart."""
        implementations = tuple(Ran(**ran) for ran in fields["implementations"])
        return cls(fields["operation"], fields["uses"], implementations)


def here() -> Device:
    """Returns the first device of this process."""
    device = jax.devices()[0]
    platform = device.platform
    if platform == "gpu":
        version = device.client.platform_version.lower()
        platform = "rocm" if "rocm" in version else "cuda"
    return Device(platform, f"{jax.device_count()} × {device.device_kind}", device)


def describe(
    device: Device, names: Sequence[str], shapes: Shapes | None
) -> Iterator[Found]:
    """Yields what each function does on a device.

    Args:
      device: the device.
      names: of the functions.
      shapes: sizes to compile for; None compiles nothing.
    """
    for name in names:
        yield _describe(device, operations()[name], shapes)


def _describe(device: Device, operation: Operation, shapes: Shapes | None) -> Found:
    program = operation.program(shapes or Shapes())
    uses, *others = (
        registry.implementations(operation.name) if operation.chooses else ("xla",)
    )
    ran = []
    for name in (uses, *others):
        # The default is asked for as users do: by not asking.
        options = operation.options(None if name == uses else name)
        ran.append(_run(device, name, program, options, shapes is not None))
    return Found(operation.name, uses, tuple(ran))


def _run(
    device: Device,
    name: str,
    program: Program,
    options: Mapping[str, str | None],
    compiles: bool,
) -> Ran:
    """Returns what comes of an implementation: its memory, or why it does not run."""
    only = platform_of(name)
    if only is not None and only != device.platform:
        return Ran(name, refused=f"it is for {only}")
    if only is None and not compiles:
        return Ran(name)
    temporaries = {}
    try:
        for kind, function, arrays in program.calls(options):
            if compiles:
                donated = program.donated if kind == "value" else ()
                temporaries[kind] = _temporaries(device, function, arrays, donated)
            else:
                jax.eval_shape(function, *arrays)
    except (NotImplementedError, ImportError, jax.errors.JaxRuntimeError) as error:
        return Ran(name, temporaries, " ".join(str(error).split())[:300])
    return Ran(name, temporaries)


def _temporaries(
    device: Device,
    function: Callable[..., PyTree],
    arrays: tuple[PyTree, ...],
    donated: tuple[int, ...],
) -> int | None:
    """Returns the bytes that a program takes beside arguments and results."""
    place = SingleDeviceSharding(device.device)
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arrays
    )
    traced = jax.jit(function, donate_argnums=donated).trace(*arrays)
    compiled = traced.lower(lowering_platforms=(device.platform,)).compile()
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
