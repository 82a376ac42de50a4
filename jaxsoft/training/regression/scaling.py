"""Features brought to one scale for a fit, and the scale folded back into the model.

A linear model of scaled features is a linear model of the features themselves:
W·(x − mean)/scale + b = (W/scale)·x + (b − (W/scale)·mean). So a model file needs no
scaler beside it. The folded arrays are float64 whatever the fit's dtype, as the
features' mean may be large beside their scale.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from scipy.sparse import issparse

from jaxsoft.training.regression.tables import Table

if TYPE_CHECKING:
    from jaxsoft.training.regression.estimator import SoftmaxRegression
    from jaxsoft.training.regression.inputs import Csr

__all__ = ["Scaling", "choose_scaling", "fold"]


class Scaling(NamedTuple):
    """What features are brought to one scale with.

    Attributes:
      kind: "columns", "image" or "none".
      mean: [d] float64, subtracted first; 0 for sparse features and images.
      scale: [d] float64, divided by.
    """

    kind: str
    mean: np.ndarray
    scale: np.ndarray

    def apply(self, features: "np.ndarray | Csr", dtype: DTypeLike) -> "Csr":
        """Returns scaled features in a dtype, infinite where it cannot hold them.

        They are computed in float64.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            if self.kind == "none":
                return features.astype(dtype)
            if isinstance(features, np.ndarray):
                return ((features - self.mean) / self.scale).astype(dtype)
            return features.multiply(1 / self.scale).tocsr().astype(dtype)


def choose_scaling(table: Table, rows: np.ndarray, standardize: bool | None) -> Scaling:
    """Measures the scale of a table.

    Args:
      table: the table.
      rows: indices of the rows to train on.
      standardize: true: each column gets mean 0 and standard deviation 1 (sparse
        features keep their mean, and so their zeros). False: features stay as they
        are. None: dense columns are standardised, images are divided by their
        largest value, sparse features stay as they are.

    Returns:
      The scaling. Columns that do not vary are only centred.
    """
    from sklearn.preprocessing import StandardScaler

    count = table.features.shape[1]
    sparse = issparse(table.features)
    nothing = Scaling("none", np.zeros(count), np.ones(count))
    if standardize is None and table.image_shape is not None and not sparse:
        largest = float(np.abs(table.features[rows]).max())
        return nothing._replace(kind="image", scale=np.full(count, largest or 1.0))
    if standardize is False or (standardize is None and sparse):
        return nothing
    scaler = StandardScaler(with_mean=not sparse)
    # What overflows here is too large for the fit, which says where it is.
    with np.errstate(over="ignore", invalid="ignore"):
        scaler.fit(table.features[rows].astype(np.float64))
    scale: Any = scaler.scale_
    mean: Any = np.zeros(count) if sparse else scaler.mean_
    return Scaling("columns", mean, scale)


def fold(estimator: "SoftmaxRegression", scaling: Scaling) -> None:
    """Turns an estimator of scaled features into one of the features themselves.

    Args:
      estimator: a fitted linear estimator; its `coef_` and `intercept_` are replaced
        by float64 arrays.
      scaling: what it was fitted with.
    """
    if scaling.kind == "none":
        return
    coef = np.asarray(estimator.coef_, np.float64) / scaling.scale
    intercept = np.asarray(estimator.intercept_, np.float64)
    estimator.coef_ = coef
    estimator.intercept_ = intercept - coef @ scaling.mean
