"""What a training run makes of its configuration before anything is compiled."""

from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxsoft.training.heads import HeadPlan, Params, head_rows
from jaxsoft.training.language_model.config import (
    LanguageModelConfig,
    TransformerConfig,
)
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.transformer import LanguageModel, TrunkBuilder
from jaxsoft.training.mesh import placed, replicated

__all__ = ["ModelPlan", "TrainState", "head_plan"]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      params: the model's parameters, an `nnx.State`.
      optimizer: the Optax state of those with dense gradients.
      rows: the state of the optimizer of those with row gradients, if there are.
    """

    params: Params
    optimizer: optax.OptState
    rows: Params = ()


class ModelPlan:
    """A model's structure and training state, without an array of either.

    Attributes:
      mesh: the devices.
      head: the head, over as many classes as the model has.
      optimizer: the optimizer.
      abstract_state: shapes, dtypes and shardings of the training state.
      shardings: the shardings alone.
    """

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerConfig,
        *,
        head: HeadPlan,
        seed: int,
        mesh: Mesh,
        trunk: TrunkBuilder | None = None,
    ):
        """Finds the structure; computes nothing.

        Args:
          model: sizes of the model.
          optimizer: the optimizer.
          head: the head, over as many classes as the model has.
          seed: seed of the initial parameters.
          mesh: the devices, with all axes; see `usable_mesh`.
          trunk: makes the trunk; None is `Transformer`.
        """
        self.mesh, self.head, self.optimizer = mesh, head, optimizer
        self._config, self._seed, self._trunk = model, seed, trunk
        self._graph = nnx.graphdef(nnx.eval_shape(self._build_model))
        self.abstract_state = placed(mesh, jax.eval_shape(self._init))
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init(self) -> TrainState:
        """Makes the initial state, a function of the seed and of the head's counts."""
        return jax.jit(self._init, out_shardings=self.shardings)()

    def make_tables(self) -> Params:
        """Makes what a model has besides parameters: a tree, bands or a sampler."""
        return jax.jit(self._tables, out_shardings=replicated(self.mesh))()

    def model(
        self, params: Params, tables: Params, *, training: bool = False
    ) -> LanguageModel:
        """Puts parameters and tables into the model."""
        model = nnx.merge(self._graph, params, tables)
        model.train() if training else model.eval()
        return model

    def split(self, params: Params) -> tuple[nnx.State, nnx.State]:
        """Cuts parameters into those with dense gradients and those with rows'."""
        by_rows = self.head.has_row_gradients
        dense, rows = nnx.split_state(
            params, lambda path, _: not (by_rows and path[0] == "head"), ...
        )
        return dense, rows

    def _build_model(self) -> LanguageModel:
        return LanguageModel(
            self._config,
            plan=self.head,
            trunk=self._trunk,
            rngs=nnx.Rngs(self._seed),
        )

    def _tables(self) -> Params:
        return nnx.state(self._build_model(), nnx.Not(nnx.Param))

    def _init(self) -> TrainState:
        params = nnx.state(self._build_model(), nnx.Param)
        dense, head = self.split(params)
        rows = self.optimizer.rows(0.0).init(head_rows(head)) if head else ()
        return TrainState(params, self.optimizer.build(0.0).init(dense), rows)


def head_plan(config: LanguageModelConfig, counts: np.ndarray) -> HeadPlan:
    """The head of a run.

    Args:
      config: says which.
      counts: `[V]`, how often each token comes in training.
    """
    return HeadPlan(
        config.head,
        tuple(counts.tolist()),
        config.num_samples,
        config.workspace_bytes,
    )
