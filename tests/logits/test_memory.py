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


def test_the_gradient_of_smoothed_labels_stores_no_second_matrix(monkeypatch):
    """The mean of the logits is taken in parts, whether or not a class is dropped."""
    # Rows that several devices may share are not sliced.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    logits = jax.ShapeDtypeStruct((64, 65536), jnp.float32)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)

    def loss(x, labels):
        return jaxsoft.softmax_cross_entropy(x, labels, label_smoothing=0.1).sum()

    gradient = jax.jit(jax.value_and_grad(loss))
    memory = gradient.lower(logits, labels).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4 * logits.size
