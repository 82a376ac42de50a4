"""Sparse features without their empty columns, whose coefficients are 0.

A column in which no row has an entry takes part in no logit, so a solver that begins at
0 leaves its coefficients there. Hashed features have 10⁷ columns, of which some rows
fill a few thousand: the solvers work with these, and [V, d] is the result alone.
"""

import copy
import dataclasses
from typing import Any

import numpy as np

from jaxsoft.training.regression.inputs import (
    Columns,
    Matrix,
    Rows,
    SourceFeatures,
    is_sparse,
)
from jaxsoft.training.regression.sources import SparseRows

__all__ = ["without_empty_columns"]

# Where more of the columns are in use, there is little to save.
_LARGEST_SHARE = 0.5
# Indices that are read from disk at a time.
_INDICES_AT_A_TIME = 2**22


def without_empty_columns(rows: Rows, start: np.ndarray | None = None) -> Rows:
    """Returns rows whose features are the columns in use.

    Args:
      rows: of which sparse features lose their empty columns where these are half of
        them or more; others stay as they are. Nothing of the size of [n, d] is made.
      start: [V, d] coefficients that a solver begins at, or None: a column in use is
        also one with a coefficient that is not 0.

    Example:
      >>> import scipy.sparse
      >>> features = scipy.sparse.csr_array(([1.0, 2.0], ([0, 1], [7, 3])), (2, 9))
      >>> labels = np.arange(2, dtype=np.int32)
      >>> rows = Rows(features, labels, labels, None, np.ones(2))
      >>> found = without_empty_columns(rows)
      >>> print(found.columns.index, found.features.shape, found.width)
      [3 7] (2, 2) 9
    """
    features = rows.features
    indices = _indices(features)
    if indices is None:
        return rows
    width = features.shape[1]
    # SciPy and the file both have an entry at least for each column in use.
    used = np.zeros(width, bool)
    for first in range(0, len(indices), _INDICES_AT_A_TIME):
        used[indices[first : first + _INDICES_AT_A_TIME]] = True
    if start is not None and start.shape[-1] == width:
        used |= np.any(start != 0, axis=0)
    index = np.flatnonzero(used)
    # No column at all is a shape that solvers need not know.
    index = index if len(index) else np.zeros(1, index.dtype)
    if len(index) > _LARGEST_SHARE * width:
        return rows
    return dataclasses.replace(
        rows, features=_take(features, index), columns=Columns(index, width)
    )


def _indices(features: Matrix) -> np.ndarray | None:
    """Returns the columns of all entries, or None of what is not sparse."""
    if isinstance(features, SourceFeatures):
        source = features.source
        return source.indices if isinstance(source, SparseRows) else None
    return features.indices if is_sparse(features) else None


def _take(features: Matrix, index: np.ndarray) -> Matrix:
    """Returns sparse features of some columns, which have all of the entries."""
    if isinstance(features, SourceFeatures):
        source: Any = features.source
        places: Any = _Places(source.indices, index)
        # The source's own arrays were looked at, all of them, when it was made.
        narrow = copy.copy(source)
        narrow.indices, narrow.num_features = places, len(index)
        return SourceFeatures(narrow, features.dtype)
    assert is_sparse(features)
    places = np.searchsorted(index, features.indices).astype(np.int32)
    parts = features.data, places, features.indptr
    return type(features)(parts, shape=(features.shape[0], len(index)))


class _Places:
    """Indices on disk as those of the columns in use, looked up when they are read."""

    def __init__(self, indices: np.ndarray, index: np.ndarray):
        self._indices, self._index = indices, index

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, entries: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._index, self._indices[entries])
