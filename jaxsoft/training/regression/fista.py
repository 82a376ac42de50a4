"""FISTA: accelerated proximal gradient descent, for penalties with an L1 part.

In coordinates that scale each feature, so that the L1 penalty stays separable; the
step follows the curvature by backtracking, and momentum restarts where it points
uphill.

References:
  Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm for Linear
  Inverse Problems, SIAM Journal on Imaging Sciences 2, 2009; O'Donoghue and Candès,
  Adaptive Restart for Accelerated Gradient Schemes, arXiv:1204.3982.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft.training.regression.full_batch_solver import (
    FullBatchSolver,
    Iterate,
    Problem,
    State,
    fell_little,
)
from jaxsoft.training.regression.objective import Parameters, Plan

__all__ = ["FISTA"]

# A step that fitted is tried so much longer the next time.
_GROWTH = 1.1
_MAX_BACKTRACKING = 60


class Memory(NamedTuple):
    """What FISTA keeps.

    Attributes:
      ahead: [R, e] where momentum carries the coordinates.
      momentum: t of the acceleration.
      curvature: 1 / step.
    """

    ahead: jax.Array
    momentum: jax.Array
    curvature: jax.Array


class FISTA(FullBatchSolver[jax.Array, Memory]):
    """Accelerated proximal steps; a point is [R, e] coordinates of diagonal factor.

    What the penalty made 0 is 0 in the parameters, too.
    """

    SETTLED_ITERATIONS = 10

    @classmethod
    def first(
        cls, plan: Plan, problem: Problem, start: Parameters
    ) -> tuple[jax.Array, Memory]:
        """Returns the coordinates of the start, without momentum."""
        assert problem.coordinates is not None
        v = problem.coordinates.coordinates(start)
        one = jnp.ones((), v.dtype)
        return v, Memory(v, one, one)

    @classmethod
    def evaluate(
        cls, plan: Plan, problem: Problem, state: State[jax.Array, Memory]
    ) -> Iterate[jax.Array, Memory]:
        """Returns the value at the start."""
        value = problem.objective(plan, state.point)
        penalty = jnp.sum(_thresholds(plan, problem) * jnp.abs(state.point))
        unknown = jnp.full((), jnp.nan, value.dtype)
        return Iterate(
            state.point, state.memory, value + penalty, unknown, unknown=True
        )

    @classmethod
    def iterate(
        cls, plan: Plan, problem: Problem, state: State[jax.Array, Memory]
    ) -> Iterate[jax.Array, Memory]:
        """Returns the point after a proximal step from where momentum leads."""
        ahead, momentum, _ = state.memory
        thresholds = _thresholds(plan, problem)
        v, curvature = _proximal_step(plan, problem, state.memory, thresholds)
        value = problem.objective(plan, v) + jnp.sum(thresholds * jnp.abs(v))
        residual = curvature * (ahead - v) / _units(problem)
        uphill = jnp.sum((ahead - v) * (v - state.point)) > 0
        longer = 0.5 * (1 + jnp.sqrt(1 + 4 * jnp.square(momentum)))
        carried = (momentum - 1) / longer * (v - state.point)
        memory = Memory(
            jnp.where(uphill, v, v + carried), jnp.where(uphill, 1, longer), curvature
        )
        little = fell_little(state.value, value) & (value <= state.value)
        return Iterate(v, memory, value, jnp.max(jnp.abs(residual)), little)


def _units(problem: Problem) -> jax.Array:
    """Returns [R, e] the entry of the parameters that a unit of each coordinate is."""
    assert problem.coordinates is not None
    return problem.coordinates.classes[:, None] * problem.coordinates.factor[None, :]


def _thresholds(plan: Plan, problem: Problem) -> jax.Array:
    """Returns [R, e] the L1 penalty of a unit of each coordinate."""
    units = _units(problem)
    sparsity = jnp.pad(problem.sparsity, (0, int(plan.intercept)))
    return sparsity[None] * units


def _proximal_step(
    plan: Plan, problem: Problem, memory: Memory, thresholds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the point after a step from `ahead`, and the curvature that fits it."""
    ahead = memory.ahead

    def smooth(v: jax.Array) -> jax.Array:
        return problem.objective(plan, v)

    here, gradient = jax.value_and_grad(smooth)(ahead)

    def point(curvature: jax.Array) -> jax.Array:
        moved = ahead - gradient / curvature
        return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - thresholds / curvature, 0)

    def too_long(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        curvature, tries = carry
        change = point(curvature) - ahead
        bound = here + jnp.sum(gradient * change)
        bound = bound + 0.5 * curvature * jnp.sum(jnp.square(change))
        slack = 8 * jnp.finfo(here.dtype).eps * jnp.abs(here)
        value = smooth(ahead + change)
        return ~(value <= bound + slack) & (tries < _MAX_BACKTRACKING)

    curvature, _ = jax.lax.while_loop(
        too_long,
        lambda carry: (2 * carry[0], carry[1] + 1),
        (memory.curvature / _GROWTH, jnp.int32(0)),
    )
    return point(curvature), curvature
