"""Matrix products of narrow numbers, their derivatives, and NaN that is not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._core.numerics import matmul, over_temperature
from tests.accelerators.mosaic_tpu import products


def pair(dtype, rows=6, inner=8, columns=5):
    random = np.random.default_rng(0)
    shapes = (rows, inner), (inner, columns)
    return [jnp.asarray(random.standard_normal(s), dtype) for s in shapes]


def total(a, b):
    return jnp.sum(jnp.sin(matmul(a, b, None, jnp.dtype("float32"))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_derivatives_multiply_operands_of_one_dtype(dtype):
    a, b = pair(dtype)
    assert matmul(a, b, None, jnp.dtype("float32")).dtype == "float32"
    traced = jax.jit(jax.grad(total, (0, 1))).trace(a, b)
    found = products(traced.jaxpr.jaxpr)
    assert len(found) == 3 and {tuple(t) for t in found} == {(dtype, dtype)}
    gradients = jax.jit(jax.grad(total, (0, 1)))
    exact = gradients(a.astype("float32"), b.astype("float32"))
    for own, truth in zip(gradients(a, b), exact, strict=True):
        assert own.dtype == dtype
        own = np.asarray(own, "float32")
        np.testing.assert_allclose(own, truth, atol=0.02 * np.abs(truth).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_narrow_numbers_are_not_rounded(dtype):
    a, b = pair(dtype)
    # Not inside jax.jit, where XLA for CPU leaves out the rounding in question.
    found = matmul(a, b, None, jnp.dtype("float32"))
    exact = np.asarray(a, "float64") @ np.asarray(b, "float64")
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argument", [0, 1])
def test_a_constant_operand_has_no_product_of_its_own(argument):
    traced = jax.jit(jax.grad(total, argument)).trace(*pair("bfloat16"))
    assert len(products(traced.jaxpr.jaxpr)) == 2


def test_sums_of_many_terms_do_not_stall():
    # In bfloat16 the sum of 4096 ones would stop at 256.
    a, b = np.ones((4096, 2), "bfloat16"), np.ones((2, 3), "bfloat16")
    gradient = jax.grad(lambda b: matmul(a, b, None, jnp.dtype("float32")).sum())
    found = jax.jit(gradient)(b)
    np.testing.assert_array_equal(found, 4096)


def test_first_and_second_derivatives_in_wide_dtypes():
    with jax.enable_x64(True):
        a, b = pair("float64", 2, 3, 2)

        def plain(a, b):
            return jnp.sum(jnp.sin(a @ b))

        def own(a, b):
            return jnp.sum(jnp.sin(matmul(a, b, "highest", jnp.dtype("float64"))))

        for derivative in (jax.jacfwd, jax.jacrev, jax.hessian):
            both = [derivative(f, (0, 1)) for f in (own, plain)]
            found, truth = jax.jit(lambda a, b, fs=both: [f(a, b) for f in fs])(a, b)
            for one, other in zip(*map(jax.tree.leaves, (found, truth)), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    batch = np.stack([pair("float32")[0]] * 2)
    b = pair("float32")[1]
    found = jax.vmap(lambda a: matmul(a, b, None, jnp.dtype("float32")))(batch)
    np.testing.assert_allclose(found, batch @ np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [8e37, 1e38, 3e38])
def test_quotients_by_temperatures_whose_inverse_is_subnormal(temperature):
    x = np.asarray([-3e38, 0, 1e37, 3e38], np.float32)
    found = jax.jit(over_temperature, static_argnums=1)(x, temperature)
    np.testing.assert_allclose(found, x / temperature, rtol=1e-6)


def test_debug_nans_without_jit():
    """Operations that run one by one make no NaN that is not chosen."""
    x, labels = jnp.array([1.0, 2.0, -3.0]), jnp.array(1)
    key = jax.random.key(0)
    functions = (
        lambda x: jaxsoft.softmax(x)[0],
        jaxsoft.logsumexp,
        jaxsoft.entropy,
        lambda x: jaxsoft.softmax_cross_entropy(x, labels),
        lambda x: jaxsoft.distillation_loss(x, x[::-1], 2.0),
        lambda x: jaxsoft.gumbel_softmax(key, x, 0.5)[0],
        lambda x: jaxsoft.linear_cross_entropy(x[None], jnp.eye(3), labels[None]),
    )
    with jax.debug_nans(True), jax.disable_jit():
        for function in functions:
            assert np.isfinite(jax.grad(function)(x)).all()
