"""One tile of logits, and what is asked of its labels, wherever it was computed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Tile", "capped", "columns_of", "scatter"]


class Tile(NamedTuple):
    """One tile of logits.

    Attributes:
      start: the first class of the slice of the kernel.
      kernel: the slice of the kernel, in the dtype of the matrix products.
      logits: [R, B] u, with -inf at dropped classes and at those of other tiles.
      masked: whether some logits can be -inf on purpose.
      labels: [R, K] the labels' columns in this tile, -1 for none; None without
        labels.
      slope: [R, B] derivative of the soft-cap; None without one.
    """

    start: jax.Array
    kernel: jax.Array
    logits: jax.Array
    masked: bool
    labels: jax.Array | None
    slope: jax.Array | None

    def pick(self) -> jax.Array:
        """Returns the labels' logits, [R, K]; -inf for labels of other tiles."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            picked = jnp.where(self._is_label(), self.logits, -jnp.inf)
            return jnp.max(picked, axis=1, keepdims=True)
        columns = jnp.maximum(self.labels, 0)
        picked = jnp.take_along_axis(self.logits, columns, axis=1, mode="clip")
        return jnp.where(self.labels >= 0, picked, -jnp.inf)

    def place(self, values: jax.Array) -> jax.Array:
        """Returns [R, B] with values [R, K] added at the labels that are kept."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            here = self._is_label()
            if self.masked:
                here = here & (self.logits != -jnp.inf)
            return jnp.where(here, values, 0)
        placed = scatter(jnp.zeros_like(self.logits), self.labels, "add", values)
        return jnp.where(self.logits == -jnp.inf, 0, placed) if self.masked else placed

    def without_labels(self, values: jax.Array) -> jax.Array:
        """Returns values [R, B] with 0 at the labels."""
        assert self.labels is not None
        if self.labels.shape[1] == 1:
            return jnp.where(self._is_label(), 0, values)
        return scatter(values, self.labels, "set", 0)

    def _is_label(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, self.logits.shape, 1) == self.labels


def capped(
    u: jax.Array, bias: jax.Array | None, softcap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the logits with their bias and soft-cap, and the slope of the soft-cap.

    Args:
      u: [R, B] products.
      bias: [1, B] in the same dtype, or None.
      softcap: the cap, or None.

    Returns:
      The logits, and their derivative by what was capped, None without a soft-cap.
    """
    if bias is not None:
        u = u + bias
    if softcap is None:
        return u, None
    bent = jnp.tanh(u / softcap)
    u = softcap * bent
    if bias is not None:
        # The cap would lift the -inf of a masked class.
        u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
    # From the tanh itself: the rounded u would cost digits where it saturates.
    return u, 1 - bent * bent


def columns_of(classes: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns the columns of classes in a tile from `start`, -1 for those outside."""
    columns = classes - start
    return jnp.where((classes >= start) & (columns < size), columns, -1)


def scatter(array: jax.Array, columns: jax.Array, how: str, values) -> jax.Array:
    """Sets or adds values [R, K] at columns of array [R, B]; -1 is left out."""
    rows = lax.broadcasted_iota(jnp.int32, columns.shape, 0)
    columns = jnp.where(columns < 0, array.shape[1], columns)
    return getattr(array.at[rows, columns], how)(values, mode="drop")
