"""What functions of stored logits keep beside them, compiled as users compile."""

import jax
import jax.numpy as jnp

import jaxsoft


def test_the_gradient_of_logsumexp_stores_no_second_matrix():
    """Its exponentials are those of the value: nothing of [N, V] is kept beside it."""
    logits = jax.ShapeDtypeStruct((256, 4096), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(lambda x: jaxsoft.logsumexp(x).sum()))
    memory = gradient.lower(logits).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < logits.size
