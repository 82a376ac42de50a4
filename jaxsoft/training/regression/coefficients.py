"""Between a solver's parameters and scikit-learn's `coef_` and `intercept_`."""

from typing import Any

import numpy as np

from jaxsoft.training.regression import solving
from jaxsoft.training.regression.full_batch import Options, order_of
from jaxsoft.training.regression.inputs import Rows
from jaxsoft.training.regression.objective import Parameters
from jaxsoft.training.regression.parameters import full_batch_options, reference_of


def of_classes(
    estimator: Any, rows: Rows, *, go_on: bool = False
) -> tuple[Any, Any] | None:
    """Returns [V, d] and [V] to start at, or None."""
    if not ((estimator.warm_start or go_on) and hasattr(estimator, "coef_")):
        return None
    count, width = len(rows.classes), rows.features.shape[1]
    coef, intercept = np.asarray(estimator.coef_), np.asarray(estimator.intercept_)
    if len(coef) == 1:
        # One row is the second class's less the first's.
        coef = np.concatenate([np.zeros_like(coef), coef])
        intercept = np.concatenate([np.zeros_like(intercept), intercept])
    if coef.shape != (count, width):
        raise ValueError(
            f"`warm_start` must go on with {(count, width)} coefficients, got "
            f"{coef.shape}: the first fit had other classes or features."
        )
    reference = reference_of(estimator, rows.classes)
    if reference is not None:
        coef = coef - coef[reference]
        intercept = intercept - intercept[reference]
    if not estimator.fit_intercept:
        intercept = np.zeros_like(intercept)
    return coef.astype(rows.dtype), intercept.astype(rows.dtype)


def start(estimator: Any, rows: Rows, options: Options) -> Parameters | None:
    """Returns the parameters to start at, in the solver's order, or None."""
    found = of_classes(estimator, rows)
    if found is None:
        return None
    order = order_of(options, len(rows.classes))
    coef, intercept = found[0][order], found[1][order]
    if options.reference is not None:
        coef, intercept = coef[:-1], intercept[:-1]  # the last one's are 0
    return Parameters(coef, intercept if options.intercept else None)


def set_fitted(
    estimator: Any, run: Any, state: Any, status: solving.Status, rows: Rows
) -> None:
    """Sets the fitted attributes of where a solver stands."""
    e, parameters = estimator, run.parameters(state)
    for name in ("coef_", "intercept_") if e.head != "full" else ("head_",):
        e.__dict__.pop(name, None)
    e.n_iter_ = np.array([status.iteration], np.int32)
    if hasattr(run, "steps_per_epoch"):
        e.n_iter_ = -(-e.n_iter_ // np.int32(run.steps_per_epoch))
    e.converged_ = status.reason in (solving.GRADIENT, solving.OBJECTIVE)
    e.stopping_reason_ = status.reason
    e.objective_ = status.objective
    if e.head != "full":
        e.head_ = parameters
        return
    reference = reference_of(e, rows.classes)
    if e.solver_ == "minibatch":
        coef, intercept = parameters
    else:
        options = full_batch_options(e, rows, e.solver_)
        coef, intercept = _by_class(options, parameters, len(rows.classes))
    if reference is None and e.l1_ratio == 0:
        # Of all classifiers with these probabilities, the one of least norm.
        coef, intercept = coef - coef.mean(0), intercept - intercept.mean()
    elif reference is not None and len(coef) == 2:
        coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    e.coef_, e.intercept_ = coef.astype(rows.dtype), intercept.astype(rows.dtype)


def _by_class(
    options: Options, parameters: Parameters, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns [V, d] and [V], a reference class's zeros included."""
    kernel, bias = parameters
    order = order_of(options, num_classes)[: kernel.shape[0]]
    coef = np.zeros((num_classes, kernel.shape[1]), kernel.dtype)
    intercept = np.zeros(num_classes, kernel.dtype)
    coef[order] = kernel
    if bias is not None:
        intercept[order] = bias
    return coef, intercept
