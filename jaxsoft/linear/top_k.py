"""The best classes of a softmax layer, without the logits."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.numerics import compute_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import (
    KernelLayout,
    MeshAxes,
    Operands,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.best import Best
from jaxsoft.linear.lora import LoRA

__all__ = ["linear_top_k"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_top_k(
    hidden: ArrayLike,
    kernel: ArrayLike,
    k: int,
    *,
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
) -> tuple[jax.Array, jax.Array]:
    """The k most probable classes of each token, exactly, and their log-probabilities.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      k: how many classes, in [1, V].
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞], a scalar or [...]; the classes do not depend on it.
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
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None or "xla".

    Returns:
      A pair: log-probabilities [..., k], descending, float32 (float64 if an input is),
      and class ids [..., k], int32; equal logits are ordered by id. Where fewer than k
      classes are kept the rest has log-probability -inf and id -1.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The log-probabilities are normalised over all kept classes, and differentiable as
      those of `linear_log_prob_at`, which the derivative computes anew. They are what
      `linear_distillation_top_k` takes from a teacher.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_top_k
      >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 2.0, 1.0, 2.0]])
      >>> log_probs, class_ids = linear_top_k(hidden, kernel, 3)
      >>> print(class_ids, np.asarray(log_probs).round(2))
      [[1 3 2]] [[-0.92 -0.92 -1.92]]

    References:
      Milakov and Gimelshein, Online normalizer calculation for softmax,
      arXiv:1805.02867 (softmax fused with top-k).
    """
    mesh_axes.check_token_axes(token_axes, vocab_axis)
    call = prepare(
        "linear_top_k",
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
    k = checks.positive_integer("k", k)
    if k > call.num_classes():
        raise ValueError(f"`k` must be at most V = {call.num_classes()}, got {k}.")
    return _top_k(Best(call.config, k), call.arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _top_k(fold: Best, arrays: Operands) -> tuple[jax.Array, jax.Array]:
    """Folds leading axes into rows, computes, and unfolds."""
    shape = (*arrays.hidden.shape[:-1], fold.k)
    if not math.prod(shape):
        dtype = compute_dtype(arrays.hidden, arrays.kernel)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, jnp.int32)
    best = stream(fold, fold_rows(fold.config, arrays))
    return best.log_probs.reshape(shape), best.ids.reshape(shape)
