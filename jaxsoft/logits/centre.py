"""Centred logits: what every function of this room starts from.

`c = (x - m) / τ`, with m the largest kept logit, so that `c <= 0` and one class has
`c = 0`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import divide_stored, inverse
from jaxsoft.logits.arguments import has_no_tangent, pick_temperature
from jaxsoft.logits.rows import in_tiles, tile_rows

__all__ = ["Centred", "centre", "mean_gap", "mean_of_kept"]

# What a CPU selects at once: a loop over more parts takes longer.
_PART = 2**20
# Memory for more numbers than this is new to a process each time that it asks for it.
_MANY = 2**23
# Up to this temperature a class so far below the peak has an exponential of 0.
_MODERATE, _FAR = 2.0**64, 2.0**100
_RAISED = 2.0**32


class Centred(NamedTuple):
    """Centred logits of each row; arrays keep the class axis, with size 1 if reduced.

    Attributes:
      values: c = (x - m) / τ in [-inf, 0]; -inf at dropped classes.
      peak: m, the largest kept logit, without a derivative: what follows from centred
        logits does not depend on what they are centred on. In a row without any kept
        class it is the lowest finite number.
      kept: which classes count: not masked, and not -inf.
      logits: x, -inf at dropped classes.
    """

    values: jax.Array
    peak: jax.Array
    kept: jax.Array
    logits: jax.Array


def centre(
    x: jax.Array,
    temperature: float | jax.Array,
    where: jax.Array | None,
    axis: int,
    *,
    finite: bool = False,
) -> Centred:
    """Centres the logits `x`, which already have the dtype to compute in.

    Derivatives ask which logits are -inf, and keep them, unless all are `finite`.
    """
    kept = x != -jnp.inf
    if where is not None:
        kept = kept & where
        x = jnp.where(where, x, -jnp.inf)
    x = x if finite else _still_below(x)
    peak = _peak(jax.lax.stop_gradient(x), axis)
    return Centred(divide_stored(x, peak, temperature), peak, kept, x)


def _peak(x: jax.Array, axis: int) -> jax.Array:
    """Returns the largest logit, at least the lowest finite number.

    The maximum starts at that number: XLA for CPUs fuses maxima with the exponentials
    and their sum, but neither with a select nor with a second maximum. XLA for TPUs
    takes twice as long for a reduction that is fused with nothing.
    """
    lowest = np.asarray(jnp.finfo(x.dtype).min, x.dtype)
    if x.shape[axis] == 1:
        # XLA leaves out where a maximum starts if there is but one number.
        return jnp.maximum(x, lowest)

    def largest(x):
        return jax.lax.reduce(x, lowest, jax.lax.max, (axis,))

    def fused(x):
        return largest(jnp.maximum(x, lowest))

    peak = jax.lax.platform_dependent(x, tpu=fused, default=largest)
    return jnp.expand_dims(peak, axis)


@jax.custom_jvp
def _still_below(x: jax.Array) -> jax.Array:
    """Returns logits of which those that are -inf do not move."""
    return x


@_still_below.defjvp
def _still_below_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], jnp.where(primals[0] == -jnp.inf, 0, tangents[0])


def _scale(peak: jax.Array) -> jax.Array:
    """Returns a power of 2 of each row with which differences stay finite."""
    return jnp.where(jnp.abs(peak) > 1, 0.25, 1.0).astype(peak.dtype)


def mean_gap(
    centred: Centred,
    temperature: float | jax.Array,
    e: jax.Array,
    total: jax.Array,
    axis: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns Σ p (x - m) s of each row, finite, and s.

    What is dropped counts as a finite number. s is 1; at temperatures that may be very
    large it is 1/4 where |m| is above 1, so that differences stay finite. XLA for CPUs
    computes them anew beside c, which it would store for a second use, and stores each
    factor of such a sum: of very many logits it is taken in parts, into memory that is
    there already.

    Args:
      centred: the logits.
      temperature: τ.
      e: exp(c), of their shape.
      total: their sums over classes, 1 where there is no class.
      axis: the class axis, which the results keep.
    """
    moderate = isinstance(temperature, float) and temperature <= _MODERATE
    if moderate:
        scale = jnp.ones_like(total)
        # To XLA it is not the number that c is made of: that it would store for all.
        peak = jnp.minimum(centred.peak, jnp.finfo(e.dtype).max)
        sums, arrays = _gaps, (e, centred.logits, peak)
    else:
        scale = _scale(centred.peak)
        peak = centred.peak * scale
        sums, arrays = _scaled_gaps, (e, centred.logits, peak, 1 / total, scale)

    def in_parts(arrays):
        rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), arrays)
        of_rows = functools.partial(sums, 1)
        return in_tiles(of_rows, rows, total.size, tile_rows(e.shape[axis])).reshape(
            total.shape
        )

    at_once = functools.partial(sums, axis)
    if axis != e.ndim - 1 or e.size <= _MANY or mesh_axes.may_be_shared(e):
        gap = at_once(arrays)
    else:
        gap = jax.lax.platform_dependent(arrays, cpu=in_parts, default=at_once)
    return (gap / total if moderate else gap), scale


def _gaps(axis, arrays):
    """Returns Σ exp(c) (x - m)."""
    e, logits, peak = arrays
    return jnp.sum(e * jnp.maximum(logits - peak, -_FAR), axis, keepdims=True)


def _scaled_gaps(axis, arrays):
    """Returns Σ p (x - m) s."""
    e, logits, peak, share, scale = arrays
    gap = jnp.maximum(logits, jnp.finfo(logits.dtype).min) * scale - peak
    return jnp.sum(e * share * gap, axis, keepdims=True)


def mean_of_kept(
    centred: Centred,
    temperature: float | jax.Array,
    where: jax.Array | None,
    axis: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of c over the kept classes of each row, and how many they are.

    The mean is 0 in a row without any, and their number at least 1.
    """
    is_static = isinstance(temperature, float)
    static_tau, tau = (temperature, None) if is_static else (None, temperature)
    return _mean(axis, static_tau, where is not None, centred.logits, centred.peak, tau)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _mean(
    axis: int,
    static_tau: float | None,
    masked: bool,
    logits: jax.Array,
    peak: jax.Array,
    tau: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns `mean_of_kept`; what is dropped is -inf, by a mask or not."""
    of_kept = functools.partial(_mean_of_kept, axis, static_tau)
    if masked:
        return of_kept(logits, peak, tau)
    of_all = functools.partial(_mean_of_all, axis, static_tau)
    return jax.lax.platform_dependent(logits, peak, tau, cpu=of_all, default=of_kept)


@functools.partial(_mean.defjvp, symbolic_zeros=True)
def _mean_jvp(axis, static_tau, masked, primals, tangents):
    """Returns the mean of (dx - c dτ) / τ: logits that are -inf do not move."""
    logits, _, tau = primals
    dx, _, dtau = tangents
    mean, number = _mean(axis, static_tau, masked, *primals)
    moved = jnp.zeros_like(mean)
    if not has_no_tangent(dx):
        moved += jnp.sum(dx, axis, keepdims=True) / number
    if not has_no_tangent(dtau):
        moved -= jnp.where(mean == -jnp.inf, 0, mean) * dtau
    moved *= inverse(pick_temperature(static_tau, tau), logits.dtype)
    return (mean, number), (moved, jnp.zeros_like(number))


def _mean_of_kept(axis, static_tau, logits, peak, tau):
    kept = logits != -jnp.inf
    number = jnp.sum(kept, axis, keepdims=True, dtype=jnp.int32)
    number = jnp.maximum(number, 1).astype(logits.dtype)
    temperature, times = _raised(pick_temperature(static_tau, tau), logits.dtype)
    c = divide_stored(logits, peak, temperature)
    mean = jnp.sum(jnp.where(kept, c, 0), axis, keepdims=True) / number
    if isinstance(times, jax.Array) or times != 1:
        # XLA would multiply by one constant for both, and overflow before it divides.
        mean = times * jax.lax.optimization_barrier(mean)
    # A temperature may vary over devices where logits do not.
    return mean, mesh_axes.like(number, mean)


def _raised(
    temperature: float | jax.Array, dtype: jnp.dtype
) -> tuple[float | jax.Array, float | jax.Array]:
    """Returns a higher temperature, where τ is very low, and how many times as high.

    There a logit over τ may overflow where the mean does not, and at the higher one
    neither it nor a sum of 2³² of them does.
    """
    least = float(jnp.finfo(dtype).tiny)
    if isinstance(temperature, float):
        times = _RAISED if least <= temperature < 1 / _RAISED else 1.0
    else:
        is_low = (temperature >= least) & (temperature < 1 / _RAISED)
        times = jnp.where(is_low, _RAISED, 1.0).astype(dtype)
    return temperature * times, times


def _mean_of_all(axis, static_tau, logits, peak, tau):
    """Returns the mean, on a CPU: nothing is selected where no class is dropped.

    XLA for CPUs stores what a select gives before it adds it, and what c is made of
    for a second use: what is added here is scaled, and c is not.
    """
    classes, scale = logits.shape[axis], _scale(peak)
    total = jnp.sum(logits * scale - peak * scale, axis, keepdims=True) / scale

    def mean():
        temperature = pick_temperature(static_tau, tau)
        mean = divide_stored(total / classes, jnp.zeros_like(total), temperature)
        return mean, mesh_axes.like(jnp.full_like(total, classes), mean)

    def of_kept():
        if axis != logits.ndim - 1 or mesh_axes.may_be_shared(logits):
            return _mean_of_kept(axis, static_tau, logits, peak, tau)

        def rows(array):
            if array is None or array.size == 1:
                return array if array is None else array.reshape(1, 1)
            return jnp.broadcast_to(array, peak.shape).reshape(-1, 1)

        arrays = logits.reshape(-1, classes), rows(peak), rows(tau)
        size = tile_rows(classes, numbers=_PART)
        parts = in_tiles(
            lambda arrays: _mean_of_kept(1, static_tau, *arrays),
            arrays,
            peak.size,
            size,
        )
        return tuple(part.reshape(peak.shape) for part in parts)

    # A minimum may leave NaN out.
    return jax.lax.cond(jnp.min(total, initial=jnp.inf) > -jnp.inf, mean, of_kept)
