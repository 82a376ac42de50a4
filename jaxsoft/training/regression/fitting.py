"""From an estimator and its rows to fitted attributes."""

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from jaxsoft.logits.calibration import fit_temperature
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression import (
    coefficients,
    decisions,
    full_batch,
    identity,
    parameters,
    solving,
)
from jaxsoft.training.regression.inputs import Rows, read_rows, read_source_rows
from jaxsoft.training.regression.minibatch import minibatch_solver
from jaxsoft.training.regression.sources import RowSource, as_source
from jaxsoft.training.reporting import Listener

# L-BFGS keeps some twenty copies of the parameters: above so many, minibatches.
_MOST_PARAMETERS = 2**24
# Of a memory map, what is read as a whole.
_IN_MEMORY_BYTES = 2**30

INTERRUPTED = "interrupted"


def fit(
    estimator: Any,
    features: Any,
    labels: Any,
    sample_weight: Any = None,
    targets: Any = None,
    *,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Fits an estimator, and sets its fitted attributes.

    Args:
      estimator: a `SoftmaxRegression`.
      features: [n, d].
      labels: [n], or None with `targets`.
      sample_weight: [n], or None.
      targets: [n, V], or None.
      listener: told of progress.
      stop: asked between segments whether to stop.

    Raises:
      TypeError, ValueError: as `SoftmaxRegression.fit` says.
      NonFiniteLossError: a value is not finite; the parameters are those before.
      FitInterrupted: `stop` received a signal; the parameters are the last ones.
    """
    parameters.check(estimator)
    if _stays_on_disk(estimator, features):
        rows = read_source_rows(
            estimator, as_source(features), labels, sample_weight, targets
        )
    else:
        rows = read_rows(estimator, features, labels, sample_weight, targets)
    solver = _choose(estimator, rows)
    training, held = _hold_out(estimator, rows)
    if solver == "newton" or (solver != "minibatch" and full_batch.small(training)):
        training = training.astype(np.dtype(np.float64))
    with jax.enable_x64(training.dtype == np.float64):
        if solver == "minibatch":
            run: Any = minibatch(estimator, training)
        else:
            options = parameters.full_batch_options(estimator, rows, solver)
            run = full_batch.make_solver(
                options, training, coefficients.start(estimator, training, options)
            )
        estimator.classes_, estimator.solver_ = rows.classes, solver
        estimator.temperature_ = 1.0
        try:
            state, status = solving.solve(
                run,
                checkpoints=_folder(estimator.checkpoint_dir),
                fingerprint=lambda: identity.fingerprint(estimator, training),
                checkpoint_seconds=estimator.checkpoint_seconds,
                listener=listener,
                stop=stop,
                rows=getattr(run, "batch_size", training.features.shape[0]),
            )
        except solving.FitInterrupted as interruption:
            status = run.status(interruption.state)._replace(reason=INTERRUPTED)
            coefficients.set_fitted(estimator, run, interruption.state, status, rows)
            raise
        if solver == "minibatch" and status.reason != solving.NON_FINITE:
            # Batches were measured each before its step; this is where it ended.
            status = status._replace(objective=run.objective(state))
        coefficients.set_fitted(estimator, run, state, status, rows)
        if held is not None:
            _calibrate(estimator, held)
    solving.check_finite(status)
    if status.reason == solving.MAX_ITER and not _epochs_are_enough(estimator, solver):
        warn(estimator, solver, run, status)


def warn(estimator: Any, solver: str, run: Any, status: solving.Status) -> None:
    """Warns that a fit stopped at the largest number of iterations."""
    warnings.warn(
        f"{solver} failed to converge after {status.iteration} {run.unit}(s): the "
        "total number of iterations reached its limit. Increase `max_iter` to improve "
        "the convergence, or scale the data, for example by "
        "sklearn.preprocessing.StandardScaler.",
        ConvergenceWarning,
        stacklevel=4,
    )


def _epochs_are_enough(estimator: Any, solver: str) -> bool:
    """Says whether a run to its last epoch is what was asked for.

    The learning rate then came down to 0 as planned.
    """
    return solver == "minibatch" and estimator.max_iter is None


def partial_fit(
    estimator: Any,
    features: Any,
    labels: Any,
    classes: Any,
    sample_weight: Any,
    targets: Any,
) -> None:
    """Makes one epoch of minibatches; see `SoftmaxRegression.partial_fit`."""
    parameters.check(estimator)
    if estimator.l1_ratio > 0:
        raise ValueError(
            f"`l1_ratio` must be 0 for partial_fit, got {estimator.l1_ratio!r}."
        )
    if isinstance(estimator.class_weight, str):
        raise ValueError(
            "`class_weight` must be None or a dict for partial_fit, which does not see "
            f"all rows, got {estimator.class_weight!r}."
        )
    first = not hasattr(estimator, "classes_")
    known = _known_classes(estimator, classes, targets)
    rows = read_rows(
        estimator, features, labels, sample_weight, targets, classes=known, reset=first
    )
    known_state = getattr(estimator, "_state", None)
    if known_state is not None and known_state.last.dtype != rows.dtype:
        rows = rows.astype(known_state.last.dtype)
    with jax.enable_x64(rows.dtype == np.float64):
        estimator.classes_, estimator.solver_ = rows.classes, "minibatch"
        estimator.temperature_ = 1.0
        run = minibatch(estimator, rows, passes=True, go_on=not first)
        # A copy: what is interrupted in a pass starts it again.
        state = run.one_pass(jax.tree.map(jnp.copy, known_state))
        status = run.status(state)
        passes = 1 if known_state is None else int(estimator.n_iter_[0]) + 1
        coefficients.set_fitted(estimator, run, state, status, rows)
        estimator.n_iter_ = np.array([passes], np.int32)
        estimator._state = state
    solving.check_finite(status)


def _known_classes(estimator: Any, classes: Any, targets: Any) -> Any:
    """Returns the classes of a call of `partial_fit`; None are those of targets."""
    if hasattr(estimator, "classes_"):
        known = estimator.classes_
        if classes is not None and not np.array_equal(np.unique(classes), known):
            raise ValueError(
                f"`classes` must be those of the first call, {known.tolist()}, got "
                f"{np.unique(classes).tolist()}."
            )
        return known
    if classes is None:
        if targets is None:
            raise ValueError(
                "`classes` must be given in the first call of partial_fit, got None."
            )
        return None
    known = np.unique(classes)
    if len(known) < 2:
        raise ValueError(f"`classes` must have 2 entries or more, got {classes!r}.")
    return known


def minibatch(
    estimator: Any, rows: Rows, *, passes: bool = False, go_on: bool = False
) -> Any:
    """Makes the minibatch solver of an estimator.

    Args:
      estimator: the estimator.
      rows: what to fit to.
      passes: for `partial_fit`, where nobody knows how many epochs will follow.
      go_on: start where the estimator is, whatever its `warm_start`.
    """
    e = estimator
    options: dict[str, Any] = {}
    if e.head == "full":
        reference = parameters.reference_of(e, rows.classes)
        start = coefficients.of_classes(e, rows, go_on=go_on)
        options = {
            "targets": rows.targets,
            "reference": reference,
            "temperature": e.distillation_temperature,
            "target_weight": e.distillation_weight,
            "start": start,
        }
    elif rows.targets is not None:
        raise ValueError(f"`targets` must be None with `head` {e.head!r}.")
    elif go_on and hasattr(e, "head_"):
        options = {"start": e.head_}
    return minibatch_solver(
        as_source(rows.features),
        rows.labels,
        rows.weights,
        num_classes=len(rows.classes),
        head=e.head,
        C=e.C,
        fit_intercept=e.fit_intercept,
        label_smoothing=e.label_smoothing,
        optimizer=e.optimizer,
        learning_rate=e.learning_rate,
        batch_size=e.batch_size,
        max_iter=None if passes else parameters.epochs_of(e, len(rows.weights)),
        tol=e.tol,
        seed=parameters.seed_of(e),
        mesh=e.mesh,
        dtype=rows.dtype,
        **options,
    )


def _stays_on_disk(estimator: Any, features: Any) -> bool:
    """Says whether features are read batch by batch, and never as a whole.

    joblib, and so scikit-learn's `n_jobs`, makes a memory map of every larger array:
    only those too large for memory, and those for minibatches, are left on disk.
    """
    if not isinstance(features, np.memmap):
        return isinstance(features, RowSource)
    if estimator.solver != "auto":
        return estimator.solver == "minibatch"
    return features.nbytes > _IN_MEMORY_BYTES


def _choose(estimator: Any, rows: Rows) -> str:
    """Returns the name of the solver."""
    e = estimator
    asked = (e.optimizer, e.learning_rate, e.batch_size) != (None, None, None)
    width = len(rows.classes) * rows.features.shape[1]
    if e.solver == "auto" and not e.l1_ratio > 0:
        large = e.head != "full" or width > _MOST_PARAMETERS
        if large or asked or isinstance(rows.features, RowSource):
            return "minibatch"
    if e.solver == "minibatch":
        return e.solver
    if isinstance(rows.features, RowSource):
        raise ValueError(
            '`solver` must be "minibatch" or "auto" for rows that stay on disk, got '
            f"{e.solver!r}."
        )
    if asked:
        raise ValueError(
            "`optimizer`, `learning_rate` and `batch_size` must be None with `solver` "
            f"{e.solver!r}, got {e.optimizer!r}, {e.learning_rate!r} and "
            f"{e.batch_size!r}."
        )
    return full_batch.choose(parameters.full_batch_options(e, rows, e.solver), rows)


def _hold_out(estimator: Any, rows: Rows) -> tuple[Rows, Rows | None]:
    """Returns the rows to train on, and those to calibrate on."""
    if not estimator.calibrate:
        return rows, None
    if rows.labels is None:
        raise ValueError("`calibrate` must be False where there is no `y`, got True.")
    if isinstance(rows.features, RowSource):
        raise ValueError(
            "`calibrate` must be False for rows that stay on disk, got True; fit a "
            "temperature on other rows by jaxsoft.fit_temperature."
        )
    count, share = len(rows.labels), estimator.validation_fraction
    number = min(math.ceil(share * count), count)
    if min(number, count - number) < len(rows.classes):
        raise ValueError(
            "`validation_fraction` must leave a row of each of the "
            f"{len(rows.classes)} classes on either side, got {share!r} of {count}."
        )
    training, held = train_test_split(
        np.arange(count),
        test_size=number,
        random_state=parameters.seed_of(estimator),
        stratify=rows.labels,
    )
    return rows.take(np.sort(training)), rows.take(np.sort(held))


def _calibrate(estimator: Any, held: Rows) -> None:
    """Fits the temperature on rows that the fit did not see."""
    assert held.labels is not None
    scores = decisions.linear(estimator, held.features)
    if scores.ndim == 1:
        scores = np.stack([np.zeros_like(scores), scores], 1)
    found = fit_temperature(scores, held.labels, weights=held.weights)
    estimator.temperature_ = float(found.temperature)


def _folder(path: Any) -> Path | None:
    return None if path is None else Path(path)


@contextlib.contextmanager
def signals() -> Iterator[StopRequest]:
    """Catches Ctrl-C between segments where this is the main thread."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with stop:
        yield stop
