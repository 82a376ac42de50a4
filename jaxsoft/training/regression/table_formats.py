"""What a table's file holds, format by format: CSV, NPZ, libsvm, and the digits.

A reader returns `Contents`, and is told by `Wanted` which columns to take. Whatever is
wrong with a file is a `TableError` of one line, with the place in the file.
"""

import csv
import gzip
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from jaxsoft.training.errors import TableError, first_line

__all__ = ["Contents", "Wanted", "read_csv", "read_digits", "read_libsvm", "read_npz"]

# Lines of a CSV file that are turned into numbers at a time.
_CHUNK = 4096
# A longer label is a text, not the name of a class.
_LONGEST_LABEL = 1000
# Characters of a cell that an error shows.
_SHOWN = 40
# Names of features and labels in an NPZ file, the first that is there counts.
_FEATURE_KEYS = ("X", "x", "data")
_LABEL_KEYS = ("y", "Y", "target", "labels")
_SPARSE_KEYS = {"format", "shape"}
# What NumPy, SciPy and zipfile raise at a file that is damaged or something else.
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    MemoryError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)


class Wanted(NamedTuple):
    """Which columns to read.

    Attributes:
      label: name or index of the label column; None is the last one.
      num_features: features of the model that will read the table, or None to train
        one. With a model, labels may be absent.
      feature_names: the model's names of its features, or None.
      label_column: where the labels were in the table that the model was trained on,
        as `Contents` has it, or None where that is not known.
    """

    label: str | None = None
    num_features: int | None = None
    feature_names: tuple[str, ...] | None = None
    label_column: str | int | None = None


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      features: [n, d] floats, dense or CSR, or [n, h, w] and [n, h, w, c] images.
      labels: [n] whatever the file has, or None.
      names: of the features, or None.
      lines: of each row, its line in the file; None where rows count from 0.
      label_column: where the labels were: a column's name, its index where columns
        have no names, or an NPZ file's key; None where there is no choice.
    """

    features: Any
    labels: np.ndarray | None
    names: tuple[str, ...] | None = None
    lines: np.ndarray | None = None
    label_column: str | int | None = None


def read_digits() -> Contents:
    """The 1,797 digits of 8 by 8 pixels that scikit-learn brings."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return Contents(digits.images, digits.target, tuple(digits.feature_names))


def read_csv(path: Path, wanted: Wanted) -> Contents:
    """Reads text in columns that commas, semicolons or tabs divide.

    The first line is a header if no cell of it is a number, or it has the label's name
    or the model's names, or it counts the columns: 0, 1, 2 and so on.
    """
    try:
        with _open_text(path) as file:
            return _read_lines(path, file, wanted)
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        raise TableError(f"{path} is not readable text ({error}).") from error


def read_npz(path: Path, wanted: Wanted) -> Contents:
    """Reads `X` and `y`, `data` and `target`, or what `scipy.sparse.save_npz` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if set(file.files) >= _SPARSE_KEYS:
                from scipy.sparse import load_npz

                return Contents(load_npz(path).tocsr(), None)
            return _read_arrays(path, file, wanted)
    except TableError:
        raise
    except _DAMAGED as error:
        raise TableError(
            f"{path} cannot be read as an NPZ file ({first_line(error)})."
        ) from error


def _read_arrays(path: Path, file: Any, wanted: Wanted) -> Contents:
    """Reads the arrays of an NPZ file."""
    features = next((key for key in _FEATURE_KEYS if key in file), None)
    if features is None:
        raise TableError(
            f"{path} has no array `X`, `x` or `data`; it has {_listed(file.files)}."
        )
    values = _array(path, file, features)
    labels = _label_key(path, file.files, wanted)
    names = None
    if "feature_names" in file:
        names = tuple(str(name) for name in _array(path, file, "feature_names"))
    return Contents(
        values,
        None if labels is None else _array(path, file, labels),
        names,
        label_column=labels,
    )


def _array(path: Path, file: Any, key: str) -> np.ndarray:
    """Reads an array of an NPZ file, which may hold other things, too."""
    values = file[key]
    if not isinstance(values, np.ndarray):
        raise TableError(f"{path}: {key!r} is not an array.")
    return values


def read_libsvm(path: Path, wanted: Wanted) -> Contents:
    """Reads lines such as `2 1:0.5 7:1`: a label, then the features that are not 0.

    A feature's number is its column, whether a file counts from 0 or from 1 (and so has
    an empty column 0): what one file counts from cannot be told from its features, and
    a model must find the same ones in the next file.
    """
    from scipy.sparse import csr_matrix
    from sklearn.datasets import load_svmlight_file

    try:
        options: dict[str, Any] = {"zero_based": True}
        loaded: Any = load_svmlight_file(str(path), **options)
    except (OSError, ValueError, EOFError, zlib.error, OverflowError) as error:
        raise TableError(
            f"{path} cannot be read as a libsvm file ({first_line(error)})."
        ) from error
    features, labels = loaded
    if features.nnz and features.indices.min() < 0:
        raise TableError(f"{path} has a feature whose number is negative.")
    # The last features may be 0 in every row, and so not in the file at all.
    width = max(features.shape[1], wanted.num_features or 0)
    parts = (features.data, features.indices, features.indptr)
    return Contents(csr_matrix(parts, shape=(len(labels), width)), labels)


def _open_text(path: Path) -> TextIO:
    """Opens a text file, compressed or not."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_lines(path: Path, file: TextIO, wanted: Wanted) -> Contents:
    """Reads the lines of a CSV file."""
    first = file.readline()
    while first and not first.strip():
        first = file.readline()
    file.seek(0)
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
    rows = _rows(path, reader)
    line, cells = next(rows, (0, []))
    if not cells:
        raise TableError(f"{path} is empty.")
    header = _is_header([cell.strip() for cell in cells], wanted)
    names = [cell.strip() for cell in cells] if header else None
    for name, count in Counter(names or ()).items():
        if count > 1:
            raise TableError(f"{path} has more than one column {name!r}.")
    columns, label = _columns(path, names, len(cells), wanted)
    readings = _Readings(path, names, columns, label)
    if not header:
        readings.add(line, cells)
    for line, cells in rows:
        readings.add(line, cells)
    return readings.contents()


def _is_header(cells: list[str], wanted: Wanted) -> bool:
    """Whether the first line has names; a label that is a number counts columns."""
    if not any(_is_number(cell) for cell in cells):
        return True
    if len(cells) > 1 and cells == [str(index) for index in range(len(cells))]:
        return True  # what pandas writes of columns without names
    if wanted.label in cells and not _is_number(wanted.label):
        return True
    return bool(wanted.feature_names) and set(wanted.feature_names) <= set(cells)


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not blank, all of one length, with their lines."""
    length = 0
    for cells in reader:
        if not cells or cells == [""]:
            continue
        length = length or len(cells)
        if len(cells) != length:
            raise TableError(
                f"{path}: line {reader.line_num} has {len(cells)} cells, not {length} "
                "as the first line."
            )
        yield reader.line_num, cells


class _Readings:
    """Rows of a CSV file on their way to arrays."""

    def __init__(
        self,
        path: Path,
        names: list[str] | None,
        columns: Sequence[int],
        label: int | None,
    ):
        self.path, self.names = path, names
        self.columns, self.label = columns, label
        self.lines: list[int] = []
        self.labels: list[str] = []
        self.pending: list[list[float]] = []
        self.blocks: list[np.ndarray] = []

    def add(self, line: int, cells: list[str]) -> None:
        """Takes a row."""
        try:
            self.pending.append([float(cells[index]) for index in self.columns])
        except ValueError:
            raise self.complaint(line, cells) from None
        self.lines.append(line)
        if self.label is not None:
            self.labels.append(self.checked_label(line, cells[self.label].strip()))
        if len(self.pending) == _CHUNK:
            self.pack()

    def pack(self) -> None:
        """Puts the pending rows into an array."""
        if self.pending:
            self.blocks.append(np.array(self.pending))
        self.pending = []

    def complaint(self, line: int, cells: list[str]) -> TableError:
        """What is wrong with the first cell of a row that is no number."""
        index = next(index for index in self.columns if not _is_number(cells[index]))
        cell, column = cells[index], self.column(index)
        if not cell.strip():
            return TableError(
                f"{self.path}: line {line}, column {column} is missing; fill it in or "
                "leave the line out."
            )
        shown = repr(cell[:_SHOWN]) + ("..." if len(cell) > _SHOWN else "")
        return TableError(
            f"{self.path}: column {column} is not numeric, line {line} has {shown}; "
            "encode it as numbers, leave it out, or name it as the `label`."
        )

    def checked_label(self, line: int, label: str) -> str:
        """Returns a label that can be one."""
        if not label:
            raise TableError(
                f"{self.path}: line {line} has no label in column "
                f"{self.column(self.label)}."
            )
        if len(label) > _LONGEST_LABEL:
            raise TableError(
                f"{self.path}: line {line} has a label of {len(label):,} characters in "
                f"column {self.column(self.label)}, which is no class; is it another "
                "column?"
            )
        return label

    def column(self, index: Any) -> str:
        """A column's name, or its index."""
        return str(index) if self.names is None else repr(self.names[index])

    def contents(self) -> Contents:
        """Everything read."""
        self.pack()
        empty = np.zeros((0, len(self.columns)))
        names, label = self.names, self.label
        return Contents(
            np.concatenate(self.blocks) if self.blocks else empty,
            None if label is None else np.array(self.labels),
            None if names is None else tuple(names[index] for index in self.columns),
            np.array(self.lines, np.int64),
            label if label is None or names is None else names[label],
        )


def _columns(
    path: Path, names: list[str] | None, length: int, wanted: Wanted
) -> tuple[list[int], int | None]:
    """Chooses the feature columns, in the model's order, and the label column."""
    label = _label_column(path, names, length, wanted)
    columns = [index for index in range(length) if index != label]
    if names is not None and wanted.feature_names is not None:
        absent = [name for name in wanted.feature_names if name not in names]
        if absent:
            raise TableError(
                f"{path} has no column {absent[0]!r}, which the model needs"
                + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
                + f"; it has {_listed(names)}."
            )
        chosen = [names.index(name) for name in wanted.feature_names]
        if len(columns) == len(chosen):
            columns = chosen
    if wanted.num_features not in (None, len(columns)):
        raise TableError(
            f"{path} has {length} columns, the model has {wanted.num_features} "
            "features; give it those that the model was trained on, with or without "
            "the labels."
        )
    return columns, label


def _label_column(
    path: Path, names: list[str] | None, length: int, wanted: Wanted
) -> int | None:
    """Finds the label column; None where a table to predict has none."""
    if wanted.label is not None:
        return _named_column(path, names, length, wanted)
    if wanted.num_features is None:
        return length - 1
    if length != wanted.num_features + 1:
        return None
    if names is not None and wanted.feature_names is not None:
        others = set(names) - set(wanted.feature_names)
        return names.index(others.pop()) if len(others) == 1 else None
    known = wanted.label_column
    if names is not None and known in names:
        return names.index(known)
    if isinstance(known, int):
        return known
    raise TableError(
        f"{path} has {length} columns, one more than the model has features, and "
        "nothing says which one has the labels; name it by `label`."
    )


def _named_column(
    path: Path, names: list[str] | None, length: int, wanted: Wanted
) -> int | None:
    """Finds the column that `wanted.label` names, or counts."""
    label = str(wanted.label)
    if names is not None and label in names:
        return names.index(label)
    if length == wanted.num_features:
        return None
    try:
        index = int(label)
    except ValueError:
        index = length
    if -length <= index < length:
        return index % length
    there = f"columns 0 to {length - 1}" if names is None else _listed(names)
    raise TableError(f"{path} has no column {label!r}; it has {there}.")


def _label_key(path: Path, keys: Sequence[str], wanted: Wanted) -> str | None:
    """Finds the array of labels in an NPZ file."""
    candidates = _LABEL_KEYS if wanted.label is None else (wanted.label,)
    known = wanted.label_column
    if wanted.label is None and isinstance(known, str) and known not in _FEATURE_KEYS:
        candidates = (known, *_LABEL_KEYS)
    found = next((key for key in candidates if key in keys), None)
    if found is None and wanted.num_features is None:
        named = " or ".join(f"`{key}`" for key in candidates)
        raise TableError(f"{path} has no labels {named}; it has {_listed(keys)}.")
    return found


def _listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a row, at most so many."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_number(cell: str) -> bool:
    """Whether a cell is a number, infinite or NaN included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True
