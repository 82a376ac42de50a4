"""Where a minibatch solver reads its rows: arrays in memory, on disk, or sparse.

A source reads the rows of one batch and nothing else, so it may be larger than memory.
The order of the rows is a function of the seed and of the epoch: a run that is resumed
goes on with the batch that it would have read.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike
from scipy.sparse import sparray, spmatrix

from jaxsoft._core import checks

__all__ = [
    "BatchOrder",
    "DenseRows",
    "RowSource",
    "SparseRows",
    "as_source",
    "check_matrix",
    "check_sparse",
]

# Entries that are checked at a time.
_PART = 1 << 22


@runtime_checkable
class RowSource(Protocol):
    """Rows of features, read by their numbers."""

    # Entries of a row.
    num_features: int

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(self, rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """Reads some rows.

        Args:
          rows: [B] integers in [0, N), ascending where that makes reading faster.
          dtype: of the result.

        Returns:
          [B, num_features], dense.
        """
        ...


class DenseRows:
    """Rows of an array, in memory or memory-mapped; a `RowSource`."""

    def __init__(self, array: np.ndarray):
        """Keeps the array, of which a memory-mapped one stays on disk.

        Args:
          array: [N, d] numbers or booleans.

        Raises:
          TypeError: if it holds anything else.
          ValueError: if it has another number of axes.
        """
        if array.dtype.kind not in "biuf":
            raise TypeError(f"`array` must hold real numbers, got dtype {array.dtype}.")
        if array.ndim != 2:
            raise ValueError(f"`array` must have shape [N, d], got {array.shape}.")
        self._array, self.dtype = array, array.dtype
        self.num_features: int = array.shape[1]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._array)

    def read(self, rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """Reads rows; see `RowSource.read`."""
        return np.asarray(self._array[rows], dtype)


class SparseRows:
    """Rows of a matrix in compressed sparse rows; a `RowSource`.

    The three arrays may be memory-mapped: those of the rows of a batch are all that is
    read. Entries of equal place add, as in SciPy.

    Attributes:
      data: [nnz], the entries.
      indices: [nnz], their columns.
      indptr: [N + 1], where each row starts in the other two.
    """

    def __init__(
        self,
        data: np.ndarray,
        indices: np.ndarray,
        indptr: np.ndarray,
        num_features: int,
    ):
        """Keeps the arrays, after a look at all of `indices` and `indptr` in parts.

        Args:
          data: [nnz] numbers.
          indices: [nnz] integers in [0, num_features).
          indptr: [N + 1] integers, ascending from 0 to nnz.
          num_features: d.

        Raises:
          TypeError: if `data` holds no real numbers.
          ValueError: if `check_sparse` refuses the arrays.
        """
        if data.dtype.kind not in "biuf":
            raise TypeError(f"`data` must hold real numbers, got dtype {data.dtype}.")
        if data.ndim != 1:
            raise ValueError(f"`data` must have shape [nnz], got {data.shape}.")
        self.num_features: int = checks.positive_integer("num_features", num_features)
        check_sparse(data, indices, indptr, (len(indptr) - 1, self.num_features))
        self.data, self.indices, self.indptr = data, indices, indptr

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    def read(self, rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """Reads rows; see `RowSource.read`."""
        starts = np.asarray(self.indptr[rows], np.int64)
        counts = np.asarray(self.indptr[rows + 1], np.int64) - starts
        ends = np.cumsum(counts)
        # Position of each entry in `data`: its row's start and its place in the row.
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            starts - ends + counts, counts
        )
        dense = np.zeros((len(rows), self.num_features), dtype)
        cells = np.repeat(np.arange(len(rows)), counts), self.indices[places]
        np.add.at(dense, cells, self.data[places].astype(dtype))
        return dense


def as_source(features: object) -> RowSource:
    """Makes a source of whatever holds rows of features.

    Args:
      features: a `RowSource`; a NumPy array [N, d], memory-mapped or not; a SciPy
        sparse matrix; or what `np.asarray` takes, such as a JAX array.

    Returns:
      The source, which copies nothing but a sparse matrix that is not in rows.

    Raises:
      TypeError: if the features are no real numbers.
      ValueError: if they are no matrix, or `check_sparse` refuses them.

    Example:
      >>> import numpy as np
      >>> source = as_source(np.eye(3))
      >>> print(len(source), source.read(np.array([2]), np.float32))
      3 [[0. 0. 1.]]
    """
    if isinstance(features, RowSource):
        return features
    if isinstance(features, sparray | spmatrix):
        matrix: Any = features
        check_matrix(matrix)
        rows = matrix.tocsr()
        used = slice(rows.indptr[-1])
        return SparseRows(
            rows.data[used], rows.indices[used], rows.indptr, rows.shape[1]
        )
    if not isinstance(features, np.ndarray):
        features = np.asarray(features)
    return DenseRows(features)


def check_sparse(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    shape: tuple[int, int],
) -> None:
    """Raises `ValueError` unless three arrays are a sparse matrix.

    SciPy's and NumPy's loops over them do not look whether they stay within bounds.
    They are read a part at a time, so they may be memory-mapped.

    Args:
      data: [nnz, ...], the entries or, of BSR, blocks.
      indices: [nnz] integers in [0, shape[1]).
      indptr: [shape[0] + 1] integers, never falling, from 0 to nnz.
      shape: rows and columns; of CSC columns and rows, of BSR those of blocks.
    """
    for name, array in (("indices", indices), ("indptr", indptr)):
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(
                f"`{name}` must be integers of one axis, got {array.dtype} of shape "
                f"{array.shape}."
            )
    if len(indptr) != shape[0] + 1 or not len(indptr):
        raise ValueError(
            f"`indptr` must have {shape[0] + 1} entries, got {len(indptr)}."
        )
    entries = len(np.atleast_1d(data))
    if indptr[-1] != entries or entries != len(indices):
        raise ValueError(
            "`indptr` must end with the length of `data` and `indices`, got "
            f"{indptr[-1]} for {entries} and {len(indices)}."
        )
    # Parts overlap by one entry, so that no fall is between two.
    falls = any((part[1:] < part[:-1]).any() for part in _parts(indptr, 1))
    if indptr[0] != 0 or falls:
        raise ValueError("`indptr` must begin with 0 and never fall.")
    for part in _parts(indices):
        least, most = part.min(), part.max()
        if least < 0 or most >= shape[1]:
            raise ValueError(
                f"`indices` must be in [0, {shape[1]}), got one of "
                f"{least if least < 0 else most}."
            )


def check_matrix(matrix: Any) -> None:
    """Raises `ValueError` unless a matrix of SciPy's is sound; see `check_sparse`."""
    shape = matrix.shape
    if matrix.format == "csc":
        shape = shape[::-1]
    elif matrix.format == "bsr":
        shape = tuple(np.floor_divide(shape, matrix.blocksize))
    elif matrix.format != "csr":
        return
    # SciPy's arrays may be longer than what is used of them.
    used = slice(matrix.indptr[-1])
    check_sparse(matrix.data[used], matrix.indices[used], matrix.indptr, shape)


def _parts(array: np.ndarray, more: int = 0) -> Iterator[np.ndarray]:
    """Yields an array in parts, each with some entries of the next."""
    for start in range(0, len(array), _PART):
        yield array[start : start + _PART + more]


class BatchOrder:
    """Which rows each step reads: all of them once an epoch, shuffled anew each time.

    A row number of -1 is padding. Epochs are whole numbers of batches, so the last
    batch of one has padding where the batch size does not divide the rows.

    NumPy's permutations serve, and not Grain's shuffle, which takes 20 microseconds a
    row: 4 seconds for an epoch of 200,000 rows, against 4 milliseconds.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        """Fixes the order.

        Args:
          num_rows: N, at least 1.
          batch_size: B.
          seed: with the number of the epoch, all that the order depends on.
        """
        self._num_rows, self._batch_size, self._seed = num_rows, batch_size, seed
        self.steps_per_epoch: int = math.ceil(num_rows / batch_size)
        self._epoch, self._shuffled = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of a step, [B], ascending, padding last."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch])
            self._epoch, self._shuffled = epoch, order.permutation(self._num_rows)
        start = place * self._batch_size
        rows = np.sort(self._shuffled[start : start + self._batch_size])
        missing = self._batch_size - len(rows)
        return np.pad(rows, (0, missing), constant_values=-1)
