"""What a layer over a complete binary tree should return, in float64 NumPy.

From the definition, for V = 2^D classes: the inner nodes are numbered from the root
down, from left to right, so that those below node i are 2i + 1 and 2i + 2, and class c
is what follows at V - 1 + c. A node's children have the logits 0 and `hidden · row`.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from benchmarks import heads_truth
from benchmarks.checks import Subset
from benchmarks.truth import Array

# Classes of a kernel that are read at a time, and rows of as many classes as there are.
_TILE, _ROWS = 2**15, 64

Ids = NDArray[np.integer]
# From numbers of rows to these rows of a kernel.
Take = Callable[[Ids], NDArray[np.floating]]


class Paths(NamedTuple):
    """The inner nodes above some classes, from the root down.

    Attributes:
      nodes: `[N, D]`, which is also the row of the kernel.
      bits: `[N, D]`, 1 where the path goes on to the second child.
    """

    nodes: Ids
    bits: Ids


def paths(class_ids: Ids, classes: int) -> Paths:
    """Goes from classes up to the root.

    Args:
      class_ids: `[N]`.
      classes: V, a power of two.

    Returns:
      The path of each.
    """
    places, nodes, bits = class_ids.astype(np.int64) + classes - 1, [], []
    for _ in range(classes.bit_length() - 1):
        bits.append((places + 1) % 2)
        places = (places - 1) // 2
        nodes.append(places)
    return Paths(np.stack(nodes[::-1], axis=1), np.stack(bits[::-1], axis=1))


class Gradient(NamedTuple):
    """The summed loss of some tokens and its derivatives.

    Attributes:
      loss: a scalar.
      dhidden: `[N, H]`.
      rows: those on some path, in order; the gradient is 0 in all others.
      values: `[len(rows), H]`, the gradient in these.
    """

    loss: Array
    dhidden: Array
    rows: Ids
    values: Array


def gradient(hidden: Array, labels: Ids, classes: int, take: Take) -> Gradient:
    """The loss of a tree's softmax, path by path.

    Args:
      hidden: `[N, H]`.
      labels: `[N]`.
      classes: V.
      take: from numbers of rows to these rows of the kernel.

    Returns:
      Loss and derivatives.
    """
    path = paths(labels, classes)
    rows, place = np.unique(path.nodes, return_inverse=True)
    place = place.reshape(path.nodes.shape)
    kernel = take(rows).astype(np.float64)
    loss, dhidden = np.zeros(()), np.zeros(hidden.shape)
    values = np.zeros(kernel.shape)
    for here, bit in zip(place.T, path.bits.T, strict=True):
        own = kernel[here]
        logits = np.sum(hidden * own, axis=1)
        loss = loss + np.logaddexp(0, np.where(bit, -logits, logits)).sum()
        slopes = (_sigmoid(logits) - bit)[:, None]
        dhidden += slopes * own
        np.add.at(values, here, slopes * hidden)
    return Gradient(loss, dhidden, rows, values)


def row_update(name: str, gradient: Array, rate: float) -> dict[str, Array]:
    """The first update of rows, by the formula of the optimizer and its defaults.

    Args:
      name: `"row_sgd"`, `"row_adagrad"` or `"row_adam"`.
      gradient: `[R, H]`.
      rate: the learning rate.

    Returns:
      `moved`, what is added to the rows; and the optimizer's memory of them, `slot 0`
      and so on, each of Adam's moments by itself.
    """
    if name == "row_sgd":
        return {"moved": -rate * gradient}
    if name == "row_adagrad":
        total = 0.1 + gradient**2
        return {"moved": -rate * gradient / np.sqrt(total + 1e-7), "slot 0": total}
    return {
        "moved": -rate * gradient / (np.abs(gradient) + 1e-8),
        "slot 0": (1 - 0.9) * gradient,
        "slot 1": (1 - 0.999) * gradient**2,
        "slot 2": np.ones(len(gradient)),
    }


def full_gradient(
    hidden: Array, kernel: jax.Array, labels: Ids, subset: Subset
) -> dict[str, Array]:
    """The summed loss of the softmax over all classes, a tile of them at a time.

    Args:
      hidden: `[N, H]`.
      kernel: `[H, V]`, which is never stored in float64.
      labels: `[N]`.
      subset: which rows of `dhidden`, which classes of `dkernel`.

    Returns:
      `loss`, `dhidden` and `dkernel`, `[H, len(subset.classes)]`.
    """
    classes = kernel.shape[1]
    tile, rows = min(_TILE, classes), subset.rows
    peak, total = np.full(len(hidden), -np.inf), np.zeros(len(hidden))
    mean = np.zeros((len(rows), hidden.shape[1]))
    for start in range(0, classes, tile):
        size = min(tile, classes - start)
        block = jax.lax.dynamic_slice_in_dim(kernel, np.int32(start), size, axis=1)
        block = np.asarray(block).astype(np.float64)
        odds = hidden @ block
        before, peak = peak, np.maximum(peak, odds.max(axis=1))
        odds -= peak[:, None]
        np.exp(odds, out=odds)
        kept = np.exp(before - peak)
        total = kept * total + odds.sum(axis=1)
        mean = kept[rows, None] * mean + odds[rows] @ block.T
    lse = peak + np.log(total)
    own = np.asarray(kernel[:, labels]).astype(np.float64).T
    chosen = np.asarray(kernel[:, subset.classes]).astype(np.float64)
    shares = np.exp(hidden @ chosen - lse[:, None])
    shares -= labels[:, None] == subset.classes
    return {
        "loss": np.sum(lse - np.sum(hidden * own, axis=1)),
        "dhidden": mean / total[rows, None] - own[rows],
        "dkernel": hidden.T @ shares,
    }


def log_probs(logits: Array) -> tuple[Array, Array]:
    """The log-probabilities of all nodes and of all classes.

    Args:
      logits: `[R, V - 1]`, of each node's second child.

    Returns:
      `[R, V - 1]`, of coming to a node, and `[R, V]`.
    """
    rows, inner = logits.shape
    every = np.zeros((rows, 2 * inner + 1))
    every[:, 1::2], every[:, 2::2] = -np.logaddexp(0, logits), -np.logaddexp(0, -logits)
    above, below = slice(0, 1), slice(1, 3)
    while above.start < inner:
        every[:, below] += np.repeat(every[:, above], 2, axis=1)
        above, below = below, slice(below.stop, 2 * below.stop + 1)
    return every[:, :inner], every[:, inner:]


def best_first_visits(logits: Array, k: int) -> int:
    """How many inner nodes an exact search looks at to find k classes, best first.

    No class below a node is more probable than the node, and none that looks at fewer
    nodes knows that it has the best ones.

    Args:
      logits: `[V - 1]`, of each node's second child, for one token.
      k: how many classes, at most V.

    Returns:
      The number of nodes whose logits were needed.
    """
    costs = np.stack([np.logaddexp(0, logits), np.logaddexp(0, -logits)], axis=1)
    below, inner = costs.tolist(), len(logits)
    heap, visits, found = [(0.0, 0)], 0, 0
    while True:
        cost, place = heapq.heappop(heap)
        if place < inner:
            visits += 1
            first, second = below[place]
            heapq.heappush(heap, (cost + first, 2 * place + 1))
            heapq.heappush(heap, (cost + second, 2 * place + 2))
        else:
            found += 1
            if found == k:
                return visits


def sample_statistics(
    hidden: Array, class_ids: Ids, classes: int, take: Take
) -> dict[str, Array]:
    """Figures of one sample a row that are known whatever the distribution.

    Where in its row's cumulative distribution a sample lies is uniform: `place`, as in
    `heads_truth`. How often the second child was taken at a level, less the sum of its
    probabilities, has mean 0 and a variance that is known: over its standard deviation
    and √N, and plus 1, that is `choices`.

    Args:
      hidden: `[N, H]`.
      class_ids: `[N]`, one sample a row.
      classes: V.
      take: from numbers of rows to these rows of the kernel.

    Returns:
      `place`, `[N]`, and `choices`, `[D]`; NaN where an id is no class.
    """
    inside = (class_ids >= 0) & (class_ids < classes)
    path = paths(np.where(inside, class_ids, 0), classes)
    left, mass, choices = np.zeros(len(hidden)), np.ones(len(hidden)), []
    for nodes, bit in zip(path.nodes.T, path.bits.T, strict=True):
        own = take(nodes).astype(np.float64)
        second = _sigmoid(np.sum(hidden * own, axis=1))
        left += np.where(bit, mass * (1 - second), 0)
        mass *= np.where(bit, second, 1 - second)
        spread = np.sqrt(np.sum(second * (1 - second)) * len(hidden))
        choices.append(1 + np.sum(bit - second) / spread)
    return {
        "place": np.sort(np.where(inside, left + mass / 2, np.nan)),
        "choices": np.where(inside.all(), np.array(choices), np.nan),
    }


def sample_truth(rows: int, classes: int) -> dict[str, Array]:
    """What `sample_statistics` should be near to."""
    levels = classes.bit_length() - 1
    return heads_truth.uniform_grid(rows) | {"choices": np.ones(levels)}


def full_sample_statistics(
    hidden: Array, class_ids: Ids, kernel: Array
) -> dict[str, Array]:
    """`heads_truth.sample_statistics` of many rows, some at a time.

    Args:
      hidden: `[N, H]`.
      class_ids: `[N]`, one sample a row.
      kernel: `[H, V]`.

    Returns:
      `place`, `[N]`, and `surprise`, a scalar.
    """
    places, excess = [], 0.0
    for rows in np.array_split(np.arange(len(hidden)), -(-len(hidden) // _ROWS)):
        every = heads_truth.log_probs(hidden[rows] @ kernel)
        found = heads_truth.sample_statistics(every, class_ids[rows])
        places.append(found["place"])
        excess += len(rows) * np.log(found["surprise"])
    place = np.sort(np.concatenate(places))
    return {"place": place, "surprise": np.exp(excess / len(hidden))}


def _sigmoid(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0, -logits))
