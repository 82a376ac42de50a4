"""Prints results as a table, for a terminal or for a Markdown page."""

import collections
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

# A file has lines of any length: none is folded.
_PIPED_WIDTH = 10_000

COLUMNS = (
    "case",
    "who",
    "median ms",
    "quartiles",
    "ratio",
    "floor ms",
    "of floor",
    "temp MiB",
    "compile s",
    "error",
)


@dataclasses.dataclass(frozen=True)
class Table:
    """One workload's figures.

    Attributes:
      heading: suite, workload and sizes.
      rows: of cells, one a column of `COLUMNS`.
      notes: what was counted, who did not take part, and why.
    """

    heading: str
    rows: list[list[str]]
    notes: list[str]


def facts(document: dict[str, Any]) -> list[str]:
    """What the figures were measured on, one fact a line.

    Args:
      document: as `Session.document` makes it.

    Returns:
      Lines of text.
    """
    machine = document["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    commit = machine["commit"] or "unknown"
    changed = " with changes" if machine["modified"] else ""
    found = [
        f"{machine['device']} ({machine['platform']}), {machine['cores']} CPU cores",
        versions,
        f"commit {commit[:12]}{changed}, source {machine['source_sha256'][:12]}, "
        f"{document['started']}",
    ]
    found += document["notes"]
    for name, values in document["rates_per_second"].items():
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        each = ", ".join(f"{value / 1e9:.1f}" for value in values)
        found.append(f"{name}: {max(values) / 1e9:.1f} {unit} (of {each})")
    return found


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """One table a suite and workload, in the order they were run.

    Args:
      document: as `Session.document` makes it.

    Yields:
      Rows for what was measured, notes for what was not.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for result in document["results"]:
        shape, swept = result["shape"], result.get("swept")
        sizes = " ".join(f"{k}={v}" for k, v in shape.items() if k != swept)
        heading = f"{result['suite']}: {result['workload']} ({sizes})"
        found.setdefault(heading, []).append(result)
    for heading, results in found.items():
        rows, notes, previous = [], collections.Counter(), ""
        counts = []
        for result in results:
            if result["status"] not in ("timed", "right"):
                reason = f"{result['name']} {result['status']}: {result['reason']}"
                notes[reason] += 1
                continue
            if figures := result.get("figures"):
                each = ", ".join(
                    f"{name} {value:,.6g}" for name, value in figures.items()
                )
                counts.append(f"{result['case']}: {result['name']}: {each}")
                continue
            title = result["case"] if result["case"] != previous else ""
            rows.append([title, *_cells(result)])
            previous = result["case"]
        missing = [f"{note} (cases: {n})" for note, n in notes.items()]
        yield Table(heading, rows, counts + missing)


def _cells(result: dict[str, Any]) -> list[str]:
    seconds, floor = result["seconds"], result["floor_seconds"]
    temporaries, compiling = result["temporary_bytes"], result["compile_seconds"]
    errors = [error for error in result["errors"].values() if error is not None]
    return [
        result["name"],
        f"{seconds['median'] * 1e3:.4g}" if seconds else "",
        f"{seconds['low'] * 1e3:.4g}–{seconds['high'] * 1e3:.4g}" if seconds else "",
        _ratio(result),
        f"{floor * 1e3:.4g}" if floor else "",
        f"{floor / seconds['median']:.0%}" if floor and seconds else "",
        "" if temporaries is None else f"{temporaries / 2**20:.1f}",
        "" if compiling is None else f"{compiling:.1f}",
        f"{max(errors):.0e}" if errors else "",
    ]


def _ratio(result: dict[str, Any]) -> str:
    """The time over the baseline's, and over that of a part of the work."""
    ratio = result["ratio"] or ""
    if ratio:
        ratio = f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"
    # Files of earlier runs have no parts.
    if result.get("part_ratio"):
        ratio += f" ({result['part_ratio']:.2f} of {result['part']})"
    return ratio.strip()


def findings(document: dict[str, Any]) -> list[str]:
    """What the suites conclude, one number a line.

    Args:
      document: as `Session.document` makes it, or as an earlier run saved it.

    Returns:
      Lines of text, with what was asked for and whether it was met.
    """
    found = []
    for finding in document.get("findings", []):
        asked = []
        if finding["at_most"] is not None:
            asked.append(f"at most {finding['at_most']:g}")
        if finding["at_least"] is not None:
            asked.append(f"at least {finding['at_least']:g}")
        line = f"{finding['suite']}: {finding['what']}: {finding['value']:.3g}"
        if asked:
            verdict = "met" if finding["met"] else "MISSED"
            line += f" ({' and '.join(asked)}: {verdict})"
        found.append(line)
    return found


def print_markdown(document: dict[str, Any]) -> None:
    """Prints every table for a Markdown page."""
    for fact in facts(document):
        print(f"- {fact}")
    for table in tables(document):
        print(f"\n### {table.heading}\n")
        print_markdown_grid(COLUMNS, table.rows)
        print()
        for note in table.notes:
            print(f"- {note}")
    if found := findings(document):
        print("\n### Findings\n")
        for finding in found:
            print(f"- {finding}")


def print_markdown_grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2
) -> None:
    """Prints a table for a Markdown page; see `draw_grid`."""
    print("| " + " | ".join(columns) + " |")
    print("|---" * left + "|" + "---:|" * (len(columns) - left))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def print_terminal(document: dict[str, Any]) -> None:
    """Prints every table to a terminal, with rich where it is installed."""
    for fact in facts(document):
        print(fact)
    for table in tables(document):
        print(f"\n{table.heading}")
        if table.rows:
            draw_grid(COLUMNS, table.rows)
        for note in table.notes:
            print(f"  {note}")
    if found := findings(document):
        print("\nFindings")
        for finding in found:
            print(f"  {finding}")


def draw_grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2
) -> None:
    """Prints a table to a terminal, with rich where it is installed.

    Args:
      columns: their heads.
      rows: of cells, one a column.
      left: how many columns are of words, which stand on the left.
    """
    draw = _draw_rich if importlib.util.find_spec("rich") else _draw_plain
    draw(columns, rows, left)


def _draw_rich(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: int
) -> None:
    from rich import box, console, table

    grid = table.Table(box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        grid.add_column(
            column, justify="left" if position < left else "right", no_wrap=position > 0
        )
    for cells in rows:
        grid.add_row(*cells)
    terminal = console.Console(markup=False)
    if not terminal.is_terminal:
        terminal.width = _PIPED_WIDTH
    terminal.print(grid)


def _draw_plain(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: int
) -> None:
    every = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    for cells in every:
        padded = [
            cell.ljust(width) if position < left else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  " + "  ".join(padded).rstrip())
