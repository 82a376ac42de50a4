"""A fitted `SoftmaxRegression` as scikit-learn's `LogisticRegression`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from jaxsoft.training.regression.coefficients import Coefficients

__all__ = ["logistic_regression"]

# Parameters that mean the same to both.
_SHARED = ("C", "fit_intercept", "class_weight")


def logistic_regression(
    coefficients: Coefficients,
    temperature: float,
    parameters: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> LogisticRegression:
    """Returns scikit-learn's estimator with the same probabilities.

    Args:
      coefficients: [V, d] and [V]; or [1, d] and [1] of two classes, the form that
        scikit-learn has of them, whose probability is a sigmoid.
      temperature: that logits are divided by, here coefficients.
      parameters: of `SoftmaxRegression`; those of the same meaning are taken.
      attributes: what else is fitted, by scikit-learn's names.
    """
    model = LogisticRegression(**{name: parameters[name] for name in _SHARED})
    if len(coefficients.coef) == 2:
        coefficients = coefficients.of_second_class()
    coef, intercept = coefficients
    scale = coef.dtype.type(temperature)
    model.coef_, model.intercept_ = coef / scale, intercept / scale
    for name, value in attributes.items():
        setattr(model, name, np.copy(value) if isinstance(value, np.ndarray) else value)
    return model
