"""L-BFGS by Optax, in whitened coordinates, compiled in segments of iterations."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoft.training.regression import solving
from jaxsoft.training.regression.objective import Data, Parameters, Plan, objective
from jaxsoft.training.regression.whitening import Whitening

_MEMORY = 10
# The objective counts as settled after so many iterations in a row that lower its
# lowest value by no more than so many units of its rounding, and the lowest norm of its
# gradient to no less than this share. The parameters go on to improve where the
# objective no longer shows it: over problems of 200 classes float32 ended up to 4e-6
# above the optimum, relative, after three iterations of no lower objective, 1.3e-6
# after twenty; by this rule, 7e-11.
_SETTLED_ITERATIONS, _SETTLED_ULPS, _SETTLED_GRADIENT = 40, 2.0, 0.8


class State(NamedTuple):
    """Where L-BFGS stands.

    Attributes:
      v: [R, e] coordinates.
      optimizer: Optax's state.
      value: the objective at `v`, NaN before the first segment, as the gradient is.
      gradient_norm: the largest absolute entry of its gradient in the parameters.
      iteration: iterations made.
      lowest: the lowest objective and the lowest norm after an iteration that made
        progress in either.
      settled: iterations since then.
      reason: index of why it stopped, 0 while it goes on.
    """

    v: jax.Array
    optimizer: Any
    value: jax.Array
    gradient_norm: jax.Array
    iteration: jax.Array
    lowest: tuple[jax.Array, jax.Array]
    settled: jax.Array
    reason: jax.Array


class LBFGS:
    """Minimises the objective of softmax regression; a `Solver`."""

    unit = "iteration"

    def __init__(
        self,
        plan: Plan,
        data: Data,
        coordinates: Whitening,
        start: Parameters,
        *,
        strength: float,
        tol: float,
        max_iter: int,
    ):
        """Keeps the problem.

        Args:
          plan: what is compiled.
          data: the rows.
          coordinates: to minimise in.
          start: the first classifier.
          strength: λ of the squared norm.
          tol: largest absolute entry of the gradient at which to stop.
          max_iter: iterations at most.
        """
        dtype = data.weights.dtype
        self.limit, self._plan, self._start = max_iter, plan, start
        self._problem = (data, coordinates, jnp.asarray(strength, dtype))
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
            float(state.gradient_norm),
            solving.REASONS[int(state.reason)],
        )

    def parameters(self, state: State) -> Parameters:
        """Returns the classifier."""
        if int(state.iteration) == 0:
            return self._start
        _, coordinates, _ = self._problem
        return coordinates.parameters(
            np.asarray(state.v), intercept=self._plan.intercept
        )


def _optimizer(dtype: Any) -> optax.GradientTransformationExtraArgs:
    return optax.lbfgs(memory_size=_MEMORY, linesearch=solving.line_search(dtype))


def _objective(plan: Plan, problem: Any, v: jax.Array) -> jax.Array:
    data, coordinates, strength = problem
    parameters = coordinates.parameters(v, intercept=plan.intercept)
    return objective(plan, parameters, data, strength)


def _gradient_norm(plan: Plan, problem: Any, gradient: jax.Array) -> jax.Array:
    """Returns the largest entry of the gradient in the parameters.

    With (W, b) = diag(c) v T the gradient in (W, b) is c⁻¹ g T⁻ᵀ.
    """
    _, coordinates, _ = problem
    zero = coordinates.parameters(jnp.zeros_like(gradient), intercept=plan.intercept)
    _, back = jax.vjp(coordinates.coordinates, zero)
    return solving.largest(back(gradient))


def _settled(
    state: State, value: jax.Array, norm: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the iterations without progress, and the lowest value and norm."""
    lowest_value, lowest_norm = state.lowest
    little = solving.little(lowest_value, value, _SETTLED_ULPS)
    little &= norm > _SETTLED_GRADIENT * lowest_norm
    lower = jnp.minimum(value, lowest_value), jnp.minimum(norm, lowest_norm)
    lowest = jax.tree.map(
        lambda kept, new: jnp.where(little, kept, new), state.lowest, lower
    )
    return jnp.where(little, state.settled + 1, 0), lowest


@functools.partial(jax.jit, static_argnums=0)
def _init(plan: Plan, problem: Any, start: Parameters) -> State:
    with jax.numpy_dtype_promotion("standard"):
        _, coordinates, _ = problem
        v = coordinates.coordinates(start)
        zero, unknown = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, v.dtype)
        optimizer = _optimizer(v.dtype).init(v)
        state = State(
            v, optimizer, unknown, unknown, zero, (unknown, unknown), zero, zero
        )
        return solving.strong_types(state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _segment(
    plan: Plan, problem: Any, state: State, tol: jax.Array, until: Any, limit: Any
) -> State:
    with jax.numpy_dtype_promotion("standard"):
        function = functools.partial(_objective, plan, problem)
        optimizer = _optimizer(state.v.dtype)

        def begin(state: State) -> State:
            value, gradient = jax.value_and_grad(function)(state.v)
            norm = _gradient_norm(plan, problem, gradient)
            after = optax.tree.set(state.optimizer, value=value, grad=gradient)
            reason = solving.reason(solving.finite(value, norm), (norm <= tol,))
            return state._replace(
                optimizer=after,
                value=value,
                gradient_norm=norm,
                lowest=(value, norm),
                reason=reason,
            )

        def step(state: State) -> State:
            value = optax.tree.get(state.optimizer, "value")
            gradient = optax.tree.get(state.optimizer, "grad")
            updates, after = optimizer.update(
                gradient,
                state.optimizer,
                state.v,
                value=value,
                grad=gradient,
                value_fn=function,
            )
            v: Any = optax.apply_updates(state.v, updates)
            value = optax.tree.get(after, "value")
            norm = _gradient_norm(plan, problem, optax.tree.get(after, "grad"))
            settled, lowest = _settled(state, value, norm)
            iteration = state.iteration + 1
            finite = solving.finite(value, norm)
            reason = solving.reason(
                finite,
                (norm <= tol, settled >= _SETTLED_ITERATIONS, iteration >= limit),
            )
            stepped = State(v, after, value, norm, iteration, lowest, settled, reason)
            # The run is over where not all is finite; the optimizer is not used again.
            kept = state._replace(optimizer=after, reason=reason)
            return jax.lax.cond(finite, lambda: stepped, lambda: kept)

        # Here, not in `_init`, it is compiled and traced beside the loop.
        state = jax.lax.cond(state.iteration == 0, begin, lambda state: state, state)
        return jax.lax.while_loop(
            lambda state: (state.reason == 0) & (state.iteration < until), step, state
        )
