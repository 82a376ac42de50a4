"""Newton's method with the whole Hessian, for few classes times features.

The direction is a Cholesky solve, the step Optax's backtracking line search, and a
segment a compiled loop of iterations, as in `lbfgs`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

from jaxsoft.training.regression import solving
from jaxsoft.training.regression.objective import (
    Data,
    Parameters,
    Plan,
    hessian,
    objective,
)

# Iterations between looks at Ctrl-C; few are needed in all.
_SEGMENT = 4
# A step from where half the squared Newton decrement, which estimates the distance to
# the optimum, is below this share of the objective lands on the optimum: the next
# distance is about the square of this one.
_NEAR = 1e-6
# Iterations in a row without progress, and what progress is in units of rounding.
_SETTLED_ITERATIONS, _SETTLED_ULPS = 2, 2.0


class State(NamedTuple):
    """Where Newton's method stands.

    Attributes:
      parameters: the classifier.
      search: the line search's state.
      value: the objective, NaN before the first segment.
      gradient: its gradient, likewise.
      iteration: iterations made.
      settled: iterations in a row that hardly lowered the objective.
      reason: index of why it stopped, 0 while it goes on.
    """

    parameters: Parameters
    search: Any
    value: jax.Array
    gradient: Parameters
    iteration: jax.Array
    settled: jax.Array
    reason: jax.Array


class Newton:
    """Minimises the objective of softmax regression; a `Solver`."""

    unit = "iteration"

    def __init__(
        self,
        plan: Plan,
        data: Data,
        start: Parameters,
        *,
        strength: float,
        tol: float,
        max_iter: int,
    ):
        """Keeps the problem.

        Args:
          plan: what is compiled.
          data: the rows, dense.
          start: the first classifier.
          strength: λ of the squared norm.
          tol: largest absolute entry of the gradient at which to stop.
          max_iter: iterations at most.
        """
        dtype = data.weights.dtype
        self.limit, self._plan, self._start = max_iter, plan, start
        self._problem = (data, jnp.asarray(strength, dtype))
        self._tol = jnp.asarray(tol, dtype)

    def init(self) -> State:
        """Returns the state at the start."""
        return _init(self._start)

    def advance(self, state: State) -> State:
        """Returns the state a segment later."""
        until = min(int(state.iteration) + _SEGMENT, self.limit)
        # On a CPU the solve is LAPACK's, whose threads wait for each other for
        # seconds where cores are shared.
        with threadpool_limits(1, "blas"):
            state = _segment(
                self._plan, self._problem, state, self._tol, until, self.limit
            )
            return jax.block_until_ready(state)

    def status(self, state: State) -> solving.Status:
        """Reads where a state stands."""
        return solving.Status(
            int(state.iteration),
            float(state.value),
            max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(state.gradient)),
            solving.REASONS[int(state.reason)],
        )

    def parameters(self, state: State) -> Parameters:
        """Returns the classifier."""
        return state.parameters


def _objective(plan: Plan, problem: Any, parameters: Parameters) -> jax.Array:
    data, strength = problem
    return objective(plan, parameters, data, strength)


@jax.jit
def _init(start: Parameters) -> State:
    with jax.numpy_dtype_promotion("standard"):
        dtype = start.kernel.dtype
        zero, unknown = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, dtype)
        search = solving.line_search(dtype).init(start)
        gradient = optax.tree.full_like(start, jnp.nan)
        state = State(start, search, unknown, gradient, zero, zero, zero)
        return solving.strong_types(state)


def _direction(
    plan: Plan, problem: Any, parameters: Parameters, gradient: Parameters
) -> tuple[Parameters, jax.Array]:
    """Returns the Newton step, and the squared Newton decrement gᵀ H⁻¹ g."""
    data, strength = problem
    curved = hessian(plan, parameters, data)
    count, width, _, _ = curved.shape
    free = jnp.arange(width) == (width - 1 if plan.intercept else width)
    # Where nothing is penalised, a shift of all classes alike changes nothing, and
    # the gradient has none of it: any curvature along it leaves the step as it is.
    classes, columns = jnp.arange(count), jnp.arange(width)
    diagonal = curved[classes[:, None], columns, classes[:, None], columns]
    if not plan.reference:
        loose = jnp.where(free | (strength == 0), jnp.mean(diagonal, 0), 0)
        curved = curved.at[:, columns, :, columns].add(
            jnp.broadcast_to((loose / count)[:, None, None], (width, count, count))
        )
    diagonal = diagonal + jnp.where(free, 0, strength)[None]
    size = count * width
    curved = curved.reshape(size, size)
    curved = curved + jnp.diag(jnp.tile(jnp.where(free, 0, strength), count))
    scale = jnp.sqrt(jnp.maximum(jnp.diag(curved), jnp.finfo(curved.dtype).tiny))
    curved = curved / scale[:, None] / scale[None, :]
    ridge = 4 * jnp.finfo(curved.dtype).eps * size**0.5
    factor = jax.scipy.linalg.cho_factor(
        curved + ridge * jnp.eye(size, dtype=curved.dtype), lower=True
    )
    kernel, bias = gradient
    flat = kernel if bias is None else jnp.concatenate([kernel, bias[:, None]], 1)
    flat = flat.reshape(-1) / scale
    solved = jax.scipy.linalg.cho_solve(factor, flat)
    # A matrix that rounding made indefinite has no factor: go down by its diagonal.
    solved = jnp.where(jnp.all(jnp.isfinite(solved)), solved, flat)
    step = -(solved / scale).reshape(count, width)
    parts = (step, None) if bias is None else (step[:, :-1], step[:, -1])
    return Parameters(*parts), jnp.sum(flat * solved)


@functools.partial(jax.jit, static_argnums=0)
def _segment(
    plan: Plan, problem: Any, state: State, tol: jax.Array, until: Any, limit: Any
) -> State:
    with jax.numpy_dtype_promotion("standard"):
        function = functools.partial(_objective, plan, problem)
        search = solving.line_search(tol.dtype)

        def begin(state: State) -> State:
            value, gradient = jax.value_and_grad(function)(state.parameters)
            reason = solving.reason(solving.finite(value, gradient), ())
            after = optax.tree.set(state.search, value=value, grad=gradient)
            return state._replace(
                search=after, value=value, gradient=gradient, reason=reason
            )

        def step(state: State) -> State:
            direction, decrement = _direction(
                plan, problem, state.parameters, state.gradient
            )
            after: Any
            updates, after = search.update(
                direction,
                state.search,
                state.parameters,
                value=state.value,
                grad=state.gradient,
                value_fn=function,
            )
            parameters: Any = optax.apply_updates(state.parameters, updates)
            value, gradient = after.value, after.grad
            little = solving.little(state.value, value, _SETTLED_ULPS)
            settled = jnp.where(little, state.settled + 1, 0)
            near = 0.5 * decrement <= _NEAR * jnp.abs(state.value)
            iteration = state.iteration + 1
            finite = solving.finite(value, gradient)
            reason = solving.reason(
                finite,
                (
                    near & (solving.largest(gradient) <= tol),
                    settled >= _SETTLED_ITERATIONS,
                    iteration >= limit,
                ),
            )
            stepped = State(
                parameters, after, value, gradient, iteration, settled, reason
            )
            kept = state._replace(search=after, reason=reason)
            return jax.lax.cond(finite, lambda: stepped, lambda: kept)

        # Here, not in `_init`, it is compiled and traced beside the loop.
        state = jax.lax.cond(state.iteration == 0, begin, lambda state: state, state)
        return jax.lax.while_loop(
            lambda state: (state.reason == 0) & (state.iteration < until), step, state
        )
