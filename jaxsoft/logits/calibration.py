"""Calibration of stored logits: the temperature that fits them, and calibration error.

Also for logits that are never stored: `jaxsoft.linear.calibration`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft._core.temperature_fit import (
    DEFAULT_BOUNDS,
    RowFit,
    TemperatureFit,
    check_bounds,
    fit_rows,
    row_weights,
)
from jaxsoft._core.tokens import keep_tokens, token_weights
from jaxsoft.logits.arguments import check_where
from jaxsoft.logits.centre import centre
from jaxsoft.logits.softmax import nonzero

__all__ = [
    "CalibrationBins",
    "calibration_bins",
    "expected_calibration_error",
    "fit_temperature",
    "row_fits",
]

# How far from 1 rounding, that of bfloat16 included, may bring a sum of probabilities.
_ROUNDING = 0.01


@mesh_axes.accepts_explicit("logits", axis=-1)
def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
) -> TemperatureFit:
    """The temperature at which logits fit labels best: temperature scaling.

    `argmin_τ Σ_i w_i (log Σ_v exp((x_iv - m_i) / τ) - (x_i,label - m_i) / τ) / Σ_i w_i`
    within the bounds. The objective is convex in 1/τ, and the search stops where its
    derivative is 0 within rounding: in float32 within some 1e-6 of τ, relative, and
    after 4 to 13 reads of the logits. Fit it on held-out examples, then pass it to
    `softmax`: the classes keep their order, only confidences change.

    Args:
      logits: [..., V], any floating dtype.
      labels: [...] integers in [0, V).
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      weights: [...] booleans or reals >= 0, one weight a row; a row of weight 0 counts
        nothing, whatever its label and logits. None weighs all rows alike.
      bounds: the lowest and the highest temperature, within [1e-30, 1e30].

    Returns:
      A `TemperatureFit` of three scalars, in float32 (float64 for float64 logits):
      the temperature, its mean NLL, and which bound it is at: -1 the lower, where every
      label is its row's largest logit, 1 the upper, where logits are no better than
      chance, 0 neither.

    Raises:
      TypeError: if a dtype is wrong, or `bounds` is no pair.
      ValueError: if a shape does not fit, or the bounds do not increase.

    Notes:
      Without any weight, and wherever all temperatures fit alike, the temperature is 1,
      or the bound nearest to it, and not at a bound; without any weight the NLL is 0.
      A label outside [0, V), NaN or +inf logits, and a negative weight give NaN for
      temperature and NLL; a label that is a dropped class gives a temperature NaN and
      an NLL inf. A row without any kept class has loss 0. A common offset of a row's
      logits changes nothing. Works under `jax.jit` and `jax.vmap`; no gradient flows
      through the fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import fit_temperature
      >>> logits = 2 * jax.random.normal(jax.random.key(0), (1000, 10))
      >>> labels = jax.random.categorical(jax.random.key(1), logits)
      >>> fit = fit_temperature(5 * logits, labels)
      >>> print(f"{fit.temperature:.1f} {fit.nll:.2f} {fit.at_bound}")
      4.9 1.29 0

    References:
      Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks,
      arXiv:1706.04599; Chandrupatla, A new hybrid quadratic/bisection algorithm for
      finding the zero of a nonlinear function without using derivatives, Advances in
      Engineering Software 28, 1997.
    """
    logits = checks.floating("logits", logits)
    axis = checks.class_axis(-1, logits)
    where = check_where(where, logits)
    labels = _check_labels(labels, logits, "logits")
    legend = "logits.shape[:-1]"
    token_weight = token_weights(labels.shape, weights, legend=legend)
    search = check_bounds(bounds)
    arrays = jax.lax.stop_gradient((logits, labels, where, token_weight))
    return _fit(axis, search, *arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _fit(axis, bounds, logits, labels, where, weights) -> TemperatureFit:
    x = logits.astype(numerics.compute_dtype(logits))
    rows = row_fits(axis, x, labels, where)
    return fit_rows(rows, row_weights(weights), bounds, x.dtype)


def row_fits(
    axis: int, x: jax.Array, labels: jax.Array, where: jax.Array | None
) -> Callable[[jax.Array], RowFit]:
    """Returns what tells of each row how it fits at a temperature.

    Args:
      axis: the class axis, the last one.
      x: logits in the dtype to compute in.
      labels: [...] integers.
      where: which classes are kept, or None.

    Returns:
      A function of a temperature that only divides.
    """
    classes = x.shape[axis]
    valid = (labels >= 0) & (labels < classes)
    label = jnp.where(valid, labels, 0).astype(jnp.int32)[..., None]
    picked = jnp.take_along_axis(x, label, axis)
    if where is not None:
        keeps = jnp.take_along_axis(jnp.broadcast_to(where, x.shape), label, axis)
        picked = jnp.where(keeps, picked, -jnp.inf)

    # Temperatures within the bounds only divide: what is centred is so once for all.
    centred = centre(x, 1.0, where, axis)
    gaps, lowest = centred.values, float(jnp.finfo(x.dtype).min)
    # The largest kept logit has none: a row without it has no class.
    own = jnp.where(jnp.max(gaps, axis) == 0, (picked - centred.peak)[..., 0], 0)
    own = numerics.nan_where(~valid, own)
    # By products, 0 for dropped classes: XLA for CPUs stores what a select gives.
    are_kept = jnp.minimum(jnp.maximum(gaps * 0.5, lowest) - lowest, 1)
    spread = jnp.min(jnp.maximum(gaps, lowest / 2) * are_kept, axis)
    # Within the bounds the lowest number has weight 0 too, and times it that stays 0.
    gaps = jnp.maximum(gaps, lowest)

    def rows(tau):
        # XLA for CPUs stores what two sums use: the exponentials, and nothing else.
        beta = 1 / tau
        exps = jnp.exp(gaps * beta)
        total = nonzero(jnp.sum(exps, axis))
        expected = jnp.sum(exps * gaps, axis) / total
        label = own * beta
        return RowFit(jnp.log(total) - label, label - expected * beta, spread)

    return rows


@mesh_axes.accepts_explicit("probabilities", axis=-1)
def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    *,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Expected calibration error of the most probable class.

    `Σ_b |Σ_{i in b} w_i (1[argmax p_i = label_i] - max p_i)| / Σ_i w_i`, over bins
    (k/M, (k+1)/M] of the confidence max p: the gap between accuracy and confidence of
    each of M bins of equal width, weighted by how much falls in it.

    Args:
      probabilities: [..., V], any floating dtype: what `softmax` gives, not logits.
      labels: [...] integers in [0, V).
      num_bins: M, at least 1.
      weights: [...] booleans or reals >= 0, one weight a row; a row of weight 0 counts
        nothing. None weighs all rows alike.

    Returns:
      A scalar in [0, 1], float32 (float64 for float64 probabilities); 0 without any
      weight.

    Raises:
      TypeError: if a dtype is wrong, or `num_bins` is no int.
      ValueError: if a shape does not fit, `num_bins` is below 1, or rows with weight
        are known to be no probabilities: one is negative, or their sum above 1.01.

    Notes:
      A confidence on the edge of two bins, as it is rounded in the dtype of the result,
      belongs to the lower; one of 0 belongs to the first bin, and one above 1 to the
      last. Of equally probable classes the lowest counts. A label outside [0, V), a NaN
      and a negative weight give NaN. The value depends on M, and is biased up where
      bins hold few rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import expected_calibration_error
      >>> probabilities = jnp.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]])
      >>> error = expected_calibration_error(probabilities, jnp.array([0, 1, 1]))
      >>> print(f"{error:.4f}")
      0.4000

    References:
      Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks,
      arXiv:1706.04599; Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated
      Probabilities Using Bayesian Binning, AAAI 2015.
    """
    bins = calibration_bins(probabilities, labels, num_bins, weights=weights)
    error = jnp.sum(jnp.abs(bins.gap))
    if weights is None:
        return error / max(jnp.size(labels), 1)
    total = jnp.sum(bins.weight)
    return error / jnp.where(total == 0, 1, total)


class CalibrationBins(NamedTuple):
    """Sums over the rows whose confidence falls in a bin, each [M].

    Attributes:
      weight: of the rows.
      confidence: of the rows, times their weight.
      correct: the weight of the rows whose most probable class is the label.
      gap: of `correct` less `confidence`, row by row.
    """

    weight: jax.Array
    confidence: jax.Array
    correct: jax.Array
    gap: jax.Array


@mesh_axes.accepts_explicit("probabilities", axis=-1)
def calibration_bins(
    probabilities: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    *,
    weights: ArrayLike | None = None,
) -> CalibrationBins:
    """Returns the bins that calibration error and reliability diagram are made of.

    The arguments are those of `expected_calibration_error`.
    """
    probabilities = checks.floating("probabilities", probabilities)
    checks.class_axis(-1, probabilities, "probabilities")
    labels = _check_labels(labels, probabilities, "probabilities")
    legend = "probabilities.shape[:-1]"
    token_weight = token_weights(labels.shape, weights, legend=legend)
    number = checks.positive_integer("num_bins", num_bins)
    _check_probabilities(probabilities, token_weight)
    return _bins(number, probabilities, labels, token_weight)


def _check_probabilities(
    probabilities: jax.Array, token_weight: jax.Array | None
) -> None:
    """Requires rows to be distributions wherever their values are known."""
    arrays = [a for a in (probabilities, token_weight) if a is not None]
    if any(isinstance(a, Tracer) or not a.is_fully_addressable for a in arrays):
        return
    wide = keep_tokens(token_weight, probabilities.astype(jnp.float32))
    low, total = jnp.min(wide, -1), jnp.sum(wide, -1)
    # Those of the likeliest classes alone sum to less. Comparisons with NaN are false.
    bad = (low < 0) | (total > 1 + _ROUNDING)
    if bad.size and bad.any():
        raise ValueError(
            "`probabilities` must lie in [0, 1] and sum to at most 1, got a row with "
            f"sum {total[bad][0]:g} and least {low[bad][0]:g}. Pass softmax(logits), "
            "not logits."
        )


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _bins(number, probabilities, labels, weights) -> CalibrationBins:
    dtype = numerics.compute_dtype(probabilities)
    classes = probabilities.shape[-1]
    confidence = jnp.max(probabilities, -1).astype(dtype).reshape(-1)
    best = jnp.argmax(probabilities, -1)
    valid = (labels >= 0) & (labels < classes)
    correct = (best == jnp.where(valid, labels, 0).astype(best.dtype)).astype(dtype)
    correct = numerics.nan_where(~valid, correct).reshape(-1)
    weight = row_weights(weights)
    weight = jnp.ones_like(confidence) if weight is None else weight.reshape(-1)
    weight = weight.astype(dtype)
    # Rounded to the dtype of the confidences, as these are.
    edges = jnp.asarray(np.arange(1, number, dtype=dtype) / np.asarray(number, dtype))
    # A search is a loop; a row belongs to the bin after all edges below it.
    place = jnp.sum(edges[:, None] < confidence[None], axis=0, dtype=jnp.int32)
    of_bin = place[None] == jnp.arange(number, dtype=jnp.int32)[:, None]

    # Sums over rows, not a scatter, whose additions are one by one.
    def sum_in_bins(values):
        values = weight * jnp.where(weight == 0, 0, values)
        return jnp.sum(jnp.where(of_bin, values[None], 0), axis=1)

    sums = (jnp.ones_like(weight), confidence, correct, correct - confidence)
    sums = [sum_in_bins(values) for values in sums]
    return CalibrationBins(*sums)


def _check_labels(labels: ArrayLike, array: jax.Array, name: str) -> jax.Array:
    """Returns labels, which must be integers, one for each row of `array`."""
    labels = checks.integer("labels", labels)
    checks.shape("labels", labels, array.shape[:-1], f"{name}.shape[:-1]")
    return labels
