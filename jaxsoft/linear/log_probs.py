"""Log-probabilities of given classes, and the entropy, without the logits."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    keep_temperature,
    keep_tokens,
    labelled_tokens,
    token_weights,
    weigh_tokens,
)
from jaxsoft.linear.arguments import KernelLayout, MeshAxes, check_ids, prepare
from jaxsoft.linear.folds.statistics import statistics
from jaxsoft.linear.lora import LoRA
from jaxsoft.logits.softmax import entropy, log_softmax

__all__ = ["linear_log_prob", "linear_log_prob_at"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_log_prob(
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
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each label, and the entropy, of a softmax layer.

    `log p_label = (u_label - m) / τ - log Σ_v exp((u_v - m) / τ)` and
    `-Σ_v p_v log p_v`, with `u = softcap(hidden @ kernel + bias)` and m = max u. This
    is what policy gradients (PPO, GRPO), preference losses (DPO) and evaluation are
    made of.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
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
      weights: [...] booleans or reals, one weight a token, which its numbers are
        multiplied by; a token of weight 0 has log-probability and entropy 0, and
        gradients of 0, whatever its label and hidden state, NaN included.
      ignore_label: a label whose tokens have weight 0, such as -100; or None.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla", "reference", "mosaic_tpu" or "mosaic_gpu", as in
        `linear_statistics`.

    Returns:
      A pair of log-probability, at most 0, and entropy, in [0, log V]: [...] float32
      (float64 if an input is), times the weights. The log-probability is NaN for a
      label outside [0, V), -inf for a dropped class.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Both are differentiable in `hidden`, `kernel`, `bias` and `temperature`, as
      `linear_statistics` is, in one backward pass.

    Example:
      The loss of GRPO for one group of answers to a prompt, from the policy's head:

      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import linear_log_prob
      >>> def grpo_loss(kernel, hidden, tokens, old_log_prob, advantages):
      ...     log_prob, entropy = linear_log_prob(hidden, kernel, tokens)
      ...     ratio = jnp.exp(log_prob - old_log_prob)
      ...     advantages = advantages[:, None]
      ...     clipped = jnp.clip(ratio, 0.8, 1.2) * advantages
      ...     loss = -jnp.minimum(ratio * advantages, clipped)
      ...     return (loss - 0.01 * entropy).mean()
      >>> hidden, tokens = jnp.ones((2, 3, 8)), jnp.zeros((2, 3), jnp.int32)
      >>> kernel = jnp.zeros((8, 100))
      >>> old_log_prob, _ = linear_log_prob(hidden, kernel, tokens)
      >>> rewards = jnp.array([1.0, 0.0])
      >>> advantages = (rewards - rewards.mean()) / rewards.std()
      >>> loss = grpo_loss(kernel, hidden, tokens, old_log_prob, advantages)
      >>> print(f"{loss:.4f}")
      -0.0461

      Labels of -100 where a token is padding:

      >>> tokens = tokens.at[1, 2].set(-100)
      >>> log_prob, _ = linear_log_prob(hidden, kernel, tokens, ignore_label=-100)
      >>> print(log_prob[1])
      [-4.6051702 -4.6051702  0.       ]

    References:
      Shao et al., DeepSeekMath (GRPO), arXiv:2402.03300; Wijmans et al., Cut Your
      Losses in Large-Vocabulary Language Models, arXiv:2411.09009.
    """
    mesh_axes.check_token_axes(token_axes, vocab_axis)
    hidden, labels, token_weight = labelled_tokens(
        hidden, labels, weights, ignore_label
    )
    call = prepare(
        "linear_log_prob",
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
    of_tokens = statistics(call, ("expected",)).with_one_label()
    log_prob = weigh_tokens(token_weight, of_tokens.log_prob)
    return log_prob, weigh_tokens(token_weight, of_tokens.entropy)


class _Options(TypedDict, total=False):
    """Options of `linear_log_prob_at` but `normalize`, which says what it returns."""

    bias: ArrayLike | None
    temperature: ArrayLike
    logit_softcap: float | None
    class_mask: ArrayLike | None
    class_bits: ArrayLike | None
    kernel_scale: ArrayLike | None
    lora: LoRA | None
    weights: ArrayLike | None
    ignore_label: int | None
    kernel_layout: KernelLayout
    precision: jax.lax.PrecisionLike
    vocab_axis: MeshAxes
    token_axes: MeshAxes
    workspace_bytes: int | None
    implementation: Implementation | None


@overload
def linear_log_prob_at(
    hidden: ArrayLike,
    kernel: ArrayLike,
    class_ids: ArrayLike,
    *,
    normalize: Literal[False] = False,
    **options: Unpack[_Options],
) -> jax.Array: ...


@overload
def linear_log_prob_at(
    hidden: ArrayLike,
    kernel: ArrayLike,
    class_ids: ArrayLike,
    *,
    normalize: Literal[True],
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array]: ...


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_log_prob_at(
    hidden: ArrayLike,
    kernel: ArrayLike,
    class_ids: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    normalize: bool = False,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Log-probabilities of K classes for each token of a softmax layer.

    As `linear_log_prob`, for K classes a token in one stream: the candidates of a
    speculative decoder, the answers of a multiple choice, a teacher's best classes.

    With `normalize` they are those of the softmax over these classes alone,
    `log p_k = u_k / τ - log Σ_j exp(u_j / τ)`, the sum over the K classes: the policy
    under the filters that its sampler drew by, which sampling replay needs.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      class_ids: [..., K] integers in [0, V), K >= 1; repeated ids are fine.
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
      weights: [...] booleans or reals, one weight a token, which its log-probabilities
        are multiplied by; a token of weight 0 has log-probabilities 0, and gradients
        of 0, whatever its ids and hidden state, NaN included.
      ignore_label: an id whose log-probability is 0, such as -100 where a token has
        fewer than K classes; a token that has no other has weight 0. None ignores none,
        or -1 with `normalize`.
      normalize: whether the K classes of a token share all of its probability. A class
        that is listed twice counts twice.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference".

    Returns:
      [..., K] float32 (float64 if an input is), at most 0; NaN for an id outside
      [0, V), -inf for a dropped class. With `normalize` a pair of these and the entropy
      of the K classes, [...] in [0, log K]; an id outside [0, V) makes a token's NaN.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Differentiable in `hidden`, `kernel`, `bias` and `temperature`, as
      `linear_statistics` is.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_log_prob_at
      >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0, 2.0]])
      >>> log_probs = linear_log_prob_at(hidden, kernel, jnp.array([[2, 0]]))
      >>> print(np.asarray(log_probs).round(4))
      [[-0.4076 -2.4076]]

      The ratio of GRPO where the sampler kept some classes of each token: the drawn one
      comes first, and -1 fills up.

      >>> kept = jnp.array([[2, 1, -1]])
      >>> log_probs, entropy = linear_log_prob_at(hidden, kernel, kept, normalize=True)
      >>> print(np.asarray(log_probs).round(4), np.asarray(entropy).round(4))
      [[-0.3133 -1.3133  0.    ]] [0.5822]

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models,
      arXiv:2411.09009.
    """
    mesh_axes.check_token_axes(token_axes, vocab_axis)
    if normalize and ignore_label is None:
        ignore_label = -1
    hidden = checks.floating("hidden", hidden)
    ids = check_ids("class_ids", class_ids, hidden.shape[:-1])
    token_weight = token_weights(hidden.shape[:-1], weights)
    id_weight = token_weights(ids.shape, None, class_ids, ignore_label)
    if id_weight is not None:
        listed = jnp.max(id_weight, axis=-1)
        token_weight = (
            listed if token_weight is None else jnp.where(listed > 0, token_weight, 0)
        )
    hidden = keep_tokens(token_weight, hidden)
    ids = keep_tokens(id_weight, keep_tokens(token_weight, ids))
    tau = keep_temperature(token_weight, temperature)
    call = prepare(
        "linear_log_prob_at",
        hidden,
        kernel,
        class_ids=ids,
        bias=bias,
        # The K classes are centred on their own best one, and tempered, afterwards.
        temperature=1.0 if normalize else tau,
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
    of_tokens = statistics(call, ("raw_label",) if normalize else ())
    assert of_tokens.label is not None
    if normalize:
        where = None if id_weight is None else id_weight != 0
        among = {"temperature": tau, "where": where}
        log_probs = weigh_tokens(id_weight, log_softmax(of_tokens.label, **among))
        entropies = entropy(of_tokens.label, **among)
        return tuple(weigh_tokens(token_weight, x) for x in (log_probs, entropies))
    log_probs = of_tokens.label - jnp.expand_dims(of_tokens.log_sum, -1)
    return weigh_tokens(token_weight, weigh_tokens(id_weight, log_probs))
