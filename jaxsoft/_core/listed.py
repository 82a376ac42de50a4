"""Divergences of distributions that are known at K listed classes."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxsoft._core.divergence import (
    HALVES,
    Kind,
    Mixture,
    difference,
    excess,
    log_mixture,
    mixture_terms,
)
from jaxsoft._core.numerics import is_zero, nan_where

__all__ = [
    "FEW",
    "REMAINING",
    "Remaining",
    "at_listed",
    "is_listed",
    "listed_divergence",
    "needs_rest",
]

Remaining = Literal["other", "drop", "renormalize", "ignore"]
REMAINING: tuple[Remaining, ...] = get_args(Remaining)

# All classes are compared with so many ids of a row: a scatter takes them one by one.
FEW = 16
# Beyond this |log(q / p)| one of two probabilities counts as 0.
_FAR = 1000


def is_listed(ids: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Tells of which classes a row has the id, `shape`.

    Args:
      ids: [..., K] int32, the ids on `axis`, at most `FEW`; -1 stands for none.
      shape: [..., V], of the classes.
      axis: their axis.
    """
    classes = lax.broadcasted_iota(jnp.int32, shape, axis)
    found = jnp.zeros(shape, bool)
    for own in _one_by_one(ids, axis):
        found |= classes == own
    return found


def at_listed(
    ids: jax.Array, values: jax.Array, shape: tuple[int, ...], axis: int
) -> jax.Array:
    """Returns the sums of the values [..., K] that ids have, by classes; `is_listed`'s.

    Args:
      ids: [..., K] int32, on `axis`, at most `FEW`; -1 stands for none.
      values: [..., K], of the ids.
      shape: [..., V], of the classes.
      axis: their axis.
    """
    classes = lax.broadcasted_iota(jnp.int32, shape, axis)
    placed = jnp.zeros(shape, values.dtype)
    pairs = zip(_one_by_one(ids, axis), _one_by_one(values, axis), strict=True)
    for own, value in pairs:
        placed += jnp.where(classes == own, value, 0)
    return placed


def _one_by_one(array: jax.Array, axis: int) -> list[jax.Array]:
    return [
        lax.slice_in_dim(array, k, k + 1, axis=axis) for k in range(array.shape[axis])
    ]


def needs_rest(kind: Kind, remaining: Remaining) -> bool:
    """Tells whether a divergence needs the student's remaining mass.

    Raises:
      ValueError: if the divergence would be infinite for every student.
    """
    if remaining != "renormalize":
        return remaining == "other"
    if kind == "reverse_kl":
        raise ValueError(
            "`remaining` must not be 'renormalize' with reverse KL, which is infinite "
            "where the teacher's remaining classes have probability 0; 'drop' "
            "renormalizes both."
        )
    return kind != "forward_kl"


def listed_divergence(
    kind: Kind,
    remaining: Remaining,
    log_p: jax.Array,
    log_q: jax.Array,
    log_rest: jax.Array | None,
    tau: jax.Array,
    lacks: jax.Array,
) -> jax.Array:
    """Returns τ² times the divergences of rows, [...].

    Args:
      kind: which divergence.
      remaining: what becomes of classes that are not listed.
      log_p: [..., K] the teacher's log-probabilities, -inf for none.
      log_q: [..., K] the student's, those of the listed classes alone where the others
        are dropped.
      log_rest: [...] the student's log-probability of all other classes, where it is
        needed.
      tau: a scalar or [...]; NaN in place of ∞, where log-probabilities say nothing.
      lacks: [...] whether a row has no class, and so no loss.
    """
    dtype = log_q.dtype
    tau = nan_where(tau == jnp.inf, tau)
    gone = log_p == -jnp.inf
    # What is left of 1 is known up to the rounding of K numbers.
    noise = log_p.shape[-1] * float(jnp.finfo(log_p.dtype).eps)
    log_p = log_p.astype(dtype)
    # A row without any kept class, and a temperature of 0, have no loss; what they hold
    # must not reach a gradient as NaN.
    none = lacks | is_zero(tau, dtype)
    tau = jnp.expand_dims(jnp.where(none, 1, tau), -1)
    log_q = jnp.where(gone | (none[..., None] & ~jnp.isnan(log_q)), 0, log_q)
    if log_rest is not None:
        log_rest = jnp.where(none, 0, log_rest)
    if remaining in ("renormalize", "drop"):
        log_p = jnp.where(gone, -jnp.inf, log_p - _log_total(log_p))
        if kind != "forward_kl" or remaining == "drop":
            none = none | jnp.all(gone, axis=-1)
    if remaining == "ignore" or (remaining == "renormalize" and kind == "forward_kl"):
        terms = _as_they_are(kind, jnp.where(gone, 0, log_p), log_q, gone)
        loss = jnp.sum(tau * (tau * terms), axis=-1)
    else:
        log_q = jnp.where(gone, -jnp.inf, log_q)
        if remaining == "drop" and kind != "forward_kl":
            none = none | jnp.all(log_q == -jnp.inf, axis=-1)
        if remaining != "drop":
            assert log_rest is not None
            rest = jnp.full_like(log_rest, -jnp.inf)
            if remaining == "other":
                rest = _log_rest(kind, log_p, log_rest, noise)
            log_p = jnp.concatenate([log_p, rest[..., None]], axis=-1)
            log_q = jnp.concatenate([log_q, log_rest[..., None]], axis=-1)
        loss = _whole(kind, log_p, log_q, tau)
    return jnp.where(none & ~jnp.isnan(loss), 0, loss)


def _log_total(log_p: jax.Array) -> jax.Array:
    """Returns log Σ p over the listed classes, [..., 1]; -inf without any."""
    none = jnp.all(log_p == -jnp.inf, axis=-1, keepdims=True)
    some = jnp.where(none, 0, log_p)
    total = jax.nn.logsumexp(some, axis=-1, keepdims=True)
    return jnp.where(none, -jnp.inf, total)


def _log_rest(
    kind: Kind, log_p: jax.Array, log_rest: jax.Array, noise: float
) -> jax.Array:
    """Returns the teacher's log-probability of all classes that are not listed."""
    mass = 1 - jnp.sum(jnp.exp(log_p), axis=-1)
    if kind == "forward_kl":
        # Where the student has no other class, mass of rounding would be infinite.
        mass = jnp.where((log_rest == -jnp.inf) & (mass <= noise), 0, mass)
    if kind == "reverse_kl":
        # What is left of 1 is known up to its rounding: a rest of 0 would be infinite.
        least = jnp.where(log_rest == -jnp.inf, 0, jnp.finfo(mass.dtype).eps)
        mass = jnp.maximum(mass, least)
    some = mass > 0
    return jnp.where(some, jnp.log(jnp.where(some, mass, 1)), -jnp.inf)


def _as_they_are(
    kind: Kind, log_p: jax.Array, log_q: jax.Array, gone: jax.Array
) -> jax.Array:
    """Returns p log(p / m) and q log(q / m), as the kind adds them, of K classes."""
    p = jnp.where(gone, 0, jnp.exp(log_p))
    if kind == "forward_kl":
        return p * (log_p - log_q)
    empty = gone | (log_q == -jnp.inf)
    log_q = jnp.where(empty, 0, log_q)
    q = jnp.where(empty, 0, jnp.exp(log_q))
    if kind == "reverse_kl":
        return q * (log_q - log_p)
    of_p, of_q, share_p, share_q = kind if isinstance(kind, Mixture) else HALVES
    d = jnp.where(empty, -_FAR, log_q - log_p)
    of_teacher = of_p * p * log_mixture(d, share_p, share_q)
    return -of_teacher - of_q * q * log_mixture(-d, share_q, share_p)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _whole(kind: Kind, log_p: jax.Array, log_q: jax.Array, tau: jax.Array) -> jax.Array:
    """Returns τ² times the divergences of two distributions that sum to 1."""
    return _whole_and_slopes(kind, log_p, log_q, tau)[0]


@functools.partial(_whole.defjvp, symbolic_zeros=True)
def _whole_jvp(
    kind: Kind,
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, ...],
) -> tuple[jax.Array, jax.Array]:
    loss, *slopes = _whole_and_slopes(kind, *primals)
    tangent = jnp.zeros_like(loss)
    for slope, change in zip(slopes, tangents[:2], strict=True):
        if not isinstance(change, SymbolicZero):
            tangent += jnp.sum(slope * change, axis=-1)
    if not isinstance(tangents[2], SymbolicZero):
        tangent += loss * jnp.squeeze(2 * tangents[2] / primals[2], -1)
    return loss, tangent


def _whole_and_slopes(
    kind: Kind, log_p: jax.Array, log_q: jax.Array, tau: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the sum of terms that are never negative, and its derivatives.

    These are by log_p and log_q, as if each were free.
    """
    if kind == "reverse_kl":
        loss, by_q, by_p = _whole_and_slopes("forward_kl", log_q, log_p, tau)
        return loss, by_p, by_q
    gone, empty = log_p == -jnp.inf, log_q == -jnp.inf
    p, q = (_exp(x, none) for x, none in ((log_p, gone), (log_q, empty)))
    if kind == "forward_kl":
        d = jnp.where(gone, 0, log_q - log_p)
        scaled = tau * jnp.where(jnp.isinf(d), 0, d)
        # Where p is 0, p (exp(d) - 1 - d) is q.
        alone = tau * q
        terms = jnp.where(gone, tau * alone, excess(p, q, d, scaled, tau))
        by_q = tau * jnp.where(gone, alone, difference(p, q, d, scaled, tau))
        return jnp.sum(terms, axis=-1), -tau * (p * scaled), by_q
    mixture = kind if isinstance(kind, Mixture) else HALVES
    d = jnp.where(empty, 0, log_q) - jnp.where(gone, 0, log_p)
    d = jnp.where(gone, _FAR, jnp.where(empty, -_FAR, d))
    terms, s_p, s_q = mixture_terms(mixture, p, q, d, None, tau)
    return jnp.sum(terms, axis=-1), -tau * (p * s_p), -tau * (q * s_q)


def _exp(x: jax.Array, none: jax.Array) -> jax.Array:
    """Returns exp(x), 0 without a derivative where there is none."""
    return jnp.where(none, 0, jnp.exp(jnp.where(none, 0, x)))
