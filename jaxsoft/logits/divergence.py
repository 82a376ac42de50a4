"""Divergences between two tempered softmaxes of stored logits, times τ².

With p the teacher's probabilities, q the student's, g the student's centred logits less
the teacher's and ḡ = Σ p g, the Kullback-Leibler divergence is
`log Σ p exp((g - ḡ) / τ)`. Below 1 it is log(1 + Σ p φ), with φ = exp(δ) - 1 - δ >= 0
of δ = (g - ḡ) / τ, so that nothing cancels; above 1 it is `log(Z_q / Z_p) - ḡ / τ`.
Divergences from a mixture are sums of the terms of `_core/divergence.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._core import mesh_axes
from jaxsoft._core.by_platform import by_platform
from jaxsoft._core.divergence import (
    HALVES,
    Mixture,
    difference,
    excess,
    mixture_terms,
)
from jaxsoft._core.numerics import Temperature, finite, inverse, largest_finite
from jaxsoft.logits.arguments import has_no_tangent, pick_temperature
from jaxsoft.logits.centre import Centred, centre
from jaxsoft.logits.rows import in_tiles, tile_rows
from jaxsoft.logits.softmax import nonzero

__all__ = ["Pair", "below_peak", "compare", "scaled_divergence", "tangent_of_loss"]

# Of more logits the arrays beside them are new memory of a process at every call.
_MANY = 2**20


class Pair(NamedTuple):
    """Two distributions; arrays keep the class axis, with size 1 if reduced.

    Attributes:
      p: the teacher's probabilities.
      q: the student's.
      gap: g - ḡ, finite.
      log_ratio: τ log(q / p), finite.
      tau: τ, the largest finite number at τ = ∞.
      loss: τ² KL(p, q).
      lacks_p: whether the teacher has no class.
      lacks_q: whether the student has none.
    """

    p: jax.Array
    q: jax.Array
    gap: jax.Array
    log_ratio: jax.Array
    tau: jax.Array
    loss: jax.Array
    lacks_p: jax.Array
    lacks_q: jax.Array


def below_peak(centred: Centred) -> jax.Array:
    """Returns x - m, the lowest finite number at dropped classes."""
    lowest = jnp.finfo(centred.logits.dtype).min
    return jnp.maximum(centred.logits - centred.peak, lowest)


class _Side(NamedTuple):
    """One of two distributions; arrays keep the class axis, with size 1 if reduced.

    Attributes:
      centred: the logits.
      weights: exp(c).
      sum: Σ exp(c), 0 in a row without any class.
      share: 1 / Σ exp(c), 1 in such a row.
    """

    centred: Centred
    weights: jax.Array
    sum: jax.Array
    share: jax.Array

    @classmethod
    def of(cls, logits, tau, where, axis) -> "_Side":
        centred = centre(logits, tau, where, axis)
        weights = jnp.exp(centred.values)
        total = jnp.sum(weights, axis, keepdims=True)
        return cls(centred, weights, total, 1 / nonzero(total))

    @property
    def probabilities(self) -> jax.Array:
        return self.weights * self.share


def _log_of_sums(s: _Side, t: _Side) -> jax.Array:
    """Returns log(Z_s / Z_t)."""
    return jnp.log(nonzero(s.sum) * t.share)


class _Evenly(NamedTuple):
    """Two distributions, of which neither comes first; see `Pair`."""

    teacher: _Side
    student: _Side
    log_ratio: jax.Array
    tau: jax.Array

    @property
    def p(self) -> jax.Array:
        return self.teacher.probabilities

    @property
    def q(self) -> jax.Array:
        return self.student.probabilities

    @property
    def lacks_p(self) -> jax.Array:
        return self.teacher.sum == 0

    @property
    def lacks_q(self) -> jax.Array:
        return self.student.sum == 0


def _compare_evenly(student, teacher, tau, where, axis) -> _Evenly:
    """Compares tempered softmaxes by log(q / p), for divergences from a mixture.

    With r = (p + q) / 2, Σ r tanh(log(q / p) / 2) is 0: where the logarithms are small
    so is Σ r log(q / p), to the third order, and where they are not the logarithms of
    the sums give them. An error of all classes together moves a divergence by no more
    than its square and its product with the divergence.
    """
    s, t = (_Side.of(logits, tau, where, axis) for logits in (student, teacher))
    tau = largest_finite(tau, student.dtype)
    gap = below_peak(s.centred) - below_peak(t.centred)
    # Of halves, which are nothing else: XLA for CPUs would store p and q for this sum.
    halves = t.weights * (0.5 * t.share) + s.weights * (0.5 * s.share)
    # Of what a select gives, which is stored: a sum of products takes longer than both.
    mean = jnp.sum(jnp.where(gap == 0, 0, halves * gap), axis, keepdims=True)
    shift = _log_of_sums(s, t)
    rounding = float(jnp.finfo(student.dtype).eps) ** 0.75
    is_close = jnp.abs(shift - mean * inverse(tau, student.dtype)) <= rounding
    log_ratio = finite(gap - jnp.where(is_close, mean, tau * shift))
    return _Evenly(t, s, log_ratio, tau)


def compare(student, teacher, tau, where, axis) -> Pair:
    """Compares the tempered softmaxes of a student and a teacher."""
    s, t = (_Side.of(logits, tau, where, axis) for logits in (student, teacher))
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    tau = largest_finite(tau, student.dtype)
    over = inverse(tau, student.dtype)
    # A class with mass on the teacher's side alone makes the mean infinite.
    lost = (s.centred.logits == -jnp.inf) & (t.weights > 0)
    gap = below_peak(s.centred) - below_peak(t.centred)
    gap = jnp.where(lost, -jnp.inf, gap)
    mean = total(t.weights * gap) * t.share
    is_lost = mean == -jnp.inf
    mean = jnp.where(is_lost, 0, finite(mean))
    gap = finite(gap - mean)
    scale = jnp.exp(jnp.clip(-mean * over, -80, 80))
    # The smaller divergences, from exp(KL) - 1 = Σ p φ.
    terms = excess(t.weights, s.weights * scale, gap * over, gap, tau)
    small = total(terms) * t.share
    growth = jnp.where(small == jnp.inf, 0, small) * over * over
    safe = jnp.where(growth == 0, 1, growth)
    small = small * jnp.where(growth == 0, 1, jnp.log1p(safe) / safe)
    # The larger ones, from the sums of exponentials.
    shift = _log_of_sums(s, t)
    is_large = is_lost | (shift - mean * over > 1)
    shift = jnp.where(is_large, tau * shift - mean, finite(small) * over)
    loss = jnp.where(is_large, tau * shift, small)
    # At τ = ∞ the sums are the numbers of classes: q has one that p lacks.
    is_lost |= (tau == jnp.finfo(student.dtype).max) & (s.sum > t.sum)
    loss = jnp.where(is_lost, jnp.inf, loss)
    p, q, lacks = t.probabilities, s.probabilities, (t.sum == 0, s.sum == 0)
    return Pair(p, q, gap, finite(gap - shift), tau, loss, *lacks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def scaled_divergence(kind, axis, static_tau, student, teacher, tau, where):
    """Returns τ² times the divergence `kind` of the student from the teacher.

    Args:
      kind: which one, of `Kind`.
      axis: the class axis.
      static_tau: the temperature, if it is a Python float.
      student: logits in the dtype to compute in.
      teacher: logits of the same shape and dtype.
      tau: the temperature, if it is an array.
      where: the class mask, or None.

    Returns:
      One value per row.
    """
    arrays = student, teacher, tau, where
    return _in_tiles(kind, axis, static_tau, arrays, (False, False))[0]


def _in_tiles(kind, axis, static_tau, arrays, wanted):
    """Returns the divergence and its derivatives by student and teacher logits.

    A dozen arrays as large as the logits would be new memory of the process at every
    call, which takes a CPU longer than computing them: of many logits a few rows are
    compared at a time there.

    Args:
      kind: which divergence.
      axis: the class axis.
      static_tau: the temperature, if it is a Python float.
      arrays: student, teacher, temperature and mask.
      wanted: whether the derivative by the student is, and that by the teacher.
    """

    def compared(axis, arrays):
        student, teacher, tau, where = arrays
        tau = pick_temperature(static_tau, tau)
        loss, *slopes = _value_and_slopes(kind, axis, student, teacher, tau, where)
        pairs = zip(slopes, wanted, strict=True)
        return loss, *(slope if wants else None for slope, wants in pairs)

    student = arrays[0]
    at_once = functools.partial(compared, axis)
    is_last = axis == student.ndim - 1
    if not is_last or student.size <= _MANY or mesh_axes.may_be_shared(student):
        return at_once(arrays)
    # The functions live as long as the program: none holds an array.
    shape = student.shape
    classes = shape[axis]

    def in_parts(arrays):
        rows = jax.tree.map(functools.partial(_as_rows, shape), arrays)
        found = in_tiles(
            functools.partial(compared, 1),
            rows,
            math.prod(shape[:-1]),
            tile_rows(classes),
        )
        return jax.tree.map(
            lambda a: a.reshape(shape[: a.ndim + len(shape) - 2]), found
        )

    return by_platform(arrays, cpu=in_parts, default=at_once)


def _as_rows(shape: tuple[int, ...], array: jax.Array) -> jax.Array:
    """Returns an array of the rank of the logits as [R, V], [R, 1], [1, V] or [1, 1].

    Args:
      shape: of the logits.
      array: one that broadcasts against them.
    """
    if math.prod(array.shape[:-1]) > 1:
        array = jnp.broadcast_to(array, (*shape[:-1], array.shape[-1]))
    return array.reshape(-1, array.shape[-1])


def _value_and_slopes(kind, axis, student, teacher, tau, where):
    """Returns the divergence and its derivatives by student and teacher logits."""
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    is_reverse = kind == "reverse_kl"
    sides = (teacher, student) if is_reverse else (student, teacher)
    mixture = HALVES if kind == "jensen_shannon" else kind
    if isinstance(mixture, Mixture):
        pair = _compare_evenly(*sides, tau, where, axis)
        d = pair.log_ratio * inverse(pair.tau, student.dtype)
        terms, to_p, to_q = mixture_terms(
            mixture, pair.p, pair.q, d, pair.log_ratio, pair.tau
        )
        loss = total(terms)
        by_student = _less_mean(pair.student, to_q, total)
        by_teacher = _less_mean(pair.teacher, to_p, total)
    else:
        pair = compare(*sides, tau, where, axis)
        loss = pair.loss
        over = inverse(pair.tau, student.dtype)
        by_student = difference(
            pair.p, pair.q, pair.log_ratio * over, pair.log_ratio, pair.tau
        )
        by_teacher = -pair.p * pair.gap
    # A row without a distribution teaches nothing.
    none = Temperature.prepare(tau, student.dtype).is_zero | pair.lacks_p
    if kind != "forward_kl":
        none = none | pair.lacks_q
    by_student, by_teacher = finite(by_student), finite(by_teacher)
    loss, by_student, by_teacher = (
        jnp.where(none, 0, a) for a in (loss, by_student, by_teacher)
    )
    if is_reverse:
        by_student, by_teacher = by_teacher, by_student
    return jnp.squeeze(loss, axis), by_student, by_teacher


def _less_mean(side: _Side, values: jax.Array, total) -> jax.Array:
    """Returns -p (v - Σ p v) of values v, 0 where p is."""
    # To XLA the divisor is not one number a row, by whose inverse it would multiply.
    # Quotients are stored on CPUs; products would be computed again for each use.
    divisor = jnp.maximum(nonzero(side.sum), side.weights)
    weighted = jnp.where(values == 0, 0, side.weights * -values / divisor)
    mean = jnp.where(side.sum == 0, 0, total(weighted))
    return weighted - side.probabilities * mean


def _scaled_divergence_jvp(kind, axis, static_tau, primals, tangents):
    student, teacher, tau_array, where = primals
    ds, dt, dtau, _ = tangents
    tau = pick_temperature(static_tau, tau_array)
    # By Euler's identity the temperature's needs both.
    wanted = tuple(
        not (has_no_tangent(own) and has_no_tangent(dtau)) for own in (ds, dt)
    )
    loss, by_student, by_teacher = _in_tiles(kind, axis, static_tau, primals, wanted)
    sides = ((by_student, student, ds), (by_teacher, teacher, dt))
    return loss, tangent_of_loss(axis, tau, where, loss, sides, dtau)


def tangent_of_loss(axis, tau, where, loss, sides, dtau):
    """Returns the tangent of a loss that is homogeneous of degree 2 in (logits, τ).

    Args:
      axis: the class axis.
      tau: the temperature.
      where: the class mask, or None.
      loss: τ² times a divergence, without the class axis.
      sides: of each array of logits its slope, itself and its tangent.
      dtau: the tangent of the temperature.

    Returns:
      The tangent; that of the temperature is known by Euler's identity.
    """
    tangent = jnp.zeros_like(loss)
    for slope, _, change in sides:
        if not has_no_tangent(change):
            tangent += jnp.sum(slope * change, axis)
    if not has_no_tangent(dtau):
        inner = sum(
            jnp.where(
                slope == 0, 0, slope * (logits - centre(logits, 1.0, where, axis).peak)
            )
            for slope, logits, _ in sides
        )
        slope = 2 * loss - jnp.sum(inner, axis)
        # Where the loss or its slope overflows there is no gradient in τ.
        slope = jnp.where(jnp.isfinite(slope) | jnp.isnan(loss), slope, 0)
        inverse_tau = jnp.squeeze(inverse(tau, loss.dtype) * dtau, axis)
        tangent += slope * inverse_tau
    return tangent


scaled_divergence.defjvp(_scaled_divergence_jvp, symbolic_zeros=True)
