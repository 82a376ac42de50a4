"""A fit as a run of compiled segments, between which everything else happens.

A solver is a function from state to state. Its state is a pytree of arrays that holds
all that the rest of the run depends on, so a checkpoint of it, read back, goes on bit
for bit. A segment is a compiled loop of some iterations; progress, checkpoints and
Ctrl-C have their place between two of them.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxsoft.training.checkpoints import Checkpoints, Progress
from jaxsoft.training.errors import (
    CheckpointError,
    NonFiniteLossError,
    TrainingInterrupted,
)
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression.objective import Data, Plan
from jaxsoft.training.reporting import Listener

# Why a solver stopped, in the words of `SoftmaxRegression.stopping_reason_`.
GRADIENT = "gradient"
OBJECTIVE = "objective"
MAX_ITER = "max_iter"
# A solver's own, for a state after which it cannot go on.
NON_FINITE = "non_finite"
# A segment lasts about so long, so that progress and Ctrl-C keep up.
_SEGMENT_SECONDS, _RATE, _MOST_ITERATIONS = 0.5, 3e10, 8
# Of the line search, which counts an increase by so many units of rounding as none.
_BACKTRACKING_STEPS, _ROUNDING_ULPS = 40, 4.0
# In a folder of checkpoints, whose they are.
_FINGERPRINT = "fit.txt"
# By the index that compiled loops keep.
REASONS = ("", GRADIENT, OBJECTIVE, MAX_ITER, NON_FINITE)


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

    def __init__(self, signal_number: int, step: int | None, state: Any):
        """Keeps what happened."""
        super().__init__(signal_number, step)
        self.state = state


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
    fingerprint: Callable[[], str] | None = None,
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
      fingerprint: makes a text that equal fits have in common, and no others: the run
        of another is not gone on with. None asks for nothing.
      resume: go on from the newest checkpoint, if there is one.
      listener: told of progress.
      stop: asked between segments whether to stop; a stop saves first.
      rows: rows that an iteration reads, for the rate.

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
        return _run(solver, state, None, 0.0, 0.0, listener, stop, rows)
    with Checkpoints(checkpoints) as store:
        seconds = 0.0
        going_on = resume and store.latest_step() is not None
        if fingerprint is not None:
            _same_fit(checkpoints, fingerprint(), going_on=going_on)
        if going_on:
            abstract = jax.eval_shape(lambda: state)
            state, progress = store.restore(abstract)
            seconds = progress.seconds
            listener.note(f"resumed after {solver.unit} {progress.step}")
        return _run(
            solver, state, store, checkpoint_seconds, seconds, listener, stop, rows
        )


def _same_fit(folder: Path, found: str, *, going_on: bool) -> None:
    """Marks a folder of checkpoints as a fit's, or raises if it is another's."""
    path = folder / _FINGERPRINT
    try:
        if not going_on:
            path.write_text(found)
        elif not path.exists() or path.read_text() != found:
            raise CheckpointError(
                f"{folder}: the checkpoints there are of a fit with other rows or "
                "other parameters; take another folder, or remove this one."
            )
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


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
                raise FitInterrupted(
                    stop.received, None if store is None else status.iteration, state
                )
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
            f"iteration {status.iteration + 1}{place}: the objective or its gradient "
            "is not finite; the parameters of the last good iteration are kept. Scale "
            "the features, or lower the learning rate."
        )


def line_search(dtype: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the search along a direction of descent, whose first try is all of it.

    Halving is enough: the objective is convex, so its curvature along any step is
    positive, and a search for a longer step (Wolfe's conditions) makes L-BFGS no
    faster, but its program twice as long to compile.

    Args:
      dtype: of the objective; near the optimum it is rounding, and an increase by a
        few units counts as none.
    """
    return optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=_BACKTRACKING_STEPS,
        decrease_factor=0.5,
        increase_factor=math.inf,
        rtol=_ROUNDING_ULPS * float(jnp.finfo(dtype).eps),
        store_grad=True,
    )


def strong_types(state: Any) -> Any:
    """Returns a state whose arrays keep their types from one segment to the next.

    Optax starts some with a Python number, whose type is weak: the state that the
    first segment returns would have others, and be compiled for again.
    """
    return jax.tree.map(
        lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state
    )


def largest(tree: Any) -> jax.Array:
    """Returns the largest absolute entry of a pytree of arrays."""
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)])
    )


def finite(value: jax.Array, gradient: Any) -> jax.Array:
    """Says whether an objective and its gradient are finite."""
    return jnp.isfinite(value) & jnp.isfinite(largest(gradient))


def little(before: jax.Array, after: jax.Array, ulps: float) -> jax.Array:
    """Says whether an objective fell by no more than so many units of its rounding."""
    return before - after <= ulps * jnp.finfo(before.dtype).eps * jnp.abs(before)


def reason(finite: jax.Array, conditions: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the index of the first reason to stop, 0 for none.

    Args:
      finite: whether all is finite.
      conditions: of "gradient", "objective" and "max_iter", in this order.
    """
    index = jnp.int32(0)
    for place in range(len(conditions), 0, -1):
        index = jnp.where(conditions[place - 1], place, index)
    return jnp.where(finite, index, REASONS.index(NON_FINITE)).astype(jnp.int32)


def segment_length(plan: Plan, data: Data) -> int:
    """Returns how many iterations over all rows a segment has.

    A function of the problem alone, so that equal runs are told of the same
    iterations; about half a second by a guess of a CPU's rate, which costs nothing
    where it is wrong.

    Args:
      plan: of the objective.
      data: the rows.
    """
    entries = max(leaf.size for leaf in jax.tree.leaves(data.features))
    work = 4.0 * entries * plan.num_rows
    return max(1, min(_MOST_ITERATIONS, int(_SEGMENT_SECONDS * _RATE / work)))
