"""Distillation from a teacher to a student whose logits are stored."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft._core.divergence import Divergence, kind_of
from jaxsoft._core.listed import (
    FEW,
    REMAINING,
    Remaining,
    is_listed,
    listed_divergence,
    needs_rest,
)
from jaxsoft._core.numerics import divide_stored, scaled
from jaxsoft._core.tokens import Reduction, keep_tokens, reduce_losses
from jaxsoft.logits.arguments import (
    check_temperature,
    check_where,
    keep_rows,
    pick_temperature,
    row_weights,
)
from jaxsoft.logits.centre import centre
from jaxsoft.logits.divergence import scaled_divergence
from jaxsoft.logits.losses import softmax_cross_entropy
from jaxsoft.logits.softmax import log_softmax, nonzero

__all__ = ["distillation_loss", "distillation_loss_top_k"]


@mesh_axes.accepts_explicit("student_logits", axis="axis")
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.0,
    labels: ArrayLike | None = None,
    label_weight: float = 0.5,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    reduction: Reduction = "none",
) -> jax.Array:
    """Divergence between a teacher's and a student's tempered softmax, times τ².

    With p the teacher's and q the student's probabilities at temperature τ:
    forward KL `τ² Σ p log(p / q)`, reverse KL `τ² Σ q log(q / p)`, Jensen-Shannon
    `τ²/2 (Σ p log(p / r) + Σ q log(q / r))` with r = (p + q) / 2. The factor τ² keeps
    gradients comparable across temperatures.

    In general Jensen-Shannon is `τ² (β Σ p log(p / m) + (1 - β) Σ q log(q / m))` with
    m = β p + (1 - β) q. It nears β times forward KL as β falls to 0, and 1 - β times
    reverse KL as β rises to 1; β = 0 and β = 1 themselves stand for forward and reverse
    KL, as they do in GKD and TRL. With a skew α, forward KL is
    `τ² Σ p log(p / (α p + (1 - α) q))` and reverse KL
    `τ² Σ q log(q / ((1 - α) p + α q))`, which are finite for any p and q.

    The sums run over `p (exp(d) - 1 - d)` with d = log(q / p): terms that are never
    negative, so close distributions and high temperatures lose no digits.

    Args:
      student_logits: [..., V] with the classes on `axis`, any floating dtype.
      teacher_logits: [..., V], the same shape, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against the
        logits with size 1 on the class axis, or lacks it. The loss is 0 at τ = 0 and,
        at τ = ∞, half the variance over classes of the difference of the logits, times
        β (1 - β) for Jensen-Shannon and (1 - α)² for a skew.
      axis: the class axis.
      where: booleans that broadcast to the logits; False drops a class from both.
      divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
      beta: β in [0, 1] of Jensen-Shannon.
      alpha: α in [0, 1), the skew of either Kullback-Leibler divergence.
      labels: [...] integers in [0, V), or None. With labels the loss is
        `(1 - w) · divergence + w · cross-entropy`, the latter at temperature 1.
      label_weight: w in [0, 1].
      weights: [...] booleans or reals, one weight a row, or None; a row of weight 0
        contributes exactly nothing, whatever it holds.
      ignore_label: the label whose rows have weight 0, such as -100, or None.
      reduction: "none", "sum", or "mean" (Σ weight · loss / Σ weight, 0 if the weights
        sum to 0). The streamed twin's default is "mean".

    Returns:
      [...], or a scalar with a reduction, float32 (float64 if either is), >= 0; 0, with
      gradient 0, in a row whose teacher has no kept class; inf where a class has mass
      on one side only and the divergence is infinite.

    Raises:
      TypeError: if the logits are not floating, or `where` is not boolean.
      ValueError: if shapes differ, `divergence` is none of the three, an option is out
        of its range, or a known temperature is negative or NaN.

    Notes:
      Differentiable in both logits and the temperature, in both modes; wrap the
      teacher in `jax.lax.stop_gradient` to train the student alone.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import distillation_loss
      >>> student, teacher = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
      >>> print(f"{distillation_loss(student, teacher, 2.0):.4f}")
      0.4898

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531;
      Agarwal et al., On-Policy Distillation (GKD), arXiv:2306.13649 (β); Ko et al.,
      DistiLLM, arXiv:2402.03898 (α).
    """
    student = checks.floating("student_logits", student_logits)
    teacher = checks.floating("teacher_logits", teacher_logits)
    checks.shape("teacher_logits", teacher, student.shape, "student_logits.shape")
    axis = checks.class_axis(axis, student, "student_logits")
    where = check_where(where, student)
    kind = kind_of(divergence, beta, alpha)
    dtype = numerics.compute_dtype(student, teacher)
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    tau = check_temperature(temperature, student, axis)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    label_weight = checks.scalar_in("label_weight", label_weight, 0, 1)
    weight = row_weights(weights, student, axis, labels, ignore_label)
    keep = None if weight is None else weight != 0
    student, teacher = (keep_rows(keep, x, axis) for x in (student, teacher))
    if isinstance(tau, jax.Array) and tau.size > 1:
        tau = keep_rows(keep, tau, axis, 1)
    static_tau, tau = (tau, None) if isinstance(tau, float) else (None, tau)
    loss = _distillation(kind, axis, static_tau, student, teacher, tau, where)
    if labels is not None:
        loss = _mixed(label_weight, loss, student, labels, axis, where, weight)
    return reduce_losses(loss, weight, reduction)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _distillation(kind, axis, static_tau, student, teacher, tau, where):
    arrays = student, teacher, tau, where
    return scaled_divergence(kind, axis, static_tau, *arrays)


def _mixed(share, divergence, logits, labels, axis, where, weight) -> jax.Array:
    """Returns divergences with a share of the cross-entropy of labels."""
    labels = checks.integer("labels", labels)
    rows = logits.shape[:axis] + logits.shape[axis + 1 :]
    checks.shape("labels", labels, rows, "student_logits.shape without the class axis")
    labels = keep_tokens(weight, labels)
    entropy = softmax_cross_entropy(logits, labels, axis=axis, where=where)
    return scaled(1 - share, divergence) + scaled(share, entropy)


@mesh_axes.accepts_explicit("student_logits", axis="axis")
def distillation_loss_top_k(
    student_logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    remaining: Remaining = "other",
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.0,
    labels: ArrayLike | None = None,
    label_weight: float = 0.5,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    reduction: Reduction = "none",
) -> jax.Array:
    """Distillation from a teacher known at K classes, times τ².

    A divergence of `distillation_loss` between the teacher's probabilities p and the
    student's q at temperature τ. The K classes may be the best of the teacher or of the
    student, or any others. What becomes of all other classes is a choice:

    - "other": they are one more class, in teacher and student, of probabilities 1 - Σ p
      and 1 - Σ q.
    - "drop": they are masked, in teacher and student: p is `p / Σ p`, q is `q / Σ q`.
    - "renormalize": the teacher is `p / Σ p`, the rest is given probability 0; the
      student's rest keeps its own. Reverse KL would be infinite.
    - "ignore": the terms of the listed classes alone, with p and q as they are, forward
      KL `Σ_k p log(p / q)` and reverse KL `Σ_k q log(q / p)`, which may be negative.

    Args:
      student_logits: [..., V] with the classes on `axis`, any floating dtype.
      teacher_ids: [..., K] integers in [0, V), with the listed classes on `axis`, no
        class twice in a row. An id of -1, and any id whose log-probability is -inf,
        counts as none: the class is one of the rest.
      teacher_log_probs: [..., K] floating, the teacher's log-probabilities of them, at
        the temperature τ.
      temperature: τ in [0, ∞), of the student and the teacher, as in
        `distillation_loss`.
      axis: the class axis.
      where: booleans that broadcast to the logits; False drops a class.
      remaining: "other", "drop", "renormalize" or "ignore".
      divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
      beta: β in [0, 1] of Jensen-Shannon; see `distillation_loss`.
      alpha: α in [0, 1), the skew of either Kullback-Leibler divergence.
      labels: [...] integers in [0, V), or None. With labels the loss is
        `(1 - w) · divergence + w · cross-entropy`, the latter at temperature 1.
      label_weight: w in [0, 1].
      weights: [...] booleans or reals, one weight a row, or None; a row of weight 0
        contributes exactly nothing, whatever it holds.
      ignore_label: the label whose rows have weight 0, such as -100, or None.
      reduction: "none", "sum", or "mean" (Σ weight · loss / Σ weight, 0 if the weights
        sum to 0). The streamed twin's default is "mean".

    Returns:
      [...], or a scalar with a reduction, float32 (float64 for float64 logits); NaN for
      an id outside [0, V) that has mass, but -1, and for a traced τ = ∞; inf where the
      divergence is. A row without any listed class has loss 0.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.

    Notes:
      As `linear_distillation_top_k`, whose logits are streamed; see there what digits
      log-probabilities have at high temperatures. Differentiable in the logits, the
      temperature and `teacher_log_probs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import distillation_loss_top_k
      >>> ids, log_probs = jnp.array([2, 0]), jnp.log(jnp.array([0.6, 0.3]))
      >>> loss = distillation_loss_top_k(jnp.zeros(4), ids, log_probs)
      >>> print(f"{loss:.4f}")
      0.4190

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531;
      Agarwal et al., On-Policy Distillation (GKD), arXiv:2306.13649 (β); Ko et al.,
      DistiLLM, arXiv:2402.03898 (α); Anshumann et al., Sparse Logit Sampling,
      arXiv:2503.16870 (what top-k loses).
    """
    logits = checks.floating("student_logits", student_logits)
    axis = checks.class_axis(axis, logits, "student_logits")
    where = check_where(where, logits)
    ids = checks.integer("teacher_ids", teacher_ids)
    rows = logits.shape[:axis] + logits.shape[axis + 1 :]
    given = ids.shape[:axis] + ids.shape[axis + 1 :]
    if ids.ndim != logits.ndim or given != rows or ids.shape[axis] == 0:
        raise ValueError(
            "`teacher_ids` must have the shape of `student_logits` but for K >= 1 on "
            f"the class axis, got {ids.shape} for {logits.shape}."
        )
    log_p = checks.floating("teacher_log_probs", teacher_log_probs)
    checks.shape("teacher_log_probs", log_p, ids.shape, "teacher_ids.shape")
    checks.one_of("remaining", remaining, REMAINING)
    kind = kind_of(divergence, beta, alpha)
    checks.finite_temperature(temperature)
    needs_rest(kind, remaining)
    logits = logits.astype(numerics.compute_dtype(logits))
    tau = check_temperature(temperature, logits, axis)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    label_weight = checks.scalar_in("label_weight", label_weight, 0, 1)
    weight = row_weights(weights, logits, axis, labels, ignore_label)
    keep = None if weight is None else weight != 0
    logits = keep_rows(keep, logits, axis)
    log_p = keep_rows(keep, jnp.where(ids == -1, -jnp.inf, log_p), axis, -jnp.inf)
    if isinstance(tau, jax.Array) and tau.size > 1:
        tau = keep_rows(keep, tau, axis, 1)
    static_tau, tau = (tau, None) if isinstance(tau, float) else (None, tau)
    options = kind, remaining, axis, static_tau
    loss = _of_listed(options, logits, ids, log_p, tau, where)
    if labels is not None:
        loss = _mixed(label_weight, loss, logits, labels, axis, where, weight)
    return reduce_losses(loss, weight, reduction)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _of_listed(options, logits, ids, log_p, tau, where):
    kind, remaining, axis, static_tau = options
    tau = pick_temperature(static_tau, tau)
    gone = log_p == -jnp.inf
    classes = logits.shape[axis]
    valid = (ids >= 0) & (ids < classes)
    centred = centre(logits, tau, where, axis)
    at = jnp.clip(ids, 0, classes - 1)
    listed = jnp.take_along_axis(centred.logits, at, axis)
    listed = numerics.nan_where(~valid & ~gone, listed)
    weights = jnp.exp(centred.values)
    sums = jnp.sum(weights, axis, keepdims=True)
    log_total = jnp.log(nonzero(sums))
    log_rest = None
    if remaining == "drop":
        log_q = log_softmax(listed, temperature=tau, axis=axis, where=~gone)
    else:
        log_q = divide_stored(listed, centred.peak, tau) - log_total
    if needs_rest(kind, remaining):
        place = jnp.where(valid & ~gone, ids.astype(jnp.int32), -1)
        rest = jnp.sum(
            jnp.where(_are_listed(place, logits.shape, axis), 0, weights), axis
        )
        none = rest == 0
        log_rest = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, rest)))
        log_rest -= jnp.squeeze(log_total, axis)
    if isinstance(tau, jax.Array):
        tau = jnp.squeeze(tau, axis)
    return listed_divergence(
        kind,
        remaining,
        jnp.moveaxis(log_p, axis, -1),
        jnp.moveaxis(log_q, axis, -1),
        log_rest,
        jnp.asarray(tau, logits.dtype),
        jnp.squeeze(sums == 0, axis),
    )


def _are_listed(ids, shape, axis):
    """Tells which classes a row lists; an id of -1 is none."""
    if ids.shape[axis] <= FEW:
        return is_listed(ids, shape, axis)
    place = jnp.where(ids < 0, shape[axis], ids)
    zeros = jnp.zeros(shape, bool)
    return jnp.put_along_axis(zeros, place, True, axis, inplace=False, mode="drop")
