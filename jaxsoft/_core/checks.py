"""Checks of shapes, dtypes and values: one wording each, all at trace time.

Every message reads "`name` must <rule>, got <value>." and, where there is one, the
fix. A wrong type or dtype is a TypeError; a wrong shape, value or option is a
ValueError.
"""

import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from numpy import typing as npt

from jaxsoft._core.options import one_of

__all__ = [
    "boolean",
    "broadcasts_to",
    "class_axis",
    "concrete",
    "counts",
    "finite_temperature",
    "floating",
    "integer",
    "known",
    "one_of",
    "positive_integer",
    "python_integer",
    "row_numbers",
    "row_temperature",
    "scalar_in",
    "shape",
    "temperature",
]


def floating(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array, which must hold floating-point numbers."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must have a floating-point dtype, got {array.dtype}."
        )
    return array


def integer(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as a signed array, which must hold integers.

    Ids are compared with bounds such as V, which a narrow or an unsigned dtype may not
    hold: 256 is 0 in uint8. So they are int32 at least, and signed; unsigned numbers
    that the signed dtype does not hold become its largest, which is no class either.
    """
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "iu":
        # Without x64 JAX keeps the low 32 bits: 2**32 would be class 0.
        widest = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64).name)
        if np.iinfo(value.dtype.name).max > widest.max:
            low = 0 if value.dtype.kind == "u" else widest.min
            value = np.clip(value, low, widest.max)
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"`{name}` must have an integer dtype, got {array.dtype}.")
    if array.dtype.itemsize < 4:
        return array.astype(jnp.int32)
    if jnp.issubdtype(array.dtype, jnp.unsignedinteger):
        signed = jnp.int32 if array.dtype.itemsize == 4 else jnp.int64
        largest = jnp.asarray(jnp.iinfo(signed).max, array.dtype)
        return jnp.minimum(array, largest).astype(signed)
    return array


def boolean(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array, which must hold booleans."""
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"`{name}` must have dtype bool (True keeps), got {array.dtype}."
        )
    return array


def concrete(name: str, value: npt.ArrayLike) -> np.ndarray:
    """Returns `value` as a NumPy array, which a traced array cannot become."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"`{name}` must be known when a program is traced, got a traced array. "
            "Make it outside of jit, with NumPy, or under "
            "jax.ensure_compile_time_eval()."
        )
    return np.asarray(value)


def counts(value: npt.ArrayLike) -> np.ndarray:
    """Returns how often each class comes, [V] float64, finite and not negative."""
    weights = concrete("counts", value).astype(np.float64)
    if weights.ndim != 1 or not len(weights):
        raise ValueError(
            f"`counts` must have shape [V] with V >= 1, got {weights.shape}."
        )
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        raise ValueError(
            f"`counts` must be finite and not negative, got {weights[bad][0]}."
        )
    return weights


def shape(name: str, array: jax.Array, expected: Sequence[int], legend: str) -> None:
    """Requires `array` to have exactly the shape `expected`, named by `legend`."""
    if array.shape != tuple(expected):
        raise ValueError(
            f"`{name}` must have shape {legend} = {tuple(expected)}, got {array.shape}."
        )


def broadcasts_to(name: str, array: jax.Array, target: Sequence[int]) -> None:
    """Requires `array` to broadcast to the shape `target` without enlarging it."""
    target = tuple(target)
    padded = (1,) * (len(target) - array.ndim) + array.shape
    if array.ndim > len(target) or any(
        a not in (1, t) for a, t in zip(padded, target, strict=True)
    ):
        raise ValueError(f"`{name}` must broadcast to {target}, got {array.shape}.")


def class_axis(axis: int, array: jax.Array, name: str = "logits") -> int:
    """Returns the non-negative class axis of `array`, which must have a class."""
    if not isinstance(axis, numbers.Integral):
        raise TypeError(f"`axis` must be an int, got {axis!r}.")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(
            f"`axis` must name one of the {array.ndim} axes of `{name}`, got {axis}."
        )
    axis = int(axis) % array.ndim
    if array.shape[axis] == 0:
        raise ValueError(
            f"`{name}` must have at least one class, got shape {array.shape} "
            f"with axis {axis}."
        )
    return axis


def scalar_in(name: str, value: object, low: float, high: float) -> float:
    """Returns a finite Python float, which must lie in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a Python number, got {value!r}.")
    result = float(value)
    if not (low <= result <= high and math.isfinite(result)):
        rule = (
            f"lie in [{low:g}, {high:g}]"
            if high < math.inf
            else f"be finite, >= {low:g}"
        )
        raise ValueError(f"`{name}` must {rule}, got {value!r}.")
    return result


def python_integer(name: str, value: object) -> int:
    """Returns a Python int, made of one or of a NumPy integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    return int(value)


def positive_integer(name: str, value: object) -> int:
    """Returns a Python int, which must be positive."""
    result = python_integer(name, value)
    if result < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return result


def temperature(
    value: ArrayLike, dtype: jnp.dtype, prefix: str = ""
) -> float | jax.Array:
    """Returns a temperature as a Python float or an array of `dtype`.

    A Python or NumPy scalar stays a Python float, so that the trivial temperature 1
    costs nothing. Wherever the values are known, they must not be negative or NaN;
    a traced array is checked by the arithmetic, which turns such values into NaN.
    Messages name it with a prefix.
    """
    name = f"{prefix}temperature"
    if isinstance(value, bool) or not (
        isinstance(value, numbers.Real) or hasattr(value, "dtype")
    ):
        raise TypeError(
            f"`{name}` must be a real number or a floating-point array, got {value!r}."
        )
    if isinstance(value, numbers.Real):
        number = float(value)
        _not_negative(name, number)
        return number
    array = floating(name, value)
    # While JAX traces a function, an array of known numbers is a tracer too.
    _not_negative(name, value)
    return array.astype(dtype)


def row_temperature(
    value: ArrayLike,
    dtype: jnp.dtype,
    rows: tuple[int, ...],
    legend: str = "hidden.shape[:-1]",
) -> float | jax.Array:
    """Returns a temperature of all rows, a float or a scalar array, or one of each.

    Args:
      value: a scalar, `rows`, or what broadcasts to `(*rows, 1)` as it would against
        stored logits.
      dtype: of the result, where it is an array.
      rows: the shape of the rows.
      legend: what `rows` is, for messages.
    """
    tau = temperature(value, dtype)
    if not isinstance(tau, jax.Array):
        return tau
    return row_numbers("temperature", tau, rows, legend)


def row_numbers(
    name: str,
    array: jax.Array,
    rows: tuple[int, ...],
    legend: str = "hidden.shape[:-1]",
) -> jax.Array:
    """Returns a scalar array, or one of each row; see `row_temperature`."""
    if array.ndim == 0 or array.shape == rows:
        return array
    try:
        broadcasts_to(name, array, (*rows, 1))
    except ValueError:
        raise ValueError(
            f"`{name}` must have shape (), {legend} = {rows} or (*{legend}, 1), "
            f"got {array.shape}."
        ) from None
    return jnp.broadcast_to(array, (*rows, 1))[..., 0]


def finite_temperature(value: ArrayLike) -> None:
    """Requires a temperature to be finite wherever its values are known."""
    dtype = getattr(value, "dtype", None)
    is_array = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not (isinstance(value, numbers.Real) or is_array):
        return  # what is no temperature at all is refused by `temperature`
    values = known(value)
    if values is not None and np.isposinf(values.astype(np.float64)).any():
        raise ValueError(
            "`temperature` must be finite, got inf: there log-probabilities say "
            "nothing. From the logits of both layers the loss has a limit."
        )


def known(value: ArrayLike) -> np.ndarray | None:
    """Returns the values of a number or an array; None where they are not known."""
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def _not_negative(name: str, value: ArrayLike) -> None:
    values = known(value)
    if values is None:
        return
    bad = ~(values >= 0)
    if bad.any():
        raise ValueError(
            f"`{name}` must not be negative or NaN, got {values[bad].flat[0]}."
        )
