"""What the tables of functions are made of: shapes, and programs that have them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from jaxsoft._core.exporting import PyTree

__all__ = ["KEY_SEED", "Operation", "Program", "Shapes", "array"]

KEY_SEED = 0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes to compile for.

    Attributes:
      tokens: N, rows of hidden states or of stored logits.
      hidden: H.
      vocabulary: V.
      dtype: of logits, hidden states and kernels.
      workspace: bytes of temporary memory that functions may take that ask how many;
        None for what they take unless told.
    """

    tokens: int = 128
    hidden: int = 64
    vocabulary: int = 256
    dtype: str = "bfloat16"
    workspace: int | None = None

    @property
    def logits(self) -> jax.ShapeDtypeStruct:
        """[N, V]."""
        return array(self.tokens, self.vocabulary, dtype=self.dtype)

    @property
    def states(self) -> jax.ShapeDtypeStruct:
        """[N, H]."""
        return array(self.tokens, self.hidden, dtype=self.dtype)

    @property
    def kernel(self) -> jax.ShapeDtypeStruct:
        """[H, V]."""
        return array(self.hidden, self.vocabulary, dtype=self.dtype)

    @property
    def labels(self) -> jax.ShapeDtypeStruct:
        """[N] integers."""
        return array(self.tokens, dtype="int32")


def array(*shape: int, dtype: str) -> jax.ShapeDtypeStruct:
    """Returns an array that is not there."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays, and those.

    Attributes:
      function: takes the arrays, and options by name.
      arrays: pytrees of arrays that are not there.
      moving: how many of the first arrays have gradients; 0 for no gradient.
      floats: picks what is differentiated from the result; None takes all of it.
      donated: which arrays may be written over.
      is_gradient: whether the function itself gives value and gradient.
    """

    function: Callable[..., PyTree]
    arrays: tuple[PyTree, ...]
    moving: int = 0
    floats: Callable[[PyTree], PyTree] | None = None
    donated: tuple[int, ...] = ()
    is_gradient: bool = False

    def calls(
        self, options: Mapping[str, object]
    ) -> Iterator[tuple[str, Callable[..., PyTree], tuple[PyTree, ...]]]:
        """Yields what there is to compile: its kind, a function and its arrays.

        Args:
          options: arguments of the function by name.
        """
        pick = self.floats or (lambda result: result)

        def value(*arrays):
            return self.function(*arrays, **options)

        def both(cotangent, *arrays):
            fixed = arrays[self.moving :]
            result, pull = jax.vjp(
                lambda *moving: pick(value(*moving, *fixed)), *arrays[: self.moving]
            )
            return result, pull(cotangent)

        yield ("value_and_grad" if self.is_gradient else "value"), value, self.arrays
        if self.moving:
            cotangent = jax.eval_shape(lambda *a: pick(value(*a)), *self.arrays)
            yield "value_and_grad", both, (cotangent, *self.arrays)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A public function.

    Attributes:
      name: its name in `jaxsoft`.
      program: makes its program of given shapes.
      chooses: whether it takes an `implementation`.
      takes_workspace: whether it takes `workspace_bytes`.
    """

    name: str
    program: Callable[[Shapes], Program]
    chooses: bool
    takes_workspace: bool = False

    def options(
        self, implementation: str | None, workspace: int | None = None
    ) -> dict[str, object]:
        """Returns the options that ask for an implementation, and for a workspace."""
        options: dict[str, object] = {}
        if self.chooses:
            options["implementation"] = implementation
        if self.takes_workspace and workspace is not None:
            options["workspace_bytes"] = workspace
        return options
