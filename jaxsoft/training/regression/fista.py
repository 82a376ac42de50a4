"""FISTA: accelerated proximal gradient descent, for penalties with an L1 part.

In coordinates that scale each feature, so that the L1 penalty stays separable; the
step follows the curvature by backtracking, and momentum restarts where it points
uphill.

References:
  Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm for Linear
  Inverse Problems, SIAM Journal on Imaging Sciences 2, 2009; O'Donoghue and Candès,
  Adaptive Restart for Accelerated Gradient Schemes, arXiv:1204.3982.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft.training.regression import solving
from jaxsoft.training.regression.objective import Data, Parameters, Plan, objective
from jaxsoft.training.regression.whitening import Whitening

# A step that fitted is tried so much longer the next time.
_GROWTH = 1.1
_MAX_BACKTRACKING = 60
_SETTLED_ITERATIONS, _SETTLED_ULPS = 10, 2.0


class State(NamedTuple):
    """Where FISTA stands.

    Attributes:
      v: [R, e] coordinates.
      ahead: [R, e] where momentum carries them.
      momentum: t of the acceleration.
      curvature: 1 / step.
      value: the objective at `v`.
      norm: largest entry of the proximal gradient, in the parameters.
      iteration: iterations made.
      settled: iterations in a row that hardly lowered the objective.
      reason: index of why it stopped, 0 while it goes on.
    """

    v: jax.Array
    ahead: jax.Array
    momentum: jax.Array
    curvature: jax.Array
    value: jax.Array
    norm: jax.Array
    iteration: jax.Array
    settled: jax.Array
    reason: jax.Array


class FISTA:
    """Minimises the objective of softmax regression with an L1 part; a `Solver`."""

    unit = "iteration"

    def __init__(
        self,
        plan: Plan,
        data: Data,
        coordinates: Whitening,
        start: Parameters,
        *,
        strength: float,
        sparsity: float,
        tol: float,
        max_iter: int,
    ):
        """Keeps the problem.

        Args:
          plan: what is compiled.
          data: the rows.
          coordinates: to minimise in; their factor is diagonal.
          start: the first classifier.
          strength: λ of the squared norm.
          sparsity: λ of the sum of absolute values.
          tol: largest absolute entry of the proximal gradient at which to stop.
          max_iter: iterations at most.
        """
        dtype = data.weights.dtype
        self.limit, self._plan, self._start = max_iter, plan, start
        strengths = jnp.asarray([strength, sparsity], dtype)
        self._problem = (data, coordinates, strengths)
        self._tol = jnp.asarray(tol, dtype)
        self._length = solving.segment_length(plan, data)

    def init(self) -> State:
        """Returns the state at the start."""
        return _init(self._plan, self._problem, self._start)

    def advance(self, state: State) -> State:
        """Returns the state a segment later."""
        until = min(int(state.iteration) + self._length, self.limit)
        return _segment(self._plan, self._problem, state, self._tol, until, self.limit)

    def status(self, state: State) -> solving.Status:
        """Reads where a state stands."""
        return solving.Status(
            int(state.iteration),
            float(state.value),
            float(state.norm),
            solving.REASONS[int(state.reason)],
        )

    def parameters(self, state: State) -> Parameters:
        """Returns the classifier; what the penalty made 0 is 0."""
        if int(state.iteration) == 0:
            return self._start
        _, coordinates, _ = self._problem
        return coordinates.parameters(
            np.asarray(state.v), intercept=self._plan.intercept
        )


def _smooth(plan: Plan, problem: Any, v: jax.Array) -> jax.Array:
    """Returns the objective without its L1 part."""
    data, coordinates, strengths = problem
    parameters = coordinates.parameters(v, intercept=plan.intercept)
    return objective(plan, parameters, data, strengths[0])


def _thresholds(plan: Plan, problem: Any, v: jax.Array) -> jax.Array:
    """Returns [R, e] the L1 penalty of a unit of each coordinate."""
    _, coordinates, strengths = problem
    units = coordinates.classes[:, None] * coordinates.factor[None, :]
    free = jnp.arange(v.shape[1]) == (v.shape[1] - 1 if plan.intercept else -1)
    return jnp.where(free[None], 0, strengths[1] * units)


@functools.partial(jax.jit, static_argnums=0)
def _init(plan: Plan, problem: Any, start: Parameters) -> State:
    with jax.numpy_dtype_promotion("standard"):
        _, coordinates, _ = problem
        v = coordinates.coordinates(start)
        value = _smooth(plan, problem, v)
        value = value + jnp.sum(_thresholds(plan, problem, v) * jnp.abs(v))
        zero, one = jnp.zeros((), jnp.int32), jnp.ones((), v.dtype)
        reason = solving.reason(jnp.isfinite(value), ())
        nothing = jnp.full((), jnp.nan, v.dtype)
        return State(v, v, one, one, value, nothing, zero, zero, reason)


def _proximal_step(
    plan: Plan, problem: Any, state: State, thresholds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the point after a step from `ahead`, and the curvature that fits it."""
    smooth = functools.partial(_smooth, plan, problem)
    here, gradient = jax.value_and_grad(smooth)(state.ahead)

    def point(curvature: jax.Array) -> jax.Array:
        moved = state.ahead - gradient / curvature
        return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - thresholds / curvature, 0)

    def too_long(carry: Any) -> jax.Array:
        curvature, tries = carry
        change = point(curvature) - state.ahead
        bound = here + jnp.sum(gradient * change)
        bound = bound + 0.5 * curvature * jnp.sum(jnp.square(change))
        slack = 8 * jnp.finfo(here.dtype).eps * jnp.abs(here)
        value = smooth(state.ahead + change)
        return ~(value <= bound + slack) & (tries < _MAX_BACKTRACKING)

    curvature, _ = jax.lax.while_loop(
        too_long,
        lambda carry: (2 * carry[0], carry[1] + 1),
        (state.curvature / _GROWTH, jnp.int32(0)),
    )
    return point(curvature), curvature


@functools.partial(jax.jit, static_argnums=0)
def _segment(
    plan: Plan, problem: Any, state: State, tol: jax.Array, until: Any, limit: Any
) -> State:
    with jax.numpy_dtype_promotion("standard"):
        _, coordinates, _ = problem
        thresholds = _thresholds(plan, problem, state.v)
        units = coordinates.classes[:, None] * coordinates.factor[None, :]

        def step(state: State) -> State:
            v, curvature = _proximal_step(plan, problem, state, thresholds)
            value = _smooth(plan, problem, v) + jnp.sum(thresholds * jnp.abs(v))
            residual = curvature * (state.ahead - v) / units
            norm = jnp.max(jnp.abs(residual))
            uphill = jnp.sum((state.ahead - v) * (v - state.v)) > 0
            momentum = 0.5 * (1 + jnp.sqrt(1 + 4 * jnp.square(state.momentum)))
            carried = (state.momentum - 1) / momentum * (v - state.v)
            ahead = jnp.where(uphill, v, v + carried)
            momentum = jnp.where(uphill, 1, momentum)
            little = solving.little(state.value, value, _SETTLED_ULPS)
            settled = jnp.where(little & (value <= state.value), state.settled + 1, 0)
            iteration = state.iteration + 1
            finite = solving.finite(value, norm)
            reason = solving.reason(
                finite,
                (norm <= tol, settled >= _SETTLED_ITERATIONS, iteration >= limit),
            )
            stepped = State(
                v, ahead, momentum, curvature, value, norm, iteration, settled, reason
            )
            kept = state._replace(reason=reason)
            return jax.lax.cond(finite, lambda: stepped, lambda: kept)

        return jax.lax.while_loop(
            lambda state: (state.reason == 0) & (state.iteration < until), step, state
        )
