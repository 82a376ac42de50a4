"""Terms of divergences between two distributions, class by class.

With p and q the two probabilities of a class and d = log(q / p), the Kullback-Leibler
divergence is `Σ p log(p / q) = Σ p (exp(d) - 1 - d)`, because Σ p exp(d) = 1. Every
term of the second form is non-negative. Where d is small it is a series in d, and
τ·d is computed from the logits without a detour through probabilities, so that the
factor τ² neither overflows nor amplifies rounding.
"""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxsoft._core import checks
from jaxsoft._core.numerics import finite

__all__ = [
    "DIVERGENCES",
    "HALVES",
    "SMALL",
    "Divergence",
    "Kind",
    "Mixture",
    "difference",
    "excess",
    "kind_of",
    "log_cosh_series",
    "log_mixture",
    "mixture_terms",
]

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


class Mixture(NamedTuple):
    """`of_p KL(p, m) + of_q KL(q, m)`, with `m = share_p p + share_q q`.

    Attributes:
      of_p: the weight of the teacher's divergence from the mixture.
      of_q: that of the student's.
      share_p: the teacher's share of the mixture, in (0, 1).
      share_q: the student's, 1 less that.
    """

    of_p: float
    of_q: float
    share_p: float
    share_q: float


# The mixture of Jensen-Shannon.
HALVES = Mixture(0.5, 0.5, 0.5, 0.5)
Kind = Divergence | Mixture


def kind_of(divergence: Divergence, beta: object, alpha: object) -> Kind:
    """Checks the options of a divergence, and returns which one it is."""
    checks.one_of("divergence", divergence, DIVERGENCES)
    beta = checks.scalar_in("beta", beta, 0, 1)
    alpha = checks.scalar_in("alpha", alpha, 0, 1)
    if divergence == "jensen_shannon":
        if alpha:
            raise ValueError(f"`alpha` must be 0 with {divergence!r}, got {alpha}.")
        if beta in (0, 1):
            return "reverse_kl" if beta else "forward_kl"
        return divergence if beta == 0.5 else Mixture(beta, 1 - beta, beta, 1 - beta)
    if beta != 0.5:
        raise ValueError(f"`beta` must be 0.5 with {divergence!r}, got {beta}.")
    if alpha == 1:
        raise ValueError("`alpha` must be less than 1, got 1: the divergence is 0.")
    if not alpha:
        return divergence
    if divergence == "forward_kl":
        return Mixture(1.0, 0.0, alpha, 1 - alpha)
    return Mixture(0.0, 1.0, 1 - alpha, alpha)


# Below this |d| the series is used.
SMALL = 0.5
# Beyond this |d| the smaller of two probabilities is 0.
_FAR = 1000


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


def log_mixture(d: jax.Array, own: float, other: float) -> jax.Array:
    """Returns log(own + other exp(d)), of two positive shares whose sum is 1."""
    is_near = jnp.abs(d) <= 1
    near = other * jnp.expm1(jnp.clip(d, -1, 1))
    # Beyond, own (1 + exp(t)), the larger of its two terms taken out.
    t = d + math.log(other / own)
    outside = jnp.maximum(t, 0) + _log_share(own, other)
    inside = jnp.log1p(jnp.where(is_near, near, jnp.exp(-jnp.abs(t))))
    return inside + jnp.where(is_near, 0, outside)


def _log_share(own: float, other: float) -> float:
    """Returns log(own), where own + other is 1."""
    return math.log(own) if own < other else math.log1p(-other)


def _scaled_log_mixture(
    log_ratio: jax.Array,
    d: jax.Array,
    scaled: jax.Array,
    own: float,
    other: float,
    tau: jax.Array,
) -> jax.Array:
    """Returns τ log(own + other exp(d)) from that logarithm, with scaled = τ·d."""
    tiny, vast = jnp.abs(d) < 1e-12, jnp.abs(d) >= _FAR
    slope = jnp.where(tiny, other, log_ratio / jnp.where(tiny | vast, 1, d))
    limit = jnp.where(d > 0, scaled, tau * _log_share(own, other))
    return jnp.where(vast, limit, scaled * slope)


def _remainder(r: jax.Array, scaled: jax.Array, inverse: jax.Array, tau):
    """Returns τ (exp(-r) - 1 + r), with scaled = τ·r and inverse = exp(-r)."""
    small = jnp.abs(r) <= SMALL
    step = jnp.where(small, r, 0)
    near = jnp.where(small, scaled, 0) * (step * _series(-step))
    return jnp.where(small, near, tau * (inverse - 1) + scaled)


def mixture_terms(
    mixture: Mixture,
    p: jax.Array,
    q: jax.Array,
    d: jax.Array,
    scaled: jax.Array | None,
    tau: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a divergence from a mixture class by class, τ² included.

    With s what is returned beside it, the derivative by the logits of p is
    -p (s - Σ p s), and that by the logits of q likewise.

    Args:
      mixture: which divergence.
      p: the teacher's probabilities.
      q: the student's.
      d: log(q / p), ±inf or beyond ±1000 where one of them is 0.
      scaled: τ·d, or None where d has all digits.
      tau: τ.

    Returns:
      The terms, s of p and s of q, both finite and 0 where the probability is.
    """
    of_p, of_q, share_p, share_q = mixture
    m = share_p * p + share_q * q
    loss = s_p = s_q = jnp.zeros_like(m)

    def ratios(sign, own, other):
        log_ratio = log_mixture(sign * d, own, other)
        if scaled is None:
            return log_ratio, tau * log_ratio
        return log_ratio, _scaled_log_mixture(
            log_ratio, sign * d, sign * scaled, own, other, tau
        )

    # Each weight is the share, as in Jensen-Shannon, or one of them is 0.
    is_even = of_p == share_p
    if not is_even:
        safe = jnp.where(m == 0, 1, m)
        gap = difference(q, p, -d, tau * -d if scaled is None else -scaled, tau) / safe
    if of_p:
        log_ratio, ratio = ratios(1, share_p, share_q)
        loss += of_p * excess(p, m, log_ratio, ratio, tau)
        if is_even:
            s_p += of_p * ratio
        else:
            s_q += share_q * (share_q * gap)
            s_p += _remainder(log_ratio, ratio, p / safe, tau) - s_q
    if of_q:
        log_ratio, ratio = ratios(-1, share_q, share_p)
        loss += of_q * excess(q, m, log_ratio, ratio, tau)
        if is_even:
            s_q += of_q * ratio
        else:
            s_p -= share_p * (share_p * gap)
            s_q += _remainder(log_ratio, ratio, q / safe, tau) - s_p
    s_p, s_q = (jnp.where(a == 0, 0, finite(s)) for a, s in ((p, s_p), (q, s_q)))
    return loss, s_p, s_q


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
