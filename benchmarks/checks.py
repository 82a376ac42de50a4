"""Are the numbers right? Asked before any of them is timed.

The truth is NumPy in float64, from the operands as they are stored. An error is
relative to the size of the output, so that an output of zeros has an error of one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Truth = Mapping[str, NDArray[np.float64]]

# What a result may be off by at all. Off a CPU, float32 operands of a matmul are
# rounded (TF32 on a GPU, bfloat16 on a TPU).
_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
_LIMIT_ROUNDED_MATMUL = 5e-2

# What ours may be off by beyond the plain formula in the same dtype: sixteen units in
# the last place of float32 for another order of summation, half of one of the shorter
# dtypes for the rounding of an output.
_SLACK = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far one contender is from the truth.

    Attributes:
      errors: by output, relative to the largest true magnitude of that output.
      faults: what is wrong, in words; empty when nothing is.
    """

    errors: dict[str, float]
    faults: tuple[str, ...]

    @property
    def correct(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def limit(dtype: str, *, matmul: bool, platform: str) -> float:
    """The largest error that any contender may have.

    Args:
      dtype: of the inputs.
      matmul: whether the function multiplies matrices.
      platform: JAX's name of it.

    Returns:
      An error relative to the size of the output.
    """
    if matmul and platform != "cpu":
        return _LIMIT_ROUNDED_MATMUL
    return _LIMITS[dtype]


def slack(dtype: str) -> float:
    """What our error may exceed the plain formula's by."""
    return _SLACK[dtype]


def relative_error(value: Any, truth: NDArray[np.float64]) -> float:
    """The largest absolute error over the largest true magnitude.

    Args:
      value: an array of the truth's shape.
      truth: finite.

    Returns:
      The error; infinite where a value is not finite or the shape is another.
    """
    found = np.asarray(value).astype(np.float64)
    if found.shape != truth.shape or not np.isfinite(found).all():
        return math.inf
    if not truth.size:
        return 0.0
    scale = np.abs(truth).max()
    error = np.abs(found - truth).max()
    return float(error / scale) if scale else (0.0 if error == 0 else math.inf)


def judge(
    outputs: Mapping[str, Any],
    truth: Truth,
    *,
    absolute: float,
    plain: Mapping[str, float] | None = None,
    slack: float = 0.0,
) -> Verdict:
    """Compares outputs with the truth.

    Args:
      outputs: arrays, by name; at least one.
      truth: what they should be, by the same names; it may hold more.
      absolute: the largest error allowed.
      plain: errors of the plain formula in the same dtype, which `outputs` must not
        exceed; None asks for `absolute` alone.
      slack: added to each of `plain`.

    Returns:
      The errors, and which of them are too large.
    """
    errors, faults = {}, []
    for name, output in outputs.items():
        error = relative_error(output, truth[name])
        errors[name] = error
        allowed = absolute
        if plain is not None and math.isfinite(plain[name]):
            allowed = min(absolute, plain[name] + slack)
        if not error <= allowed:
            faults.append(f"{name} is off by {error:.1e}, allowed is {allowed:.1e}")
    return Verdict(errors, tuple(faults))


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which rows and classes of a large problem are compared.

    Attributes:
      rows: of the loss per token and of the gradient of `hidden` or of the logits.
      classes: of the gradient of the kernel.
    """

    rows: NDArray[np.int32]
    classes: NDArray[np.int32]

    @classmethod
    def of(cls, rows: int, classes: int, size: int = 48) -> "Subset":
        """Takes the first, the last and an even spread between them."""

        def spread(count: int) -> NDArray[np.int32]:
            evenly = np.linspace(0, count - 1, min(size, count))
            return np.unique(evenly.astype(np.int32))

        return cls(spread(rows), spread(classes))
