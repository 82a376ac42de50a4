"""The compiled part of minibatch training: some steps of an optimizer in one loop.

Shapes: `B` rows a batch, `d` features, `V` classes, `k` batches a block.

Each batch's loss is weighted so that the mean over an epoch's batches is the objective,
`Σ w·loss / Σ w + penalty / 2 · ‖kernels‖²`, whatever weights and padding a batch has:
gradients are unbiased, and padding, of weight 0, counts for nothing.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxsoft import RowGradient, linear_cross_entropy, softmax_cross_entropy
from jaxsoft.hierarchical.row_optimizers import RowState, row_adam
from jaxsoft.nn import HierarchicalSoftmaxHead
from jaxsoft.training.heads import Head, Params, head_rows, with_head_rows
from jaxsoft.training.mesh import replicated
from jaxsoft.training.regression.objective import Array

__all__ = [
    "Batch",
    "MakeOptimizer",
    "MinibatchState",
    "Numbers",
    "Plan",
    "Tables",
    "WarmupCosine",
    "batch_loss",
    "half_squares",
    "init_rows",
    "run_segment",
]

# Why a run stopped, in `MinibatchState.reason`.
RUNNING, NO_PROGRESS, NOT_FINITE = range(3)
# After a plateau the rate goes down to 0 over as many steps as there were, and over no
# fewer than this many epochs.
LEAST_EPOCHS_DOWN = 20

# From a learning rate to the transformation; its state does not depend on the rate.
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]


# What a head has besides parameters, an `nnx.State`; of row updates the visits too.
Tables: TypeAlias = Params


class Batch(NamedTuple):
    """Rows of a step, or a block of them with a leading axis.

    Attributes:
      features: `[B, d]`.
      labels: `[B]` int32; None with targets alone.
      weights: `[B]`, 0 for padding.
      targets: `[B, V]`, a teacher's probabilities, or None.
    """

    features: Array
    labels: Array
    weights: Array
    targets: Array = None


class WarmupCosine(NamedTuple):
    """A learning rate that goes up linearly, then down to 0 along a cosine.

    Its numbers are arguments of the program, which Optax's schedules would compile in.

    Attributes:
      peak: the largest rate.
      warmup: steps on the way up, at least 1.
      decay: steps on the way down, at least 1; infinity for a rate that stays.
    """

    peak: Array
    warmup: Array
    decay: Array

    def at(self, step: Array) -> Array:
        """The rate of the update after `step` of them."""
        step = step.astype(jnp.result_type(self.peak))
        way = jnp.clip((step - self.warmup) / self.decay, 0, 1)
        up = jnp.minimum((step + 1) / self.warmup, 1)
        return self.peak * up * (1 + jnp.cos(jnp.pi * way)) / 2


class Numbers(NamedTuple):
    """What a step depends on besides parameters and rows.

    Attributes:
      share: `S / Σ w`, the factor of a batch's weighted loss.
      penalty: `1 / (C · Σ w)`.
      steps_per_epoch: `S`.
      tol: the least improvement of an epoch's objective.
      patience: epochs without one that are a plateau.
      rate: of a plan with the default schedule.
    """

    share: Array
    penalty: Array
    steps_per_epoch: Array
    tol: Array
    patience: Array
    rate: WarmupCosine


class MinibatchState(NamedTuple):
    """All that the rest of a run depends on.

    Attributes:
      params: `{"kernel": [V, d], "bias": [V]}`, or a head's `nnx.State`.
      optimizer: Optax's state, or that of the optimizer of rows.
      step: updates made.
      place: of these, in this epoch.
      mean: the mean objective of this epoch's batches so far.
      last: that of the last whole epoch, NaN before there is one.
      best: the least one.
      stale: epochs since it improved by more than `tol`.
      plateau: the steps made when progress stopped and the rate began to go down; -1
        before.
      reason: why the run stopped.
    """

    params: Params
    optimizer: Array
    step: Array
    place: Array
    mean: Array
    last: Array
    best: Array
    stale: Array
    plateau: Array
    reason: Array


@dataclass(frozen=True)
class Plan:
    """What a compiled program is made for; hashable, equal for equal programs.

    Attributes:
      optimizer: from the rate to the transformation.
      schedule: the caller's learning rate by step; None takes `Numbers.rate`.
      mesh: with the axis `data`.
      by_rows: whether updates touch the rows on the labels' paths alone.
      anneals: whether the rate goes down after a plateau; where the optimizer has its
        own, a plateau ends the run.
      graph: structure of a head of `jaxsoft.nn`; None for the full head.
      intercept: whether biases are trained.
      reference: class whose row stays as it is, or None.
      label_smoothing: ε.
      temperature: of the targets' softmax.
      target_weight: share of the targets' loss; the rest is the labels'.
    """

    optimizer: MakeOptimizer
    schedule: optax.Schedule | None
    mesh: Mesh
    by_rows: bool = False
    anneals: bool = False
    graph: nnx.GraphDef[Head] | None = None
    intercept: bool = True
    reference: int | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0
    target_weight: float = 1.0


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_segment(
    plan: Plan,
    state: MinibatchState,
    tables: Tables,
    block: Batch,
    count: Array,
    numbers: Numbers,
) -> MinibatchState:
    """Makes the first `count` steps of a block, or as many as there are to make.

    Args:
      plan: what to compile.
      state: donated.
      tables: what a head has besides parameters; see `row_visits` for row updates.
      block: `k` batches.
      count: at most `k`.
      numbers: of the run.

    Returns:
      The state after the steps.
    """

    def goes_on(carry: tuple[Array, MinibatchState]) -> Array:
        index, state = carry
        return (index < count) & (state.reason == RUNNING)

    def next_step(
        carry: tuple[Array, MinibatchState],
    ) -> tuple[Array, MinibatchState]:
        index, state = carry
        batch = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
            block,
        )
        return index + 1, _step(plan, state, tables, batch, numbers)

    # Optax's optimizers mix kinds of scalars, which a caller's strict setting refuses.
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.lax.while_loop(goes_on, next_step, (jnp.int32(0), state))
    return jax.lax.with_sharding_constraint(state, replicated(plan.mesh))


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(plan: Plan, params: Params, tables: Tables, batch: Batch) -> Array:
    """The weighted sum of a batch's losses, without the penalty."""
    return _loss(plan, params, tables, batch)


def penalised(params: Params) -> list[Array]:
    """The parameters that the penalty is on: all but biases."""
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]


def half_squares(params: Params) -> Array:
    """Half the squared norm of these parameters."""
    return sum(
        (jnp.sum(leaf * leaf) / 2 for leaf in penalised(params)), start=jnp.zeros(())
    )


def _step(
    plan: Plan, state: MinibatchState, tables: Tables, batch: Batch, numbers: Numbers
) -> MinibatchState:
    """One update, kept if everything in it is finite, and the epoch's accounts."""
    if plan.schedule is not None:
        rate = jnp.asarray(plan.schedule(state.step), state.mean.dtype)
    else:
        rate = numbers.rate.at(state.step) * (1 - _way_down(state, numbers))
    update = _update_rows if plan.by_rows else _update
    value, good, params, optimizer = update(plan, state, tables, batch, numbers, rate)
    place = jnp.where(good, state.place + 1, state.place)
    mean = state.mean + (value - state.mean) / place.astype(value.dtype)
    state = state._replace(
        params=params,
        optimizer=optimizer,
        step=jnp.where(good, state.step + 1, state.step),
        place=place,
        mean=jnp.where(good, mean, state.mean),
        reason=jnp.where(good, state.reason, NOT_FINITE),
    )
    return _close_epoch(plan, state, numbers, good)


def _close_epoch(
    plan: Plan, state: MinibatchState, numbers: Numbers, good: Array
) -> MinibatchState:
    """Judges the epoch if it is over."""
    over = good & (state.place == numbers.steps_per_epoch)
    improved = state.mean < state.best - numbers.tol
    stale = jnp.where(improved, 0, state.stale + 1)
    flat = stale >= numbers.patience
    begins = flat & (state.plateau < 0)
    ends = _way_down(state, numbers) >= 1 if plan.anneals else flat
    closed = state._replace(
        place=jnp.zeros_like(state.place),
        mean=jnp.zeros_like(state.mean),
        last=state.mean,
        best=jnp.minimum(state.best, state.mean),
        stale=stale,
        plateau=jnp.where(begins, state.step, state.plateau),
        reason=jnp.where(ends, NO_PROGRESS, state.reason),
    )
    accounts = MinibatchState._fields[3:]
    chosen = {
        name: jnp.where(over, getattr(closed, name), getattr(state, name))
        for name in accounts
    }
    return state._replace(**chosen)


def _way_down(state: MinibatchState, numbers: Numbers) -> Array:
    """How far the rate is on its way to 0 after a plateau, in [0, 1]."""
    least = LEAST_EPOCHS_DOWN * numbers.steps_per_epoch
    length = jnp.maximum(state.plateau, least).astype(state.mean.dtype)
    made = (state.step - state.plateau).astype(state.mean.dtype)
    return jnp.where(state.plateau < 0, 0, jnp.clip(made / length, 0, 1))


def _update(
    plan: Plan,
    state: MinibatchState,
    tables: Tables,
    batch: Batch,
    numbers: Numbers,
    rate: Array,
) -> tuple[Array, Array, Params, optax.OptState | RowState]:
    """Returns value, whether all is finite, parameters and the optimizer's state."""

    def objective(params: Params) -> Array:
        loss = numbers.share * _loss(plan, params, tables, batch)
        return loss + numbers.penalty * half_squares(params).astype(loss.dtype)

    value, gradient = jax.value_and_grad(objective)(state.params)
    if plan.reference is not None:
        gradient = jax.tree.map(lambda leaf: leaf.at[plan.reference].set(0), gradient)
    if not plan.intercept:
        gradient = jax.tree.map(
            lambda leaf: leaf if leaf.ndim > 1 else jnp.zeros_like(leaf), gradient
        )
    # Some of Optax's transformations need the value too.
    optimizer = optax.with_extra_args_support(plan.optimizer(rate))
    updates, after = optimizer.update(
        gradient, state.optimizer, state.params, value=value, grad=gradient
    )
    params = optax.apply_updates(state.params, updates)
    good = jnp.isfinite(value)
    for leaf in jax.tree.leaves(params):
        good &= jnp.isfinite(leaf).all()
    params, after = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, after),
        (state.params, state.optimizer),
    )
    return value, good, params, after


def _update_rows(
    plan: Plan,
    state: MinibatchState,
    tables: Tables,
    batch: Batch,
    numbers: Numbers,
    rate: Array,
) -> tuple[Array, Array, Params, optax.OptState | RowState]:
    """As `_update`, in the rows on the labels' paths.

    A row's penalty is spread over the visits that it has in an epoch: their sum is that
    of the epoch's steps.
    """
    constants, visits = tables
    assert plan.graph is not None
    head = nnx.merge(plan.graph, state.params, constants)
    assert isinstance(head, HierarchicalSoftmaxHead)
    value, _, gradient = head.value_and_row_grad(
        batch.features, batch.labels, weights=batch.weights, reduction="sum"
    )
    kernel, bias = before = head_rows(state.params)
    value, scales = numbers.share * value, numbers.share * gradient.scales
    known = gradient.rows < len(kernel)
    safe = jnp.where(known, gradient.rows, 0)
    penalties = numbers.penalty * numbers.steps_per_epoch / visits[safe]
    penalties = jnp.where(known, penalties, 0).astype(value.dtype)[..., None]
    visited = kernel[safe]
    value += jnp.sum(penalties * visited * visited) / 2
    values = scales[..., None] * batch.features[None] + penalties * visited
    good = jnp.isfinite(value) & jnp.isfinite(values).all()
    rows = jnp.where(good, gradient.rows, len(kernel))
    of_biases = scales if plan.intercept else jnp.zeros_like(scales)
    moved, after = row_adam(lambda count: rate).update(
        before, RowGradient(rows, (values, of_biases)), state.optimizer
    )
    return value, good, with_head_rows(state.params, moved), after


def init_rows(params: Params) -> RowState:
    """The first state of the optimizer of rows."""
    return row_adam(0.0).init(head_rows(params))


def _loss(plan: Plan, params: Params, tables: Tables, batch: Batch) -> Array:
    """The weighted sum of a batch's losses."""
    if plan.graph is not None:
        constants = tables[0] if plan.by_rows else tables
        head = nnx.merge(plan.graph, params, constants)
        return head.loss(
            batch.features, batch.labels, weights=batch.weights, reduction="sum"
        )
    if batch.targets is None:
        return linear_cross_entropy(
            batch.features,
            params["kernel"],
            batch.labels,
            bias=params["bias"],
            kernel_layout="vh",
            label_smoothing=plan.label_smoothing,
            weights=batch.weights,
            reduction="sum",
        )
    logits = batch.features @ params["kernel"].T + params["bias"][None]
    losses = plan.temperature**2 * softmax_cross_entropy(
        logits,
        temperature=plan.temperature,
        targets=batch.targets,
        label_smoothing=plan.label_smoothing,
    )
    if batch.labels is not None:
        of_labels = softmax_cross_entropy(
            logits, batch.labels, label_smoothing=plan.label_smoothing
        )
        losses = plan.target_weight * losses + (1 - plan.target_weight) * of_labels
    losses = jnp.where(batch.weights == 0, 0, losses)
    return jnp.sum(batch.weights * losses)
