"""Text tables as people have them: any encoding, any separator, with or without names.

polars parses the cells; how they lie, `text_layout` judges before. The csv module,
which is slow, finds the places of errors.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from jaxsoft.training.errors import TableError, first_line
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.panics import panics_as_errors
from jaxsoft.training.regression.text_layout import (
    CELL_BYTES,
    COLUMN_BYTES,
    MISSING,
    Layout,
    read_cells,
)

__all__ = ["TextTable", "decode", "parse"]

# Bytes that are looked at to know UTF-16.
_SAMPLE = 1 << 20
# Bytes that are no characters in cp1252.
_NOT_CP1252 = b"\x81\x8d\x8f\x90\x9d"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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
                if not (b"\r" in data or b"\0" in data):
                    return data, None
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
    needed = layout.width * (COLUMN_BYTES + CELL_BYTES * rows)
    budget.require(needed, f"{source} with {layout.width:,} columns", TableError)
    try:
        try:
            frame = _parsed(data, layout, layout.numeric)
        except pl.exceptions.ComputeError:
            # Further down some column has other cells: its place is found later.
            frame = _parsed(data, layout, frozenset())
    except (pl.exceptions.PolarsError, ValueError) as error:
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
    if layout.padded and b'"' in body:
        # Behind a space polars does not know a quotation mark for one.
        separator = re.escape(layout.separator.encode())
        body = re.sub(separator + b'[ \t]+(?="[^"])', layout.separator.encode(), body)
    with panics_as_errors():
        frame = pl.read_csv(
            body,
            has_header=False,
            schema=schema,
            columns=None if columns is None else list(columns),
            separator=layout.separator,
            null_values=list(MISSING),
            raise_if_empty=False,
        )
    if layout.padded:
        text = pl.col(pl.String).str.strip_chars(" \t")
        frame = frame.with_columns(text.replace(dict.fromkeys((*MISSING, '""'))))
    return frame


def _records(data: bytes, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Yields all records, blank ones too, with their lines in the file."""
    lines = io.StringIO(data[layout.skipped_bytes :].decode(errors="replace"))
    for line, cells in read_cells(lines, layout.separator):
        yield line + layout.skipped_lines, cells


def _check_records(data: bytes, layout: Layout, source: str) -> list[int]:
    """Raises at a row of another length; returns the records that are blank."""
    blank = []
    for number, (line, cells) in enumerate(_records(data, layout)):
        # A cell of nothing in quotation marks is a row of a table of one column.
        if not cells or (layout.width > 1 and not "".join(cells[:2]).strip()):
            if len(cells) < 2:
                blank.append(number)
                continue
        if len(cells) != layout.width:
            raise TableError(
                f"{source}: line {line} has {len(cells)} cells, not {layout.width} as "
                "the first line."
            )
    return blank
