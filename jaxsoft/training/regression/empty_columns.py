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
from jaxsoft.training.regression.text_tables import MISSING

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
    """Reads cells as numbers.

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
        if decimal_comma:
            text = text.str.replace(",", ".", literal=True)
        return text.cast(pl.Float64, strict=False).fill_null(flags)
    if cells.dtype.is_numeric() or cells.dtype == pl.Boolean:
        return cells.cast(pl.Float64, strict=False)
    if cells.dtype.is_temporal():
        # Days since 1970, with their fraction; times of a day and durations likewise.
        return _days(cells)
    return cells.cast(pl.Float64) if cells.dtype == pl.Null else None


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
) -> tuple[Column, ...]:
    """Decides what the features of a table are.

    A column of texts has a feature for each of its 100 commonest texts that come
    twice or more; of all others, none.

    Args:
      frame: the columns.
      names: of the columns, or their indices.
      table: its `source` and its `place` of a row, for errors.
      decimal_comma: whether numbers have a comma for a point.

    Returns:
      The columns.

    Raises:
      TableError: a column of numbers has few cells that are none, or a column can
        have no features.
    """
    return tuple(
        _learn(cells, name, table, decimal_comma)
        for cells, name in zip(frame.iter_columns(), names, strict=True)
    )


def _learn(
    cells: pl.Series, name: str | int, table: Any, decimal_comma: bool
) -> Column:
    text = texts(cells)
    values = numbers(cells if text is None else text, decimal_comma)
    if text is None:
        if values is None:
            raise TableError(
                f"{table.source}: column {name!r} holds {cells.dtype}, neither numbers "
                "nor texts; leave it out with `drop`."
            )
        return Column(name)
    assert values is not None  # of a text there are always some, if all missing
    wrong = text.is_not_null() & values.is_null()
    count = int(wrong.sum())
    if not count:
        return Column(name)
    filled = len(text) - text.null_count()
    if count <= max(1, _MISTAKES * filled) and filled > 1:
        raise _no_number(text, wrong, name, table)
    counts = text.drop_nulls().value_counts(sort=True)
    kept = counts.filter(pl.col("count") >= _LEAST_ROWS).to_series(0)
    return Column(name, tuple(sorted(kept.head(_MOST_CATEGORIES).to_list())))


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
) -> np.ndarray:
    """Turns the columns of a table into features.

    Args:
      frame: the columns, in the order of `columns`.
      columns: what `learn_columns` returned.
      table: as for `learn_columns`.
      decimal_comma: likewise.
      budget: what the features must not exceed.

    Returns:
      [n, d] float64, NaN where a number is missing, and 0 in all features of a text
      that has none.

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
            return frame.to_numpy(order="c", writable=True)
    features = np.empty((rows, width))
    place = 0
    for cells, column in zip(frame.iter_columns(), columns, strict=True):
        if column.categories is None:
            features[:, place] = _encoded_numbers(
                cells, column.name, table, decimal_comma
            )
            place += 1
        elif column.categories:
            after = place + len(column.categories)
            features[:, place:after] = _encoded_texts(cells, column, table)
            place = after
    return features


def _encoded_numbers(
    cells: pl.Series, name: str | int, table: Any, decimal_comma: bool
) -> np.ndarray:
    text = texts(cells)
    values = numbers(cells if text is None else text, decimal_comma)
    if values is None:
        raise TableError(
            f"{table.source}: column {name!r} holds {cells.dtype}, not numbers."
        )
    if text is not None:
        wrong = text.is_not_null() & values.is_null()
        if wrong.any():
            raise _no_number(text, wrong, name, table)
    return values.to_numpy()


def _encoded_texts(cells: pl.Series, column: Column, table: Source) -> np.ndarray:
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
    return np.asarray(encoder.transform(text.fill_null("").to_numpy()[:, None]))
