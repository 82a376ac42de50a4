"""Rows of zeros at the end of arrays, so that few shapes are compiled for."""

import numpy as np

__all__ = ["bucket", "pad_rows"]


def bucket(count: int) -> int:
    """Returns the least of eight sizes between powers of 2 that holds some rows."""
    step = 2 ** max(0, count.bit_length() - 4)
    return -(-count // step) * step


def pad_rows(array: np.ndarray, count: int) -> np.ndarray:
    """Returns an array with rows of zeros up to a number of rows."""
    missing = count - len(array)
    if not missing:
        return array
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
