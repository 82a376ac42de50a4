"""The optimizer of a training run: Optax's AdamW, and rows by lazy Adam."""

from dataclasses import dataclass

import jax
import numpy as np
import optax

from jaxsoft.hierarchical.row_optimizers import RowOptimizer, row_adam
from jaxsoft.training.heads import Params

__all__ = ["OptimizerConfig"]

_B2 = 0.95


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipped gradients.

    Attributes:
      steps: length of the schedule.
      learning_rate: its peak.
      warmup_fraction: share of the steps on the way up.
      final_fraction: the last learning rate as a share of the peak.
      weight_decay: decoupled decay of matrices; vectors are left alone.
      clip: largest global norm of a gradient.
    """

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    final_fraction: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0

    def schedule(self) -> optax.Schedule:
        """Learning rate by number of updates already made; never 0."""
        warmup = max(1, round(self.warmup_fraction * self.steps))
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / warmup,
            peak_value=self.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(self.steps, warmup + 1),
            end_value=self.final_fraction * self.learning_rate,
        )

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 1."""
        return np.asarray(self.schedule()(step - 1)).item()

    def build(self, rate: float | jax.Array) -> optax.GradientTransformation:
        """The Optax transformation of one step.

        Args:
          rate: the step's learning rate; the state does not depend on it.

        Returns:
          The transformation, for parameters with dense gradients.
        """
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                rate,
                b2=_B2,
                weight_decay=self.weight_decay,
                mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim >= 2, tree),
            ),
        )

    def rows(self, rate: float | jax.Array) -> RowOptimizer:
        """The optimizer of rows in one step: neither clipped nor decayed.

        Args:
          rate: the step's learning rate; the state does not depend on it.

        Returns:
          The optimizer, for parameters with a `jaxsoft.RowGradient`.
        """
        return row_adam(lambda count: rate, b2=_B2)

    def update(
        self, gradient: Params, state: Params, params: Params, rate: float | jax.Array
    ) -> tuple[Params, Params]:
        """Makes an update of parameters with dense gradients.

        Args:
          gradient: of the structure of `params`.
          state: Optax's.
          params: the parameters.
          rate: the step's learning rate.

        Returns:
          The new parameters and the new state.
        """
        # Optax's Adam mixes float and integer scalars, which a caller's strict setting
        # would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = self.build(rate).update(gradient, state, params)
            return optax.apply_updates(params, updates), state
