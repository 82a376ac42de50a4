"""The search for the best classes against all log-probabilities."""

import functools
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


@functools.partial(jax.jit, static_argnames=("k", "max_visits"))
def all_and_best(layer, tree, k, max_visits=(None,), **options):
    """Returns the log-probabilities of all classes, and the best by each of some beams.

    Args:
      layer: hidden states, kernel and bias.
      tree: the classes.
      k: how many.
      max_visits: of each search.
      options: a temperature.
    """
    hidden, kernel, bias = layer
    options = options | {"node_bias": bias}
    return hierarchical_log_probs(hidden, kernel, tree, **options), [
        hierarchical_top_k(hidden, kernel, k, tree, max_visits=visits, **options)
        for visits in max_visits
    ]


@pytest.mark.parametrize("max_visits", [None, 60, 500])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_what_is_exact_is_the_best(kind, max_visits, x64):
    tree = cases.tree(kind, 600)
    layer = cases.layer(tree, rows=50)
    tau = np.random.default_rng(2).uniform(0.1, 1.5, 50)
    every, [(log_probs, ids, exact)] = jax.device_get(
        all_and_best(layer, tree, 7, (max_visits,), temperature=tau)
    )
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
    every, [(log_probs, ids, exact), (_, _, greedy)] = jax.device_get(
        all_and_best((hidden, kernel, None), tree, 3, (None, 100))
    )
    expected, _ = best(every, 3)
    assert exact.all()
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4)
    np.testing.assert_allclose(
        np.take_along_axis(every, ids, axis=1),
        expected,
        rtol=1e-4,
    )
    if scale != 1.0:
        assert greedy.any() == (scale == 3.0)


@pytest.mark.parametrize("kind", ["balanced", "huffman", "paths"])
def test_equal_classes_by_id(kind):
    tree = cases.tree(kind, 2**5)
    kernel = np.zeros((tree.num_rows, 2), "float32")
    layer = np.ones((3, 2), "float32"), kernel, None
    every, searches = jax.device_get(all_and_best(layer, tree, 10, (None, 31)))
    expected, expected_ids = best(every, 10)
    for log_probs, ids, exact in searches:
        assert exact.all()
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(log_probs, expected, rtol=1e-6)


# A beam is worth while for so many classes; with five children it has few levels.
MANY = ClassTree.balanced(40_000, 5)


@jax.jit
def best_of_many(hidden, kernel):
    """Returns the best classes of `MANY` by `vmap`, and without it."""

    def search(hidden):
        return hierarchical_top_k(hidden, kernel, 3, MANY)

    return jax.vmap(search)(hidden), search(hidden)


def test_equal_classes_at_the_border_of_a_beam():
    # A beam cannot know that its own is of the lower id.
    layer = np.ones((2, 3, 4), "float32"), np.zeros((MANY.num_rows, 4), "float32")
    # The lowest classes are the nearest to the root, more than a beam holds of them.
    assert MANY.levels.leaves[:6] == (0,) * 6 and MANY.levels.leaves[6] > 1000
    for _, ids, _ in best_of_many(*layer):
        np.testing.assert_array_equal(ids, np.tile(np.arange(3), (2, 3, 1)))


def test_temperatures_of_zero_and_infinity():
    tree = ClassTree.huffman(np.arange(1, 60_001) ** -1.0, 5)
    hidden, kernel, _ = cases.layer(tree, rows=4, dtype="float32")
    tau = np.array([0.0, 0.0, np.inf, 1.0], "float32")
    every, [(log_probs, ids, exact)] = jax.device_get(
        all_and_best((hidden, kernel, None), tree, 3, temperature=tau)
    )
    expected, expected_ids = best(every, 3)
    np.testing.assert_array_equal(ids[:3], expected_ids[:3])
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)
    assert log_probs[0, 0] == 0 and log_probs[0, 1] == -np.inf and exact.all()


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_few_classes_and_leading_axes(num_classes):
    tree = ClassTree.balanced(num_classes)
    kernel = np.zeros((tree.num_rows, 3), "float32")

    shapes = ((2, 4), (), (0,))

    @jax.jit
    def results():
        found = []
        for shape in shapes:
            hidden = jnp.ones((*shape, 3))
            every = hierarchical_log_probs(hidden, kernel, tree)
            searches = [
                hierarchical_top_k(hidden, kernel, k, tree, max_visits=visits)
                for k in range(1, num_classes + 1)
                for visits in (None, 5)
            ]
            found.append((every, searches))
        return found

    for shape, (every, searches) in zip(shapes, jax.device_get(results()), strict=True):
        for index, (log_probs, ids, exact) in enumerate(searches):
            k = 1 + index // 2
            assert log_probs.shape == ids.shape == (*shape, k)
            assert exact.shape == shape and exact.all()
            np.testing.assert_array_equal(ids, best(every, k)[1])


def test_a_beam_that_meets_too_few_says_so():
    tree = ClassTree.balanced(64)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    _, [(log_probs, ids, exact)] = jax.device_get(
        all_and_best((hidden, kernel, None), tree, 5, (6,))
    )
    assert not exact.any()
    assert (ids[:, 2:] == -1).all() and (ids[:, :2] >= 0).all()
    assert (log_probs[:, 2:] == -np.inf).all()


def test_derivatives_are_those_of_the_log_probabilities(x64):
    tree = cases.tree("huffman of 4", 300)
    layer = cases.layer(tree)
    weights = np.arange(1.0, 5.0)

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

    @jax.jit
    def derivatives(*arguments):
        return [
            (
                jax.grad(function, range(4))(*arguments),
                jax.jvp(function, arguments, arguments)[1],
            )
            for function in (searched, plain)
        ]

    (found, moved), (expected, expected_moved) = derivatives(*layer, np.float64(0.8))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moved, expected_moved)


def test_batched_by_vmap():
    hidden, kernel, _ = cases.layer(MANY, rows=6, dtype="float32")
    found, expected = best_of_many(hidden.reshape(2, 3, -1), kernel)
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
    tree = ClassTree.balanced(2**16, 4)
    kernel = jax.ShapeDtypeStruct((tree.num_rows, 8), jnp.float32)
    hidden = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    search = jax.jit(lambda *layer: hierarchical_top_k(layer[0], layer[1], 10, tree))
    text = search.lower(hidden, kernel).compile().as_text() or ""
    assert re.search(r"f32\[(65536,64|64,65536)\]", text)
    entry = text[text.index("\nENTRY ") :]
    assert not re.search(r"f32\[(65536,64|64,65536)\]", entry)
