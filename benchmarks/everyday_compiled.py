"""`python -m benchmarks everyday --compiled v6e,h100`: devices that are not here.

Their compilers say what a program takes of memory, how many bytes its instructions read
and write, those of a loop as often as it runs, and on TPUs how many bundles of
instructions, each a cycle if nothing waits. Nothing is run, so that no cell has a time.
A step that carries its state has no cell: `programs` has such a step.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from benchmarks import programs, report
from benchmarks.everyday_case import (
    OURS,
    PLAIN,
    Case,
    Room,
    Size,
    functions,
)
from benchmarks.programs_cases import Program
from benchmarks.programs_figures import measure
from jaxsoft._core.registry import compiling_for
from jaxsoft.devices.chips import CHIPS
from jaxsoft.devices.surveying import dumping_to
from jaxsoft.devices.target import TARGETS

__all__ = ["ask", "print_table", "save_text", "sizes_of", "tell"]

_COLUMNS = (
    "function",
    "what",
    "size",
    "target",
    "moved MiB",
    "plain",
    "ratio",
    "bundles",
    "plain",
    "ratio",
    "temp MiB",
    "plain",
)
_MIB = 2**20
# Some ten microseconds of a TPU.
_FEW_BUNDLES = 2**14


def ask(
    targets: Sequence[str], only: Sequence[str], sizes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yields the cells of each target, as a process of its own finds them.

    Args:
      targets: names of `jaxsoft.devices.target.TARGETS`, or `"cpu"`.
      only: names of functions; none means all.
      sizes: their names; none means the largest that a function has.
    """
    for target in targets:
        command = ["benchmarks", "everyday", "--child", target]
        command += ["--only", *only] if only else []
        command += ["--sizes", *sizes] if sizes else []
        for _, cell, seconds in programs.ask(command):
            said = cell.get("error", f"{seconds:.1f} s")
            name = cell.get("function", "compiler")
            print(f"{target} · {name}: {said}", file=sys.stderr, flush=True)
            yield {"target": target, **cell}


def tell(
    target: str, rooms: Sequence[Room], only: Sequence[str], sizes: Sequence[str]
) -> None:
    """Prints a line for each cell, for the parent; see `ask`."""
    with contextlib.ExitStack() as stack:
        folder, delay = None, 0
        if target in TARGETS and TARGETS[target].platform == "tpu":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            delay = CHIPS[target].branch_delay
        # The compiler reads it when it is loaded, with the first topology.
        os.environ |= dumping_to(folder, "tpu")
        mesh, platform, gpu = programs.target_mesh(target)
        stack.enter_context(compiling_for(gpu))
        measured = functools.partial(
            measure,
            mesh=mesh,
            platform=platform,
            dumps=Path(folder) if folder else None,
            delay=delay,
        )
        for room in rooms:
            for case in room.cases:
                if case.chained or (only and case.function not in only):
                    continue
                for size in sizes_of(room, case, sizes):
                    for what in case.whats:
                        start = time.perf_counter()
                        cell = _cell(room, case, what, size, measured)
                        programs.tell(case.name, cell, time.perf_counter() - start)


def sizes_of(room: Room, case: Case, names: Sequence[str]) -> list[Size]:
    """Returns the sizes of these names, or the largest, that a function has."""
    found = [size for size in room.sizes if case.at(size)]
    if names:
        return [size for size in found if size.name in names]
    most = max(size.logits for size in found)
    return [size for size in found if size.logits == most][-1:]


def _cell(
    room: Room,
    case: Case,
    what: str,
    size: Size,
    measured: Callable[[Program], dict[str, int]],
) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "function": case.function,
        "title": case.title,
        "what": what,
        "size": size.name,
        "dtype": size.dtype,
    }
    try:
        arrays = tuple(_shapes(room, size, name) for name in case.inputs.split())
        both, arguments = functions(case, what, arrays)
        specs = (P(),) * len(arguments)
        figures = {
            name: measured(Program(function, arguments, specs))
            for name, function in both.items()
        }
    except Exception as error:  # A failure is a result, not ours to raise.
        return cell | {"error": f"{type(error).__name__}: {error}"[:300]}
    for field, figure in (
        ("moved_bytes", "moved"),
        ("temporary_bytes", "temporaries"),
    ):
        cell[field] = {name: found.get(figure, 0) for name, found in figures.items()}
    if all("bundles" in found for found in figures.values()):
        cell["bundles"] = {name: found["bundles"] for name, found in figures.items()}
        # Of these there may be more.
        cell["open_bundles"] = [
            n for n, found in figures.items() if found["open bundles"]
        ]
    return cell


@functools.cache
def _shapes(room: Room, size: Size, name: str) -> Any:
    """Returns the shapes and dtypes of an input, which NumPy may draw to tell them."""
    return jax.eval_shape(room.arrays(size)[name])


def print_table(cells: Sequence[dict[str, Any]]) -> None:
    """Prints the cells, those that take the most beside the formula first."""
    found = [cell for cell in cells if "error" not in cell]
    rows = [_row(cell) for cell in sorted(found, key=_ratio, reverse=True)]
    if rows:
        report.draw_grid(_COLUMNS, rows, left=4)
    for cell in cells:
        if "error" in cell:
            print(f"{cell['target']} · {cell.get('function', '')}: {cell['error']}")


def _ratio(cell: dict[str, Any]) -> float:
    """Returns the worst ratio of the figures, in which what is little makes little."""
    pairs = [(cell["moved_bytes"], _MIB), (cell["temporary_bytes"], _MIB)]
    if "bundles" in cell:
        pairs.append((cell["bundles"], _FEW_BUNDLES))
    return max((pair[OURS] + few) / (pair[PLAIN] + few) for pair, few in pairs)


def _row(cell: dict[str, Any]) -> list[str]:
    moved, temporaries = cell["moved_bytes"], cell["temporary_bytes"]
    known = bool(moved[PLAIN])
    return [
        ", ".join(part for part in (cell["function"], cell["title"]) if part),
        cell["what"],
        cell["size"] + (" bf16" if cell["dtype"] == "bfloat16" else ""),
        cell["target"],
        f"{moved[OURS] / _MIB:.4g}" if known else "",
        f"{moved[PLAIN] / _MIB:.4g}" if known else "",
        f"{moved[OURS] / moved[PLAIN]:.2f}" if known else "",
        *_bundles(cell),
        f"{temporaries[OURS] / _MIB:.4g}",
        f"{temporaries[PLAIN] / _MIB:.4g}",
    ]


def _bundles(cell: dict[str, Any]) -> list[str]:
    """Returns the cells of bundles, empty where a compiler tells none."""
    if not cell.get("bundles", {}).get(PLAIN):
        return [""] * 3
    found = cell["bundles"]
    said = [
        f"{'≥ ' * (name in cell['open_bundles'])}{found[name]:,}"
        for name in (OURS, PLAIN)
    ]
    return [*said, f"{found[OURS] / found[PLAIN]:.2f}"]


def save_text(cells: Sequence[dict[str, Any]]) -> str:
    """Returns JSON with a line for each cell."""
    return "[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n"
