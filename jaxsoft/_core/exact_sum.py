"""Logits and noise added up exactly, for kernels that see a row once before they write.

`x + g` rounded, and what the rounding took: two float32 that order as the sum itself
does. A kernel that streams has no largest logit yet to centre on; rounded alone, noise
beside an offset of 10⁶ would lose most of its bits.
"""

import jax
import jax.numpy as jnp

__all__ = ["LOWEST", "above", "exact_sum", "gap"]

# Both parts below every sum but those that are dropped, and finite.
LOWEST = (float(jnp.finfo(jnp.float32).min), -1e38)


def exact_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x + y rounded, and the rest: 0 where the sum is infinite or NaN.

    Args:
      x: float32.
      y: float32 of the same shape, finite, and not a product: compilers could fuse that
        with the sum, in one pass and not in another.
    """
    total = x + y
    of_y = total - x
    rest = (x - (total - of_y)) + (y - of_y)
    return total, jnp.where(rest == rest, rest, 0.0)


def above(
    top: jax.Array,
    rest: jax.Array,
    peak: jax.Array | float,
    peak_rest: jax.Array | float,
) -> jax.Array:
    """Returns whether sums are larger than others, False where they are equal."""
    return (top > peak) | ((top == peak) & (rest > peak_rest))


def gap(
    top: jax.Array,
    rest: jax.Array,
    peak: jax.Array | float,
    peak_rest: jax.Array | float,
) -> jax.Array:
    """Returns sums minus their largest, to the precision of the difference."""
    return (top - peak) + (rest - peak_rest)
