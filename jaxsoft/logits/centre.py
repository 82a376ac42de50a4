"""Centred logits: what every function of this room starts from.

`c = (x - m) / τ`, with m the largest kept logit, so that `c <= 0` and one class has
`c = 0`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft._core.numerics import divide_stored

__all__ = ["Centred", "centre", "number_of_kept", "scaled_gaps"]


class Centred(NamedTuple):
    """Centred logits of each row; arrays keep the class axis, with size 1 if reduced.

    Attributes:
      values: c = (x - m) / τ in [-inf, 0]; -inf at dropped classes.
      peak: m, the largest kept logit, without a derivative: what follows from centred
        logits does not depend on what they are centred on. In a row without any kept
        class it is the lowest finite number.
      kept: which classes count: not masked, and not -inf.
      logits: x, -inf at dropped classes.
    """

    values: jax.Array
    peak: jax.Array
    kept: jax.Array
    logits: jax.Array


def centre(
    x: jax.Array,
    temperature: float | jax.Array,
    where: jax.Array | None,
    axis: int,
) -> Centred:
    """Centres the logits `x`, which already have the dtype to compute in."""
    kept = x != -jnp.inf
    if where is not None:
        kept = kept & where
        x = jnp.where(where, x, -jnp.inf)
    x = _still_below(x)
    # The maximum starts at the lowest finite number: XLA for CPUs fuses maxima with the
    # exponentials and their sum, but neither with a select nor with a second maximum.
    lowest = np.asarray(jnp.finfo(x.dtype).min, x.dtype)
    still = jax.lax.stop_gradient(x)
    if x.shape[axis] == 1:
        # XLA leaves out where a maximum starts if there is but one number.
        peak = jnp.maximum(still, lowest)
    else:
        peak = jnp.expand_dims(
            jax.lax.reduce(still, lowest, jax.lax.max, (axis,)), axis
        )
    return Centred(divide_stored(x, peak, temperature), peak, kept, x)


@jax.custom_jvp
def _still_below(x: jax.Array) -> jax.Array:
    """Returns logits of which those that are -inf do not move."""
    return x


@_still_below.defjvp
def _still_below_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], jnp.where(primals[0] == -jnp.inf, 0, tangents[0])


def scaled_gaps(centred: Centred) -> tuple[jax.Array, jax.Array]:
    """Returns (x - m) s, finite, and s of each row, for sums over p of x - m.

    What is dropped counts as the lowest number. s is 1/4 where |m| is above 1, so that
    differences stay finite. XLA for CPUs computes them anew beside c, which it would
    store for a second use.
    """
    scale = jnp.where(jnp.abs(centred.peak) > 1, 0.25, 1.0)
    scale = scale.astype(centred.peak.dtype)
    logits = jnp.maximum(centred.logits, jnp.finfo(centred.logits.dtype).min)
    return logits * scale - centred.peak * scale, scale


def number_of_kept(centred: Centred, axis: int) -> jax.Array:
    """Returns how many classes of each row are kept, at least 1, in their dtype.

    Halves of finite logits lie above the lowest number: less it they are at least 1,
    and 0 for -inf. XLA for CPUs fuses these operations into the sum; it stores what a
    select gives first.
    """
    largest = jnp.finfo(centred.logits.dtype).max
    above = jnp.maximum(centred.logits * 0.5, -largest) + largest
    kept = jnp.ceil(jnp.minimum(above, 1))
    return jnp.maximum(jnp.sum(kept, axis, keepdims=True), 1)
