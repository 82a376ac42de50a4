"""Code lengths of least expected length under a bound."""

import numpy as np

__all__ = ["code_lengths", "least_depth"]


def least_depth(num_classes: int, arity: int) -> int:
    """Returns the depth of the shallowest tree: ceil(log_arity V), exactly."""
    depth, leaves = 0, 1
    while leaves < num_classes:
        depth, leaves = depth + 1, leaves * arity
    return depth


def code_lengths(weights: np.ndarray, arity: int, max_depth: int) -> np.ndarray:
    """Returns the optimal lengths of paths to leaves, none longer than a bound.

    Package-merge (Larmore and Hirschberg, A fast algorithm for optimal length-limited
    Huffman codes, 1990): a leaf of length l is l items, one for each level; items of a
    level and packages of `arity` of the level below are merged by weight, and the
    cheapest items of the top level that fill the tree are taken. Since leaves are
    merged in the order of their weights, those taken at a level are its lightest: only
    their number is kept.

    Args:
      weights: [V] finite, not negative, ascending; V >= 2.
      arity: at least 2.
      max_depth: at least ceil(log_arity V).

    Returns:
      [V] int64 lengths, not ascending. With empty leaves added at the deepest level,
      they fill a tree whose nodes all have `arity` children.
    """
    empty = -(len(weights) - 1) % (arity - 1)
    weights = np.concatenate([np.zeros(empty), weights])
    count = len(weights)
    # An entry says where a level's packages come among the leaves, the deepest first.
    levels: list[np.ndarray] = []
    packages = np.zeros(0)
    for _ in range(max_depth):
        before = np.searchsorted(weights, packages, side="right")
        levels.append(before + np.arange(len(packages)))
        merged = np.empty(count + len(packages))
        is_package = np.zeros(len(merged), bool)
        is_package[levels[-1]] = True
        merged[is_package] = packages
        merged[~is_package] = weights
        whole = len(merged) // arity * arity
        packages = merged[:whole].reshape(-1, arity).sum(axis=1)
    taken = arity * (count - 1) // (arity - 1)
    lengths = np.zeros(count + 1, np.int64)
    for places in reversed(levels):
        packed = int(np.searchsorted(places, taken))
        lengths[0] += 1
        lengths[taken - packed] -= 1
        taken = arity * packed
    return np.cumsum(lengths)[empty:count]
