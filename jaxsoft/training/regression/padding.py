"""Rows of zeros at the end of arrays, so that few shapes are compiled for."""

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["bucket", "bucket_for", "pad_rows", "rows_within"]

# Multiplications that cost nothing beside a program's compilation.
_CHEAP_WORK = 2**22
# The least number of rows where they are cheap.
_LEAST_ROWS = 1024


def bucket(count: int) -> int:
    """Returns the least of eight sizes between powers of 2 that holds some rows."""
    step = 2 ** max(0, count.bit_length() - 4)
    return -(-count // step) * step


def bucket_for(count: int, work: int) -> int:
    """Returns a size for rows that are read again and again.

    Sizes are few where rows cost little, so that fits of other sizes, and the folds of
    a cross-validation, share their programs: 1024, then powers of 2. Rows that cost
    more have the sizes of `bucket`.

    Args:
      count: number of rows.
      work: multiplications for a row.
    """
    size = max(2 ** (count - 1).bit_length(), _LEAST_ROWS)
    while size // 2 >= count and size * work > _CHEAP_WORK:
        size //= 2
    return size if size * work <= _CHEAP_WORK else bucket(count)


def rows_within(num_bytes: int, width: int, dtype: DTypeLike) -> int:
    """Returns how many dense rows take no more than some bytes, at least 1.

    Args:
      num_bytes: for all of them.
      width: entries of a row.
      dtype: of an entry.
    """
    return max(1, num_bytes // (np.dtype(dtype).itemsize * max(1, width)))


def pad_rows(array: np.ndarray, count: int) -> np.ndarray:
    """Returns an array with rows of zeros up to a number of rows."""
    missing = count - len(array)
    if not missing:
        return array
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
