"""Every function of the room goes through `jax.export`, its trees as arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxsoft
from tests.hierarchical import cases

KEY = jax.random.key(3)
OPTIMIZERS = (jaxsoft.row_sgd, jaxsoft.row_adagrad, jaxsoft.row_adam)


class RoundTrip:
    """A function beside what comes back of it from a trip through bytes."""

    def __init__(self, function, *arguments):
        self.compiled = jax.jit(function)
        text = export.export(self.compiled)(*arguments).serialize()
        self.exported = jax.jit(export.deserialize(text).call)

    def check(self, *arguments) -> Any:
        """Asserts that both return the same, and returns it."""
        found, expected = self.exported(*arguments), self.compiled(*arguments)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        return found


def check_round_trip(function, *arguments) -> Any:
    """Asserts that a function is the same after a trip through bytes."""
    return RoundTrip(function, *arguments).check(*arguments)


@pytest.mark.parametrize(
    ("kind", "num_classes"), [("balanced", 1), *((kind, 11) for kind in cases.KINDS)]
)
@pytest.mark.many_cases
def test_functions_of_trees(kind, num_classes):
    tree = cases.tree(kind, num_classes)
    layer = cases.layer(tree, dtype="float32")
    labels = np.random.default_rng(0).integers(0, num_classes, 6)

    def every(key, layer, labels, tree):
        hidden, kernel, bias = layer

        def loss(layer):
            hidden, kernel, bias = layer
            return jaxsoft.hierarchical_log_prob(
                hidden, kernel, labels, tree, node_bias=bias
            ).sum()

        return {
            "tree": tree,
            "paths": tree.paths(labels),
            "log_prob": jax.value_and_grad(loss)(layer),
            "log_probs": jaxsoft.hierarchical_log_probs(hidden, kernel, tree),
            "sample": jaxsoft.hierarchical_sample(
                key, hidden, kernel, tree, node_bias=bias
            ),
            "top_k": jaxsoft.hierarchical_top_k(hidden, kernel, 1, tree),
            "row_grad": jaxsoft.hierarchical_value_and_row_grad(
                hidden, kernel, labels, tree, node_bias=bias
            ),
        }

    functions = RoundTrip(every, KEY, layer, labels, tree)
    found = functions.check(KEY, layer, labels, tree)
    assert isinstance(found["tree"], jaxsoft.ClassTree)
    assert found["tree"].num_classes == num_classes
    assert isinstance(found["row_grad"][2], jaxsoft.RowGradient)
    # What came back is a tree: it may be called with in turn.
    again = functions.check(KEY, layer, labels, found["tree"])
    np.testing.assert_array_equal(again["log_probs"], found["log_probs"])


def test_steps_of_optimizers():
    tree = cases.tree("huffman", 23)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    labels = np.array([0, 22, 3, 3, 7, 9])
    optimizers = {make.__name__: make(0.1) for make in OPTIMIZERS}
    params = {name: {"kernel": kernel, "bias": bias} for name in optimizers}

    def step(params, states, hidden, labels, tree):
        moved, losses = {}, {}
        for name, optimizer in optimizers.items():
            own = params[name]
            losses[name], _, gradient = jaxsoft.hierarchical_value_and_row_grad(
                hidden, own["kernel"], labels, tree, node_bias=own["bias"]
            )
            values = dict(zip(("kernel", "bias"), gradient.values, strict=True))
            gradient = gradient._replace(values=values)
            moved[name] = *optimizer.update(own, gradient, states[name]), gradient
        return moved, losses

    states = {name: optimizers[name].init(params[name]) for name in optimizers}
    steps = RoundTrip(step, params, states, hidden, labels, tree)
    moved, losses = steps.check(params, states, hidden, labels, tree)
    # Their states are ones to go on from.
    params, states = ({name: moved[name][i] for name in moved} for i in range(2))
    _, later = steps.check(params, states, hidden, labels, tree)
    assert all(later[name] < losses[name] for name in losses)


@pytest.mark.parametrize("shuffled", [False, True])
def test_functions_of_bands(shuffled):
    bands = jaxsoft.ClassBands.in_order(60, (10, 30))
    if shuffled:
        counts = np.random.default_rng(1).permutation(60)
        bands = jaxsoft.ClassBands.from_counts(counts, cutoffs=(10, 30))
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), "float32")

    tails = [
        jaxsoft.AdaptiveTail(normal(6, 3), normal(3, 20), normal(20)),
        jaxsoft.AdaptiveTail(normal(6, 2), normal(2, 30)),
    ]
    layer = (normal(5, 6), normal(6, 12), tails)
    labels = np.array([0, 59, 12, 31, 8])

    def every(key, layer, labels, bands):
        hidden, head, tails = layer

        def loss(layer):
            hidden, head, tails = layer
            return jaxsoft.adaptive_log_prob(hidden, head, tails, labels, bands).sum()

        return {
            "bands": bands,
            # Gradients are those of ranks: the order of the classes is none of theirs.
            "log_prob": jax.value_and_grad(loss)(layer) if shuffled else loss(layer),
            "log_probs": jaxsoft.adaptive_log_probs(hidden, head, tails, bands),
            "sample": jaxsoft.adaptive_sample(key, hidden, head, tails, bands),
            "top_k": jaxsoft.adaptive_top_k(hidden, head, tails, 3, bands),
        }

    found = check_round_trip(every, KEY, layer, labels, bands)
    assert found["bands"].cutoffs == bands.cutoffs
    if shuffled:
        assert isinstance(found["log_prob"][1][2][0], jaxsoft.AdaptiveTail)


def test_sampled_softmax():
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((5, 6)), "float32")
    kernel = jnp.asarray(random.standard_normal((6, 30)), "float32")
    labels = random.integers(0, 30, 5)

    def value_and_grad(key, hidden, kernel, labels, sampler):
        def loss(hidden, kernel):
            return jaxsoft.sampled_softmax_loss(
                key, hidden, kernel, labels, 20, sampler=sampler
            )

        drawn = sampler.sample(key, 4)
        return jax.value_and_grad(loss, (0, 1))(hidden, kernel), drawn, sampler

    sampler = jaxsoft.ClassSampler.log_uniform(30)
    check_round_trip(value_and_grad, KEY, hidden, kernel, labels, sampler)
