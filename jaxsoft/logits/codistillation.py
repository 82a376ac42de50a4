"""Co-distillation: several heads, each taught by the consensus of the others."""

from __future__ import annotations

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft._core.divergence import SMALL, difference
from jaxsoft._core.numerics import Temperature, finite, finite_peak, inverse
from jaxsoft.logits.arguments import (
    check_temperature,
    check_where,
    has_no_tangent,
    pick_temperature,
)
from jaxsoft.logits.centre import Centred, centre
from jaxsoft.logits.divergence import scaled_divergence
from jaxsoft.logits.softmax import exponentials

__all__ = ["codistillation_loss"]


@mesh_axes.accepts_explicit("logits", axis="axis")
def codistillation_loss(
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    head_axis: int = 0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence of each of several heads from the consensus of the others, times τ².

    `τ² KL(q_h ‖ p_h)`, with `p_h = softmax(x_h / τ)` the probabilities of head h and
    `q_h` the mean of those of all other heads, a constant to the gradient. Added to
    the cross-entropy of each head, it lets networks that train together teach each
    other, without a teacher trained before.

    Args:
      logits: [..., V] with at least two heads on `head_axis` and the classes on
        `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis and on the head axis. The loss is 0 at τ = 0
        and, at τ = ∞, half the variance over classes of the difference between a
        head's logits and the others' mean.
      head_axis: the axis of the heads.
      axis: the class axis, which the result lacks.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.

    Returns:
      float32 (float64 for float64 logits) of the shape of `logits` without the class
      axis, the heads where they were: one loss >= 0 for each head and example. 0
      where a head has no kept class, or no other head has one; inf where a head
      gives no mass to a class that another gives mass to.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, `where` not boolean, or
        an axis no int.
      ValueError: if there are less than two heads, both axes are the same, a shape
        does not fit, or a known temperature is negative or NaN.

    Notes:
      The consensus is a log-mean-exp over the other heads, not the sum of all heads
      less one, so a head of large probability does not drown the others; its work
      grows with the square of the number of heads. Each loss has a gradient in the
      logits of its own head alone, and in `temperature` with the consensus held
      fixed. A head without any kept class has no vote.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import codistillation_loss
      >>> heads = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
      >>> print(np.asarray(codistillation_loss(heads, 2.0)).round(4))
      [0.1237 0.4898 0.1237]

    References:
      Anil et al., Large scale distributed neural network training through online
      distillation, arXiv:1804.03235; Lan et al., Knowledge Distillation by On-the-Fly
      Native Ensemble, arXiv:1806.04606.
    """
    logits = checks.floating("logits", logits)
    axis = checks.class_axis(axis, logits)
    head_axis = _check_head_axis(head_axis, axis, logits)
    where = check_where(where, logits)
    tau = check_temperature(temperature, logits, axis)
    if isinstance(tau, jax.Array) and tau.shape[head_axis] != 1:
        raise ValueError(
            "`temperature` must have size 1 on the head axis, got shape "
            f"{tau.shape} with head_axis {head_axis}: heads share it."
        )
    static_tau, tau = (tau, None) if isinstance(tau, float) else (None, tau)
    return _codistillation(head_axis, axis, static_tau, logits, tau, where)


def _check_head_axis(head_axis: int, axis: int, logits: jax.Array) -> int:
    """Returns the non-negative head axis of the logits."""
    if isinstance(head_axis, bool) or not isinstance(head_axis, numbers.Integral):
        raise TypeError(f"`head_axis` must be an int, got {head_axis!r}.")
    rank = logits.ndim
    if not -rank <= head_axis < rank:
        raise ValueError(
            f"`head_axis` must name one of the {rank} axes of `logits`, "
            f"got {head_axis}."
        )
    head_axis = int(head_axis) % rank
    if head_axis == axis:
        raise ValueError(
            f"`head_axis` must not be the class axis, got {head_axis} for both."
        )
    if logits.shape[head_axis] < 2:
        raise ValueError(
            f"`logits` must have at least two heads, got shape {logits.shape} "
            f"with head_axis {head_axis}."
        )
    return head_axis


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _codistillation(head_axis, axis, static_tau, logits, tau, where):
    x = logits.astype(numerics.compute_dtype(logits))
    fixed_tau = jax.lax.stop_gradient(pick_temperature(static_tau, tau))
    teacher = _consensus(head_axis, axis, jax.lax.stop_gradient(x), fixed_tau, where)
    if tau is not None:
        teacher = _proportional(teacher, tau)
    loss = scaled_divergence("forward_kl", axis, static_tau, x, teacher, tau, where)
    own, other = (jnp.any(centre(a, 1.0, where, axis).kept, axis) for a in (x, teacher))
    return jnp.where((own & other) | jnp.isnan(loss), loss, 0)


@jax.custom_jvp
def _proportional(teacher, tau):
    """Returns logits that grow with τ, so that their tempered softmax stays."""
    del tau
    return teacher


def _proportional_jvp(primals, tangents):
    teacher, tau = primals
    _, dtau = tangents
    tempered = finite(teacher * inverse(tau, teacher.dtype))
    slope = jnp.where(jnp.isinf(teacher), 0, tempered)
    change = jnp.zeros_like(teacher) if has_no_tangent(dtau) else slope * dtau
    return teacher, change


_proportional.defjvp(_proportional_jvp, symbolic_zeros=True)


def _consensus(head_axis, axis, x, tau, where):
    """Returns logits whose tempered softmax is the mean of the other heads'."""
    centred = centre(x, tau, where, axis)
    kept_by_all = jnp.all(centred.kept, head_axis, keepdims=True)
    kept_by_any = jnp.any(centred.kept, head_axis, keepdims=True)
    lowest = jnp.where(centred.kept, centred.values, 0)
    near = (lowest >= -SMALL) & (kept_by_all == kept_by_any)
    near = jnp.all(near, (head_axis, axis), keepdims=True)
    value = Temperature.prepare(tau, x.dtype).value
    value = jnp.where(jnp.isinf(value), 1, value)
    flat = _flat_consensus(head_axis, axis, x, centred, near, value)
    _, total = exponentials(centred, axis)
    log_p = centred.values - jnp.log(total)
    mixed = jax.nn.logsumexp(_others(log_p, head_axis), 0)
    mixed = jnp.moveaxis(mixed, 0, head_axis)
    peak = jnp.max(mixed, axis, keepdims=True)
    gap = jnp.where(mixed == -jnp.inf, 0, mixed - finite_peak(peak))
    steep = jnp.where(mixed == -jnp.inf, -jnp.inf, finite(gap * value))
    return jnp.where(near, jnp.where(centred.kept, flat, -jnp.inf), steep)


def _flat_consensus(head_axis, axis, x, centred: Centred, near, tau):
    """Returns τ log(V · mean probability), exact to first order where it is flat.

    At high temperatures the logits of interest are the small digits of
    log-probabilities near -log V: here they are computed without that constant.
    """
    use = near & centred.kept
    gap = jnp.where(use, x - centred.peak, 0)
    c = jnp.where(use, centred.values, 0)
    number = jnp.maximum(jnp.sum(use, axis, keepdims=True), 1).astype(x.dtype)
    # τ log(mean_v exp(c_v)), and the same without τ.
    grown = jnp.sum(_grown(c, gap, tau), axis, keepdims=True) / number
    growth = jnp.sum(jnp.expm1(c), axis, keepdims=True) / number
    ratio = _log_ratio(growth)
    a, scaled = c - growth * ratio, gap - grown * ratio
    a, scaled = jnp.where(use, a, 0), jnp.where(use, scaled, 0)
    grown = jnp.mean(_others(_grown(a, scaled, tau), head_axis), 0)
    growth = jnp.mean(_others(jnp.expm1(a), head_axis), 0)
    return jnp.moveaxis(grown * _log_ratio(growth), 0, head_axis)


def _grown(a: jax.Array, scaled: jax.Array, tau: jax.Array) -> jax.Array:
    """Returns τ (exp(a) - 1), with scaled = τ·a."""
    return difference(jnp.ones_like(a), jnp.exp(a), a, scaled, tau)


def _log_ratio(growth: jax.Array) -> jax.Array:
    """Returns log(1 + y) / y, 1 at y = 0."""
    safe = jnp.where(growth == 0, 1, growth)
    return jnp.where(growth == 0, 1, jnp.log1p(safe) / safe)


def _others(values: jax.Array, head_axis: int) -> jax.Array:
    """Returns [M - 1, M, ...]: for each of M heads, the values of all others."""
    heads = values.shape[head_axis]
    other = (np.arange(heads) + np.arange(1, heads)[:, None]) % heads
    return jnp.moveaxis(values, head_axis, 0)[other]
