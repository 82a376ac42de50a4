"""Masks of classes in bits, as jaxsoft takes them, for formulas of stored logits."""

import jax
import jax.numpy as jnp

__all__ = ["WORD", "masked"]

# Classes of a word.
WORD = 32


def masked(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns logits, -inf where their class is dropped.

    Args:
      logits: [N, V].
      bits: [N, ceil(V / 32)] unsigned integers; bit v % 32 of word v // 32 is 1 where
        class v is kept.
    """
    places = jnp.arange(WORD, dtype=bits.dtype)
    kept = (bits[..., None] >> places[None, None]) & 1 != 0
    kept = kept.reshape(len(bits), -1)[:, : logits.shape[1]]
    return jnp.where(kept, logits, -jnp.inf)
