"""A fit as a run of compiled segments, between which everything else happens.

A solver is a function from state to state. Its state is a pytree of arrays that holds
all that the rest of the run depends on, so a checkpoint of it, read back, goes on bit
for bit. A segment is a compiled loop of some iterations; progress, checkpoints and
Ctrl-C have their place between two of them.
"""

import abc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from jaxsoft.training.checkpoints import Checkpoints, Progress
from jaxsoft.training.errors import (
    CheckpointError,
    NonFiniteLossError,
    TrainingInterrupted,
)
from jaxsoft.training.files import open_regular
from jaxsoft.training.heads import Head
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression.objective import Parameters
from jaxsoft.training.reporting import Listener

__all__ = [
    "GRADIENT",
    "INTERRUPTED",
    "MAX_ITER",
    "NON_FINITE",
    "OBJECTIVE",
    "STALLED",
    "UNBOUNDED",
    "FitInterrupted",
    "Solver",
    "Status",
    "check_finite",
    "solve",
]

State = TypeVar("State")

# Why a solver stopped, in the words of `SoftmaxRegression.stopping_reason_`.
GRADIENT = "gradient"
OBJECTIVE = "objective"
MAX_ITER = "max_iter"
# The objective has no minimum: it falls for ever along some direction.
UNBOUNDED = "unbounded"
# The objective no longer falls, though its gradient says that it should.
STALLED = "stalled"
# A solver's own, for a state after which it cannot go on.
NON_FINITE = "non_finite"
# The reason of an estimator whose fit a signal stopped.
INTERRUPTED = "interrupted"
# The file in a folder of checkpoints that says whose they are.
_FINGERPRINT = "fit.txt"


class Status(NamedTuple):
    """Where a solver stands.

    Attributes:
      iteration: iterations made; of a minibatch solver, steps.
      objective: the objective, per unit of sample weight; NaN before the first
        iteration of a solver that does not know it yet.
      gradient_norm: the largest absolute entry of its gradient, or NaN where the
        solver does not know it.
      reason: why the solver stopped; empty while it goes on.
      place: what was being read when a value was not finite, such as "batch 17".
    """

    iteration: int
    objective: float
    gradient_norm: float
    reason: str = ""
    place: str = ""


class FitInterrupted(TrainingInterrupted):
    """A signal stopped a fit between two segments.

    Attributes:
      state: the solver's last state.
    """

    def __init__(self, signal_number: int, step: int | None, state: object):
        """Keeps what happened."""
        super().__init__(signal_number, step)
        self.state = state


class Solver(abc.ABC, Generic[State]):
    """What `solve` runs; a state is a pytree of arrays.

    Attributes:
      unit: what an iteration is called.
      limit: the largest number of iterations.
      rows_per_iteration: how many an iteration reads.
      steps_per_epoch: iterations that `SoftmaxRegression.n_iter_` counts as one.
    """

    unit: str = "iteration"
    limit: int
    rows_per_iteration: int
    steps_per_epoch: int = 1

    @abc.abstractmethod
    def init(self) -> State:
        """Returns the first state."""

    @abc.abstractmethod
    def advance(self, state: State) -> State:
        """Returns the state some iterations later; `state` is not used again.

        Where a value is not finite, the parameters stay those of the last good
        iteration, and the status has the reason "non_finite".
        """

    @abc.abstractmethod
    def status(self, state: State) -> Status:
        """Reads where a state stands."""

    @abc.abstractmethod
    def fitted(self, state: State) -> Parameters | Head:
        """Returns the classifier of a state, as NumPy arrays, or its head."""

    @abc.abstractmethod
    def objective(self, state: State) -> float:
        """Returns the objective at the parameters of a state."""

    def coefficient_dtype(self, fitted: Parameters | Head, dtype: np.dtype) -> np.dtype:
        """Returns the dtype of a fitted classifier's coefficients.

        Args:
          fitted: the classifier.
          dtype: of the features; the result is another where it is too coarse.
        """
        return dtype


def solve(
    solver: Solver[State],
    *,
    checkpoints: Path | None = None,
    checkpoint_seconds: float = 30.0,
    fingerprint: Callable[[], str] | None = None,
    resume: bool = True,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> tuple[State, Status]:
    """Runs a solver until it stops.

    Args:
      solver: the solver.
      checkpoints: folder of the run's checkpoints, or None for none.
      checkpoint_seconds: the least time between two checkpoints. Results do not
        depend on it.
      fingerprint: makes a text that equal fits have in common, and no others: the run
        of another is not gone on with. None asks for nothing.
      resume: go on from the newest checkpoint, if there is one.
      listener: told of progress.
      stop: asked between segments whether to stop; a stop saves first.

    Returns:
      The last state and its status, whose `reason` is not empty. A state that is not
      finite is returned too: its parameters are those of the last good iteration.

    Raises:
      FitInterrupted: `stop` received a signal; the state is saved, if there is a
        folder to save it in.
      CheckpointError: a checkpoint cannot be written or read, or is another fit's.
    """
    listener, stop = listener or Listener(), stop or StopRequest()
    state = solver.init()
    if checkpoints is None:
        return _run(solver, state, None, 0.0, 0.0, listener, stop)
    with Checkpoints(checkpoints, note=listener.note) as store:
        seconds = 0.0
        going_on = resume and store.latest_step() is not None
        if fingerprint is not None:
            _same_fit(checkpoints, fingerprint(), going_on=going_on)
        if going_on:
            abstract = jax.eval_shape(lambda: state)
            state, progress = store.restore(abstract)
            seconds = progress.seconds
            listener.note(f"resumed after {solver.unit} {progress.step}")
        return _run(solver, state, store, checkpoint_seconds, seconds, listener, stop)


def _same_fit(folder: Path, digest: str, *, going_on: bool) -> None:
    """Marks a folder of checkpoints as a fit's, or raises if it is another's."""
    path = folder / _FINGERPRINT
    try:
        if not going_on:
            path.write_text(digest, encoding="utf-8")
            return
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    found = b""
    if path.exists():
        with open_regular(path, CheckpointError) as file:
            found = file.read(len(digest) + 1)
    if found != digest.encode():
        raise CheckpointError(
            f"{folder}: the checkpoints there are of a fit with other rows or "
            "other parameters; take another folder, or remove this one."
        )


def _run(
    solver: Solver[State],
    state: State,
    store: Checkpoints | None,
    every: float,
    before: float,
    listener: Listener,
    stop: StopRequest,
) -> tuple[State, Status]:
    """Advances to the end; see `solve`."""
    started = saved = time.monotonic()
    first = status = solver.status(state)

    def save() -> None:
        if store is not None:
            seconds = before + time.monotonic() - started
            store.save(state, Progress(status.iteration, status.iteration, seconds))

    listener.start(status.iteration, solver.limit)
    try:
        while not status.reason:
            state = solver.advance(state)
            stop.patient = store is not None
            status = solver.status(state)
            now = time.monotonic()
            if math.isfinite(status.objective):
                made = status.iteration - first.iteration
                listener.step(
                    {
                        "event": "train",
                        "step": status.iteration,
                        "loss": status.objective,
                        "gradient_norm": status.gradient_norm,
                        "seconds": before + now - started,
                        "rows_per_second": made
                        * solver.rows_per_iteration
                        / max(now - started, 1e-9),
                    }
                )
            if stop.received is not None and not status.reason:
                save()
                raise FitInterrupted(
                    stop.received, None if store is None else status.iteration, state
                )
            if now - saved >= every and status.reason != NON_FINITE:
                save()
                saved = now
    finally:
        stop.patient = False
        listener.stop()
    if status.reason != NON_FINITE:
        save()
    return state, status


def check_finite(status: Status) -> None:
    """Raises `NonFiniteLossError` if a solver stopped at a value that is not finite.

    Args:
      status: where it stopped.
    """
    if status.reason == NON_FINITE:
        place = f", {status.place}" if status.place else ""
        raise NonFiniteLossError(
            f"iteration {status.iteration + 1}{place}: the objective or its gradient "
            "is not finite; the parameters of the last good iteration are kept. Scale "
            "the features, or lower the learning rate."
        )
