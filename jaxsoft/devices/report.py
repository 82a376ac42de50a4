"""What `jaxsoft devices` prints."""

import dataclasses
import importlib.util
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxsoft._core.registry import platform_of
from jaxsoft.devices.measuring import Device, Found, Ran
from jaxsoft.devices.programs import Shapes

__all__ = ["Surveyed", "as_json", "show"]

_MIB = 2**20
_WIDTH = 88
_COLUMNS = ("function", "implementation", "value", "with gradient")


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
                    "functions": [dataclasses.asdict(found) for found in one.found],
                }
                for one in surveyed
            ],
        },
        indent=2,
    )


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
    else:
        print(
            f"temporaries in MiB, N = {shapes.tokens:,}, H = {shapes.hidden:,}, "
            f"V = {shapes.vocabulary:,}, {shapes.dtype}"
        )
        _print_table([row for found in one.found for row in _rows(found)])
    for note in _notes(one):
        print(textwrap.fill(note, _WIDTH, subsequent_indent="  "))


def _choices(found: Sequence[Found]) -> Iterator[str]:
    """Yields functions by what they use and what they may be asked for."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in found:
        runs = [ran.name for ran in one.implementations if ran.refused is None]
        others = [name for name in runs if name != one.uses]
        groups.setdefault((one.uses, *others), []).append(one.operation)
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


def _rows(found: Found) -> Iterator[tuple[str, ...]]:
    """Yields a function's rows, one for each implementation that runs."""
    first = found.operation
    for ran in found.implementations:
        if ran.refused is not None and ran.name != found.uses:
            continue
        name = f"{ran.name} (default)" if ran.name == found.uses else ran.name
        yield first, name, _mib(ran, "value"), _mib(ran, "value_and_grad")
        first = ""


def _mib(ran: Ran, kind: str) -> str:
    """Returns MiB in words, "-" for what there is not."""
    if kind not in ran.temporaries:
        return "refused" if ran.refused is not None else "-"
    size = ran.temporaries[kind]
    return "?" if size is None else f"{size / _MIB:,.1f}"


def _notes(one: Surveyed) -> Iterator[str]:
    """Yields why implementations for this platform do not run, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for found in one.found:
        for ran in found.implementations:
            at_home = platform_of(ran.name) in (None, one.device.platform)
            if ran.refused is not None and at_home:
                names = reasons.setdefault((ran.name, ran.refused), [])
                names.append(found.operation)
    for (name, reason), names in reasons.items():
        yield f"no {name} for {', '.join(names)}: {reason}"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table, by rich if it is installed."""
    if importlib.util.find_spec("rich") is None:
        for line in _plain(rows):
            print(line)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(box=box.MARKDOWN)
    for index, name in enumerate(_COLUMNS):
        justify: Literal["left", "right"] = "left" if index < 2 else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Numbers cut short would be worse than lines that wrap.
    console.width = max(console.width, console.measure(table).maximum)
    console.print(table, markup=False, highlight=False)


def _plain(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yields the lines of a table, as rich would have them."""
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for place, row in enumerate((_COLUMNS, *rows)):
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
        if not place:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"
