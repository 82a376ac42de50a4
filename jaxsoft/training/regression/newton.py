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
)
from jaxsoft.training.regression.objective import Data, Parameters, Plan, hessian

__all__ = ["Newton"]

# Iterations between looks at Ctrl-C; few are needed in all.
_SEGMENT = 4
# A step from where half the squared Newton decrement, which estimates the distance to
# the optimum, is below this share of the objective lands on the optimum: the next
# distance is about the square of this one.
_NEAR = 1e-6


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
        gradient = optax.tree.get(search, "grad")
        return Iterate(
            cast(Parameters, moved),
            Memory(search, gradient),
            value,
            largest(gradient),
            little=fell_little(state.value, value),
            near=0.5 * decrement <= _NEAR * jnp.abs(state.value),
        )


def _direction(
    plan: Plan, problem: Problem, parameters: Parameters, gradient: Parameters
) -> tuple[Parameters, jax.Array]:
    """Returns the Newton step, and the squared Newton decrement gᵀ H⁻¹ g."""
    strength = problem.strength
    curved = hessian(plan, parameters, problem.data)
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
