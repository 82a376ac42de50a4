"""Arithmetic that all rooms share: its dtypes, division by a temperature, products.

Differences are centred before they are divided by a temperature, here and nowhere else.
Centring first keeps every probability finite at any finite logits and temperature;
dividing first does not (the quotient overflows, or two fusions round it differently).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxsoft._core.exporting import Leaf

__all__ = [
    "Temperature",
    "block_maxima",
    "compute_dtype",
    "divide_by_temperature",
    "divide_stored",
    "finite",
    "finite_peak",
    "inverse",
    "is_ordinary",
    "is_zero",
    "largest_finite",
    "matmul",
    "maximum_or_nan",
    "nan_where",
    "operand_dtype",
    "over_temperature",
    "round_up",
    "scaled",
    "times",
]


def compute_dtype(*arrays: Leaf) -> jnp.dtype:
    """Returns the dtype of statistics: float64 if any input is, else float32."""
    if any(a.dtype == jnp.float64 for a in arrays):
        return jnp.dtype(jnp.float64)
    return jnp.dtype(jnp.float32)


def operand_dtype(a: jax.Array, b: jax.Array) -> jnp.dtype:
    """Returns the dtype in which two arrays are multiplied: theirs, or one wider.

    Unlike `jnp.promote_types` it does not depend on JAX's promotion mode.
    """
    return a.dtype if a.dtype == b.dtype else compute_dtype(a, b)


def block_maxima(x: jax.Array, block: int) -> jax.Array:
    """Returns the largest of each block of columns, [R, n]; the last may be shorter."""
    rows, columns = x.shape
    if block == 1:
        return x
    full = columns // block * block
    largest = jnp.max(x[:, :full].reshape(rows, -1, block), axis=2)
    if full == columns:
        return largest
    last = jnp.max(x[:, full:], axis=1, keepdims=True)
    return jnp.concatenate([largest, last], axis=1)


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple


class Temperature(NamedTuple):
    """A temperature, prepared for division; every field broadcasts over classes.

    Attributes:
      value: τ, with a negative τ replaced by NaN.
      is_zero: whether τ counts as 0: it is smaller than the smallest normal number.
      scale: 1/4 where τ > 1, else 1. Scaling both sides of a difference keeps it
        finite up to the dtype's largest number, and keeps 1 / (τ·scale) normal. At
        τ = ∞ it is the smallest normal number.
      divisor: τ·scale, with 1 in place of a zero, and at τ = ∞ the inverse of the
        scale: any difference but -inf, scaled and divided, vanishes there beside 1.
    """

    value: jax.Array
    is_zero: jax.Array
    scale: jax.Array
    divisor: jax.Array

    @classmethod
    def prepare(cls, value: float | jax.Array, dtype: jnp.dtype) -> "Temperature":
        """Prepares a Python float or an array."""
        value = jnp.asarray(value, dtype)
        value = nan_where(value < 0, value)
        is_zero = value < jnp.finfo(dtype).tiny
        info = jnp.finfo(dtype)
        scale = jnp.where(value > 1, 0.25, 1.0).astype(dtype)
        divisor = jnp.where(is_zero, 1, value * scale)
        is_infinite = value == jnp.inf
        scale = jnp.where(is_infinite, info.tiny, scale)
        divisor = jnp.where(is_infinite, 1 / info.tiny, divisor)
        return cls(value, is_zero, scale, divisor)


def divide_by_temperature(
    x: jax.Array, peak: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """Returns (x - peak) / τ for x <= peak, with its limits at τ = 0 and τ = ∞.

    The peak is finite, and -inf stays -inf at every temperature. At τ = 0 the quotient
    is 0 where x equals the peak and -inf below it.
    """
    if isinstance(temperature, float) and is_ordinary(temperature, x.dtype):
        return _divided(x, peak, temperature)
    tau = Temperature.prepare(temperature, x.dtype)
    lowest = x == -jnp.inf
    dropped = lowest | (tau.is_zero & (x < peak))
    x = jnp.where(lowest, peak, x)
    quotient = (x * tau.scale - peak * tau.scale) / tau.divisor
    return jnp.where(dropped, -jnp.inf, quotient)


def divide_stored(
    x: jax.Array, peak: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """Returns what `divide_by_temperature` does, by a rule for its derivative.

    XLA for CPUs stores what a select gives: without those that keep -inf from JAX's own
    derivative, stored logits are read once less. Pallas does not take such a rule.
    """
    if isinstance(temperature, float) and is_ordinary(temperature, x.dtype):
        return _divided(x, peak, temperature)
    return _quotient(x, peak, jnp.asarray(temperature, x.dtype))


def _divided(x: jax.Array, peak: jax.Array, temperature: float) -> jax.Array:
    if temperature == 1.0:
        return x - peak
    if temperature < 1.0:
        return (x - peak) / temperature
    return (x * 0.25 - peak * 0.25) / (temperature * 0.25)


@jax.custom_jvp
def _quotient(x: jax.Array, peak: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns (x - peak) / τ at any temperature."""
    tau = Temperature.prepare(temperature, x.dtype)
    # One comparison a class: what is decided for a row is decided before.
    dropped = x < jnp.where(tau.is_zero, peak, -jnp.inf)
    quotient = (x * tau.scale - peak * tau.scale) / tau.divisor
    return jnp.where(dropped, -jnp.inf, quotient)


@functools.partial(_quotient.defjvp, symbolic_zeros=True)
def _quotient_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, ...],
) -> tuple[jax.Array, jax.Array]:
    """Returns c and (dx - dpeak - c dτ) / τ, without dτ where c is -inf."""
    x, _, temperature = primals
    c = _quotient(*primals)
    dx, dpeak, dtau = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    moved = jnp.zeros_like(c)
    if dx is not None:
        moved += dx
    if dpeak is not None:
        moved -= dpeak
    if dtau is not None:
        moved -= jnp.where(c == -jnp.inf, 0, c) * dtau
    return c, moved * inverse(temperature, x.dtype)


def is_ordinary(temperature: float, dtype: DTypeLike = jnp.float32) -> bool:
    """Tells whether a static temperature only divides: it is no limit and no NaN."""
    info = jnp.finfo(dtype)
    return float(info.tiny) <= temperature <= float(info.max)


def is_zero(temperature: float | jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Tells where a temperature counts as 0; a negative one, which is NaN, does not."""
    return Temperature.prepare(temperature, dtype).is_zero


def largest_finite(temperature: float | jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns τ, the largest finite number at τ = ∞."""
    return jnp.minimum(
        Temperature.prepare(temperature, dtype).value, jnp.finfo(dtype).max
    )


def inverse(temperature: float | jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns 1/τ for derivatives, which vanish at both limits: 0 at τ = 0 and ∞."""
    tau = Temperature.prepare(temperature, dtype)
    limit = tau.is_zero | jnp.isinf(tau.value)
    return jnp.where(limit, 0, 1 / jnp.where(limit, 1, tau.value))


def over_temperature(x: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Returns x / τ with x / ∞ = 0, ±inf for τ = 0, and 0 / 0 = 0."""
    if isinstance(temperature, float) and temperature == 1.0:
        return x
    tau = Temperature.prepare(temperature, x.dtype)
    limit = jnp.where(x == 0, 0, jnp.copysign(jnp.inf, x))
    divisor = tau.divisor
    if isinstance(temperature, float) and temperature * jnp.finfo(x.dtype).tiny > 1:
        # XLA would multiply by one constant, 1/τ, which is subnormal and counts as 0.
        divisor = jnp.where(x == 0, 1, divisor)
    quotient = jnp.where(tau.value == jnp.inf, x * 0, x * tau.scale / divisor)
    return jnp.where(tau.is_zero, limit, quotient)


def times(probabilities: jax.Array, values: jax.Array) -> jax.Array:
    """Returns p·c with 0·(-inf) = 0."""
    return probabilities * jnp.where(probabilities == 0, 0, values)


def scaled(factor: float, values: jax.Array) -> jax.Array:
    """Returns a Python number times values, with 0·(-inf) = 0; NaN stays NaN."""
    if factor == 0:
        return jnp.where(jnp.isnan(values), values, 0)
    return values if factor == 1 else factor * values


def nan_where(bad: jax.Array, values: jax.Array) -> jax.Array:
    """Returns values, NaN where they are bad.

    Where operations run one by one, `jax.debug_nans` refuses a NaN that is not chosen,
    as that of `jnp.where`.
    """
    is_known = not isinstance(bad, Tracer)
    if jax.debug_nans.value and is_known and not bad.any():
        return values
    return jnp.where(bad, jnp.nan, values)


def maximum_or_nan(values: jax.Array, axis: int) -> jax.Array:
    """Returns the largest values along an axis, NaN where one is NaN.

    XLA's own maximum on CPUs leaves NaN out in loops that it vectorises.
    """
    return nan_where(jnp.isnan(values).any(axis), jnp.max(values, axis))


def finite_peak(peak: jax.Array) -> jax.Array:
    """Returns what logits are centred on: their maximum, or 0 where that is -inf.

    All logits of a row without any kept class are -inf, and so they stay.
    """
    return jnp.where(peak == -jnp.inf, 0.0, peak)


def finite(values: jax.Array) -> jax.Array:
    """Clips ±inf to the largest finite numbers, so that 0 times it is 0."""
    bound = jnp.finfo(values.dtype).max
    return jnp.clip(values, -bound, bound)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def matmul(
    a: jax.Array, b: jax.Array, precision: jax.lax.PrecisionLike, dtype: jnp.dtype
) -> jax.Array:
    """Returns a @ b, added up and stored in a dtype that may be wider than theirs.

    JAX's own derivative multiplies cotangents of the wide dtype by narrow operands, at
    a fraction of the rate of narrow products. Here cotangents and tangents are rounded
    to the operands' dtype first, as the derivative of `linear_statistics` rounds them.

    Args:
      a: [M, K].
      b: [K, N], of the same dtype.
      precision: of the products.
      dtype: of the result.

    Returns:
      [M, N].
    """
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)


@functools.partial(matmul.defjvp, symbolic_zeros=True)
def _matmul_jvp(
    precision: jax.lax.PrecisionLike,
    dtype: jnp.dtype,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    (a, b), (of_a, of_b) = primals, tangents
    value = matmul(a, b, precision, dtype)
    # The transpose of a product takes what the product returns: the operands' dtype.
    moved = jnp.zeros(value.shape, a.dtype)
    if not isinstance(of_a, SymbolicZero):
        moved += jnp.matmul(of_a, b, precision=precision)
    if not isinstance(of_b, SymbolicZero):
        moved += jnp.matmul(a, of_b, precision=precision)
    return value, moved.astype(dtype)
