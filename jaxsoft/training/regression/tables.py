"""Tables to learn classes from: read from a file, checked, and known by a digest.

A table is a CSV file (.csv, .tsv), an NPZ file (.npz) or a libsvm file (.svm,
.svmlight, .libsvm, .txt), text files also as .gz; without a path it is scikit-learn's
digits. Anything wrong with it is a `TableError` of one line.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsoft.training.errors import TableError
from jaxsoft.training.regression.table_formats import (
    Contents,
    Wanted,
    read_csv,
    read_digits,
    read_libsvm,
    read_npz,
)

__all__ = ["Table", "check_range", "read_rows", "read_table"]

DIGITS = "scikit-learn's digits"
# From here on floats do not tell whole numbers apart.
_EXACT = 2**53
_READERS: dict[str, Callable[[Path, Wanted], Contents]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".npz": read_npz,
    ".svm": read_libsvm,
    ".svmlight": read_libsvm,
    ".libsvm": read_libsvm,
    ".txt": read_libsvm,
}


@dataclass(frozen=True)
class Table:
    """Rows of features, and their labels where they are known.

    Attributes:
      features: [n, d] float32 or float64, a NumPy array or a `csr_matrix`.
      labels: [n] integers, booleans or strings; None where the file has none.
      feature_names: a tuple, one a column, or None.
      image_shape: (h, w) or (h, w, c) where a row is an image, or None.
      source: where the table comes from, in words.
      digest: hash of features, labels, names and the shape of an image; independent
        of places.
      label_column: where the labels were: a column's name, its index where columns
        have no names, an NPZ file's key, or None.
    """

    features: Any
    labels: Any
    feature_names: Any
    image_shape: tuple[int, ...] | None
    source: str
    digest: str
    label_column: str | int | None = None


def read_table(
    path: str | os.PathLike[str] | None = None, label: str | int | None = None
) -> Table:
    """Reads a table to train on.

    Args:
      path: the file; None is scikit-learn's digits.
      label: name or index of the CSV column with the labels, from 0, or from -1
        backwards; None is the last column. Of an NPZ file, the key of the labels.

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
    table = _read(path, Wanted(None if label is None else str(label)))
    if table.labels is None:
        raise TableError(f"{table.source} has no labels; training needs them.")
    if len(np.unique(table.labels)) < 2:
        raise TableError(
            f"{table.source} has one class only, {table.labels[0].item()!r}; training "
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
) -> Table:
    """Reads a table to predict, which may have labels or not.

    A CSV file with one column more than the model has features has labels. They are in
    the column `label`, else in that which is none of the model's, else where the model
    had them.

    Args:
      path: the file; None is scikit-learn's digits.
      label: as for `read_table`; a table without that column has no labels.
      num_features: features of the model.
      feature_names: the model's names of them; columns of a CSV file with a header
        are put in this order.
      label_column: `Table.label_column` of the table that it was trained on.

    Returns:
      The table, its labels None where the file has none.

    Raises:
      TableError: as for `read_table`, labels apart; the features are not the model's,
        or which column has the labels is not known.
    """
    name = None if label is None else str(label)
    wanted = Wanted(name, num_features, feature_names, label_column)
    table = _read(path, wanted)
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
    place = _not_finite(values)
    if place is None:
        return
    row, column = place
    row = row if rows is None else int(rows[row])
    remedy = "use `dtype` float64" if values.dtype == np.float32 else "make it smaller"
    raise TableError(
        f"{table.source}: row {row}, column {_column(table.feature_names, column)} is "
        f"{table.features[row, column]}, too large for {values.dtype}; {remedy}."
    )


def _read(path: str | os.PathLike[str] | None, wanted: Wanted) -> Table:
    """Reads and checks a table."""
    if path is None:
        return _table(read_digits(), DIGITS)
    file, source = Path(path), str(path)
    if not file.exists():
        raise TableError(f"the table {source} does not exist.")
    if not file.is_file():
        raise TableError(f"the table {source} is not a file.")
    if file.stat().st_size == 0:
        raise TableError(f"{source} is empty.")
    suffixes = [suffix.lower() for suffix in file.suffixes]
    ending = suffixes[-2] if suffixes[-1:] == [".gz"] and suffixes[1:] else file.suffix
    reader = _READERS.get(ending.lower())
    if reader is None:
        raise TableError(
            f"{source} is of no known format; name it by one of {', '.join(_READERS)}."
        )
    try:
        return _table(reader(file, wanted), source)
    except OSError as error:
        raise TableError(f"{source} cannot be read ({error}).") from error


def _table(contents: Contents, source: str) -> Table:
    """Checks what a file holds, and puts it in the form of a table."""
    features, shape = _features(contents, source)
    labels = None if contents.labels is None else _labels(contents, source)
    if labels is not None and len(labels) != features.shape[0]:
        raise TableError(
            f"{source} has {features.shape[0]} rows of features but {len(labels)} "
            "labels."
        )
    names = contents.names
    if names is not None and len(names) != features.shape[1]:
        raise TableError(
            f"{source} has {features.shape[1]} features but {len(names)} names."
        )
    shape = shape or _pixels(names)
    return Table(
        features,
        labels,
        names,
        shape,
        source,
        _digest(features, labels, names, shape),
        contents.label_column,
    )


def _features(contents: Contents, source: str) -> tuple[Any, tuple[int, ...] | None]:
    """Returns finite features [n, d], and the shape of an image."""
    features = contents.features
    if features.dtype.kind not in "buif":
        raise TableError(f"{source}: the features are {features.dtype}, not numbers.")
    if features.ndim not in (2, 3, 4):
        raise TableError(
            f"{source}: the features must have 2 axes, or 3 or 4 for images, got shape "
            f"{features.shape}."
        )
    shape = features.shape[1:] if features.ndim > 2 else None
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if shape is not None:
        features = features.reshape(len(features), math.prod(shape))
    for what, size in zip(("rows", "features"), features.shape, strict=True):
        if size == 0:
            raise TableError(f"{source} has no {what}.")
    place = _not_finite(features)
    if place is not None:
        line = _line(contents, place[0])
        raise TableError(
            f"{source}: {line}, column {_column(contents.names, place[1])} is "
            f"{features[place]}; fill it in or leave the {line.split()[0]} out."
        )
    return features, shape


def _not_finite(features: Any) -> tuple[int, int] | None:
    """Row and column of the first value that is not finite, dense or CSR."""
    from scipy.sparse import issparse

    sparse = issparse(features)
    finite = np.isfinite(features.data if sparse else features)
    if finite.all():
        return None
    place = int(np.argmin(finite))
    if not sparse:
        return divmod(place, features.shape[1])
    row = int(np.searchsorted(features.indptr, place, side="right")) - 1
    return row, int(features.indices[place])


def _line(contents: Contents, row: int) -> str:
    """Where a row is in its file."""
    return f"row {row}" if contents.lines is None else f"line {contents.lines[row]}"


def _column(names: tuple[str, ...] | None, column: int) -> str:
    """What a column is called."""
    return str(column) if names is None else repr(names[column])


def _labels(contents: Contents, source: str) -> np.ndarray:
    """Returns labels as integers, booleans or strings."""
    labels: Any = np.asarray(contents.labels)
    if labels.ndim != 1:
        raise TableError(
            f"{source}: the labels must be one a row, got shape {labels.shape}."
        )
    if labels.dtype.kind == "S":
        try:
            labels = np.char.decode(labels, "utf-8")
        except UnicodeDecodeError as error:
            raise TableError(f"{source}: the labels are no UTF-8 ({error}).") from error
    if labels.dtype.kind == "U":
        missing = np.isin(np.char.lower(np.char.strip(labels)), ("", "nan"))
        if missing.any():
            line = _line(contents, int(np.argmax(missing)))
            raise TableError(f"{source}: {line} has no label; leave it out.")
        labels = _numbers(labels)
    if labels.dtype.kind in "bU":
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
            f"{source}: {_line(contents, row)} has the label {labels[row]}, which is "
            "no class; is it another column?"
        )
    return labels.astype(np.int64)


def _numbers(labels: np.ndarray) -> np.ndarray:
    """Returns labels as numbers if all are, and are written as Python writes them.

    So two labels become one class only as 7 and 7.0 do, and 007 stays as it is.
    """
    values, places = np.unique(labels, return_inverse=True)
    texts = values.tolist()
    integers = all(_is_written(text, int) for text in texts)
    try:
        if integers:
            return np.array([int(text) for text in texts], np.int64)[places]
        numbers = np.array([float(text) for text in texts])
    except (OverflowError, ValueError):
        return labels
    if not (np.isfinite(numbers) & (numbers == np.rint(numbers))).all():
        return numbers[places]
    written = all(_is_written(text, int) or _is_written(text, float) for text in texts)
    return numbers[places] if written and np.abs(numbers).max() < _EXACT else labels


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
    for part in (*parts, *(() if labels is None else (labels,))):
        digest.update(f"{features.shape} {part.dtype.str}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
