"""The temperature of least negative log-likelihood, for stored and streamed logits.

The mean NLL is convex in β = 1/τ, so its derivative
`g(β) = Σ w (Σ p u - u_label) / Σ w` changes sign once at most: above 0 where a higher
temperature is better, below 0 where a lower one is. It is -τ times the derivative by
log τ, whose terms are centred, as those of the NLL are: a common offset of the logits
cancels before anything is rounded.

Between a temperature and a much higher one g is nearly a straight line. Its zero is
bracketed by 1 and a bound, and found by Chandrupatla's method: inverse quadratic steps
where three points allow it, halving the bracket of log β otherwise. It needs one pass
over the logits a step and no second derivative, and cannot leave the bounds.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
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
    low, one, high = (jnp.asarray(tau, dtype) for tau in bounds)
    # What a step leaves has the type of what a temperature's evaluation gives.
    over = mesh_axes.varying_axes(jax.make_jaxpr(evaluate)(one).out_avals[1])
    zero, no = jnp.zeros((), dtype), jnp.bool_(False)
    point = _Point(one, zero)
    start = _Search(
        point, point, point, zero, one, zero + jnp.inf, jnp.int32(0), no, jnp.int32(0)
    )
    start = jax.tree.map(lambda a: mesh_axes.vary(a, over), start)
    search = lax.while_loop(
        lambda search: ~search.done & (search.step < _MOST_STEPS),
        functools.partial(_advance, evaluate, (low, one, high)),
        start,
    )
    # Infinite at every temperature that was tried: no class of the label.
    undefined = ~jnp.isfinite(search.nll)
    tau = nan_where(undefined, jnp.clip(search.tau, low, high))
    return TemperatureFit(tau, search.nll, jnp.where(undefined, 0, search.side))


class _Point(NamedTuple):
    """A temperature that was tried, and the derivative of the mean NLL by 1/τ there."""

    tau: jax.Array
    slope: jax.Array


class _Search(NamedTuple):
    """What is known after some temperatures.

    Attributes:
      new: the newest one.
      end: the other end of the bracket.
      old: the one before, or the end before.
      move: by how much 1/τ moved to the newest.
      tau: what to try next; once done the minimum.
      nll: the lowest so far; NaN where one was.
      side: -1 or 1 if the minimum is the lower or the upper bound.
      done: whether nothing is left to try.
      step: how many were tried.
    """

    new: _Point
    end: _Point
    old: _Point
    move: jax.Array
    tau: jax.Array
    nll: jax.Array
    side: jax.Array
    done: jax.Array
    step: jax.Array


def _evaluate(
    rows, weights, token_axes, tau: jax.Array
) -> tuple[_Point, jax.Array, jax.Array]:
    """Tries a temperature; returns the mean NLL and spread there too."""
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
    nll, slope, spread = sums / jnp.where(count == 0, 1, count)
    return _Point(tau, -slope * tau), nll, spread


def _where(condition: jax.Array, yes: _Point, no: _Point) -> _Point:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _advance(evaluate, bounds, search: _Search) -> _Search:
    """Tries one more temperature: 1, a bound, and then what lies between the two."""
    low, one, high = bounds
    is_first, is_second = search.step == 0, search.step == 1
    point, nll, spread = evaluate(search.tau)
    nll = jnp.minimum(jnp.where(is_first, nll, search.nll), nll)
    nll = nan_where(jnp.isnan(point.slope), nll)

    before = _where(is_first, point, search.new)
    same = jnp.sign(point.slope) == jnp.sign(before.slope)
    old = _where(is_first, point, _where(same, before, search.end))
    end = _where(is_first, point, _where(same, search.end, before))
    move = jnp.abs(1 / point.tau - 1 / before.tau)

    # Slopes of 0 do not tell whether all logits are alike: that of a certain label
    # underflows. Where they are, every temperature is as good.
    flat = is_first & (spread == 0)
    is_zero = is_second & (before.slope == 0) & (point.slope > 0)
    at_high = (before.slope > 0) & (point.slope >= 0)
    at_high = at_high | (is_zero & (one == high))
    at_low = ~(before.slope > 0) & (point.slope <= 0)
    side = jnp.where(at_high, 1, jnp.where(at_low, -1, 0))
    side = jnp.where(is_second, side, search.side)

    guess, known = _guess(point, end, old, is_second)
    beta, other = 1 / point.tau, 1 / end.tau
    best = _where(jnp.abs(end.slope) < jnp.abs(point.slope), end, point)
    least = 2 * jnp.finfo(beta.dtype).eps / best.tau
    closed = jnp.abs(other - beta) <= 2 * least
    # The error of such a step is as the product of the last two where both are small.
    product = jnp.abs(guess - beta) * move
    is_small = product <= jnp.finfo(beta.dtype).eps / 4 * beta**2
    near = known & (move <= beta / 16) & is_small
    inside = jnp.minimum(beta, other) + least, jnp.maximum(beta, other) - least
    guess = jnp.clip(guess, *inside)
    found = closed | near | (point.slope == 0)
    done = jnp.where(is_second, (side != 0) | is_zero, found)
    done = jnp.where(is_first, flat, done) | jnp.isnan(nll)

    bound = jnp.where(point.slope > 0, high, low)
    tau = jnp.where(done & ~near, best.tau, 1 / guess)
    tau = jnp.where(is_second & (side != 0), point.tau, tau)
    tau = jnp.where(is_zero, one, tau)
    tau = jnp.where(is_first, jnp.where(flat, one, bound), tau)
    return _Search(point, end, old, move, tau, nll, side, done, search.step + 1)


def _guess(
    new: _Point, end: _Point, old: _Point, is_second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns 1/τ between `new` and `end` that is tried next.

    And whether it is where a parabola through three points, 1/τ by its slope, is 0:
    there it is monotone.
    """
    a, b, c = 1 / new.tau, 1 / end.tau, 1 / old.tau
    fa, fb, fc = new.slope, end.slope, old.slope
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    good = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
    share = fa / (fb - fa) * fc / (fb - fc)
    share = share + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
    parabola = a + share * (b - a)
    known = good & jnp.isfinite(parabola) & ~is_second
    middle = jnp.sqrt(a) * jnp.sqrt(b)
    # A straight line from a higher temperature, and little by little to a lower one.
    line = a - fa / (fb - fa) * (b - a)
    second = jnp.where(a < b, line, jnp.minimum(2 * b, middle))
    guess = jnp.where(known, parabola, jnp.where(is_second, second, middle))
    return guess, known
