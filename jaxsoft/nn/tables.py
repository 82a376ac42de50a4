"""A tree of classes, bands or a sampler as state of a module."""

from __future__ import annotations

from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["Tables"]

T = TypeVar("T")


class Tables(nnx.Module, Generic[T]):
    """A pytree whose arrays are variables of their own, no parameters.

    Flax restores such state from pure dictionaries, and what reads variables, to export
    them, finds arrays. The attributes are an `nnx.Variable` for each array, named by
    its path in the pytree.

    Args:
      value: the pytree; leaves that are no arrays are constants of the module.

    Example:
      >>> import jaxsoft
      >>> from flax import nnx
      >>> tables = Tables(jaxsoft.ClassBands.from_counts([1, 5, 9], cutoffs=(1,)))
      >>> print(nnx.to_pure_dict(nnx.state(tables))["order"])
      [2 1 0]
      >>> print(tables.get_value().cutoffs)
      (1, 3)
    """

    def __init__(self, value: T):
        """Takes the pytree apart."""
        leaves, self._form = jax.tree_util.tree_flatten_with_path(value)
        # What each leaf is: the name of a variable, or a constant alone.
        parts: list[tuple[str] | tuple[None, object]] = []
        for path, leaf in leaves:
            if isinstance(leaf, np.ndarray | jax.Array):
                name = jax.tree_util.keystr(path, simple=True, separator="_")
                # Flax takes the names of digits for places in a list.
                name = name if name.isidentifier() else f"array_{name}"
                if hasattr(self, name):
                    raise ValueError(f"`value` must not have two arrays named {name}.")
                parts.append((name,))
                setattr(self, name, nnx.Variable(jnp.asarray(leaf)))
            else:
                parts.append((None, leaf))
        self._parts = tuple(parts)

    def get_value(self) -> T:
        """Returns the pytree, of the arrays that the variables hold."""
        leaves = [
            part[1] if len(part) == 2 else getattr(self, part[0])[...]
            for part in self._parts
        ]
        return jax.tree.unflatten(self._form, leaves)
