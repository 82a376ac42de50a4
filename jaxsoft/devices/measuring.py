"""What a function runs on a device, what else it could, and the cost of each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxsoft._core import defaults, registry
from jaxsoft._core.defaults import Default
from jaxsoft._core.exporting import PyTree
from jaxsoft._core.registry import platform_of
from jaxsoft.devices.chips import Chip, Least, least_time
from jaxsoft.devices.hlo import Work, work_of
from jaxsoft.devices.operations import operations
from jaxsoft.devices.programs import Operation, Program, Shapes
from jaxsoft.devices.ptx import Kernel, Limits, kernels_of, printed
from jaxsoft.devices.schedule import Schedule, forget, schedule_of
from jaxsoft.linear.plans import Plan, Tiling
from jaxsoft.linear.program import defaults_in, plans_in

__all__ = ["UNASKED", "Device", "Found", "Ran", "describe", "here"]

# The name of what a call does that asks for nothing, where that is not what the default
# implementation does by itself: some passes are those of kernels.
UNASKED = "default"


@dataclasses.dataclass(frozen=True)
class Device:
    """What to compile for.

    Attributes:
      platform: as `jax.lax.platform_dependent` has it.
      description: in words.
      device: one of JAX's, perhaps an abstract one; None to compile nothing.
      chip: what it can do; None where nobody asks.
      dumps: where its compiler writes code, by `surveying.dumping_to`; None if it
        writes none.
      limits: of a GPU's multiprocessor; None for others.
    """

    platform: str
    description: str
    device: Any = None
    chip: Chip | None = None
    dumps: Path | None = None
    limits: Limits | None = None


@dataclasses.dataclass(frozen=True)
class Ran:
    """An implementation on a device.

    Attributes:
      name: the implementation's.
      temporaries: bytes beside arguments and results, by "value" and
        "value_and_grad"; None where the platform does not tell.
      refused: why it cannot run there, or cannot at these shapes; None if it can.
      work: what it computes and moves, by the same names.
      plans: what the gradients of layers do; () without any.
      schedules: what a TPU's compiler scheduled, by the same names; empty where nobody
        asked.
      kernels: of a GPU, likewise.
      defaults: the kernels that it takes unasked: in these programs, or at all where
        none was compiled.
    """

    name: str
    temporaries: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    refused: str | None = None
    work: Mapping[str, Work | None] = dataclasses.field(default_factory=dict)
    plans: tuple[Plan, ...] = ()
    schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, Sequence[Kernel]] = dataclasses.field(default_factory=dict)
    defaults: tuple[Default, ...] = ()

    def least(self, kind: str, chip: Chip) -> Least | None:
        """Returns the least time of a program; None if it is not known what it does.

        Of a kernel that does not tell its products, memory alone would be a bound far
        below any time.

        Args:
          kind: "value" or "value_and_grad".
          chip: what it runs on.
        """
        work, schedule = self.work.get(kind), self.schedules.get(kind)
        if work is None or (schedule is None and self._hides_products(kind)):
            return None
        cycles = 0 if schedule is None else schedule.cycles
        return least_time(chip, work.accessed, work.dot_flops, cycles)

    def _hides_products(self, kind: str) -> bool:
        """Tells whether a kernel may compute products that it does not tell."""
        work, kernels = self.work[kind], self.kernels.get(kind, ())
        if work is None or not work.is_untold:
            return False
        hidden = [one.may_multiply for one in kernels if one.is_of_mosaic]
        return any(hidden) or not hidden

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Ran":
        """Returns what `dataclasses.asdict` took apart."""
        work = {
            kind: None if one is None else Work(**one)
            for kind, one in fields.get("work", {}).items()
        }
        plans = tuple(
            Plan(**plan | {"tiles": Tiling(**plan["tiles"])})
            for plan in fields.get("plans", ())
        )
        schedules = {
            kind: Schedule.from_json(one)
            for kind, one in fields.get("schedules", {}).items()
        }
        kernels = {
            kind: [Kernel(**one) for one in found]
            for kind, found in fields.get("kernels", {}).items()
        }
        taken = tuple(map(Default.from_json, fields.get("defaults", ())))
        made = {"work": work, "plans": plans, "defaults": taken}
        return cls(**{**fields, **made, "schedules": schedules, "kernels": kernels})


@dataclasses.dataclass(frozen=True)
class Found:
    """A function on a device.

    Attributes:
      operation: its name.
      uses: the implementation that it uses unless told otherwise; `UNASKED` where
        kernels do some passes of it.
      implementations: all that it has, that one first.
    """

    operation: str
    uses: str
    implementations: tuple[Ran, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Found":
        """Returns what `dataclasses.asdict` took apart."""
        implementations = tuple(map(Ran.from_json, fields["implementations"]))
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
    workspace = None if shapes is None else shapes.workspace

    def run(name: str, asked: str | None) -> Ran:
        options = operation.options(asked, workspace)
        return _run(device, name, program, options, shapes is not None)

    # The default is asked for as users do: by not asking.
    first = run(uses, None)
    if shapes is None:
        first = dataclasses.replace(first, defaults=_defaults(device, operation))
    elif first.defaults:
        first, others = dataclasses.replace(first, name=UNASKED), [uses, *others]
    ran = [first, *(run(name, name) for name in others)]
    return Found(operation.name, first.name, tuple(ran))


def _defaults(device: Device, operation: Operation) -> tuple[Default, ...]:
    """Returns the kernels that a function may take unasked on a device."""
    if device.platform != "tpu" or not operation.chooses or not defaults.allowed():
        return ()
    name = operation.name
    # What has a kernel of its own, such as a softmax, has no pass over a layer.
    return tuple(
        default
        for default in defaults.on_chip()
        if default.implementation in registry.implementations(name)
        and registry.kernel(name, default.implementation) is None
    )


def _run(
    device: Device,
    name: str,
    program: Program,
    options: Mapping[str, object],
    compiles: bool,
) -> Ran:
    """Returns what comes of an implementation: its costs, or why it does not run."""
    only = platform_of(name)
    if only is not None and only != device.platform:
        return Ran(name, refused=f"it is for {only}")
    if only is None and not compiles:
        return Ran(name)
    temporaries, work, plans, reason = {}, {}, (), None
    schedules, kernels = {}, {}
    taken: tuple[Default, ...] = ()
    try:
        for kind, function, arrays in program.calls(options):
            if compiles:
                donated = program.donated if kind == "value" else ()
                found = _compiled(device, function, arrays, donated)
                temporaries[kind], work[kind], chosen, unasked, code = found
                plans = tuple(dict.fromkeys([*plans, *chosen]))
                taken = tuple(dict.fromkeys([*taken, *unasked]))
                if isinstance(code, Schedule):
                    schedules[kind] = code
                elif code is not None:
                    kernels[kind] = code
            else:
                jax.eval_shape(function, *arrays)
    except (NotImplementedError, ImportError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
    return Ran(name, temporaries, reason, work, plans, schedules, kernels, taken)


def _compiled(
    device: Device,
    function: Callable[..., PyTree],
    arrays: tuple[PyTree, ...],
    donated: tuple[int, ...],
) -> tuple[
    int | None,
    Work | None,
    list[Plan],
    list[Default],
    Schedule | list[Kernel] | None,
]:
    """Returns the bytes beside arguments and results, work, plans, kernels and code.

    Args:
      device: what to compile for.
      function: of the arrays.
      arrays: pytrees of arrays that are not there.
      donated: which of them may be written over.
    """
    place = SingleDeviceSharding(device.device)
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arrays
    )
    traced = jax.jit(function, donate_argnums=donated).trace(*arrays)
    lowered = traced.lower(lowering_platforms=(device.platform,))
    if device.dumps is not None:
        forget(device.dumps)
    with printed() if device.limits is not None else nullcontext([]) as said:
        compiled = lowered.compile()
    temporaries = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    plans = list(plans_in(traced.jaxpr.jaxpr, device.platform))
    unasked: list[Default] = []
    if device.platform == "tpu":
        unasked = list(defaults_in(traced.jaxpr.jaxpr))
    text, code = compiled.as_text() or "", None
    if device.dumps is not None and device.limits is not None:
        code = kernels_of(device.dumps, said[0], text, device.limits)
    elif device.dumps is not None and device.chip is not None:
        code = schedule_of(device.dumps, text, device.chip.branch_delay)
    return temporaries, work_of(text), plans, unasked, code
