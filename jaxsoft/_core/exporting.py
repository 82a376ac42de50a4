"""Pytrees that exported functions may take and return."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import export

__all__ = ["Leaf", "PyTree", "exportable_dataclass", "exportable_namedtuple"]

# An array of a pytree: NumPy's where the pytree is made, JAX's where a compiled
# function takes it as an argument.
Leaf = np.ndarray | jax.Array
# JAX has no type for pytrees: an array, or any registered container of some.
PyTree = Any

T = TypeVar("T", bound=type)


def exportable_dataclass(*static: str) -> Callable[[T], T]:
    """Makes a dataclass a pytree that `jax.export` knows how to write.

    Args:
      *static: fields that hold integers and tuples of them, and are part of a program;
        all others are leaves, or pytrees of them.

    Returns:
      A decorator for the class, whose name must be that of no other.

    Example:
      >>> import dataclasses
      >>> @exportable_dataclass("side")
      ... @dataclasses.dataclass
      ... class ExampleSquare:
      ...     side: int
      ...     centre: float
      >>> print(jax.tree.leaves(ExampleSquare(3, 0.5)))
      [0.5]
    """

    def register(cls: T) -> T:
        fields = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in fields if name not in static]
        jax.tree_util.register_dataclass(cls, data, list(static))
        return export.register_pytree_node_serialization(
            cls,
            serialized_name=_name(cls),
            serialize_auxdata=lambda values: json.dumps(values).encode(),
            deserialize_auxdata=lambda text: _frozen(json.loads(bytes(text))),
        )

    return register


def exportable_namedtuple(cls: T) -> T:
    """Makes a named tuple a pytree that `jax.export` knows how to write."""
    return export.register_namedtuple_serialization(cls, serialized_name=_name(cls))


def _name(cls: type) -> str:
    return f"jaxsoft.{cls.__name__}"


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
