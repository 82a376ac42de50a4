"""Samples of trees come at the rates of their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxsoft import ClassTree, hierarchical_log_probs, hierarchical_sample
from tests.hierarchical import cases


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_frequencies(kind, dtype):
    tree = cases.tree(kind, 1000)
    layer = [jnp.asarray(a, dtype) for a in cases.layer(tree, rows=1)]
    hidden, kernel, bias = layer
    tau, draws = 1.5, 200_000
    every = jnp.broadcast_to(hidden, (draws, hidden.shape[1]))
    found = hierarchical_sample(
        jax.random.key(0), every, kernel, tree, node_bias=bias, temperature=tau
    )
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
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    options = {"node_bias": bias, "temperature": 0.0}
    cold = hierarchical_log_probs(hidden, kernel, tree, **options)
    for seed in range(3):
        found = hierarchical_sample(
            jax.random.key(seed), hidden, kernel, tree, **options
        )
        np.testing.assert_array_equal(found, np.argmax(cold, axis=1))


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_few_classes_and_leading_axes(num_classes):
    tree = ClassTree.huffman(np.ones(num_classes))
    kernel = jnp.zeros((tree.num_rows, 3))
    call = jax.jit(hierarchical_sample)
    found = call(jax.random.key(0), jnp.ones((4, 50, 3)), kernel, tree)
    assert found.shape == (4, 50)
    assert set(np.asarray(found).ravel()) == {*range(num_classes)}
    assert call(jax.random.key(0), jnp.ones((0, 3)), kernel, tree).shape == (0,)


def test_bits_belong_to_the_place_of_a_token():
    tree = cases.tree("huffman", 50)
    hidden, kernel, _ = cases.layer(tree, rows=30, dtype="float32")
    found = hierarchical_sample(jax.random.key(1), hidden, kernel, tree)
    fewer = hierarchical_sample(jax.random.key(1), hidden[:7], kernel, tree)
    np.testing.assert_array_equal(found[:7], fewer)
    other = hierarchical_sample(jax.random.key(2), hidden, kernel, tree)
    assert (np.asarray(found) != np.asarray(other)).any()


def test_a_nan_is_no_class():
    tree = ClassTree.balanced(9)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    hidden[2, 0] = np.nan
    found = np.asarray(hierarchical_sample(jax.random.key(0), hidden, kernel, tree))
    assert (found == -1).tolist() == [False, False, True, False, False, False]
