"""A small causal transformer: a trunk that ends in hidden states, and a softmax head.

The trunk is pre-norm with RMSNorm, rotary positions, SwiGLU and no biases. It stops
at the hidden states on purpose: the head turns them into a loss without ever storing
logits, so nothing here may compute them during training.

Shapes: `B` sequences, `T` positions, `H` features, `V` classes (tokens).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsoft.training.heads import HeadPlan
from jaxsoft.training.language_model.config import TransformerConfig

__all__ = [
    "Attention",
    "Block",
    "FeedForward",
    "LanguageModel",
    "Transformer",
    "rotate_positions",
]

_ROTARY_BASE = 10_000.0


def rotate_positions(vectors: Array) -> Array:
    """Rotates pairs of features by an angle proportional to the position.

    Args:
      vectors: `[B, T, heads, D]`, queries or keys with even `D`.

    Returns:
      The rotated vectors, same shape and dtype. Dot products between two of them
      depend on the difference of their positions only.

    References:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
      arXiv:2104.09864.
    """
    length, half = vectors.shape[1], vectors.shape[-1] // 2
    frequencies = _ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)
    cosine = jnp.cos(angles)[None, :, None, :].astype(vectors.dtype)
    sine = jnp.sin(angles)[None, :, None, :].astype(vectors.dtype)
    first, second = jnp.split(vectors, 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )


class Attention(nnx.Module):
    """Causal multi-head self-attention with rotary positions and normalised keys."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Builds the projections.

        Args:
          config: sizes of the model.
          rngs: source of the initial parameters.
        """
        width, self.heads = config.features, config.heads
        size = width // config.heads
        self.query_key_value = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.query_norm = nnx.RMSNorm(size, rngs=rngs)
        self.key_norm = nnx.RMSNorm(size, rngs=rngs)
        self.out = nnx.Linear(
            width,
            width,
            use_bias=False,
            kernel_init=_residual_init(config.layers),
            rngs=rngs,
        )

    def __call__(self, hidden: Array) -> Array:
        """Mixes every position with those before it; `[B, T, H]` in and out."""
        batch, length, width = hidden.shape
        projected = self.query_key_value(hidden)
        query, key, value = (
            part.reshape(batch, length, self.heads, width // self.heads)
            for part in jnp.split(projected, 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(
            rotate_positions(self.query_norm(query)),
            rotate_positions(self.key_norm(key)),
            value,
            is_causal=True,
        )
        return self.out(mixed.reshape(batch, length, width))


class FeedForward(nnx.Module):
    """SwiGLU: a gated two-layer network at each position.

    References:
      Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Builds the two layers, four thirds of twice the width inside.

        Args:
          config: sizes of the model.
          rngs: source of the initial parameters.
        """
        inner = 8 * config.features // 3
        self.expand = nnx.Linear(config.features, 2 * inner, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(
            inner,
            config.features,
            use_bias=False,
            kernel_init=_residual_init(config.layers),
            rngs=rngs,
        )

    def __call__(self, hidden: Array) -> Array:
        """Transforms each position alone; `[B, T, H]` in and out."""
        gate, value = jnp.split(self.expand(hidden), 2, axis=-1)
        return self.contract(nnx.silu(gate) * value)


class Block(nnx.Module):
    """One residual layer: attention, then a feed-forward network."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Builds both halves and their norms.

        Args:
          config: sizes of the model.
          rngs: source of the initial parameters.
        """
        self.attention_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, hidden: Array) -> Array:
        """Adds both halves to the residual stream; `[B, T, H]` in and out."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Transformer(nnx.Module):
    """The trunk: tokens in, hidden states out, no logits."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Builds the embedding table and the blocks.

        Args:
          config: sizes of the model.
          rngs: source of the initial parameters.
        """
        self.embedding = nnx.Embed(
            config.num_classes,
            config.features,
            embedding_init=nnx.initializers.normal(config.features**-0.5),
            rngs=rngs,
        )
        self.embedding_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.features, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Computes the hidden state after each token.

        Args:
          tokens: `[B, T]` integers in `[0, V)`.

        Returns:
          `[B, T, H]`; position `t` depends on tokens `0 … t` only.
        """
        hidden = self.embedding_norm(self.embedding(tokens))
        for block in self.blocks:
            hidden = block(hidden)
        return self.final_norm(hidden)


class LanguageModel(nnx.Module):
    """A `Transformer` trunk under a head of `jaxsoft.nn`.

    A head's kernels are its own and start at zero, so that a new model predicts its
    head's biases. (Tied to the embedding table, the same steps of the default run end
    0.15 nats higher.) The metadata of a full head's parameters put its classes on the
    mesh axis `vocab`; other parameters have none.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> config = TransformerConfig(num_classes=300, features=16, heads=2)
      >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
      >>> tokens = jnp.zeros([2, 8], jnp.int32)
      >>> model.trunk(tokens).shape
      (2, 8, 16)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        plan: HeadPlan | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds trunk and head.

        Args:
          config: sizes of the model.
          plan: the head, over as many classes; None is a full one that starts at the
            uniform distribution.
          rngs: source of the initial parameters.
        """
        plan = plan or HeadPlan("full", (0,) * config.num_classes)
        self.trunk = Transformer(config, rngs=rngs)
        self.head = plan.build(config.features, rngs=rngs)

    def loss(
        self,
        tokens: Array,
        labels: Array,
        *,
        reduction: Literal["mean", "none"] = "mean",
        **options: Any,
    ) -> Array:
        """Cross-entropy in nats of each next token, without stored logits.

        Args:
          tokens: `[B, T]` integers.
          labels: `[B, T]` integers, the token after each one.
          reduction: "mean" for a scalar, "none" for `[B, T]` losses.
          **options: of the head's `loss`.

        Returns:
          float32, a scalar or `[B, T]`.
        """
        return self.head.loss(
            self.trunk(tokens), labels, reduction=reduction, **options
        )


def _residual_init(layers: int) -> nnx.Initializer:
    """Kernel initialiser whose 2 * `layers` residual additions keep unit scale."""
    return nnx.initializers.variance_scaling(
        1.0 / (2 * layers), "fan_in", "truncated_normal"
    )
