"""Distillation between two softmax layers, neither of whose logits are stored."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.divergence import Divergence, excess, kind_of
from jaxsoft._core.numerics import is_zero
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    Reduction,
    keep_temperature,
    keep_tokens,
    reduce_losses,
    token_weights,
)
from jaxsoft.linear.arguments import (
    Axes,
    KernelLayout,
    MeshAxes,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.divergence import Layers, Losses, TwoLayers
from jaxsoft.linear.folds.statistics import (
    Fields,
    LogitStatistics,
    Statistics,
    of_fields,
    statistics,
)
from jaxsoft.linear.token_losses import reduced
from jaxsoft.linear.total import RowLoss

__all__ = ["linear_distillation", "linear_distillation_top_k"]

Remaining = Literal["other", "renormalize", "ignore"]


@mesh_axes.accepts_explicit("student_hidden", kernel="student_kernel")
def linear_distillation(
    student_hidden: ArrayLike,
    student_kernel: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.0,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    teacher_gradient: bool = False,
    student_kernel_layout: KernelLayout = "hv",
    teacher_kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Divergence between a teacher's and a student's softmax layer, times τ².

    As `distillation_loss`, from hidden states: with p the teacher's and q the student's
    probabilities at temperature τ, forward KL `τ² Σ p log(p / q)`, reverse KL
    `τ² Σ q log(q / p)`, or Jensen-Shannon `τ²/2 (Σ p log(p / r) + Σ q log(q / r))` with
    r = (p + q) / 2. The two layers may have different widths.

    In general Jensen-Shannon is `τ² (β Σ p log(p / m) + (1 - β) Σ q log(q / m))` with
    m = β p + (1 - β) q. It nears β times forward KL as β falls to 0, and 1 - β times
    reverse KL as β rises to 1; β = 0 and β = 1 themselves stand for forward and reverse
    KL, as they do in GKD and TRL. With a skew α, forward KL is
    `τ² Σ p log(p / (α p + (1 - α) q))` and reverse KL
    `τ² Σ q log(q / ((1 - α) p + α q))`, which are finite for any p and q.

    Args:
      student_hidden: [..., H] floating.
      student_kernel: [H, V] floating, or [V, H] with layout "vh".
      teacher_hidden: [..., G] floating, with the leading axes of `student_hidden`.
      teacher_kernel: [G, V] floating, or [V, G] with layout "vh".
      student_bias: [V] floating, added to the logits before the cap.
      teacher_bias: [V] floating, likewise.
      temperature: τ in [0, ∞), a scalar or [...]. The loss is 0 at τ = 0.
      divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
      beta: β in [0, 1] of Jensen-Shannon.
      alpha: α in [0, 1), the skew of either Kullback-Leibler divergence.
      student_logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      teacher_logit_softcap: likewise.
      class_mask: [V] booleans; False drops a class from both. None keeps all.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing.
      reduction: "mean" (Σ weight · loss / Σ weight, 0 if the weights sum to 0), "sum"
        or "none".
      teacher_gradient: whether a gradient flows to the teacher as well.
      student_kernel_layout: "hv" or "vh".
      teacher_kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens: "mean" and "sum"
        are those of all shards.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None or "xla".

    Returns:
      A scalar, or [...] with reduction "none", float32 (float64 if an input is), >= 0;
      0, with gradient 0, for a row whose teacher has no kept class; inf where a class
      has mass on one side only and the divergence is infinite; NaN at a traced τ = ∞.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The terms that are added are never negative, so close distributions and high
      temperatures lose no digits in a difference of log-sum-exps. Differentiable in
      reverse mode, to first order.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import linear_distillation
      >>> student, teacher = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
      >>> loss = linear_distillation(
      ...     student, jnp.eye(2), teacher, jnp.eye(2), temperature=2.0
      ... )
      >>> print(f"{loss:.4f}")
      0.4898

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531;
      Agarwal et al., On-Policy Distillation (GKD), arXiv:2306.13649 (β); Ko et al.,
      DistiLLM, arXiv:2402.03898 (α).
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    kind = kind_of(divergence, beta, alpha)
    axes = mesh_axes.check_token_axes(token_axes, vocab_axis)
    checks.finite_temperature(temperature)
    student_hidden = checks.floating("student_hidden", student_hidden)
    teacher_hidden = checks.floating("teacher_hidden", teacher_hidden)
    rows = student_hidden.shape[:-1]
    if teacher_hidden.ndim != len(rows) + 1 or teacher_hidden.shape[:-1] != rows:
        raise ValueError(
            f"`teacher_hidden` must have shape (*student_hidden.shape[:-1], G), that "
            f"is {rows} and G, got {teacher_hidden.shape}."
        )
    token_weight = token_weights(rows, weights)
    student_hidden = keep_tokens(token_weight, student_hidden)
    teacher_hidden = keep_tokens(token_weight, teacher_hidden)
    shared = {
        "temperature": keep_temperature(token_weight, temperature),
        "class_mask": class_mask,
        "precision": precision,
        "vocab_axis": vocab_axis,
        "workspace_bytes": workspace_bytes,
        "implementation": implementation,
    }
    student = prepare(
        "linear_distillation",
        student_hidden,
        student_kernel,
        bias=student_bias,
        logit_softcap=student_logit_softcap,
        kernel_layout=student_kernel_layout,
        prefix="student_",
        **shared,
    )
    teacher = prepare(
        "linear_distillation",
        teacher_hidden,
        teacher_kernel,
        bias=teacher_bias,
        logit_softcap=teacher_logit_softcap,
        kernel_layout=teacher_kernel_layout,
        prefix="teacher_",
        **shared,
    )
    if student.num_classes() != teacher.num_classes():
        raise ValueError(
            f"`teacher_kernel` must have the student's V = {student.num_classes()} "
            f"classes, got {teacher.num_classes()}."
        )
    arrays = teacher.arrays
    if not teacher_gradient:
        arrays = jax.tree.map(lax.stop_gradient, arrays)
    # The gradient of both layers' temperature is that of the student's copy.
    tau = student.arrays.tau
    arrays = arrays._replace(tau=None if tau is None else lax.stop_gradient(tau))
    fold = TwoLayers(student.config, teacher.config, kind)
    layers = Layers(
        fold_rows(fold.config, student.arrays), fold_rows(fold.teacher, arrays)
    )
    if reduction != "none" and math.prod(rows):
        loss = _Divergence()
        return reduced(fold, loss, layers, (), token_weight, reduction, axes)
    losses = _distill(fold, layers) if math.prod(rows) else jnp.zeros(0)
    return reduce_losses(losses.reshape(rows), token_weight, reduction, axes)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _distill(fold: TwoLayers, layers: Layers) -> jax.Array:
    return stream(fold, layers).loss


@dataclasses.dataclass(frozen=True)
class _Divergence(RowLoss):
    """The divergence of a row, as it was streamed."""

    def of_rows(self, result: Losses, rows: tuple[()]) -> jax.Array:
        del rows
        return result.loss


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_distillation_top_k(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    remaining: Remaining = "other",
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Distillation from a teacher known by its K best classes, times τ².

    Forward KL from the teacher's probabilities p to the student's q at temperature τ.
    What becomes of the teacher's remaining mass 1 - Σ p is a choice:

    - "other": all classes that are not listed are one more class, in teacher and
      student: `Σ_k p log(p / q) + p_rest log(p_rest / q_rest)`. Never negative, and at
      most the divergence of the full distributions.
    - "renormalize": the teacher is `p / Σ p`, the rest is given probability 0.
    - "ignore": `Σ_k p log(p / q)` of the listed classes alone, which may be negative.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      teacher_ids: [..., K] integers in [0, V), no class twice in a row. An id outside
        counts as none if its log-probability is -inf.
      teacher_log_probs: [..., K] floating, the teacher's log-probabilities of them,
        at the temperature τ: those that `linear_top_k` gives for the teacher.
      remaining: "other", "renormalize" or "ignore".
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞), a scalar or [...], of the student.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing.
      reduction: "mean", "sum" or "none"; see `linear_distillation`.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`. Ids are those of the whole vocabulary.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference".

    Returns:
      A scalar, or [...] with reduction "none", float32 (float64 if an input is); NaN
      for an id outside [0, V) that has mass, inf where a dropped class has.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      With "other", the student's remaining mass is summed over the classes that are
      not listed: 1 - Σ q would cancel. Differentiable in `hidden`,
      `kernel`, `bias`, `temperature` and `teacher_log_probs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import linear_distillation_top_k, linear_top_k
      >>> teacher, student = jnp.array([[2.0, 1.0, 0.0, 0.0]]), jnp.zeros((1, 4))
      >>> log_probs, ids = linear_top_k(teacher, jnp.eye(4), 2)
      >>> loss = linear_distillation_top_k(student, jnp.eye(4), ids, log_probs)
      >>> print(f"{loss:.4f}")
      0.3376

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531;
      Anshumann et al., Sparse Logit Sampling, arXiv:2503.16870 (what top-k loses).
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    checks.one_of("remaining", remaining, ("other", "renormalize", "ignore"))
    axes = mesh_axes.check_token_axes(token_axes, vocab_axis)
    hidden = checks.floating("hidden", hidden)
    ids = checks.integer("teacher_ids", teacher_ids)
    log_p = checks.floating("teacher_log_probs", teacher_log_probs)
    checks.shape("teacher_log_probs", log_p, ids.shape, "teacher_ids.shape")
    token_weight = token_weights(hidden.shape[:-1], weights)
    hidden = keep_tokens(token_weight, hidden)
    ids = keep_tokens(token_weight, ids, -1)
    log_p = keep_tokens(token_weight, log_p, -jnp.inf)
    # A listed class without mass is one of the rest.
    gone = log_p == -jnp.inf
    call = prepare(
        "linear_distillation_top_k",
        hidden,
        kernel,
        class_ids=jnp.where(gone, -1, ids),
        bias=bias,
        temperature=keep_temperature(token_weight, temperature),
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    wanted = ("rest",) if remaining == "other" else ()
    if reduction == "none" or not math.prod(hidden.shape[:-1]):
        loss = _from_listed(statistics(call, wanted), log_p, remaining)
        return reduce_losses(loss, token_weight, reduction, axes)
    operands = fold_rows(call.config, call.arrays)
    assert operands.labels is not None
    listed = _Listed(
        log_p.reshape(operands.labels.shape), operands.labels >= 0, operands.tau
    )
    return reduced(
        Statistics(call.config, frozenset(("label", *wanted))),
        _OfListed(remaining, call.config.static_tau),
        operands,
        listed,
        token_weight,
        reduction,
        axes,
    )


class _Listed(NamedTuple):
    """What the loss is made of beside the statistics.

    Attributes:
      log_p: [N, K] the teacher's log-probabilities.
      valid: [N, K] whether each id is a class that has mass.
      tau: [N] the temperature; None for a static one.
    """

    log_p: Annotated[jax.Array, Axes("nk")]
    valid: Annotated[jax.Array, Axes("nk")]
    tau: Annotated[jax.Array | None, Axes("n")]


@dataclasses.dataclass(frozen=True)
class _OfListed(RowLoss):
    """The loss of each row.

    Attributes:
      remaining: what becomes of the teacher's remaining mass.
      static_tau: the temperature, where it is static.
    """

    remaining: Remaining
    static_tau: float | None

    def of_rows(self, result: Fields, rows: _Listed) -> jax.Array:
        found = of_fields(result, rows.valid, rows.tau, self.static_tau)
        return _from_listed(found, rows.log_p, self.remaining)


def _from_listed(
    student: LogitStatistics, log_p: jax.Array, remaining: Remaining
) -> jax.Array:
    """Returns the losses [...] of tokens.

    Args:
      student: its statistics, "rest" among them where the rest is one more class.
      log_p: [..., K] the teacher's log-probabilities.
      remaining: what becomes of the teacher's remaining mass.
    """
    assert student.label is not None
    dtype = student.log_sum.dtype
    gone = log_p == -jnp.inf
    log_p = log_p.astype(dtype)
    log_q = student.label - jnp.expand_dims(student.log_sum, -1)
    log_q = jnp.where(gone, 0, log_q)
    tau = jnp.broadcast_to(student.temperature, log_p.shape[:-1])
    tau = jnp.expand_dims(tau, -1)
    if remaining == "other":
        assert student.rest is not None
        log_rest = student.rest - student.log_sum
        loss = _with_rest(log_p, log_q, log_rest, tau)
    else:
        if remaining == "renormalize":
            log_p = log_p - jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        log_p = jnp.where(gone, 0, log_p)
        terms = jnp.where(gone, 0, jnp.exp(log_p)) * (log_p - log_q)
        loss = jnp.sum(tau * (tau * terms), axis=-1)
    # A row without any kept class, and a temperature of 0, have no loss.
    none = (student.max == -jnp.inf) | is_zero(tau[..., 0], dtype)
    return jnp.where(none & ~jnp.isnan(loss), 0, loss)


def _with_rest(log_p, log_q, log_rest, tau) -> jax.Array:
    """Returns the divergence over K classes and one that has the rest, [...].

    Its terms p (exp(d) - 1 - d) need all of q: where p is 0, they are q.
    """
    listed = jnp.minimum(jax.nn.logsumexp(log_p, axis=-1), 0)
    mass = -jnp.expm1(listed)
    some = mass > 0
    rest = jnp.where(some, jnp.log(jnp.where(some, mass, 1)), -jnp.inf)
    log_q = jnp.where(log_p == -jnp.inf, -jnp.inf, log_q)
    log_p = jnp.concatenate([log_p, rest[..., None]], axis=-1)
    log_q = jnp.concatenate([log_q, log_rest[..., None]], axis=-1)
    gone, empty = log_p == -jnp.inf, log_q == -jnp.inf
    log_p = jnp.where(gone, 0, log_p)
    p = jnp.where(gone, 0, jnp.exp(log_p))
    q = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, log_q)))
    d = jnp.where(gone, 0, log_q - log_p)
    terms = excess(p, q, d, tau * jnp.where(jnp.isinf(d), 0, d), tau)
    return jnp.sum(jnp.where(gone, tau * (tau * q), terms), axis=-1)
