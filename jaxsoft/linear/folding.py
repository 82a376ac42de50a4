"""Calls whose batches under vmap become more rows, and which know how to be sharded.

`jax.vmap` over a loop batches every operand of the loop: a vocabulary tile for each
example, and a full dkernel for each before they are summed. The rows of a batch
that shares one kernel are just more rows, so a `Foldable` call is a primitive of its
own: under vmap it folds the batch into the rows, and when differentiated it steps
aside for a function that knows which of its arguments have a tangent. Compiled for
several devices it is cut along rows and classes by `partitioning.py`: XLA alone
would gather what a loop slices.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxsoft._core import mesh_axes
from jaxsoft._core.registry import check_platforms
from jaxsoft.linear import partitioning

__all__ = ["Foldable"]


class Foldable(abc.ABC):
    """A function of arrays that knows how to take a batch, and how to be sharded.

    Subclasses are frozen dataclasses, since they are parameters of a primitive.
    Roles are those of `operands.py`.
    """

    @abc.abstractmethod
    def call(self, *args: Any) -> Any:
        """Computes the function; arguments and result are pytrees of arrays."""

    @abc.abstractmethod
    def roles(self, *args: Any) -> Any:
        """Returns the roles of the arrays, in the structure of `args`."""

    @abc.abstractmethod
    def out_roles(self, *args: Any) -> Any:
        """Returns the roles of the arrays of the result, in its structure."""

    @property
    def partial(self) -> bool:
        """Whether shards' results still have to be added up."""
        return False

    @property
    def platform(self) -> str | None:
        """The one platform that the function has a kernel for; None for any."""
        return None

    def over(self, vocab_axes: tuple[str, ...]) -> "Foldable":
        """Returns the same function with its classes sharded over mesh axes."""
        configs = {
            field.name: value.over(vocab_axes)
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if hasattr(value := getattr(self, field.name), "over")
        }
        return dataclasses.replace(self, **configs)  # pyright: ignore

    def differentiable(self, *moving: Any) -> Callable[..., Any]:
        """Returns the function to differentiate, given which arguments move."""
        del moving
        return self.call

    def __call__(self, *args: Any) -> Any:
        """Calls the function through the primitive."""
        flat, tree = jax.tree.flatten(args)
        jaxpr = jax.make_jaxpr(self._shared(tree, flat))(*flat)
        out = _primitive.bind(*flat, jaxpr=jaxpr, foldable=self, tree=tree)
        # The roles have the structure of the result: no need to trace it again.
        return jax.tree.unflatten(jax.tree.structure(self.out_roles(*args)), out)

    def _shared(self, tree: Any, flat: list[Any]) -> Callable[..., list[jax.Array]]:
        """Returns the function of flat arguments, as devices may share it."""
        function = self.flat(tree)
        if any(map(mesh_axes.axes, flat)):
            return function
        if self.platform is not None and jax.make_jaxpr(function)(*flat).effects:
            # A kernel in an interpreter: one device runs it, and in order.
            return function
        # Outside shard_map XLA may have to share the function among devices.
        return partitioning.shared(self, tree, *_roles(self, tree, flat))

    def flat(self, tree: Any) -> Callable[..., list[jax.Array]]:
        """Returns the function of flat arguments, and of flat results."""
        return lambda *flat: jax.tree.leaves(self.call(*jax.tree.unflatten(tree, flat)))


_primitive = Primitive("jaxsoft_rows")
_primitive.multiple_results = True


def _evaluate(*args, jaxpr, foldable, tree):
    del foldable, tree
    return jaxpr_as_fun(jaxpr)(*args)


def _jvp(primals, tangents, *, jaxpr, foldable, tree):
    """Differentiates by the arguments that have a tangent."""
    del jaxpr
    moving = [not isinstance(t, ad.Zero) for t in tangents]
    function = foldable.differentiable(*jax.tree.unflatten(tree, moving))

    def active_function(*active):
        rest = iter(active)
        args = [next(rest) if m else p for p, m in zip(primals, moving, strict=True)]
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, args)))

    active = [p for p, m in zip(primals, moving, strict=True) if m]
    tangents = [t for t, m in zip(tangents, moving, strict=True) if m]
    return jax.jvp(active_function, active, tangents)


def _batch(args, dims, *, jaxpr, foldable, tree):
    """Folds the batch into the rows, or runs its elements one after another."""
    del jaxpr
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    batched = [d is not None for d in dims]
    args = [
        jnp.moveaxis(a, d, 0) if m else a
        for a, d, m in zip(args, dims, batched, strict=True)
    ]
    roles, out_roles = _roles(foldable, tree, args)
    is_row = [role[0] == "n" for role in roles]
    # A batch becomes rows unless something has no rows, such as one dkernel an example.
    rows_alone = all(r for r, m in zip(is_row, batched, strict=True) if m)
    if rows_alone and all(role[0] == "n" for role in out_roles):
        folded = [
            _fold(a, m, size) if r else a
            for a, m, r in zip(args, batched, is_row, strict=True)
        ]
        out = jax.tree.leaves(foldable(*jax.tree.unflatten(tree, folded)))
        out = [a.reshape((size, a.shape[0] // size) + a.shape[1:]) for a in out]
    else:
        out = _one_by_one(args, batched, foldable, tree)
    return out, [0] * len(out)


def _roles(foldable, tree, args) -> tuple[list[str], list[str]]:
    """Returns the roles of the flat arguments and results."""
    args = jax.tree.unflatten(tree, args)
    roles, out_roles = foldable.roles(*args), foldable.out_roles(*args)
    return jax.tree.leaves(roles), jax.tree.leaves(out_roles)


def _fold(array: jax.Array, batched: bool, size: int) -> jax.Array:
    """Returns [size·N, …] from [size, N, …], or from [N, …] by repetition."""
    if not batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape((array.shape[0] * array.shape[1],) + array.shape[2:])


def _one_by_one(args, batched, foldable, tree):
    def function(active):
        rest = iter(active)
        full = [next(rest) if m else a for a, m in zip(args, batched, strict=True)]
        return jax.tree.leaves(foldable(*jax.tree.unflatten(tree, full)))

    return jax.lax.map(function, [a for a, m in zip(args, batched, strict=True) if m])


def _evaluate_whole(*args, jaxpr, foldable, tree):
    """Computes the function where devices cannot be made to share it.

    Compilers for TPU do not know custom partitioning (JAX issue 38196); shard_map is
    the way there, and `over_mesh`.
    """
    del jaxpr
    return foldable.flat(tree)(*args)


def _lowering(function):
    """Returns how the function lowers where its kernel, if it has one, can run."""
    lower = mlir.lower_fun(function, multiple_results=True)

    def rule(ctx, *args, jaxpr, foldable, tree):
        # A kernel in an interpreter has effects, and runs anywhere.
        if foldable.platform is not None and not jaxpr.effects:
            platforms = ctx.module_context.platforms
            check_platforms(foldable.config.implementation, platforms)
        return lower(ctx, *args, jaxpr=jaxpr, foldable=foldable, tree=tree)

    return rule


_primitive.def_impl(_evaluate)
_primitive.def_effectful_abstract_eval(
    lambda *args, jaxpr, foldable, tree: (jaxpr.out_avals, jaxpr.effects)
)
mlir.register_lowering(_primitive, _lowering(_evaluate))
mlir.register_lowering(_primitive, _lowering(_evaluate_whole), platform="tpu")
ad.primitive_jvps[_primitive] = _jvp
batching.primitive_batchers[_primitive] = _batch
