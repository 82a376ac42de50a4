"""Trees of every kind, and what their probabilities are by definition."""

from typing import Any

import numpy as np

from jaxsoft import ClassTree

KINDS = ("balanced", "ternary", "huffman", "huffman of 4", "clustered", "paths", "wide")


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


def log_probs(tree, hidden, kernel, bias, temperature: Any = 1.0):
    """Returns all log-probabilities [N, V] by definition, class by class."""
    # NumPy's product may note an invalid operation where there is none.
    with np.errstate(invalid="ignore"):
        logits = hidden @ kernel.T + bias
    assert np.isfinite(logits).all()
    tau = np.broadcast_to(temperature, len(hidden))
    found = np.zeros((len(hidden), tree.num_classes))
    path = [np.asarray(a) for a in tree.paths(np.arange(tree.num_classes))]
    for class_id in range(tree.num_classes):
        for first, number, choice in zip(*(a[class_id] for a in path), strict=True):
            if number:
                children = logits[:, first : first + number] / tau[:, None]
                children = np.concatenate([0 * children[:, :1], children], axis=1)
                children -= children.max(axis=1, keepdims=True)
                total = np.log(np.exp(children).sum(axis=1))
                found[:, class_id] += children[:, choice] - total
    return found
