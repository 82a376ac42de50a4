"""Centred logits: what every function of this room starts from.

`c = (x - m) / τ`, with m the largest kept logit, so that `c <= 0` and one class has
`c = 0`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._core.numerics import divide_by_temperature, finite_peak

__all__ = ["Centred", "centre"]


class Centred(NamedTuple):
    """Centred logits of each row; arrays keep the class axis, with size 1 if reduced.

    Attributes:
      values: c = (x - m) / τ in [-inf, 0]; -inf at dropped classes.
      peak: m, the largest kept logit; 0 in a row without any.
      kept: which classes count: not masked, and not -inf.
    """

    values: jax.Array
    peak: jax.Array
    kept: jax.Array


def centre(
    x: jax.Array,
    temperature: float | jax.Array,
    where: jax.Array | None,
    axis: int,
    *,
    guard: bool = True,
) -> Centred:
    """Centres the logits `x`, which already have the dtype to compute in.

    With `guard=False` the peak of a row without any kept class is the lowest finite
    number instead of 0, without a select, which would keep XLA from fusing the peak
    with the exponentials.
    """
    kept = x != -jnp.inf
    if where is not None:
        kept = kept & where
        x = jnp.where(where, x, -jnp.inf)
    if guard:
        peak = finite_peak(jnp.max(x, axis=axis, keepdims=True))
    else:
        finite = jnp.maximum(x, jnp.finfo(x.dtype).min)
        peak = jnp.max(finite, axis=axis, keepdims=True)
    return Centred(divide_by_temperature(x, peak, temperature), peak, kept)
