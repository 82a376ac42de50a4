"""Trees against the hierarchical softmax of word2vec, as gensim defines it.

The probability of a class is a product over the inner nodes above it: σ(w·v) for code
0, σ(-w·v) for code 1. Written down here once more, and checked by hand against gensim
4.4.0: codes and nodes are the same, scores agree as well as its table of 1000 numbers
allows, which passes over nodes with |w·v| >= 6.
"""

import heapq

import jax
import numpy as np
import pytest

from jaxsoft import (
    ClassTree,
    hierarchical_log_prob,
    hierarchical_log_probs,
    hierarchical_value_and_row_grad,
)
from tests.hierarchical import cases

# Where gensim's and word2vec's tables of σ end: a node beyond is passed over.
END = 6.0
FEATURES = 4


def words(counts):
    """Returns of each class the codes and the nodes above it, from the root down.

    The two least counts are joined until one is left, the lesser below code 0; the
    i-th joint is node i.
    """
    heap = [(count, class_id) for class_id, count in enumerate(counts)]
    heapq.heapify(heap)
    children = []
    while len(heap) > 1:
        left, right = heapq.heappop(heap), heapq.heappop(heap)
        joint = left[0] + right[0], len(counts) + len(children)
        children.append((left[1], right[1]))
        heapq.heappush(heap, joint)
    found = {}

    def walk(place, codes, nodes):
        if place < len(counts):
            found[place] = (codes, nodes)
            return
        node = place - len(counts)
        for code, child in enumerate(children[node]):
            walk(child, (*codes, code), (*nodes, node))

    walk(heap[0][1], (), ())
    return [found[class_id] for class_id in range(len(counts))]


def score(vector, weights, codes, nodes, end=np.inf):
    """Returns a class's log-probability, without nodes beyond an end."""
    total = 0.0
    for code, node in zip(codes, nodes, strict=True):
        logit = (1 - 2 * code) * (weights[node] @ vector)
        if abs(logit) < end:
            total -= np.logaddexp(0, -logit)
    return total


def gradients(vector, weights, codes, nodes):
    """Returns the score's gradient in the vector and in the weights."""
    of_vector, of_weights = np.zeros_like(vector), np.zeros_like(weights)
    for code, node in zip(codes, nodes, strict=True):
        slope = 1 - code - 1 / (1 + np.exp(-(weights[node] @ vector)))
        of_vector += slope * weights[node]
        of_weights[node] += slope * vector
    return of_vector, of_weights


class Case:
    """A tree of word2vec's, and the same one of ours with its weights copied over."""

    def __init__(self, counts, scale=1.0, rows=5):
        random = np.random.default_rng(len(counts))
        self.words = words(counts)
        self.weights = scale * random.standard_normal((len(counts) - 1, FEATURES))
        self.hidden = random.standard_normal((rows, FEATURES))
        self.labels = random.integers(0, len(counts), rows)
        self.tree = ClassTree.from_paths([codes for codes, _ in self.words])
        path = cases.paths(self.tree)
        # Our first child has the logit 0, the other one the row's: the weights of the
        # node where that is code 0, else the negative.
        self.node = np.full(self.tree.num_rows, -1)
        self.sign = np.zeros(self.tree.num_rows)
        for class_id, (codes, nodes) in enumerate(self.words):
            first, number, choice = path[:, class_id]
            inside = number > 0
            assert inside.sum() == len(codes) and number.max() == 1
            first, choice = first[inside], choice[inside]
            sign = np.where(choice == 1, 1, -1) * np.where(np.array(codes), -1, 1)
            known = self.node[first] >= 0
            assert (self.node[first] == nodes)[known].all()
            assert (self.sign[first] == sign)[known].all()
            self.node[first], self.sign[first] = nodes, sign
        self.kernel = self.sign[:, None] * self.weights[self.node]

    def truth(self, labels, end=np.inf):
        """Returns the scores of labels [N, ...]."""
        return np.array(
            [
                [
                    score(v, self.weights, *self.words[y], end=end)
                    for y in np.atleast_1d(ys)
                ]
                for v, ys in zip(self.hidden, labels, strict=True)
            ]
        ).reshape(np.shape(labels))


COUNTS = {
    "two": [3, 1],
    "zipf": 10**6 // np.arange(1, 41),
    "fibonacci": np.round(1.618 ** np.arange(20)).astype(int)[::-1],
    "unsorted": np.random.default_rng(0).integers(1, 99, 37),
    "flat": np.full(21, 7),
}


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.many_cases
def test_values_and_gradients_with_the_weights_copied_over(name, scale, x64):
    case = Case(COUNTS[name], scale)
    labels = case.labels

    @jax.jit
    def results(hidden, kernel):
        def total(hidden, kernel):
            own = hierarchical_log_prob(hidden, kernel, labels, case.tree)
            return own.sum(), own

        (_, own), dense = jax.value_and_grad(total, (0, 1), has_aux=True)(
            hidden, kernel
        )
        _, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, case.tree, reduction="sum"
        )
        by_rows = (-dhidden, -gradient.dense(case.tree.num_rows))
        every = hierarchical_log_probs(hidden, kernel, case.tree)
        return own, every, dense, by_rows

    own, every, dense, by_rows = results(case.hidden, case.kernel)
    np.testing.assert_allclose(own, case.truth(labels), rtol=1e-12, atol=1e-14)
    classes = np.tile(np.arange(case.tree.num_classes), (len(labels), 1))
    np.testing.assert_allclose(every, case.truth(classes), rtol=1e-12, atol=1e-14)
    of_hidden, of_weights = 0 * case.hidden, 0 * case.weights
    for row, label in enumerate(labels):
        slopes = gradients(case.hidden[row], case.weights, *case.words[label])
        of_hidden[row] += slopes[0]
        of_weights += slopes[1]
    of_kernel = case.sign[:, None] * of_weights[case.node]
    for ours in (dense, by_rows):
        for one, truth in zip(ours, (of_hidden, of_kernel), strict=True):
            np.testing.assert_allclose(one, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COUNTS)
def test_huffman_is_as_short(name):
    counts = np.asarray(COUNTS[name])
    lengths = np.array([len(codes) for codes, _ in words(counts)])
    tree = ClassTree.huffman(counts, max_depth=len(counts))
    ours = (cases.paths(tree)[1] > 0).sum(1)
    assert (ours * counts).sum() == (lengths * counts).sum()
    # Classes of other counts have the same lengths where these are all apart.
    if name in ("two", "zipf"):
        np.testing.assert_array_equal(ours, lengths)


def test_a_node_beyond_the_end_has_a_probability_and_a_gradient(x64):
    """As gensim scores and trains, such a node is passed over, on both its sides.

    Both of its children then have the probability 1: those of all classes add up to 1
    only where no node is beyond the end.
    """
    log_probs = jax.jit(hierarchical_log_probs)
    inside, beyond = Case(COUNTS["zipf"], 0.1), Case(COUNTS["zipf"], 20.0)
    for case, sums_to_one in ((inside, True), (beyond, False)):
        classes = np.tile(np.arange(case.tree.num_classes), (len(case.labels), 1))
        cut = np.exp(case.truth(classes, END)).sum(1)
        logits = np.abs(case.hidden @ case.weights.T)
        assert (logits < END).all() == sums_to_one
        assert (np.abs(cut - 1) < 1e-12).all() == sums_to_one
        ours = log_probs(case.hidden, case.kernel, case.tree)
        np.testing.assert_allclose(np.exp(ours).sum(1), 1, atol=1e-12)
    assert (cut > 2).all()
    # The label is on the unlikely side of a node: the one that has most to learn.
    label = int(np.argmin(np.asarray(ours)[0]))

    def value(kernel):
        return hierarchical_log_prob(
            beyond.hidden[0], kernel, np.array(label), beyond.tree
        )

    gradient = np.asarray(jax.jit(jax.grad(value))(beyond.kernel))
    logit = beyond.kernel @ beyond.hidden[0]
    rows = cases.paths(beyond.tree)[0, label]
    wrong = [row for row in rows if abs(logit[row]) >= END and gradient[row].any()]
    norm = np.linalg.norm(beyond.hidden[0])
    steps = np.linalg.norm(gradient[wrong], axis=1) / norm
    assert max(steps) == pytest.approx(1, abs=1e-2)
