"""Predictions of a trained head, some rows at a time."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from numpy.typing import DTypeLike

from jaxsoft.training.heads import Head, Params
from jaxsoft.training.regression.padding import pad_rows, rows_within
from jaxsoft.training.regression.sources import RowSource

__all__ = ["log_probs", "top_classes"]

# Log-probabilities of a block of rows take about as much.
_BLOCK_BYTES = 1 << 25
_MOST_ROWS = 1024
# A head's search for the best class goes down with many rows at once: 1.2 ms a row of
# 100,000 classes at 512 rows, against 5 at 64, and 6 for all log-probabilities.
_SEARCHED = 512


def log_probs(
    head: Head, source: RowSource, *, dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Log-probabilities of all classes.

    Args:
      head: of `jaxsoft.nn`, whose call gives log-probabilities: hierarchical or
        adaptive.
      source: N rows.
      dtype: of the features.

    Returns:
      `[N, V]`, the only array of that size.
    """
    graph, state = nnx.split(head)
    size = _BLOCK_BYTES // (np.dtype(dtype).itemsize * head.num_classes)
    scores = None
    for start, features, count in _blocks(source, min(size, _MOST_ROWS), dtype):
        block = np.asarray(_log_probs(graph, state, features))[:count]
        if scores is None:
            scores = np.empty((len(source), head.num_classes), block.dtype)
        scores[start : start + count] = block
    return np.empty((0, head.num_classes), dtype) if scores is None else scores


def top_classes(
    head: Head, source: RowSource, *, dtype: DTypeLike = np.float32
) -> np.ndarray:
    """The most probable class of each row, the lowest of equals.

    Args:
      head: hierarchical or adaptive.
      source: N rows.
      dtype: of the features.

    Returns:
      `[N]` int32.
    """
    graph, state = nnx.split(head)
    best = np.empty(len(source), np.int32)
    for start, features, count in _blocks(source, _SEARCHED, dtype):
        ids = np.asarray(_top_classes(graph, state, features))
        best[start : start + count] = ids[:count]
    return best


def _blocks(
    source: RowSource, size: int, dtype: DTypeLike
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields a start, features of one shape, and how many of their rows count."""
    size = min(size, rows_within(_BLOCK_BYTES, source.num_features, dtype))
    size = max(1, min(size, len(source)))
    for start in range(0, len(source), size):
        rows = np.arange(start, min(start + size, len(source)))
        features = source.read(rows, dtype)
        yield start, pad_rows(features, size), len(rows)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(
    graph: nnx.GraphDef[Head], state: Params, features: jax.Array
) -> jax.Array:
    return nnx.merge(graph, state)(features)


@functools.partial(jax.jit, static_argnums=0)
def _top_classes(
    graph: nnx.GraphDef[Head], state: Params, features: jax.Array
) -> jax.Array:
    _, ids = nnx.merge(graph, state).top_k(features, 1)
    return ids[:, 0]
