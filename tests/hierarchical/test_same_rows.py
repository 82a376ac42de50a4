"""Rows that come more than once: their sums, and the gradient of reading them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.hierarchical.same_rows import SameRows, take_rows


@pytest.mark.parametrize("size", [0, 1, 2, 50])
def test_sums_and_their_transpose(size):
    random = np.random.default_rng(size)
    rows = random.integers(0, 8, size)
    values = jnp.asarray(random.standard_normal((size, 3)), "float32")
    same = SameRows.of(jnp.asarray(rows, "int32"), 7)
    own = np.asarray(same.rows)
    # Each once, and those that are no row are 7 or more.
    assert set(own[own < 7]) == set(rows[rows < 7])
    assert len(np.unique(own)) == size
    found, total = np.zeros((7, 3)), np.zeros((7, 3))
    np.add.at(total, rows[rows < 7], np.asarray(values)[rows < 7])
    found[own[own < 7]] = np.asarray(same.add(values))[own < 7]
    np.testing.assert_allclose(found, total, atol=1e-5)
    spread = np.asarray(same.spread(same.rows))
    np.testing.assert_array_equal(spread[rows < 7], rows[rows < 7])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.many_cases
def test_rows_and_their_derivatives(axis, dtype, x64):
    random = np.random.default_rng(0)
    array = jnp.asarray(random.standard_normal((6, 5, 4)), dtype)
    rows = jnp.asarray(random.integers(0, array.shape[axis], (30, 20)))
    found = take_rows(array, rows, axis)
    np.testing.assert_array_equal(found, jnp.take(array, rows, axis=axis))

    def plain(array):
        return jnp.take(array, rows, axis=axis)

    def ours(array):
        return take_rows(array, rows, axis)

    _, moved = jax.jvp(ours, (array,), (array,))
    np.testing.assert_array_equal(moved, found)
    cotangent = jnp.asarray(random.standard_normal(found.shape), dtype)
    (gradient,) = jax.vjp(ours, array)[1](cotangent)
    exact = jax.vjp(plain, array.astype("float64"))[1](cotangent.astype("float64"))[0]
    assert gradient.dtype == dtype
    # Rounded once, whatever is added up.
    np.testing.assert_allclose(
        gradient.astype("float64"),
        exact,
        rtol=float(jnp.finfo(dtype).eps),
        atol=3e-5,
    )
    by_vmap = jax.vmap(jax.grad(lambda a, r: take_rows(a, r, axis).sum()), (None, 0))
    parts = by_vmap(array, rows).astype("float64").sum(0)
    whole = jax.grad(lambda a: ours(a).sum())(array).astype("float64")
    np.testing.assert_array_equal(parts, whole)
