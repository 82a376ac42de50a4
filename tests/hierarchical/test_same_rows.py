"""Rows that come more than once: their sums, and the gradient of reading them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import hierarchical_log_prob, hierarchical_log_probs
from jaxsoft.hierarchical import softmax
from jaxsoft.hierarchical.same_rows import SameRows, take_rows
from tests.hierarchical import cases


@pytest.mark.parametrize("count", [7, 2**30])
@pytest.mark.parametrize("size", [0, 1, 2, 50])
def test_sums_and_their_transpose(size, count):
    """Of so many rows, too, that they are not sorted together with their places."""
    random = np.random.default_rng(size)
    rows = random.integers(0, 8, size)
    rows[rows == 7] = count
    values = random.standard_normal((size, 3)).astype("float32")

    @jax.jit
    def sums(rows, values):
        same = SameRows.of(rows, count)
        return same.rows, same.add(values), same.spread(same.rows)

    own, added, spread = map(np.asarray, sums(rows.astype("int32"), values))
    # Each once, and those that are no row are `count` or more.
    assert set(own[own < count]) == set(rows[rows < 7])
    assert len(np.unique(own)) == size
    found, total = np.zeros((7, 3)), np.zeros((7, 3))
    np.add.at(total, rows[rows < 7], values[rows < 7])
    found[own[own < count]] = added[own < count]
    np.testing.assert_allclose(found, total, atol=1e-5)
    np.testing.assert_array_equal(spread[rows < 7], rows[rows < 7])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_their_derivatives(axis, dtype, x64):
    random = np.random.default_rng(0)
    array = random.standard_normal((6, 5, 4)).astype(jnp.dtype(dtype))
    rows = random.integers(0, array.shape[axis], (30, 20))
    taken = np.take(array, rows, axis=axis)
    cotangent = random.standard_normal(taken.shape).astype(jnp.dtype(dtype))

    def plain(array):
        return jnp.take(array, rows, axis=axis)

    def one(array, rows):
        return take_rows(array, rows, axis).sum()

    @jax.jit
    def results(array, cotangent, rows):
        def ours(array):
            return take_rows(array, rows, axis)

        wide = array.astype("float64"), cotangent.astype("float64")
        return (
            ours(array),
            jax.jvp(ours, (array,), (array,))[1],
            jax.vjp(ours, array)[1](cotangent)[0],
            jax.vjp(plain, wide[0])[1](wide[1])[0],
            jax.vmap(jax.grad(one), (None, 0))(array, rows),
            jax.grad(one)(array, rows),
        )

    found, moved, gradient, exact, parts, whole = results(array, cotangent, rows)
    np.testing.assert_array_equal(found, taken)
    np.testing.assert_array_equal(moved, found)
    assert gradient.dtype == dtype
    # Rounded once, whatever is added up.
    np.testing.assert_allclose(
        np.asarray(gradient, "float64"),
        exact,
        rtol=float(jnp.finfo(dtype).eps),
        atol=3e-5,
    )
    parts = np.asarray(parts, "float64").sum(0)
    whole = np.asarray(whole, "float64")
    np.testing.assert_array_equal(parts, whole)


@pytest.fixture(params=["level by level", "whole paths"])
def gathered(request, monkeypatch):
    """How many rows of the kernel are gathered at a time, which its size decides."""
    if request.param == "level by level":
        monkeypatch.setattr(softmax, "_PATHS", 0)
    # What was traced is not known to depend on it.
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("kind", ["balanced", "huffman of 4", "wide"])
@pytest.mark.many_cases
@pytest.mark.usefixtures("gathered")
def test_bfloat16_gradients_of_many_tokens_do_not_stall(kind):
    # A sum in bfloat16 would stop at 256 times its terms, of thousands at the root.
    tree = cases.tree(kind, 40)
    random = np.random.default_rng(0)
    hidden, kernel, bias = cases.layer(tree, rows=2048, dtype="float32", scale=0.3)
    layer = [np.asarray(a, jnp.bfloat16) for a in (hidden + 1, kernel, bias)]
    labels = random.integers(0, 2, 2048) * 17
    weights = random.uniform(0.5, 1.5, 2048).astype("float32")

    @jax.jit
    @jax.grad
    def alone(layer, labels, weights):
        hidden, kernel, bias = layer
        found = hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)
        return jnp.sum(found * weights.astype(found.dtype))

    @jax.jit
    @jax.grad
    def plain(layer, labels, weights):
        hidden, kernel, bias = layer
        every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
        return jnp.sum(every[jnp.arange(2048), labels] * weights)

    found, whole = (f(layer, labels, weights) for f in (alone, plain))
    with jax.enable_x64(True):
        exact = alone([a.astype("float64") for a in layer], labels, weights)
    for own, other, truth in zip(found, whole, exact, strict=True):
        assert own.dtype == "bfloat16"
        own, other, truth = (np.asarray(a, "float64") for a in (own, other, truth))
        error = [np.abs(a - truth).max() for a in (own, other, 0 * truth)]
        assert error[0] <= error[1] + 2e-3 * error[2], error
        assert error[0] < 0.01 * error[2]
