"""Biases of a tree's nodes from the probabilities of its classes."""

from collections.abc import Iterable

import jax
import numpy as np
from numpy import typing as npt

__all__ = ["biases_along"]


def biases_along(
    paths: Iterable[jax.Array], probabilities: npt.ArrayLike
) -> np.ndarray:
    """Returns the log of each row's share of its node over the first child's.

    Args:
      paths: the fields of the `ClassPath` of all classes, each [depth, V].
      probabilities: [V] finite and positive.

    Returns:
      [V - 1] float32.

    Raises:
      ValueError: if the probabilities are not of that shape and range.
    """
    firsts, numbers, choices = (np.asarray(field) for field in paths)
    mass = np.asarray(probabilities, np.float64)
    if mass.shape != firsts.shape[1:]:
        raise ValueError(
            f"`probabilities` must have shape {firsts.shape[1:]}, got {mass.shape}."
        )
    bad = ~(np.isfinite(mass) & (mass > 0))
    if bad.any():
        raise ValueError(
            f"`probabilities` must be finite and positive, got {mass[bad][0]}."
        )
    rows = len(mass) - 1
    own, first = np.zeros(rows), np.zeros(rows)
    node = np.zeros(rows, np.int32)
    for begin, number, choice in zip(firsts, numbers, choices, strict=True):
        for_first = (number > 0) & (choice == 0)
        np.add.at(first, begin[for_first], mass[for_first])
        for_row = choice > 0
        row = begin[for_row] + choice[for_row] - 1
        np.add.at(own, row, mass[for_row])
        node[row] = begin[for_row]
    return np.log(own / first[node]).astype(np.float32)
