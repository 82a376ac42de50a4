"""A fit as a run of compiled segments, between which everything else happens.

A solver is a function from state to state. Its state is a pytree of arrays that holds
all that the rest of the run depends on, so a checkpoint of it, read back, goes on bit
for bit. A segment is a compiled loop of some iterations; progress, checkpoints and
Ctrl-C have their place between two of them.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from jaxsoft.training.checkpoints import Checkpoints, Progress
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.language_model import NonFiniteLossError
from jaxsoft.training.reporting import Listener

# Why a solver stopped, in the words of `SoftmaxRegression.stopping_reason_`.
GRADIENT = "gradient"
OBJECTIVE = "objective"
MAX_ITER = "max_iter"
# A solver's own, for a state after which it cannot go on.
NON_FINITE = "non_finite"


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


class Solver(Protocol):
    """What `solve` runs."""

    # What an iteration is called.
    unit: str
    # The largest number of iterations.
    limit: int

    def init(self) -> Any:
        """Returns the first state."""
        ...

    def advance(self, state: Any) -> Any:
        """Returns the state some iterations later; `state` is not used again.

        Where a value is not finite, the parameters stay those of the last good
        iteration, and the status has the reason "non_finite".
        """
        ...

    def status(self, state: Any) -> Status:
        """Reads where a state stands."""
        ...


def solve(
    solver: Solver,
    *,
    checkpoints: Path | None = None,
    checkpoint_seconds: float = 30.0,
    resume: bool = True,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
    rows: int = 0,
) -> tuple[Any, Status]:
    """Runs a solver until it stops.

    Args:
      solver: the solver.
      checkpoints: folder of the run's checkpoints, or None for none.
      checkpoint_seconds: the least time between two checkpoints. Results do not
        depend on it.
      resume: go on from the newest checkpoint, if there is one.
      listener: told of progress.
      stop: asked between segments whether to stop; a stop saves first.
      rows: rows that an iteration reads, for the rate.

    Returns:
      The last state and its status, whose `reason` is not empty. A state that is not
      finite is returned too: its parameters are those of the last good iteration.

    Raises:
      TrainingInterrupted: `stop` received a signal; the state is saved, if there is a
        folder to save it in, and is in the error's `state`.
      CheckpointError: a checkpoint cannot be written or read.
    """
    listener, stop = listener or Listener(), stop or StopRequest()
    state = solver.init()
    if checkpoints is None:
        return _run(solver, state, None, 0.0, 0.0, listener, stop, rows)
    with Checkpoints(checkpoints) as store:
        seconds = 0.0
        if resume and store.latest_step() is not None:
            abstract = jax.eval_shape(lambda: state)
            state, progress = store.restore(abstract)
            seconds = progress.seconds
            listener.note(f"resumed after {solver.unit} {progress.step}")
        return _run(
            solver, state, store, checkpoint_seconds, seconds, listener, stop, rows
        )


def _run(
    solver: Solver,
    state: Any,
    store: Checkpoints | None,
    every: float,
    before: float,
    listener: Listener,
    stop: StopRequest,
    rows: int,
) -> tuple[Any, Status]:
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
                        "rows_per_second": made * rows / max(now - started, 1e-9),
                    }
                )
            if stop.received is not None and not status.reason:
                save()
                stop.check(status.iteration)
            if now - saved >= every and status.reason != NON_FINITE:
                save()
                saved = now
    finally:
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
            f"iteration {status.iteration + 1}{place}: the objective or its gradient is "
            "not finite; the parameters of the last good iteration are kept. Scale the "
            "features, or lower the learning rate."
        )
