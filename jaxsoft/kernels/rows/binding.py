"""How kernels for rows are called: as primitives, whatever the chip.

A primitive knows under `jax.vmap` that a batch is more rows, and refuses to be compiled
for a platform that its kernel is not for. XLA copies the logits before a kernel reads
them where there is a mask, where classes are not on the last axis and, for GPUs, where
V is no multiple of 128. On several devices kernels belong inside `jax.shard_map`: no
compiler cuts them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

from jaxsoft._core import noise, registry
from jaxsoft._core.numerics import is_ordinary
from jaxsoft.logits.rows import Rows

__all__ = ["RowPlan", "RowPrimitive", "prepare"]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """What is known of a call when it is traced.

    Attributes:
      implementation: which kernels run it.
      static_tau: the temperature if it is an ordinary static number, else None and
        an array has it.
      generator: of the noise, or None without noise.
      hard: whether the result is one-hot, the class of the largest perturbed logit.
      expected: whether the mean of centred logits is wanted, weighted by probabilities.
      mean: whether their mean over the kept classes is wanted.
    """

    implementation: str
    static_tau: float | None
    generator: noise.Generator | None = None
    hard: bool = False
    expected: bool = False
    mean: bool = False


def prepare(plan: RowPlan, rows: Rows) -> tuple[RowPlan, jax.Array, jax.Array | None]:
    """Drops classes by -inf and gives rows their temperatures.

    Args:
      plan: what is known of the call; its temperature may be any static number.
      rows: the logits, in the caller's dtype, temperatures and the mask.

    Returns:
      The plan; the logits [R, V]; and temperatures [R, 1] float32, or None where the
      plan has the one of all rows.
    """
    x, tau, where = rows
    if where is not None:
        x = jnp.where(where, x, jnp.asarray(-jnp.inf, x.dtype))
    static = plan.static_tau
    if static is not None and not is_ordinary(static):
        # At τ = 0 and τ = ∞ more than a division is needed, and kernels do it for
        # temperatures that are arrays alone.
        tau = jnp.full((1, 1), static, jnp.float32)
        plan = dataclasses.replace(plan, static_tau=None)
    if tau is not None:
        tau = jnp.broadcast_to(tau.astype(jnp.float32), (x.shape[0], 1))
    return plan, x, tau


class RowPrimitive:
    """A primitive of rows: every argument and every result has R of them.

    Attributes:
      primitive: JAX's.
      step: what the registry calls it.
    """

    def __init__(self, name: str, step: str):
        """Makes the primitive; its derivatives are the caller's to add.

        Args:
          name: the primitive's.
          step: what the registry calls it.
        """
        self.step = step
        self.primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(_evaluate)
        primitive.def_effectful_abstract_eval(
            lambda *args, plan, given, jaxpr: (jaxpr.out_avals, jaxpr.effects)
        )
        mlir.register_lowering(primitive, _lowering())
        batching.primitive_batchers[primitive] = functools.partial(_batch, self)

    def __call__(self, plan: RowPlan, *args: jax.Array | None) -> list[jax.Array]:
        """Calls the kernel with those arguments that are not None."""
        return _bind(self, plan, *args)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _bind(
    function: RowPrimitive, plan: RowPlan, *args: jax.Array | None
) -> list[jax.Array]:
    """Traces the kernel, once for each plan and shapes."""
    given = tuple(a is not None for a in args)
    args = tuple(a for a in args if a is not None)
    run = functools.partial(_run, function.step, plan, given)
    jaxpr = jax.make_jaxpr(run)(*args)
    return function.primitive.bind(*args, plan=plan, given=given, jaxpr=jaxpr)


def _run(step: str, plan: RowPlan, given: tuple[bool, ...], *args) -> list[jax.Array]:
    """Calls the kernel of a step."""
    rest = iter(args)
    args = [next(rest) if g else None for g in given]
    run = registry.kernel(step, plan.implementation)
    assert run is not None
    return jax.tree.leaves(run(plan, *args))


def _evaluate(*args, plan, given, jaxpr):
    del plan, given
    return jaxpr_as_fun(jaxpr)(*args)


def _batch(function: RowPrimitive, args, dims, *, plan, given, jaxpr):
    """Makes rows of a batch."""
    del jaxpr
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)

    def fold(array, dim):
        if dim is None:
            array = jnp.broadcast_to(array, (size, *array.shape))
        else:
            array = jnp.moveaxis(array, dim, 0)
        return array.reshape(-1, array.shape[2])

    rest = iter([fold(a, d) for a, d in zip(args, dims, strict=True)])
    results = function(plan, *(next(rest) if g else None for g in given))
    return [out.reshape(size, -1, out.shape[1]) for out in results], [0] * len(results)


def _lowering() -> Any:
    """Returns how a primitive lowers where its kernel can run."""
    lower = mlir.lower_fun(_evaluate, multiple_results=True)

    def rule(ctx, *args, plan, given, jaxpr):
        # A kernel in an interpreter has effects, and runs anywhere.
        if not jaxpr.effects:
            registry.check_platforms(plan.implementation, ctx.module_context.platforms)
        return lower(ctx, *args, plan=plan, given=given, jaxpr=jaxpr)

    return rule
