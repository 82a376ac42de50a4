"""Text tables as people have them: any encoding, any separator, with or without names.

polars parses the cells. What must be known before is judged here from the first lines:
the encoding, the character between cells, the decimal mark, and whether the first line
has names. The csv module, which is slow, reads those lines and finds errors' places.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from jaxsoft.training.errors import TableError, first_line
from jaxsoft.training.memory import MemoryBudget

__all__ = ["MISSING", "Layout", "TextTable", "decode", "parse", "read_layout"]

# Cells that hold no value.
MISSING = ("", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaN", "nan", "NULL", "null", "None")
MISSING += ("?",)
_SEPARATORS = ",;\t|"
# The separator and the types of columns are judged from so many characters and rows.
_SAMPLE = 1 << 20
_SAMPLE_ROWS = 1000
# What polars keeps for a column, however short, and for a cell.
_COLUMN_BYTES = 1024
_CELL_BYTES = 16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_POINT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.I)
_COMMA = re.compile(r"[+-]?(\d+,?\d*|,\d+)(e[+-]?\d+)?", re.I)
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
    """

    separator: str
    names: tuple[str, ...] | None
    width: int
    skipped_bytes: int
    skipped_lines: int
    decimal_comma: bool
    numeric: frozenset[int]
    padded: bool


@dataclass(frozen=True)
class TextTable:
    """Rows of a text, and where each is.

    Attributes:
      frame: columns "0", "1" and so on, of strings and of floats, null where missing.
      layout: how the cells lie.
      data: the text.
      records: [n] of each row, its place among the text's records, blank ones counted.
    """

    frame: pl.DataFrame
    layout: Layout
    data: bytes
    records: pl.Series

    def strings(self, columns: Sequence[int]) -> pl.DataFrame:
        """Returns some columns as they are written: 007, not 7."""
        frame = self.frame.select(map(str, columns))
        if set(frame.dtypes) == {pl.String}:
            return frame
        frame = _parsed(self.data, self.layout, frozenset(), columns)
        return frame[self.records] if len(frame) > len(self.frame) else frame

    def place(self, row: int) -> str:
        """Says where a row is, by reading all before it."""
        record = self.records[row]
        for number, (line, _) in enumerate(_records(self.data, self.layout)):
            if number == record:
                return f"line {line}"
        raise AssertionError("a row is one of the text's records")


def decode(data: bytes, source: str, encoding: str | None) -> tuple[bytes, str | None]:
    """Brings a text to UTF-8 with line feeds.

    Args:
      data: the text.
      source: what it is called.
      encoding: of the text, by a name that Python knows; None judges by its mark and
        its bytes.

    Returns:
      The text, and the encoding if it was guessed.

    Raises:
      TableError: the encoding is unknown, or a byte is wrong in it; says which.
    """
    guessed = None
    if encoding is None:
        marked = (name for mark, name in _MARKS if data.startswith(mark))
        encoding = next(marked, None) or _of_nulls(data)
        if encoding is None:
            try:
                data.decode()
                encoding = "utf-8"
            except UnicodeDecodeError as error:
                if set(data) & set(_NOT_CP1252):
                    raise _bad_byte(source, data, error, "utf-8") from error
                encoding = guessed = "cp1252"
        elif not encoding.startswith("utf-8"):
            guessed = encoding
    try:
        text = data.decode(encoding)
    except LookupError:
        raise TableError(
            f"`encoding` must be a name that Python knows, got {encoding!r}."
        ) from None
    except UnicodeDecodeError as error:
        raise _bad_byte(source, data, error, encoding) from error
    except (UnicodeError, ValueError, TypeError) as error:
        raise TableError(
            f"{source} is not {encoding!r} ({first_line(error)})."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise TableError(f"{source} is not text: line {line} has a NUL character.")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.encode(), guessed


# Bytes that are no characters in cp1252.
_NOT_CP1252 = b"\x81\x8d\x8f\x90\x9d"


def _of_nulls(data: bytes) -> str | None:
    """Knows UTF-16 without a mark by its every second byte, 0 in Latin letters."""
    for name, half in (
        ("utf-16-le", data[1:_SAMPLE:2]),
        ("utf-16-be", data[:_SAMPLE:2]),
    ):
        if 2 * half.count(0) > len(half) > 0:
            return name
    return None


def _bad_byte(
    source: str, data: bytes, error: UnicodeDecodeError, encoding: str
) -> TableError:
    line = data.count(b"\n", 0, error.start) + 1
    return TableError(
        f"{source} is not {encoding}: line {line} has the byte "
        f"0x{data[error.start]:02x}, byte {error.start} of the file; name its "
        "`encoding`, such as cp1252."
    )


def read_layout(
    data: bytes,
    source: str,
    budget: MemoryBudget,
    *,
    separator: str | None = None,
    expected: Collection[str] = (),
    label: str | None = None,
) -> Layout:
    """Judges how the cells of a text lie.

    The first line is a header if no cell of it is a number, or it has the label's name
    or the names that are expected, or it counts the columns: 0, 1, 2 and so on.

    Args:
      data: the text, as `decode` returns it.
      source: what it is called.
      budget: what its columns must not exceed.
      separator: between cells; None judges by which one rows fall into equal parts.
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
        needed = width * _COLUMN_BYTES
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
        separator = max(_SEPARATORS, key=lambda each: _score(text, each))
        if _score(text, separator) < _score(text, " "):
            separator = " "
    elif len(separator.encode()) != 1 or separator in '"\n':
        raise TableError(f"`sep` must be one character, got {separator!r}.")
    sample = list(_sample(text, separator))
    first_line_number, first = sample[0]
    rows = [cells for _, cells in sample[1:]]
    commas = separator != "," and _has_commas(rows or [first])
    cells = [cell.strip() for cell in first]
    header = _is_header(cells, expected, label, commas)
    if header:
        lines = first_line_number
        names = _names(cells, rows, source)
        width = len(names)
    else:
        lines, names = sample[0][0] - 1, None
        rows = [first, *rows]
        width = Counter(map(len, rows)).most_common(1)[0][0]
    before = "".join(itertools.islice(io.StringIO(text), lines))
    return Layout(
        separator,
        names,
        width,
        6 * lines_before + len(before.encode()),
        lines_before + lines,
        commas,
        frozenset(
            index
            for index in range(width)
            if all(
                _is_number(cell.strip(), commas) or cell.strip() in MISSING
                for cells in rows
                for cell in cells[index : index + 1]
            )
        ),
        separator != " "
        and (
            f"{separator} " in text
            or any(cell != cell.strip() for cells in rows for cell in cells)
        ),
    )


def parse(
    data: bytes,
    layout: Layout,
    source: str,
    budget: MemoryBudget,
) -> TextTable:
    """Parses the rows of a text.

    Args:
      data: the text.
      layout: how its cells lie.
      source: what it is called.
      budget: what the cells must not exceed.

    Returns:
      The rows that are not blank.

    Raises:
      TableError: rows differ in length, a quotation mark has no end, or the table is
        too large.
    """
    rows = data.count(b"\n") + 1
    needed = layout.width * (_COLUMN_BYTES + _CELL_BYTES * rows)
    budget.require(needed, f"{source} with {layout.width:,} columns", TableError)
    try:
        try:
            frame = _parsed(data, layout, layout.numeric)
        except pl.exceptions.ComputeError:
            # Further down some column has other cells: its place is found later.
            frame = _parsed(data, layout, frozenset())
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        _check_records(data, layout, source)
        raise TableError(f"{source} cannot be read ({first_line(error)}).") from error
    records = pl.Series(range(len(frame)), dtype=pl.UInt32)
    if frame.width and frame.to_series(-1).null_count():
        # A row that is short, or blank, lacks its last cell.
        blank = _check_records(data, layout, source)
        if blank:
            kept = ~records.is_in(blank)
            frame, records = frame.filter(kept), records.filter(kept)
    return TextTable(frame, layout, data, records)


def _parsed(
    data: bytes,
    layout: Layout,
    numeric: frozenset[int],
    columns: Sequence[int] | None = None,
) -> pl.DataFrame:
    """Parses with polars, numeric columns as floats and all others as strings."""
    schema = {
        str(index): pl.Float64 if index in numeric and not layout.padded else pl.String
        for index in range(layout.width)
    }
    body = data[layout.skipped_bytes :]
    if not body:
        return pl.DataFrame(schema=schema)
    frame = pl.read_csv(
        body,
        has_header=False,
        schema=schema,
        columns=None if columns is None else list(columns),
        separator=layout.separator,
        null_values=list(MISSING),
        decimal_comma=layout.decimal_comma,
        raise_if_empty=False,
    )
    if layout.padded:
        text = pl.col(pl.String).str.strip_chars(" \t")
        quoted = text.str.starts_with('"') & text.str.ends_with('"')
        text = pl.when(quoted).then(text.str.strip_chars('"')).otherwise(text)
        frame = frame.with_columns(text.replace(dict.fromkeys(MISSING)))
    return frame


def _head(data: bytes) -> bytes:
    """Returns the first lines of a text, whole."""
    if len(data) <= _SAMPLE:
        return data
    # A line that is longer than the sample is taken whole.
    return data[
        : data.rfind(b"\n", 0, _SAMPLE) + 1 or data.find(b"\n") + 1 or len(data)
    ]


def _cells(lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the cells of each record, blank ones too, with the number of its line."""
    # A cell may be as long as the file.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator != " ")
    for cells in reader:
        yield reader.line_num, cells


def _sample(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the first records that are not blank."""
    records = _cells(io.StringIO(text), separator)
    filled = (record for record in records if any(cell.strip() for cell in record[1]))
    return itertools.islice(filled, _SAMPLE_ROWS)


def _records(data: bytes, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Yields all records, blank ones too, with their lines in the file."""
    lines = io.StringIO(data[layout.skipped_bytes :].decode(errors="replace"))
    for line, cells in _cells(lines, layout.separator):
        yield line + layout.skipped_lines, cells


def _check_records(data: bytes, layout: Layout, source: str) -> list[int]:
    """Raises at a row of another length; returns the records that are blank."""
    blank = []
    for number, (line, cells) in enumerate(_records(data, layout)):
        if len(cells) < 2 and not "".join(cells).strip():
            blank.append(number)
        elif len(cells) != layout.width:
            raise TableError(
                f"{source}: line {line} has {len(cells)} cells, not {layout.width} as "
                "the first line."
            )
    return blank


def _score(text: str, separator: str) -> tuple[float, float, int]:
    """Says how well a separator divides a text.

    That is the share of rows of the commonest length, the share of cells that are
    numbers or hold no other separator, and that length; worst for one column, and for
    spaces where a cell between two of them is empty.
    """
    rows = [cells for _, cells in _sample(text, separator)][:100]
    widths = Counter(map(len, rows[1:] or rows))
    width, count = widths.most_common(1)[0]
    if width < 2 or (separator == " " and any("" in cells for cells in rows)):
        return (0.0, 0.0, 0)
    others = set(_SEPARATORS) - {separator}
    cells = [cell.strip() for cells in rows for cell in cells[:_SAMPLE_ROWS]]
    good = sum(
        _is_number(cell, separator != ",") or not others.intersection(cell)
        for cell in cells
    )
    return (round(count / widths.total(), 1), good / len(cells), width)


def _has_commas(rows: Sequence[Sequence[str]]) -> bool:
    """Whether more numbers have a decimal comma than a point."""
    cells = [cell.strip() for cells in rows for cell in cells]
    commas = sum("," in cell and bool(_COMMA.fullmatch(cell)) for cell in cells)
    return commas > sum("." in cell and bool(_POINT.fullmatch(cell)) for cell in cells)


def _is_number(cell: str, commas: bool) -> bool:
    """Whether a cell is a number, infinite or NaN included."""
    return bool(_POINT.fullmatch(cell)) or (commas and bool(_COMMA.fullmatch(cell)))


def _is_header(
    cells: list[str], expected: Collection[str], label: str | None, commas: bool
) -> bool:
    """Whether the first line has names; a label that is a number counts columns."""
    if not any(_is_number(cell, commas) for cell in cells):
        return True
    if len(cells) > 1 and cells == [str(index) for index in range(len(cells))]:
        return True  # what pandas writes of columns without names
    if label in cells and not _is_number(label or "", commas):
        return True
    return bool(expected) and set(expected) <= set(cells)


def _names(
    cells: list[str], rows: Sequence[Sequence[str]], source: str
) -> tuple[str, ...]:
    """Returns the columns' names, empty for one that the header does not name."""
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else len(cells)
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
