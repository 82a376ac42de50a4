"""Distillation between two softmax layers, neither of whose logits are stored."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.divergence import Divergence, Kind, kind_of
from jaxsoft._core.listed import REMAINING, Remaining, listed_divergence, needs_rest
from jaxsoft._core.numerics import finite_peak, nan_where, scaled
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    Reduction,
    keep_labels,
    keep_temperature,
    keep_tokens,
    reduce_losses,
)
from jaxsoft.linear.arguments import (
    Axes,
    Call,
    KernelLayout,
    MeshAxes,
    check_ids,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.divergence import Layers, Losses, TwoLayers
from jaxsoft.linear.folds.statistics import Fields, Statistics, of_fields
from jaxsoft.linear.folds.two_temperatures import TwoTemperatures
from jaxsoft.linear.lora import LoRA
from jaxsoft.linear.token_losses import reduced
from jaxsoft.linear.total import RowLoss
from jaxsoft.logits.softmax import log_softmax

__all__ = ["linear_distillation", "linear_distillation_top_k"]


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
    labels: ArrayLike | None = None,
    label_weight: float = 0.5,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    student_kernel_scale: ArrayLike | None = None,
    teacher_kernel_scale: ArrayLike | None = None,
    student_lora: LoRA | None = None,
    teacher_lora: LoRA | None = None,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
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
      temperature: τ in [0, ∞], a scalar or [...]. The loss is 0 at τ = 0 and, at τ = ∞,
        half the variance over kept classes of the difference of the logits, times
        β (1 - β) for Jensen-Shannon and (1 - α)² for a skew.
      divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
      beta: β in [0, 1] of Jensen-Shannon.
      alpha: α in [0, 1), the skew of either Kullback-Leibler divergence.
      labels: [...] integers in [0, V), or None. With labels the loss is
        `(1 - w) · divergence + w · cross-entropy`, the latter of the student at
        temperature 1, from the same stream.
      label_weight: w in [0, 1].
      student_logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      teacher_logit_softcap: likewise.
      class_mask: [V] booleans; False drops a class from both. None keeps all.
      class_bits: [..., ceil(V / 32)] uint32 or int32, a mask of each token for both, as
        in `linear_statistics`.
      student_kernel_scale: for a kernel of int8, float8 or other short numbers, which
        it multiplies; see `linear_statistics`.
      teacher_kernel_scale: likewise.
      student_lora: a `LoRA`, whose `(hidden @ a) @ b` is added to the products; None
        for no adapter.
      teacher_lora: likewise.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing.
      ignore_label: the label whose tokens have weight 0, such as -100, or None.
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
      has mass on one side only and the divergence is infinite; NaN for a label outside
      [0, V).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The terms that are added are never negative, so close distributions and high
      temperatures lose no digits in a difference of log-sum-exps. A temperature that is
      traced, or above 16, costs one more sum of each layer's tiles. Its own gradient,
      which is tiny at high temperatures, is right to rounding of the loss over τ.
      Differentiable in reverse mode, to first order.

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
    student_hidden = checks.floating("student_hidden", student_hidden)
    teacher_hidden = checks.floating("teacher_hidden", teacher_hidden)
    rows = student_hidden.shape[:-1]
    if teacher_hidden.ndim != len(rows) + 1 or teacher_hidden.shape[:-1] != rows:
        raise ValueError(
            f"`teacher_hidden` must have shape (*student_hidden.shape[:-1], G), that "
            f"is {rows} and G, got {teacher_hidden.shape}."
        )
    label_weight = checks.scalar_in("label_weight", label_weight, 0, 1)
    legend = "student_hidden.shape[:-1]"
    labels, token_weight = keep_labels(labels, rows, weights, ignore_label, legend)
    student_hidden = keep_tokens(token_weight, student_hidden)
    teacher_hidden = keep_tokens(token_weight, teacher_hidden)
    shared = {
        "temperature": keep_temperature(token_weight, temperature),
        "class_mask": class_mask,
        "class_bits": class_bits,
        "precision": precision,
        "vocab_axis": vocab_axis,
        "workspace_bytes": workspace_bytes,
        "implementation": implementation,
    }
    student = prepare(
        "linear_distillation",
        student_hidden,
        student_kernel,
        labels,
        bias=student_bias,
        logit_softcap=student_logit_softcap,
        kernel_scale=student_kernel_scale,
        lora=student_lora,
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
        kernel_scale=teacher_kernel_scale,
        lora=teacher_lora,
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
    ids = layers.student.labels
    loss = _Divergence(None if ids is None else label_weight)
    found = _Found(None if ids is None else ids[:, 0] >= 0)
    if reduction != "none" and math.prod(rows):
        return reduced(fold, loss, layers, found, token_weight, reduction, axes)
    losses = _streamed(fold, loss, layers, found) if math.prod(rows) else jnp.zeros(0)
    return reduce_losses(losses.reshape(rows), token_weight, reduction, axes)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _streamed(fold: Any, loss: RowLoss, arrays: Any, rows: Any) -> jax.Array:
    return loss.of_rows(stream(fold, arrays), rows)


class _Found(NamedTuple):
    """What the loss is made of beside the stream.

    Attributes:
      valid: [N] whether the label is a class; None without labels.
    """

    valid: Annotated[jax.Array | None, Axes("n")]


@dataclasses.dataclass(frozen=True)
class _Divergence(RowLoss):
    """The divergence of a row, as it was streamed, and the cross-entropy of its label.

    Attributes:
      label_weight: the share of the latter; None without labels.
    """

    label_weight: float | None

    def of_rows(self, result: Losses, rows: _Found) -> jax.Array:
        if self.label_weight is None:
            return result.loss
        hard = result.hard
        assert hard is not None and hard.label is not None and rows.valid is not None
        label = hard.label[:, 0]
        return _mixed(self.label_weight, result.loss, hard, label, rows.valid)


def _mixed(
    weight: float, divergence: jax.Array, hard: Fields, label: jax.Array, valid
) -> jax.Array:
    """Returns the share of a divergence and that of a cross-entropy, [N].

    Args:
      weight: the share of the cross-entropy.
      divergence: [N].
      hard: the statistics at temperature 1.
      label: [N] the label's centred logit.
      valid: [N] whether the label is a class.
    """
    entropy = jnp.where(hard.max == -jnp.inf, 0, hard.log_sum - label)
    entropy = nan_where(~valid, entropy)
    return scaled(1 - weight, divergence) + scaled(weight, entropy)


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_distillation_top_k(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    remaining: Remaining = "other",
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.0,
    labels: ArrayLike | None = None,
    label_weight: float = 0.5,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    reduction: Reduction = "mean",
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Distillation from a teacher known at K classes, times τ².

    A divergence of `linear_distillation` between the teacher's probabilities p and the
    student's q at temperature τ. The K classes may be the best of the teacher or of the
    student, or any others. What becomes of all other classes is a choice:

    - "other": they are one more class, in teacher and student, of probabilities 1 - Σ p
      and 1 - Σ q: forward KL is `Σ_k p log(p / q) + p_rest log(p_rest / q_rest)`. Never
      negative, and at most the divergence of the full distributions.
    - "drop": they are masked, in teacher and student: p is `p / Σ p`, q is `q / Σ q`,
      the sums over the listed classes. Never negative.
    - "renormalize": the teacher is `p / Σ p`, the rest is given probability 0; the
      student's rest keeps its own. Reverse KL would be infinite.
    - "ignore": the terms of the listed classes alone, with p and q as they are, forward
      KL `Σ_k p log(p / q)` and reverse KL `Σ_k q log(q / p)`, which may be negative.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      teacher_ids: [..., K] integers in [0, V), no class twice in a row. An id of -1,
        and any id whose log-probability is -inf, counts as none: the class is one of
        the rest.
      teacher_log_probs: [..., K] floating, the teacher's log-probabilities of them,
        at the temperature τ: those that `linear_top_k` gives for the teacher, or
        `linear_log_prob_at` at the student's best classes.
      remaining: "other", "drop", "renormalize" or "ignore".
      divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
      beta: β in [0, 1] of Jensen-Shannon; see `linear_distillation`.
      alpha: α in [0, 1), the skew of either Kullback-Leibler divergence.
      labels: [...] integers in [0, V), or None. With labels the loss is
        `(1 - w) · divergence + w · cross-entropy`, the latter at temperature 1, from
        the same stream.
      label_weight: w in [0, 1].
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞), a scalar or [...], of the student and the teacher.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      class_bits: a mask of each token; see `linear_statistics`.
      kernel_scale: of a kernel in few bits; see `linear_statistics`.
      lora: adapters; see `linear_statistics`.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing.
      ignore_label: the label whose tokens have weight 0, such as -100, or None.
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
      for an id outside [0, V) that has mass, but -1, and for a traced τ = ∞; inf where
      the divergence is, as where a class dropped by `class_mask` has mass. A row
      without any listed class has loss 0.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      With "other", the student's remaining mass is summed over the classes that are
      not listed: 1 - Σ q would cancel. The teacher's 1 - Σ p is known up to rounding,
      and for reverse KL at least that. In float32 a log-probability holds few digits of
      what a high temperature has divided, so that the loss has an error of some
      (τ · 10⁻⁷ · log V)²; `linear_distillation` has none. Differentiable in `hidden`,
      `kernel`, `bias`, `temperature` and `teacher_log_probs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import linear_distillation_top_k, linear_top_k
      >>> teacher, student = jnp.array([[2.0, 1.0, 0.0, 0.0]]), jnp.zeros((1, 4))
      >>> log_probs, ids = linear_top_k(teacher, jnp.eye(4), 2)
      >>> loss = linear_distillation_top_k(student, jnp.eye(4), ids, log_probs)
      >>> print(f"{loss:.4f}")
      0.3376

      On-policy, at the student's own best classes:

      >>> from jaxsoft import linear_log_prob_at
      >>> _, ids = linear_top_k(student, jnp.eye(4), 2)
      >>> log_probs = linear_log_prob_at(teacher, jnp.eye(4), ids, ignore_label=-1)
      >>> loss = linear_distillation_top_k(
      ...     student, jnp.eye(4), ids, log_probs, divergence="reverse_kl"
      ... )
      >>> print(f"{loss:.4f}")
      0.3575

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531;
      Agarwal et al., On-Policy Distillation (GKD), arXiv:2306.13649 (β); Ko et al.,
      DistiLLM, arXiv:2402.03898 (α); Anshumann et al., Sparse Logit Sampling,
      arXiv:2503.16870 (what top-k loses).
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    checks.one_of("remaining", remaining, REMAINING)
    kind = kind_of(divergence, beta, alpha)
    checks.finite_temperature(temperature)
    has_rest = needs_rest(kind, remaining)
    label_weight = checks.scalar_in("label_weight", label_weight, 0, 1)
    axes = mesh_axes.check_token_axes(token_axes, vocab_axis)
    hidden = checks.floating("hidden", hidden)
    rows = hidden.shape[:-1]
    ids = check_ids("teacher_ids", teacher_ids, rows)
    log_p = checks.floating("teacher_log_probs", teacher_log_probs)
    checks.shape("teacher_log_probs", log_p, ids.shape, "teacher_ids.shape")
    labels, token_weight = keep_labels(labels, rows, weights, ignore_label)
    hidden = keep_tokens(token_weight, hidden)
    ids = keep_tokens(token_weight, ids, -1)
    log_p = keep_tokens(token_weight, log_p, -jnp.inf)
    # A listed class without mass is one of the rest.
    log_p = jnp.where(ids == -1, -jnp.inf, log_p)
    gone = log_p == -jnp.inf
    ids, apart = jnp.where(gone, -1, ids), None
    if labels is not None:
        ids, apart = _with_label(ids, labels)
    call = prepare(
        "linear_distillation_top_k",
        hidden,
        kernel,
        class_ids=ids,
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
    wanted = frozenset({"label", "rest"} if has_rest else {"label"})
    tau, static_tau = call.arrays.tau, call.config.static_tau
    if tau is not None:
        tau = jnp.broadcast_to(tau, rows).reshape(-1)
    if remaining == "drop":
        # The K classes are centred on their own best one, and tempered, afterwards.
        wanted = frozenset({"raw_label"})
        config = dataclasses.replace(call.config, static_tau=1.0)
        call = Call(config, call.arrays._replace(tau=None))
    operands = fold_rows(call.config, call.arrays)
    weight = None if labels is None else label_weight
    loss = _OfListed(kind, remaining, static_tau, weight)
    if not math.prod(rows):
        return reduce_losses(jnp.zeros(rows), token_weight, reduction, axes)
    assert operands.labels is not None
    listed = _Listed(
        log_p.reshape(-1, log_p.shape[-1]),
        operands.labels >= 0,
        tau,
        None if apart is None else apart.reshape(-1),
    )
    streams = Statistics if labels is None or remaining == "drop" else TwoTemperatures
    fold = streams(call.config, wanted)
    if reduction == "none":
        losses = _streamed(fold, loss, operands, listed).reshape(rows)
        return reduce_losses(losses, token_weight, reduction)
    return reduced(fold, loss, operands, listed, token_weight, reduction, axes)


def _with_label(ids: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ids with the label as one more, and whether it is none of the others.

    Args:
      ids: [..., K] integers.
      labels: [...] integers.
    """
    dtype = max(ids.dtype, labels.dtype, key=lambda dtype: dtype.itemsize)
    ids, labels = ids.astype(dtype), labels.astype(dtype)[..., None]
    apart = jnp.all(ids != labels, axis=-1)
    return jnp.concatenate([ids, labels], axis=-1), apart


class _Listed(NamedTuple):
    """What the loss is made of beside the statistics.

    Attributes:
      log_p: [N, K] the teacher's log-probabilities.
      valid: [N, K] whether each id is a class that has mass; [N, K + 1] with labels.
      tau: [N] the temperature; None for a static one.
      apart: [N] whether the label is none of the K classes; None without labels.
    """

    log_p: Annotated[jax.Array, Axes("nk")]
    valid: Annotated[jax.Array, Axes("nk")]
    tau: Annotated[jax.Array | None, Axes("n")]
    apart: Annotated[jax.Array | None, Axes("n")]


@dataclasses.dataclass(frozen=True)
class _OfListed(RowLoss):
    """The loss of each row.

    Attributes:
      kind: which divergence.
      remaining: what becomes of classes that are not listed.
      static_tau: the temperature, where it is static.
      label_weight: the share of the cross-entropy of labels; None without labels.
    """

    kind: Kind
    remaining: Remaining
    static_tau: float | None
    label_weight: float | None

    def of_rows(self, result: Any, rows: _Listed) -> jax.Array:
        weight = self.label_weight
        if weight is None:
            return self._divergence(result, rows)
        count = rows.log_p.shape[1]
        listed = rows._replace(valid=rows.valid[:, :count])
        if self.remaining == "drop":
            # All is at temperature 1 there, and labels are not centred.
            soft = hard = result
            label = soft.raw_label[:, count] - finite_peak(soft.max)
            soft = soft._replace(raw_label=soft.raw_label[:, :count])
        else:
            soft, hard = result
            label, soft = hard.label[:, 0], _without_label(soft, rows.apart)
        divergence = self._divergence(soft, listed)
        return _mixed(weight, divergence, hard, label, rows.valid[:, count])

    def _divergence(self, result: Fields, rows: _Listed) -> jax.Array:
        found = of_fields(result, rows.valid, rows.tau, self.static_tau)
        assert found.label is not None
        log_rest = None
        if self.remaining == "drop":
            tau = self.static_tau if rows.tau is None else rows.tau
            assert tau is not None
            some = rows.log_p > -jnp.inf
            log_q = log_softmax(found.label, temperature=tau, where=some)
        else:
            listed = found.label
            if found.rest is not None:
                listed = jnp.concatenate([listed, found.rest[:, None]], axis=-1)
            # The slope of log_sum is one sum then, which XLA for CPUs takes once a row
            # and not once a class.
            log_q = listed - found.log_sum[:, None]
            if found.rest is not None:
                log_q, log_rest = log_q[:, :-1], log_q[:, -1]
        return listed_divergence(
            self.kind,
            self.remaining,
            rows.log_p,
            log_q,
            log_rest,
            found.temperature,
            found.max == -jnp.inf,
        )


def _without_label(soft: Fields, apart: jax.Array | None) -> Fields:
    """Returns the statistics of K classes, from those of K and a label.

    Where the label is none of them, it is one of the rest.
    """
    assert soft.label is not None and apart is not None
    label, rest = soft.label[:, -1], soft.rest
    if rest is not None:
        apart = apart & (label > -jnp.inf)
        both = jnp.logaddexp(jnp.where(apart, rest, 0), jnp.where(apart, label, 0))
        rest = jnp.where(apart, both, rest)
    return soft._replace(label=soft.label[:, :-1], rest=rest)
