"""Statistics of the softmax over `hidden @ kernel`, from one stream over classes."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import Call, KernelLayout, MeshAxes, prepare
from jaxsoft.linear.folds.ranked import ranked_statistics
from jaxsoft.linear.folds.statistics import LogitStatistics, statistics
from jaxsoft.linear.lora import LoRA

__all__ = ["linear_statistics"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
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
    return_argmax: bool = False,
    return_rank: bool = False,
    return_top_k: int | None = None,
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> LogitStatistics:
    """Log-sum-exp, log-probability, entropy and more of a softmax layer's logits.

    The logits `u = softcap(hidden @ kernel + bias)` are computed tile by tile: memory
    is a few tiles, not [N, V], and for a gradient as much of them is kept as the
    workspace holds. At 2048 × 512 × 65536 in float32 on a CPU that is 24 MiB in place
    of 512 MiB; with the gradient of `log_prob` 122 MiB, or 17 MiB with
    `workspace_bytes=2**24`.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`, such as a tied
        embedding table; it is never transposed nor padded in memory.
      labels: [...] integers in [0, V), or None.
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
      vocab_axis: inside `jax.shard_map`, the mesh axis (or axes) that the classes are
        sharded over: `kernel`, `bias` and `class_mask` are this shard's, labels and V
        those of the whole. None: the classes are all here.
      token_axes: inside `jax.shard_map`, the mesh axes that the tokens are sharded
        over; the statistics of a token do not depend on them.
      return_argmax: whether to compute `argmax`, at some cost.
      return_rank: whether to compute `rank`, how many classes beat the label, from the
        products of the same pass over the kernel; see Notes.
      return_top_k: how many of the best classes to compute in the same pass, in [1, V],
        as `top_log_probs` and `top_ids`; None for none.
      workspace_bytes: the temporary memory, in bytes, that logits and what is kept of
        them for a gradient may take; the fastest plan that fits is taken. None: a
        quarter of the float32 logits, within [96, 512] MiB. See Notes.
      implementation: None, "xla", "reference" (stored logits, for checking) or
        a kernel, not yet measured: "mosaic_tpu" for TPUs, float32 or bfloat16;
        "mosaic_gpu" for GPUs of compute capability 9.0 (Hopper) or 10.0 (Blackwell),
        bfloat16 or float16, H a multiple of 16, as is V in the layout "hv" (needs
        absl-py); of 64 they are read fastest.

    Returns:
      A `LogitStatistics` with arrays of shape [...], in float32 (float64 if an
      input is).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Matrix products take the dtype of the inputs (the wider of the two) and
      accumulate in float32. Differentiable in reverse mode, to first order in reverse
      and any order in forward-over-reverse, in `hidden`, `kernel`, `bias` and
      `temperature`. Under `jax.vmap` with a shared kernel the batch becomes rows.

      A rank compares all logits with the label's, which is known after the last tile:
      products are kept for it where the workspace (at most 256 MiB if none is
      named) has room for those of enough rows, and computed twice where it has not.

      The workspace bounds tiles of logits, the slices of the kernel that they need and
      what is kept of them. Beside it a gradient takes float32 sums: that of `hidden`
      always; that of a narrower `kernel` where a loss is reduced inside the call
      ("mean" or "sum") and no workspace is named, while one that is named has that sum
      counted in it. Under `jax.vmap` of a gradient it is the workspace of each example.
      Under plain `jax.jit` in a process of several devices, which may share the
      classes, something is kept of all classes or of none.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_statistics
      >>> statistics = linear_statistics(jnp.eye(2), jnp.eye(2), jnp.array([0, 1]))
      >>> print(np.asarray([statistics.log_prob, statistics.entropy]).round(4))
      [[-0.3133 -0.3133]
       [ 0.5822  0.5822]]

      Recall at 2 and mean reciprocal rank of labels:

      >>> hidden, labels = jnp.eye(3), jnp.array([0, 1, 2])
      >>> kernel = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
      >>> rank = linear_statistics(hidden, kernel, labels, return_rank=True).rank
      >>> print(f"{(rank < 2).mean():.4f} {(1 / (rank + 1)).mean():.4f}")
      0.6667 0.6111

    References:
      Milakov and Gimelshein, Online normalizer calculation for softmax,
      arXiv:1805.02867; Wijmans et al., Cut Your Losses in Large-Vocabulary Language
      Models, arXiv:2411.09009.
    """
    mesh_axes.check_token_axes(token_axes, vocab_axis)
    call = prepare(
        "linear_statistics",
        hidden,
        kernel,
        labels,
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
    wanted = ("mean", "expected") + (("argmax",) if return_argmax else ())
    if not return_rank and return_top_k is None:
        return statistics(call, wanted).with_one_label()
    k = _checked(call, return_rank, return_top_k)
    return ranked_statistics(call, wanted, rank=return_rank, k=k).with_one_label()


def _checked(call: Call, rank: bool, k: int | None) -> int:
    """Returns how many best classes are wanted, 0 for none."""
    implementation = call.config.implementation
    if implementation not in ("xla", "reference"):
        raise NotImplementedError(
            '`implementation` must be None, "xla" or "reference" with return_rank or '
            f"return_top_k, got {implementation!r}."
        )
    if rank and call.arrays.labels is None:
        raise ValueError("`labels` must be given with return_rank, got None.")
    if k is None:
        return 0
    k = checks.positive_integer("return_top_k", k)
    if k > call.num_classes():
        raise ValueError(
            f"`return_top_k` must be at most V = {call.num_classes()}, got {k}."
        )
    return k
