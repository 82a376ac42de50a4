"""The columns of a table as a model takes them: numbers, and texts one-hot.

scikit-learn's own encoder and imputer do it. What they learnt is kept as plain values,
from which they are made again: a model file holds no pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl

from jaxsoft.training.errors import TableError
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.text_layout import MISSING

__all__ = ["Column", "encode", "learn_columns", "listed", "numbers"]

# The commonest texts of a column become features, at most so many, each of two rows or
# more: a text that comes once says nothing of other rows.
_MOST_CATEGORIES = 100
_LEAST_ROWS = 2
# A column with a greater share of texts is one of texts; with fewer, they are mistakes.
_MISTAKES = 0.02
# Characters of a cell that an error shows.
_SHOWN = 40


class Source(Protocol):
    """Where cells come from."""

    @property
    def source(self) -> str:
        """In words."""
        ...

    @property
    def place(self) -> Callable[[int], str]:
        """Says where a row is."""
        ...


@dataclass(frozen=True)
class Column:
    """A column of a table that a model has features of.

    Attributes:
      name: of the column, or its index where columns have no names.
      categories: texts that have a feature each; None for a column of numbers.
    """

    name: str | int
    categories: tuple[str, ...] | None = None

    def features(self) -> list[str]:
        """The names of its features."""
        if self.categories is None:
            return [str(self.name)]
        return [f"{self.name}={category}" for category in self.categories]


def listed(names: Sequence[object], most: int = 12) -> str:
    """Names in a row, at most so many."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def numbers(cells: pl.Series, decimal_comma: bool) -> pl.Series | None:
    """Reads cells as numbers, true and false as 1 and 0.

    Digits may be in groups of three, a percent sign may follow, and a minus sign may be
    the typographer's. Where commas divide no thousands they are decimal.

    Args:
      cells: of any dtype.
      decimal_comma: whether numbers have a comma for a point.

    Returns:
      Floats, null where a cell is missing or no number; None for a dtype that holds no
      numbers, such as a list.
    """
    if cells.dtype == pl.String:
        text = cells.str.strip_chars()
        lower = text.str.to_lowercase()
        flags = lower.replace_strict({"true": 1.0, "false": 0.0}, default=None)
        values = text.cast(pl.Float64, strict=False)
        if decimal_comma or values.null_count() > text.null_count():
            values = _written(text, decimal_comma)
        return values.fill_null(flags)
    if cells.dtype.is_numeric() or cells.dtype == pl.Boolean:
        return cells.cast(pl.Float64, strict=False)
    if cells.dtype.is_temporal():
        # Days since 1970, with their fraction; times of a day and durations likewise.
        return _days(cells)
    return cells.cast(pl.Float64) if cells.dtype == pl.Null else None


# Digits in groups of three, divided by spaces or apostrophes, commas, or points.
_SPACED = r"^[+-]?\d{1,3}([ \u{a0}\u{202f}'\u{2019}]\d{3})+([.,]\d+)?$"
_BY_COMMAS = r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$"
_BY_POINTS = r"^[+-]?\d{1,3}(\.\d{3})+(,\d+)?$"
_DECIMAL_COMMA = r"^[+-]?\d*,\d+(e[+-]?\d+)?$"


def _written(text: pl.Series, decimal_comma: bool) -> pl.Series:
    """Reads numbers as people write them."""
    text = text.str.replace("\u2212", "-", literal=True)
    text = text.str.strip_suffix("%").str.strip_chars()
    spaced = text.str.contains(_SPACED).fill_null(False)
    text = text.str.replace_all(r"[ \u{a0}\u{202f}'\u{2019}]", "").zip_with(
        spaced, text
    )
    grouped = text.str.contains(_BY_COMMAS).fill_null(False)
    commas = text.str.to_lowercase().str.contains(_DECIMAL_COMMA)
    if decimal_comma or (commas & ~grouped).any():
        # A point is none of a decimal number's here: 1.12 may be a date.
        points = text.str.contains(".", literal=True)
        by_points = text.str.contains(_BY_POINTS).fill_null(False)
        plain = text.str.replace_all(".", "", literal=True).zip_with(by_points, text)
        values = plain.str.replace(",", ".", literal=True).cast(
            pl.Float64, strict=False
        )
        none = pl.repeat(None, len(values), dtype=pl.Float64, eager=True)
        return values.zip_with((by_points | ~points).fill_null(False), none)
    plain = text.str.replace_all(",", "", literal=True).zip_with(grouped, text)
    return plain.cast(pl.Float64, strict=False)


def _days(cells: pl.Series) -> pl.Series:
    if cells.dtype == pl.Date:
        return cells.to_physical().cast(pl.Float64)
    unit = {"ms": 864e5, "us": 864e8, "ns": 864e11}
    per_day = unit[getattr(cells.dtype, "time_unit", None) or "ns"]
    return cells.to_physical().cast(pl.Float64) / per_day


def texts(cells: pl.Series) -> pl.Series | None:
    """Reads cells as texts, null where missing; None for a dtype that holds none."""
    if cells.dtype in (pl.Categorical, pl.Enum):
        cells = cells.cast(pl.String)
    if cells.dtype != pl.String:
        return None
    return cells.str.strip_chars().replace(dict.fromkeys(MISSING))


def learn_columns(
    frame: pl.DataFrame,
    names: Sequence[str | int],
    table: Source,
    decimal_comma: bool,
) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """Decides what the features of a table are.

    A column of texts has a feature for each of its 100 commonest texts that come
    twice or more; of all others, none.

    Args:
      frame: the columns.
      names: of the columns, or their indices.
      table: its `source` and its `place` of a row, for errors.
      decimal_comma: whether numbers have a comma for a point.

    Returns:
      The columns, and what a user should know of them.

    Raises:
      TableError: a column of numbers has few cells that are none, or a column can
        have no features.
    """
    columns, told, single = [], [], []
    for cells, name in zip(frame.iter_columns(), names, strict=True):
        column = _learn(cells, name, table, decimal_comma)
        columns.append(column)
        if column.categories:
            kept, count = len(column.categories), cells.drop_nulls().n_unique()
            told.append(f"{name!r} ({kept} of {count:,})")
        elif column.categories is not None:
            single.append(name)
    notes = []
    if told:
        notes.append(f"columns of texts with a feature for each: {', '.join(told)}")
    if single:
        notes.append(f"columns left out, as each text comes once: {listed(single)}")
    return tuple(columns), tuple(notes)


def _learn(
    cells: pl.Series, name: str | int, table: Source, decimal_comma: bool
) -> Column:
    text, values, wrong = _read(cells, decimal_comma)
    if text is None and values is None:
        raise TableError(
            f"{table.source}: column {name!r} holds {cells.dtype}, neither numbers "
            "nor texts; leave it out with `drop`."
        )
    count = 0 if wrong is None else int(wrong.sum())
    if text is None or wrong is None or not count:
        return Column(name)
    filled = len(text) - text.null_count()
    if count <= max(1, _MISTAKES * filled) and filled > 1:
        raise _no_number(text, wrong, name, table)
    counts = text.drop_nulls().value_counts(sort=True)
    kept = counts.filter(pl.col("count") >= _LEAST_ROWS).to_series(0)
    return Column(name, tuple(sorted(kept.head(_MOST_CATEGORIES).to_list())))


def _read(
    cells: pl.Series, decimal_comma: bool
) -> tuple[pl.Series | None, pl.Series | None, pl.Series | None]:
    """Returns cells as texts, as numbers, and which texts are no numbers.

    The first and the last are None for a dtype that holds no texts.
    """
    text = texts(cells)
    values = numbers(cells if text is None else text, decimal_comma)
    if text is None or values is None:
        return text, values, None
    return text, values, text.is_not_null() & values.is_null()


def _no_number(
    cells: pl.Series, wrong: pl.Series, name: str | int, table: Source
) -> TableError:
    row = wrong.arg_max() or 0
    cell = cells[row]
    shown = repr(cell[:_SHOWN]) + ("..." if len(cell) > _SHOWN else "")
    return TableError(
        f"{table.source}: column {name!r} has numbers, but {table.place(row)} has "
        f"{shown}; mend it, or leave the column out with `drop`."
    )


def encode(
    frame: pl.DataFrame,
    columns: Sequence[Column],
    table: Source,
    decimal_comma: bool,
    budget: MemoryBudget,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turns the columns of a table into features.

    Args:
      frame: the columns, in the order of `columns`.
      columns: what `learn_columns` returned.
      table: as for `learn_columns`.
      decimal_comma: likewise.
      budget: what the features must not exceed.

    Returns:
      [n, d] float64, NaN where a number is missing, and 0 in all features of a text
      that has none; and notes of how many cells hold such texts.

    Raises:
      TableError: a cell is no number, or the features are too large.
    """
    rows = len(frame)
    width = sum(len(column.features()) for column in columns)
    budget.require(
        8 * rows * width, f"{table.source} with {width:,} features", TableError
    )
    if all(column.categories is None for column in columns):
        if all(dtype == pl.Float64 for dtype in frame.dtypes):
            return frame.to_numpy(order="c", writable=True), ()
    features = np.empty((rows, width))
    place, unknown = 0, []
    for cells, column in zip(frame.iter_columns(), columns, strict=True):
        if column.categories is None:
            features[:, place] = _encoded_numbers(
                cells, column.name, table, decimal_comma
            )
            place += 1
        elif column.categories:
            after = place + len(column.categories)
            found, text = _encoded_texts(cells, column, table)
            features[:, place:after] = found
            count = len(text) - text.null_count() - int(found.sum())
            if count:
                unknown.append(f"{count:,} in {column.name!r}")
            place = after
    note = f"texts without a feature: {', '.join(unknown)}"
    return features, (note,) if unknown else ()


def _encoded_numbers(
    cells: pl.Series, name: str | int, table: Source, decimal_comma: bool
) -> np.ndarray:
    text, values, wrong = _read(cells, decimal_comma)
    if values is None:
        raise TableError(
            f"{table.source}: column {name!r} holds {cells.dtype}, not numbers."
        )
    if text is not None and wrong is not None and wrong.any():
        raise _no_number(text, wrong, name, table)
    return values.to_numpy()


def _encoded_texts(
    cells: pl.Series, column: Column, table: Source
) -> tuple[np.ndarray, pl.Series]:
    """Returns the features of a column of texts, and the texts."""
    from sklearn.preprocessing import OneHotEncoder

    text = texts(cells)
    if text is None:
        # What a text column of the model holds here: 3 is the text "3".
        if cells.dtype.is_nested() or cells.dtype in (pl.Binary, pl.Object):
            raise TableError(
                f"{table.source}: column {column.name!r} holds {cells.dtype}, not "
                "texts."
            )
        text = cells.cast(pl.String)
    known = np.array(column.categories, object)
    options: dict[str, Any] = {"handle_unknown": "ignore", "sparse_output": False}
    options["categories"] = [known]
    encoder = OneHotEncoder(**options).fit(known[:, None])
    return np.asarray(encoder.transform(text.fill_null("").to_numpy()[:, None])), text
