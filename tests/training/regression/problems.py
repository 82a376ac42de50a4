"""Small problems of softmax regression, and their objective in float64 NumPy."""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

LOADERS = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}


def standardised(name):
    """Features and labels of one of scikit-learn's tables."""
    features, labels = LOADERS[name](return_X_y=True)
    return StandardScaler().fit_transform(features), labels


class Problem(NamedTuple):
    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    targets: np.ndarray


def problem(rows=37, features=5, classes=4, seed=0):
    """Overlapping classes with uneven weights, and soft targets."""
    random = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centres = random.normal(size=(classes, features))
    x = random.normal(size=(rows, features)) + centres[labels]
    targets = random.dirichlet(np.ones(classes), rows)
    return Problem(x, labels, random.uniform(0.2, 3, rows), targets)


def losses(logits, labels=None, targets=None, smoothing=0.0, temperature=1.0):
    """Cross-entropy of each row of [n, V] logits, times the squared temperature."""
    log_p = logits / temperature
    log_p = log_p - logsumexp(log_p, axis=1, keepdims=True)
    if targets is None:
        targets = np.eye(logits.shape[1])[labels]
    targets = (1 - smoothing) * targets + smoothing / logits.shape[1]
    return -(temperature**2) * (targets * log_p).sum(axis=1)


def objective(model, problem, sample_weight=None, C=1.0, **options):  # noqa: N803
    """scikit-learn's objective per unit of weight, at an estimator's coefficients."""
    x = np.asarray(problem.features, np.float64)
    weights = np.ones(len(x)) if sample_weight is None else sample_weight
    coef = np.asarray(model.coef_, np.float64)
    scores = x @ coef.T + np.asarray(model.intercept_, np.float64)
    if scores.shape[1] == 1:
        scores = np.hstack([np.zeros_like(scores), scores])
    mean = (weights * losses(scores, **options)).sum() / weights.sum()
    return mean + 0.5 * (coef**2).sum() / (C * weights.sum())
