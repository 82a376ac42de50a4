"""Shows the cells of `python -m benchmarks everyday`: a table, a summary and a map."""

import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import plot, report
from benchmarks.everyday_case import OURS, PLAIN

__all__ = ["draw", "print_markdown", "print_terminal", "title_of"]

_COLUMNS = (
    "function",
    "what",
    "size",
    "ms",
    "plain",
    "ratio",
    "bound",
    "compile s",
    "plain",
    "bound",
    "MiB",
    "plain",
    "above",
)
_SUMMARY = (
    "function",
    "worst at",
    "cells",
    "above",
    "median ratio",
    "worst",
    "of bound",
    "compile s",
    "temp MiB",
    "plain MiB",
)
# The map's colours end at half and at twice the formula's time.
_END = 2.0
_ROW_INCHES, _COLUMN_INCHES, _LABEL_INCHES = 0.2, 0.75, 4.2


def title_of(cell: dict[str, Any]) -> str:
    """Names a cell in a line."""
    return f"{_name(cell)} · {_size(cell)}"


def _name(cell: dict[str, Any]) -> str:
    return ", ".join(part for part in (*_function(cell), cell["what"]) if part)


def _function(cell: dict[str, Any]) -> tuple[str, str]:
    return cell["function"], cell["title"]


def _size(cell: dict[str, Any]) -> str:
    short = {"float32": "", "bfloat16": " bf16"}
    return cell["size"] + short[cell["dtype"]]


def _excess(cell: dict[str, Any]) -> float:
    """Returns how much a cell is above its bounds, in the worse of the two."""
    if cell["status"] != "timed":
        return math.inf
    return max(cell["ratio_excess"], cell["compile_excess"])


def print_terminal(document: dict[str, Any]) -> None:
    """Prints every cell, the worst first."""
    for fact in report.facts(document):
        print(fact)
    cells = sorted(document["cells"], key=_excess, reverse=True)
    timed = [cell for cell in cells if cell["status"] == "timed"]
    if timed:
        report.draw_grid(_COLUMNS, [_row(cell) for cell in timed], left=3)
    for cell in cells:
        if cell["status"] != "timed":
            print(f"{title_of(cell)} {cell['status']}: {cell['reason']}")
    slow, late = (
        sum(cell[name] > 1 for cell in timed)
        for name in ("ratio_excess", "compile_excess")
    )
    print(
        f"{len(timed)} of {len(cells)} cells timed, {slow} above their bound of time, "
        f"{late} above their bound of compilation"
    )


def _row(cell: dict[str, Any]) -> list[str]:
    seconds, compiling = cell["seconds"], cell["compile_seconds"]
    above = [
        word
        for word, name in (("time", "ratio_excess"), ("compile", "compile_excess"))
        if cell[name] > 1
    ]
    return [
        ", ".join(part for part in _function(cell) if part),
        cell["what"],
        _size(cell),
        f"{seconds[OURS] * 1e3:.4g}",
        f"{seconds[PLAIN] * 1e3:.4g}",
        f"{cell['ratio']:.2f}",
        f"{cell['ratio_bound']:.2f}",
        f"{compiling[OURS]:.2f}",
        f"{compiling[PLAIN]:.2f}",
        f"{cell['compile_bound']:.2f}",
        _mebibytes(cell, OURS),
        _mebibytes(cell, PLAIN),
        " ".join(above),
    ]


def _mebibytes(cell: dict[str, Any], name: str) -> str:
    found = cell["temporary_bytes"][name]
    return "" if found is None else f"{found / 2**20:.4g}"


def print_markdown(document: dict[str, Any]) -> None:
    """Prints a line for each function, for a Markdown page."""
    for fact in report.facts(document):
        print(f"- {fact}")
    print()
    report.print_markdown_grid(_SUMMARY, [*_summary(document)])


def _summary(document: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the line of each function, the worst first."""
    functions: dict[str, list[dict[str, Any]]] = {}
    for cell in document["cells"]:
        if cell["status"] == "timed":
            functions.setdefault(cell["function"], []).append(cell)

    def worst(cells: list[dict[str, Any]]) -> dict[str, Any]:
        return max(cells, key=lambda cell: cell["ratio_excess"])

    order = sorted(functions.values(), key=lambda c: -worst(c)["ratio_excess"])
    for cells in order:
        found = worst(cells)
        largest = max(cells, key=lambda cell: cell["temporary_bytes"][PLAIN] or 0)
        yield [
            f"`{found['function']}`",
            title_of(found).removeprefix(found["function"]).strip(", ·"),
            str(len(cells)),
            str(sum(cell["ratio_excess"] > 1 for cell in cells)),
            f"{statistics.median(cell['ratio'] for cell in cells):.2f}",
            f"{found['ratio']:.2f}",
            f"{found['ratio_bound']:.2f}",
            f"{max(cell['compile_seconds'][OURS] for cell in cells):.2f}",
            _mebibytes(largest, OURS),
            _mebibytes(largest, PLAIN),
        ]


# The map.


def draw(document: dict[str, Any], path: pathlib.Path) -> None:
    """Writes an image of the ratios: a row for each function, a column for each size.

    Args:
      document: as the command writes it.
      path: of the image; its suffix names the format.
    """
    from matplotlib.figure import Figure

    rooms: dict[str, list[dict[str, Any]]] = {}
    for cell in document["cells"]:
        if cell["status"] == "timed":
            rooms.setdefault(cell["room"], []).append(cell)
    heights = [len({_name(cell) for cell in cells}) + 4 for cells in rooms.values()]
    widest = max(len({_size(cell) for cell in cells}) for cells in rooms.values())
    figure = Figure(
        figsize=(
            _LABEL_INCHES + _COLUMN_INCHES * widest,
            0.6 + _ROW_INCHES * sum(heights),
        ),
        layout="constrained",
    )
    grid = figure.subplots(len(rooms), 1, height_ratios=heights, squeeze=False)
    for (axes,), (room, cells) in zip(grid, rooms.items(), strict=True):
        _draw_room(axes, cells)
        axes.set_title(room, fontsize=9, loc="left")
    title = plot.title_of(document)
    what = "time over the plain formula's; bold is above its bound"
    figure.suptitle(f"{title}\n{what}", x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=130)


def _draw_room(axes: Any, cells: list[dict[str, Any]]) -> None:
    import numpy as np

    names = [*dict.fromkeys(_name(cell) for cell in cells)]
    sizes = [*dict.fromkeys(_size(cell) for cell in cells)]
    found = np.full((len(names), len(sizes)), np.nan)
    for cell in cells:
        row, column = names.index(_name(cell)), sizes.index(_size(cell))
        found[row, column] = shade = math.log2(cell["ratio"])
        axes.text(
            column,
            row,
            f"{cell['ratio']:.2f}",
            ha="center",
            va="center",
            fontsize=6,
            color="white" if abs(shade) > 0.75 * math.log2(_END) else "black",
            weight="bold" if cell["ratio_excess"] > 1 else "normal",
        )
    end = math.log2(_END)
    axes.imshow(found, aspect="auto", cmap="RdYlGn_r", vmin=-end, vmax=end)
    axes.set_xticks(range(len(sizes)), sizes, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.tick_params(length=0)
