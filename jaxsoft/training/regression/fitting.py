"""The parts of a fit: which solver, on which rows, watched by whom."""

import contextlib
import contextvars
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from jaxsoft.training.heads import Head
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression import full_batch
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.inputs import Features, Rows
from jaxsoft.training.regression.minibatch import (
    default_batch_size,
    minibatch_solver,
)
from jaxsoft.training.regression.minibatch_solver import MinibatchSolver
from jaxsoft.training.regression.sources import RowSource, as_source
from jaxsoft.training.reporting import Listener

__all__ = [
    "Watch",
    "choose_solver",
    "hold_out",
    "make_minibatch_solver",
    "stays_on_disk",
    "watch",
    "watched",
]

# L-BFGS keeps some twenty copies of the parameters: above so many, minibatches.
_MOST_PARAMETERS = 2**24
# Memory maps up to this size are loaded as a whole.
_IN_MEMORY_BYTES = 2**30


class Watch(NamedTuple):
    """Who is told of a fit's progress, and who is asked whether to stop it."""

    listener: Listener
    stop: StopRequest


_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar(
    "watch", default=None
)


@contextlib.contextmanager
def watched(listener: Listener, stop: StopRequest) -> Iterator[None]:
    """Lets somebody watch the calls of `SoftmaxRegression.fit` in a `with` statement.

    A private hook, of `jaxsoft regress`, which writes down progress and catches signals
    itself. By itself `fit` shows a bar if `verbose` asks for one, and catches signals.

    Args:
      listener: told of progress.
      stop: asked between segments of iterations whether to stop.
    """
    token = _WATCH.set(Watch(listener, stop))
    try:
        yield
    finally:
        _WATCH.reset(token)


@contextlib.contextmanager
def watch(verbose: int) -> Iterator[Watch]:
    """Gives a fit those who watch it.

    Args:
      verbose: above 0, a bar is shown where `watched` names nobody else.
    """
    given = _WATCH.get()
    if given is not None:
        yield given
        return
    listener, stop = Listener(), StopRequest()
    if verbose:
        from rich.console import Console

        from jaxsoft.training.console import ConsoleListener

        listener = ConsoleListener.for_fit(Console())
    # Python delivers signals to the main thread alone.
    main = threading.current_thread() is threading.main_thread()
    with stop if main else contextlib.nullcontext():
        yield Watch(listener, stop)


def stays_on_disk(features: Features, solver: str) -> bool:
    """Says whether features are read batch by batch, and never as a whole.

    joblib, and so scikit-learn's `n_jobs`, makes a memory map of every larger array:
    only those too large for memory, and those for minibatches, are left on disk.

    Args:
      features: as a caller gave them.
      solver: that was asked for.
    """
    if not isinstance(features, np.memmap):
        return isinstance(features, RowSource)
    if solver != "auto":
        return solver == "minibatch"
    return features.nbytes > _IN_MEMORY_BYTES


def choose_solver(parameters: Hyperparameters, rows: Rows) -> str:
    """Returns the name of the solver."""
    p = parameters
    asked = (p.optimizer, p.learning_rate, p.batch_size) != (None, None, None)
    width = len(rows.classes) * rows.features.shape[1]
    if p.solver == "auto" and not p.l1_ratio > 0:
        large = p.head != "full" or width > _MOST_PARAMETERS
        if large or asked or isinstance(rows.features, RowSource):
            return "minibatch"
    if p.solver == "minibatch":
        return p.solver
    if isinstance(rows.features, RowSource):
        raise ValueError(
            '`solver` must be "minibatch" or "auto" for rows that stay on disk, got '
            f"{p.solver!r}."
        )
    if asked:
        raise ValueError(
            "`optimizer`, `learning_rate` and `batch_size` must be None with `solver` "
            f"{p.solver!r}, got {p.optimizer!r}, {p.learning_rate!r} and "
            f"{p.batch_size!r}."
        )
    return full_batch.choose(p, rows)


def hold_out(parameters: Hyperparameters, rows: Rows) -> tuple[Rows, Rows | None]:
    """Returns the rows to train on, and those to calibrate on."""
    if not parameters.calibrate:
        return rows, None
    if rows.labels is None:
        raise ValueError("`calibrate` must be False where there is no `y`, got True.")
    if isinstance(rows.features, RowSource):
        raise ValueError(
            "`calibrate` must be False for rows that stay on disk, got True; fit a "
            "temperature on other rows by jaxsoft.fit_temperature."
        )
    count, share = len(rows.labels), parameters.validation_fraction
    number = min(math.ceil(share * count), count)
    if min(number, count - number) < len(rows.classes):
        raise ValueError(
            "`validation_fraction` must leave a row of each of the "
            f"{len(rows.classes)} classes on either side, got {share!r} of {count}."
        )
    training, held = train_test_split(
        np.arange(count),
        test_size=number,
        random_state=parameters.seed(),
        stratify=rows.labels,
    )
    return rows.take(np.sort(training)), rows.take(np.sort(held))


def make_minibatch_solver(
    parameters: Hyperparameters,
    rows: Rows,
    start: Coefficients | Head | None,
    *,
    passes: bool = False,
) -> MinibatchSolver:
    """Makes the minibatch solver of an estimator.

    Args:
      parameters: of the estimator.
      rows: what to fit to.
      start: a row a class, or a head, to start at.
      passes: for `partial_fit`, where nobody knows how many epochs will follow.
    """
    p = parameters
    full = p.head == "full"
    if not full and rows.targets is not None:
        raise ValueError(f"`targets` must be None with `head` {p.head!r}.")
    count, width = rows.features.shape
    epochs = None
    if not passes:
        epochs = p.epochs(count, default_batch_size(width, rows.dtype))
    return minibatch_solver(
        as_source(rows.features),
        rows.labels,
        rows.weights,
        num_classes=len(rows.classes),
        targets=rows.targets,
        head=p.head,
        C=p.C,
        fit_intercept=p.fit_intercept,
        reference=p.reference(rows.classes) if full else None,
        label_smoothing=p.label_smoothing,
        temperature=p.distillation_temperature if full else 1.0,
        target_weight=p.distillation_weight if full else 1.0,
        optimizer=p.optimizer,
        learning_rate=p.learning_rate,
        batch_size=p.batch_size,
        max_iter=epochs,
        tol=p.tol,
        seed=p.seed(),
        mesh=p.mesh,
        start=start,
        dtype=rows.dtype,
    )
