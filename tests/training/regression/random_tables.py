"""Tables that are hard on solvers, and the optimum of each by SciPy."""

from typing import NamedTuple

import numpy as np
import scipy.optimize
from scipy.special import logsumexp

KINDS = ("overlapping", "separable", "half separable", "weights")


class Table(NamedTuple):
    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    C: float
    intercept: bool


def random_table(seed):
    """A table of columns of any scale, offset, and dependence on each other.

    Scales are 1e-12 to 1e12, offsets up to 1e12 spreads; some columns are constant,
    duplicates or multiples of others, and C is 1e-6 to infinity.
    """
    random = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    # Few shapes, so that few programs are compiled.
    rows, width = random.integers(20, 150), random.choice([2, 5])
    count, intercept = random.choice([2, 4]), random.random() < 0.8
    x = random.normal(size=(rows, width))
    scores = 2 * x @ random.normal(size=(width, count))
    if kind != "separable":
        scores = scores + random.gumbel(size=scores.shape)
    # Each class is there.
    scores[np.arange(count), np.arange(count)] = scores.max() + 1
    labels = scores.argmax(1)
    if kind == "separable":
        x[labels == 0, 0] += np.abs(x[:, 0]).max() * 2.1 + 1
        x[:, 1] = labels + 0.1 * x[:, 1]
    if kind == "half separable":
        # One class has a column to itself, in which all others are 0.
        x[:, 0] = np.where(labels == 0, np.abs(x[:, 0]), 0)
    scale = 10.0 ** random.uniform(-12, 12, width)
    offset = 10.0 ** random.uniform(-1, 12 if intercept else 1, width)
    x = (x + offset * (random.random(width) < 0.5)) * scale
    # Columns that are others within rounding of their spread, not of their mean: what
    # rounding adds to it would be a feature of its own.
    if width > 2:
        x[:, 4] = x[:, 4] - offset[4] * scale[4]
        for column, values in ((2, x[:, 0]), (3, x[:, 4] / 3), (1, scale[1])):
            if random.random() < 0.3:
                x[:, column] = values
    weights = np.ones(rows)
    if kind == "weights":
        weights = 10.0 ** random.uniform(-4, 4, rows)
    strength = np.inf if random.random() < 0.3 else 10.0 ** random.uniform(-6, 6)
    return Table(x, labels, weights, strength, intercept)


def _scaled(table):
    """Features of one scale, and [d] the scale."""
    x, shares = table.features, table.weights / table.weights.sum()
    if table.intercept:
        x = x - x[0]
        x = x - shares @ x
    penalty = 4 / (table.C * table.weights.sum())
    scale = np.sqrt(shares @ np.square(x) + penalty)
    scale = np.where(scale > 0, scale, 1)
    return x / scale, scale


def has_optimum(table):
    """Whether there is a minimum: by a linear program where nothing is penalised."""
    if np.isfinite(table.C):
        return True
    x, _ = _scaled(table._replace(weights=np.ones(len(table.labels))))
    if table.intercept:
        x = np.column_stack([x, np.ones(len(x))])
    count, width = table.labels.max() + 1, x.shape[1]
    rows = []
    for row, label in zip(x, table.labels, strict=True):
        for other in set(range(count)) - {label}:
            margin = np.zeros((count, width))
            margin[label], margin[other] = row, -row
            rows.append(margin.ravel())
    margins = np.array(rows)
    size, variables = margins.shape
    # A direction along which no margin shrinks, and some grow, by up to 1 each.
    problem = {
        "c": np.concatenate([np.zeros(variables), -np.ones(size)]),
        "A_ub": np.concatenate([-margins, np.eye(size)], 1),
        "b_ub": np.zeros(size),
        "bounds": [(-1e4, 1e4)] * variables + [(0, 1)] * size,
    }
    # One of them may give up.
    methods = ("highs", "highs-ipm", "highs-ds")
    tries = (scipy.optimize.linprog(**problem, method=method) for method in methods)
    return -next(found.fun for found in tries if found.status == 0) < 1e-3


def least_objective(table):
    """The optimum by SciPy's L-BFGS, of features of one scale."""
    x, scale = _scaled(table)
    count, width = table.labels.max() + 1, x.shape[1]
    shares = table.weights / table.weights.sum()
    two = int(count == 2)
    penalty = 1 / (table.C * table.weights.sum()) / np.square(scale)
    truth = np.eye(count)[table.labels]

    def value(flat):
        parameters = flat.reshape(-1, width + 1)
        z = x @ parameters[:, :-1].T + table.intercept * parameters[:, -1]
        z = np.column_stack([np.zeros(len(z)), z]) if two else z
        log_p = z - np.asarray(logsumexp(z, 1, keepdims=True))
        loss = -shares @ log_p[np.arange(len(z)), table.labels]
        loss += 0.5 * (penalty * np.square(parameters[:, :-1])).sum()
        residual = (shares[:, None] * (np.exp(log_p) - truth))[:, two:]
        slope = residual.T @ x + penalty * parameters[:, :-1]
        bias = table.intercept * residual.sum(0)
        return loss, np.column_stack([slope, bias]).ravel()

    found = scipy.optimize.minimize(
        value,
        np.zeros((count - two) * (width + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "maxfun": 2000, "ftol": 0, "gtol": 1e-12},
    )
    return found.fun


def objective_at(model, table):
    """scikit-learn's objective at an estimator's coefficients, in 80 bits."""
    x = table.features.astype(np.longdouble)
    coef = model.coef_.astype(np.longdouble)
    z = x @ coef.T + model.intercept_.astype(np.longdouble)
    if z.shape[1] == 1:
        z = np.column_stack([np.zeros(len(z), np.longdouble), z])
    z = z - z.max(1, keepdims=True)
    loss = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), table.labels]
    total = table.weights.sum()
    return float(
        table.weights @ loss / total + 0.5 * np.square(coef).sum() / table.C / total
    )
