"""What the solvers have in common that read all rows in every iteration.

A solver gives the formulas of one iteration; this gives the compiled segment of them:
the first evaluation, the rules to stop, and the last good point where a value is not
finite.
"""

import abc
import functools
import math
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoft.training.heads import Head
from jaxsoft.training.regression.objective import (
    Data,
    Parameters,
    Plan,
    drift,
    objective,
)
from jaxsoft.training.regression.solving import (
    GRADIENT,
    MAX_ITER,
    NON_FINITE,
    OBJECTIVE,
    STALLED,
    UNBOUNDED,
    Solver,
    Status,
)
from jaxsoft.training.regression.standardisation import Standardisation
from jaxsoft.training.regression.whitening import Whitening

__all__ = [
    "FullBatchSolver",
    "Iterate",
    "Problem",
    "State",
    "fell_little",
    "largest",
    "line_search",
    "rose",
]

# The reasons to stop, by the index that compiled loops keep.
_REASONS = ("", UNBOUNDED, GRADIENT, STALLED, OBJECTIVE, MAX_ITER, NON_FINITE)
# A segment lasts about so long, so that progress and Ctrl-C keep up.
_SEGMENT_SECONDS, _RATE, _MOST_ITERATIONS = 0.5, 3e10, 8
# The line search counts an increase by so many units of rounding as none.
_BACKTRACKING_STEPS, _ROUNDING_ULPS = 40, 4.0
# An objective that falls by no more than so many units of its rounding hardly falls.
_SETTLED_ULPS = 2.0
# Where an objective f no longer falls, its gradient is of the size of √(ε f), or of its
# own rounding: one so many times larger says that there is a lower objective.
_STALLED_GRADIENT, _GRADIENT_ULPS = 30.0, 1000.0

Point = TypeVar("Point")
Memory = TypeVar("Memory")


class Problem(NamedTuple):
    """What is minimised.

    Attributes:
      data: the rows.
      coordinates: to minimise in; None are the parameters themselves.
      strength: [d] λ of each column's squares.
      sparsity: [d] λ of each column's absolute values.
    """

    data: Data
    coordinates: Whitening | None
    strength: jax.Array
    sparsity: jax.Array

    def objective(self, plan: Plan, point: Any) -> jax.Array:
        """Returns the objective at a point, without its L1 part."""
        return objective(plan, self.parameters(plan, point), self.data, self.strength)

    def parameters(self, plan: Plan, point: Any) -> Parameters:
        """Returns the classifier at a point."""
        if self.coordinates is None:
            return point
        return self.coordinates.parameters(point, intercept=plan.intercept)


class State(NamedTuple, Generic[Point, Memory]):
    """Where a solver stands.

    Attributes:
      point: the parameters, or coordinates of them.
      memory: what else the solver's next step depends on.
      value: the objective there, NaN before the first segment.
      gradient_norm: the largest absolute entry of its gradient in the parameters, of
        an L1 penalty's the proximal one; NaN where it is not known yet.
      iteration: iterations made.
      settled: iterations in a row that made hardly any progress.
      reason: index of why it stopped, 0 while it goes on.
    """

    point: Point
    memory: Memory
    value: jax.Array
    gradient_norm: jax.Array
    iteration: jax.Array
    settled: jax.Array
    reason: jax.Array


class Iterate(NamedTuple, Generic[Point, Memory]):
    """What one iteration arrives at.

    Attributes:
      point: as in `State`, like the next three.
      memory: see there.
      value: see there.
      gradient_norm: see there.
      little: whether there was hardly any progress.
      near: whether a gradient within the tolerance is enough to stop.
      unbounded: whether the objective was seen to have no minimum.
      unknown: whether the norm is left out at the start, where it is NaN.
    """

    point: Point
    memory: Memory
    value: jax.Array
    gradient_norm: jax.Array
    little: jax.Array | bool = False
    near: jax.Array | bool = True
    unbounded: jax.Array | bool = False
    unknown: bool = False


class FullBatchSolver(Solver[State[Point, Memory]], abc.ABC, Generic[Point, Memory]):
    """Minimises the objective of softmax regression.

    A subclass is the formulas of an iteration; its methods are traced.

    Attributes:
      SETTLED_ITERATIONS: in a row with hardly any progress, after which it stops.
    """

    SETTLED_ITERATIONS: ClassVar[int]

    def __init__(
        self,
        plan: Plan,
        data: Data,
        start: Parameters,
        *,
        coordinates: Whitening | None = None,
        standard: Standardisation,
        strength: np.ndarray,
        sparsity: np.ndarray,
        tol: float,
        max_iter: int,
        before: int = 0,
        rows: int,
    ):
        """Keeps the problem.

        Args:
          plan: what is compiled.
          data: the rows, of features of one scale.
          start: the first classifier, of the features as given, float64.
          coordinates: to minimise in, or None.
          standard: what brought the features to one scale.
          strength: [d] λ of each column's squares.
          sparsity: [d] λ of each column's absolute values.
          tol: largest absolute entry of the gradient at which to stop.
          max_iter: iterations at most, those before included.
          before: iterations of a solver that this one goes on from.
          rows: without padding, for the rate.
        """
        dtype = data.weights.dtype
        self.limit, self.rows_per_iteration = max_iter, rows
        self._before, self._standard = before, standard
        self._plan, self._given = plan, start
        self._start = jax.tree.map(
            lambda array: array.astype(dtype), standard.of_given(start)
        )
        self._problem = Problem(
            data,
            coordinates,
            jnp.asarray(strength, dtype),
            jnp.asarray(sparsity, dtype),
        )
        self._tol = jnp.asarray(tol, dtype)
        self._length = self.segment_length(plan, data)

    @classmethod
    def segment_length(cls, plan: Plan, data: Data) -> int:
        """Returns how many iterations a segment has.

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

    @classmethod
    @abc.abstractmethod
    def first(
        cls, plan: Plan, problem: Problem, start: Parameters
    ) -> tuple[Point, Memory]:
        """Returns where to begin, and a memory of the structure that it keeps."""

    @classmethod
    @abc.abstractmethod
    def evaluate(
        cls, plan: Plan, problem: Problem, state: State[Point, Memory]
    ) -> Iterate[Point, Memory]:
        """Returns the values at the point where the solver begins."""

    @classmethod
    @abc.abstractmethod
    def iterate(
        cls, plan: Plan, problem: Problem, state: State[Point, Memory]
    ) -> Iterate[Point, Memory]:
        """Returns where an iteration arrives."""

    def init(self) -> State[Point, Memory]:
        """Returns the state at the start."""
        return _init(type(self), self._plan, self._problem, self._start)

    def advance(self, state: State[Point, Memory]) -> State[Point, Memory]:
        """Returns the state a segment later."""
        limit = self.limit - self._before
        until = min(int(state.iteration) + self._length, limit)
        return _segment(
            type(self), self._plan, self._problem, state, self._tol, until, limit
        )

    def status(self, state: State[Point, Memory]) -> Status:
        """Reads where a state stands."""
        return Status(
            self._before + int(state.iteration),
            float(state.value),
            float(state.gradient_norm),
            _REASONS[int(state.reason)],
        )

    def objective(self, state: State[Point, Memory]) -> float:
        """Returns the objective at the point."""
        return float(state.value)

    def fitted(self, state: State[Point, Memory]) -> Parameters:
        """Returns the classifier of the features as given, float64.

        Where all classes have a row and squares alone are penalised, or nothing, rows
        sum to 0, as of all equal classifiers that is the one of least norm.
        """
        if int(state.iteration) == 0:
            return self._given
        scaled = self._scaled(state)
        if not (self._plan.reference or np.any(self._problem.sparsity)):
            scaled = jax.tree.map(lambda array: array - array.mean(0), scaled)
        return self._standard.to_given(scaled)

    def coefficient_dtype(self, fitted: Parameters | Head, dtype: np.dtype) -> np.dtype:
        """Returns float64 where a column's mean is too large for a narrower dtype."""
        assert isinstance(fitted, Parameters)
        coarse = self._standard.rounds(fitted.kernel, dtype)
        return np.dtype(np.float64) if coarse else dtype

    def column_of_rounding(self, fitted: Parameters) -> tuple[int, float] | None:
        """Returns a column whose mean is so large that float64 rounds the logits.

        Args:
          fitted: the classifier of the features as given.

        Returns:
          The column and by how much it moves them; None where it tells nothing.
        """
        if not self._standard.rounds(fitted.kernel, np.float64):
            return None
        moved = self._standard.rounding(fitted.kernel, np.float64)
        return int(moved.argmax()), float(moved.max())

    def column_of_gradient(self, state: State[Point, Memory]) -> int:
        """Returns the column in which the objective's gradient is largest."""
        scaled = jax.tree.map(jnp.asarray, self._scaled(state))
        gradient = _gradient(self._plan, self._problem, scaled)
        return int(np.abs(gradient.kernel).max(0).argmax())

    def column_of_growth(self, state: State[Point, Memory]) -> int:
        """Returns the column that the logits depend on most."""
        return int(np.abs(self._scaled(state).kernel).max(0).argmax())

    def penalised(self) -> bool:
        """Says whether there is any penalty."""
        problem = self._problem
        return bool(np.any(problem.strength) or np.any(problem.sparsity))

    def separates(self, state: State[Point, Memory]) -> bool:
        """Says whether the classifier gives each row's label the largest logit."""
        scaled = jax.tree.map(jnp.asarray, self._scaled(state))
        return not _drift(self._plan, scaled, self._problem.data).undecided > 0

    def _scaled(self, state: State[Point, Memory]) -> Parameters:
        """Returns the classifier of the features of one scale, as NumPy arrays."""
        point = jax.tree.map(np.asarray, state.point)
        return self._problem.parameters(self._plan, point)


_drift = jax.jit(drift, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(plan: Plan, problem: Problem, parameters: Parameters) -> Parameters:
    """Returns the gradient of the objective, without its L1 part."""
    plain = problem._replace(coordinates=None)
    return jax.grad(lambda at: plain.objective(plan, at))(parameters)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(
    solver: type[FullBatchSolver], plan: Plan, problem: Problem, start: Parameters
) -> State:
    with jax.numpy_dtype_promotion("standard"):
        point, memory = solver.first(plan, problem, start)
        zero = jnp.zeros((), jnp.int32)
        unknown = jnp.full((), jnp.nan, problem.strength.dtype)
        state = State(point, memory, unknown, unknown, zero, zero, zero)
        # Optax starts some arrays with a Python number, whose type is weak: the state
        # of the first segment would have other types, and be compiled for again. The
        # copies are not the caller's, whose arrays are not to be donated.
        return jax.tree.map(
            lambda leaf: jnp.copy(jax.lax.convert_element_type(leaf, leaf.dtype)), state
        )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _segment(
    solver: type[FullBatchSolver],
    plan: Plan,
    problem: Problem,
    state: State,
    tol: jax.Array,
    until: jax.typing.ArrayLike,
    limit: jax.typing.ArrayLike,
) -> State:
    """Makes iterations up to `until`, or until there is a reason to stop."""

    def begin(state: State) -> State:
        at = solver.evaluate(plan, problem, state)
        norm = at.gradient_norm
        finite = jnp.isfinite(at.value) & (jnp.isfinite(norm) | at.unknown)
        return state._replace(
            memory=at.memory,
            value=at.value,
            gradient_norm=norm,
            reason=_reason(finite, {GRADIENT: at.near & (norm <= tol)}),
        )

    def step(state: State) -> State:
        at = solver.iterate(plan, problem, state)
        settled = jnp.where(at.little, state.settled + 1, 0)
        iteration = state.iteration + 1
        finite = jnp.isfinite(at.value) & jnp.isfinite(at.gradient_norm)
        small = at.gradient_norm <= tol
        # Much further on, rounding would hide the direction.
        seen = at.gradient_norm <= jnp.maximum(tol, jnp.finfo(tol.dtype).eps ** 0.5)
        still = settled >= solver.SETTLED_ITERATIONS
        conditions = {
            UNBOUNDED: at.unbounded & (seen | still),
            GRADIENT: at.near & small,
            STALLED: still & ~(small | _at_rounding(at.value, at.gradient_norm)),
            OBJECTIVE: still,
            MAX_ITER: iteration >= limit,
        }
        reason = _reason(finite, conditions)
        stepped = State(*at[:4], iteration, settled, reason)
        # The run is over where not all is finite: the memory is not used again.
        kept = state._replace(memory=at.memory, reason=reason)
        return jax.lax.cond(finite, lambda: stepped, lambda: kept)

    with jax.numpy_dtype_promotion("standard"):
        # Here, not in `_init`, it is compiled and traced beside the loop.
        state = jax.lax.cond(state.iteration == 0, begin, lambda state: state, state)
        return jax.lax.while_loop(
            lambda state: (state.reason == 0) & (state.iteration < until), step, state
        )


def _at_rounding(value: jax.Array, norm: jax.Array) -> jax.Array:
    """Says whether a gradient is as small as rounding of the objective leaves it."""
    ulp = jnp.finfo(value.dtype).eps
    seen = _STALLED_GRADIENT * jnp.sqrt(ulp * jnp.abs(value))
    return norm <= seen + _GRADIENT_ULPS * ulp


def _reason(finite: jax.Array, conditions: dict[str, jax.Array]) -> jax.Array:
    """Returns the index of the first reason to stop, 0 for none."""
    index = jnp.int32(0)
    for reason, holds in reversed(conditions.items()):
        index = jnp.where(holds, _REASONS.index(reason), index)
    return jnp.where(finite, index, _REASONS.index(NON_FINITE)).astype(jnp.int32)


def line_search(dtype: jax.typing.DTypeLike) -> optax.GradientTransformationExtraArgs:
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


def largest(tree: optax.Params) -> jax.Array:
    """Returns the largest absolute entry of a pytree of arrays."""
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)])
    )


def rose(before: jax.Array, after: jax.Array) -> jax.Array:
    """Says whether a line search ended above where it began, or at no number."""
    slack = _ROUNDING_ULPS * jnp.finfo(before.dtype).eps * jnp.abs(before)
    return ~(after <= before + slack)


def fell_little(before: jax.Array, after: jax.Array) -> jax.Array:
    """Says whether an objective fell by no more than a few units of its rounding."""
    return before - after <= _SETTLED_ULPS * jnp.finfo(before.dtype).eps * jnp.abs(
        before
    )
