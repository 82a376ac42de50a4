"""The dtypes that arithmetic happens in."""

import jax
import jax.numpy as jnp

__all__ = ["compute_dtype", "operand_dtype"]


def compute_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns the dtype of statistics: float64 if any input is, else float32."""
    if any(a.dtype == jnp.float64 for a in arrays):
        return jnp.dtype(jnp.float64)
    return jnp.dtype(jnp.float32)


def operand_dtype(a: jax.Array, b: jax.Array) -> jnp.dtype:
    """Returns the dtype in which two arrays are multiplied: theirs, or one wider.

    Unlike `jnp.promote_types` it does not depend on JAX's promotion mode.
    """
    return a.dtype if a.dtype == b.dtype else compute_dtype(a, b)
