"""Centred logits: what every function of this room starts from.

`c = (x - m) / τ`, with m the largest kept logit, so that `c <= 0` and one class has
`c = 0`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft._core.numerics import divide_stored

__all__ = ["Centred", "centre", "mean_of_kept", "scaled_gaps"]


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
    *,
    finite: bool = False,
) -> Centred:
    """Centres the logits `x`, which already have the dtype to compute in.

    Derivatives ask which logits are -inf, and keep them, unless all are `finite`.
    """
    kept = x != -jnp.inf
    if where is not None:
        kept = kept & where
        x = jnp.where(where, x, -jnp.inf)
    x = x if finite else _still_below(x)
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
    scale = _scale(centred.peak)
    logits = jnp.maximum(centred.logits, jnp.finfo(centred.logits.dtype).min)
    return logits * scale - centred.peak * scale, scale


def _scale(peak: jax.Array) -> jax.Array:
    """Returns a power of 2 of each row with which differences stay finite."""
    return jnp.where(jnp.abs(peak) > 1, 0.25, 1.0).astype(peak.dtype)


def mean_of_kept(
    centred: Centred,
    temperature: float | jax.Array,
    where: jax.Array | None,
    axis: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of c over the kept classes of each row, and how many they are.

    The mean is 0 in a row without any, and their number at least 1. XLA for CPUs stores
    what a select gives before it adds it: there nothing is selected unless a sum over
    all classes, which is -inf where one is dropped, says so.
    """

    def of_kept(logits: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = logits != -jnp.inf
        number = jnp.sum(kept, axis, keepdims=True, dtype=jnp.int32)
        number = jnp.maximum(number, 1).astype(logits.dtype)
        c = jnp.where(kept, divide_stored(logits, peak, temperature), 0)
        return jnp.sum(c, axis, keepdims=True) / number, number

    def of_all(logits: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
        # To XLA it is no number that c is made of: that it would store for all classes.
        scale = _scale(peak)
        same = peak * scale / scale
        classes = logits.shape[axis]
        total = jnp.sum(logits - same, axis, keepdims=True)

        def mean() -> tuple[jax.Array, jax.Array]:
            mean = divide_stored(total / classes, jnp.zeros_like(total), temperature)
            return mean, jnp.full_like(total, classes)

        lacks = jnp.any(total == -jnp.inf)
        return jax.lax.cond(lacks, lambda: of_kept(logits, peak), mean)

    if where is not None:
        return of_kept(centred.logits, centred.peak)
    return jax.lax.platform_dependent(
        centred.logits, centred.peak, cpu=of_all, default=of_kept
    )
