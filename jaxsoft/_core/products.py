"""Matrix products whose derivatives multiply what they multiply."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

__all__ = ["matmul"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def matmul(a: jax.Array, b: jax.Array, precision: Any, dtype: jnp.dtype) -> jax.Array:
    """Returns a @ b, added up and stored in a dtype that may be wider than theirs.

    JAX's own derivative multiplies cotangents of the wide dtype by narrow operands, at
    a fraction of the rate of narrow products. Here cotangents and tangents are rounded
    to the operands' dtype first, as the derivative of `linear_statistics` rounds them.

    Args:
      a: [M, K].
      b: [K, N], of the same dtype.
      precision: of the products.
      dtype: of the result.

    Returns:
      [M, N].
    """
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)


@functools.partial(matmul.defjvp, symbolic_zeros=True)
def _matmul_jvp(
    precision: Any, dtype: jnp.dtype, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (a, b), (of_a, of_b) = primals, tangents
    value = matmul(a, b, precision, dtype)
    # The transpose of a product takes what the product returns: the operands' dtype.
    moved = jnp.zeros(value.shape, a.dtype)
    if not isinstance(of_a, SymbolicZero):
        moved += jnp.matmul(of_a, b, precision=precision)
    if not isinstance(of_b, SymbolicZero):
        moved += jnp.matmul(a, of_b, precision=precision)
    return value, moved.astype(dtype)
