"""Features of one scale for solvers, and the classifier of the features as given.

W x + b = (W s) (x - m) / s + (b + W m): a linear classifier of the features as given is
one of features of mean 0 and spread 1, in which rounding does not see how large their
mean is, nor in which unit they are measured. The penalty stays that of W: in the new
coefficients W s each column has a strength of its own, λ / s². Where there is no
intercept, nor for sparse features, the mean stays.

All of it is float64. The mean is taken of differences to the first row, and need not be
exact: any m gives an equivalent problem, so long as the same m is undone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jaxsoft.training.regression.inputs import Csr
from jaxsoft.training.regression.objective import Parameters

__all__ = ["Standardisation", "standardisation"]

# Bytes of float64 rows that exist at a time.
_BLOCK_BYTES = 2**20
# Powers of 2 beyond which a column's unit, or its inverse, is no float64.
_LARGEST_EXPONENT = 1000
# Powers of 2 up to which squares of a column are far from over- and underflow.
_PLAIN_EXPONENT = 300
# Share of a moment about another point than the mean below which the moment about the
# mean, a difference, has lost digits.
_CANCELLED = 1e-4
# The largest ratio of a penalty's scale to a column's: its square is a float64.
_LARGEST_RATIO = 1e150
# Penalties of a column that are larger leave 0 of its coefficient as well: gradients of
# features of one scale are at most about 1.
_LARGEST_PENALTY = 1e6
# Rounding of logits by so much is told of: it moves the objective by its square.
_LOGIT_ROUNDING = 1e-3


class Standardisation(NamedTuple):
    """What features are brought to one scale with: x is (x / unit - mean) / scale.

    Attributes:
      unit: [d] powers of 2 in which no square of a column over- or underflows.
      mean: [d] in units; 0 where the mean stays.
      scale: [d] in units, positive.
    """

    unit: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def apply(
        self, features: np.ndarray, used: np.ndarray, dtype: DTypeLike, count: int
    ) -> np.ndarray:
        """Returns dense features of one scale.

        Args:
          features: [n, d].
          used: [n] whether a row has weight; others become 0.
          dtype: of the result.
          count: number of rows, of which those from n on are 0.
        """
        made = np.zeros((count, features.shape[1]), dtype)
        for rows, block in _blocks(features, self.unit, used):
            block -= self.mean
            block /= self.scale
            if len(block) == rows.stop - rows.start:
                made[rows] = block
            else:
                made[rows][used[rows]] = block
        return made

    def apply_sparse(self, features: Csr, dtype: DTypeLike) -> Csr:
        """Returns sparse features of one scale, whose mean stays."""
        units = features.astype(np.float64).multiply(1 / self.unit).tocsr()
        return units.multiply(1 / self.scale).tocsr().astype(dtype)

    def strengths(self, strength: float) -> np.ndarray:
        """Returns [d] the strengths that a penalty of squares has for each column."""
        ratio = np.sqrt(strength) / self._spread()
        return np.square(np.minimum(ratio, np.sqrt(_LARGEST_PENALTY)))

    def thresholds(self, sparsity: float) -> np.ndarray:
        """Returns [d] the strengths that a penalty of absolute values has."""
        return np.minimum(sparsity / self._spread(), _LARGEST_PENALTY)

    def of_given(self, parameters: Parameters) -> Parameters:
        """Returns the classifier of scaled features of one of the features as given."""
        kernel, bias = (_wide(each) for each in parameters)
        with np.errstate(over="ignore", invalid="ignore"):
            kernel = kernel * self.unit
            if bias is not None:
                bias = bias + kernel @ self.mean
            return Parameters(kernel * self.scale, bias)

    def to_given(self, parameters: Parameters) -> Parameters:
        """Returns the classifier of the features as given, float64."""
        kernel, bias = (_wide(each) for each in parameters)
        kernel = kernel / self.scale / self.unit
        if bias is not None:
            # By the kernel as it was rounded: what it lost is made up for here.
            moved = (kernel * self.unit).astype(np.longdouble) @ self.mean
            bias = (bias - moved).astype(np.float64)
        return Parameters(kernel, bias)

    def rounding(self, kernel: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """Returns [d] by how much rounding of a column's mean moves the logits.

        Args:
          kernel: [R, d] of the features as given.
          dtype: that coefficients and features are in.
        """
        moved = np.abs(kernel * self.unit * self.mean).max(0)
        return 0.5 * float(np.finfo(dtype).eps) * moved

    def rounds(self, kernel: np.ndarray, dtype: DTypeLike) -> bool:
        """Says whether logits in a dtype are too coarse to tell the objective."""
        return bool(self.rounding(kernel, dtype).sum() > _LOGIT_ROUNDING)

    def _spread(self) -> np.ndarray:
        return np.maximum(self.scale * self.unit, 1e-150)


def standardisation(
    features: np.ndarray | Csr, weights: np.ndarray, damping: float, *, centre: bool
) -> Standardisation:
    """Measures features.

    Args:
      features: [n, d] NumPy array, or SciPy's CSR.
      weights: [n] of the rows; those of weight 0 do not count.
      damping: the penalty's strength as a second moment, which scales have in them:
        where it is much the larger, a column's scale is that of its penalty.
      centre: whether the mean is subtracted; of dense features only.

    Returns:
      The mean and the scale of each column.
    """
    shares = weights / weights.sum()
    if not isinstance(features, np.ndarray):
        top = np.asarray(abs(features).max(0).toarray().reshape(-1), np.float64)
        unit = _units(top)
        squares = features.astype(np.float64).multiply(1 / unit).tocsr().power(2)
        moment = np.asarray(shares @ squares)
        return Standardisation(unit, np.zeros(len(unit)), _scale(moment, unit, damping))
    used = shares > 0
    counted = features if used.all() else features[used]
    top = np.maximum(counted.max(0), -counted.min(0)).astype(np.float64)
    unit = _units(top)
    mean = np.zeros(features.shape[1])
    if centre:
        # Differences to a row are exact where rows differ little.
        mean = features[np.flatnonzero(used)[0]].astype(np.float64) / unit
    first, moment = _moments(features, shares, unit, mean)
    if centre:
        mean = mean + first
        spread = moment - np.square(first)
        if np.any(spread < _CANCELLED * moment):
            _, spread = _moments(features, shares, unit, mean)
        moment = spread
    return Standardisation(unit, mean, _scale(moment, unit, damping))


def _moments(
    features: np.ndarray, shares: np.ndarray, unit: np.ndarray, about: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns [d] means of the features less `about`, in units, and of its squares."""
    first, second = np.zeros(len(unit)), np.zeros(len(unit))
    used = shares > 0
    for rows, block in _blocks(features, unit, used):
        block -= about
        first += shares[rows][used[rows]] @ block
        np.square(block, out=block)
        second += shares[rows][used[rows]] @ block
    return first, second


def _blocks(
    features: np.ndarray, unit: np.ndarray, used: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields places of rows, and those of them that are used, in units, float64."""
    step = max(1, _BLOCK_BYTES // (8 * max(1, features.shape[1])))
    plain, whole = np.all(unit == 1), np.all(used)
    for start in range(0, len(features), step):
        rows = slice(start, min(start + step, len(features)))
        block = features[rows]
        block = (block if whole else block[used[rows]]).astype(np.float64)
        if not plain:
            block /= unit
        yield rows, block


def _units(top: np.ndarray) -> np.ndarray:
    """Returns powers of 2 near columns' largest entries, or 1 if squares exist."""
    exponent = np.clip(np.frexp(top)[1] - 1, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    plain = (top == 0) | (np.abs(exponent) < _PLAIN_EXPONENT)
    return np.where(plain, 1.0, np.ldexp(1.0, exponent))


def _scale(moment: np.ndarray, unit: np.ndarray, damping: float) -> np.ndarray:
    """Returns columns' scales in units, 1 for one that neither varies nor is damped."""
    extra = np.minimum(np.sqrt(damping) / unit, _LARGEST_RATIO) ** 2
    scale = np.sqrt(moment + extra)
    return np.where(scale > 0, scale, 1.0)


def _wide(array: Any) -> Any:
    """Returns an array, which may be None, as float64."""
    return None if array is None else np.asarray(array, np.float64)
