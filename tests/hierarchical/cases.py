"""Trees of every kind, and what their probabilities are by definition."""

import functools
import itertools
from typing import Any

import numpy as np

from jaxsoft import ClassTree
from jaxsoft.hierarchical.levels import Tables

# The first and the last are in the default tier where cases are many.
KINDS = ("wide", "balanced", "ternary", "clustered", "paths", "huffman of 4", "huffman")


@functools.cache
def tree(kind, num_classes, seed=0):
    """Returns a tree of a named kind."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, 50, num_classes) ** 2
    match kind:
        case "balanced":
            return ClassTree.balanced(num_classes)
        case "ternary":
            return ClassTree.balanced(num_classes, 3)
        case "huffman":
            return ClassTree.huffman(counts)
        case "huffman of 4":
            return ClassTree.huffman(counts, 4)
        case "clustered":
            return ClassTree.clustered(random.standard_normal((num_classes, 5)))
    names = [(c % 3, "x", c % 5, c) for c in random.permutation(num_classes)]
    if kind == "paths":
        # Classes at many depths, and nodes with one child.
        names = [name if c % 4 else name[::3] for c, name in enumerate(names)]
        names = [(0, *name) if len(name) == 4 else (1, *name) for name in names]
    return ClassTree.from_paths(names, None if kind == "wide" else 3)


def layer(tree, rows=6, features=4, dtype="float64", seed=1, scale=1.0):
    """Returns hidden states, a kernel and a bias."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((rows, features))
    kernel = scale * random.standard_normal((tree.num_rows, features))
    bias = random.standard_normal(tree.num_rows)
    return tuple(np.asarray(a, dtype) for a in (hidden, kernel, bias))


def _children(levels):
    """Returns the slots of the children of each slot from which a node hangs."""
    if isinstance(levels, Tables):
        ends = levels.node_firsts.tolist()
        spans = [range(*pair) for pair in itertools.pairwise(ends)]
        return dict(zip(levels.node_slots.tolist(), spans, strict=True))
    # The root's slot is -1; the leaves of a level come before its nodes.
    slot, first, children = -1, 0, {}
    for leaves, nodes in zip(levels.leaves, levels.nodes, strict=True):
        slot += leaves
        for _ in range(nodes):
            last = min(first + levels.arity, levels.num_slots)
            children[slot] = range(first, last)
            slot, first = slot + 1, last
    return children


def paths(tree):
    """Returns the fields of the paths of all classes, each [V, depth], by a walk."""
    levels = tree.levels
    order = range(tree.num_classes) if tree.order is None else tree.order
    ranks = itertools.count()
    if isinstance(levels, Tables):
        ranks = iter(np.argsort(levels.rank_slots))
    children = _children(levels)
    fields = np.zeros((3, tree.num_classes, tree.max_depth), np.int32)
    # Breadth first, as slots and nodes are numbered.
    nodes, waiting = itertools.count(), [(-1, [])]
    for slot, path in waiting:
        if slot not in children:
            fields[:, order[next(ranks)], : len(path)] = np.reshape(path, (-1, 3)).T
            continue
        node, below = next(nodes), children[slot]
        for choice, child in enumerate(below):
            step = (below.start - node, len(below) - 1, choice)
            waiting.append((child, [*path, step]))
    return fields


def log_probs(tree, hidden, kernel, bias, temperature: Any = 1.0):
    """Returns all log-probabilities [N, V] by definition, level by level."""
    # NumPy's product may note an invalid operation where there is none.
    with np.errstate(invalid="ignore"):
        logits = hidden @ kernel.T + bias
    assert np.isfinite(logits).all()
    logits = logits / np.broadcast_to(temperature, len(hidden))[:, None]
    total = np.zeros((len(hidden), tree.num_classes))
    child = np.arange(tree.arity)
    for first, number, choice in np.moveaxis(paths(tree), 2, 0):
        rows = np.where(child <= number[:, None], first[:, None] + child - 1, 0)
        children = np.where(child <= number[:, None], logits[:, rows], -np.inf)
        children[..., 0] = 0
        children -= children.max(axis=2, keepdims=True)
        chosen = np.take_along_axis(children, choice[None, :, None], axis=2)[..., 0]
        shares = chosen - np.log(np.exp(children).sum(axis=2))
        total += np.where(number > 0, shares, 0)
    return total
