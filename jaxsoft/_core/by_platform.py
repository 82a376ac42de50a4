"""Functions that platforms compute in their own ways, of which one is traced.

`jax.lax.platform_dependent` traces the functions of all platforms, differentiates each
and batches each: all but one for programs that nobody compiles. Here a function and
what is derived from it are traced when the platform is known, as a program is lowered.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxsoft._core import mesh_axes

__all__ = ["by_platform"]

Result = TypeVar("Result")
# Of flat arguments and flat results.
_Flat = Callable[..., list[jax.Array]]


def by_platform(
    *args: Any, default: Callable[..., Result], **of_platforms: Callable[..., Result]
) -> Result:
    """Calls the function of the platform that a program is compiled for.

    The same as `jax.lax.platform_dependent`, in less time to trace. A derivative keeps
    the arguments alone and computes again what else it needs, which XLA merges with
    the function's own where both are in one program: what takes long to compute twice,
    such as a matrix product, belongs outside.

    Args:
      *args: pytrees of arrays, None among them.
      default: the function of the other platforms. All functions return arrays of the
        same shapes and types, have no effects, and take all arrays as arguments.
      **of_platforms: functions by platform: cpu, cuda, rocm or tpu.

    Returns:
      What the function returns.

    Raises:
      TypeError: if a function uses an array, being traced, that is no argument.

    Notes:
      Every transformation, but `jax.custom_vjp` within a function that is
      differentiated.
    """
    flat, tree = jax.tree.flatten(args)
    # Parameters that shards have in common are added up outside.
    flat = mesh_axes.like(flat, flat)
    functions = tuple(sorted(of_platforms.items()))
    # Programs are mostly for the devices at hand: any platform tells the shapes.
    traced_for = jax.default_backend()
    function = of_platforms.get(traced_for, default)
    jaxpr, result = jax.make_jaxpr(function, return_shape=True)(
        *jax.tree.unflatten(tree, flat)
    )
    if any(isinstance(const, Tracer) for const in jaxpr.consts):
        raise TypeError("A function of a platform must take all arrays as arguments.")
    branches = _Branches(default, functions, tree, function, jaxpr)
    out = _primitive.bind(*flat, function=branches, avals=tuple(jaxpr.out_avals))
    return jax.tree.unflatten(jax.tree.structure(result), out)


class _Function(abc.ABC):
    """A function of each platform."""

    @property
    @abc.abstractmethod
    def platforms(self) -> tuple[str, ...]:
        """The platforms that have their own."""

    @abc.abstractmethod
    def on(self, platform: str | None) -> _Flat:
        """Returns the function of a platform, that of all others for None."""

    def __repr__(self) -> str:
        """Names the kind and the platforms, as a program that is printed shows them."""
        return f"{type(self).__name__}({', '.join(self.platforms)})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Branches(_Function):
    """The functions that were given.

    Attributes:
      default: that of other platforms.
      functions: by platform.
      tree: the structure of their arguments.
      known: the function that was traced.
      jaxpr: its program.
    """

    default: Callable[..., Any]
    functions: tuple[tuple[str, Callable[..., Any]], ...]
    tree: Any
    known: Callable[..., Any]
    jaxpr: Any

    @property
    def platforms(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.functions)

    def on(self, platform: str | None) -> _Flat:
        function = dict(self.functions).get(platform or "", self.default)
        if function is self.known:
            return jaxpr_as_fun(self.jaxpr)
        return lambda *flat: jax.tree.leaves(
            function(*jax.tree.unflatten(self.tree, flat))
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _Derived(_Function):
    """What is derived from a function of each platform."""

    function: _Function

    @property
    def platforms(self) -> tuple[str, ...]:
        return self.function.platforms


@dataclasses.dataclass(frozen=True, repr=False)
class _Tangents(_Derived):
    """The tangents of a function's results, of its arguments and their tangents.

    Attributes:
      moving: which arguments have a tangent.
      has_tangent: which results have one.
    """

    moving: tuple[bool, ...]
    has_tangent: tuple[bool, ...]

    def on(self, platform: str | None) -> _Flat:
        function = self.function.on(platform)

        def tangents(*args):
            primals, given = args[: len(self.moving)], args[len(self.moving) :]
            still = [a for a, m in zip(primals, self.moving, strict=True) if not m]
            those = [a for a, m in zip(primals, self.moving, strict=True) if m]

            def of_moving(*those):
                return function(*_merged(self.moving, those, still))

            _, moved = jax.jvp(of_moving, tuple(those), tuple(given))
            return [m for m, has in zip(moved, self.has_tangent, strict=True) if has]

        return tangents


@dataclasses.dataclass(frozen=True, repr=False)
class _Transposed(_Derived):
    """The transpose of a function that is linear, of other arguments and cotangents.

    Attributes:
      linear: which arguments it is linear in.
      types: theirs.
    """

    linear: tuple[bool, ...]
    types: tuple[Any, ...]

    def on(self, platform: str | None) -> _Flat:
        function = self.function.on(platform)
        known = self.linear.count(False)

        def transposed(*args):
            def of_linear(*those):
                return function(*_merged(self.linear, those, args[:known]))

            return list(
                jax.linear_transpose(of_linear, *self.types)(list(args[known:]))
            )

        return transposed


@dataclasses.dataclass(frozen=True, repr=False)
class _Batched(_Derived):
    """A function of batches.

    Attributes:
      dims: the axis of the batch in each argument, or None.
    """

    dims: tuple[int | None, ...]

    def on(self, platform: str | None) -> _Flat:
        return jax.vmap(self.function.on(platform), self.dims)


def _merged(which: Sequence[bool], those: Any, others: Any) -> list[Any]:
    """Returns those where `which` says so, and the others elsewhere."""
    those, others = iter(those), iter(others)
    return [next(those) if w else next(others) for w in which]


_primitive = Primitive("jaxsoft_by_platform")
_primitive.multiple_results = True


def _evaluate(*args, function, avals):
    """Computes the function of the platform at hand, or a choice among several."""
    del avals
    functions = {name: function.on(name) for name in function.platforms}
    return lax.platform_dependent(*args, default=function.on(None), **functions)


def _lower(ctx, *args, function, avals):
    """Lowers the function of the one platform, or a choice among several."""
    platforms = ctx.platforms or ctx.module_context.platforms
    on_host = ctx.jaxpr_eqn_ctx is not None and ctx.jaxpr_eqn_ctx.compute_type
    if len(platforms) == 1 and not on_host:
        chosen = function.on(platforms[0])
    else:
        chosen = functools.partial(_evaluate, function=function, avals=avals)
    return mlir.lower_fun(chosen)(ctx, *args)


def _jvp(primals, tangents, *, function, avals):
    out = _primitive.bind(*primals, function=function, avals=avals)
    moving = tuple(not isinstance(t, ad.Zero) for t in tangents)
    has_tangent = tuple(jnp.issubdtype(a.dtype, jnp.inexact) for a in avals)
    moved = []
    if any(has_tangent):
        moved = _primitive.bind(
            *primals,
            *(t for t in tangents if not isinstance(t, ad.Zero)),
            function=_Tangents(function, moving, has_tangent),
            avals=tuple(a for a, has in zip(avals, has_tangent, strict=True) if has),
        )
    still = [
        ad.Zero(a.to_tangent_aval())
        for a, has in zip(avals, has_tangent, strict=True)
        if not has
    ]
    return out, _merged(has_tangent, moved, still)


def _transpose(cotangents, *args, function, avals):
    del avals
    linear = tuple(map(ad.is_undefined_primal, args))
    types = tuple(a.aval for a in args if ad.is_undefined_primal(a))
    if all(isinstance(c, ad.Zero) for c in cotangents):
        return _merged(linear, map(ad.Zero, types), [None] * linear.count(False))
    found = _primitive.bind(
        *(a for a in args if not ad.is_undefined_primal(a)),
        *map(ad.instantiate_zeros, cotangents),
        function=_Transposed(function, linear, types),
        avals=types,
    )
    return _merged(linear, found, [None] * linear.count(False))


def _batch(args, dims, *, function, avals):
    del avals
    batched = _Batched(function, tuple(dims))
    avals = jax.make_jaxpr(batched.on(jax.default_backend()))(*args).out_avals
    out = _primitive.bind(*args, function=batched, avals=tuple(avals))
    return out, [0] * len(out)


_primitive.def_impl(_evaluate)
_primitive.def_abstract_eval(lambda *_, function, avals: list(avals))
mlir.register_lowering(_primitive, _lower)
ad.primitive_jvps[_primitive] = _jvp
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _batch
