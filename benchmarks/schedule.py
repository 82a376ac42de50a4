"""`python -m benchmarks schedule`: the least time of everything on every accelerator.

    python -m benchmarks schedule --out schedule.json --plot schedule.png

compiles every function of `jaxsoft devices`, by each implementation and at the heads of
three models, for accelerators that need not be here, and records the least times that
memory, matrix products and, on TPUs, bundles of instructions take, with the loop that
takes the most bundles. Nothing is run. A file is saved after each function, and the
same command again goes on where it ends; delete it for a new record.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxsoft.cli.devices import MODELS
from jaxsoft.devices.chips import CHIPS
from jaxsoft.devices.measuring import Found, Ran
from jaxsoft.devices.operations import operations
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.surveying import DeviceError, survey
from jaxsoft.devices.target import TARGETS

__all__ = ["cells_of", "main", "markdown", "measure"]

SCHEMA = "jaxsoft schedule 1"
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu")
_TOKENS = 4096
_WHATS = {"value": "value", "value_and_grad": "gradient"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Records what is not recorded yet, and shows it.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code: 1 if something did not compile, otherwise 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for given, known in (
        (options.targets, TARGETS),
        (options.models, MODELS),
        (options.only, operations()),
    ):
        for name in given:
            if name not in known:
                parser.error(f"no {name!r}; there are {', '.join(known)}")
    for path in (options.out, options.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'jaxsoft[bench]'")
    document = _load(parser, options.out)
    if not options.show:
        measure(document, options)
    print(markdown(document))
    if options.plot:
        _draw(document, options.plot)
    return int(any("error" in cell for cell in document["cells"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="write JSON here, or go on where it ends",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=list(TARGETS),
        metavar="NAME",
        help=", ".join(TARGETS),
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        metavar="NAME",
        help=", ".join(MODELS),
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(operations()),
        metavar="NAME",
        help="these functions",
    )
    parser.add_argument("--tokens", type=int, default=_TOKENS, metavar="N", help="rows")
    parser.add_argument(
        "--show", action="store_true", help="compile nothing: show what there is"
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw TPUs' least times"
    )
    return parser


def _load(parser: argparse.ArgumentParser, path: pathlib.Path) -> dict[str, Any]:
    """Returns an earlier record of these versions, or an empty one."""
    versions = {name: _version(name) for name in _PACKAGES}
    if not path.exists():
        return {"schema": SCHEMA, "versions": versions, "cells": []}
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        parser.error(f"{path}: no record of schedules of this version")
    if document["versions"] != versions:
        parser.error(f"{path}: of other compilers, {document['versions']}")
    return document


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(document: dict[str, Any], options: argparse.Namespace) -> None:
    """Adds the cells that a record lacks, and saves them as they come.

    Args:
      document: the record; its cells grow.
      options: of the command line.
    """
    for target in options.targets:
        for model in options.models:
            hidden, classes = MODELS[model]
            shapes = Shapes(options.tokens, hidden, classes)
            here = {"target": target, "model": model, "tokens": options.tokens}
            while missing := _missing(document, here, options.only):
                for cells in _of_functions(target, missing, shapes):
                    document["cells"] += [here | cell for cell in cells]
                    options.out.write_text(_text(document))
                    name = cells[0]["function"]
                    said = cells[0].get("error", f"{len(cells)} programs")
                    print(
                        f"{target} · {model} · {name}: {said}",
                        file=sys.stderr,
                        flush=True,
                    )


def _missing(
    document: dict[str, Any], here: dict[str, Any], names: Sequence[str]
) -> list[str]:
    """Returns the functions that have no cell of these sizes on this target."""
    done = {
        cell["function"]
        for cell in document["cells"]
        if all(cell[field] == value for field, value in here.items())
    }
    return [name for name in names if name not in done]


def _of_functions(
    target: str, names: Sequence[str], shapes: Shapes
) -> Iterator[list[dict[str, Any]]]:
    """Yields the cells of functions, until one takes the compiler with it."""
    left = list(names)
    try:
        for found in survey(target, names, shapes, schedule=True):
            left.remove(found.operation)
            yield cells_of(target, found)
    except DeviceError as error:
        # It may fail behind the last one, which is known then.
        if left:
            yield [{"function": left[0], "error": str(error)[:300]}]


def cells_of(target: str, found: Found) -> list[dict[str, Any]]:
    """Returns what is recorded of a function, one cell for each program.

    Args:
      target: what it was compiled for.
      found: what was found.
    """
    cells = []
    for ran in found.implementations:
        cell = {
            "function": found.operation,
            "implementation": ran.name,
            "is_default": ran.name == found.uses,
        }
        cells += [cell | _program(target, ran, kind) for kind in ran.temporaries]
        if ran.refused is not None and not ran.refused.startswith("it is for"):
            cells.append(cell | {"refused": ran.refused})
    return cells or [{"function": found.operation, "refused": "nothing compiled"}]


def _program(target: str, ran: Ran, kind: str) -> dict[str, Any]:
    """Returns the fields of a program."""
    fields: dict[str, Any] = {"what": _WHATS[kind], "is_least": False}
    least, work = ran.least(kind, CHIPS[target]), ran.work.get(kind)
    if least is not None and work is not None:
        fields["least_seconds"] = least.seconds
        fields["seconds"] = least._asdict()
        fields["is_least"] = work.is_least
    schedule = ran.schedules.get(kind)
    if schedule is not None:
        fields["is_least"] |= schedule.is_least
        fields["bundles"] = schedule.cycles
        fields["busy"] = schedule.busy
    if schedule is not None and schedule.loops:
        part, loop = schedule.loops[0]
        fields["main_loop"] = {
            "part": part.name,
            "share": part.runs * loop.cycles / schedule.cycles,
            "busy": loop.busy,
        }
    matrix = [
        one for one in ran.kernels.get(kind, ()) if (one.loop or {}).get("matrix")
    ]
    if matrix:
        fields["kernel"] = {
            "name": matrix[0].name,
            "registers": matrix[0].registers,
            "spills": matrix[0].spills,
            "loop": matrix[0].loop,
        }
    return fields


def _text(document: dict[str, Any]) -> str:
    """Returns JSON with a line for each cell, and numbers of four digits."""
    rest = {name: value for name, value in document.items() if name != "cells"}
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    cells = (json.dumps(_rounded(cell)) for cell in document["cells"])
    return head + ',\n "cells": [\n  ' + ",\n  ".join(cells) + "\n ]\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# What is shown.


def markdown(document: dict[str, Any]) -> str:
    """Returns a table for each target and model: implementations side by side.

    Args:
      document: a record.
    """
    lines = []
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in document["cells"]:
        place = cell["target"], cell["model"], cell["tokens"]
        groups.setdefault(place, []).append(cell)
    for (target, model, tokens), cells in groups.items():
        names = dict.fromkeys(c["implementation"] for c in cells if "what" in c)
        lines += [f"\n{target}, {model}, {tokens:,} tokens: least ms\n"]
        lines += [f"| function | of | {' | '.join(names)} | binds |"]
        lines += ["|---|---|" + "---:|" * len(names) + "---|"]
        rows = dict.fromkeys((c["function"], c["what"]) for c in cells if "what" in c)
        for function, what in rows:
            found = {
                cell["implementation"]: cell
                for cell in cells
                if (cell["function"], cell.get("what")) == (function, what)
            }
            times = " | ".join(_ms(found.get(name, {})) for name in names)
            default = next(iter(found.values())).get("seconds", {})
            binds = max(default, key=default.__getitem__, default="")
            lines.append(f"| `{function}` | {what} | {times} | {binds} |")
        lines += [
            f"\n{cell['function']}: {cell['error']}"
            for cell in cells
            if "error" in cell
        ]
    return "\n".join(lines)


def _ms(cell: dict[str, Any]) -> str:
    if "least_seconds" not in cell:
        return ""
    return f"{'≥ ' * cell['is_least']}{cell['least_seconds'] * 1e3:.4g}"


def _draw(document: dict[str, Any], path: pathlib.Path) -> None:
    """Draws how far bundles are above what memory and products take, on each TPU."""
    from matplotlib.figure import Figure

    cells = [cell for cell in document["cells"] if "bundles" in cell]
    targets = list(dict.fromkeys(cell["target"] for cell in cells))
    rows = list(dict.fromkeys(f"{cell['function']}, {cell['what']}" for cell in cells))
    names = list(dict.fromkeys(cell["implementation"] for cell in cells))
    if not cells:
        return
    size = 3 + 3.5 * len(targets), 2 + 0.2 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for panel, target in zip(panels, targets, strict=True):
        for colour, name in enumerate(names):
            shown = [
                cell
                for cell in cells
                if (cell["target"], cell["implementation"]) == (target, name)
            ]
            panel.plot(
                [_above(cell) for cell in shown],
                [rows.index(f"{cell['function']}, {cell['what']}") for cell in shown],
                "o",
                markersize=4,
                alpha=0.7,
                color=f"C{colour}",
                label=name,
            )
        panel.axvline(1, color="0.7", linewidth=0.8, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_title(target, fontsize=9)
        panel.grid(axis="y", color="0.92")
    panels[0].set_yticks(range(len(rows)), rows, fontsize=6)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(names))
    figure.supxlabel("time of bundles over that of memory or products", fontsize=8)
    figure.savefig(path, dpi=150)


def _above(cell: dict[str, Any]) -> float:
    seconds = cell["seconds"]
    return seconds["issue"] / max(seconds["memory"], seconds["products"], 1e-12)
