"""What `jaxsoft devices --schedule` prints: the least times, and what takes them."""

import textwrap
from collections.abc import Iterator

from jaxsoft.devices.chips import CHIPS, Chip, least_time
from jaxsoft.devices.measuring import Found, Ran
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.ptx import Kernel, missing_tools
from jaxsoft.devices.report import Surveyed, named, notes, print_table, taken

__all__ = ["show"]

_WIDTH, _LONGEST = 88, 30
_KINDS = {"value": "value", "value_and_grad": "gradient"}
_NAMES = ("function", "implementation", "of")
_TIMES = (*_NAMES, "least ms", "memory", "products", "bundles")
_LOOPS = (*_NAMES, "part", "share", "bundles", "trips")
_KERNELS = (
    *_NAMES,
    "kernel",
    "threads",
    "registers",
    "spills",
    "shared",
    "occupancy",
    "copies",
    "in loop",
    "matrix",
    "copies",
)
# So many kernels of a program are shown; the JSON has all.
_MOST_KERNELS = 3
# Of the units those that bind, and what registers too few cost.
_SHOWN = ("mxu", "xlu", "valu", "eup", "vload", "vstore", "fill", "spill")
# Loops that take less of a program are left out.
_LEAST_SHARE = 0.1


def show(one: Surveyed, shapes: Shapes) -> None:
    """Prints the least times on a device, and the main loops of a TPU.

    Args:
      one: the device.
      shapes: what was compiled.
    """
    chip = CHIPS[one.name]
    print(
        f"{one.name}: {one.device.description}, {chip.clock / 1e9:.2f} GHz, "
        f"{chip.bandwidth / 1e9:,.0f} GB/s, {chip.flops / 1e12:,.0f} TFLOP/s "
        "of bfloat16\n"
        f"least times in ms, N = {shapes.tokens:,}, H = {shapes.hidden:,}, "
        f"V = {shapes.vocabulary:,}, {shapes.dtype}"
    )
    rows = [row for found in one.found for row in _time_rows(found, chip)]
    print_table(_TIMES, rows, len(_NAMES))
    loops = [row for found in one.found for row in _loop_rows(found)]
    if loops:
        print("loops that take a tenth of the bundles, and the slots that they fill")
        print_table((*_LOOPS, *_SHOWN), loops, len(_NAMES) + 1)
    kernels = [row for found in one.found for row in _kernel_rows(found)]
    if kernels:
        print("kernels by their matrix instructions, and the main loop's instructions")
        print_table(_KERNELS, kernels, len(_NAMES) + 1)
    said = (*taken(one.found), *_tool_notes(bool(kernels)), *notes(one))
    for note in said:
        print(textwrap.fill(note, _WIDTH, subsequent_indent="  "))


def _tool_notes(has_kernels: bool) -> Iterator[str]:
    """Yields what is unknown of kernels for want of a program of CUDA's."""
    missing = missing_tools() if has_kernels else []
    if missing:
        unknown = "instructions are" if missing == ["nvdisasm"] else "kernels' code is"
        yield (
            f"{unknown} unknown without {' and '.join(missing)}, which the extra `aot` "
            'installs: pip install "jaxsoft[aot]"'
        )


def _programs(found: Found) -> Iterator[tuple[tuple[str, str, str], Ran, str]]:
    """Yields programs, the names of a row before each."""
    for (function, implementation), ran in named(found):
        kinds = [kind for kind in _KINDS if kind in ran.temporaries]
        for kind in kinds:
            yield (function, implementation, _KINDS[kind]), ran, kind
            function = implementation = ""


def _time_rows(found: Found, chip: Chip) -> Iterator[tuple[str, ...]]:
    for names, ran, kind in _programs(found):
        work, schedule = ran.work.get(kind), ran.schedules.get(kind)
        if work is None:
            yield (*names, *("?" for _ in _TIMES[len(names) :]))
            continue
        cycles = 0 if schedule is None else schedule.cycles
        parts = least_time(chip, work.accessed, work.dot_flops, cycles)
        # A kernel that does not tell has none of its products counted.
        products = "?" if work.is_least and not work.dot_flops else None
        bundles = "-" if schedule is None else _ms(parts.issue, schedule.is_least)
        least = ran.least(kind, chip)
        is_least = work.is_least or (schedule is not None and schedule.is_least)
        yield (
            *names,
            "?" if least is None else _ms(least.seconds, is_least),
            _ms(parts.memory, work.is_least),
            products or _ms(parts.products, work.is_least),
            bundles,
        )


def _loop_rows(found: Found) -> Iterator[tuple[str, ...]]:
    for names, ran, kind in _programs(found):
        schedule = ran.schedules.get(kind)
        if schedule is None:
            continue
        for part, loop in schedule.loops:
            share = part.runs * loop.cycles / schedule.cycles
            if share < _LEAST_SHARE:
                break
            trips = "?"
            if loop.trips is not None:
                trips = f"{'≥ ' * part.runs_are_least}{part.runs * loop.trips:,}"
            shares = (f"{loop.busy[unit]:.2f}" for unit in _SHOWN)
            numbers = (f"{share:.2f}", f"{loop.bundles:,}", trips)
            yield (*names, _cut(part.name), *numbers, *shares)
            names = ("", "", "")


def _kernel_rows(found: Found) -> Iterator[tuple[str, ...]]:
    for names, ran, kind in _programs(found):
        kernels = sorted(ran.kernels.get(kind, ()), key=_weight, reverse=True)
        for kernel in kernels[:_MOST_KERNELS]:
            loop = kernel.loop or {}
            numbers = (
                kernel.threads,
                kernel.registers,
                kernel.spills,
                kernel.shared,
                None if kernel.occupancy is None else f"≤ {kernel.occupancy:.2f}",
                kernel.copies,
                *(loop.get(name) for name in ("instructions", "matrix", "copies")),
            )
            # Code without a loop has none; without a disassembler nobody knows.
            said = ["unknown" if n is None else str(n) for n in numbers]
            if kernel.loop is None and kernel.copies is not None:
                said[-3:] = ["-"] * 3
            yield (*names, _cut(kernel.name), *said)
            names = ("", "", "")


def _weight(kernel: Kernel) -> tuple[int, int, int]:
    """Returns what sorts kernels: those of matrix units, then the largest."""
    loop = kernel.loop or {}
    return loop.get("matrix", 0), kernel.spills or 0, kernel.registers or 0


def _cut(name: str) -> str:
    """Returns a name that fits into a column."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _ms(seconds: float, is_least: bool) -> str:
    return f"{'≥ ' if is_least else ''}{seconds * 1e3:,.3f}"
