"""The compiled programs of language-model training: step and evaluation.

Each program is compiled once, ahead of time, for one shape; the training state is
donated, so a step holds one copy of it. The state is a plain pytree (parameters and
Optax state); the model's structure is static, and the tables of its head (a tree,
bands or a sampler) are arguments.

Shapes: `B` sequences of `T` tokens, `N = B·T` tokens a step, `H` features, `V` tokens.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxsoft import RowGradient
from jaxsoft.nn import HierarchicalSoftmaxHead
from jaxsoft.training.heads import HeadPlan, Params, head_rows, with_head_rows
from jaxsoft.training.language_model.config import TransformerConfig
from jaxsoft.training.language_model.model_plan import ModelPlan, TrainState
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.transformer import LanguageModel, TrunkBuilder
from jaxsoft.training.mesh import over_data, replicated, usable_mesh

__all__ = [
    "MemoryReport",
    "Programs",
    "StepResult",
    "compiled_programs",
]


class StepResult(NamedTuple):
    """What a step measures, float32 scalars.

    Attributes:
      loss: mean loss in nats before the update; a sampled head's own.
      gradient_norm: global norm of the dense gradients before clipping.
      parameter_norm: global norm of the parameters that have them, after the update.
    """

    loss: Array
    gradient_norm: Array
    parameter_norm: Array


@dataclass(frozen=True)
class MemoryReport:
    """Bytes a device: what stored logits would take, and what the step does take.

    Attributes:
      stored_logits: `4·N·V`, the logits of one step in float32, over the number of
        devices.
      stored_logits_with_gradient: twice that: the logits and their gradient.
      step_temporaries: the compiled step's `temp_size_in_bytes`: every intermediate
        of trunk, head, their gradients and the optimizer. None where the platform
        does not tell.
      devices: how many devices take that much, each.
    """

    stored_logits: int
    stored_logits_with_gradient: int
    step_temporaries: int | None
    devices: int = 1


class Programs:
    """The compiled training step and evaluation of one model."""

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerConfig,
        batch_shape: tuple[int, int],
        *,
        head: HeadPlan,
        seed: int,
        mesh: Mesh | None = None,
        trunk: TrunkBuilder | None = None,
    ):
        """Compiles the training step and the evaluation.

        Args:
          model: sizes of the model.
          optimizer: the optimizer.
          batch_shape: `(B, T)`.
          head: the head, over as many classes as the model has.
          seed: seed of the initial parameters, and of what a head draws.
          mesh: the devices, see `jaxsoft.training.mesh`; None takes the first.
          trunk: makes the trunk; None is `Transformer`.
        """
        self.mesh = usable_mesh(mesh, batch_shape[0])
        self.batch_shape = batch_shape
        self.num_classes = model.num_classes
        self.head, self.optimizer, self._seed = head, optimizer, seed
        self._plan = ModelPlan(
            model, optimizer, head=head, seed=seed, mesh=self.mesh, trunk=trunk
        )
        self.abstract_state = self._plan.abstract_state
        started = time.perf_counter()
        everywhere = replicated(self.mesh)
        self.tables = self._plan.make_tables()
        batch, length = batch_shape
        tokens = jax.ShapeDtypeStruct(
            (batch, length + 1), jnp.int32, sharding=over_data(self.mesh)
        )
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        self._step = (
            jax.jit(
                self._train,
                donate_argnums=0,
                out_shardings=(self._plan.shardings, everywhere),
            )
            .lower(self.abstract_state, self.tables, tokens, rate, index)
            .compile(compiler_options=_deterministic_options())
        )
        self._evaluate = (
            jax.jit(self._losses, out_shardings=everywhere)
            .lower(self.abstract_state.params, self.tables, tokens)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - started

    def init(self) -> TrainState:
        """Makes the initial state, a function of the seed and of the head's counts."""
        return self._plan.init()

    def step(
        self, state: TrainState, batch: np.ndarray, rate: float, index: int
    ) -> tuple[TrainState, StepResult]:
        """Makes one update.

        Args:
          state: donated: do not use it again.
          batch: `[B, T + 1]` int32 tokens.
          rate: the learning rate.
          index: number of the step: what a head draws is a function of it.

        Returns:
          The new state and a `StepResult`.
        """
        scalars = np.float32(rate), np.int32(index)
        return self._step(state, self.tables, self._place(batch), *scalars)

    def evaluate(
        self,
        params: Params,
        windows: np.ndarray,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        """Mean loss in nats over windows of text.

        Args:
          params: the model's parameters.
          windows: `[W, T + 1]` int32 tokens, any `W`; short batches are padded and
            the padding's losses dropped.
          check: called before each batch; what it raises ends the work.

        Returns:
          The mean over `W·T` tokens, summed in float64.
        """
        batch = self.batch_shape[0]
        total = 0.0
        for start in range(0, len(windows), batch):
            check()
            part = windows[start : start + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)), mode="edge")
            losses = self._evaluate(params, self.tables, self._place(padded))
            losses = np.asarray(losses, np.float64)
            total += losses[: len(part)].sum()
        return total / (len(windows) * self.batch_shape[1])

    def model(self, params: Params) -> LanguageModel:
        """Puts parameters into the model, to call its methods."""
        return self._plan.model(params, self.tables)

    def memory(self) -> MemoryReport:
        """Compares the compiled step with one that stores its logits."""
        devices = self.mesh.size
        logits = 4 * math.prod(self.batch_shape) * self.num_classes // devices
        analysis = self._step.memory_analysis()
        temporaries = getattr(analysis, "temp_size_in_bytes", None)
        return MemoryReport(logits, 2 * logits, temporaries, devices)

    def _place(self, batch: np.ndarray) -> Array:
        return jax.device_put(batch, over_data(self.mesh))

    def _train(
        self,
        state: TrainState,
        tables: Params,
        tokens: Array,
        rate: Array,
        index: Array,
    ) -> tuple[TrainState, StepResult]:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        dense, head = self._plan.split(state.params)
        rows = state.rows
        if head:
            loss, gradient, of_rows = self._row_gradients(
                dense, head, tables, inputs, labels
            )
            moved, rows = self.optimizer.rows(rate).update(
                head_rows(head), of_rows, rows
            )
            head = with_head_rows(head, moved)
        else:
            loss, gradient = self._dense_gradients(dense, tables, inputs, labels, index)
        dense, optimizer = self.optimizer.update(gradient, state.optimizer, dense, rate)
        norms = optax.tree.norm(gradient), optax.tree.norm(dense)
        params = nnx.merge_state(dense, head)
        return TrainState(params, optimizer, rows), StepResult(loss, *norms)

    def _dense_gradients(
        self, params: Params, tables: Params, inputs: Array, labels: Array, index: Array
    ) -> tuple[Array, Params]:
        """Returns the loss and its gradient in all parameters."""
        key = jax.random.fold_in(jax.random.key(self._seed), index)

        def mean_loss(params: Params) -> Array:
            model = self._plan.model(params, tables, training=True)
            return model.loss(inputs, labels, **self.head.loss_options(key))

        return jax.value_and_grad(mean_loss)(params)

    def _row_gradients(
        self, dense: Params, head: Params, tables: Params, inputs: Array, labels: Array
    ) -> tuple[Array, Params, RowGradient]:
        """Returns the loss, its gradient in the trunk, and in the head's rows."""

        def trunk(dense: Params) -> Array:
            return self._plan.model(nnx.merge_state(dense, head), tables).trunk(inputs)

        hidden, pull = jax.vjp(trunk, dense)
        module = self._plan.model(nnx.merge_state(dense, head), tables).head
        assert isinstance(module, HierarchicalSoftmaxHead)
        loss, dhidden, of_rows = module.value_and_row_grad(hidden, labels)
        return loss, *pull(dhidden), of_rows

    def _losses(self, params: Params, tables: Params, tokens: Array) -> Array:
        model = self._plan.model(params, tables)
        return model.loss(tokens[:, :-1], tokens[:, 1:], reduction="none")


@functools.lru_cache(maxsize=4)
def compiled_programs(
    model: TransformerConfig,
    optimizer: OptimizerConfig,
    batch_shape: tuple[int, int],
    *,
    head: HeadPlan,
    seed: int,
    mesh: Mesh | None = None,
    trunk: TrunkBuilder | None = None,
) -> Programs:
    """Makes `Programs`, or returns those of the last runs with the same arguments."""
    return Programs(
        model, optimizer, batch_shape, head=head, seed=seed, mesh=mesh, trunk=trunk
    )


def _deterministic_options() -> dict[str, str | bool] | None:
    """Options that give a program the same bits every time it runs.

    On GPU, XLA's scatter (the embedding's gradient) adds in any order unless told
    otherwise; a sort instead of atomic additions costs the H100 program no memory.
    """
    if jax.local_devices()[0].platform == "gpu":
        return {"xla_gpu_deterministic_ops": True}
    return None
