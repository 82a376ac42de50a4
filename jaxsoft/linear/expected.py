"""The mean of values under a softmax layer's probabilities, which are never stored."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, noise
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import (
    KernelLayout,
    MeshAxes,
    Operands,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.mixture import Mixed, Mixture
from jaxsoft.linear.lora import LoRA

__all__ = ["linear_expected"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_expected(
    hidden: ArrayLike,
    kernel: ArrayLike,
    values: ArrayLike,
    *,
    key: jax.Array | None = None,
    hard: bool = False,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The expected value, or a relaxed sample of it, under a softmax layer.

    `Σ_v p_v values_v` with `p = softmax(u / τ)` and
    `u = softcap(hidden @ kernel + bias)`: a differentiable mixture of embeddings over
    a whole vocabulary. With a key, `p = softmax((u + g) / τ)` with standard Gumbel
    noise g of its own for every token and class: the Gumbel-softmax mixture.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      values: [V, D] floating, such as an embedding table.
      key: a JAX random key for Gumbel noise, or None for none.
      hard: whether the result is `values` at the largest logit (with its noise), and
        the gradient that of the mixture: the straight-through estimator.
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞], a scalar, [...] or [..., 1].
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      class_bits: [..., ceil(V / 32)] uint32 or int32, a mask of each token: bit v % 32
        of word v // 32 is 1 where class v is kept, of all shards' classes. None keeps
        all.
      kernel_scale: floating, for a kernel of int8, float8 or other short numbers, which
        it multiplies: a scalar, [V], or one for each block of the kernel, whose axes
        its own divide. No gradient flows to such a kernel. None for no scale.
      lora: a `LoRA`, whose `(hidden @ a) @ b` is added to the products; or None.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes, `values`
        included; see `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens, which number
        the rows that noise is drawn for.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None or "xla".

    Returns:
      [..., D] in the dtype of `values`; 0 for a row without any kept class.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Weights are rounded to the dtype of `values` for the product, which accumulates
      in float32. Differentiable in reverse mode, to first order, in `hidden`,
      `kernel`, `values`, `bias` and `temperature`; noise is drawn again for the
      gradient, not stored. Its bits depend on the key, the token's place and the class
      alone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_expected
      >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0]])
      >>> values = jnp.array([[0.0], [1.0]])
      >>> print(np.asarray(linear_expected(hidden, kernel, values)).round(4))
      [[0.7311]]
      >>> key = jax.random.key(1)
      >>> print(linear_expected(hidden, kernel, values, key=key, hard=True).shape)
      (1, 1)

    References:
      Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144; Bengio et al., arXiv:1308.3432 (straight-through).
    """
    rows_over = mesh_axes.check_token_axes(token_axes, vocab_axis)
    call = prepare(
        "linear_expected",
        hidden,
        kernel,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        class_bits=class_bits,
        kernel_scale=kernel_scale,
        lora=lora,
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    values = checks.floating("values", values)
    number = call.arrays.num_classes(call.config)
    if values.ndim != 2 or values.shape[0] != number:
        raise ValueError(
            f"`values` must have shape [V, D] with V = {number}, got {values.shape}."
        )
    fold = Mixture(call.config, bool(hard), values.dtype.name)
    return _expected(fold, rows_over, key, call.arrays, values)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _expected(
    fold: Mixture,
    rows_over: tuple[str, ...],
    key: jax.Array | None,
    arrays: Operands,
    values: jax.Array,
) -> jax.Array:
    """Folds leading axes into rows, computes, and unfolds."""
    shape = (*arrays.hidden.shape[:-1], values.shape[1])
    count = math.prod(arrays.hidden.shape[:-1])
    if not count or not values.shape[1]:
        return jnp.zeros(shape, values.dtype)
    words = None
    if key is not None:
        words = noise.row_words(key, count, mesh_axes.offset(rows_over, count))
    mixed = Mixed(fold_rows(fold.config, arrays), values, words)
    return stream(fold, mixed).mixture.reshape(shape)
