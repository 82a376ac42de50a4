"""libsvm files as memory-mapped sparse rows: read once, in chunks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from jaxsoft._core import checks
from jaxsoft.training.errors import SvmlightError
from jaxsoft.training.files import map_array, open_unpacked
from jaxsoft.training.regression.sources import SparseRows
from jaxsoft.training.schemas import decode_file
from jaxsoft.training.unfinished import unfinished_folder

__all__ = ["load_svmlight_memmap", "parse_text", "svmlight_to_memmap"]

_ARRAYS = ("data", "indices", "indptr", "labels")
_FORMAT = 1


@dataclass(frozen=True)
class _About:
    """What `about.json` says."""

    format: int
    num_features: int


def svmlight_to_memmap(
    path: str | Path,
    folder: str | Path,
    *,
    num_features: int | None = None,
    zero_based: bool | Literal["auto"] = True,
    dtype: Any = np.float32,
    chunk_bytes: int = 1 << 24,
) -> tuple[SparseRows, np.ndarray]:
    r"""Converts a libsvm file to memory-mapped arrays, whose rows are read at random.

    The file is read once, `chunk_bytes` at a time, whatever its size. The folder
    appears when it is complete. It takes 8 bytes an entry in float32, and 16 a row.

    Args:
      path: the file, in plain text, or compressed where its name ends in .gz, .bz2,
        .xz or .zst.
      folder: where the arrays go; it must not exist.
      num_features: d; None takes what the file's features need.
      zero_based: whether a feature's number is its column, as in `jaxsoft regress`, so
        that all files agree; False takes 1 from each number, and "auto" does so where
        no row has a feature 0.
      dtype: of the entries, float32 or float64.
      chunk_bytes: how much of the file is in memory at a time.

    Returns:
      The rows, and the labels [N] float64; both memory-mapped.

    Raises:
      FileExistsError: if the folder is there; `load_svmlight_memmap` reads it.
      SvmlightError: if the file cannot be read, has no row, or has a line that is
        wrong, which the message names; nothing is left of the folder.
      TypeError: if an argument has a wrong type.
      ValueError: if it is out of its range.

    Notes:
      Lines are scikit-learn's `load_svmlight_file`'s: comments and `qid` are left out,
      and several labels a row are refused.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> root = Path(tempfile.mkdtemp())
      >>> _ = (root / "rows.svm").write_text("1 1:0.5 3:2\n0 2:1\n")
      >>> rows, labels = svmlight_to_memmap(root / "rows.svm", root / "rows")
      >>> print(rows.read(np.array([0, 1]), np.float32), labels)
      [[0.  0.5 0.  2. ]
       [0.  0.  1.  0. ]] [1. 0.]

    References:
      Chang and Lin, LIBSVM: A library for support vector machines, 2011.
    """
    path, folder, dtype = Path(path), Path(folder), np.dtype(dtype)
    if dtype.name not in ("float32", "float64"):
        raise TypeError(f"`dtype` must be float32 or float64, got {dtype}.")
    checks.positive_integer("chunk_bytes", chunk_bytes)
    if num_features is not None:
        checks.positive_integer("num_features", num_features)
    if folder.exists():
        raise FileExistsError(
            f"`folder` must not exist, got {folder}; load_svmlight_memmap reads it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(folder) as made:
        with _Writers(made, dtype) as writers:
            for number, lines in _chunks(path, chunk_bytes):
                writers.add(*_parse(lines, path, number, dtype))
        features = writers.finish(path, num_features, zero_based)
        about = _About(_FORMAT, features)
        text = json.dumps(asdict(about))
        (made / "about.json").write_text(text, encoding="utf-8")
        made.rename(folder)
    return load_svmlight_memmap(folder)


def load_svmlight_memmap(folder: str | Path) -> tuple[SparseRows, np.ndarray]:
    """Opens what `svmlight_to_memmap` made.

    Args:
      folder: where the arrays are.

    Returns:
      The rows, and the labels [N] float64; both memory-mapped.

    Raises:
      SvmlightError: if the folder is none of that function's, or not whole.
    """
    folder = Path(folder)
    try:
        about = decode_file(folder / "about.json", _About, ValueError)
        if about.format != _FORMAT:
            raise ValueError(f"its format is {about.format}, not {_FORMAT}")
        data, indices, indptr, labels = (
            map_array(folder / f"{name}.npy", ValueError) for name in _ARRAYS
        )
        rows = SparseRows(data, indices, indptr, about.num_features)
        if labels.dtype != np.float64 or labels.shape != (len(rows),):
            raise ValueError(
                f"its labels are {labels.dtype} of shape {labels.shape}, not float64 "
                f"of shape {(len(rows),)}"
            )
        return rows, labels
    except (ValueError, TypeError) as error:
        raise SvmlightError(
            f"{folder} holds no rows by svmlight_to_memmap: "
            f"{str(error).rstrip('.')}. Convert the file again."
        ) from error


class _Writers:
    """The four arrays while they grow; a context manager."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self._files = {
            name: _GrowingArray(folder / f"{name}.npy", kind)
            for name, kind in zip(
                _ARRAYS, (dtype, np.int32, np.int64, np.float64), strict=True
            )
        }
        self._folder, self._entries = folder, 0
        self._least, self._most = np.iinfo(np.int32).max, -1
        self._files["indptr"].add(np.zeros(1, np.int64))

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, rows: Any, labels: np.ndarray) -> None:
        """Adds the rows of a chunk, a SciPy matrix, with their labels."""
        self._files["data"].add(rows.data)
        self._files["indices"].add(rows.indices)
        self._files["indptr"].add(rows.indptr[1:].astype(np.int64) + self._entries)
        self._files["labels"].add(labels)
        self._entries += len(rows.data)
        if len(rows.indices):
            self._least = min(self._least, int(rows.indices.min()))
            self._most = max(self._most, int(rows.indices.max()))

    def finish(
        self, path: Path, num_features: int | None, zero_based: bool | str
    ) -> int:
        """Numbers the features from 0; returns how many there are."""
        if not self._files["labels"].count:
            raise SvmlightError(f"{path} must have a row, got none.")
        from_one = self._least > 0 if zero_based == "auto" else not zero_based
        if from_one and self._most >= 0:
            if self._least < 1:
                raise SvmlightError(
                    f"{path}: a feature has index 0, which `zero_based` False rules "
                    "out. Set `zero_based` to True."
                )
            indices = np.load(self._folder / "indices.npy", mmap_mode="r+")
            for start in range(0, len(indices), 1 << 20):
                indices[start : start + (1 << 20)] -= 1
            indices.flush()
        found = self._most + (not from_one)
        if num_features is not None and num_features < found:
            raise SvmlightError(
                f"{path} must have at most {num_features} features, got {found}; "
                "correct `num_features`."
            )
        return max(found, 1) if num_features is None else num_features


class _GrowingArray:
    """A .npy file that grows at its end.

    NumPy leaves room in the header for a longer shape; it is written again at the end.
    """

    def __init__(self, path: Path, dtype: Any):
        self._file: BinaryIO = path.open("wb")
        self._dtype, self.count = np.dtype(dtype), 0
        self._header()
        self._start = self._file.tell()

    def add(self, values: np.ndarray) -> None:
        """Adds values at the end."""
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        """Writes the length."""
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._start
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.count,),
            },
        )


def _chunks(path: Path, size: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yields whole lines of about `size` bytes, with the number of the first."""
    number = 1
    with open_unpacked(path, SvmlightError) as file:
        while lines := file.readlines(size):
            yield number, lines
            number += len(lines)


def parse_text(data: bytes, path: Path, dtype: np.dtype) -> tuple[Any, np.ndarray]:
    """Parses a libsvm file that is in memory.

    Args:
      data: what it holds.
      path: of the file, for messages.
      dtype: of the entries.

    Returns:
      The rows, as CSR, and the labels [N] float64.

    Raises:
      SvmlightError: a line is wrong, which the message names.
    """
    return _parse(data.splitlines(keepends=True), path, 1, dtype)


def _parse(
    lines: list[bytes], path: Path, number: int, dtype: np.dtype
) -> tuple[Any, np.ndarray]:
    """Parses lines; `number` is that of the first."""
    try:
        return _load(lines, dtype)
    except (ValueError, OverflowError):
        # The first half that is wrong has the first line that is.
        while len(lines) > 1:
            half = len(lines) // 2
            try:
                _load(lines[:half], dtype)
                lines, number = lines[half:], number + half
            except (ValueError, OverflowError):
                lines = lines[:half]
        try:
            _load(lines, dtype)
        except (ValueError, OverflowError) as error:
            reason = str(error).rstrip(".")
            raise SvmlightError(f"{path}, line {number}: {reason}.") from error
        raise


def _load(lines: list[bytes], dtype: np.dtype) -> tuple[Any, np.ndarray]:
    from sklearn.datasets import load_svmlight_file

    options: dict[str, Any] = {"dtype": dtype, "zero_based": True}
    rows, labels = load_svmlight_file(io.BytesIO(b"".join(lines)), **options)[:2]
    for name, values in (("feature", rows.data), ("label", labels)):
        if not np.isfinite(values).all():
            raise ValueError(f"a {name} is not finite")
    if len(rows.indices) and rows.indices.min() < 0:
        raise ValueError("a feature has a negative index")
    return rows, np.asarray(labels, np.float64)
