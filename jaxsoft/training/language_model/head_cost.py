"""What a head alone costs in a training step: time and memory."""

import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsoft.training.heads import HeadPlan, Params, head_rows, with_head_rows
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.steps import Programs

__all__ = ["HeadCost", "measure_head"]

_CALLS = 11


@dataclass(frozen=True)
class HeadCost:
    """One step of a head: loss, gradients in hidden states and parameters, update.

    Attributes:
      seconds: of a step; the median of some.
      state_bytes: parameters, the optimizer's state, and tables.
      temporary_bytes: the compiled step's `temp_size_in_bytes`, in place; None where
        the platform does not tell.
    """

    seconds: float
    state_bytes: int
    temporary_bytes: int | None


def measure_head(programs: Programs, params: Params, batch: np.ndarray) -> HeadCost:
    """Times a head on the hidden states and labels of a batch.

    Args:
      programs: whose head.
      params: the model's parameters, which stay as they are.
      batch: `[B, T + 1]` int32 tokens.

    Returns:
      The cost.
    """
    model = programs.model(params)
    hidden = jax.jit(lambda model, tokens: model.trunk(tokens))(model, batch[:, :-1])
    graph, own, tables = nnx.split(nnx.Dict(head=model.head), nnx.Param, ...)
    alone = _HeadStep(programs.head, programs.optimizer, graph)
    # A copy: the step is given its state to write over.
    state = jax.tree.map(jnp.copy, alone.init(own))
    others = tables, hidden, jnp.asarray(batch[:, 1:])
    step = jax.jit(alone, donate_argnums=0).lower(state, *others).compile()
    memory = step.memory_analysis()
    seconds = []
    for _ in range(_CALLS + 1):
        started = time.perf_counter()
        state, *_ = jax.block_until_ready(step(state, *others))
        seconds.append(time.perf_counter() - started)
    return HeadCost(
        seconds=statistics.median(seconds[1:]),
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves((state, tables))),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
    )


class _HeadStep:
    """The training step of a head whose hidden states are given."""

    def __init__(
        self, plan: HeadPlan, optimizer: OptimizerConfig, graph: nnx.GraphDef[nnx.Dict]
    ):
        self._plan, self._optimizer, self._graph = plan, optimizer, graph

    def init(self, params: Params) -> tuple[Params, Params]:
        """Parameters and the optimizer's state."""
        if self._plan.has_row_gradients:
            return params, self._optimizer.rows(0.0).init(head_rows(params))
        return params, self._optimizer.build(0.0).init(params)

    def __call__(
        self, state: tuple[Params, Params], tables: Params, hidden: Array, labels: Array
    ) -> tuple[tuple[Params, Params], Array, Array]:
        """Returns the next state, the loss and the gradient of hidden states."""
        params, optimizer = state
        rate = self._optimizer.learning_rate

        def module(params: Params) -> Params:
            model = nnx.merge(self._graph, params, tables)
            model.train()
            return model["head"]

        if self._plan.has_row_gradients:
            loss, dhidden, rows = module(params).value_and_row_grad(hidden, labels)
            moved, optimizer = self._optimizer.rows(rate).update(
                head_rows(params), rows, optimizer
            )
            return (with_head_rows(params, moved), optimizer), loss, dhidden

        def mean_loss(params: Params, hidden: Array) -> Array:
            options = self._plan.loss_options(jax.random.key(0))
            return module(params).loss(hidden, labels, **options)

        loss, (gradient, dhidden) = jax.value_and_grad(mean_loss, (0, 1))(
            params, hidden
        )
        return self._optimizer.update(gradient, optimizer, params, rate), loss, dhidden
