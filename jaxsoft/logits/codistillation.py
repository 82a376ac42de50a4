"""Co-distillation: several heads, each taught by the consensus of the others."""

from __future__ import annotations

import functools
import numbers

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft._core.divergence import difference
from jaxsoft._core.numerics import Temperature, finite, inverse, largest_finite
from jaxsoft.logits.arguments import (
    check_temperature,
    check_where,
    has_no_tangent,
    pick_temperature,
)
from jaxsoft.logits.centre import centre
from jaxsoft.logits.divergence import below_peak, tangent_of_loss
from jaxsoft.logits.softmax import nonzero, probabilities, visible

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
      The consensus is a sum over the other heads, not the sum of all heads less one,
      so a head of large probability does not drown the others. Each loss has a
      gradient in the logits of its own head alone, and in `temperature` with the
      consensus held fixed. A head without any kept class has no vote.

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
    return _losses(head_axis, axis, static_tau, x, tau, where)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _losses(head_axis, axis, static_tau, x, tau, where):
    """Returns the loss of every head and example."""
    return _loss_and_slope(head_axis, axis, static_tau, x, tau, where)[0]


@functools.partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(head_axis, axis, static_tau, primals, tangents):
    x, tau_array, where = primals
    dx, dtau, _ = tangents
    tau = pick_temperature(static_tau, tau_array)
    loss = _losses(head_axis, axis, static_tau, x, tau_array, where)
    still = jax.lax.stop_gradient((x, tau_array))
    _, slope, has_loss = _loss_and_slope(head_axis, axis, static_tau, *still, where)
    slope = _with_own_slope(axis, static_tau, slope, has_loss, x, tau_array, where)
    return loss, tangent_of_loss(axis, tau, where, loss, ((slope, x, dx),), dtau)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_own_slope(axis, static_tau, slope, has_loss, x, tau, where):
    """Returns τ (p - q), whose derivative is that of a fixed consensus q."""
    del axis, static_tau, has_loss, x, tau, where
    return slope


@functools.partial(_with_own_slope.defjvp, symbolic_zeros=True)
def _with_own_slope_jvp(axis, static_tau, primals, tangents):
    slope, has_loss, x, tau_array, where = primals
    _, _, dx, dtau, _ = tangents
    tau = pick_temperature(static_tau, tau_array)
    p = probabilities(axis, static_tau, x, tau_array, where)
    change = jnp.zeros_like(x) if has_no_tangent(dx) else dx
    tangent = jnp.zeros_like(x)
    if not has_no_tangent(dtau):
        change = change - visible(centre(x, tau, where, axis).values) * dtau
        tangent += slope * inverse(tau, x.dtype) * dtau
    mean = jnp.sum(p * change, axis, keepdims=True)
    return slope, tangent + jnp.where(has_loss, p * (change - mean), 0)


# Compiled by itself it is traced once, for the value and for the derivative.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _loss_and_slope(head_axis, axis, static_tau, x, tau, where):
    """Returns losses, slopes by the own head's logits, τ (p - q), and which have them.

    Probabilities are compared with those of the first head that has a class, p_0: with
    e the exponentials and Z their sums, `p - p_0 = ((e - e_0) - p_0 (Z - Z_0)) / Z`.
    Where a class is close to p_0, τ (e - e_0) is exact to the first order, and so is
    τ (p - q), at any temperature.
    """
    tau = pick_temperature(static_tau, tau)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    centred = centre(x, tau, where, axis)
    weights = jnp.exp(centred.values)
    z = total(weights)
    votes = z != 0
    count = votes.astype(x.dtype)
    others = jnp.sum(count, head_axis, keepdims=True) - count
    has_loss = votes & (others > 0) & ~Temperature.prepare(tau, x.dtype).is_zero
    share = 1 / jnp.maximum(others, 1)
    tau = largest_finite(tau, x.dtype)
    over = inverse(tau, x.dtype)
    inverse_z = 1 / nonzero(z)
    p, below = weights * inverse_z, below_peak(centred)
    first = functools.partial(_of_first, votes, head_axis)
    inverse_z_0 = first(inverse_z)
    p_0, gap = first(weights) * inverse_z_0, below - first(below)
    change = difference(p_0, weights * inverse_z_0, gap * over, gap, tau)
    growth = total(change)
    # Elsewhere the difference of the probabilities loses nothing.
    is_close = (jnp.abs(growth) <= tau / 2) & (jnp.abs(change) <= tau * (p_0 / 3))
    close = (change - p_0 * growth) * (inverse_z / inverse_z_0)
    apart = jnp.where(votes, jnp.where(is_close, close, tau * (p - p_0)), 0)
    # Less its own part the sum of all heads is that of the others: it drowns none of
    # these differences, as each has the error of p_0. XLA for CPUs would store it for
    # every head unless a select came next.
    together = jnp.sum(apart, head_axis, keepdims=True)
    own, together = (jnp.where(has_loss, a, 0) for a in (apart, together))
    slope = finite(own - (together - own) * share)
    q = _sum_of_others(p, head_axis) * share
    log_p = centred.values - jnp.log(nonzero(z))
    loss = total(_terms(p, q, log_p, slope, tau))
    loss = jnp.where(has_loss | jnp.isnan(loss), loss, 0)
    return jnp.squeeze(loss, axis), slope, has_loss


def _terms(p, q, log_p, slope, tau):
    """Returns τ² (q log(q / p) - q + p) of each class, never negative.

    With u = (q - p) / (q + p), log(q / p) is 2 artanh(u): where |u| <= 1/3 the term is
    `(q - p) u (1 + (1 + u) (artanh(u) - u) / u²)`, and τ (q - p) is the slope.
    """
    both = jnp.maximum(p + q, jnp.finfo(p.dtype).tiny)
    scaled = slope / both
    u = -scaled * inverse(tau, p.dtype)
    # What is left out is below 2⁻²⁶ of the sum, in float64 below 2⁻⁵⁵.
    last = 17 if p.dtype == jnp.float64 else 8
    square, rest = u * u, jnp.zeros_like(u)
    for k in reversed(range(1, last)):
        rest = rest * square + 1 / (2 * k + 1)
    near = slope * (scaled * (1 + (1 + u) * (u * rest)))
    far = q * (jnp.log(jnp.where(q > 0, q, 1)) - jnp.where(q > 0, log_p, 0)) - q + p
    is_near = jnp.abs(slope) <= tau * (both / 3)
    return jnp.where(is_near, near, tau * (tau * far))


def _of_first(votes: jax.Array, head_axis: int, values: jax.Array) -> jax.Array:
    """Returns the values of the first head that votes in each row, if one does."""
    heads = values.shape[head_axis]

    def head(a: jax.Array, h: int) -> jax.Array:
        return jax.lax.slice_in_dim(a, h, h + 1, axis=head_axis)

    found = head(values, heads - 1)
    for h in reversed(range(heads - 1)):
        found = jnp.where(head(votes, h), head(values, h), found)
    return found


def _sum_of_others(values: jax.Array, head_axis: int) -> jax.Array:
    """Returns for each head the sum of the others' values, without a difference."""
    own = jax.lax.broadcasted_iota(jnp.int32, values.shape, head_axis)
    result = jnp.zeros_like(values)
    for h in range(values.shape[head_axis]):
        head = jax.lax.slice_in_dim(values, h, h + 1, axis=head_axis)
        result += jnp.where(own == h, 0, head)
    return result
