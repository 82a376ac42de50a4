"""Adaptive softmax against PyTorch's, its parameters copied over.

`torch.nn.AdaptiveLogSoftmaxWithLoss(in_features, n_classes, cutoffs, div_value,
head_bias)`, written down here once more by its documentation: of layers with weights
[out, in], the head's, and of each cluster two without a bias.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

FEATURES, CLASSES, CUTOFFS, DIVISOR, ROWS = 16, 50, (5, 20), 4, 12
BANDS = jaxsoft.ClassBands.in_order(CLASSES, CUTOFFS)


def parameters(head_bias):
    """Returns parameters by their names in PyTorch's state."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "head.weight": (CUTOFFS[0] + len(CUTOFFS), FEATURES)
    }
    if head_bias:
        shapes["head.bias"] = (CUTOFFS[0] + len(CUTOFFS),)
    ends = [*CUTOFFS[1:], CLASSES]
    for cluster, (start, end) in enumerate(zip(CUTOFFS, ends, strict=True)):
        width = FEATURES // DIVISOR ** (cluster + 1)
        shapes[f"tail.{cluster}.0.weight"] = (width, FEATURES)
        shapes[f"tail.{cluster}.1.weight"] = (end - start, width)
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def by_torch(state, hidden):
    """Returns `log_prob(hidden)`, [N, V]."""
    head = hidden @ state["head.weight"].T
    if "head.bias" in state:
        head += state["head.bias"][None]
    head = jax.nn.log_softmax(head)
    found = [head[:, : CUTOFFS[0]]]
    for cluster in range(len(CUTOFFS)):
        narrow = hidden @ state[f"tail.{cluster}.0.weight"].T
        own = jax.nn.log_softmax(narrow @ state[f"tail.{cluster}.1.weight"].T)
        found.append(own + head[:, CUTOFFS[0] + cluster, None])
    return jnp.concatenate(found, axis=1)


def ours(state) -> tuple[tuple[Any, list[Any]], dict[str, Any]]:
    """Returns the arguments of our functions but the first, and their options."""
    tails = [
        jaxsoft.AdaptiveTail(
            state[f"tail.{cluster}.0.weight"].T, state[f"tail.{cluster}.1.weight"].T
        )
        for cluster in range(len(CUTOFFS))
    ]
    return (state["head.weight"].T, tails), {"head_bias": state.get("head.bias")}


@pytest.mark.parametrize("head_bias", [False, True])
def test_equals_pytorch(head_bias, x64):
    state = parameters(head_bias)
    random = np.random.default_rng(1)
    hidden = random.standard_normal((ROWS, FEATURES))
    labels = np.array([0, 4, 5, 19, 20, 49, *random.integers(0, CLASSES, ROWS - 6)])
    (head, tails), options = ours(state)
    truth = by_torch(state, hidden)
    every = jaxsoft.adaptive_log_probs(hidden, head, tails, BANDS, **options)
    np.testing.assert_allclose(every, truth, atol=1e-12)
    # `predict`
    _, best = jaxsoft.adaptive_top_k(hidden, head, tails, 1, BANDS, **options)
    np.testing.assert_array_equal(best[:, 0], np.argmax(truth, axis=1))

    def own_loss(state, hidden):
        (head, tails), options = ours(state)
        found = jaxsoft.adaptive_log_prob(hidden, head, tails, labels, BANDS, **options)
        return -found.mean(), found

    def loss(state, hidden):
        output = by_torch(state, hidden)[jnp.arange(ROWS), labels]
        return -output.mean(), output

    state = jax.tree.map(jnp.asarray, state)
    results = [
        jax.value_and_grad(function, (0, 1), has_aux=True)(state, jnp.asarray(hidden))
        for function in (own_loss, loss)
    ]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
