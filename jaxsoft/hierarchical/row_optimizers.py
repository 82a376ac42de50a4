"""Optimizers that change no rows but those that have a gradient.

They read and write no others either, but where a group of the gradient has as many rows
as the parameters: then a gradient in all rows is added up first, and no row is sought.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.exporting import PyTree, exportable_namedtuple
from jaxsoft.hierarchical.row_gradients import RowGradient
from jaxsoft.hierarchical.same_rows import SameRows

__all__ = ["RowOptimizer", "RowState", "row_adagrad", "row_adam", "row_sgd"]

Rate = float | optax.Schedule
# From the gradients of some rows and their state, to what to add, and the new state.
Step = Callable[[jax.Array, tuple, jax.Array], tuple[jax.Array, tuple]]
# The same at a rate that is known.
Move = Callable[[jax.Array, tuple], tuple[jax.Array, tuple]]
Carry = TypeVar("Carry")


@exportable_namedtuple
class RowState(NamedTuple):
    """What an optimizer of rows remembers.

    Attributes:
      count: [] int32, the updates so far, which a schedule is a function of.
      slots: for each array of the parameters, [R, ...], a tuple of arrays with a number
        or a row for each of its rows. `row_sgd` has none; `row_adagrad` the sum of
        squares, [R, ...]; `row_adam` the mean and behind it, along the last axis, the
        mean of squares, [R, ..., 2·D] for parameters [R, ..., D], but two arrays for
        parameters [R]; and the updates of each row, [R] int32.
    """

    count: jax.Array
    slots: PyTree


class RowOptimizer(NamedTuple):
    """An optimizer whose updates touch the rows of a `RowGradient` alone.

    Attributes:
      init: from parameters, an array [R, ...] or a pytree of them, to a `RowState`.
      update: from `(params, row_gradient, state)` to the new `(params, state)`. Under
        `jax.jit` with `params` and `state` donated it works in place.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import RowGradient, row_sgd
      >>> optimizer, params = row_sgd(0.1), jnp.zeros((3, 2))
      >>> gradient = RowGradient(jnp.array([2]), jnp.ones((1, 2)))
      >>> params, _ = optimizer.update(params, gradient, optimizer.init(params))
      >>> print(params)
      [[ 0.   0. ]
       [ 0.   0. ]
       [-0.1 -0.1]]
    """

    init: Callable[[PyTree], RowState]
    update: Callable[[PyTree, RowGradient, RowState], tuple[PyTree, RowState]]


def row_sgd(learning_rate: Rate) -> RowOptimizer:
    """Stochastic gradient descent in the rows that have a gradient.

    Args:
      learning_rate: a number >= 0, or a schedule from the count of updates to one.

    Returns:
      A `RowOptimizer`.

    Raises:
      TypeError: if the learning rate is neither a number nor callable.
      ValueError: if it is negative.

    Notes:
      Equal to `optax.sgd` on the dense gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import RowGradient, row_sgd
      >>> optimizer, params = row_sgd(0.1), jnp.zeros((3, 1))
      >>> gradient = RowGradient(jnp.array([2, 2]), jnp.ones((2, 1)))
      >>> params, _ = optimizer.update(params, gradient, optimizer.init(params))
      >>> print(params.ravel())
      [ 0.   0.  -0.2]

    References:
      Robbins and Monro, A Stochastic Approximation Method, 1951.
    """

    def step(gradient, slots, rate):
        return -rate * gradient, slots

    return _optimizer(learning_rate, lambda leaf: (), step, adds=True)


def row_adagrad(
    learning_rate: Rate,
    *,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
) -> RowOptimizer:
    """Adagrad in the rows that have a gradient.

    `s += g²; θ -= rate · g / sqrt(s + eps)`, g the sum over rows of equal number.

    Args:
      learning_rate: a number >= 0, or a schedule from the count of updates to one.
      initial_accumulator_value: s >= 0 before the first update.
      eps: >= 0.

    Returns:
      A `RowOptimizer`; s is kept in float32 (float64 for such parameters).

    Raises:
      TypeError: if the learning rate is neither a number nor callable.
      ValueError: if a number is negative.

    Notes:
      Equal to `optax.adagrad` on the dense gradient: where that is 0 nothing moves.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import RowGradient, row_adagrad
      >>> optimizer, params = row_adagrad(0.1), jnp.zeros((3, 1))
      >>> gradient = RowGradient(jnp.array([2, 2]), 50 * jnp.ones((2, 1)))
      >>> params, _ = optimizer.update(params, gradient, optimizer.init(params))
      >>> print([f"{x:.3f}" for x in params.ravel()])
      ['0.000', '0.000', '-0.100']

    References:
      Duchi, Hazan and Singer, Adaptive Subgradient Methods, JMLR 2011.
    """
    first = checks.scalar_in(
        "initial_accumulator_value", initial_accumulator_value, 0, float("inf")
    )
    eps = checks.scalar_in("eps", eps, 0, float("inf"))

    def step(gradient, slots, rate):
        total = slots[0] + gradient**2
        # As in Optax: where the sum is 0, nothing moves.
        inverse = jnp.where(total > 0, lax.rsqrt(total + eps), 0)
        return -rate * gradient * inverse, (total,)

    def slots(leaf):
        return (jnp.full(leaf.shape, first, _wide(leaf.dtype)),)

    return _optimizer(learning_rate, slots, step)


def row_adam(
    learning_rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> RowOptimizer:
    """Adam in the rows that have a gradient, each with a time of its own.

    `m = b1·m + (1 - b1)·g; v = b2·v + (1 - b2)·g²; θ -= rate · m̂ / (sqrt(v̂) + eps)`,
    with `m̂ = m / (1 - b1^t)`, `v̂ = v / (1 - b2^t)`, g the sum over rows of equal number
    and t the updates of this row.

    Args:
      learning_rate: a number >= 0, or a schedule from the count of updates to one.
      b1: decay of the mean in [0, 1].
      b2: decay of the mean of squares in [0, 1].
      eps: >= 0.

    Returns:
      A `RowOptimizer`; moments are kept in float32 (float64 for such parameters).

    Raises:
      TypeError: if the learning rate is neither a number nor callable.
      ValueError: if a number is out of its range.

    Notes:
      Not `optax.adam` on the dense gradient, but what that does to a row alone in the
      updates that the row takes part in. Dense Adam moves every row in every update by
      its old mean, and lets moments decay meanwhile; here a row that is not visited
      stays as it is, with its moments. As t counts a row's own updates, its first one
      is a step of `rate` whenever it comes; by the count of all updates, as in other
      lazy Adams, it would be 3.2 times that.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import RowGradient, row_adam
      >>> optimizer, params = row_adam(0.1), jnp.zeros((3, 1))
      >>> gradient = RowGradient(jnp.array([2, 2]), jnp.ones((2, 1)))
      >>> params, _ = optimizer.update(params, gradient, optimizer.init(params))
      >>> print([f"{x:.3f}" for x in params.ravel()])
      ['0.000', '0.000', '-0.100']

    References:
      Kingma and Ba, Adam, arXiv:1412.6980.
    """
    b1 = checks.scalar_in("b1", b1, 0, 1)
    b2 = checks.scalar_in("b2", b2, 0, 1)
    eps = checks.scalar_in("eps", eps, 0, float("inf"))

    def step(gradient, slots, rate):
        *moments, visits = slots
        visits = visits + 1
        mean, square = moments if len(moments) == 2 else jnp.split(moments[0], 2, -1)
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        time = visits.astype(gradient.dtype)
        time = time.reshape(*time.shape, *(1,) * (gradient.ndim - 1))
        unbiased = mean / (1 - b1**time)
        spread = jnp.sqrt(square / (1 - b2**time))
        moved = -rate * unbiased / (spread + eps)
        if len(moments) == 2:
            return moved, (mean, square, visits)
        return moved, (jnp.concatenate([mean, square], axis=-1), visits)

    def slots(leaf):
        dtype, visits = _wide(leaf.dtype), jnp.zeros(leaf.shape[:1], jnp.int32)
        if leaf.ndim == 1:
            # TPUs pad the last axis to 128 numbers: two a row take 64 times as many.
            return *(jnp.zeros(leaf.shape, dtype) for _ in range(2)), visits
        # A row of both moments is one place in memory, where a row of each is two.
        *shape, features = leaf.shape
        return jnp.zeros((*shape, 2 * features), dtype), visits

    return _optimizer(learning_rate, slots, step)


def _wide(dtype: DTypeLike) -> DTypeLike:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _optimizer(
    learning_rate: Rate,
    slots_of: Callable[[jax.Array], tuple],
    step: Step,
    *,
    adds: bool = False,
) -> RowOptimizer:
    """Returns an optimizer from what it does to rows.

    Args:
      learning_rate: a number or a schedule.
      slots_of: from an array of the parameters to its state.
      step: what happens to rows.
      adds: whether rows of equal number may as well come one after another.
    """
    if not callable(learning_rate):
        checks.scalar_in("learning_rate", learning_rate, 0, float("inf"))

    def init(params):
        return RowState(jnp.zeros((), jnp.int32), jax.tree.map(slots_of, params))

    def update(params, gradient, state):
        leaves, form = jax.tree.flatten(params)
        values = form.flatten_up_to(gradient.values)
        slots = form.flatten_up_to(state.slots)
        count = _num_rows(leaves, values, gradient)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        groups = _Groups.of(gradient, values, count)

        def move(own, before):
            return step(own, before, jnp.asarray(rate, own.dtype))

        if adds and all(leaf.dtype == _wide(leaf.dtype) for leaf in leaves):
            leaves = groups.added_to(leaves, lambda own: move(own, ())[0])
        elif count <= groups.rows.shape[1]:
            # A gradient in all rows takes no more memory than a group's.
            leaves, slots = _update_all(move, groups, leaves, slots)
        else:
            leaves, slots = _update_visited(move, groups, leaves, slots)
        state = RowState(state.count + 1, form.unflatten(slots))
        return form.unflatten(leaves), state

    return RowOptimizer(init, update)


class _Groups(NamedTuple):
    """The groups of a gradient in R rows.

    Attributes:
      rows: [G, N] int32 in [0, R], R for what is no row.
      scales: [G, N], or None.
      values: for each array of the parameters [N, ...] with scales, else [G, N, ...].
    """

    rows: jax.Array
    scales: jax.Array | None
    values: list[jax.Array]

    @classmethod
    def of(cls, gradient: RowGradient, values: list, count: int) -> _Groups:
        """Returns the groups of a gradient in `count` rows."""
        leading, size = gradient.rows.ndim, gradient.rows.shape[-1]
        known = (gradient.rows >= 0) & (gradient.rows < count)
        rows = jnp.where(known, gradient.rows, count).reshape(-1, size)
        if gradient.scales is not None:
            return cls(rows, gradient.scales.reshape(-1, size), values)
        values = [own.reshape(*rows.shape, *own.shape[leading:]) for own in values]
        return cls(rows, None, values)

    def fold(self, step: Callable[..., Carry], start: Carry) -> Carry:
        """Returns the last carry of `step(carry, rows, values_of)`, group after group.

        `values_of` takes the place of an array of the parameters and a dtype, and
        returns the gradient's values for it, [N, ...].
        """

        def body(carry, group):
            rows, scales, values = group

            def values_of(place, dtype):
                if scales is None:
                    return values[place].astype(dtype)
                own = self.values[place].astype(dtype)
                return own * scales.astype(dtype).reshape(-1, *(1,) * (own.ndim - 1))

            return step(carry, rows, values_of), None

        own = self.values if self.scales is None else None
        return lax.scan(body, start, (self.rows, self.scales, own))[0]

    def added_to(
        self, arrays: list[jax.Array], change: Callable[[jax.Array], jax.Array]
    ) -> list[jax.Array]:
        """Adds to arrays [R, ...] what comes to their rows, changed, in their dtype."""

        def add(arrays, rows, values_of):
            return [
                array.at[rows].add(change(values_of(place, array.dtype)), mode="drop")
                for place, array in enumerate(arrays)
            ]

        return self.fold(add, arrays)


def _update_all(
    move: Move, groups: _Groups, leaves: list[jax.Array], slots: list[tuple]
) -> tuple[list[jax.Array], list[tuple]]:
    """Updates the visited rows, from gradients in all rows."""
    visited = jnp.zeros(len(leaves[0]), bool)
    visited = visited.at[groups.rows.reshape(-1)].set(True, mode="drop")
    zeros = [jnp.zeros(leaf.shape, _wide(leaf.dtype)) for leaf in leaves]
    gradients = groups.added_to(mesh_axes.like(zeros, groups), lambda own: own)
    new = []
    for leaf, before, gradient in zip(leaves, slots, gradients, strict=True):
        moved, after = move(gradient, before)
        leaf, *after = (
            jnp.where(visited.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
            for new, old in zip(
                (leaf + moved.astype(leaf.dtype), *after), (leaf, *before), strict=True
            )
        )
        new.append((leaf, tuple(after)))
    return [leaf for leaf, _ in new], [after for _, after in new]


def _update_visited(
    move: Move, groups: _Groups, leaves: list[jax.Array], slots: list[tuple]
) -> tuple[list[jax.Array], list[tuple]]:
    """Updates the visited rows, and reads and writes no others."""

    def update(carry, rows, values_of):
        same = SameRows.of(rows, len(leaves[0]))
        sure = {"mode": "drop", "unique_indices": True}
        new = []
        for place, (leaf, slots) in enumerate(zip(*carry, strict=True)):
            gradient = same.add(values_of(place, _wide(leaf.dtype)))
            before = tuple(slot.at[same.rows].get(mode="clip") for slot in slots)
            moved, after = move(gradient, before)
            leaf = leaf.at[same.rows].add(moved.astype(leaf.dtype), **sure)
            after = [
                slot.at[same.rows].set(value, **sure)
                for slot, value in zip(slots, after, strict=True)
            ]
            new.append((leaf, tuple(after)))
        return [leaf for leaf, _ in new], [slots for _, slots in new]

    return groups.fold(update, (leaves, slots))


def _num_rows(leaves: list, values: list, gradient: RowGradient) -> int:
    """Returns the number of rows of parameters whose gradient fits."""
    if not leaves or any(leaf.ndim < 1 for leaf in leaves):
        raise ValueError("`params` must hold arrays of shape [R, ...].")
    count = leaves[0].shape[0]
    leading = gradient.rows.shape
    if gradient.scales is not None:
        checks.shape("scales", gradient.scales, leading, "rows.shape")
        leading = leading[-1:]
    for leaf, own in zip(leaves, values, strict=True):
        checks.shape("params", leaf, (count, *leaf.shape[1:]), "(R, ...)")
        checks.shape("values", own, (*leading, *leaf.shape[1:]), "(..., N, ...)")
    return count
