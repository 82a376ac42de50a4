"""Newton's method with the whole Hessian, for few classes times features.

The direction is a Cholesky solve, the step Optax's backtracking line search.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from threadpoolctl import threadpool_limits

from jaxsoft.training.regression.full_batch_solver import (
    FullBatchSolver,
    Iterate,
    Problem,
    State,
    fell_little,
    largest,
    line_search,
    rose,
)
from jaxsoft.training.regression.objective import (
    Data,
    Parameters,
    Plan,
    drift,
    hessian,
)

__all__ = ["Newton"]

# Iterations between looks at Ctrl-C; few are needed in all.
_SEGMENT = 4
# A step from where half the squared Newton decrement, which estimates the distance to
# the optimum, is below this share of the objective lands on the optimum, if logits
# change by less than 1: the next distance is about the square of this one. Below the
# second share the point is there already.
_NEAR, _THERE = 1e-6, 1e-11
# Without a penalty light rows may decide where the optimum is, which the objective does
# not show: a step lands on it if the squared ranges of the rows' logits change by no
# more in all. One that changes them by more, and with no larger a share against the
# labels, goes on for ever: each step of Newton's method adds about 1 to those logits.
_NEAR_REACH = 1e-2
_AGAINST = 1e-6


class Memory(NamedTuple):
    """What Newton's method keeps.

    Attributes:
      search: the line search's state.
      gradient: at the point.
    """

    search: optax.OptState
    gradient: Parameters


class Newton(FullBatchSolver[Parameters, Memory]):
    """Newton steps; a point is the classifier itself, the rows are dense."""

    SETTLED_ITERATIONS = 2

    @classmethod
    def segment_length(cls, plan: Plan, data: Data) -> int:
        """Returns how many iterations a segment has."""
        return _SEGMENT

    def advance(self, state: State[Parameters, Memory]) -> State[Parameters, Memory]:
        """Returns the state a segment later."""
        # On a CPU the solve is LAPACK's, whose threads wait for each other for
        # seconds where cores are shared.
        with threadpool_limits(1, "blas"):
            return jax.block_until_ready(super().advance(state))

    @classmethod
    def first(
        cls, plan: Plan, problem: Problem, start: Parameters
    ) -> tuple[Parameters, Memory]:
        """Returns the start, and the line search's first state."""
        if not plan.reference:
            # A part that all classes share would stay: steps have none of it.
            start = jax.tree.map(
                lambda array: array - jnp.mean(array, 0, keepdims=True), start
            )
        search = line_search(start.kernel.dtype).init(cast(optax.Params, start))
        return start, Memory(search, optax.tree.full_like(start, jnp.nan))

    @classmethod
    def evaluate(
        cls, plan: Plan, problem: Problem, state: State[Parameters, Memory]
    ) -> Iterate[Parameters, Memory]:
        """Returns value and gradient at the start, which is near no optimum yet."""
        value, gradient = jax.value_and_grad(
            lambda parameters: problem.objective(plan, parameters)
        )(state.point)
        search = optax.tree.set(state.memory.search, value=value, grad=gradient)
        memory = Memory(search, gradient)
        return Iterate(state.point, memory, value, largest(gradient), near=False)

    @classmethod
    def iterate(
        cls, plan: Plan, problem: Problem, state: State[Parameters, Memory]
    ) -> Iterate[Parameters, Memory]:
        """Returns the point that the line search finds along the Newton step."""
        gradient = state.memory.gradient
        direction, decrement = _direction(plan, problem, state.point, gradient)
        updates, search = line_search(problem.strength.dtype).update(
            cast(optax.Updates, direction),
            state.memory.search,
            cast(optax.Params, state.point),
            value=state.value,
            grad=gradient,
            value_fn=lambda parameters: problem.objective(plan, parameters),
        )
        moved = optax.apply_updates(cast(optax.Params, state.point), updates)
        value = optax.tree.get(search, "value")
        arrived = moved, Memory(search, optax.tree.get(search, "grad")), value
        little = fell_little(state.value, value)
        # Rounding may leave no step that goes down.
        point, memory, value = jax.tree.map(
            lambda old, new: jnp.where(rose(state.value, value), old, new),
            (state.point, state.memory, state.value),
            arrived,
        )
        change = drift(plan, direction, problem.data)
        loose = jnp.all(problem.strength == 0)
        share = 0.5 * decrement / jnp.abs(state.value)
        near = (share <= _NEAR) & (change.reach <= 1) | (share <= _THERE)
        # No objective is below 0.
        near = near | (state.value <= jnp.finfo(state.value.dtype).eps)
        return Iterate(
            point,
            memory,
            value,
            largest(memory.gradient),
            little=little,
            near=near & ~(loose & (change.reach > _NEAR_REACH)),
            unbounded=loose
            & (change.reach > _NEAR_REACH)
            & (change.against <= _AGAINST * change.reach),
        )


def _direction(
    plan: Plan, problem: Problem, parameters: Parameters, gradient: Parameters
) -> tuple[Parameters, jax.Array]:
    """Returns the Newton step, and the squared Newton decrement gᵀ H⁻¹ g."""
    curved = hessian(plan, parameters, problem.data)
    count, width, _, _ = curved.shape
    strength = jnp.pad(problem.strength, (0, int(plan.intercept)))
    # A shift of all classes alike changes no probability, and the gradient has none of
    # it: any curvature along it leaves the step as it is.
    classes, columns = jnp.arange(count), jnp.arange(width)
    diagonal = curved[classes[:, None], columns, classes[:, None], columns]
    if not plan.reference:
        shift = jnp.mean(diagonal, 0) / count
        curved = curved.at[:, columns, :, columns].add(
            jnp.broadcast_to(shift[:, None, None], (width, count, count))
        )
    size = count * width
    curved = curved.reshape(size, size)
    curved = curved + jnp.diag(jnp.tile(strength, count))
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
