"""What there is to warn of after a fit, with the column that it is about."""

from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from jaxsoft.training.regression.full_batch_solver import FullBatchSolver
from jaxsoft.training.regression.inputs import Columns
from jaxsoft.training.regression.solving import (
    MAX_ITER,
    STALLED,
    UNBOUNDED,
    Solver,
    Status,
)

__all__ = ["advice"]

# By the reason to stop, with the solver, the number of iterations, and the column of
# the largest gradient, or where there is no minimum of the largest coefficients.
_SENTENCES = {
    MAX_ITER: "{solver} failed to converge after {number} iteration(s): the total "
    "number of iterations reached its limit. Increase `max_iter` to improve the "
    "convergence; the gradient is largest in {column}.",
    STALLED: "{solver} failed to converge after {number} iteration(s): the objective "
    "no longer falls, though its gradient is not 0; it is largest in {column}.",
    UNBOUNDED: "the objective has no minimum: without a penalty, features that tell a "
    "class from the others have coefficients that grow for ever, most of all {column}. "
    "{solver} stopped after {number} iteration(s); give a finite `C`.",
}
_EPOCHS = (
    "{solver} failed to converge after {number} step(s): the number of epochs reached "
    "its limit. Increase `max_iter` to improve the convergence, or scale the data, for "
    "example by sklearn.preprocessing.StandardScaler."
)
_ROUNDING = (
    "{column} has a mean that is so large beside its spread that rounding of float64 "
    "moves the logits of the features as given by {moved:.1g}; subtract its mean from "
    "it."
)


def advice(
    run: Solver[Any],
    state: Any,
    status: Status,
    *,
    solver: str,
    limited: bool,
    columns: Columns | None,
    names: np.ndarray | None,
) -> list[Warning]:
    """Returns what there is to warn of.

    Args:
      run: the solver that ended.
      state: where.
      status: how.
      solver: its name.
      limited: whether the caller gave `max_iter`: epochs that nobody asked for are as
        many as the learning rate's way down.
      columns: of the caller's features, those that the solver saw.
      names: [d] of the caller's features, or None.
    """
    told: list[Warning] = []
    given = {"solver": solver, "number": status.iteration}
    if not isinstance(run, FullBatchSolver):
        if status.reason == MAX_ITER and limited:
            told.append(ConvergenceWarning(_EPOCHS.format(**given)))
        return told

    def named(index: int) -> str:
        place = index if columns is None else int(columns.index[index])
        return f"column {place if names is None else repr(str(names[place]))}"

    if status.reason in _SENTENCES:
        unbounded = status.reason == UNBOUNDED
        find = run.column_of_growth if unbounded else run.column_of_gradient
        sentence = _SENTENCES[status.reason]
        column = named(find(state))
        told.append(ConvergenceWarning(sentence.format(column=column, **given)))
    found = run.column_of_rounding(run.fitted(state))
    if found is not None:
        column, moved = named(found[0]), found[1]
        told.append(UserWarning(_ROUNDING.format(column=column, moved=moved)))
    return told
