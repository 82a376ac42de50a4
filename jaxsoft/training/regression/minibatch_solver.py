"""The minibatch solver: compiled segments, and rows read while they run."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import DTypeLike

from jaxsoft.training.heads import Head, Params
from jaxsoft.training.mesh import DATA, replicated
from jaxsoft.training.regression import minibatch_step as steps
from jaxsoft.training.regression.minibatch_step import (
    Batch,
    MinibatchState,
    Numbers,
    WarmupCosine,
)
from jaxsoft.training.regression.objective import Parameters
from jaxsoft.training.regression.padding import pad_rows
from jaxsoft.training.regression.solving import (
    MAX_ITER,
    NON_FINITE,
    OBJECTIVE,
    Solver,
    Status,
)
from jaxsoft.training.regression.sources import BatchOrder, RowSource

__all__ = ["MinibatchSolver", "TrainingRows"]

# Rows of a batch that a message names.
_ROWS_NAMED = 5


@dataclass(frozen=True)
class TrainingRows:
    """What is learnt from, row by row.

    Attributes:
      source: the features.
      labels: `[N]` integers in [0, V), or None with targets.
      targets: `[N, V]`, a teacher's probabilities, or None; may be memory-mapped.
      weights: `[N]`, not negative, or None for 1.
    """

    source: RowSource
    labels: np.ndarray | None
    targets: np.ndarray | None = None
    weights: np.ndarray | None = None

    def read(self, rows: np.ndarray, dtype: DTypeLike) -> Batch:
        """Reads a batch; row -1 is padding, of weight 0."""
        live = rows[rows >= 0]
        weights = np.ones(len(live)) if self.weights is None else self.weights[live]
        labels = None if self.labels is None else self.labels[live].astype(np.int32)
        targets = None
        if self.targets is not None:
            targets = np.asarray(self.targets[live], dtype)
        batch = Batch(
            self.source.read(live, dtype), labels, weights.astype(dtype), targets
        )
        return jax.tree.map(lambda array: pad_rows(array, len(rows)), batch)

    def total_weight(self) -> float:
        """The sum of the weights."""
        if self.weights is None:
            return float(len(self.source))
        return float(np.sum(self.weights, dtype=np.float64))

    def counts(self, num_classes: int) -> np.ndarray:
        """How many rows of weight other than 0 each class has, `[V]`."""
        assert self.labels is not None
        kept = self.labels if self.weights is None else self.labels[self.weights != 0]
        return np.bincount(kept, minlength=num_classes)


class MinibatchSolver(Solver[MinibatchState]):
    """Descends the objective batch by batch; a `Solver`.

    Make it by `minibatch_solver`. A state is a `MinibatchState`.

    Attributes:
      unit: "step".
      limit: the largest number of steps.
      steps_per_epoch: S.
      batch_size: B.
      segment_steps: most steps of a segment.
    """

    unit = "step"

    def __init__(
        self,
        rows: TrainingRows,
        plan: steps.Plan,
        numbers: Numbers,
        order: BatchOrder,
        *,
        params: Params,
        tables: steps.Tables,
        batch_size: int,
        segment_steps: int,
        max_iter: int | None,
        dtype: DTypeLike,
    ):
        """Keeps all of it; see `minibatch_solver`."""
        self.steps_per_epoch = order.steps_per_epoch
        self.limit: int = (1 if max_iter is None else max_iter) * self.steps_per_epoch
        self.batch_size = self.rows_per_iteration = batch_size
        self.segment_steps = segment_steps
        self._rows, self._plan, self._order = rows, plan, order
        self._dtype = np.dtype(dtype)
        everywhere = replicated(plan.mesh)
        self._params = params
        self._tables = jax.device_put(tables, everywhere)
        scalar = self._dtype.type
        self._numbers = Numbers(
            scalar(numbers.share),
            scalar(numbers.penalty),
            np.int32(numbers.steps_per_epoch),
            scalar(numbers.tol),
            np.int32(numbers.patience),
            WarmupCosine(*map(scalar, numbers.rate)),
        )
        self._ready: tuple[int, Batch] | None = None
        self._first = 0

    def init(self) -> MinibatchState:
        """Returns the first state."""
        zero, none = np.int32(0), np.zeros((), self._dtype)
        params = jax.tree.map(jnp.asarray, self._params)
        if self._plan.by_rows:
            optimizer = steps.init_rows(params)
        else:
            with jax.numpy_dtype_promotion("standard"):
                optimizer = self._plan.optimizer(0.0).init(params)
        nothing, infinite = (
            np.full((), value, self._dtype) for value in (np.nan, np.inf)
        )
        counters = (zero, zero, none, nothing, infinite, zero, np.int32(-1), zero)
        return jax.tree.map(
            lambda leaf: jnp.array(leaf, copy=True),
            MinibatchState(params, optimizer, *counters),
        )

    def advance(self, state: MinibatchState) -> MinibatchState:
        """Makes a segment of steps; reads the next one's rows meanwhile."""
        return self._advance(state, int(state.step), self._first + self.limit)

    def status(self, state: MinibatchState) -> Status:
        """Reads where a state stands.

        The objective is the mean over the last whole epoch's batches, each before its
        update; until there is one, that of the batches so far.
        """
        step, place, reason = map(int, (state.step, state.place, state.reason))
        objective = float(state.last)
        if math.isnan(objective) and place:
            objective = float(state.mean)
        words, where = "", ""
        if reason == steps.NOT_FINITE:
            words, where = NON_FINITE, self._describe(step)
        elif reason == steps.NO_PROGRESS:
            words = OBJECTIVE
        elif step >= self._first + self.limit:
            words = MAX_ITER
        return Status(step, objective, math.nan, words, where)

    def one_pass(self, state: MinibatchState | None = None) -> MinibatchState:
        """Makes one epoch, for `partial_fit`: no rule but a bad value ends it early.

        Args:
          state: donated; of this solver or of one for other rows with the same plan,
            whose parameters, optimizer and number of steps go on; None starts.

        Returns:
          The state after the epoch.
        """
        state = self.init() if state is None else state
        first = self._first = int(state.step)
        fresh = functools.partial(np.asarray, dtype=self._dtype)
        state = state._replace(
            place=np.int32(0),
            mean=fresh(0),
            best=fresh(np.inf),
            stale=np.int32(0),
            plateau=np.int32(-1),
            reason=np.int32(steps.RUNNING),
        )
        end = first + self.steps_per_epoch
        step = first
        while step < end:
            state = self._advance(state, step, end)
            step = int(state.step)
            if int(state.reason) != steps.RUNNING:
                break
        return state

    def fitted(self, state: MinibatchState) -> Parameters | Head:
        """Returns the parameters of the full head, or another head itself."""
        return self.parameters(state) if self._plan.graph is None else self.head(state)

    def parameters(self, state: MinibatchState) -> Parameters:
        """Returns `[V, d]` and `[V]` NumPy arrays of the full head."""
        return Parameters(*(np.array(state.params[k]) for k in ("kernel", "bias")))

    def head(self, state: MinibatchState) -> Head:
        """Returns a head of `jaxsoft.nn` other than the full one."""
        assert self._plan.graph is not None
        constants = self._tables[0] if self._plan.by_rows else self._tables
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state.params)
        return nnx.merge(self._plan.graph, params, constants)

    def objective(self, state: MinibatchState) -> float:
        """The objective at the parameters of a state, by one pass over the rows."""
        total = 0.0
        for place in range(self.steps_per_epoch):
            start = place * self.batch_size
            rows = np.arange(start, start + self.batch_size)
            rows[rows >= len(self._rows.source)] = -1
            batch = self._place(self._rows.read(rows, self._dtype), P(DATA))
            params = jax.device_put(state.params, replicated(self._plan.mesh))
            total += float(steps.batch_loss(self._plan, params, self._tables, batch))
        mean = total * float(self._numbers.share) / self.steps_per_epoch
        squares = float(steps.half_squares(state.params))
        return mean + float(self._numbers.penalty) * squares

    def _advance(self, state: MinibatchState, step: int, end: int) -> MinibatchState:
        count = min(self.segment_steps, end - step)
        block = self._block(step, count)
        state = jax.device_put(state, replicated(self._plan.mesh))
        state = steps.run_segment(
            self._plan, state, self._tables, block, np.int32(count), self._numbers
        )
        following = step + count
        if following < end:
            ahead = min(self.segment_steps, end - following)
            self._ready = following, self._block(following, ahead)
        return state

    def _block(self, step: int, count: int) -> Batch:
        """Reads the batches of some steps, on top of each other."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] == step:
            return ready[1]
        batches = [
            self._rows.read(self._order.rows(index - self._first), self._dtype)
            for index in range(step, step + count)
        ]

        def stacked(*leaves: np.ndarray) -> np.ndarray:
            shape = (self.segment_steps, *leaves[0].shape)
            block = np.zeros(shape, leaves[0].dtype)
            np.stack(leaves, out=block[:count])
            return block

        return self._place(jax.tree.map(stacked, *batches), P(None, DATA))

    def _place(self, batch: Batch, spec: P) -> Batch:
        return jax.device_put(batch, NamedSharding(self._plan.mesh, spec))

    def _describe(self, step: int) -> str:
        """Names the batch of the update after `step` of them, and its worst rows."""
        rows = self._order.rows(step - self._first)
        rows = rows[rows >= 0]
        features = self._rows.source.read(rows, self._dtype)
        bad = rows[~np.isfinite(features).all(axis=1)]
        named = bad if len(bad) else rows
        text = ", ".join(map(str, named[:_ROWS_NAMED]))
        more = ", ..." if len(named) > _ROWS_NAMED else ""
        return f"batch {step + 1} (rows {text}{more})"
