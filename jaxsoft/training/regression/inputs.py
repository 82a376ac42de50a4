"""From scikit-learn's arguments to rows, classes and weights."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from scipy.sparse import issparse, sparray, spmatrix
from sklearn.base import BaseEstimator
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    column_or_1d,
    validate_data,
)

from jaxsoft.training.regression.sources import RowSource, check_matrix

__all__ = [
    "ClassWeight",
    "Columns",
    "Csr",
    "Features",
    "Matrix",
    "Rows",
    "SourceFeatures",
    "checked",
    "encode_labels",
    "is_sparse",
    "rows_in_memory",
    "rows_on_disk",
]

# A dictionary by class, which is anything that is hashable, or "balanced".
ClassWeight: TypeAlias = Mapping[Any, float] | str | None
# What a caller may give as features.
Features: TypeAlias = ArrayLike | jax.Array | sparray | spmatrix | RowSource
# SciPy's compressed sparse rows, an array or a matrix, which SciPy does not type.
Csr: TypeAlias = Any
# scikit-learn's own annotations have its default values' types.
_validate: Callable[..., Any] = validate_data
_labels_of: Callable[..., np.ndarray] = column_or_1d
# Labels that are Python's objects at a time, where an array has texts of one width.
_LABELS_AT_A_TIME = 2**16


class SourceFeatures:
    """Features that stay on disk, with the shape and dtype of an array's; a source.

    Attributes:
      source: the rows.
      num_features: d.
      dtype: that they are computed with.
      shape: [n, d].
    """

    def __init__(self, source: RowSource, dtype: np.dtype):
        """Keeps the source.

        Args:
          source: the rows.
          dtype: that they are computed with.
        """
        self.num_features, self.dtype = source.num_features, dtype
        self.shape = (len(source), source.num_features)
        self.source = source

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def read(self, rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """Reads some rows; see `RowSource.read`."""
        return self.source.read(rows, dtype)


class Columns(NamedTuple):
    """Some columns of a wider matrix, the others of which are empty.

    Attributes:
      index: [d] their places, ascending.
      width: columns of the matrix.
    """

    index: np.ndarray
    width: int

    def spread(self, coef: np.ndarray) -> np.ndarray:
        """Returns [V, width] coefficients of [V, d]: those of empty columns are 0."""
        wide = np.zeros((len(coef), self.width), coef.dtype)
        wide[:, self.index] = coef
        return wide


Matrix: TypeAlias = np.ndarray | Csr | SourceFeatures


@dataclass(frozen=True)
class Rows:
    """What a classifier is fitted to, on the host.

    Attributes:
      features: [n, d] floating NumPy array or scipy's CSR, or on disk.
      classes: [V] the class labels, sorted.
      labels: [n] int32 in [0, V), or None.
      targets: [n, V] distributions over the classes, or None.
      weights: [n] weights of the rows, not negative, of a positive sum.
      columns: which ones of a wider matrix's the features have; None for all.
    """

    features: Matrix
    classes: np.ndarray
    labels: np.ndarray | None
    targets: np.ndarray | None
    weights: np.ndarray
    columns: Columns | None = None

    @property
    def dtype(self) -> np.dtype:
        """Dtype of features and arithmetic."""
        return self.features.dtype

    @property
    def width(self) -> int:
        """Number of columns of what the caller gave."""
        return self.features.shape[1] if self.columns is None else self.columns.width

    def astype(self, dtype: np.dtype) -> "Rows":
        """Returns the rows with features and targets of a dtype."""
        assert not isinstance(self.features, SourceFeatures)
        return dataclasses.replace(
            self,
            features=self.features.astype(dtype, copy=False),
            targets=None if self.targets is None else self.targets.astype(dtype),
        )

    def take(self, index: np.ndarray) -> "Rows":
        """Returns some of the rows."""
        assert not isinstance(self.features, SourceFeatures)
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


def checked(
    estimator: BaseEstimator,
    features: Features,
    labels: ArrayLike | None = None,
    *,
    dtype: DTypeLike | None,
    reset: bool,
) -> tuple[np.ndarray | Csr, np.ndarray | None]:
    """Returns features as [n, d] NumPy or CSR, and labels, checked by scikit-learn.

    Args:
      estimator: whose `n_features_in_` and `feature_names_in_` are set or compared.
      features: what the caller gave: dense or sparse, NumPy, JAX or pandas.
      labels: likewise, or None.
      dtype: float32 or float64; None keeps either.
      reset: whether this is the first look at the features.
    """
    accepted = [np.float64, np.float32] if dtype is None else np.dtype(dtype)
    if issparse(features):
        check_matrix(features)
    options = {"accept_sparse": "csr", "dtype": accepted, "order": "C"}
    if labels is None:
        return _validate(estimator, _host(features), reset=reset, **options), None
    arrays = _host(features), _narrow(labels)
    return _validate(estimator, *arrays, reset=reset, **options)


def _host(value: Features | None) -> Features | None:
    """Returns a JAX array as NumPy's; anything else as it is."""
    return np.asarray(value) if isinstance(value, jax.Array) else value


def _narrow(labels: Any) -> Any:
    """Returns texts as objects where NumPy would give all the width of the longest.

    An array of a fixed width stays what the caller made it.
    """
    if isinstance(labels, list | tuple):
        # What comes after a text is a text too, or an error of `encode_labels`.
        if labels and isinstance(labels[0], str):
            narrow = np.empty(len(labels), object)
            narrow[:] = labels
            return narrow
    elif type(labels).__module__.partition(".")[0] == "polars":
        if len(labels.shape) == 1:
            return labels.to_numpy()
    elif isinstance(labels, np.ndarray) and labels.dtype.kind == "T":
        return labels.astype(object)
    return _host(labels)


def _is_text(labels: np.ndarray) -> bool:
    """Says whether labels are texts, by the first one."""
    if labels.dtype.kind != "O":
        return labels.dtype.kind in "UST"
    return len(labels) > 0 and isinstance(labels[0], str)


def encode_labels(labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns the classes, and which one each label is.

    Texts cost their own length once a class, and not the longest one's once a row, as
    in `numpy.unique` of a list.

    Args:
      labels: [n] labels: an array of any dtype, a list of texts, or a series.

    Returns:
      [V] the classes, sorted: of the array's dtype, and of a list's texts objects; and
      [n] int32 in [0, V).

    Raises:
      TypeError: the labels cannot be sorted, such as texts beside numbers.

    Example:
      >>> classes, codes = encode_labels(["dog", "ant", "dog"])
      >>> print(classes, codes)
      ['ant' 'dog'] [1 0 1]
    """
    array = np.asarray(_narrow(labels))
    if array.dtype.kind not in "OUST":
        classes, codes = np.unique(array, return_inverse=True)
        return classes, codes.astype(np.int32)
    codes, places = np.empty(len(array), np.int32), {}
    for start in range(0, len(array), _LABELS_AT_A_TIME):
        part = array[start : start + _LABELS_AT_A_TIME].tolist()
        codes[start : start + len(part)] = [
            places.setdefault(label, len(places)) for label in part
        ]
    found = list(places)
    try:
        order = sorted(range(len(found)), key=found.__getitem__)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in found})
        raise TypeError(
            f"`y` must have labels of one type, got {' and '.join(kinds)}."
        ) from None
    classes = np.empty(len(found), object)
    classes[:] = [_python(found[index]) for index in order]
    rank = np.empty(len(found), np.int32)
    rank[order] = np.arange(len(found), dtype=np.int32)
    return classes.astype(array.dtype), rank[codes]


def _python(value: Any) -> Any:
    """Returns a NumPy scalar as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def rows_in_memory(
    features: np.ndarray | Csr,
    labels: np.ndarray | None,
    sample_weight: ArrayLike | None,
    targets: ArrayLike | None,
    *,
    class_weight: ClassWeight,
    classes: np.ndarray | None = None,
) -> Rows:
    """Reads the arguments of a fit.

    Args:
      features: [n, d], checked by scikit-learn, as are the labels.
      labels: [n] class labels, or None where there are `targets`.
      sample_weight: [n], a number, or None.
      targets: [n, V], or None.
      class_weight: of the estimator.
      classes: [V] the classes of a fit that goes on; None reads them from `labels`.

    Raises:
      ValueError: as scikit-learn's own checks; or there is one class only, a weight is
        negative or all are 0, or `targets` are no distributions over the classes.
    """
    weights = _check_sample_weight(
        _host(sample_weight), features, dtype=np.float64, ensure_non_negative=True
    )
    return _with_weights(features, labels, targets, weights, class_weight, classes)


def rows_on_disk(
    source: RowSource,
    labels: ArrayLike | None,
    sample_weight: ArrayLike | None,
    targets: ArrayLike | None,
    *,
    class_weight: ClassWeight,
    dtype: DTypeLike | None,
) -> Rows:
    """Reads the arguments of a fit whose features stay on disk.

    Args:
      source: n rows, which are not looked at.
      labels: [n], or None where there are `targets`.
      sample_weight: [n], or None.
      targets: [n, V], or None.
      class_weight: of the estimator.
      dtype: of the arithmetic; None is float64 for features of it, else float32.

    Raises:
      ValueError: as in `rows_in_memory`.
    """
    count = len(source)
    kept = getattr(source, "dtype", None) == np.float64
    default = np.float64 if kept else np.float32
    features = SourceFeatures(source, np.dtype(dtype or default))
    if labels is None and targets is None:
        raise ValueError("`y` must be given where there are no `targets`, got None.")
    names = None
    if labels is not None:
        names = _labels_of(_narrow(labels))
        if len(names) != count:
            raise ValueError(f"`y` must have {count} labels, got {len(names)}.")
    weights = np.ones(count)
    if sample_weight is not None:
        weights = np.broadcast_to(np.asarray(sample_weight, np.float64), count)
        if not (np.isfinite(weights).all() and weights.min() >= 0):
            raise ValueError("`sample_weight` must be finite and not negative.")
    return _with_weights(features, names, targets, weights, class_weight, None)


def _with_weights(
    features: Matrix,
    labels: np.ndarray | None,
    targets: ArrayLike | None,
    weights: np.ndarray,
    class_weight: ClassWeight,
    classes: np.ndarray | None,
) -> Rows:
    """Returns the rows, with the weights of the classes in their weights."""
    classes, encoded = _encode(labels, targets, classes)
    distributions = _check_targets(targets, features, len(classes))
    if class_weight is not None:
        weights = weights * _class_weights(class_weight, classes, encoded, weights)
    if not weights.sum() > 0:
        raise ValueError(
            "`sample_weight` must have a positive sum, got weights that are all 0."
        )
    return Rows(features, classes, encoded, distributions, weights)


def _class_weights(
    class_weight: Mapping[Any, float] | str,
    classes: np.ndarray,
    encoded: np.ndarray | None,
    weights: np.ndarray,
) -> np.ndarray:
    """Returns the weight of each row's class."""
    if encoded is None:
        raise ValueError(
            f"`class_weight` must be None where there is no `y`, got {class_weight!r}."
        )
    if not isinstance(class_weight, str):
        return compute_class_weight(class_weight, classes=classes, y=classes)[encoded]
    if class_weight != "balanced":
        raise ValueError(
            f'`class_weight` must be None, a dict or "balanced", got {class_weight!r}.'
        )
    mass = np.bincount(encoded, weights, minlength=len(classes))
    # A class without weight has no row that counts.
    return (weights.sum() / (len(classes) * np.where(mass > 0, mass, 1)))[encoded]


def _encode(
    labels: np.ndarray | None, targets: ArrayLike | None, classes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the classes, and [n] their indices of the labels."""
    if labels is None:
        assert targets is not None
        return np.arange(np.shape(targets)[-1]) if classes is None else classes, None
    text = _is_text(labels)
    if not text:
        check_classification_targets(labels)
    present, encoded = encode_labels(labels)
    if text:
        # scikit-learn sorts what it looks at: codes, for the number of classes.
        check_classification_targets(encoded)
    if classes is not None:
        unknown = np.setdiff1d(present, classes)
        if len(unknown):
            raise ValueError(
                "`y` must have only the classes of the first fit, got "
                f"{unknown[:1].tolist()[0]!r}."
            )
        return classes, np.searchsorted(classes, present).astype(np.int32)[encoded]
    if len(present) < 2:
        raise ValueError(
            "`y` must have at least 2 classes, got only one class: "
            f"{present[:1].tolist()[0]!r}."
        )
    return present, encoded


def _check_targets(
    targets: ArrayLike | None, features: Matrix, count: int
) -> np.ndarray | None:
    """Returns the targets as an array of the features' dtype."""
    if targets is None:
        return None
    array = np.asarray(targets)
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


def is_sparse(features: Matrix) -> TypeGuard[Csr]:
    """Says whether features are SciPy's."""
    return issparse(features)
