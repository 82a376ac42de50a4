"""Hard samples with gradients better than those of straight-through Gumbel-softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, noise, numerics
from jaxsoft._core.numerics import inverse
from jaxsoft.logits import perturbation
from jaxsoft.logits.arguments import has_no_tangent, pick_temperature
from jaxsoft.logits.centre import centre
from jaxsoft.logits.rows import Rows, to_rows
from jaxsoft.logits.sampling import draw_rows
from jaxsoft.logits.softmax import exponentials

__all__ = ["gumbel_rao", "reinmax"]


@mesh_axes.accepts_explicit("logits", axis="axis")
def reinmax(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """A one-hot sample whose gradient is right to second order.

    D is drawn from p = softmax(x), as `sample` does at τ = 1. A cotangent g gives
    `2 J(q) g - J(p) g / 2`, with `J(p) g = p (g - Σ p g)` and
    `q = (D + softmax(x / τ)) / 2`: Heun's method where straight-through is Euler's. At
    τ = 1 it is unbiased for functions of second degree.

    Args:
      key: a JAX random key.
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it; of the gradient alone, where values
        above 1 mean less variance and more bias.
      axis: the class axis.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.

    Returns:
      An array of the shape and dtype of `logits`: exactly one-hot; all 0 in a row
      without any kept class, or with a NaN or +inf.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, or a known temperature is negative or NaN.

    Notes:
      Some √V random numbers are drawn for a row. The derivative keeps the classes drawn
      and computes the softmaxes again. It does not reach the temperature.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import reinmax
      >>> weights = jnp.array([1.0, 2.0, 4.0])
      >>> logits = jnp.zeros((20000, 3))
      >>> loss = lambda x: (reinmax(jax.random.key(0), x) @ weights).sum(0) / 20000
      >>> print(jax.grad(loss)(logits).sum(0).round(1))
      [-0.4 -0.1  0.6]

    References:
      Liu, Dong, Liu, Yu and Gao, Bridging Discrete and Backpropagation:
      Straight-Through and Beyond, arXiv:2304.08612.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    return back(_reinmax_rows(static_tau, key, rows))


@functools.partial(jax.jit, static_argnums=(0,), inline=True)
def _reinmax_rows(static_tau: float | None, key: jax.Array, rows: Rows) -> jax.Array:
    if not rows.logits.size:
        return rows.logits
    words = noise.row_words(key, rows.logits.shape[0])
    return _reinmax(static_tau, words, *rows)


def _draw(words, x, where) -> jax.Array:
    """Returns the classes drawn from softmax(x), [R]."""
    return draw_rows(1.0, words, Rows(x, None, where))


def _one_hot(class_ids: jax.Array, x: jax.Array) -> jax.Array:
    """Returns [R, V] in the dtype of `x`; no class for -1."""
    classes = lax.broadcasted_iota(class_ids.dtype, x.shape, 1)
    return (classes == class_ids[:, None]).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _reinmax(static_tau, words, x, tau, where):
    del static_tau, tau
    return _one_hot(_draw(words, x, where), x)


def _reinmax_jvp(static_tau, primals, tangents):
    words, x, tau_array, where = primals
    class_ids = _draw(words, x, where)
    drawn = _one_hot(class_ids, x)
    dx = tangents[1]
    if has_no_tangent(dx):
        return drawn, jnp.zeros_like(drawn)
    tau = pick_temperature(static_tau, tau_array)

    def slope(x, class_ids, dx):
        dtype = numerics.compute_dtype(x)
        # A row with nothing to draw may hold NaN: it is given zeros, and no slope.
        empty = class_ids[:, None] < 0
        dx, wide = dx.astype(dtype), jnp.where(empty, 0, x.astype(dtype))
        p = _softmax(wide, 1.0, where)
        q = (_one_hot(class_ids, wide) + _softmax(wide, tau, where)) / 2
        return jnp.where(empty, 0, 2 * _project(q, dx) - _project(p, dx) / 2)

    return drawn, jax.checkpoint(slope)(x, class_ids, dx).astype(drawn.dtype)


_reinmax.defjvp(_reinmax_jvp, symbolic_zeros=True)


def _softmax(x, tau, where) -> jax.Array:
    weights, total = exponentials(centre(x, tau, where, 1), 1)
    return weights / total


def _project(p: jax.Array, change: jax.Array) -> jax.Array:
    """Returns J(p) u = p (u - Σ p u)."""
    return p * (change - jnp.sum(p * change, axis=1, keepdims=True))


@mesh_axes.accepts_explicit("logits", axis="axis")
def gumbel_rao(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    num_samples: int = 10,
    axis: int = -1,
    where: ArrayLike | None = None,
    generator: noise.Generator = "threefry",
) -> jax.Array:
    """A one-hot sample with the gradient of Gumbel-softmax, averaged over its noise.

    D is drawn from softmax(x), as `sample` does at τ = 1. The derivative is the mean of
    those of `softmax((x + g) / τ)` over K draws of the noise g given that the largest
    entry of x + g is D: the mean of straight-through Gumbel-softmax, with less
    variance.

    Args:
      key: a JAX random key.
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it; of the gradient alone. Zero
        gradients at 0, ∞.
      num_samples: K >= 1, how many draws of noise the derivative averages over.
      axis: the class axis.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      generator: where random bits come from; see `gumbel_softmax`.

    Returns:
      An array of the shape and dtype of `logits`: exactly one-hot; all 0 in a row
      without any kept class, or with a NaN or +inf.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, `where` not boolean, or
        `num_samples` no int.
      ValueError: if a shape or `generator` does not fit, `num_samples` is below 1, or a
        known temperature is negative or NaN.

    Notes:
      Without a derivative no noise is drawn but that of D. The derivative draws it one
      sample after another and keeps none: it needs the memory of one, in the logits
      and in the temperature.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import gumbel_rao
      >>> key, logits = jax.random.key(0), jnp.zeros((4, 3))
      >>> print(gumbel_rao(key, logits, 0.5, num_samples=100).sum(-1))
      [1. 1. 1. 1.]

    References:
      Paulus, Maddison and Krause, Rao-Blackwellizing the Straight-Through
      Gumbel-Softmax Gradient Estimator, arXiv:2010.04838.
    """
    checks.one_of("generator", generator, noise.GENERATORS)
    count = checks.positive_integer("num_samples", num_samples)
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    return back(_rao_rows(static_tau, count, generator, key, rows))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _rao_rows(static_tau, count, generator, key, rows: Rows) -> jax.Array:
    if not rows.logits.size:
        return rows.logits
    number = rows.logits.shape[0]
    words = noise.row_words(key, number)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
    noise_words = jax.vmap(lambda key: noise.row_words(key, number))(keys)
    return _rao(static_tau, generator, (words, noise_words), *rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rao(static_tau, generator, words, x, tau, where):
    del static_tau, generator, tau
    return _one_hot(_draw(words[0], x, where), x)


def _rao_jvp(static_tau, generator, primals, tangents):
    (words, noise_words), x, tau_array, where = primals
    class_ids = _draw(words, x, where)
    drawn = _one_hot(class_ids, x)
    moving = {
        name: tangent
        for name, tangent in (("x", tangents[1]), ("tau", tangents[2]))
        if not has_no_tangent(tangent)
    }
    if not moving:
        return drawn, jnp.zeros_like(drawn)
    tau = pick_temperature(static_tau, tau_array)
    mean_slope = functools.partial(_mean_slope, generator, tau, where)
    slope = jax.checkpoint(mean_slope)(noise_words, x, class_ids, moving)
    return drawn, slope.astype(drawn.dtype)


_rao.defjvp(_rao_jvp, symbolic_zeros=True)


def _mean_slope(
    generator: noise.Generator,
    tau: float | jax.Array,
    where: jax.Array | None,
    noise_words: jax.Array,
    x: jax.Array,
    class_ids: jax.Array,
    moving: dict[str, jax.Array],
) -> jax.Array:
    """Returns the mean over draws of noise of the tangent of the relaxed sample."""
    dtype = numerics.compute_dtype(x)
    # A row with nothing to draw may hold NaN: it is given zeros and class 0, no slope.
    empty = class_ids[:, None] < 0
    x = jnp.where(empty, 0, x.astype(dtype))
    chosen = _one_hot(jnp.maximum(class_ids, 0), x) == 1
    c = centre(x, 1.0, where, 1).values
    c = jnp.where(empty, 0, c)
    log_total = jnp.log(jnp.sum(jnp.exp(c), axis=1, keepdims=True))
    moving = {name: tangent.astype(dtype) for name, tangent in moving.items()}

    def slope_of_draw(words):
        drawn = perturbation.gumbel(generator, words, x.shape[1], dtype)
        p, log_q = _given(c, drawn, chosen, log_total, tau)
        change = jnp.zeros_like(p)
        if "x" in moving:
            change += moving["x"]
        if "tau" in moving:
            change -= jnp.maximum(log_q, -1000) * moving["tau"]
        return _project(p, change)

    def add(total, words):
        return total + jax.checkpoint(slope_of_draw)(words), None

    total, _ = lax.scan(add, jnp.zeros_like(c), noise_words)
    slope = total / noise_words.shape[0] * inverse(tau, dtype)
    return jnp.where(empty, 0, slope)


def _given(c, drawn, chosen, log_total, tau) -> tuple[jax.Array, jax.Array]:
    """Returns the relaxed sample given its largest entry, and its logits over τ.

    The largest perturbed logit is distributed as noise plus log Σ exp(c), whichever
    class has it; given it, y, the others are `-log(exp(-y) + exp(-c - noise))`.
    """
    top = jnp.sum(jnp.where(chosen, drawn, 0), axis=1, keepdims=True) + log_total
    below = -jax.nn.softplus(top - c - drawn)
    below = jnp.where(chosen, 0, below)
    centred = centre(below, tau, None, 1)
    weights, total = exponentials(centred, 1)
    return weights / total, centred.values
