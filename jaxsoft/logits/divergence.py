"""Divergences between two tempered softmaxes of stored logits, times τ²."""

import functools

import jax
import jax.numpy as jnp

from jaxsoft._core.divergence import (
    SMALL,
    difference,
    excess,
    half_scaled,
    half_step,
)
from jaxsoft._core.numerics import Temperature, finite, inverse
from jaxsoft.logits.arguments import has_no_tangent, pick_temperature
from jaxsoft.logits.centre import centre
from jaxsoft.logits.softmax import exponentials

__all__ = ["scaled_divergence"]


def _log_ratio(student, teacher, tau, where, axis):
    """Returns p, q, d = log(q / p), τ·d and the kept classes."""
    s, t = centre(student, tau, where, axis), centre(teacher, tau, where, axis)
    kept = s.kept | t.kept
    (ws, total_s), (wt, total_t) = exponentials(s, axis), exponentials(t, axis)
    q, p = ws / total_s, wt / total_t
    both = s.kept & t.kept
    prepared = Temperature.prepare(tau, student.dtype)
    # τ·(c_s - c_t), exact for close logits; clipped, so that sums stay finite.
    gap = finite(student - s.peak) - finite(teacher - t.peak)
    gap = jnp.where(both, finite(gap), 0)
    # XLA may contract the difference of the quotients: equal logits keep 0.
    delta = jnp.where(both & (gap != 0), s.values - t.values, 0)
    delta = jnp.where(jnp.isnan(delta), 0, delta)
    # A class that one side alone keeps is as far as can be.
    distance = jnp.where(both, jnp.abs(delta), jnp.where(kept, jnp.inf, 0))
    near = jnp.max(distance, axis, keepdims=True) <= SMALL
    # log(Z_s / Z_t): the ratio of close sums has its own, relatively exact, form.
    mean = jnp.sum(p * jnp.expm1(jnp.where(near, delta, 0)), axis, keepdims=True)
    shift = jnp.where(near, jnp.log1p(mean), jnp.log(total_s) - jnp.log(total_t))
    infinite = jnp.isinf(prepared.value)
    flat = jnp.sum(jnp.where(kept, p * gap, 0), axis, keepdims=True)
    finite_tau = jnp.where(infinite, 1, prepared.value)
    # Above 2^100 the quotients underflow, and the limit is exact.
    limit = finite_tau > 2.0**100
    scaled_shift = jnp.where(infinite | limit, flat, finite_tau * shift)
    d = jnp.where(both, delta - shift, jnp.where(s.kept, jnp.inf, -jnp.inf))
    d = jnp.where(kept, d, 0)
    scaled = jnp.where(both & near, gap - scaled_shift, finite(d) * finite_tau)
    return p, q, d, finite(scaled), finite_tau


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def scaled_divergence(kind, axis, static_tau, student, teacher, tau, where):
    """Returns τ² times the divergence `kind` of the student from the teacher.

    Args:
      kind: "forward_kl" (from the teacher) or "jensen_shannon".
      axis: the class axis.
      static_tau: the temperature, if it is a Python float.
      student: logits in the dtype to compute in.
      teacher: logits of the same shape and dtype.
      tau: the temperature, if it is an array.
      where: the class mask, or None.

    Returns:
      One value per row.
    """
    return _value_and_slopes(
        kind, axis, student, teacher, pick_temperature(static_tau, tau), where
    )[0]


def _value_and_slopes(kind, axis, student, teacher, tau, where):
    """Returns the divergence and its derivatives by student and teacher logits."""
    p, q, d, scaled, value = _log_ratio(student, teacher, tau, where, axis)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    zero = Temperature.prepare(tau, student.dtype).is_zero
    if kind == "forward_kl":
        loss = total(excess(p, q, d, scaled, value))
        by_student = difference(p, q, d, scaled, value)
        # p (log(p/q) - KL), times τ.
        ratio = jnp.where(p == 0, 0, finite(scaled))
        by_teacher = -p * (ratio - total(p * ratio))
    else:
        # log(r/p) and log(r/q) for the mixture r, from d = log(q/p).
        to_p, to_q = half_step(d), half_step(-d)
        scaled_p, scaled_q = half_scaled(d, scaled), half_scaled(-d, -scaled)
        r = (p + q) / 2
        loss = total(
            excess(p, r, to_p, scaled_p, value) + excess(q, r, to_q, scaled_q, value)
        )
        loss = loss / 2
        by_student = _centred_product(q, finite(scaled_q), total)
        by_teacher = _centred_product(p, finite(scaled_p), total)
    by_student, by_teacher = finite(by_student), finite(by_teacher)
    loss, by_student, by_teacher = (
        jnp.where(zero, 0, a) for a in (loss, by_student, by_teacher)
    )
    return jnp.squeeze(loss, axis), by_student, by_teacher


def _centred_product(p, log_ratio, total):
    """Returns -p/2 (log_ratio - Σ p log_ratio)."""
    log_ratio = jnp.where(p == 0, 0, log_ratio)
    return -p / 2 * (log_ratio - total(p * log_ratio))


def _scaled_divergence_jvp(kind, axis, static_tau, primals, tangents):
    student, teacher, tau_array, where = primals
    ds, dt, dtau, _ = tangents
    tau = pick_temperature(static_tau, tau_array)
    loss, by_student, by_teacher = _value_and_slopes(
        kind, axis, student, teacher, tau, where
    )
    tangent = jnp.zeros_like(loss)
    if not has_no_tangent(ds):
        tangent += jnp.sum(by_student * ds, axis)
    if not has_no_tangent(dt):
        tangent += jnp.sum(by_teacher * dt, axis)
    if not has_no_tangent(dtau):
        # The loss is homogeneous of degree 2 in (logits, τ): Euler's identity.
        inner = sum(
            jnp.where(
                slope == 0, 0, slope * (logits - centre(logits, 1.0, where, axis).peak)
            )
            for slope, logits in ((by_student, student), (by_teacher, teacher))
        )
        slope = 2 * loss - jnp.sum(inner, axis)
        # Where the loss or its slope overflows there is no gradient in τ.
        slope = jnp.where(jnp.isfinite(slope) | jnp.isnan(loss), slope, 0)
        inverse_tau = jnp.squeeze(inverse(tau, student.dtype) * dtau, axis)
        tangent += slope * inverse_tau
    return loss, tangent


scaled_divergence.defjvp(_scaled_divergence_jvp, symbolic_zeros=True)
