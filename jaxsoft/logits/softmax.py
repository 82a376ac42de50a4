"""Softmax, log-softmax, log-sum-exp and entropy of stored logits.

Each function is one derivative over the centred logits of `centre.py`: its forward pass
reads the logits twice (the peak, then the exponentials) and its derivative needs the
exponentials alone, in forward and in reverse mode and of any order. Derivatives write
sums over p as sums over exponentials, divided once a row: a product less a class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics, registry
from jaxsoft._core.numerics import finite, inverse, over_temperature
from jaxsoft._core.registry import Implementation
from jaxsoft.logits.arguments import (
    check_temperature,
    check_where,
    has_no_tangent,
    pick_temperature,
)
from jaxsoft.logits.centre import Centred, centre, mean_gap

__all__ = ["entropy", "log_softmax", "log_softmax_of_finite", "logsumexp", "softmax"]


@mesh_axes.accepts_explicit("logits", axis="axis")
def softmax(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Probabilities of classes from their logits, at a temperature.

    `p_v = exp(x_v / τ) / Σ_w exp(x_w / τ)`, the sum over the kept classes.

    The logits are centred before they are divided, so finite logits give finite,
    right probabilities at every temperature, compiled or not.

    Args:
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it. τ = 0 is the limit: uniform over the
        largest logits, with zero gradients. τ = ∞ is uniform over the kept classes.
      axis: the class axis.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      implementation: None, "xla" or a kernel, not yet measured: "mosaic_tpu" for TPUs,
        float32 or bfloat16; "mosaic_gpu" for Hopper and Blackwell GPUs, float16 too
        (needs absl-py).

    Returns:
      An array of the shape and dtype of `logits`. Dropped classes, and those with
      logit -inf, have probability 0; a row without any kept class is all 0.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, there is no class (V = 0), or a known
        temperature is negative or NaN.
      NotImplementedError: for an implementation that softmax does not have.

    Notes:
      Arithmetic is float32 (float64 for float64 logits); the result is rounded once.
      Differentiable in `logits` and `temperature`, in both modes and to any order. A
      traced negative temperature gives NaN, as do NaN and +inf logits.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import softmax
      >>> probabilities = softmax(jnp.array([1.0, 2.0, 3.0]), temperature=0.5)
      >>> print(np.asarray(probabilities).round(3))
      [0.016 0.117 0.867]
      >>> print(softmax(jnp.array([1.0, 3.0, 3.0]), temperature=0.0))
      [0.  0.5 0.5]

    References:
      Bridle, Probabilistic Interpretation of Feedforward Classification Network
      Outputs, 1990; Hinton et al., Distilling the Knowledge in a Neural Network,
      arXiv:1503.02531 (the temperature).
    """
    return _call(
        "softmax", probabilities, logits, temperature, axis, where, implementation
    )


@mesh_axes.accepts_explicit("logits", axis="axis")
def log_softmax(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Log-probabilities of classes from their logits, at a temperature.

    `log p_v = (x_v - m) / τ - log Σ_w exp((x_w - m) / τ)`, with m the largest kept
    logit; never above 0.

    Args:
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it.
      axis: the class axis.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      implementation: None, "xla", or "mosaic_gpu", not yet measured: a kernel for
        Hopper and Blackwell GPUs, float32, bfloat16 or float16 (needs absl-py).

    Returns:
      An array of the shape and dtype of `logits`; -inf for dropped classes and where
      the log-probability is below the smallest number of the dtype.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, there is no class (V = 0), or a known
        temperature is negative or NaN.
      NotImplementedError: for an implementation that log_softmax does not have.

    Notes:
      Arithmetic is float32 (float64 for float64 logits); the result is rounded once.
      Differentiable in `logits` and `temperature`, in both modes and to any order;
      dropped classes have gradient 0. NaN and +inf logits give rows of NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import log_softmax
      >>> log_probabilities = log_softmax(jnp.array([0.0, 2.0]), temperature=2.0)
      >>> print(np.asarray(log_probabilities).round(4))
      [-1.3133 -0.3133]

    References:
      Blanchard, Higham and Higham, Accurately computing the log-sum-exp and softmax
      functions, arXiv:1909.03469.
    """
    return _call(
        "log_softmax", _log_softmax, logits, temperature, axis, where, implementation
    )


@mesh_axes.accepts_explicit("logits", axis="axis")
def logsumexp(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Log of the sum of the exponentials of the tempered logits.

    `log Σ_v exp(x_v / τ)`, the sum over the kept classes.

    Args:
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it.
      axis: the class axis, which the result lacks.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      implementation: None, "xla", or "mosaic_gpu", not yet measured: a kernel for
        Hopper and Blackwell GPUs, float32, bfloat16 or float16 (needs absl-py).

    Returns:
      [...] float32 (float64 for float64 logits). -inf for a row without any kept
      class; ±inf where m / τ overflows; at τ = 0 the limit: -inf, log of the number
      of ties, or inf, by the sign of the largest logit. A +inf logit gives +inf
      (NaN at τ = ∞), and gradients of NaN.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, there is no class (V = 0), or a known
        temperature is negative or NaN.
      NotImplementedError: for an implementation that logsumexp does not have.

    Notes:
      Differentiable in `logits` and `temperature`, in both modes and to any order.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import logsumexp
      >>> print(f"{logsumexp(jnp.zeros(8)):.4f}")
      2.0794

    References:
      Blanchard, Higham and Higham, Accurately computing the log-sum-exp and softmax
      functions, arXiv:1909.03469.
    """
    return _call(
        "logsumexp", _logsumexp, logits, temperature, axis, where, implementation
    )


@mesh_axes.accepts_explicit("logits", axis="axis")
def entropy(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Entropy of the tempered softmax, in nats.

    `H = -Σ_v p_v log p_v = ℓ - Σ_v p_v c_v`, with c the centred logits and
    ℓ = log Σ exp(c): both terms are non-negative, so nothing cancels.

    Args:
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it.
      axis: the class axis, which the result lacks.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      implementation: None, "xla", or "mosaic_gpu", not yet measured: a kernel for
        Hopper and Blackwell GPUs, float32, bfloat16 or float16 (needs absl-py).

    Returns:
      [...] float32 (float64 for float64 logits), in [0, log V]; 0 for a row without
      any kept class.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, there is no class (V = 0), or a known
        temperature is negative or NaN.
      NotImplementedError: for an implementation that entropy does not have.

    Notes:
      Differentiable in `logits` and `temperature`, in both modes and to any order. NaN
      and +inf logits give NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import entropy
      >>> print(f"{entropy(jnp.array([0.0, 0.0, -jnp.inf])):.4f}")
      0.6931

    References:
      Shannon, A Mathematical Theory of Communication, 1948.
    """
    return _call("entropy", _entropy, logits, temperature, axis, where, implementation)


def _call(
    name: str,
    function: Callable[..., jax.Array],
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    implementation: Implementation | None,
) -> jax.Array:
    """Runs a function by a kernel that was asked for, or by XLA."""
    chosen = registry.resolve(name, implementation)
    if kernel := registry.kernel(name, chosen):
        return kernel(chosen, logits, temperature, axis, where)
    return _run(function, logits, temperature, axis, where)


def _run(
    function: Callable[..., jax.Array],
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> jax.Array:
    """Checks the arguments, then runs one of the derivatives below under jit."""
    logits = checks.floating("logits", logits)
    axis = checks.class_axis(axis, logits)
    where = check_where(where, logits)
    tau = check_temperature(temperature, logits, axis)
    static_tau, array_tau = (tau, None) if isinstance(tau, float) else (None, tau)
    return _compiled(function, axis, static_tau, logits, array_tau, where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _compiled(
    function: Callable[..., jax.Array],
    axis: int,
    static_tau: float | None,
    logits: jax.Array,
    tau: jax.Array | None,
    where: jax.Array | None,
) -> jax.Array:
    x = logits.astype(numerics.compute_dtype(logits))
    result = function(axis, static_tau, x, tau, where)
    return result.astype(logits.dtype) if result.ndim == logits.ndim else result


def exponentials(centred: Centred, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns exp(c) and its sum over classes, 1 where no class is kept."""
    e = jnp.exp(centred.values)
    return e, nonzero(_sum(e, axis))


def nonzero(total: jax.Array) -> jax.Array:
    """Returns sums of exponentials to divide by: 1 where no class is kept."""
    return jnp.where(total == 0, 1, total)


def _sum(values: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(values, axis=axis, keepdims=True)


def _rule(
    derivative: Callable[..., tuple[jax.Array, list[jax.Array]]],
) -> Callable[..., tuple[jax.Array, ArrayLike]]:
    """Turns `derivative(axis, tau, x, where, dx, slope)` into a custom_jvp rule.

    The derivative gets `dx`, the tangent of the logits over τ, or None, and `slope`,
    which multiplies numbers of each row by the tangent of τ over τ, or None; it returns
    the output and its tangent.
    """

    def rule(axis, static_tau, primals, tangents):
        x, tau_array, where = primals
        dx, dtau, _ = tangents
        tau = pick_temperature(static_tau, tau_array)
        inverse_tau = inverse(tau, x.dtype)
        dx = None if has_no_tangent(dx) else dx * inverse_tau
        slope = None
        if not has_no_tangent(dtau):
            slope = functools.partial(over_temperatures, inverse_tau, dtau)
        out, terms = derivative(axis, static_tau, x, tau_array, where, dx, slope)
        tangent = sum(terms) if terms else jnp.zeros_like(out)
        return out, tangent

    return rule


def over_temperatures(inverse_tau, dtau, values):
    """Returns numbers of each row over τ, times the tangent of τ.

    At τ = 0 the inverse is the largest finite number. A cotangent times that may be
    infinite, as is what those of several rows add up to, and times 0 NaN.
    """
    return finite(values * inverse_tau) * dtau


def _terms(tau, x, where, axis, dx, dtau):
    """Returns what adds up to the tangent of the centred logits times τ: dx - c dτ."""
    terms = [] if has_no_tangent(dx) else [dx]
    if not has_no_tangent(dtau):
        terms.append(-visible(centre(x, tau, where, axis).values) * dtau)
    return terms


def visible(c: jax.Array) -> jax.Array:
    """Returns centred logits to multiply with their exponentials: finite ones.

    Below -1000 the exponentials are 0 in every dtype, and so is the product.
    """
    return jnp.maximum(c, -1000)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def probabilities(axis, static_tau, x, tau, where):
    """Returns p."""
    tau = pick_temperature(static_tau, tau)
    weights, total = exponentials(centre(x, tau, where, axis), axis)
    return weights / total


@functools.partial(probabilities.defjvp, symbolic_zeros=True)
def _probabilities_jvp(axis, static_tau, primals, tangents):
    """Returns p and p (u - Σ p u) / τ, with u = dx - c dτ: one product a class."""
    x, tau_array, where = primals
    tau = pick_temperature(static_tau, tau_array)
    p = probabilities(axis, static_tau, x, tau_array, where)
    terms = _terms(tau, x, where, axis, *tangents[:2])
    if not terms:
        return p, jnp.zeros_like(p)
    change = sum(terms)
    return p, p * (change - _sum(p * change, axis)) * inverse(tau, x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def weights(axis, static_tau, x, tau, where):
    """Returns exp(c), for derivatives: it is that of the value, and computed once."""
    tau = pick_temperature(static_tau, tau)
    return jnp.exp(centre(x, tau, where, axis).values)


@functools.partial(weights.defjvp, symbolic_zeros=True)
def _weights_jvp(axis, static_tau, primals, tangents):
    x, tau_array, where = primals
    tau = pick_temperature(static_tau, tau_array)
    e = weights(axis, static_tau, x, tau_array, where)
    terms = _terms(tau, x, where, axis, *tangents[:2])
    if not terms:
        return e, jnp.zeros_like(e)
    return e, e * sum(terms) * inverse(tau, x.dtype)


def _log_softmax(axis, static_tau, x, tau, where):
    """Returns log p, with JAX's own derivative about that of the centred logits."""
    c = centre(x, pick_temperature(static_tau, tau), where, axis).values
    return _less_log_total(c, axis)


def log_softmax_of_finite(x: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Returns log p [N, V], whose derivative does not keep the logits x.

    Args:
      x: [N, V], in the dtype to compute in; none of them is -inf.
      temperature: a number, or [N, 1].
    """
    return _less_log_total(centre(x, temperature, None, 1, finite=True).values, 1)


def _less_log_total(c: jax.Array, axis: int) -> jax.Array:
    """Returns centred logits less log Σ exp(c)."""
    # Without the class axis: with one of size 1 XLA for CPUs writes the value before it
    # needs the exponentials for the last time, into an array that is not theirs.
    log_total = jnp.log(nonzero(jnp.sum(jnp.exp(c), axis)))
    return c - jnp.expand_dims(log_total, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _logsumexp(axis, static_tau, x, tau, where):
    tau = pick_temperature(static_tau, tau)
    centred = centre(x, tau, where, axis)
    total = _sum(jnp.exp(centred.values), axis)
    peak = over_temperature(centred.peak, tau)
    # About an infinite peak the sum is NaN: inf - inf. It is known without the sum, and
    # the exponentials stay the ones that the derivative shares.
    lse = jnp.where(centred.peak == jnp.inf, peak, peak + jnp.log(total))
    return jnp.squeeze(jnp.where(total == 0, -jnp.inf, lse), axis)


def _logsumexp_derivative(axis, static_tau, x, tau, where, dx, slope):
    out = _logsumexp(axis, static_tau, x, tau, where)
    e = weights(axis, static_tau, x, tau, where)
    sums = _sum(e, axis)
    total = nonzero(sums)
    terms = []
    if dx is not None:
        terms.append(_sum(e * dx, axis) / total)
    if slope is not None:
        tau = pick_temperature(static_tau, tau)
        centred = centre(x, tau, where, axis)
        expected = _sum(e * visible(centred.values), axis) / total
        mean = finite(over_temperature(centred.peak, tau) + expected)
        terms.append(-slope(jnp.where(sums == 0, 0, mean)))
    return out, [jnp.squeeze(term, axis) for term in terms]


_logsumexp.defjvp(_rule(_logsumexp_derivative), symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _entropy(axis, static_tau, x, tau, where):
    tau = pick_temperature(static_tau, tau)
    centred = centre(x, tau, where, axis)
    e, total = exponentials(centred, axis)
    gap, scale = mean_gap(centred, tau, e, total, axis)
    expected = over_temperature(gap, tau) / scale
    return jnp.squeeze(jnp.log(total) - expected, axis)


def _entropy_derivative(axis, static_tau, x, tau, where, dx, slope):
    """Returns the entropy and -Σ p (c - Σ p c) (dx - c dτ) / τ."""
    out = _entropy(axis, static_tau, x, tau, where)
    e = weights(axis, static_tau, x, tau, where)
    total = nonzero(_sum(e, axis))
    c = visible(centre(x, pick_temperature(static_tau, tau), where, axis).values)
    excess = e * (c - _sum(e * c, axis) / total)
    terms = []
    if dx is not None:
        terms.append(-_sum(excess * dx, axis) / total)
    if slope is not None:
        terms.append(slope(_sum(excess * c, axis) / total))
    return out, [jnp.squeeze(term, axis) for term in terms]


_entropy.defjvp(_rule(_entropy_derivative), symbolic_zeros=True)
