"""How the cells of a text lie: what divides them, and whether they have names.

All is judged from the first lines, which the csv module reads.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxsoft.training.errors import TableError
from jaxsoft.training.memory import MemoryBudget

__all__ = [
    "CELL_BYTES",
    "COLUMN_BYTES",
    "MISSING",
    "Layout",
    "read_cells",
    "read_layout",
]

# Cells that hold no value.
MISSING = ("", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaN", "nan", "NULL", "null", "None")
MISSING += ("?",)
# What polars keeps for a column, however short, and for a cell.
COLUMN_BYTES = 1024
CELL_BYTES = 16
_SEPARATORS = ",;\t|"
# So many characters and rows are looked at, and so many lines of titles passed over.
_SAMPLE = 1 << 18
_SAMPLE_ROWS = 1000
_TITLES = 10
_POINT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.I)
_COMMA = re.compile(r"[+-]?(\d+,?\d*|,\d+)(e[+-]?\d+)?", re.I)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(\.\d{3})+")
_EMPTY = ' \n\t,;|"'


@dataclass(frozen=True)
class Layout:
    """How the cells of a text lie.

    Attributes:
      separator: between the cells of a row.
      names: of the columns, or None.
      width: cells of a row.
      skipped_bytes: before the first row.
      skipped_lines: likewise.
      decimal_comma: whether numbers have a comma for a point.
      numeric: columns whose first cells are all numbers or missing.
      padded: whether there are spaces around cells.
      notes: what a user should know of the judgement.
    """

    separator: str
    names: tuple[str, ...] | None
    width: int
    skipped_bytes: int
    skipped_lines: int
    decimal_comma: bool
    numeric: frozenset[int]
    padded: bool
    notes: tuple[str, ...] = ()


def read_layout(
    data: bytes,
    source: str,
    budget: MemoryBudget,
    *,
    separator: str | None = None,
    header: bool | None = None,
    expected: Collection[str] = (),
    label: str | None = None,
) -> Layout:
    """Judges how the cells of a text lie.

    Args:
      data: the text, as `decode` returns it.
      source: what it is called.
      budget: what its columns must not exceed.
      separator: between cells; None judges by which one rows fall into equal parts.
      header: whether the first line has names; None judges, see `_has_names`.
      expected: names of the model's columns.
      label: name or index of the label column, or None.

    Returns:
      The layout.

    Raises:
      TableError: the text is empty, two columns have one name, or there are too many.
    """
    head = _head(data)
    if len(head) > _SAMPLE:
        width = 1 + max(head.count(each.encode()) for each in separator or _SEPARATORS)
        needed = width * COLUMN_BYTES
        budget.require(needed, f"{source} with {width:,} columns", TableError)
    text = head.decode(errors="replace")
    lines_before = 0
    if text[:4].lower() == "sep=" and text[5:6] in ("\n", ""):
        # Excel's own way to say it.
        separator, lines_before = separator or text[4], 1
        text = text[6:]
    if not text.strip(_EMPTY):
        raise TableError(f"{source} is empty.")
    if separator is None:
        separator = max(_SEPARATORS, key=lambda each: _score(text, each, expected))
        if _score(text, separator, expected) < _score(text, " ", expected):
            separator = " "
    elif len(separator.encode()) != 1 or separator in '"\n':
        raise TableError(f"`sep` must be one character, got {separator!r}.")
    notes = []
    sample = list(_sample(text, separator))
    titles = _titles([cells for _, cells in sample])
    if titles:
        sample = sample[titles:]
        notes.append(f"{titles} lines before the table are left out, of one cell each")
    (number, first), others = sample[0], [cells for _, cells in sample[1:]]
    commas = separator != "," and _has_commas(others or [first])
    cells = [cell.strip() for cell in first]
    if header is None:
        header = _has_names(cells, others, expected, label, commas)
        if header and any(_is_number(cell, commas) for cell in cells):
            notes.append(
                "the first line is taken for names; --no-header says it is none"
            )
    if header:
        lines, rows = number, others
        names = _names(cells, rows, source)
        width = len(names)
    else:
        lines, names, rows = number - 1, None, [first, *others]
        width = _usual_width(rows)
    before = "".join(itertools.islice(io.StringIO(text), lines))
    columns = itertools.zip_longest(*(row[:width] for row in rows), fillvalue="")
    numeric = {
        index
        for index, column in enumerate(columns)
        if all(_is_number(cell.strip(), False) or _is_missing(cell) for cell in column)
    }
    return Layout(
        separator,
        names,
        width,
        6 * lines_before + len(before.encode()),
        lines_before + lines,
        commas,
        # polars takes a point for a decimal one beside commas, too.
        frozenset() if commas else frozenset(numeric),
        separator != " " and _is_padded(text, separator),
        tuple(notes),
    )


def _head(data: bytes) -> bytes:
    """Returns the first lines of a text, whole."""
    if len(data) <= _SAMPLE:
        return data
    # A line that is longer than the sample is taken whole.
    return data[
        : data.rfind(b"\n", 0, _SAMPLE) + 1 or data.find(b"\n") + 1 or len(data)
    ]


def read_cells(
    lines: Iterable[str], separator: str, *, padded: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yields the cells of each record, blank ones too, with the number of its line.

    Args:
      lines: of the text.
      separator: between cells.
      padded: whether spaces before a cell are left out.
    """
    # A cell may be as long as the file.
    csv.field_size_limit(2**31 - 1)
    padded = padded and separator != " "
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=padded)
    for cells in reader:
        yield reader.line_num, cells


def _sample(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the first records that are not blank."""
    records = read_cells(io.StringIO(text), separator)
    filled = (record for record in records if any(cell.strip() for cell in record[1]))
    return itertools.islice(filled, _SAMPLE_ROWS)


def _usual_width(rows: Sequence[Sequence[str]]) -> int:
    return Counter(map(len, rows)).most_common(1)[0][0]


def _titles(rows: Sequence[Sequence[str]]) -> int:
    """Counts the first rows that are one cell, where a table has three or more."""
    if len(rows) < 3 or _usual_width(rows) < 3:
        return 0
    first = (place for place, row in enumerate(rows[:_TITLES]) if len(row) > 1)
    return next(first, 0)


def _score(
    text: str, separator: str, expected: Collection[str]
) -> tuple[bool, float, float, int]:
    """Says how well a separator divides a text.

    That is whether the first line has the names that are expected, as many as there are
    cells in a row; the share of rows of the commonest length; the share of cells that
    are numbers or hold no other separator; and that length. It is worst for one column,
    and for spaces where a cell between two of them is empty.
    """
    rows = [cells for _, cells in _sample(text, separator)][:100]
    width = _usual_width(rows[1:] or rows)
    first = [cell.strip() for cell in rows[0]]
    named = bool(expected) and len(first) == width and set(expected) <= set(first)
    # A header may begin with the place of an index that has no name.
    gaps = "" in rows[0][1:] or any("" in cells for cells in rows[1:])
    if width < 2 or (separator == " " and gaps):
        return (named, 0.0, 0.0, 0)
    count = sum(len(row) == width for row in rows[1:] or rows)
    others = set(_SEPARATORS) - {separator}
    cells = [cell.strip() for cells in rows for cell in cells[:_SAMPLE_ROWS]]
    good = sum(
        _is_number(cell, separator != ",") or not others.intersection(cell)
        for cell in cells
    )
    return (named, round(count / len(rows[1:] or rows), 1), good / len(cells), width)


def _is_padded(text: str, separator: str) -> bool:
    """Whether there are spaces around cells, but for those within quotation marks."""
    records = read_cells(io.StringIO(text), separator, padded=False)
    return any(
        cell[:1] == " " or cell[-1:] == " "
        for _, cells in itertools.islice(records, _SAMPLE_ROWS)
        for cell in cells
    )


def _has_commas(rows: Sequence[Sequence[str]]) -> bool:
    """Whether numbers have a decimal comma; a point may divide their thousands."""
    cells = [cell.strip() for cells in rows for cell in cells]
    commas = sum("," in cell and bool(_COMMA.fullmatch(cell)) for cell in cells)
    points = [cell for cell in cells if "." in cell and _POINT.fullmatch(cell)]
    decimal = sum(not _THOUSANDS.fullmatch(cell) for cell in points)
    return commas > 0 and commas >= decimal


def _is_number(cell: str, commas: bool) -> bool:
    """Whether a cell is a number, infinite or NaN included."""
    return bool(_POINT.fullmatch(cell)) or (commas and bool(_COMMA.fullmatch(cell)))


def _is_missing(cell: str) -> bool:
    return cell.strip() in MISSING


def _has_names(
    cells: list[str],
    rows: Sequence[Sequence[str]],
    expected: Collection[str],
    label: str | None,
    commas: bool,
) -> bool:
    """Whether the first line has names and is no row.

    It has where it has the names that are expected or the label's; where it counts the
    columns, or lacks the name of an index, as pandas does; where a text stands above
    numbers; and else where some text of it is in no row, though, beside numbers, those
    of its column come often.
    """
    if expected and set(expected) <= set(cells):
        return True
    is_index = label is not None and label.lstrip("-").isdigit()
    if label in cells and not (is_index and int(label or 0) < len(cells)):
        return True
    numbered = cells[1:] if cells and not cells[0] else cells
    if len(numbered) > 1 and numbered == [str(i) for i in range(len(numbered))]:
        return True
    if len(cells) > 1 and not cells[0] and not any(_is_missing(row[0]) for row in rows):
        return True  # above an index
    numbers = [_is_number(cell, commas) for cell in cells]
    if not rows:
        return not any(numbers)
    # Years and the like are names beside others; a measurement is none.
    years = all(
        cell.isdigit() for cell, is_it in zip(cells, numbers, strict=True) if is_it
    )
    if any(numbers) and (not years or len(rows) < 3):
        return False
    # A row that begins with its own name is longer.
    shift = max(0, _usual_width(rows) - len(cells))
    unseen = False
    for place, cell in enumerate(cells):
        if numbers[place] or _is_missing(cell):
            continue
        column = [
            row[place + shift].strip() for row in rows if len(row) > place + shift
        ]
        column = [each for each in column if not _is_missing(each)]
        if column and all(_is_number(each, commas) for each in column):
            return True
        few = 2 * len(set(column)) <= len(column)
        unseen |= cell not in column and (few or not any(numbers))
    return unseen


def _names(
    cells: list[str], rows: Sequence[Sequence[str]], source: str
) -> tuple[str, ...]:
    """Returns the columns' names, empty for one that the header does not name."""
    width = _usual_width(rows) if rows else len(cells)
    if width == len(cells) - 1 and not cells[-1]:
        cells = cells[:-1]
    elif width == len(cells) + 1:
        # Either each row ends with a separator, or it begins with its own name.
        ended = not any(row[-1].strip() for row in rows if len(row) == width)
        cells = [*cells, ""] if ended else ["", *cells]
    for name, count in Counter(cells).items():
        if name and count > 1:
            raise TableError(f"{source} has more than one column {name!r}.")
    return tuple(cells)
