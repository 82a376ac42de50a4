"""Softmaxes of rows by hand-written kernels, and what the kernels share.

Two primitives. One gives `y = softmax(x / τ)` of rows, or the same of perturbed
logits; the other the product of its derivative with rows,
`y (g - Σ y g / Σ y) / τ`, which is what both modes of differentiation need, since that
matrix is symmetric: from y alone, one read of y, one of g, one write. What a derivative
of that needs, and τ's, is plain XLA. Under `jax.vmap` a batch becomes rows.

XLA copies the logits before a kernel reads them where there is a mask, where classes
are not on the last axis and, for GPUs, where V is no multiple of 128. On several
devices kernels belong inside `jax.shard_map`: no compiler cuts them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, noise, registry
from jaxsoft._core.numerics import inverse, is_ordinary
from jaxsoft.logits.arguments import has_no_tangent
from jaxsoft.logits.rows import Rows, to_rows

__all__ = ["RowPlan", "gumbel_softmax", "softmax"]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """What is known of a call when it is traced.

    Attributes:
      implementation: which kernels run it.
      static_tau: the temperature if it is an ordinary static number, else None and
        an array has it.
      generator: of the noise, or None without noise.
      hard: whether the result is one-hot, the class of the largest perturbed logit.
    """

    implementation: str
    static_tau: float | None
    generator: noise.Generator | None = None
    hard: bool = False


def softmax(
    implementation: str,
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> jax.Array:
    """Returns probabilities by a kernel; the arguments are those of `jaxsoft.softmax`.

    Raises:
      NotImplementedError: for a dtype that the kernels do not have.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    registry.check_dtype("rows", implementation, "logits", rows.logits.dtype)
    return back(_compiled(RowPlan(implementation, static_tau), None, rows))


def gumbel_softmax(
    implementation: str,
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    hard: bool,
    generator: noise.Generator,
) -> jax.Array:
    """Returns samples by a kernel; the arguments are those of `gumbel_softmax`.

    Raises:
      NotImplementedError: for a dtype that the kernels do not have.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    registry.check_dtype("rows", implementation, "logits", rows.logits.dtype)
    words = noise.row_words(key, rows.logits.shape[0])
    plan = RowPlan(implementation, static_tau, generator, hard)
    return back(_compiled(plan, words, rows))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _compiled(plan: RowPlan, words: jax.Array | None, rows: Rows) -> jax.Array:
    """Drops classes by -inf, gives rows their temperatures, and calls the kernel."""
    x, tau, where = rows
    if not x.size:
        return x
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
    x, tau, words = mesh_axes.like((x, tau, words), (x, tau, words))
    return (_straight_through if plan.hard else _relaxed)(plan, x, tau, words)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _relaxed(plan, x, tau, words):
    return _bind(_softmax_primitive, plan, x, tau, words)


def _relaxed_jvp(plan, primals, tangents):
    y = _relaxed(plan, *primals)
    return y, _tangent(plan, y, primals, tangents)


_relaxed.defjvp(_relaxed_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(plan, x, tau, words):
    return _bind(_softmax_primitive, plan, x, tau, words)


def _straight_through_jvp(plan, primals, tangents):
    """Draws the same noise again for y, of which the derivative is."""
    soft = dataclasses.replace(plan, hard=False)
    tangent = _tangent(soft, _relaxed(soft, *primals), primals, tangents)
    return _straight_through(plan, *primals), tangent


_straight_through.defjvp(_straight_through_jvp, symbolic_zeros=True)


def _tangent(plan: RowPlan, y: jax.Array, primals: Any, tangents: Any) -> jax.Array:
    """Returns y (u - Σ y u / Σ y) / τ, with u = dx - log y dτ."""
    tau, (dx, dtau, _) = primals[1], tangents
    scale = None if tau is None else inverse(tau, jnp.dtype(jnp.float32))
    terms = [] if has_no_tangent(dx) else [_slope(plan, y, dx, scale)]
    if not has_no_tangent(dtau):
        wide = y.astype(jnp.float32)
        log_y = jnp.log(jnp.where(wide == 0, 1, wide))
        terms.append((_formula(wide, -log_y, scale) * dtau).astype(y.dtype))
    return sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _slope(plan: RowPlan, y, g, scale) -> jax.Array:
    """Returns y (g - Σ y g / Σ y) / τ by a kernel; `scale` is 1/τ, or None."""
    return _bind(_slope_primitive, plan, y, g, scale)


def _formula(y: jax.Array, g: jax.Array, scale: Any) -> jax.Array:
    """Returns what the kernel of `_slope` computes, in plain XLA and float32."""
    y, g = y.astype(jnp.float32), g.astype(jnp.float32)
    total = jnp.sum(y, axis=1, keepdims=True)
    mean = jnp.sum(y * g, axis=1, keepdims=True) / jnp.where(total == 0, 1, total)
    return y * (g - mean) * scale


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _bind(primitive: Primitive, plan: RowPlan, *args: Any) -> jax.Array:
    """Calls a primitive with those arguments that are not None; compiled once."""
    given = tuple(a is not None for a in args)
    args = tuple(a for a in args if a is not None)
    run = functools.partial(_run, primitive, plan, given)
    jaxpr = jax.make_jaxpr(run)(*args)
    return primitive.bind(*args, plan=plan, given=given, jaxpr=jaxpr)[0]


def _run(primitive, plan, given, *args) -> list[jax.Array]:
    """Calls the kernel of a primitive."""
    rest = iter(args)
    args = [next(rest) if g else None for g in given]
    step = "rows" if primitive is _softmax_primitive else "rows_slope"
    run = registry.kernel(step, plan.implementation)
    assert run is not None
    return [run(plan, *args)]


def _evaluate(*args, plan, given, jaxpr):
    del plan, given
    return jaxpr_as_fun(jaxpr)(*args)


def _batch(primitive, args, dims, *, plan, given, jaxpr):
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
    out = _bind(primitive, plan, *(next(rest) if g else None for g in given))
    return [out.reshape(size, -1, out.shape[1])], [0]


def _slope_jvp(primals, tangents, *, plan, given, jaxpr):
    """Differentiates by g with the kernel, by y and 1/τ with the formula."""
    del jaxpr
    y, g, *scale = primals
    dy, dg, *dscale = tangents
    out = _slope(plan, y, g, *(scale or [None]))
    terms = []
    if not isinstance(dg, ad.Zero):
        terms.append(_slope(plan, y, dg, *(scale or [None])))
    if not all(isinstance(t, ad.Zero) for t in (dy, *dscale)):
        known = (y, *(scale or [_static_scale(plan)]))
        moving = [ad.instantiate_zeros(t) for t in (dy, *dscale)]
        if not scale:
            moving.append(jnp.zeros_like(known[1]))
        _, tangent = jax.jvp(lambda y, s: _formula(y, g, s), known, tuple(moving))
        terms.append(tangent.astype(out.dtype))
    return [out], [sum(terms) if terms else jnp.zeros_like(out)]


def _static_scale(plan: RowPlan) -> jax.Array:
    assert plan.static_tau is not None
    return jnp.full((1, 1), 1 / plan.static_tau, jnp.float32)


def _slope_transpose(cotangents, y, g, *scale, plan, given, jaxpr):
    """Returns the same product: the matrix is symmetric."""
    del given, jaxpr
    assert ad.is_undefined_primal(g)
    (cotangent,) = cotangents
    out = ad.Zero(g.aval)
    if not isinstance(cotangent, ad.Zero):
        out = _slope(plan, y, cotangent, *(scale or [None]))
    return [None, out, *[None for _ in scale]]


def _lowering():
    """Returns how a primitive lowers where its kernel can run."""
    lower = mlir.lower_fun(_evaluate, multiple_results=True)

    def rule(ctx, *args, plan, given, jaxpr):
        # A kernel in an interpreter has effects, and runs anywhere.
        if not jaxpr.effects:
            registry.check_platforms(plan.implementation, ctx.module_context.platforms)
        return lower(ctx, *args, plan=plan, given=given, jaxpr=jaxpr)

    return rule


def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(_evaluate)
    primitive.def_effectful_abstract_eval(
        lambda *args, plan, given, jaxpr: (jaxpr.out_avals, jaxpr.effects)
    )
    mlir.register_lowering(primitive, _lowering())
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


_softmax_primitive = _primitive("jaxsoft_softmax")
_slope_primitive = _primitive("jaxsoft_softmax_slope")
ad.primitive_jvps[_slope_primitive] = _slope_jvp
ad.primitive_transposes[_slope_primitive] = _slope_transpose
