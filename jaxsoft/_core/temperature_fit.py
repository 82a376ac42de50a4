"""The temperature of least negative log-likelihood, for stored and streamed logits.

The mean NLL is convex in 1/τ, so its derivative by t = log τ,
`D(t) = Σ w (c_label - Σ p c) / Σ w` with c the centred logits over τ, changes sign once
at most: below 0 where a higher temperature is better, above 0 where a lower one is.
Both of its terms are centred, and so is the NLL: a common offset of the logits cancels
before anything is rounded.

The zero is bracketed and found by Chandrupatla's method: inverse quadratic steps where
three points allow it, halving the bracket of t otherwise. It needs one pass over the
logits a step and no second derivative, and cannot leave the bounds.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks
from jaxsoft._core.exporting import exportable_namedtuple
from jaxsoft._core.numerics import nan_where

__all__ = [
    "DEFAULT_BOUNDS",
    "TemperatureFit",
    "check_bounds",
    "fit_rows",
    "row_weights",
]

DEFAULT_BOUNDS = (0.01, 100.0)

# The widest bounds, well inside float32.
_LOWEST, _HIGHEST = 1e-30, 1e30
# More than halving takes from the widest bracket to a rounding in float64.
_MOST_STEPS = 100


@exportable_namedtuple
class TemperatureFit(NamedTuple):
    """The temperature that fits labels best; a pytree of scalars.

    Attributes:
      temperature: τ, float32 (float64 if the logits are); 1, or the bound nearest to
        it, where every temperature is as good; NaN where none is defined.
      nll: the weighted mean negative log-likelihood at τ, in nats; never above that of
        τ = 1 if 1 is within the bounds.
      at_bound: int32; -1 if τ is the lower bound, where the labels are the largest
        logits and the NLL falls as τ does, 1 if it is the upper bound, where the logits
        are no better than chance, and 0 if τ is a minimum between the two.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import fit_temperature
      >>> fit = fit_temperature(jnp.eye(2), jnp.array([0, 1]))
      >>> print(f"{fit.temperature:.2f} {fit.nll:.2f} {fit.at_bound}")
      0.01 0.00 -1
    """

    temperature: jax.Array
    nll: jax.Array
    at_bound: jax.Array


class RowFit(NamedTuple):
    """What one pass over the logits tells of each row, [...].

    Attributes:
      nll: the negative log-likelihood of the label; NaN for a label outside [0, V).
      slope: c_label - Σ p c, the derivative of `nll` by log τ.
      spread: a number below 0 unless all kept logits are alike, where it is 0.
    """

    nll: jax.Array
    slope: jax.Array
    spread: jax.Array


def check_bounds(bounds: object) -> tuple[float, float, float]:
    """Returns the lower bound, 1 or the bound next to it, and the upper bound.

    The bounds must be positive and increase.
    """
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"`bounds` must be a pair of numbers, got {bounds!r}.")
    low, high = (checks.scalar_in("bounds", b, _LOWEST, _HIGHEST) for b in bounds)
    if low >= high:
        raise ValueError(f"`bounds` must increase, got {tuple(bounds)}.")
    return low, min(max(1.0, low), high), high


def row_weights(weights: jax.Array | None) -> jax.Array | None:
    """Returns weights of rows, NaN where they are negative: no NLL is convex then."""
    if weights is None or weights.dtype == jnp.bool_:
        return weights
    return nan_where(weights < 0, weights)


def fit_rows(
    rows: Callable[[jax.Array], RowFit],
    weights: jax.Array | None,
    bounds: tuple[ArrayLike, ArrayLike, ArrayLike],
    dtype: jnp.dtype,
    token_axes: tuple[str, ...] = (),
) -> TemperatureFit:
    """Returns the temperature within the bounds of least weighted mean NLL.

    Args:
      rows: gives a temperature's NLL and slope of each row.
      weights: [...] booleans or numbers, None for 1; rows of weight 0 count nothing.
      bounds: as `check_bounds` returns them, or traced.
      dtype: the dtype of `rows`' results.
      token_axes: mesh axes over which the rows are sharded.

    Returns:
      The fit.
    """
    evaluate = functools.partial(_evaluate, rows, weights, token_axes)
    taus = jnp.stack([jnp.asarray(tau, dtype) for tau in bounds])
    first = lax.map(lambda tau: evaluate(jnp.log(tau), tau), taus)
    low, one, high = (jax.tree.map(lambda a, i=i: a[i], first) for i in range(3))
    # Slopes of 0 do not tell it: that of a certain label underflows.
    flat = high.spread == 0
    at_low = (low.slope >= 0) & ~(one.slope < 0) & ~flat
    at_high = (high.slope <= 0) & ~(one.slope > 0) & ~flat & ~at_low
    # Where there is no zero to look for, the search starts done.
    done = flat | at_low | at_high | (one.slope == 0) | jnp.isnan(first.slope).any()
    inner = _zero(evaluate, one, _where(one.slope < 0, high, low), done)
    best = _where(at_low, low, _where(at_high, high, inner))
    tau = jnp.where(best.t == one.t, taus[1], jnp.exp(best.t))
    tau = jnp.where(at_low, taus[0], jnp.where(at_high, taus[2], tau))
    # The NLL of the minimum is no higher than any other, but for its own rounding.
    nll = jnp.minimum(best.nll, one.nll)
    unknown = jnp.isnan(first.slope).any() | jnp.isnan(first.nll).any()
    # Infinite at the upper bound it is so at every temperature: no class of the label.
    undefined = unknown | jnp.isinf(high.nll)
    tau = nan_where(undefined, jnp.clip(tau, taus[0], taus[2]))
    nll = nan_where(unknown, nll)
    side = at_high.astype(jnp.int32) - at_low.astype(jnp.int32)
    return TemperatureFit(tau, nll, jnp.where(undefined, 0, side))


class _Point(NamedTuple):
    """A temperature tried: t = log τ, and the means of what `RowFit` has there."""

    t: jax.Array
    nll: jax.Array
    slope: jax.Array
    spread: jax.Array


def _evaluate(rows, weights, token_axes, t: jax.Array, tau: jax.Array) -> _Point:
    """Tries a temperature."""
    terms = rows(tau)
    dtype = terms.nll.dtype
    if weights is None:
        count = jnp.asarray(terms.nll.size, dtype)
        count *= math.prod(lax.axis_size(axis) for axis in token_axes)
    else:
        weights = weights.astype(dtype)
        terms = [weights * jnp.where(weights == 0, 0, values) for values in terms]
        count = jnp.sum(weights)
        count = lax.psum(count, token_axes) if token_axes else count
    sums = jnp.stack([jnp.sum(values) for values in terms])
    sums = lax.psum(sums, token_axes) if token_axes else sums
    sums = sums / jnp.where(count == 0, 1, count)
    return _Point(t, sums[0], sums[1], sums[2])


def _where(condition: jax.Array, yes: _Point, no: _Point) -> _Point:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


class _Search(NamedTuple):
    """The newest point, the other end of the bracket, and the point before."""

    new: _Point
    end: _Point
    old: _Point
    step: jax.Array
    done: jax.Array


def _zero(evaluate, a: _Point, b: _Point, done: jax.Array) -> _Point:
    """Returns the point where the slope vanishes, between two of unlike signs."""
    tolerance = 2 * float(jnp.finfo(a.t.dtype).eps)

    def share_left(new, end):
        """The tolerance at the better end, as a share of the bracket."""
        t = jnp.where(jnp.abs(new.slope) < jnp.abs(end.slope), new.t, end.t)
        width = jnp.abs(end.t - new.t)
        allowed = tolerance * jnp.maximum(jnp.abs(t), 1)
        return allowed / jnp.where(width == 0, allowed, width)

    def unfinished(search):
        return ~search.done & (search.step < _MOST_STEPS)

    def advance(search):
        new, end, old, step, _ = search
        limit = share_left(new, end)
        share = jnp.clip(_interpolate(new, end, old), limit, 1 - limit)
        share = jnp.where(step == 0, 0.5, share)
        t = new.t + share * (end.t - new.t)
        point = evaluate(t, jnp.exp(t))
        same = jnp.sign(point.slope) == jnp.sign(new.slope)
        old, end = _where(same, new, end), _where(same, end, new)
        done = (share_left(point, end) > 0.5) | ~(jnp.abs(point.slope) > 0)
        return _Search(point, end, old, step + 1, done)

    search = _Search(a, b, b, jnp.int32(0), done)
    search = lax.while_loop(unfinished, advance, search)
    better = jnp.abs(search.end.slope) < jnp.abs(search.new.slope)
    return _where(better & ~done, search.end, search.new)


def _interpolate(new: _Point, end: _Point, old: _Point) -> jax.Array:
    """Returns where between `new` and `end` a parabola through three points is 0.

    Half-way, where the parabola t(slope) is not monotone or the points are no three.
    """
    a, b, c = new.t, end.t, old.t
    fa, fb, fc = new.slope, end.slope, old.slope
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    good = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
    share = fa / (fb - fa) * fc / (fb - fc)
    share = share + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
    return jnp.where(good & jnp.isfinite(share), share, 0.5)
