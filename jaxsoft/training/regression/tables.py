"""Tables to learn classes from: read from a file, checked, and known by a digest.

A table is a text with a character between cells (.csv, .tsv), Parquet, Feather, NDJSON,
NPZ or libsvm, all but NPZ compressed or not; files of other names are known by what
they hold. Without a path it is scikit-learn's digits. Anything wrong with a table is a
`TableError` of one line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jaxsoft.training.errors import TableError
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.column_roles import (
    ColumnNames,
    ColumnRoles,
    known_names,
    roles_to_predict,
    roles_to_train,
)
from jaxsoft.training.regression.columns import (
    Column,
    encode,
    learn_columns,
    numbers,
    texts,
)
from jaxsoft.training.regression.table_formats import (
    Arrays,
    Cells,
    Wanted,
    read_contents,
    read_digits,
)

__all__ = ["Table", "check_range", "read_rows", "read_table"]

DIGITS = "scikit-learn's digits"
# From here on floats do not tell whole numbers apart.
_EXACT = 2**53
# A longer label is a text, not the name of a class.
_LONGEST_LABEL = 1000
# Integers that NumPy does not have.
_WIDE = ("Int128", "UInt128")


@dataclass(frozen=True)
class Table:
    """Rows of features, and their labels where they are known.

    Attributes:
      features: [n, d] float32 or float64, a NumPy array, NaN where a number is missing,
        or a `csr_matrix`.
      labels: integers, booleans, floats or strings (of dtype object) of the rows that
        have one; None where no row has.
      labelled: [n] booleans, which rows have a label; None where all do or none does.
      feature_names: a tuple, one a feature, or None.
      image_shape: (h, w) or (h, w, c) where a row is an image, or None.
      source: where the table comes from, in words.
      digest: hash of features, labels, weights, names and the shape of an image;
        independent of places.
      label_column: where the labels were: a column's name, its index where columns
        have no names, an NPZ file's key, or None.
      columns: what the features were made from; None for arrays.
      weights: [n] float64 of the rows, or None.
      ids: [n] names of the rows, or None.
      id_column: where those were, or None.
      notes: what a user should know of the reading.
      place: says where a row is.
    """

    features: Any
    labels: Any
    feature_names: Any
    image_shape: tuple[int, ...] | None
    source: str
    digest: str
    label_column: str | int | None = None
    labelled: np.ndarray | None = None
    columns: tuple[Column, ...] | None = None
    weights: np.ndarray | None = None
    ids: tuple[str, ...] | None = None
    id_column: str | int | None = None
    notes: tuple[str, ...] = ()
    place: Callable[[int], str] = "row {}".format


def read_table(
    path: str | os.PathLike[str] | None = None,
    label: str | int | None = None,
    *,
    drop: Sequence[str] = (),
    weights: str | None = None,
    id: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    header: bool | None = None,
    memory: MemoryBudget | None = None,
) -> Table:
    """Reads a table to train on.

    Args:
      path: the file; None is scikit-learn's digits.
      label: name or index of the column with the labels, from 0, or from -1
        backwards; None is the last column. Of an NPZ file, the key of the labels.
      drop: columns to leave out, likewise.
      weights: the column of the rows' weights, or None.
      id: the column of the rows' names, which is no feature, or None.
      separator: the character between cells of a text; None judges.
      encoding: of a text; None judges.
      header: whether a text's first line has names; None judges.
      memory: what the table may take; None is half of what is free.

    Returns:
      The table, with labels.

    Raises:
      TableError: the file is missing, of another format, empty or ragged; a cell is
        no finite number; the labels are absent, no classes, or all the same.

    Example:
      >>> table = read_table()
      >>> table.features.shape, table.image_shape, len(set(table.labels))
      ((1797, 64), (8, 8), 10)
    """
    label = None if label is None else str(label)
    names = ColumnNames(label, tuple(drop), weights, id)
    wanted = Wanted(
        label,
        separator,
        encoding,
        header,
        budget=memory or MemoryBudget.of_machine(),
    )
    contents = read_digits() if path is None else read_contents(Path(path), wanted)
    if isinstance(contents, Arrays):
        for role in ("drop", "weights", "id"):
            if path is not None and getattr(names, role):
                raise TableError(f"`{role}` is for tables of columns, not for {path}.")
        table = _of_arrays(contents, DIGITS if path is None else str(path))
    else:
        roles = roles_to_train(contents.frame, contents.names, names, contents.source)
        frame = contents.frame.select(map(pl.nth, roles.features))
        found = _names(contents, roles.features)
        columns, notes = learn_columns(frame, found, contents, contents.decimal_comma)
        roles = dataclasses.replace(roles, notes=(*roles.notes, *notes))
        table = _of_cells(contents, roles, columns, wanted)
    if table.labels is None:
        raise TableError(f"{table.source} has no labels; training needs them.")
    if table.labelled is not None:
        missing = np.flatnonzero(~table.labelled)
        assert isinstance(contents, Cells)
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise TableError(
            f"{table.source}: {contents.place(int(missing[0]))}{more} has no label in "
            f"column {table.label_column!r}, where None, NA, ? and the like are none; "
            "leave it out."
        )
    if len(np.unique(table.labels)) < 2:
        raise TableError(
            f"{table.source} has one class only, {_plain(table.labels[0])!r}; training "
            "needs two or more."
        )
    return table


def read_rows(
    path: str | os.PathLike[str] | None = None,
    label: str | int | None = None,
    *,
    num_features: int,
    feature_names: tuple[str, ...] | None = None,
    label_column: str | int | None = None,
    columns: tuple[Column, ...] | None = None,
    trained: ColumnNames | None = None,
    id: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    header: bool | None = None,
    memory: MemoryBudget | None = None,
) -> Table:
    """Reads a table to predict, which may have labels or not.

    Columns are found by the model's names where both have names; others are left out.
    The labels are in the column `label`, else where the model had them.

    Args:
      path: the file; None is scikit-learn's digits.
      label: as for `read_table`; a table without that column has no labels.
      num_features: features of the model.
      feature_names: the model's names of them.
      label_column: `Table.label_column` of the table that it was trained on.
      columns: `Table.columns` of it; None has a feature a column.
      trained: what other columns were in it.
      id: the column of the rows' names; None is where the model had them.
      separator: as for `read_table`.
      encoding: likewise.
      header: likewise.
      memory: likewise.

    Returns:
      The table.

    Raises:
      TableError: as for `read_table`, labels apart; the features are not the model's,
        or which column has the labels is not known.
    """
    label = None if label is None else str(label)
    if columns is None:
        columns = tuple(map(Column, feature_names or range(num_features)))
    trained = trained or ColumnNames()
    if label_column is not None:
        trained = ColumnNames(
            str(label_column), trained.drop, trained.weights, trained.id
        )
    wanted = Wanted(
        label,
        separator,
        encoding,
        header,
        tuple(column.name for column in columns if isinstance(column.name, str)),
        True,
        label_column if isinstance(label_column, str) else None,
        memory or MemoryBudget.of_machine(),
    )
    contents = read_digits() if path is None else read_contents(Path(path), wanted)
    if isinstance(contents, Arrays):
        table = _of_arrays(
            contents, DIGITS if path is None else str(path), num_features
        )
    else:
        roles = roles_to_predict(
            contents.frame,
            contents.names,
            ColumnNames(label, id=id),
            columns,
            trained,
            contents.source,
        )
        table = _of_cells(contents, roles, columns, wanted)
    found = table.features.shape[1]
    if found != num_features:
        raise TableError(
            f"{table.source} has {found} features, the model has {num_features}; give "
            "it the columns that the model was trained on."
        )
    return table


def check_range(table: Table, values: Any, rows: np.ndarray | None = None) -> None:
    """Checks that features stay finite in the dtype that they are computed with.

    Args:
      table: the table.
      values: [n, d] rows of its features, dense or CSR, scaled and in that dtype.
      rows: [n] which rows; None is all of them.

    Raises:
      TableError: a value is not finite; the message names its row and column.
    """
    place = _first(values, lambda numbers: ~np.isfinite(numbers))
    if place is None:
        return
    row, column = place
    row = row if rows is None else int(rows[row])
    remedy = "use `dtype` float64" if values.dtype == np.float32 else "make it smaller"
    value = _value(table.features, row, column)
    raise TableError(
        f"{table.source}: row {row}, column {_column(table.feature_names, column)} is "
        f"{value}, too large for {values.dtype}; {remedy}."
    )


def _names(contents: Cells, places: Sequence[int]) -> tuple[str | int, ...]:
    """Names of some columns, or their indices."""
    if contents.names is None:
        return tuple(places)
    named = known_names(contents.names)
    return tuple(named[place] for place in places)


def _of_cells(
    contents: Cells,
    roles: ColumnRoles,
    columns: tuple[Column, ...],
    wanted: Wanted,
) -> Table:
    """Makes a table of columns whose roles are known."""
    frame, source = contents.frame, contents.source
    if not len(frame):
        raise TableError(f"{source} has no rows.")
    if not roles.features:
        raise TableError(f"{source} has no features.")
    if all(column.categories == () for column in columns):
        raise TableError(f"{source} has no features: each of its texts comes once.")
    chosen = frame.select(map(pl.nth, roles.features))
    written = [
        place
        for place, column in zip(roles.features, columns, strict=True)
        if column.categories is not None and frame.dtypes[place].is_numeric()
    ]
    if written:
        # Texts of the model that are numbers here: as they are written, 7 and not 7.0.
        chosen = chosen.with_columns(contents.strings(written))
    features, unknown = encode(
        chosen, columns, contents, contents.decimal_comma, wanted.budget
    )
    notes = ()
    if wanted.predicting:
        nothing = pl.all_horizontal(pl.all().is_null())
        bare = chosen.select(nothing.sum()).item()
        said = f"rows without any cell, predicted as of means: {bare:,}"
        notes = (*unknown, said) if bare else unknown
    names = None
    if contents.names is not None:
        names = tuple(name for column in columns for name in column.features())
    _check_features(features, names, contents.place, source)
    label, labels, labelled = None, None, None
    if roles.label is not None:
        (label,) = _names(contents, (roles.label,))
        cells = contents.strings((roles.label,)).to_series()
        labels, labelled = _labels_of(cells, label, contents)
    weights = None
    if roles.weights is not None:
        weights = _weights(frame.to_series(roles.weights), contents, roles.weights)
    ids, id_column = None, None
    if roles.id is not None:
        (id_column,) = _names(contents, (roles.id,))
        cells = contents.strings((roles.id,)).to_series().cast(pl.String, strict=False)
        ids = tuple(cells.fill_null("").to_list())
    shape = _pixels(names)
    return Table(
        features,
        labels,
        names,
        shape,
        source,
        _digest(features, labels, weights, names, shape),
        label,
        labelled,
        columns,
        weights,
        ids,
        id_column,
        (*contents.notes, *roles.notes, *notes),
        contents.place,
    )


def _weights(cells: pl.Series, contents: Cells, place: int) -> np.ndarray:
    """Reads the weights of the rows."""
    values = numbers(cells, contents.decimal_comma)
    array = np.full(len(cells), np.nan) if values is None else values.to_numpy()
    good = np.isfinite(array) & (array >= 0)
    if not good.all():
        row = int(np.argmin(good))
        (name,) = _names(contents, (place,))
        raise TableError(
            f"{contents.source}: {contents.place(row)} has the weight {cells[row]!r} "
            f"in column {name!r}; weights are numbers that are not negative."
        )
    if not array.any():
        raise TableError(f"{contents.source}: the weights of all rows are 0.")
    return array


@np.errstate(over="ignore", invalid="ignore")
def _of_arrays(contents: Arrays, source: str, width: int = 0) -> Table:
    """Makes a table of features and labels."""
    from scipy.sparse import csr_matrix, issparse

    features: Any = contents.features
    shape: tuple[int, ...] | None = None
    if features.dtype.kind not in "buif":
        raise TableError(f"{source}: the features are {features.dtype}, not numbers.")
    if features.ndim not in (2, 3, 4):
        raise TableError(
            f"{source}: the features must have 2 axes, or 3 or 4 for images, got shape "
            f"{features.shape}."
        )
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if not issparse(features):
        # There are NaNs that each sum of them warns of.
        np.copyto(features, np.nan, where=np.isnan(features))
    if features.ndim > 2:
        shape = features.shape[1:]
        features = features.reshape(len(features), math.prod(features.shape[1:]))
    if issparse(features) and width > features.shape[1]:
        # The last features may be 0 in every row, and so not in the file at all.
        parts = (features.data, features.indices, features.indptr)
        features = csr_matrix(parts, shape=(features.shape[0], width))
    if not features.shape[0]:
        raise TableError(f"{source} has no rows.")
    names = contents.names
    if names is not None and len(names) != features.shape[1]:
        raise TableError(
            f"{source} has {features.shape[1]} features but {len(names)} names."
        )
    _check_features(features, names, "row {}".format, source)
    labels = None
    if contents.labels is not None:
        labels = _labels(np.asarray(contents.labels), "row {}".format, source)
        if len(labels) != features.shape[0]:
            raise TableError(
                f"{source} has {features.shape[0]} rows of features but {len(labels)} "
                "labels."
            )
    shape = shape or _pixels(names)
    digest = _digest(features, labels, None, names, shape)
    return Table(features, labels, names, shape, source, digest, contents.label_key)


def _check_features(
    features: Any,
    names: tuple[str, ...] | None,
    place: Callable[[int], str],
    source: str,
) -> None:
    """Raises unless there are features, all finite or missing."""
    from scipy.sparse import issparse

    if not features.shape[1]:
        raise TableError(f"{source} has no features.")
    # A dense NaN is a missing number.
    wrong = (lambda numbers: ~np.isfinite(numbers)) if issparse(features) else np.isinf
    found = _first(features, wrong)
    if found is None:
        return
    row, column = found
    raise TableError(
        f"{source}: {place(row)}, column {_column(names, column)} is "
        f"{_value(features, row, column)}; give a finite number, or leave the row out."
    )


def _first(
    features: Any, wrong: Callable[[np.ndarray], np.ndarray]
) -> tuple[int, int] | None:
    """Row and column of the first value that is wrong, dense or CSR; None for none."""
    from scipy.sparse import issparse

    sparse = issparse(features)
    bad = wrong(features.data if sparse else features)
    if not bad.any():
        return None
    place = int(np.argmax(bad))
    if not sparse:
        return divmod(place, features.shape[1])
    row = int(np.searchsorted(features.indptr, place, side="right")) - 1
    return row, int(features.indices[place])


def _value(features: Any, row: int, column: int) -> Any:
    """A value, which of CSR may be the sum of several entries."""
    with np.errstate(over="ignore", invalid="ignore"):
        return features[row, column]


def _column(names: tuple[str, ...] | None, column: int) -> str:
    """What a column is called."""
    return str(column) if names is None else repr(names[column])


def _plain(label: Any) -> Any:
    """A label as Python has it."""
    return label.item() if isinstance(label, np.generic) else label


def _labels_of(
    cells: pl.Series, name: str | int, contents: Cells
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the labels of the rows that have one, and which rows they are."""
    found = texts(cells)
    present = ~(cells if found is None else found).is_null().to_numpy()
    if not present.any():
        return None, None
    rows = np.flatnonzero(present)

    def place(row: int) -> str:
        return contents.place(int(rows[row]))

    if found is None:
        if cells.dtype.is_decimal():
            cells = cells.cast(pl.Float64)
        whole = cells.dtype.is_integer() and str(cells.dtype) not in _WIDE
        if not (whole or cells.dtype.is_float() or cells.dtype == pl.Boolean):
            raise TableError(
                f"{contents.source}: the labels are {cells.dtype}, not classes."
            )
        values = cells.filter(pl.Series(present)).to_numpy()
    else:
        found = found.drop_nulls()
        lengths = found.str.len_chars()
        if (longest := lengths.max()) is not None and int(longest) > _LONGEST_LABEL:  # type: ignore[arg-type]
            raise TableError(
                f"{contents.source}: {place(lengths.arg_max() or 0)} has a label of "
                f"{longest:,} characters in column {name!r}, which is no class; is it "
                "another column?"
            )
        # A class has one text, however many rows it has.
        codes = found.rank("dense").to_numpy().astype(np.int64) - 1
        classes = np.array(found.unique().sort().to_list(), object)
        values = _numbers(classes)[codes]
    labels = _labels(values, place, contents.source)
    return labels, None if present.all() else present


def _labels(labels: np.ndarray, place: Callable[[int], str], source: str) -> np.ndarray:
    """Returns labels as integers, booleans or, of dtype object, strings."""
    if labels.ndim != 1:
        raise TableError(
            f"{source}: the labels must be one a row, got shape {labels.shape}."
        )
    if labels.dtype.kind == "S":
        try:
            labels = np.char.decode(labels, "utf-8")
        except UnicodeDecodeError as error:
            raise TableError(f"{source}: the labels are no UTF-8 ({error}).") from error
    if labels.dtype.kind in "UO":
        texts_of = labels.astype(object)
        missing = [str(text).strip().lower() in ("", "nan") for text in texts_of]
        if any(missing):
            raise TableError(
                f"{source}: {place(missing.index(True))} has no label; leave it out."
            )
        if labels.dtype.kind == "O":
            return labels
        classes, codes = np.unique(labels, return_inverse=True)
        labels = _numbers(classes.astype(object))[codes]
    if labels.dtype.kind in "bO":
        return labels
    if labels.dtype.kind not in "uif":
        raise TableError(f"{source}: the labels are {labels.dtype}, not classes.")
    if labels.dtype.kind == "f":
        good = (labels == np.rint(labels)) & (np.abs(labels) < _EXACT)
    else:
        good = labels <= np.iinfo(np.int64).max
    if not good.all():
        row = int(np.argmin(good))
        raise TableError(
            f"{source}: {place(row)} has the label {labels[row]}, which is no class; "
            "is it another column?"
        )
    return labels.astype(np.int64)


def _numbers(classes: np.ndarray) -> np.ndarray:
    """Returns classes as numbers if all are, and are written as Python writes them.

    So two labels become one class only as 7 and 7.0 do, and 007 stays as it is.
    """
    texts = classes.tolist()
    if all(_is_written(text, int) for text in texts):
        integers = [int(text) for text in texts]
        fits = all(-(2**63) <= number < 2**63 for number in integers)
        return np.array(integers, np.int64) if fits else classes
    try:
        values = np.array([float(text) for text in texts])
    except (OverflowError, ValueError):
        return classes
    if not (np.isfinite(values) & (values == np.rint(values))).all():
        return values
    written = all(_is_written(text, int) or _is_written(text, float) for text in texts)
    return values if written and np.abs(values).max() < _EXACT else classes


def _is_written(text: str, kind: Callable[[str], Any]) -> bool:
    """Whether Python writes a number in these very characters."""
    try:
        return str(kind(text)) == text
    except ValueError:
        return False


def _pixels(names: tuple[str, ...] | None) -> tuple[int, ...] | None:
    """The shape of square images, where the columns are called pixels."""
    if not names or not all(name.lower().startswith("pixel") for name in names):
        return None
    side = math.isqrt(len(names))
    return (side, side) if side * side == len(names) else None


def _digest(
    features: Any,
    labels: np.ndarray | None,
    weights: np.ndarray | None,
    names: tuple[str, ...] | None,
    shape: tuple[int, ...] | None,
) -> str:
    """Hashes what a table holds, and what its scaling depends on."""
    from scipy.sparse import issparse

    digest = hashlib.blake2b(repr((names, shape)).encode(), digest_size=16)
    parts = [features]
    if issparse(features):
        indices = (
            part.astype(np.int64) for part in (features.indices, features.indptr)
        )
        parts = [features.data, *indices]
    if labels is not None and labels.dtype == object:
        classes, labels = np.unique(labels, return_inverse=True)
        digest.update(repr(classes.tolist()).encode())
    for part in (*parts, *(part for part in (labels, weights) if part is not None)):
        digest.update(f"{features.shape} {part.dtype.str}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
