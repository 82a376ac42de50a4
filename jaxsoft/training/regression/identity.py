"""What a checkpoint of a fit belongs to: its rows and its parameters."""

import hashlib
import itertools
import json
from collections.abc import Mapping

import numpy as np

from jaxsoft.training.regression.inputs import Rows, is_sparse
from jaxsoft.training.regression.padding import rows_within
from jaxsoft.training.regression.sources import RowSource

__all__ = ["fingerprint"]

# Parameters that change nothing in what a fit arrives at.
_FREE = ("checkpoint_dir", "checkpoint_seconds", "verbose", "mesh")
# Checkpoints of solvers with other states, or other coordinates, are another fit's.
_FORM = 2
# The number of rows that are read for the digest where features stay on disk.
_ROWS_READ = 1024
# Bytes of them that exist at a time.
_BYTES_READ = 2**26


def fingerprint(parameters: Mapping[str, object], solver: str, rows: Rows) -> str:
    """Returns a digest of all that a fit arrives at depends on.

    Args:
      parameters: of the estimator; functions count by their names.
      solver: the name of the solver.
      rows: what it is fitted to; of rows that stay on disk, some.
    """
    digest = hashlib.blake2b(digest_size=16)
    given = {
        name: _described(value)
        for name, value in sorted(parameters.items())
        if name not in _FREE
    }
    digest.update(json.dumps([_FORM, solver, given]).encode())
    features = rows.features
    if isinstance(features, RowSource):
        count = len(features)
        some = np.linspace(0, count - 1, min(count, _ROWS_READ)).astype(np.int64)
        step = rows_within(_BYTES_READ, features.num_features, np.float64)
        parts = (some[start : start + step] for start in range(0, len(some), step))
        read = (features.read(part, np.float64) for part in parts)
        arrays = itertools.chain([np.array([count])], read)
    elif is_sparse(features):
        arrays = [features.data, features.indices, features.indptr]
    else:
        arrays = [features]
    others = rows.labels, rows.targets, rows.weights
    for array in itertools.chain(arrays, others):
        if array is not None:
            array = np.ascontiguousarray(array)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.data)
    digest.update(json.dumps(rows.classes.tolist(), default=str).encode())
    return digest.hexdigest()


def _described(value: object) -> object:
    """Returns what JSON can hold of a parameter, the same in every process."""
    if isinstance(value, dict):
        return [[str(key), _described(value[key])] for key in sorted(value, key=str)]
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, np.generic):
        return value.item()
    name = getattr(value, "__qualname__", None)
    return name if name is not None else type(value).__qualname__
