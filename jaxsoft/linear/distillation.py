"""Distillation between two softmax layers, neither of whose logits are stored."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft import checks
from jaxsoft.divergence_terms import DIVERGENCES
from jaxsoft.implementation import Implementation
from jaxsoft.linear import sharding, varying
from jaxsoft.linear.losses import Reduction, reduce_losses, token_weights
from jaxsoft.linear.operands import KernelLayout, Operands
from jaxsoft.linear.pair import Divergence, Pair, distillation
from jaxsoft.linear.statistics import MeshAxes, fold_rows, prepare

__all__ = ["linear_distillation"]


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
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    teacher_gradient: bool = False,
    student_kernel_layout: KernelLayout = "hv",
    teacher_kernel_layout: KernelLayout = "hv",
    precision: Any = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    tile_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Divergence between a teacher's and a student's softmax layer, times τ².

    As `distillation_loss`, from hidden states: with p the teacher's and q the student's
    probabilities at temperature τ, forward KL `τ² Σ p log(p / q)`, reverse KL
    `τ² Σ q log(q / p)`, or Jensen-Shannon `τ²/2 (Σ p log(p / r) + Σ q log(q / r))` with
    r = (p + q) / 2. The two layers may have different widths.

    Args:
      student_hidden: [..., H] floating.
      student_kernel: [H, V] floating, or [V, H] with layout "vh".
      teacher_hidden: [..., G] floating, with the leading axes of `student_hidden`.
      teacher_kernel: [G, V] floating, or [V, G] with layout "vh".
      student_bias: [V] floating, added to the logits before the cap.
      teacher_bias: [V] floating, likewise.
      temperature: τ in [0, ∞), a scalar or [...]. The loss is 0 at τ = 0.
      divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
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
      tile_bytes: the most bytes that a tile of logits may take, one of each layer's at
        a time; see `linear_statistics`.
      implementation: None or "xla".

    Returns:
      A scalar, or [...] with reduction "none", float32 (float64 if an input is), >= 0;
      0 for a row without any kept class; inf where a class has mass on one side only
      and the divergence is infinite; NaN at a traced τ = ∞.

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
      Agarwal et al., On-Policy Distillation (GKD), arXiv:2306.13649.
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    checks.one_of("divergence", divergence, DIVERGENCES)
    axes = sharding.check_axes("token_axes", token_axes)
    if isinstance(temperature, (int, float)) and math.isinf(temperature):
        raise ValueError("`temperature` must be finite, got inf.")
    student_hidden = checks.floating("student_hidden", student_hidden)
    teacher_hidden = checks.floating("teacher_hidden", teacher_hidden)
    rows = student_hidden.shape[:-1]
    if teacher_hidden.ndim != len(rows) + 1 or teacher_hidden.shape[:-1] != rows:
        raise ValueError(
            f"`teacher_hidden` must have shape (*student_hidden.shape[:-1], G), that "
            f"is {rows} and G, got {teacher_hidden.shape}."
        )
    each = token_weights(rows, weights)
    if each is not None:
        # What a masked token holds, NaN included, must not reach a matrix product.
        live = (each != 0)[..., None]
        student_hidden = jnp.where(live, student_hidden, 0)
        teacher_hidden = jnp.where(live, teacher_hidden, 0)
    shared = {
        "temperature": temperature,
        "class_mask": class_mask,
        "precision": precision,
        "vocab_axis": vocab_axis,
        "tile_bytes": tile_bytes,
        "implementation": implementation,
        "implementations": ("xla",),
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
    pair = Pair(divergence, student.config, teacher.config)
    loss = _distill(pair, student.arrays, arrays)
    return reduce_losses(loss, each, reduction, axes)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _distill(pair: Pair, student: Operands, teacher: Operands) -> jax.Array:
    rows = student.hidden.shape[:-1]
    if not math.prod(rows):
        return jnp.zeros(rows, jnp.float32)
    student = fold_rows(pair.student, student)
    teacher = fold_rows(pair.teacher, teacher)
    both = varying.like((student, teacher), (student, teacher))
    return distillation(pair, *both).reshape(rows)
