"""Softmaxes of rows by hand-written kernels.

Two primitives. One gives `y = softmax(x / τ)` of rows, or the same of perturbed
logits; the other the product of its derivative with rows,
`y (g - Σ y g / Σ y) / τ`, which is what both modes of differentiation need, since that
matrix is symmetric: from y alone, one read of y, one of g, one write. What a derivative
of that needs, and τ's, is plain XLA.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, noise, registry
from jaxsoft._core.numerics import inverse
from jaxsoft.kernels.rows.binding import RowPlan, RowPrimitive, prepare
from jaxsoft.logits.arguments import has_no_tangent
from jaxsoft.logits.rows import Rows, to_rows

__all__ = ["gumbel_softmax", "softmax"]


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
    """Calls the kernel, where there are rows."""
    if not rows.logits.size:
        return rows.logits
    plan, x, tau = prepare(plan, rows)
    x, tau, words = mesh_axes.like((x, tau, words), (x, tau, words))
    return (_straight_through if plan.hard else _relaxed)(plan, x, tau, words)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _relaxed(plan, x, tau, words):
    return _softmax_primitive(plan, x, tau, words)[0]


def _relaxed_jvp(plan, primals, tangents):
    y = _relaxed(plan, *primals)
    return y, _tangent(plan, y, primals, tangents)


_relaxed.defjvp(_relaxed_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(plan, x, tau, words):
    return _softmax_primitive(plan, x, tau, words)[0]


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
    return _slope_primitive(plan, y, g, scale)[0]


def _formula(y: jax.Array, g: jax.Array, scale: Any) -> jax.Array:
    """Returns what the kernel of `_slope` computes, in plain XLA and float32."""
    y, g = y.astype(jnp.float32), g.astype(jnp.float32)
    total = jnp.sum(y, axis=1, keepdims=True)
    mean = jnp.sum(y * g, axis=1, keepdims=True) / jnp.where(total == 0, 1, total)
    return y * (g - mean) * scale


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


_softmax_primitive = RowPrimitive("jaxsoft_softmax", "rows")
_slope_primitive = RowPrimitive("jaxsoft_softmax_slope", "rows_slope")
ad.primitive_jvps[_slope_primitive.primitive] = _slope_jvp
ad.primitive_transposes[_slope_primitive.primitive] = _slope_transpose
