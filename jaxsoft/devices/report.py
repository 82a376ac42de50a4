"""What `jaxsoft devices` prints."""

import dataclasses
import importlib.util
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jaxsoft._core.defaults import VARIABLE, Default, allowed
from jaxsoft._core.registry import platform_of
from jaxsoft.devices.chips import CHIPS
from jaxsoft.devices.measuring import UNASKED, Device, Found, Ran
from jaxsoft.devices.programs import Shapes
from jaxsoft.linear.plans import Plan

__all__ = ["Surveyed", "as_json", "named", "notes", "print_table", "show", "taken"]

_MIB, _GIB = 2**20, 2**30
_WIDTH, _WIDEST = 88, 1000
_KINDS = ("value", "value_and_grad")
_NAMES = ("function", "implementation")
_COLUMNS = (*_NAMES, "value", "with gradient")
_STEPS = {"statistics": "forward pass", "statistics_gradient": "backward pass"}
_MISSING = {
    "cuda": "no device has timed it",
    "tpu": "no device has timed it, and its schedule is not evidence enough",
}
_LAYOUTS = {"hv": "[H, V]", "vh": "[V, H]"}
_WORK_COLUMNS = (*_NAMES, "value", "with grad.", "GiB", "with grad.")


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """A device and what functions do on it.

    Attributes:
      name: of the target, or "here".
      device: in words.
      found: a function each; perhaps not all, where the compiler failed.
      problem: why there is no memory, or None.
    """

    name: str
    device: Device
    found: Sequence[Found]
    problem: str | None = None


def as_json(surveyed: Sequence[Surveyed], shapes: Shapes | None) -> str:
    """Returns one JSON document.

    Args:
      surveyed: a device each.
      shapes: what was compiled; None where nothing was.
    """
    return json.dumps(
        {
            "shapes": None if shapes is None else dataclasses.asdict(shapes),
            "devices": [
                {
                    "name": one.name,
                    "platform": one.device.platform,
                    "description": one.device.description,
                    "problem": one.problem,
                    "functions": [_fields(found, one.name) for found in one.found],
                }
                for one in surveyed
            ],
        },
        indent=2,
    )


def _fields(found: Found, name: str) -> dict[str, Any]:
    """Returns what is known of a function, least times on a target with it."""
    fields, chip = dataclasses.asdict(found), CHIPS.get(name)
    for ran, each in zip(found.implementations, fields["implementations"], strict=True):
        least = {kind: ran.least(kind, chip) for kind in ran.work} if chip else {}
        each["least_seconds"] = {
            kind: None if one is None else one.seconds for kind, one in least.items()
        }
    return fields


def show(one: Surveyed, shapes: Shapes | None) -> None:
    """Prints what is known of a device.

    Args:
      one: the device.
      shapes: what was compiled; None where nothing was.
    """
    print(f"{one.name}: {one.device.description} ({one.device.platform})")
    if shapes is None or one.problem is not None:
        for line in _choices(one.found):
            print(line)
        for line in _evidence(one):
            print(textwrap.fill(line, _WIDTH, subsequent_indent="  "))
    else:
        words = "" if shapes.workspace is None else f", {_size(shapes.workspace)}"
        print(
            f"temporaries in MiB, N = {shapes.tokens:,}, H = {shapes.hidden:,}, "
            f"V = {shapes.vocabulary:,}, {shapes.dtype}{words}"
        )
        print_table(_COLUMNS, [row for found in one.found for row in _rows(found)])
        print("matrix products in N·H·V flops, and GiB read and written")
        rows = [row for found in one.found for row in _work_rows(found, shapes)]
        print_table(_WORK_COLUMNS, rows)
        for line in (*_plans(one.found, shapes), *taken(one.found)):
            print(textwrap.fill(line, _WIDTH, subsequent_indent="  "))
    for note in notes(one):
        print(textwrap.fill(note, _WIDTH, subsequent_indent="  "))


def _choices(found: Sequence[Found]) -> Iterator[str]:
    """Yields functions by what they use and what they may be asked for."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in found:
        runs = [ran.name for ran in one.implementations if ran.refused is None]
        others = [name for name in runs if name != one.uses]
        kernels = {
            default.implementation for default in one.implementations[0].defaults
        }
        uses = " and ".join([one.uses, *sorted(kernels)])
        groups.setdefault((uses, *others), []).append(one.operation)
    for (uses, *others), names in groups.items():
        asked = f"; {' or '.join(others)} if asked for" if others else ""
        yield f"  {uses}{asked}:"
        yield textwrap.fill(
            ", ".join(names),
            _WIDTH,
            initial_indent="    ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )


def _evidence(one: Surveyed) -> Iterator[str]:
    """Yields where kernels are defaults, and why; or why none is."""
    every = [d for found in one.found for d in found.implementations[0].defaults]
    for default in dict.fromkeys(every):
        least, most = default.features
        layouts = " or ".join(_LAYOUTS[layout] for layout in default.layouts)
        yield (
            f"{default.implementation} is the default of the {_STEPS[default.step]}, "
            f"{default.evidence}, in {default.dtype} where N ≥ {default.rows:,}, "
            f"{least:,} ≤ H ≤ {most:,}, V ≥ {default.classes:,} and a kernel is "
            f"{layouts}; {VARIABLE}=0 turns it off"
        )
    names = {
        ran.name
        for found in one.found
        for ran in found.implementations
        if platform_of(ran.name) == one.device.platform and ran.refused is None
    }
    for name in sorted(names - {default.implementation for default in every}):
        why = _MISSING[one.device.platform] if allowed() else f"{VARIABLE} is 0"
        yield f"{name} is no default: {why}"


def taken(found: Sequence[Found]) -> Iterator[str]:
    """Yields which kernels functions take unasked, those that do the same in one line.

    Args:
      found: functions whose programs were compiled.
    """
    groups: dict[tuple[Default, ...], list[str]] = {}
    for one in found:
        if one.implementations[0].defaults:
            defaults = one.implementations[0].defaults
            groups.setdefault(defaults, []).append(one.operation)
    for defaults, names in groups.items():
        said = "; ".join(
            f"{_STEPS[default.step]} by {default.implementation}, {default.evidence}"
            for default in defaults
        )
        yield f"default of {', '.join(names)}: {said}; {VARIABLE}=0 turns it off"


def _rows(found: Found) -> Iterator[tuple[str, ...]]:
    """Yields a function's rows, one for each implementation that runs."""
    for names, ran in named(found):
        yield (*names, *(_mib(ran, kind) for kind in _KINDS))


def _work_rows(found: Found, shapes: Shapes) -> Iterator[tuple[str, ...]]:
    """Yields a function's rows of what it computes and moves."""
    for names, ran in named(found):
        yield (
            *names,
            *(_products(ran, kind, shapes) for kind in _KINDS),
            *(_moved(ran, kind) for kind in _KINDS),
        )


def named(found: Found) -> Iterator[tuple[tuple[str, str], Ran]]:
    """Yields implementations that run, with the names in their rows.

    Args:
      found: a function; its own name stands in the first row alone.
    """
    first = found.operation
    for ran in found.implementations:
        if ran.refused is not None and ran.name != found.uses:
            continue
        is_named = ran.name == found.uses and ran.name != UNASKED
        name = f"{ran.name} (default)" if is_named else ran.name
        yield (first, name), ran
        first = ""


def _mib(ran: Ran, kind: str) -> str:
    """Returns MiB in words, "-" for what there is not."""
    if kind not in ran.temporaries:
        return "refused" if ran.refused is not None else "-"
    size = ran.temporaries[kind]
    return "?" if size is None else f"{size / _MIB:,.1f}"


def _products(ran: Ran, kind: str, shapes: Shapes) -> str:
    """Returns the flops of matrix products in N·H·V, in words."""
    work = ran.work.get(kind)
    if work is None:
        return "?" if kind in ran.work else "-"
    unit = shapes.tokens * shapes.hidden * shapes.vocabulary
    if not work.dot_flops:
        return "?" if work.is_least else "-"
    return f"{_at_least(work.is_least)}{work.dot_flops / unit:,.2f}"


def _moved(ran: Ran, kind: str) -> str:
    """Returns the GiB that are read and written, in words."""
    work = ran.work.get(kind)
    if work is None:
        return "?" if kind in ran.work else "-"
    return f"{_at_least(work.is_least)}{work.accessed / _GIB:,.2f}"


def _at_least(is_least: bool) -> str:
    return "≥ " if is_least else ""


def _size(workspace: int) -> str:
    """Returns a workspace in words."""
    return f"workspace {workspace / _MIB:,.4g} MiB"


def _plans(found: Sequence[Found], shapes: Shapes) -> Iterator[str]:
    """Yields what gradients do, functions that do the same in one line."""
    groups: dict[str, list[str]] = {}
    for one in found:
        for ran in one.implementations:
            if ran.plans:
                said = "; ".join(_words(plan, shapes) for plan in ran.plans)
                name = one.operation
                name += "" if ran.name == one.uses else f" ({ran.name})"
                groups.setdefault(said, []).append(name)
    for said, names in groups.items():
        yield f"gradient of {', '.join(names)}: {said}"


def _words(plan: Plan, shapes: Shapes) -> str:
    """Returns what a plan does."""
    tiles = plan.tiles
    by = f"tiles of {tiles.block_rows:,} × {tiles.block_classes:,}"
    if plan.kind == "chunks":
        whole = plan.chunk_rows in (0, shapes.tokens)
        tokens = "all tokens" if whole else f"{plan.chunk_rows:,} tokens"
        return f"{'one chunk' if whole else 'chunks'} of {tokens}, {by}"
    if plan.kind == "keep":
        share = min(plan.kept_classes / tiles.classes, 1)
        kept = "all" if share == 1 else f"{share:.2f} of the"
        return f"keeps {kept} classes, {by}"
    return f"recomputes, {by}"


def notes(one: Surveyed) -> Iterator[str]:
    """Yields why implementations for this platform do not run, each reason once.

    Args:
      one: a device.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for found in one.found:
        for ran in found.implementations:
            at_home = platform_of(ran.name) in (None, one.device.platform)
            if ran.refused is not None and at_home:
                names = reasons.setdefault((ran.name, ran.refused), [])
                names.append(found.operation)
    for (name, reason), names in reasons.items():
        yield f"no {name} for {', '.join(names)}: {reason}"


def print_table(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]], words: int = 2
) -> None:
    """Prints a table, by rich if it is installed.

    Args:
      columns: their names.
      rows: of cells.
      words: how many of the first columns have words, the others numbers.
    """
    if importlib.util.find_spec("rich") is None:
        for line in _plain(columns, rows, words):
            print(line)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(box=box.MARKDOWN)
    for index, name in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index < words else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Numbers cut short would be worse than lines that wrap.
    wide = console.options.update(max_width=_WIDEST)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table, markup=False, highlight=False)


def _plain(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]], words: int
) -> Iterator[str]:
    """Yields the lines of a table, as rich would have them."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for place, row in enumerate((columns, *rows)):
        cells = [
            cell.ljust(width) if index < words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
        if not place:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"
