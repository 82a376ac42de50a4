"""The dtypes that arithmetic happens in."""

import jax
import jax.numpy as jnp

__all__ = ["compute_dtype"]


def compute_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns the dtype of statistics: float64 if any input is, else float32."""
    if any(jnp.result_type(a) == jnp.float64 for a in arrays):
        return jnp.dtype(jnp.float64)
    return jnp.dtype(jnp.float32)
