"""Samples of trees come at the rates of their probabilities."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxsoft import ClassTree, hierarchical_log_probs, hierarchical_sample
from tests.hierarchical import cases


@functools.partial(jax.jit, static_argnames=("temperature", "draws"))
def sample(key, layer, tree, temperature=1.0, draws=1):
    """Returns a class for each row, or many for each."""
    hidden, kernel, bias = layer
    return hierarchical_sample(
        key,
        jnp.repeat(hidden, draws, axis=0),
        kernel,
        tree,
        node_bias=bias,
        temperature=temperature,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_frequencies(kind, dtype):
    tree = cases.tree(kind, 1000)
    layer = [a.astype(jnp.dtype(dtype)) for a in cases.layer(tree, rows=1)]
    tau, draws = 1.5, 200_000
    found = sample(jax.random.key(0), layer, tree, tau, draws)
    assert found.dtype == jnp.int32
    wide = [np.asarray(a, "float64") for a in layer]
    p = np.exp(cases.log_probs(tree, *wide, temperature=tau))[0]
    counts = np.bincount(found, minlength=1000)
    # Rare classes together, so that every cell has enough.
    order = np.argsort(p)
    cell = np.floor(np.cumsum(p[order]) * 400).astype(int)
    expected = np.bincount(cell, p[order]) * draws
    observed = np.bincount(cell, counts[order])
    full = expected > 5
    expected, observed = expected[full], observed[full]
    assert len(expected) > 80
    chi = ((observed - expected) ** 2 / expected).sum()
    assert 1e-6 < stats.chi2.sf(chi, len(expected) - 1) < 1 - 1e-6


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_temperature_of_zero_is_greedy(kind):
    tree = cases.tree(kind, 97)
    layer = cases.layer(tree, dtype="float32")

    @jax.jit
    def greedy_and_best():
        hidden, kernel, bias = layer
        options: dict[str, Any] = {"node_bias": bias, "temperature": 0.0}
        cold = hierarchical_log_probs(hidden, kernel, tree, **options)
        return [
            hierarchical_sample(jax.random.key(seed), hidden, kernel, tree, **options)
            for seed in range(3)
        ], jnp.argmax(cold, axis=1)

    greedy, best = greedy_and_best()
    for own in greedy:
        np.testing.assert_array_equal(own, best)


@pytest.mark.parametrize(
    "tree",
    [
        *(pytest.param(ClassTree.huffman(np.ones(n)), id=str(n)) for n in (1, 2, 3)),
        pytest.param(ClassTree.balanced(4, 3), id="last node of two children"),
    ],
)
def test_few_classes_and_leading_axes(tree):
    kernel = np.zeros((tree.num_rows, 3), "float32")

    @jax.jit
    def draw(key, many, none):
        return [hierarchical_sample(key, rows, kernel, tree) for rows in (many, none)]

    many, none = np.ones((4, 50, 3), "float32"), np.ones((0, 3), "float32")
    drawn, nothing = draw(jax.random.key(0), many, none)
    assert drawn.shape == (4, 50)
    assert set(np.asarray(drawn).ravel().tolist()) == {*range(tree.num_classes)}
    assert nothing.shape == (0,)


def test_bits_belong_to_the_place_of_a_token():
    tree = cases.tree("huffman", 50)
    hidden, kernel, bias = cases.layer(tree, rows=30, dtype="float32")
    found, other = (
        sample(jax.random.key(seed), (hidden, kernel, bias), tree) for seed in (1, 2)
    )
    fewer = sample(jax.random.key(1), (hidden[:7], kernel, bias), tree)
    np.testing.assert_array_equal(found[:7], fewer)
    assert (np.asarray(found) != np.asarray(other)).any()


def test_a_nan_is_no_class():
    tree = cases.tree("huffman", 50)
    hidden, kernel, bias = cases.layer(tree, rows=30, dtype="float32")
    hidden[2, 0] = np.nan
    found = np.asarray(sample(jax.random.key(0), (hidden, kernel, bias), tree))
    np.testing.assert_array_equal(found == -1, np.arange(30) == 2)
