"""The density of relaxed one-hot samples."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft._core.numerics import is_zero
from jaxsoft.logits.rows import Rows, to_rows
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
    tau = jnp.asarray(rows.temperature(static_tau), dtype)
    if tau.ndim == 0:
        tau = tau.reshape(1, 1)
    y, x = y.astype(dtype), rows.logits.astype(dtype)
    kept = x != -jnp.inf
    if rows.where is not None:
        kept = kept & rows.where
    limit = is_zero(tau, dtype) | jnp.isinf(tau)
    tau = jnp.where(limit, 1, tau)
    bad = (kept & (y == (-jnp.inf if log_space else 0))) | limit
    usable = kept & ~bad
    log_y = jnp.where(usable, y, 0 if log_space else 1)
    log_y = log_y if log_space else jnp.log(log_y)
    peak = jnp.max(jnp.where(kept, x, -jnp.inf), axis=1, keepdims=True)
    a = jnp.where(usable, x - jax.lax.stop_gradient(peak), 0) - tau * log_y
    # A row without classes counts one, whose terms are all 0.
    empty = ~jnp.any(kept, axis=1)
    count = jnp.maximum(jnp.sum(kept, axis=1), 1).astype(dtype)
    terms = jnp.where(kept, a if log_space else a - log_y, 0)
    lse = jnp.where(empty, 0, logsumexp(a, where=kept))
    total = jnp.sum(terms, axis=1) - count * lse
    log_tau = jnp.broadcast_to(jnp.log(tau), (x.shape[0], 1))[:, 0]
    # XLA's gammaln(1) is not quite 0.
    constant = jnp.where(count <= 2, 0, gammaln(count))
    result = constant + (count - 1) * log_tau + total
    return numerics.nan_where(jnp.any(bad & kept, axis=1), result)
