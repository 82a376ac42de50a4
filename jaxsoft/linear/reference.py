"""The definition of the statistics, from stored logits; differentiated by JAX."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxsoft._core.numerics import compute_dtype, divide_by_temperature, finite_peak
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.tiles import lora_slice, scale_slice, whole_kernel

__all__ = ["logits", "rank", "statistics", "top_k"]


def logits(config: Config, operands: Operands) -> jax.Array:
    """Returns u [..., V]: the capped logits, -inf at masked classes."""
    hidden, kernel = operands.hidden, operands.kernel
    dtype, operand_dtype = compute_dtype(hidden, kernel), operands.matmul_dtype()
    leading = range(hidden.ndim - 1)

    def product(states, kernel, axis):
        return jax.lax.dot_general(
            states,
            kernel,
            (((states.ndim - 1,), (axis,)), ((), ())),
            precision=config.precision,
            preferred_element_type=dtype,
        )

    kernel = whole_kernel(config, operands)
    u = product(hidden.astype(operand_dtype), kernel, 1 - config.class_axis)
    if operands.has_scale_of_class():
        u = u * jnp.expand_dims(scale_slice(operands, 0, u.shape[-1])[0], leading)
    if operands.lora_hidden is not None:
        columns = lora_slice(config, operands, 0, u.shape[-1])
        u = u + product(operands.lora_hidden, columns, 0)
    if operands.bias is not None:
        u = u + jnp.expand_dims(operands.bias, leading).astype(dtype)
    if config.softcap is not None:
        capped = config.softcap * jnp.tanh(u / config.softcap)
        u = jnp.where(u == -jnp.inf, u, capped)
    if operands.class_mask is not None:
        u = jnp.where(jnp.expand_dims(operands.class_mask, leading), u, -jnp.inf)
    bits = operands.kept_bits(config, 0, u.shape[-1])
    if bits is not None:
        u = jnp.where(bits, u, -jnp.inf)
    if operands.excluded is not None:
        classes = jnp.arange(u.shape[-1], dtype=jnp.int32)
        dropped = (
            operands.excluded[..., None] == jnp.expand_dims(classes, leading)[None]
        )
        u = jnp.where(jnp.any(dropped, axis=-2), -jnp.inf, u)
    if config.drops_group and operands.group is not None:
        assert operands.class_groups is not None and operands.labels is not None
        alike = operands.group == operands.class_groups[None]
        is_label = operands.labels == jnp.arange(u.shape[-1], dtype=jnp.int32)[None]
        u = jnp.where(alike & ~is_label, -jnp.inf, u)
    return u


def statistics(
    config: Config, operands: Operands, wanted: Collection[str]
) -> dict[str, jax.Array]:
    """Returns the largest logit, log-sum and wanted statistics of every row by name."""
    u = logits(config, operands)
    kept = u != -jnp.inf
    largest = jax.lax.stop_gradient(jnp.max(u, axis=1, keepdims=True))
    peak = finite_peak(largest)
    c = divide_by_temperature(u, peak, operands.temperature(config))
    weights = jnp.exp(c)
    total = jnp.sum(weights, axis=1, keepdims=True)
    total = jnp.where(largest == -jnp.inf, 1, total)
    fields = {"max": largest[:, 0], "log_sum": jnp.log(total)[:, 0]}
    if operands.labels is not None:
        classes = jnp.arange(u.shape[1], dtype=jnp.int32)
        is_label = operands.labels[..., None] == classes[None, None]
        fields["label"] = jnp.sum(jnp.where(is_label, c[:, None], 0), axis=2)
        if "raw_label" in wanted:
            fields["raw_label"] = jnp.sum(jnp.where(is_label, u[:, None], 0), axis=2)
    if "mean" in wanted:
        if operands.group is not None and operands.class_groups is not None:
            kept = kept & (operands.group == operands.class_groups[None])
        number = jnp.maximum(jnp.sum(kept, axis=1), 1)
        total_c = jnp.sum(jnp.where(kept, c, 0), axis=1)
        fields["mean"] = total_c / number.astype(c.dtype)
    if "expected" in wanted:
        finite = jnp.where(weights == 0, 0, c)
        fields["expected"] = jnp.sum(weights / total * finite, axis=1)
    if "argmax" in wanted:
        fields["argmax"] = jnp.argmax(u, axis=1).astype(jnp.int32)
    if "rest" in wanted and operands.labels is not None:
        classes = jnp.arange(u.shape[1], dtype=jnp.int32)[None, None]
        listed = jnp.any(operands.labels[..., None] == classes, axis=1)
        remaining = jnp.sum(jnp.where(listed, 0, weights), axis=1)
        fields["rest"] = jnp.log(remaining)
    return fields


def rank(config: Config, operands: Operands) -> jax.Array:
    """Returns how many kept classes beat the one label of every row, [N] int32."""
    assert operands.labels is not None
    # The soft-cap keeps the order of logits.
    uncapped = dataclasses.replace(config, softcap=None)
    u, label = logits(uncapped, operands), operands.labels
    number = u.shape[1]
    classes = jnp.arange(number, dtype=jnp.int32)[None]
    own = jnp.take_along_axis(u, jnp.maximum(label, 0), axis=1, mode="clip")
    beat = jnp.where(classes < label, u >= own, u > own)
    is_kept = (label >= 0) & (own != -jnp.inf)
    is_kept &= jnp.all(u < jnp.inf, axis=1, keepdims=True)
    above = jnp.sum(beat, axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.where(is_kept, above, number)[:, 0]


def top_k(config: Config, operands: Operands, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities and ids of the best classes of every row, [N, K]."""
    u = logits(config, operands)
    best, ids = jax.lax.top_k(jax.lax.stop_gradient(u), k)
    largest = finite_peak(best[:, :1])
    c = divide_by_temperature(u, largest, operands.temperature(config))
    log_sum = jax.nn.logsumexp(c, axis=1, keepdims=True)
    log_sum = jnp.where(best[:, :1] == -jnp.inf, 0, log_sum)
    log_probs = jnp.take_along_axis(c, ids, axis=1) - log_sum
    return log_probs, jnp.where(best == -jnp.inf, -1, ids)
