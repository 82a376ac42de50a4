"""Losses of other libraries: their names, arguments and results, computed by jaxsoft.

Whoever comes from one of them changes an import. Each function gives what its host's
formula gives, to rounding, with the exactness and the memory of this library; where a
host's formula is wrong, the Notes say what is given in its place. Nothing else of
jaxsoft imports this module.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.tokens import Reduction, reduce_losses
from jaxsoft.linear import log_probs, losses, statistics
from jaxsoft.logits import losses as of_logits
from jaxsoft.logits.softmax import logsumexp

__all__ = [
    "axlearn_cross_entropy",
    "cross_entropy_with_logits",
    "levanter_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "per_token_log_probs",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "torch_cross_entropy",
]


# T5X, MaxText and what took it from them.


def cross_entropy_with_logits(
    logits: ArrayLike, targets: ArrayLike, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of target distributions and its z-loss, as of T5X and MaxText.

    `-Σ_v targets_v log p_v + z`, with `z = z_loss · lse²`.

    Args:
      logits: [..., V] floating.
      targets: [..., V] floating, non-negative; they need not sum to 1.
      z_loss: weight >= 0 of the squared log-sum-exp.

    Returns:
      A pair of the loss, z included, and z, [...] float32 (float64 for such logits).

    Raises:
      TypeError: if an array is not floating.
      ValueError: if the shapes differ or the weight is out of its range.

    Notes:
      The hosts' derivative of targets that do not sum to 1 is not that of their loss:
      here it is. They have none by targets, nor of z where it is used by itself; here
      both have theirs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import cross_entropy_with_logits
      >>> loss, z = cross_entropy_with_logits(jnp.zeros((1, 2)), jnp.eye(2)[:1], 1e-4)
      >>> print(f"{loss[0]:.6f} {z[0]:.6f}")
      0.693195 0.000048

    References:
      Roberts et al., Scaling Up Models and Data with t5x and seqio, arXiv:2203.17189.
    """
    logits, targets = checks.floating("logits", logits), _wide(jnp.asarray(targets))
    scale = checks.scalar_in("z_loss", z_loss, 0, float("inf"))
    loss = of_logits.softmax_cross_entropy(logits, targets=targets)
    z = _z_loss(scale, logsumexp(_wide(logits)))
    return loss + z, z


def axlearn_cross_entropy(
    logits: ArrayLike,
    target_labels: ArrayLike,
    *,
    live_targets: ArrayLike | None = None,
    z_loss_scale: float = 0.0,
    label_smoothing: float = 0.0,
    soft_target_labels: ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean cross-entropy of live labels, and what it consists of, as of AXLearn.

    Means are `Σ live · x / max(Σ live, 1)`.

    Args:
      logits: [..., V] floating.
      target_labels: [...] integers; those outside [0, V) have no loss.
      live_targets: booleans or numbers that broadcast to the labels, the weight of
        each; None: 1 for labels in [0, V).
      z_loss_scale: weight >= 0 of the squared log-sum-exp.
      label_smoothing: ε in [0, 1], spread evenly over the classes.
      soft_target_labels: [..., V] floating, in place of the labels, which then say
        what counts; or None.

    Returns:
      A pair of the loss, z-loss included, and a dictionary of "total_loss", "z_loss"
      (not scaled), "cross_entropy_loss" and "accuracy", scalars, and
      "per_target_loss", [...].

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit, an option is out of its range, or labels are
        both soft and to be smoothed.

    Notes:
      "per_target_loss" is 0 where a label does not count, as the host's documentation
      says; its code gives the terms without the label there.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import axlearn_cross_entropy
      >>> loss, parts = axlearn_cross_entropy(jnp.zeros((2, 2)), jnp.array([0, -1]))
      >>> print(loss, parts["accuracy"], parts["per_target_loss"])
      0.6931472 1.0 [0.6931472 0.       ]

    References:
      Lee et al., AXLearn, arXiv:2507.05411.
    """
    logits = checks.floating("logits", logits)
    ids = checks.integer("target_labels", target_labels)
    checks.shape("target_labels", ids, logits.shape[:-1], "logits.shape[:-1]")
    if soft_target_labels is not None and label_smoothing:
        raise ValueError(
            "`label_smoothing` must be 0 with `soft_target_labels`, got "
            f"{label_smoothing}."
        )
    is_class = (ids >= 0) & (ids < logits.shape[-1])
    live = is_class if live_targets is None else jnp.asarray(live_targets)
    live = jnp.broadcast_to(live, ids.shape).astype(jnp.float32)
    counts = (live != 0) & (is_class | (soft_target_labels is not None))
    if soft_target_labels is None:
        ce = of_logits.softmax_cross_entropy(
            logits,
            jnp.where(counts, ids, 0),
            label_smoothing=label_smoothing,
            weights=counts,
        )
    else:
        soft = _wide(jnp.asarray(soft_target_labels))
        ce = of_logits.softmax_cross_entropy(logits, targets=soft, weights=counts)
    scale = checks.scalar_in("z_loss_scale", z_loss_scale, 0, math.inf)
    kept = jnp.where(counts[..., None], logits, 0)
    squared = jnp.where(counts, _z_loss(1.0, logsumexp(_wide(kept))), 0)
    each = ce + scale * squared if scale else ce
    number = jnp.maximum(jnp.sum(live), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counts, x, 0) * live) / number

    loss = mean(each)
    hits = (jnp.argmax(logits, axis=-1) == ids).astype(jnp.float32)
    return loss, {
        "total_loss": loss,
        "z_loss": mean(squared),
        "cross_entropy_loss": mean(ce),
        "per_target_loss": each,
        "accuracy": mean(hits),
    }


# Levanter.


def levanter_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    w: ArrayLike,
    *,
    block_sizes: object = None,
    dtype: DTypeLike | None = jnp.float32,
    logit_soft_cap: float | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_argmax: bool = False,
) -> tuple[jax.Array, ...]:
    """Cross-entropy and log-sum-exp of a layer, as Levanter's fused one has them.

    It is a callable for `implementation` there. `loss = lse - u_label` with
    `u = softcap(x @ w)`, without stored logits.

    Args:
      x: [..., H] floating.
      labels: [...] integers in [0, V).
      w: [H, V] floating.
      block_sizes: ignored: the plan is jaxsoft's own.
      dtype: of the results; None leaves them in float32. The sums are in float32 in
        any case.
      logit_soft_cap: cap > 0 in `cap · tanh(u / cap)`, or None.
      precision: of the matrix products, as in `jnp.matmul`.
      return_argmax: whether to give the best classes too.

    Returns:
      The loss and the log-sum-exp, [...], and with `return_argmax` the lowest class
      with the largest logit, [...] int32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or the cap is out of its range.

    Notes:
      In narrower a dtype the host's logits are rounded before they are summed, and
      those of classes close to each other become equal: these are not. A label outside
      [0, V) gives NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import levanter_cross_entropy
      >>> x, w = jnp.ones((1, 4)), jnp.zeros((4, 2))
      >>> loss, lse = levanter_cross_entropy(x, jnp.array([1]), w)
      >>> print(loss, lse)
      [0.6931472] [0.6931472]

    References:
      Levanter, github.com/marin-community/marin, `fused_cross_entropy_loss`.
    """
    del block_sizes
    found = statistics.linear_statistics(
        x,
        w,
        labels,
        logit_softcap=logit_soft_cap,
        precision=precision,
        return_argmax=return_argmax,
    )
    both = (-found.log_prob, found.lse)
    if dtype is not None:
        both = tuple(each.astype(dtype) for each in both)
    return both if found.argmax is None else (*both, found.argmax)


# Reinforcement learning: tunix, SkyRL, EasyDeL.


def per_token_log_probs(
    hidden: ArrayLike,
    ids: ArrayLike,
    kernel: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    return_entropy: bool = False,
    **options: Any,
) -> Any:
    """Log-probability of each token, and entropy, from hidden states and a kernel.

    What tunix calls `compute_chunked_logps` and EasyDeL
    `compute_per_token_logps_and_entropies_from_hidden_states`, with the head's arrays
    in place of a model or a function: `u_id / τ - lse(u / τ)`.

    Args:
      hidden: [..., H] floating, of the positions before the tokens.
      ids: [...] integers in [0, V), the tokens.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      temperature: τ in [0, ∞], a scalar or [...].
      return_entropy: whether to give the entropies too.
      options: others of `jaxsoft.linear_log_prob`, such as `kernel_layout`, `bias`,
        `logit_softcap`, `weights` or `ignore_label`.

    Returns:
      [...] float32 (float64 if an input is), or a pair of these and the entropies.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.

    Notes:
      At temperature 0 tunix divides by nothing, which is 1; here it is the limit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import per_token_log_probs
      >>> hidden, kernel = jnp.ones((1, 3, 4)), jnp.zeros((4, 2))
      >>> print(per_token_log_probs(hidden, jnp.zeros((1, 3), jnp.int32), kernel))
      [[-0.6931472 -0.6931472 -0.6931472]]

    References:
      Shao et al., DeepSeekMath (GRPO), arXiv:2402.03300.
    """
    log_prob, entropy = log_probs.linear_log_prob(
        hidden, kernel, ids, temperature=temperature, **options
    )
    return (log_prob, entropy) if return_entropy else log_prob


# Optax.


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy of target distributions, as `optax.softmax_cross_entropy`.

    `-Σ_v labels_v log p_v`, the sum over the kept classes.

    Args:
      logits: the classes on `axis`, floating.
      labels: of the shape of `logits`, non-negative; they need not sum to 1.
      axis: the class axis, or several.
      where: booleans of as many axes as `logits`, or without the class axis; False
        drops a class, or a row. None keeps all.

    Returns:
      The losses, without the class axes, float32 (float64 for such logits).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an axis is out of range.

    Notes:
      The host computes in the dtype of the logits, and its derivative by labels is NaN
      at dropped classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import softmax_cross_entropy
      >>> print(softmax_cross_entropy(jnp.zeros((1, 2)), jnp.eye(2)[:1]))
      [0.6931472]

    References:
      DeepMind, The DeepMind JAX Ecosystem, 2020 (Optax).
    """
    logits = checks.floating("logits", logits)
    targets = jnp.broadcast_to(jnp.asarray(labels), logits.shape)
    targets = _wide(targets)
    (logits, targets), where = _classes_last((logits, targets), where, axis)
    if where is not None:
        targets = jnp.where(where, targets, 0)
    return of_logits.softmax_cross_entropy(logits, targets=targets, where=where)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy of labels, as Optax's function of that name.

    `lse - x_label`, the sum over the kept classes.

    Args:
      logits: the classes on `axis`, floating.
      labels: integers in [0, V), of the shape of `logits` without the class axes.
      axis: the class axis; or several, whose classes count along all of them.
      where: booleans of as many axes as `logits`, or without the class axis; False
        drops a class, or a row, whose loss is 0. None keeps all.

    Returns:
      The losses, of the shape of the labels, float32 (float64 for such logits).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an axis is out of range.

    Notes:
      The host computes in the dtype of the logits. A label outside [0, V) gives NaN;
      there a negative one counts from the end. One whose class is dropped gives inf, as
      its probability is 0; there a finite number, perhaps below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import softmax_cross_entropy_with_integer_labels
      >>> logits, labels = jnp.zeros((1, 2)), jnp.array([1])
      >>> print(softmax_cross_entropy_with_integer_labels(logits, labels))
      [0.6931472]

    References:
      DeepMind, The DeepMind JAX Ecosystem, 2020 (Optax).
    """
    logits = checks.floating("logits", logits)
    (logits,), where = _classes_last((logits,), where, axis)
    return of_logits.softmax_cross_entropy(logits, labels, where=where)


# PyTorch and Liger.


def torch_cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Cross-entropy with PyTorch's defaults, as `torch.nn.functional.cross_entropy`.

    `-Σ_v w_v q_v log p_v`, with q the smoothed target and w the weights of classes.

    Args:
      input: logits [V], or [N, V, ...] with the classes on axis 1, floating.
      target: integers in [0, V) of the shape without the class axis, or probabilities
        of the shape of `input`, floating.
      weight: [V] reals, one a class, or None for 1.
      ignore_index: the label whose rows do not count.
      reduction: "mean" (over the weights of the labels that count, or over the rows of
        probabilities), "sum" or "none".
      label_smoothing: ε in [0, 1], spread evenly over all classes.

    Returns:
      A scalar, or with reduction "none" the shape without the class axis, float32
      (float64 for such logits).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.

    Notes:
      Where no row counts the mean is 0, and NaN in PyTorch. A label outside [0, V) that
      is not ignored gives NaN, where PyTorch raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import torch_cross_entropy
      >>> print(torch_cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -100])))
      1.3862944

    References:
      Paszke et al., PyTorch, arXiv:1912.01703.
    """
    logits = checks.floating("input", input)
    axis = min(1, logits.ndim - 1)
    logits = jnp.moveaxis(logits, axis, -1)
    target = jnp.asarray(target)
    smoothing = checks.scalar_in("label_smoothing", label_smoothing, 0, 1)
    per_class = None
    if weight is not None:
        per_class = checks.floating("weight", weight)
        checks.shape("weight", per_class, logits.shape[-1:], "(V,)")
        per_class = _wide(per_class)
    if jnp.issubdtype(target.dtype, jnp.floating):
        checks.shape("target", target, jnp.shape(input), "input.shape")
        target = _wide(target)
        q = _smoothed(jnp.moveaxis(target, axis, -1), smoothing)
        q = q if per_class is None else q * jnp.broadcast_to(per_class, q.shape)
        losses = of_logits.softmax_cross_entropy(logits, targets=q)
        return reduce_losses(losses, None, reduction)
    if per_class is None:
        return of_logits.softmax_cross_entropy(
            logits,
            target,
            label_smoothing=smoothing,
            ignore_label=ignore_index,
            reduction=reduction,
        )
    ids = checks.integer("target", target)
    checks.shape("target", ids, logits.shape[:-1], "input.shape without axis 1")
    counts = ids != ignore_index
    valid = (ids >= 0) & (ids < logits.shape[-1])
    of_label = jnp.where(counts & valid, per_class[jnp.where(valid, ids, 0)], 0)
    one_hot = jax.nn.one_hot(ids, logits.shape[-1], dtype=per_class.dtype)
    q = _smoothed(one_hot, smoothing) * jnp.broadcast_to(per_class, one_hot.shape)
    losses = of_logits.softmax_cross_entropy(logits, targets=q, weights=counts)
    losses = jnp.where(counts & ~valid, jnp.nan, losses)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "none":
        return losses
    total, divisor = jnp.sum(losses), jnp.sum(of_label)
    if reduction == "sum":
        return total
    return total / jnp.where(divisor == 0, 1, divisor)


def liger_fused_linear_cross_entropy(
    input: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
) -> Any:
    """Cross-entropy of a layer without logits, as Liger's function of that name.

    `-Σ_v q_v log p_v + z`, with q the smoothed label and `z = lse_square_scale · lse²`.

    Args:
      input: hidden states [..., H] floating.
      weight: the kernel [V, H] floating, as a PyTorch linear layer has it.
      target: [...] integers in [0, V).
      bias: [V] floating, or None.
      ignore_index: the label whose tokens do not count.
      lse_square_scale: weight >= 0 of the squared log-sum-exp.
      label_smoothing: ε in [0, 1], spread evenly over the classes.
      reduction: "mean" over the tokens that count, "sum" or "none".
      softcap: cap > 0 in `cap · tanh(u / cap)`, or None.
      return_z_loss: whether to give z by itself too, reduced like the loss.

    Returns:
      The loss, a scalar or with reduction "none" [...], in float32 (float64 if an input
      is); or a pair of it and z.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.

    Notes:
      Liger gives the loss in the dtype of its input. Where no token counts the mean is
      0. Its weights of classes are `weights[labels]` of `jaxsoft.linear_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.compat import liger_fused_linear_cross_entropy
      >>> hidden, weight = jnp.ones((2, 4)), jnp.zeros((8, 4))
      >>> labels = jnp.array([1, -100])
      >>> print(liger_fused_linear_cross_entropy(hidden, weight, labels))
      2.0794415

    References:
      Hsu et al., Liger Kernel, arXiv:2410.10989.
    """
    scale = checks.scalar_in("lse_square_scale", lse_square_scale, 0, math.inf)
    options = {
        "bias": bias,
        "logit_softcap": softcap,
        "label_smoothing": label_smoothing,
        "z_loss": scale,
        "ignore_label": ignore_index,
        "reduction": reduction,
        "kernel_layout": "vh",
    }
    if not return_z_loss:
        return losses.linear_cross_entropy(input, weight, target, **options)
    loss, found = losses.linear_cross_entropy(
        input, weight, target, return_statistics=True, **options
    )
    counts = jnp.asarray(target) != ignore_index
    z = jnp.where(counts, _z_loss(scale, found.lse), 0)
    return loss, reduce_losses(z, counts.astype(z.dtype), reduction)


def _wide(array: jax.Array) -> jax.Array:
    """Returns an array in the dtype of a loss."""
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def _z_loss(scale: float, lse: jax.Array) -> jax.Array:
    """Returns the squared log-sum-exp times a scale; 0 in a row without any class."""
    if not scale:
        return jnp.zeros_like(lse)
    square = jnp.where(jnp.isinf(lse), 0, lse) ** 2
    return jnp.where(lse == -jnp.inf, 0, jnp.where(lse == jnp.inf, lse, scale * square))


def _smoothed(targets: jax.Array, smoothing: float) -> jax.Array:
    if not smoothing:
        return targets
    return (1 - smoothing) * targets + smoothing / targets.shape[-1]


def _classes_last(
    arrays: tuple[jax.Array, ...],
    where: ArrayLike | None,
    axis: int | tuple[int, ...],
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Returns arrays, and a mask or None, with one class axis, the last."""
    number = arrays[0].ndim
    several = axis if isinstance(axis, tuple) else (operator.index(axis),)
    if not all(-number <= each < number for each in several):
        raise ValueError(f"`axis` must be in [-{number}, {number}), got {axis}.")
    several = tuple(each % number for each in several)
    order = [each for each in range(number) if each not in several] + list(several)

    def moved(array: jax.Array) -> jax.Array:
        array = jnp.transpose(array, order)
        return array.reshape(*array.shape[: number - len(several)], -1)

    if where is not None:
        where = jnp.asarray(where)
        if where.ndim != number:
            where = jnp.expand_dims(where, several)
        where = moved(jnp.broadcast_to(where, arrays[0].shape))
    return tuple(map(moved, arrays)), where
