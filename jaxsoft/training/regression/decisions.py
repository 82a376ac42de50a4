"""What a fitted classifier says of rows: logits, probabilities, classes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from sklearn.utils.extmath import safe_sparse_dot

from jaxsoft.training.regression.head_predictions import log_probs, top_classes
from jaxsoft.training.regression.inputs import read_features
from jaxsoft.training.regression.sources import RowSource, as_source

# Bytes of the features, or logits, that exist at a time where neither is wanted.
_CHUNK_BYTES = 2**26


def logits(estimator: Any, features: Any) -> np.ndarray:
    """Returns the logits of rows, [n], of the second class, where there are two.

    Args:
      estimator: fitted.
      features: [n, d], as a caller gave it.
    """
    features = checked(estimator, features)
    if estimator.head != "full":
        dtype = features_dtype(estimator, features)
        with jax.enable_x64(dtype == np.float64):
            found = log_probs(estimator.head_, as_source(features), dtype=dtype)
        return found[:, 1] - found[:, 0] if found.shape[1] == 2 else found
    return linear(estimator, features)


def linear(estimator: Any, features: Any) -> np.ndarray:
    """Returns the logits of checked rows by `coef_` and `intercept_`."""
    if isinstance(features, RowSource):
        parts = [linear(estimator, part) for _, part in _chunks(estimator, features)]
        return np.concatenate(parts)
    scores = safe_sparse_dot(features, estimator.coef_.T, dense_output=True)
    scores = np.asarray(scores + estimator.intercept_, estimator.coef_.dtype)
    if scores.shape[1] == 1:
        return scores[:, 0]
    return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores


def probabilities(estimator: Any, features: Any, function: Callable) -> np.ndarray:
    """Returns `function(logits, temperature)` of rows, [n, V].

    Args:
      estimator: fitted.
      features: [n, d], as a caller gave it.
      function: `jaxsoft.softmax` or `jaxsoft.log_softmax`.
    """
    scores = logits(estimator, features)
    if scores.ndim == 1:
        scores = np.stack([np.zeros_like(scores), scores], 1)
    with jax.enable_x64(scores.dtype == np.float64):
        count = len(scores)
        # Few sizes, so that few programs are compiled.
        padded = np.pad(scores, [(0, _bucket(count) - count), (0, 0)])
        return np.array(function(padded, estimator.temperature_)[:count])


def classes(estimator: Any, features: Any) -> np.ndarray:
    """Returns [n] the most probable class of rows.

    Args:
      estimator: fitted.
      features: [n, d], as a caller gave it.
    """
    features = checked(estimator, features)
    if estimator.head != "full":
        dtype = features_dtype(estimator, features)
        with jax.enable_x64(dtype == np.float64):
            index = top_classes(estimator.head_, as_source(features), dtype=dtype)
        return estimator.classes_[index]
    count = len(features) if isinstance(features, RowSource) else features.shape[0]
    index = np.empty(count, np.intp)
    for place, part in _chunks(estimator, features):
        scores = linear(estimator, part)
        index[place] = scores > 0 if scores.ndim == 1 else scores.argmax(1)
    return estimator.classes_[index]


def _chunks(estimator: Any, features: Any) -> Iterator[tuple[slice, Any]]:
    """Yields places of rows, and the rows whose features or logits exist at a time."""
    source = isinstance(features, RowSource)
    count = len(features) if source else features.shape[0]
    dtype = estimator.coef_.dtype
    width = max(len(estimator.classes_), estimator.n_features_in_)
    step = max(1, _CHUNK_BYTES // (dtype.itemsize * width))
    for start in range(0, count, step):
        place = slice(start, min(start + step, count))
        if source:
            yield place, features.read(np.arange(place.start, place.stop), dtype)
        else:
            yield place, features[place]


def checked(estimator: Any, features: Any) -> Any:
    """Returns features of the right number, checked."""
    if not isinstance(features, RowSource):
        return read_features(estimator, features, reset=False)
    if features.num_features != estimator.n_features_in_:
        raise ValueError(
            f"`X` must have {estimator.n_features_in_} features, as in `fit`, got "
            f"{features.num_features}."
        )
    return features


def features_dtype(estimator: Any, features: Any) -> np.dtype:
    """Returns the dtype that features are computed with."""
    dtype = estimator.dtype or getattr(features, "dtype", np.float32)
    return np.dtype(dtype)


def _bucket(count: int) -> int:
    """Returns the least of eight sizes between powers of 2 that holds some rows."""
    step = 2 ** max(0, count.bit_length() - 4)
    return max(1, -(-count // step) * step)
