"""Terms of divergences between two distributions, class by class.

With p and q the two probabilities of a class and d = log(q / p), the Kullback-Leibler
divergence is `Σ p log(p / q) = Σ p (exp(d) - 1 - d)`, because Σ p exp(d) = 1. Every
term of the second form is non-negative. Where d is small it is a series in d, and
τ·d is computed from the logits without a detour through probabilities, so that the
factor τ² neither overflows nor amplifies rounding.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

__all__ = [
    "DIVERGENCES",
    "SMALL",
    "Divergence",
    "difference",
    "excess",
    "half_scaled",
    "half_step",
    "log_cosh_series",
]

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

# Below this |d| the series is used.
SMALL = 0.5


def _series(d: jax.Array) -> jax.Array:
    """Returns (exp(d) - 1 - d) / d² for |d| <= 1/2, 1/2 at d = 0."""
    # What is left out is below 2⁻²⁸ of the sum, in float64 below 2⁻⁵⁷.
    last = 16 if d.dtype == jnp.float64 else 10
    result = jnp.zeros_like(d)
    for k in reversed(range(2, last)):
        result = result * d + 1 / math.factorial(k)
    return result


def excess(p: jax.Array, q: jax.Array, d: jax.Array, scaled: jax.Array, tau):
    """Returns τ² p (exp(d) - 1 - d), with q = p exp(d) and scaled = τ·d."""
    small = jnp.abs(d) <= SMALL
    close = jnp.where(small, scaled, 0)
    near = p * close * (close * _series(jnp.where(small, d, 0)))
    far = q - p - p * jnp.where((p == 0) | small, 0, d)
    return jnp.where(small, near, tau * (tau * far))


def difference(p: jax.Array, q: jax.Array, d: jax.Array, scaled: jax.Array, tau):
    """Returns τ (q - p), with q = p exp(d) and scaled = τ·d."""
    small = jnp.abs(d) <= SMALL
    step = jnp.where(small, d, 0)
    # (exp(d) - 1) / d, by the series of the second order.
    ratio = 1 + step * _series(step)
    near = p * jnp.where(small, scaled, 0) * ratio
    return jnp.where(small, near, tau * (q - p))


def half_step(d: jax.Array) -> jax.Array:
    """Returns log((1 + exp(d)) / 2)."""
    near = jnp.log1p(jnp.expm1(jnp.clip(d, -1, 1)) / 2)
    return jnp.where(jnp.abs(d) <= 1, near, jax.nn.softplus(d) - math.log(2))


def half_scaled(d: jax.Array, scaled: jax.Array) -> jax.Array:
    """Returns τ log((1 + exp(d)) / 2), with scaled = τ·d."""
    tiny = jnp.abs(d) < 1e-12
    safe = jnp.where(tiny | jnp.isinf(d), 1, d)
    slope = jnp.where(tiny, 0.5, half_step(safe) / safe)
    # Where d is ±inf: the limits are τ·∞ and -τ log 2, and p or q is 0 there.
    return jnp.where(jnp.isinf(d), jnp.where(d > 0, scaled, 0), scaled * slope)


def log_cosh_series(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (a tanh a - log cosh a) / a² and log(cosh a) / a², for a² <= 1/4."""
    # With log cosh a = Σ c_n a^{2n}, a tanh a is Σ 2n c_n a^{2n}. What is left out is
    # below 2⁻²⁸ of the sum, in float64 below 2⁻⁵⁷.
    number = 18 if square.dtype == jnp.float64 else 9
    excess = log_cosh = jnp.zeros_like(square)
    for n, tangent in reversed(list(enumerate(_tangent_series(number), 1))):
        log_cosh = log_cosh * square + tangent / (2 * n)
        excess = excess * square + tangent * (2 * n - 1) / (2 * n)
    return excess, log_cosh


def _tangent_series(number: int) -> list[float]:
    """Returns the coefficients of tanh at a, a³, …: its derivative is 1 - tanh²."""
    t = [1.0]
    for n in range(1, number):
        t.append(-sum(t[i] * t[n - 1 - i] for i in range(n)) / (2 * n + 1))
    return t
