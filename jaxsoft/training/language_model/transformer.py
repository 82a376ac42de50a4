"""A small causal transformer: a trunk that ends in hidden states, and a softmax head.

The trunk is pre-norm with RMSNorm, rotary positions, SwiGLU and no biases. It stops
at the hidden states on purpose: the head turns them into a loss without ever storing
logits, so nothing here may compute them during training.

Shapes: `B` sequences, `T` positions, `H` features, `V` classes (tokens).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

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
    "KeysValues",
    "LanguageModel",
    "Transformer",
    "TrunkBuilder",
    "rotate_positions",
]

_ROTARY_BASE = 10_000.0

# Makes a trunk of a configuration and `rngs=`: a module that is called with tokens
# `[B, T]` and returns hidden states `[B, T, H]`, each of its own and earlier tokens.
TrunkBuilder: TypeAlias = Callable[..., nnx.Module]


class KeysValues(NamedTuple):
    """What attention keeps of the positions that it has seen.

    Attributes:
      keys: `[B, heads, C, D]`, rotated, for `C` positions; what is beyond those that
        were seen is no matter. Matrix products read this order without a copy.
      values: `[B, heads, C, D]`.
    """

    keys: Array
    values: Array


def rotate_positions(vectors: Array, first: Array | None = None) -> Array:
    """Rotates pairs of features by an angle proportional to the position.

    Args:
      vectors: `[B, T, heads, D]`, queries or keys with even `D`.
      first: the position of the first, an integer scalar; None is 0.

    Returns:
      The rotated vectors, same shape and dtype. Dot products between two of them
      depend on the difference of their positions only.

    References:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
      arXiv:2104.09864.
    """
    length, half = vectors.shape[1], vectors.shape[-1] // 2
    frequencies = _ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(length, dtype=jnp.float32)
    if first is not None:
        positions += first.astype(jnp.float32)
    angles = jnp.outer(positions, frequencies)
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
        query, key, value = self._projected(hidden)
        mixed = jax.nn.dot_product_attention(
            rotate_positions(self.query_norm(query)),
            rotate_positions(self.key_norm(key)),
            value,
            is_causal=True,
        )
        return self.out(mixed.reshape(hidden.shape))

    def extend(
        self, hidden: Array, cache: KeysValues, first: Array
    ) -> tuple[Array, KeysValues]:
        """Mixes new positions with themselves and with those of the cache.

        Args:
          hidden: `[B, T, H]`, of positions `first … first + T - 1`.
          cache: of the positions before; it has room for these.
          first: an integer scalar.

        Returns:
          `[B, T, H]`, and the cache with the new positions.
        """
        query, key, value = self._projected(hidden)
        query = rotate_positions(self.query_norm(query), first)
        key = rotate_positions(self.key_norm(key), first)
        cache = KeysValues(
            *(
                jax.lax.dynamic_update_slice_in_dim(
                    kept, new.swapaxes(1, 2), first, axis=2
                )
                for kept, new in zip(cache, (key, value), strict=True)
            )
        )
        length, capacity, size = hidden.shape[1], *cache.keys.shape[2:]
        seen = jnp.arange(capacity)[None] <= first + jnp.arange(length)[:, None]
        scores = jnp.einsum("bthd,bhcd->bhtc", query * size**-0.5, cache.keys)
        weights = jax.nn.softmax(scores, where=seen[None, None])
        mixed = jnp.einsum("bhtc,bhcd->bthd", weights, cache.values)
        return self.out(mixed.reshape(hidden.shape)), cache

    def _projected(self, hidden: Array) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values, `[B, T, heads, D]` each."""
        batch, length, width = hidden.shape
        projected = self.query_key_value(hidden)
        query, key, value = (
            part.reshape(batch, length, self.heads, width // self.heads)
            for part in jnp.split(projected, 3, axis=-1)
        )
        return query, key, value


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

    def extend(
        self, hidden: Array, cache: KeysValues, first: Array
    ) -> tuple[Array, KeysValues]:
        """Adds both halves at new positions; as `Attention.extend`."""
        mixed, cache = self.attention.extend(self.attention_norm(hidden), cache, first)
        hidden = hidden + mixed
        return hidden + self.feed_forward(self.feed_forward_norm(hidden)), cache


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

    def empty_cache(self, batch: int, capacity: int) -> tuple[KeysValues, ...]:
        """Makes the cache of texts without a token.

        Args:
          batch: `B`.
          capacity: `C`, how many positions it has room for.

        Returns:
          The cache of each block.
        """
        width = self.embedding.features
        heads = self.blocks[0].attention.heads
        empty = jnp.zeros([batch, heads, capacity, width // heads])
        return (KeysValues(empty, empty),) * len(self.blocks)

    def extend(
        self, tokens: Array, cache: tuple[KeysValues, ...], first: Array
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        """Computes the hidden states after new tokens, from what is kept of others.

        Args:
          tokens: `[B, T]` integers in `[0, V)`, at positions `first … first + T - 1`.
          cache: of the tokens before, see `empty_cache`; it has room for these.
          first: an integer scalar.

        Returns:
          `[B, T, H]`, those that a call with all tokens gives at these positions within
          rounding, and the cache with the new tokens.
        """
        hidden = self.embedding_norm(self.embedding(tokens))
        caches = []
        for block, kept in zip(self.blocks, cache, strict=True):
            hidden, kept = block.extend(hidden, kept, first)
            caches.append(kept)
        return self.final_norm(hidden), tuple(caches)


class LanguageModel(nnx.Module):
    """A trunk, by default a `Transformer`, under a head of `jaxsoft.nn`.

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
        trunk: TrunkBuilder | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds trunk and head.

        Args:
          config: sizes of the model.
          plan: the head, over as many classes; None is a full one that starts at the
            uniform distribution.
          trunk: makes the trunk; None is `Transformer`.
          rngs: source of the initial parameters.
        """
        plan = plan or HeadPlan("full", (0,) * config.num_classes)
        self.trunk: Any = (trunk or Transformer)(config, rngs=rngs)
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
