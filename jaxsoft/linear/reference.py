"""The definition of the statistics, from stored logits; differentiated by JAX."""

import jax
import jax.numpy as jnp

from jaxsoft._core.dtypes import compute_dtype
from jaxsoft._core.temperature import divide_by_temperature
from jaxsoft.linear.operands import Config, Fields, Operands

__all__ = ["logits", "statistics"]


def logits(config: Config, operands: Operands) -> jax.Array:
    """Returns u [N, V]: the capped logits, -inf at masked classes."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    kernel = operands.kernel if config.class_axis == 1 else operands.kernel.T
    operand_dtype = operands.matmul_dtype()
    u = jnp.matmul(
        operands.hidden.astype(operand_dtype),
        kernel.astype(operand_dtype),
        precision=config.precision,
        preferred_element_type=dtype,
    )
    if operands.bias is not None:
        u = u + operands.bias.astype(dtype)[None]
    if config.softcap is not None:
        capped = config.softcap * jnp.tanh(u / config.softcap)
        u = jnp.where(u == -jnp.inf, u, capped)
    if operands.class_mask is not None:
        u = jnp.where(operands.class_mask[None], u, -jnp.inf)
    if operands.excluded is not None:
        classes = jnp.arange(u.shape[1], dtype=jnp.int32)
        dropped = operands.excluded[..., None] == classes[None, None]
        u = jnp.where(jnp.any(dropped, axis=1), -jnp.inf, u)
    return u


def statistics(config: Config, operands: Operands) -> Fields:
    """Returns the wanted statistics of every row."""
    u = logits(config, operands)
    kept = u != -jnp.inf
    largest = jax.lax.stop_gradient(jnp.max(u, axis=1, keepdims=True))
    peak = jnp.where(largest == -jnp.inf, 0, largest)
    c = divide_by_temperature(u, peak, operands.temperature(config))
    weights = jnp.exp(c)
    total = jnp.sum(weights, axis=1, keepdims=True)
    total = jnp.where(largest == -jnp.inf, 1, total)
    label = mean = expected = argmax = None
    if operands.labels is not None:
        classes = jnp.arange(u.shape[1], dtype=jnp.int32)
        is_label = operands.labels[..., None] == classes[None, None]
        label = jnp.sum(jnp.where(is_label, c[:, None], 0), axis=2)
    if config.mean:
        number = jnp.maximum(jnp.sum(kept, axis=1), 1)
        mean = jnp.sum(jnp.where(kept, c, 0), axis=1) / number.astype(c.dtype)
    if config.expected:
        finite = jnp.where(weights == 0, 0, c)
        expected = jnp.sum(weights / total * finite, axis=1)
    if config.argmax:
        argmax = jnp.argmax(u, axis=1).astype(jnp.int32)
    rest = None
    if config.rest and operands.labels is not None:
        classes = jnp.arange(u.shape[1], dtype=jnp.int32)[None, None]
        listed = jnp.any(operands.labels[..., None] == classes, axis=1)
        rest = jnp.log(jnp.sum(jnp.where(listed, 0, weights), axis=1))
    log_sum = jnp.log(total)[:, 0]
    return Fields(largest[:, 0], log_sum, label, mean, expected, argmax, rest)
