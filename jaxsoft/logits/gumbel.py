"""Gumbel-softmax, and the best classes of perturbed logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, noise, registry
from jaxsoft._core.numerics import inverse, nan_where
from jaxsoft._core.registry import Implementation
from jaxsoft.logits import perturbation
from jaxsoft.logits.arguments import has_no_tangent, pick_temperature
from jaxsoft.logits.rows import Rows, to_rows

__all__ = ["gumbel_softmax", "gumbel_top_k", "slope"]


@mesh_axes.accepts_explicit("logits", axis="axis")
def gumbel_softmax(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    hard: bool = False,
    generator: noise.Generator = "threefry",
    implementation: Implementation | None = None,
) -> jax.Array:
    """A relaxed one-hot sample of a softmax, differentiable in the logits.

    `y = softmax((x + g) / τ)` with g standard Gumbel noise, one number a class. The
    largest entry of y is a class drawn from softmax(x), at every τ.

    Args:
      key: a JAX random key.
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it. τ = 0 is one-hot with zero
        gradients; τ = ∞ is uniform over the kept classes.
      axis: the class axis.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      hard: whether to return the one-hot class that was drawn, exactly, with the
        derivative of y: the straight-through estimator.
      generator: where random bits come from: "threefry", the cipher of `jax.random`
        with its 20 rounds, or "threefry13" with 13, the fewest without a known
        statistical flaw, which is faster.
      implementation: None, "xla" or a kernel, not yet measured, which draws the same
        noise on chip: "mosaic_tpu" for TPUs, float32 or bfloat16, or "mosaic_gpu" for
        Hopper and Blackwell GPUs, float32, bfloat16 or float16. Noise is drawn twice
        for rows that a chip does not hold: of some 300,000 float32 classes on TPUs,
        196,608 on GPUs.

    Returns:
      An array of the shape and dtype of `logits`. Dropped classes, and those with
      logit -inf, are 0; a row without any kept class is all 0.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape or `generator` does not fit, or a known temperature is
        negative or NaN.
      NotImplementedError: for an implementation that gumbel_softmax does not have, or
        a dtype, platform or GPU that its kernel is not for.

    Notes:
      Noise is float32 whatever the dtype of the logits (float64 for float64), with
      tails to 2⁻³³. Its bits depend on the key, the row and the class alone. The
      derivative needs y alone, in both modes and to any order: noise is neither stored
      nor drawn again. With NaN or +inf logits a row is NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import gumbel_softmax
      >>> logits = jnp.log(jnp.array([0.2, 0.3, 0.5]))
      >>> drawn = gumbel_softmax(
      ...     jax.random.key(0), jnp.broadcast_to(logits, (10000, 3)), 0.5, hard=True
      ... )
      >>> print(drawn.mean(0).round(1))
      [0.2 0.3 0.5]

    References:
      Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144; Maddison, Mnih and Teh, The Concrete Distribution,
      arXiv:1611.00712.
    """
    checks.one_of("generator", generator, noise.GENERATORS)
    chosen = registry.resolve("gumbel_softmax", implementation)
    if kernel := registry.kernel("gumbel_softmax", chosen):
        return kernel(
            chosen, key, logits, temperature, axis, where, bool(hard), generator
        )
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    return back(_compiled(static_tau, bool(hard), generator, key, rows))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _compiled(static_tau, hard, generator, key, rows: Rows) -> jax.Array:
    if not rows.logits.size:
        return rows.logits
    words = noise.row_words(key, rows.logits.shape[0])
    function = _straight_through if hard else _relaxed
    return function(static_tau, generator, words, *rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _relaxed(static_tau, generator, words, x, tau, where):
    return perturbation.relaxed(static_tau, generator, words, Rows(x, tau, where))


def _relaxed_jvp(static_tau, generator, primals, tangents):
    p = _relaxed(static_tau, generator, *primals)
    return p, slope(static_tau, p, primals, tangents)


_relaxed.defjvp(_relaxed_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(static_tau, generator, words, x, tau, where):
    del static_tau
    return perturbation.argmax_one_hot(generator, words, Rows(x, tau, where))


def _straight_through_jvp(static_tau, generator, primals, tangents):
    hard, p = _with_relaxed(static_tau, generator, *primals)
    return hard, slope(static_tau, p, primals, tangents)


_straight_through.defjvp(_straight_through_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_relaxed(static_tau, generator, words, x, tau, where):
    rows = Rows(x, tau, where)
    p, hard = perturbation.relaxed_and_one_hot(static_tau, generator, words, rows)
    return hard, p


def _with_relaxed_jvp(static_tau, generator, primals, tangents):
    hard, p = _with_relaxed(static_tau, generator, *primals)
    tangent = slope(static_tau, p, primals, tangents)
    return (hard, p), (tangent, tangent)


_with_relaxed.defjvp(_with_relaxed_jvp, symbolic_zeros=True)


def slope(static_tau, p: jax.Array, primals, tangents) -> jax.Array:
    """Returns the tangent of a relaxed sample from the sample itself.

    `dp = p (u - Σ p u / Σ p) / τ`, with `u = dx - log p dτ`: the tempered logits are
    log p but for a constant, which drops out. Σ p is 1 but for the rounding of p.

    Args:
      static_tau: the temperature if it is static.
      p: [R, V] the sample, in the dtype of the logits.
      primals: of words, logits, temperature and mask.
      tangents: theirs.

    Returns:
      [R, V] in the dtype of the sample.
    """
    _, dx, dtau, _ = tangents
    dtype = jnp.float64 if p.dtype == jnp.float64 else jnp.float32
    wide = p.astype(dtype)
    terms = [] if has_no_tangent(dx) else [dx.astype(dtype)]
    if not has_no_tangent(dtau):
        log_p = jnp.log(jnp.where(wide == 0, 1, wide))
        terms.append(-log_p * dtau.astype(dtype))
    if not terms:
        return jnp.zeros_like(p)
    change = sum(terms)
    total = jnp.sum(wide, axis=1, keepdims=True)
    mean = jnp.sum(wide * change, axis=1, keepdims=True)
    mean = mean / jnp.where(total == 0, 1, total)
    tau = pick_temperature(static_tau, primals[2])
    return (wide * (change - mean) * inverse(tau, dtype)).astype(p.dtype)


@mesh_axes.accepts_explicit("logits", axis="axis")
def gumbel_top_k(
    key: jax.Array,
    logits: ArrayLike,
    k: int,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    generator: noise.Generator = "threefry",
) -> tuple[jax.Array, jax.Array]:
    """Draws k different classes: one after another, each from those that are left.

    The k largest of `x - max x + g`, with g standard Gumbel noise: the first is drawn
    from softmax(x), the next from the softmax of the others, and so on.

    Args:
      key: a JAX random key.
      logits: [..., V] with the classes on `axis`, any floating dtype.
      k: how many classes, in [1, V].
      axis: the class axis, which has size k in the results.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      generator: where random bits come from; see `gumbel_softmax`.

    Returns:
      The perturbed logits [..., k], centred on the largest logit, descending, float32
      (float64 for float64 logits); and the classes [..., k], int32, in the order in
      which they are drawn. -inf and -1 where fewer than k classes are kept, and NaN
      and -1 in rows with a NaN or +inf.

    Raises:
      TypeError: if `logits` is not floating, `where` not boolean or `k` no int.
      ValueError: if `k` is not in [1, V], or a shape or `generator` does not fit.

    Notes:
      Bits depend on the key, the row and the class alone. The perturbed logits are what
      importance weights of such samples need (Kool et al.). Without a derivative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import gumbel_top_k
      >>> logits = jnp.array([0.0, 60.0, 0.0, 30.0])
      >>> perturbed, class_ids = gumbel_top_k(jax.random.key(0), logits, 2)
      >>> print(class_ids)
      [1 3]

    References:
      Kool, van Hoof and Welling, Stochastic Beams and Where to Find Them,
      arXiv:1903.06059; Vieira, Gumbel-max trick and weighted reservoir sampling, 2014.
    """
    checks.one_of("generator", generator, noise.GENERATORS)
    k = checks.positive_integer("k", k)
    _, rows, back = to_rows(lax.stop_gradient(logits), 1.0, axis, where)
    classes = rows.logits.shape[1]
    if k > classes:
        raise ValueError(f"`k` must be at most V = {classes}, got {k}.")
    values, class_ids = _top_k(generator, k, key, rows)
    return back(values), back(class_ids)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _top_k(generator, k: int, key, rows: Rows) -> tuple[jax.Array, jax.Array]:
    words = noise.row_words(key, rows.logits.shape[0])
    noisy = perturbation.perturbed(generator, words, rows)
    lost = jnp.any(jnp.isnan(noisy), axis=1, keepdims=True)
    values, class_ids = lax.top_k(jnp.where(lost, -jnp.inf, noisy), k)
    class_ids = jnp.where(values == -jnp.inf, -1, class_ids.astype(jnp.int32))
    return nan_where(lost, values), class_ids
