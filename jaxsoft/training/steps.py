"""The compiled programs of language-model training: step, evaluation, sampling.

Each program is compiled once, ahead of time, for one shape; the training state is
donated, so a step holds one copy of it. The state is a plain pytree (parameters and
Optax state); the model's structure is static.

Shapes: `B` sequences of `T` tokens, `N = B·T` tokens a step, `H` features, `V` tokens.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxsoft.training.mesh import over_data, placed, replicated, usable_mesh
from jaxsoft.training.transformer import LanguageModel, TransformerConfig


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        params: The model's parameters, an `nnx.State`.
        optimizer: The Optax state.
    """

    params: Any
    optimizer: Any


class StepResult(NamedTuple):
    """What a step measures, float32 scalars.

    Attributes:
        loss: Mean loss in nats before the update.
        gradient_norm: Global norm of the gradient before clipping.
        parameter_norm: Global norm of the parameters after the update.
    """

    loss: Array
    gradient_norm: Array
    parameter_norm: Array


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipped gradients.

    Attributes:
        steps: Length of the schedule.
        learning_rate: Its peak.
        warmup_fraction: Share of the steps on the way up.
        final_fraction: The last learning rate as a share of the peak.
        weight_decay: Decoupled decay of matrices; vectors are left alone.
        clip: Largest global norm of a gradient.
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

    def build(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                self.schedule(),
                b2=0.95,
                weight_decay=self.weight_decay,
                mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim >= 2, tree),
            ),
        )


@dataclass(frozen=True)
class MemoryReport:
    """Bytes a device: what stored logits would take, and what the step does take.

    Attributes:
        stored_logits: `4·N·V`, the logits of one step in float32, over the number of
            devices.
        stored_logits_with_gradient: Twice that: the logits and their gradient.
        step_temporaries: The compiled step's `temp_size_in_bytes`: every intermediate
            of trunk, head, their gradients and the optimizer. None where the platform
            does not tell.
        devices: How many devices take that much, each.
    """

    stored_logits: int
    stored_logits_with_gradient: int
    step_temporaries: int | None
    devices: int = 1


class Programs:
    """The compiled training step, evaluation and sampling of one model."""

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerConfig,
        batch_shape: tuple[int, int],
        *,
        seed: int,
        mesh: Mesh | None = None,
    ):
        """Compiles the training step and the evaluation.

        Args:
            model: Sizes of the model.
            optimizer: The optimizer and its schedule.
            batch_shape: `(B, T)`.
            seed: Seed of the initial parameters.
            mesh: The devices, see `jaxsoft.training.mesh`; None takes the first.
        """
        self.mesh = usable_mesh(mesh, batch_shape[0])
        self.batch_shape = batch_shape
        self.num_classes = model.num_classes
        self._config, self._seed = model, seed
        self._optimizer = optimizer.build()
        bias = jax.ShapeDtypeStruct((model.num_classes,), jnp.float32)
        self._graph, _ = nnx.split(nnx.eval_shape(self._build_model, bias))
        self.abstract_state = placed(self.mesh, jax.eval_shape(self._init, bias))
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        started = time.perf_counter()
        batch, length = batch_shape
        tokens = jax.ShapeDtypeStruct(
            (batch, length + 1), jnp.int32, sharding=over_data(self.mesh)
        )
        everywhere = replicated(self.mesh)
        self._step = (
            jax.jit(
                self._train,
                donate_argnums=0,
                out_shardings=(self._shardings, everywhere),
            )
            .lower(self.abstract_state, tokens)
            .compile(compiler_options=_deterministic_options())
        )
        self._evaluate = (
            jax.jit(self._losses, out_shardings=everywhere)
            .lower(self.abstract_state.params, tokens)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - started

    def init(self, unigram_log_probs: np.ndarray) -> TrainState:
        """Makes the initial state.

        Args:
            unigram_log_probs: `[V]`, the head's initial bias: training starts at the
                unigram cross-entropy and spends its steps on what context adds.

        Returns:
            The state, a function of the seed and of the bias alone.
        """
        bias = np.asarray(unigram_log_probs, np.float32)
        return jax.jit(self._init, out_shardings=self._shardings)(bias)

    def step(self, state: TrainState, batch: np.ndarray) -> tuple[TrainState, Any]:
        """Makes one update.

        Args:
            state: Donated: do not use it again.
            batch: `[B, T + 1]` int32 tokens.

        Returns:
            The new state and a `StepResult`.
        """
        return self._step(state, self._place(batch))

    def evaluate(self, params: Any, windows: np.ndarray) -> float:
        """Mean loss in nats over windows of text.

        Args:
            params: The model's parameters.
            windows: `[W, T + 1]` int32 tokens, any `W`; short batches are padded and
                the padding's losses dropped.

        Returns:
            The mean over `W·T` tokens, summed in float64.
        """
        batch = self.batch_shape[0]
        total = 0.0
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)), mode="edge")
            losses = self._evaluate(params, self._place(padded))
            losses = np.asarray(losses, np.float64)
            total += losses[: len(part)].sum()
        return total / (len(windows) * self.batch_shape[1])

    def sample(
        self,
        params: Any,
        prompt: Sequence[int],
        temperatures: Sequence[float],
        num_tokens: int,
    ) -> list[list[int]]:
        """Continues a prompt once at each temperature.

        Args:
            params: The model's parameters.
            prompt: Token ids to start from, at least one; its end counts where it is
                longer than `T`.
            temperatures: One a sample; 0 takes the most probable token.
            num_tokens: Tokens to add.

        Returns:
            The added tokens, one list a temperature; a function of the seed and of the
            arguments.
        """
        length = self.batch_shape[1]
        prompt = list(prompt)[-length:]
        window = np.zeros([len(temperatures), length], np.int32)
        window[:, : len(prompt)] = prompt
        key = jax.random.key(self._seed)
        generate = jax.jit(self._generate, static_argnames="num_tokens")
        tokens = generate(
            params,
            jnp.asarray(window),
            len(prompt),
            jnp.asarray(temperatures, jnp.float32),
            key,
            num_tokens=num_tokens,
        )
        return np.asarray(tokens).tolist()

    def model(self, params: Any) -> LanguageModel:
        """Puts parameters into the model, to call its methods."""
        return nnx.merge(self._graph, params)

    def memory(self) -> MemoryReport:
        """Compares the compiled step with one that stores its logits."""
        devices = self.mesh.size
        logits = 4 * math.prod(self.batch_shape) * self.num_classes // devices
        analysis = self._step.memory_analysis()
        temporaries = getattr(analysis, "temp_size_in_bytes", None)
        return MemoryReport(logits, 2 * logits, temporaries, devices)

    def _place(self, batch: np.ndarray) -> Array:
        return jax.device_put(batch, over_data(self.mesh))

    def _build_model(self, bias: Array) -> LanguageModel:
        return LanguageModel(
            self._config,
            bias_init=lambda key, shape, dtype: bias.astype(dtype),
            rngs=nnx.Rngs(self._seed),
        )

    def _init(self, unigram_log_probs: Array) -> TrainState:
        params = nnx.state(self._build_model(unigram_log_probs), nnx.Param)
        return TrainState(params, self._optimizer.init(params))

    def _train(self, state: TrainState, tokens: Array) -> tuple[TrainState, StepResult]:
        def mean_loss(params: Any) -> Array:
            return self.model(params).loss(tokens[:, :-1], tokens[:, 1:])

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        # Optax's Adam mixes float and integer scalars, which a caller's strict setting
        # would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self._optimizer.update(
                gradient, state.optimizer, state.params
            )
            params = optax.apply_updates(state.params, updates)
        norms = optax.tree.norm(gradient), optax.tree.norm(params)
        return TrainState(params, optimizer), StepResult(loss, *norms)

    def _losses(self, params: Any, tokens: Array) -> Array:
        return self.model(params).loss(tokens[:, :-1], tokens[:, 1:], reduction="none")

    def _generate(
        self,
        params: Any,
        window: Array,
        filled: Array,
        temperatures: Array,
        key: Array,
        *,
        num_tokens: int,
    ) -> Array:
        """Adds tokens one by one; the window slides once it is full."""
        model = self.model(params)
        length = window.shape[1]

        def add_token(carry: tuple[Array, Array], key: Array):
            window, filled = carry
            hidden = model.trunk(window)
            last = jax.lax.dynamic_index_in_dim(hidden, filled - 1, 1, keepdims=False)
            token = model.head.sample(key, last, temperature=temperatures)
            full = filled == length
            window = jnp.where(full, jnp.roll(window, -1, axis=1), window)
            filled = jnp.where(full, filled, filled + 1)
            window = jax.lax.dynamic_update_index_in_dim(window, token, filled - 1, 1)
            return (window, filled), token

        keys = jax.random.split(key, num_tokens)
        _, tokens = jax.lax.scan(add_token, (window, jnp.asarray(filled)), keys)
        return tokens.T


def _deterministic_options() -> dict[str, str | bool] | None:
    """Options that give a program the same bits every time it runs.

    On GPU, XLA's scatter (the embedding's gradient) adds in any order unless told
    otherwise; a sort instead of atomic additions costs the H100 program no memory.
    """
    if jax.local_devices()[0].platform == "gpu":
        return {"xla_gpu_deterministic_ops": True}
    return None
