"""Cross-entropy of a softmax layer without its logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.numerics import scaled
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    Reduction,
    keep_temperature,
    labelled_tokens,
    reduce_losses,
)
from jaxsoft.linear.arguments import KernelLayout, MeshAxes, prepare
from jaxsoft.linear.folds.statistics import LogitStatistics, statistics
from jaxsoft.linear.lora import LoRA
from jaxsoft.linear.token_losses import TokenLoss, statistics_loss

__all__ = ["CrossEntropy", "linear_cross_entropy"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    reduction: Reduction = "mean",
    return_statistics: bool = False,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Cross-entropy of a softmax layer, its logits streamed.

    `-(1 - ε) log p_label - ε mean_v log p_v + z_loss · lse²`, with p the softmax of
    `u / τ`, `u = softcap(hidden @ kernel + bias)`, ε the smoothing, the mean over the
    kept classes and lse = log Σ exp(u / τ).

    Use it in place of a cross-entropy of `hidden @ kernel` whenever [N, V] logits
    would not fit or cost time. At 8192 × 2304 × 256000 in bfloat16, value and gradient
    of the mean need 0.2 GiB beside the gradients on an H100 with a workspace of 2**27
    bytes, and 2.3 GiB by default, of which 2.2 are the float32 sum of the kernel's
    gradient; stored logits take 11.7 GiB.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`, such as a tied
        embedding table; it is never transposed nor padded in memory.
      labels: [...] integers in [0, V).
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
      label_smoothing: ε in [0, 1], spread evenly over the kept classes.
      z_loss: weight >= 0 of the squared log-sum-exp.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing, whatever its label and hidden state, to its own
        gradient either.
      ignore_label: a label whose tokens have weight 0, such as -100; or None.
      reduction: "mean" (Σ weight · loss / Σ weight, 0 if the weights sum to 0), "sum"
        (Σ weight · loss) or "none" (weight · loss).
      return_statistics: whether to return the `LogitStatistics` as well.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axis (or axes) that the classes are
        sharded over: `kernel`, `bias` and `class_mask` are this shard's, labels and V
        those of the whole. None: the classes are all here.
      token_axes: inside `jax.shard_map`, the mesh axes that the tokens are sharded
        over: "mean" and "sum" are those of all shards.
      workspace_bytes: the temporary memory, in bytes, that logits and what is kept of
        them for a gradient may take; the fastest plan that fits is taken. None: a
        quarter of the float32 logits, within [96, 512] MiB, and beside it a float32 sum
        of the kernel's gradient where the loss is reduced and the kernel is narrower.
        See the Notes of `linear_statistics`.
      implementation: None, "xla", "reference" (stored logits, for checking) or
        the kernels "mosaic_tpu" and "mosaic_gpu", as in `linear_statistics`.

    Returns:
      A scalar, or [...] with reduction "none", in float32 (float64 if an input is);
      with `return_statistics`, a pair of it and a `LogitStatistics`. A label outside
      [0, V) gives NaN where its weight is not 0, a label that is a dropped class inf,
      and a row without any kept class 0.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Matrix products take the dtype of the inputs (the wider of the two) and
      accumulate in float32, as do losses, weights and the gradient of `hidden`; each
      gradient is rounded once to the dtype of its argument. Differentiable in reverse
      mode in `hidden`, `kernel`, `bias`, `temperature` and `weights`; forward mode is
      lost, except over reverse. A gradient that is not asked for is not computed.
      Under `jax.vmap` with a shared kernel the batch becomes rows. For a TPU 7x, XLA
      copies a bfloat16 kernel into another layout before the loop over its tiles, once
      or, with gradients, up to four times; "mosaic_tpu" does not, nor do other TPUs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import linear_cross_entropy
      >>> hidden, kernel = jnp.ones((4, 8)), jnp.zeros((8, 1000))
      >>> loss, grad = jax.value_and_grad(linear_cross_entropy)(
      ...     hidden, kernel, jnp.array([3, 1, 4, -100]), ignore_label=-100
      ... )
      >>> print(f"{loss:.4f}", grad.shape)
      6.9078 (4, 8)

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models,
      arXiv:2411.09009; Szegedy et al., arXiv:1512.00567 (label smoothing); Chowdhery
      et al., PaLM, arXiv:2204.02311 (z-loss); Gemma Team, arXiv:2408.00118 (soft-cap).
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    smoothing = checks.scalar_in("label_smoothing", label_smoothing, 0, 1)
    z_weight = checks.scalar_in("z_loss", z_loss, 0, float("inf"))
    axes = mesh_axes.check_token_axes(token_axes, vocab_axis)
    hidden, labels, token_weight = labelled_tokens(
        hidden, labels, weights, ignore_label
    )
    call = prepare(
        "linear_cross_entropy",
        hidden,
        kernel,
        labels,
        bias=bias,
        temperature=keep_temperature(token_weight, temperature),
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
    wanted = ("mean",) if smoothing else ()
    loss = CrossEntropy(smoothing, z_weight)
    if not return_statistics:
        return statistics_loss(call, wanted, loss, token_weight, reduction, axes)
    of_tokens = statistics(call, ("mean", "expected"))
    losses = loss.of_tokens(of_tokens)
    losses = reduce_losses(losses, token_weight, reduction, axes)
    return losses, of_tokens.with_one_label()


@dataclasses.dataclass(frozen=True)
class CrossEntropy(TokenLoss):
    """The loss of each token.

    Attributes:
      smoothing: ε.
      z_weight: of the squared log-sum-exp.
    """

    smoothing: float
    z_weight: float

    def of_tokens(self, statistics: LogitStatistics) -> jax.Array:
        """Returns the losses [...] of tokens."""
        statistics = statistics.with_one_label()
        assert statistics.label is not None
        loss = statistics.log_sum - scaled(1 - self.smoothing, statistics.label)
        if self.smoothing:
            assert statistics.mean is not None
            loss = loss - self.smoothing * statistics.mean
        if self.z_weight:
            lse = jnp.where(statistics.max == -jnp.inf, 0, statistics.lse)
            # Where lse overflows the loss is inf, and has no gradient.
            overflow = jnp.isinf(lse)
            square = jnp.where(overflow, 0, lse) ** 2
            loss = loss + self.z_weight * jnp.where(overflow, jnp.inf, square)
        invalid = jnp.isnan(statistics.label)
        return jnp.where((statistics.max == -jnp.inf) & ~invalid, 0, loss)
