"""Types of what Pallas hands to a kernel, which JAX does not type.

A reference is a traced value inside a kernel. Pallas annotates what takes one by
`AbstractRef`, which has none of a reference's methods and which JAX keeps private. Type
checkers see the classes below as subclasses of it; at run time nothing is their
instance.
"""

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import jax

if TYPE_CHECKING:
    from jax._src.state import AbstractRef
    from jax.experimental.pallas import Slice
else:
    AbstractRef = object

__all__ = [
    "Barrier",
    "ChunkFold",
    "ChunkStep",
    "Factors",
    "Index",
    "Ref",
    "Scalar",
    "Scratch",
    "Tau",
]

# A number that is known when the kernel is traced, or a traced one.
Scalar: TypeAlias = int | jax.Array
# What selects a part of a reference: numbers, slices, `pl.ds`, or a tuple of them.
Index: TypeAlias = Any
# A temperature: static, or a column with one for each row.
Tau: TypeAlias = float | jax.Array
# What a row's numbers are multiplied by one after another; None stands for 1.
Factors: TypeAlias = tuple[float | jax.Array | None, ...]
# The memory and the barriers of a kernel, by name; Pallas has no common type of them.
Scratch: TypeAlias = dict[str, Any]

_Part = TypeVar("_Part", covariant=True)
_Carry = TypeVar("_Carry")


class _Parts(Protocol, Generic[_Part]):
    """What `at` returns: references to parts by their index."""

    def __getitem__(self, index: Index, /) -> _Part:
        """Returns a reference to a part."""
        ...


class Ref(AbstractRef):
    """A reference to an array in one of the device's memories.

    Attributes:
      shape: of the array.
      dtype: of the array.
      at: references to parts of the array, by their index.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> jax.numpy.dtype: ...  # noqa: D102

    @property
    def at(self) -> "_Parts[Ref]": ...  # noqa: D102

    def __getitem__(self, index: Index, /) -> jax.Array:
        """Loads a part of the array."""
        ...

    def __setitem__(self, index: Index, value: jax.Array, /) -> None:
        """Stores a part of the array."""
        ...

    def transpose(self, axes: tuple[int, ...], /) -> "Ref":
        """Returns a view with other axes first; JAX 0.11 or newer."""
        ...


class Barrier(AbstractRef):
    """A barrier or a semaphore, or an array of them.

    Attributes:
      at: those of the array, by their index.
    """

    @property
    def at(self) -> "_Parts[Barrier]": ...  # noqa: D102


class ChunkStep(Protocol, Generic[_Carry]):
    """What is folded over the chunks of a row's classes."""

    def __call__(
        self, columns: "Slice", valid: Scalar | None, carry: _Carry, /
    ) -> _Carry:
        """Returns the carry with a chunk.

        Args:
          columns: the chunk's classes in their block.
          valid: how many classes there are from the block's first on, None if the block
            has no more than these.
          carry: what the chunks before came to.
        """
        ...


class ChunkFold(Protocol):
    """Folds a step over the chunks of a block of classes, in their order."""

    def __call__(self, step: ChunkStep[_Carry], carry: _Carry, /) -> _Carry:
        """Returns what the last step returned."""
        ...
