"""The search for the best classes against all log-probabilities."""

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import ClassTree, hierarchical_log_probs, hierarchical_top_k
from tests.hierarchical import cases


def best(log_probs, k):
    """Returns the k largest, equal ones by id."""
    log_probs = np.asarray(log_probs)
    ids = np.argsort(-log_probs, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(log_probs, ids, axis=-1), ids


@pytest.mark.parametrize("max_visits", [None, 60, 500])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_what_is_exact_is_the_best(kind, max_visits, x64):
    tree = cases.tree(kind, 600)
    hidden, kernel, bias = cases.layer(tree, rows=50)
    tau = np.random.default_rng(2).uniform(0.1, 1.5, 50)
    options = {"node_bias": bias, "temperature": tau}
    every = np.asarray(hierarchical_log_probs(hidden, kernel, tree, **options))
    options = options | {"max_visits": max_visits}
    found = hierarchical_top_k(hidden, kernel, 7, tree, **options)
    log_probs, ids, exact = map(np.asarray, found)
    assert log_probs.dtype == "float64" and ids.dtype == "int32"
    expected, expected_ids = best(every, 7)
    np.testing.assert_array_equal(ids[exact], expected_ids[exact])
    np.testing.assert_allclose(log_probs[exact], expected[exact], rtol=1e-12)
    if max_visits is None:
        assert exact.all()
    elif max_visits == 500:
        assert exact.any()
    # What was cut short is still true of the classes that it names.
    named = np.where(ids < 0, 0, ids)
    truth = np.where(ids < 0, -np.inf, np.take_along_axis(every, named, axis=1))
    np.testing.assert_allclose(log_probs, truth, rtol=1e-12)
    assert (np.diff(np.where(ids < 0, -1e9, log_probs)) <= 0).all()


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("arity", [2, 5])
def test_beams_give_way_to_wider_ones(arity, scale):
    # Here a first beam is worth while; flat distributions need all classes.
    tree = ClassTree.balanced(40_000, arity)
    hidden, kernel, _ = cases.layer(tree, rows=9, dtype="float32", scale=scale)
    every = hierarchical_log_probs(hidden, kernel, tree)
    log_probs, ids, exact = jax.jit(hierarchical_top_k, static_argnums=2)(
        hidden, kernel, 3, tree
    )
    expected, _ = best(every, 3)
    assert exact.all()
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(every), np.asarray(ids), axis=1),
        expected,
        rtol=1e-4,
    )
    _, _, greedy = hierarchical_top_k(hidden, kernel, 3, tree, max_visits=100)
    if scale != 1.0:
        assert greedy.any() == (scale == 3.0)


@pytest.mark.parametrize("kind", ["balanced", "huffman", "paths"])
def test_equal_classes_by_id(kind):
    tree = cases.tree(kind, 2**5)
    kernel, hidden = jnp.zeros((tree.num_rows, 2)), jnp.ones((3, 2))
    every = hierarchical_log_probs(hidden, kernel, tree)
    expected, expected_ids = best(every, 10)
    for max_visits in (None, 31):
        log_probs, ids, exact = hierarchical_top_k(
            hidden, kernel, 10, tree, max_visits=max_visits
        )
        assert exact.all()
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(log_probs, expected, rtol=1e-6)
    # A tie at the border: a beam cannot know that its own is of the lower id.
    tree = ClassTree.balanced(40_000)
    kernel = jnp.zeros((tree.num_rows, 2))
    _, ids, exact = hierarchical_top_k(hidden, kernel, 3, tree)
    lowest = np.flatnonzero(np.asarray(tree.depths(jnp.arange(40_000))) == 15)[:3]
    np.testing.assert_array_equal(ids, np.tile(lowest, (3, 1)))


def test_temperatures_of_zero_and_infinity():
    tree = ClassTree.huffman(np.arange(1, 40_001) ** -1.0)
    hidden, kernel, _ = cases.layer(tree, rows=4, dtype="float32")
    tau = jnp.array([0.0, 0.0, jnp.inf, 1.0])
    every = hierarchical_log_probs(hidden, kernel, tree, temperature=tau)
    log_probs, ids, exact = hierarchical_top_k(hidden, kernel, 3, tree, temperature=tau)
    expected, expected_ids = best(every, 3)
    np.testing.assert_array_equal(ids[:3], expected_ids[:3])
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)
    assert log_probs[0, 0] == 0 and log_probs[0, 1] == -np.inf and exact.all()


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_few_classes_and_leading_axes(num_classes):
    tree = ClassTree.balanced(num_classes)
    kernel = jnp.zeros((tree.num_rows, 3))
    for shape in ((2, 4), (), (0,)):
        hidden = jnp.ones((*shape, 3))
        for k in range(1, num_classes + 1):
            for visits in (None, 5):
                log_probs, ids, exact = hierarchical_top_k(
                    hidden, kernel, k, tree, max_visits=visits
                )
                assert log_probs.shape == ids.shape == (*shape, k)
                assert exact.shape == shape and exact.all()
                expected = best(hierarchical_log_probs(hidden, kernel, tree), k)
                np.testing.assert_array_equal(ids, expected[1])


def test_a_beam_that_meets_too_few_says_so():
    tree = ClassTree.balanced(64)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    log_probs, ids, exact = hierarchical_top_k(hidden, kernel, 5, tree, max_visits=6)
    assert not exact.any()
    assert (ids[:, 2:] == -1).all() and (ids[:, :2] >= 0).all()
    assert (log_probs[:, 2:] == -np.inf).all()


def test_derivatives_are_those_of_the_log_probabilities(x64):
    tree = cases.tree("huffman of 4", 300)
    hidden, kernel, bias = map(jnp.asarray, cases.layer(tree))
    weights = jnp.arange(1.0, 5.0)

    def searched(hidden, kernel, bias, tau):
        found = hierarchical_top_k(
            hidden, kernel, 4, tree, node_bias=bias, temperature=tau
        )
        return jnp.sum(found[0] @ weights)

    def plain(hidden, kernel, bias, tau):
        every = hierarchical_log_probs(
            hidden, kernel, tree, node_bias=bias, temperature=tau
        )
        return jnp.sum(jax.lax.top_k(every, 4)[0] @ weights)

    arguments = (hidden, kernel, bias, jnp.asarray(0.8))
    found = jax.grad(searched, range(4))(*arguments)
    expected = jax.grad(plain, range(4))(*arguments)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    moved = jax.jvp(searched, arguments, arguments)[1]
    np.testing.assert_allclose(moved, jax.jvp(plain, arguments, arguments)[1])


def test_batched_by_vmap():
    tree = ClassTree.balanced(40_000)
    hidden, kernel, _ = cases.layer(tree, rows=6, dtype="float32")
    hidden = hidden.reshape(2, 3, -1)

    def search(hidden):
        return hierarchical_top_k(hidden, kernel, 3, tree)

    found, expected = jax.vmap(search)(hidden), search(hidden)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_wrong_arguments():
    tree = ClassTree.balanced(20)
    hidden, kernel = jnp.ones((2, 3)), jnp.ones((19, 3))
    with pytest.raises(ValueError, match="`k` must be at most V = 20, got 21"):
        hierarchical_top_k(hidden, kernel, 21, tree)
    with pytest.raises(TypeError, match="`k` must be an int"):
        hierarchical_top_k(hidden, kernel, cast(Any, 2.0), tree)
    with pytest.raises(ValueError, match="at least tree.max_depth = 5, got 4"):
        hierarchical_top_k(hidden, kernel, 2, tree, max_visits=4)


def test_no_search_of_all_classes_before_one_is_needed():
    """XLA once moved it out of a loop that may make no turn."""
    tree = ClassTree.balanced(2**16)
    kernel = jax.ShapeDtypeStruct((tree.num_rows, 8), jnp.float32)
    hidden = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    search = jax.jit(lambda *layer: hierarchical_top_k(layer[0], layer[1], 10, tree))
    text = search.lower(hidden, kernel).compile().as_text() or ""
    assert re.search(r"f32\[(65536,64|64,65536)\]", text)
    entry = text[text.index("\nENTRY ") :]
    assert not re.search(r"f32\[(65536,64|64,65536)\]", entry)
