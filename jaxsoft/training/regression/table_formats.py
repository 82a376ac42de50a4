"""What a table's file holds, format by format.

A reader returns `Cells`, columns of cells, or `Arrays`. Whatever is wrong with a file
is a `TableError` of one line, with the place in the file.
"""

from __future__ import annotations

import functools
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jaxsoft.training.errors import TableError, first_line
from jaxsoft.training.files import (
    DAMAGED,
    endings,
    malformed_arrays,
    open_regular,
    read_unpacked,
)
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.panics import panics_as_errors
from jaxsoft.training.regression.columns import listed
from jaxsoft.training.regression.object_arrays import read_object_array
from jaxsoft.training.regression.sources import check_sparse
from jaxsoft.training.regression.svmlight import parse_text
from jaxsoft.training.regression.text_layout import CELL_BYTES, read_layout
from jaxsoft.training.regression.text_tables import decode, parse

__all__ = ["Arrays", "Cells", "Wanted", "read_contents", "read_digits"]

# Names of features and labels in an NPZ file, the first that is there counts.
_FEATURE_KEYS = ("X", "x", "data", "x_train", "X_train", "train_images")
_LABEL_KEYS = ("y", "Y", "target", "labels", "y_train", "train_labels")
_SPARSE_KEYS = {"format", "shape"}
# Bytes of a value that an error shows.
_SHOWN = 40
# Bytes of a file that are looked at to know its format.
_HEAD = 1 << 16
_COLUMNAR = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".feather": "ipc",
    ".arrow": "ipc",
    ".ipc": "ipc",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
}
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "ipc", b"PK\x03\x04": "npz"}
_LIBSVM_LINE = re.compile(rb"\s*[^\s:]+(\s+(qid:\d+|-?\d+:\S+))+\s*(#.*)?")


@dataclass(frozen=True)
class Wanted:
    """How to read a table, and what is known of it.

    Attributes:
      label: name or index of the label column, or an NPZ file's key; None is the usual.
      separator: between the cells of a text; None judges.
      encoding: of a text; None judges.
      header: whether a text's first line has names; None judges.
      expected: names of the model's columns; none to train one.
      predicting: whether labels may be absent.
      label_key: an NPZ file's key of the labels that the model was trained on.
      budget: what the table must not exceed.
    """

    label: str | None = None
    separator: str | None = None
    encoding: str | None = None
    header: bool | None = None
    expected: tuple[str, ...] = ()
    predicting: bool = False
    label_key: str | None = None
    budget: MemoryBudget = MemoryBudget(2**62)


@dataclass(frozen=True)
class Cells:
    """Columns of cells.

    Attributes:
      frame: the columns, null where a cell is missing.
      names: of the columns, empty for one without; or None.
      source: where they come from, in words.
      place: says where a row is.
      strings: returns some columns, by their indices, as they are written.
      decimal_comma: whether numbers in texts have a comma for a point.
      notes: what a user should know of the reading.
    """

    frame: pl.DataFrame
    names: tuple[str, ...] | None
    source: str
    place: Callable[[int], str]
    strings: Callable[[Sequence[int]], pl.DataFrame]
    decimal_comma: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrays:
    """Features and labels as arrays.

    Attributes:
      features: [n, d] floats, dense or CSR, or [n, h, w] and [n, h, w, c] images.
      labels: [n] whatever the file has, or None.
      names: of the features, or None.
      label_key: an NPZ file's key of the labels, or None.
    """

    features: Any
    labels: np.ndarray | None
    names: tuple[str, ...] | None = None
    label_key: str | None = None


def read_digits() -> Arrays:
    """The 1,797 digits of 8 by 8 pixels that scikit-learn brings."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return Arrays(digits.images, digits.target, tuple(digits.feature_names))


def read_contents(path: Path, wanted: Wanted) -> Cells | Arrays:
    """Reads a table of any format that is known by its name or its first bytes.

    Args:
      path: the file, compressed or not.
      wanted: how to read it.

    Returns:
      What it holds.

    Raises:
      TableError: the file is missing, damaged, too large, or of no known format.
    """
    ending = endings(path)[0]
    if ending == ".npz":
        return _read_npz(path, wanted)
    data = read_unpacked(path, wanted.budget, TableError, "the table")
    if not data:
        raise TableError(f"{path} is empty.")
    if ending in _COLUMNAR:
        return _read_columnar(data, _COLUMNAR[ending], str(path), wanted)
    if ending in (".csv", ".tsv"):
        return _read_text(data, str(path), wanted)
    if ending in (".svm", ".svmlight", ".libsvm"):
        return _read_libsvm(data, path)
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            if kind == "npz":
                return _read_npz(path, wanted)
            return _read_columnar(data, kind, str(path), wanted)
    if _is_libsvm(data):
        return _read_libsvm(data, path)
    if ending in (".xls", ".xlsx", ".ods", ".pkl", ".json", ".arff"):
        raise TableError(
            f"{path} is of no known format; save it as .csv, .parquet, .feather, "
            ".ndjson, .npz or .libsvm."
        )
    return _read_text(data, str(path), wanted)


def _read_text(data: bytes, source: str, wanted: Wanted) -> Cells:
    """Reads cells that some character divides."""
    data, guessed = decode(data, source, wanted.encoding)
    layout = read_layout(
        data,
        source,
        wanted.budget,
        separator=wanted.separator,
        header=wanted.header,
        expected=wanted.expected,
        label=wanted.label,
    )
    table = parse(data, layout, source, wanted.budget)
    notes = layout.notes
    if guessed is not None:
        notes = (f"{source} is read as {guessed}, by its bytes", *notes)
    return Cells(
        table.frame,
        layout.names,
        source,
        table.place,
        table.strings,
        layout.decimal_comma,
        notes,
    )


def _read_columnar(data: bytes, kind: str, source: str, wanted: Wanted) -> Cells:
    """Reads Parquet, Feather or NDJSON."""
    try:
        with panics_as_errors():
            frame = _columns(data, kind, source, wanted.budget)
    except TableError:
        raise
    except (pl.exceptions.PolarsError, *_MALFORMED, OSError) as error:
        raise TableError(f"{source} cannot be read ({first_line(error)}).") from error
    # Floats have NaN where a cell is missing, as text has nothing.
    floats = pl.selectors.float()
    frame = frame.with_columns(floats.fill_nan(None))
    return Cells(
        frame,
        tuple(frame.columns),
        source,
        "row {}".format,
        lambda i: frame[:, list(i)],
    )


def _columns(data: bytes, kind: str, source: str, budget: MemoryBudget) -> pl.DataFrame:
    """Reads columns, after their size."""
    what = f"{source} as columns"
    if kind == "ndjson":
        budget.require(_ndjson_bytes(data, source), what, TableError)
        return pl.read_ndjson(data, infer_schema_length=None)
    scan = {"parquet": pl.scan_parquet, "ipc": pl.scan_ipc}[kind]
    lazy = scan(io.BytesIO(data))
    width = len(lazy.collect_schema())
    rows = lazy.select(pl.len()).collect().item()
    budget.require(rows * width * CELL_BYTES, what, TableError)
    return lazy.collect()


def _ndjson_bytes(data: bytes, source: str) -> int:
    """Returns what the columns of NDJSON take: every key has a cell in every row."""
    import msgspec

    decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
    # Of each key, whether its values are true and false; None where all are missing.
    flags: dict[str, bool | None] = {}
    rows = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                cells = decoder.decode(line)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise TableError(
                    f"{source}: line {number} is no JSON object ({first_line(error)})."
                ) from error
            for key, value in cells.items():
                first = bytes(value)[:1]
                known = flags.setdefault(key, None)
                flag = known if first == b"n" else first in b"tf"
                flags[key] = flag
                if known not in (None, flag):
                    shown = bytes(value)[:_SHOWN].decode(errors="replace")
                    raise TableError(
                        f"{source}: line {number} has {shown} in {key!r}, where other "
                        "lines have values of another type."
                    )
            rows += 1
    return rows * len(flags) * CELL_BYTES


def _is_libsvm(data: bytes) -> bool:
    """Whether the first lines are a label and then features by number."""
    lines = [line for line in data[:_HEAD].splitlines()[:20] if line.strip()]
    lines = [line for line in lines if not line.lstrip().startswith(b"#")]
    return bool(lines) and _LIBSVM_LINE.fullmatch(lines[0]) is not None


def _read_libsvm(data: bytes, path: Path) -> Arrays:
    """Reads lines such as `2 1:0.5 7:1`: a label, then the features that are not 0.

    A feature's number is its column, whether a file counts from 0 or from 1 (and so has
    an empty column 0): what one file counts from cannot be told from its features, and
    a model must find the same ones in the next file.
    """
    try:
        features, labels = parse_text(data, path, np.dtype(np.float64))
    except ValueError as error:
        raise TableError(first_line(error)) from error
    return Arrays(features, labels)


def _read_npz(path: Path, wanted: Wanted) -> Arrays:
    """Reads `X` and `y`, Keras's `x_train` and `y_train`, or a matrix of SciPy's.

    The size that an array declares is held against the file and the budget first.
    """
    try:
        with open_regular(path, TableError, "the table") as file:
            with zipfile.ZipFile(file) as archive:
                keys = [name.removesuffix(".npy") for name in archive.namelist()]
                read = functools.partial(_read_member, archive, path, wanted.budget)
                if set(keys) >= _SPARSE_KEYS:
                    return Arrays(_read_sparse(read, path, wanted.budget), None)
                return _read_arrays(read, keys, path, wanted)
    except TableError:
        raise
    except (*DAMAGED, *_MALFORMED) as error:
        raise TableError(
            f"{path} cannot be read as an NPZ file ({first_line(error)})."
        ) from error


# What zipfile and NumPy raise at a file that is damaged or something else.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    zipfile.BadZipFile,
)


def _read_member(
    archive: zipfile.ZipFile, path: Path, budget: MemoryBudget, key: str
) -> np.ndarray:
    """Reads an array of an NPZ file."""
    member = archive.getinfo(key if key in archive.NameToInfo else f"{key}.npy")
    with archive.open(member) as file:
        try:
            with malformed_arrays():
                version = np.lib.format.read_magic(file)
                header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = header(file)
        except ValueError as error:
            raise TableError(
                f"{path}: {key!r} is not an array ({first_line(error)})."
            ) from error
        size = int(np.prod(shape, dtype=object)) * max(dtype.itemsize, 1)
        budget.require(size, f"{key!r} of {path}", TableError)
        if dtype.hasobject:
            budget.require(member.file_size, f"{key!r} of {path}", TableError)
            return read_object_array(file, shape, f"{path}: {key!r}")
        if size > member.file_size:
            raise TableError(
                f"{path}: {key!r} has {member.file_size:,} bytes, not the {size:,} "
                "that it declares."
            )
    with archive.open(member) as file, malformed_arrays():
        values = np.lib.format.read_array(file, allow_pickle=False)
    if values.dtype == np.dtype("V2"):
        # What NumPy writes of bfloat16, which it does not know.
        import ml_dtypes

        values = values.view(ml_dtypes.bfloat16).astype(np.float32)
    return values


def _read_arrays(
    read: Callable[[str], np.ndarray], keys: Sequence[str], path: Path, wanted: Wanted
) -> Arrays:
    """Reads the arrays of an NPZ file that is dense."""
    features = next((key for key in _FEATURE_KEYS if key in keys), None)
    if features is None:
        raise TableError(
            f"{path} has no array `X`, `x` or `data`; it has {listed(keys)}."
        )
    candidates = _LABEL_KEYS if wanted.label is None else (wanted.label,)
    if wanted.label is None and wanted.label_key not in (None, *_FEATURE_KEYS):
        candidates = (wanted.label_key, *_LABEL_KEYS)
    label = next((key for key in candidates if key in keys), None)
    if label is None and not wanted.predicting:
        named = " or ".join(f"`{key}`" for key in candidates)
        raise TableError(f"{path} has no labels {named}; it has {listed(keys)}.")
    names = None
    if "feature_names" in keys:
        names = tuple(str(name) for name in read("feature_names"))
    labels = None if label is None else read(label)
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return Arrays(read(features), labels, names, label)


def _read_sparse(
    read: Callable[[str], np.ndarray], path: Path, budget: MemoryBudget
) -> Any:
    """Reads what `scipy.sparse.save_npz` wrote, checked before SciPy's loops see it."""
    import scipy.sparse

    kind = str(np.char.decode(np.asarray(read("format"), "S"), "ascii"))
    rows, columns = map(int, read("shape"))
    if min(rows, columns) < 0:
        raise TableError(f"{path} has the shape {(rows, columns)}.")
    # The pointers of the rows, and the coefficients of a class, have to be made.
    budget.require(
        8 * (rows + columns), f"{path} of {rows:,} x {columns:,}", TableError
    )
    data = read("data")
    if data.dtype.kind not in "buif":
        raise TableError(f"{path}: the features are {data.dtype}, not numbers.")
    if kind == "coo":
        places = read("row"), read("col")
        for each, size in zip(places, (rows, columns), strict=True):
            if each.dtype.kind not in "iu" or each.shape != data.shape:
                raise TableError(f"{path}: its indices are no integers, one an entry.")
            if len(each) and not (each.min() >= 0 and each.max() < size):
                raise TableError(f"{path} has an index that is out of bounds.")
        return scipy.sparse.coo_matrix((data, places), (rows, columns)).tocsr()
    if kind == "dia":
        offsets = read("offsets")
        if data.ndim != 2 or offsets.shape != data.shape[:1]:
            raise TableError(f"{path} has diagonals that do not fit.")
        far = [place for place in offsets.tolist() if not -rows < place < columns]
        if offsets.dtype.kind not in "iu" or far:
            raise TableError(f"{path} has a diagonal that is out of bounds.")
        budget.require(16 * data.size, f"{path} of {data.size:,} entries", TableError)
        return scipy.sparse.dia_matrix((data, offsets), (rows, columns)).tocsr()
    if kind not in ("csr", "csc", "bsr"):
        raise TableError(f"{path} is sparse in the form {kind!r}, which is not known.")
    parts = data, read("indices"), read("indptr")
    try:
        height, width = data.shape[1:] if kind == "bsr" else (1, 1)
        shape = rows // height, columns // width
        if (shape[0] * height, shape[1] * width) != (rows, columns):
            raise ValueError("its blocks do not fit its shape")
        check_sparse(*parts, (shape[1], shape[0]) if kind == "csc" else shape)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise TableError(f"{path}: {first_line(error)}") from error
    matrix = getattr(scipy.sparse, f"{kind}_matrix")(parts, shape=(rows, columns))
    return matrix.tocsr()
