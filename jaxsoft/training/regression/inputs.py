"""From scikit-learn's arguments to rows, classes and weights."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.sparse
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    column_or_1d,
    validate_data,
)

from jaxsoft.training.regression.sources import RowSource


class SourceFeatures:
    """Features that stay on disk, with the shape and dtype of an array's; a source."""

    def __init__(self, source: RowSource, dtype: np.dtype):
        """Keeps the source.

        Args:
          source: the rows.
          dtype: that they are computed with.
        """
        self.num_features, self.dtype = source.num_features, dtype
        self.shape = (len(source), source.num_features)
        self._source = source

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def read(self, rows: np.ndarray, dtype: Any) -> np.ndarray:
        """Reads some rows; see `RowSource.read`."""
        return self._source.read(rows, dtype)


@dataclass(frozen=True)
class Rows:
    """What a classifier is fitted to, on the host.

    Attributes:
      features: [n, d] floating NumPy array or scipy's CSR.
      classes: [V] the class labels, sorted.
      labels: [n] int32 in [0, V), or None.
      targets: [n, V] distributions over the classes, or None.
      weights: [n] weights of the rows, not negative, of a positive sum.
    """

    features: Any
    classes: np.ndarray
    labels: np.ndarray | None
    targets: np.ndarray | None
    weights: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """Dtype of features and arithmetic."""
        return self.features.dtype

    def astype(self, dtype: np.dtype) -> "Rows":
        """Returns the rows with features and targets of a dtype."""
        return dataclasses.replace(
            self,
            features=self.features.astype(dtype, copy=False),
            targets=None if self.targets is None else self.targets.astype(dtype),
        )

    def take(self, index: np.ndarray) -> "Rows":
        """Returns some of the rows."""
        return dataclasses.replace(
            self,
            features=self.features[index],
            labels=None if self.labels is None else self.labels[index],
            targets=None if self.targets is None else self.targets[index],
            weights=self.weights[index],
        )

    def prior(self) -> np.ndarray:
        """Returns [V] shares of the classes, by weight."""
        count = len(self.classes)
        if self.targets is not None:
            mass = self.weights @ self.targets.astype(np.float64)
        else:
            assert self.labels is not None
            mass = np.bincount(self.labels, self.weights, minlength=count)
        return mass / mass.sum()


def read_features(estimator: Any, features: Any, *, reset: bool) -> Any:
    """Returns the features as [n, d] NumPy or CSR, checked by scikit-learn.

    Args:
      estimator: whose `n_features_in_` and `feature_names_in_` are set or compared.
      features: what the caller gave: dense or sparse, NumPy, JAX or pandas.
      reset: whether this is a fit.
    """
    return validate_data(
        estimator, _host(features), reset=reset, **_conversion(estimator.dtype)
    )


def read_rows(
    estimator: Any,
    features: Any,
    labels: Any,
    sample_weight: Any,
    targets: Any,
    *,
    classes: np.ndarray | None = None,
    reset: bool = True,
) -> Rows:
    """Reads the arguments of a fit.

    Args:
      estimator: the estimator, of which `class_weight` and `dtype` count.
      features: [n, d].
      labels: [n] class labels, or None where there are `targets`.
      sample_weight: [n], a number, or None.
      targets: [n, V], or None.
      classes: [V] the classes of a fit that goes on; None reads them from `labels`.
      reset: whether this is the first look at features.

    Raises:
      ValueError: as scikit-learn's own checks; or there is one class only, a weight is
        negative or all are 0, or `targets` are no distributions over the classes.
    """
    if labels is None and targets is None:
        raise ValueError(
            "`y` must be given where there are no `targets`: "
            f"{type(estimator).__name__} requires y to be passed, but the target y is "
            "None."
        )
    if labels is None:
        features = read_features(estimator, features, reset=reset)
    else:
        features, labels = validate_data(
            estimator,
            _host(features),
            _host(labels),
            reset=reset,
            **_conversion(estimator.dtype),
        )
        check_classification_targets(labels)
    weights = _check_sample_weight(
        _host(sample_weight), features, dtype=np.float64, ensure_non_negative=True
    )
    return _with_weights(estimator, features, labels, targets, weights, classes)


def _with_weights(
    estimator: Any,
    features: Any,
    labels: Any,
    targets: Any,
    weights: np.ndarray,
    classes: np.ndarray | None,
) -> Rows:
    """Returns the rows, with the weights of the classes in their weights."""
    classes, encoded = _encode(labels, targets, classes)
    targets = _check_targets(targets, features, len(classes))
    if estimator.class_weight is not None:
        weights = weights * _class_weights(estimator, classes, encoded, weights)
    if not weights.sum() > 0:
        raise ValueError(
            "`sample_weight` must have a positive sum, got weights that are all 0."
        )
    return Rows(features, classes, encoded, targets, weights)


def _class_weights(
    estimator: Any, classes: np.ndarray, encoded: np.ndarray | None, weights: np.ndarray
) -> np.ndarray:
    """Returns the weight of each row's class."""
    if encoded is None:
        raise ValueError(
            "`class_weight` must be None where there is no `y`, got "
            f"{estimator.class_weight!r}."
        )
    if not isinstance(estimator.class_weight, str):
        by_class = compute_class_weight(
            estimator.class_weight, classes=classes, y=classes[encoded]
        )
        return by_class[encoded]
    if estimator.class_weight != "balanced":
        raise ValueError(
            '`class_weight` must be None, a dict or "balanced", got '
            f"{estimator.class_weight!r}."
        )
    mass = np.bincount(encoded, weights, minlength=len(classes))
    # A class without weight has no row that counts.
    return (weights.sum() / (len(classes) * np.where(mass > 0, mass, 1)))[encoded]


def read_source_rows(
    estimator: Any, source: RowSource, labels: Any, sample_weight: Any, targets: Any
) -> Rows:
    """Reads the arguments of a fit whose features stay on disk.

    Args:
      estimator: whose `n_features_in_` is set.
      source: n rows, which are not looked at.
      labels: [n], or None where there are `targets`.
      sample_weight: [n], or None.
      targets: [n, V], or None.

    Raises:
      ValueError: as in `read_rows`.
    """
    count = len(source)
    kept = getattr(source, "dtype", None) == np.float64
    default = np.float64 if kept else np.float32
    shape_only = SourceFeatures(source, np.dtype(estimator.dtype or default))
    if labels is None and targets is None:
        raise ValueError("`y` must be given where there are no `targets`, got None.")
    if labels is not None:
        labels = column_or_1d(_host(labels))
        if len(labels) != count:
            raise ValueError(f"`y` must have {count} labels, got {len(labels)}.")
        check_classification_targets(labels)
    weights = np.ones(count)
    if sample_weight is not None:
        weights = np.broadcast_to(np.asarray(sample_weight, np.float64), count)
        if not (np.isfinite(weights).all() and weights.min() >= 0):
            raise ValueError("`sample_weight` must be finite and not negative.")
    estimator.n_features_in_ = source.num_features
    return _with_weights(estimator, shape_only, labels, targets, weights, None)


def _host(value: Any) -> Any:
    """Returns a JAX array as NumPy's; anything else as it is."""
    return np.asarray(value) if isinstance(value, jax.Array) else value


def _conversion(dtype: Any) -> dict[str, Any]:
    """Returns options of scikit-learn's checks of features."""
    accepted = [np.float64, np.float32] if dtype is None else np.dtype(dtype)
    return {
        "accept_sparse": "csr",
        "dtype": accepted,
        "order": "C",
    }


def _encode(
    labels: Any, targets: Any, classes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the classes, and [n] their indices of the labels."""
    if labels is None:
        count = np.shape(targets)[-1] if classes is None else len(classes)
        return (np.arange(count) if classes is None else classes), None
    found, encoded = np.unique(labels, return_inverse=True)
    if classes is not None:
        unknown = np.setdiff1d(found, classes)
        if len(unknown):
            raise ValueError(
                "`y` must have only the classes of the first fit, got "
                f"{unknown[:1].tolist()[0]!r}."
            )
        return classes, np.searchsorted(classes, labels).astype(np.int32)
    if len(found) < 2:
        raise ValueError(
            "`y` must have at least 2 classes, got only one class: "
            f"{found[:1].tolist()[0]!r}."
        )
    return found, encoded.astype(np.int32)


def _check_targets(targets: Any, features: Any, count: int) -> np.ndarray | None:
    """Returns the targets as an array of the features' dtype."""
    if targets is None:
        return None
    array = np.asarray(_host(targets))
    if array.shape != (features.shape[0], count):
        raise ValueError(
            "`targets` must have a row for each of X and a column for each class, "
            f"{(features.shape[0], count)}, got {array.shape}."
        )
    array = array.astype(features.dtype)
    if count < 2:
        raise ValueError(f"`targets` must have at least 2 classes, got {count}.")
    sums = array.sum(1, dtype=np.float64)
    if not (array.min() >= 0 and np.abs(sums - 1).max() <= 1e-3):
        raise ValueError(
            "`targets` must be probabilities: not negative, of sum 1 in each row, got "
            f"a least entry of {array.min()} and sums in "
            f"[{sums.min():.6g}, {sums.max():.6g}]."
        )
    return array


def is_sparse(features: Any) -> bool:
    """Says whether features are scipy's."""
    return scipy.sparse.issparse(features)
