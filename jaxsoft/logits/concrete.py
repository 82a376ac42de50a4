"""The density of relaxed one-hot samples."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft._core.numerics import is_zero
from jaxsoft.logits.centre import Centred, centre
from jaxsoft.logits.rows import Rows, in_tiles, tile_rows, to_rows
from jaxsoft.logits.softmax import logsumexp

__all__ = ["concrete_log_prob"]


@mesh_axes.accepts_explicit("logits", axis="axis")
def concrete_log_prob(
    relaxed: ArrayLike,
    logits: ArrayLike,
    temperature: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    log_space: bool = False,
) -> jax.Array:
    """Log-density of the Concrete distribution: of a sample of `gumbel_softmax`.

    `log (V-1)! + (V-1) log τ + Σ_v (a_v - log y_v) - V log Σ_v exp a_v`, with
    `a = x - τ log y`: the density on the simplex, by its first V-1 coordinates. In log
    space, of log y, the term `-Σ_v log y_v` is absent: it is the Jacobian of exp.

    Args:
      relaxed: [..., V] y, positive and of sum 1 over the kept classes; with
        `log_space` log y.
      logits: [..., V] x, of the shape of `relaxed`, any floating dtype.
      temperature: τ in (0, ∞), a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it.
      axis: the class axis, which the result lacks.
      where: booleans that broadcast to `logits`; False drops a class, as does a logit
        of -inf, and its entry does not matter. None keeps all.
      log_space: whether `relaxed` is log y and the density is that of log y.

    Returns:
      [...] float32 (float64 for float64 inputs); 0 for a row of one class or none; NaN,
      with gradients of 0, where an entry of a kept class is 0, or τ is 0 or ∞, where
      there is no density.

    Raises:
      TypeError: if an array is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, or a known temperature is negative or NaN.

    Notes:
      Differentiable in all three. Densities are of entries that still sum to 1: at low
      temperatures those of y underflow, and the log space keeps them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import concrete_log_prob
      >>> print(f"{concrete_log_prob(jnp.array([0.3, 0.7]), jnp.zeros(2), 1.0):.4f}")
      0.0000

    References:
      Maddison, Mnih and Teh, The Concrete Distribution, arXiv:1611.00712, equation 10
      and appendix C.3 (log space).
    """
    relaxed = checks.floating("relaxed", relaxed)
    logits = checks.floating("logits", logits)
    checks.shape("relaxed", relaxed, logits.shape, "logits.shape")
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    _, entries, _ = to_rows(relaxed, 1.0, axis, None)
    log_prob = _log_prob(static_tau, bool(log_space), entries.logits, rows)
    return back(log_prob)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _log_prob(
    static_tau: float | None, log_space: bool, y: jax.Array, rows: Rows
) -> jax.Array:
    dtype = numerics.compute_dtype(y, rows.logits)
    tau = jnp.asarray(rows.temperature(static_tau), dtype).reshape(-1, 1)
    y, x = y.astype(dtype), rows.logits.astype(dtype)
    limit = is_zero(tau, dtype) | jnp.isinf(tau)
    tau = jnp.where(limit, 1, tau)
    call = _Call(log_space, rows.where is not None)
    centred = centre(x, 1.0, rows.where, 1)
    log_y, scores = _scores(call, y, tau, centred)
    still = jax.lax.stop_gradient((y, tau, centred.logits))
    count, total = _sums(call, _Terms(scores, log_y, *still))
    lse = logsumexp(scores)
    # A row without classes counts one, whose terms are all 0.
    empty = lse == -jnp.inf
    total -= count * jnp.where(empty, 0, lse)
    log_tau = jnp.broadcast_to(jnp.log(tau), (x.shape[0], 1))[:, 0]
    # XLA's gammaln(1) is not quite 0.
    constant = jnp.where(count <= 2, 0, gammaln(count))
    result = constant + (count - 1) * log_tau + total
    return numerics.nan_where((total == -jnp.inf) | (limit[:, 0] & ~empty), result)


class _Call(NamedTuple):
    """What is known of a call.

    Attributes:
      log_space: whether the density is that of log y.
      masked: whether classes are dropped by a mask.
    """

    log_space: bool
    masked: bool


class _Terms(NamedTuple):
    """What the terms of a row are made of.

    Attributes:
      scores: [R, V] a, see `_scores`.
      log_y: [R, V].
      y: [R, V], which serves with τ to compute the terms anew.
      tau: [R, 1] or [1, 1].
      x: [R, V] logits, -inf at dropped classes.
    """

    scores: jax.Array
    log_y: jax.Array
    y: jax.Array
    tau: jax.Array
    x: jax.Array

    def of(self, call: _Call) -> jax.Array:
        """Returns the terms: `a - log y`, or a in log space."""
        return self.scores if call.log_space else self.scores - self.log_y


def _scores(
    call: _Call, y: jax.Array, tau: jax.Array, centred: Centred
) -> tuple[jax.Array, jax.Array]:
    """Returns log y, and a = x - τ log y about the largest x, [R, V].

    log y is 0 at dropped classes, and inf where there is no density: then a is -inf and
    so is the sum of the terms, and all derivatives are finite.
    """
    nowhere, anywhere = (-jnp.inf, 0) if call.log_space else (0, 1)
    usable = centred.kept & (y != nowhere)
    y = jnp.where(usable, y, anywhere)
    log_y = y if call.log_space else jnp.log(y)
    log_y = jnp.where(usable, log_y, jnp.where(centred.kept, jnp.inf, 0))
    return log_y, centred.values - _product(tau, log_y)


@jax.custom_jvp
def _product(tau: jax.Array, log_y: jax.Array) -> jax.Array:
    """Returns τ log y, which does not move where log y is inf."""
    return tau * log_y


@_product.defjvp
def _product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (tau, log_y), (dtau, dlog_y) = primals, tangents
    return _product(tau, log_y), tau * dlog_y + jnp.where(
        log_y == jnp.inf, 0, log_y
    ) * dtau


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(call: _Call, terms: _Terms) -> tuple[jax.Array, jax.Array]:
    """Returns how many classes are kept, at least 1, and the sum of terms, [R]."""
    of_kept = functools.partial(_sums_of_kept, call)
    if call.masked:
        return of_kept(terms)
    of_all = functools.partial(_sums_of_all, call)
    return jax.lax.platform_dependent(terms, cpu=of_all, default=of_kept)


@_sums.defjvp
def _sums_jvp(
    call: _Call, primals: tuple[_Terms], tangents: tuple[_Terms]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    count, total = _sums(call, *primals)
    # Neither term moves where a class is dropped.
    moved = tangents[0].of(call)
    return (count, total), (jnp.zeros_like(count), jnp.sum(moved, axis=1))


def _sums_of_kept(call: _Call, terms: _Terms) -> tuple[jax.Array, jax.Array]:
    kept = terms.x != -jnp.inf
    count = jnp.maximum(jnp.sum(kept, axis=1), 1).astype(terms.scores.dtype)
    return count, jnp.sum(jnp.where(kept, terms.of(call), 0), axis=1)


def _sums_of_all(call: _Call, terms: _Terms) -> tuple[jax.Array, jax.Array]:
    """Returns `_sums`, on a CPU: classes are left out where a sum over all is -inf.

    XLA for CPUs stores what a select gives before it sums.
    """
    total = jnp.sum(terms.of(call), axis=1)
    rows, classes = terms.x.shape
    count = jnp.full_like(total, classes)

    def some(arrays):
        y, tau, x = arrays
        log_y, scores = _scores(call, y, tau, centre(x, 1.0, None, 1))
        return _sums_of_kept(call, _Terms(scores, log_y, *arrays))

    # Scores that this took would be held in memory beside their exponentials.
    return jax.lax.cond(
        jnp.isfinite(total).all(),
        lambda arrays: (count, total),
        lambda arrays: in_tiles(some, arrays, rows, tile_rows(classes)),
        (terms.y, terms.tau, terms.x),
    )
