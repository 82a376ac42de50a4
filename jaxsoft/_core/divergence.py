"""Terms of divergences between two distributions, class by class.

With p and q the two probabilities of a class and d = log(q / p), the Kullback-Leibler
divergence is `Σ p log(p / q) = Σ p (exp(d) - 1 - d)`, because Σ p exp(d) = 1. Every
term of the second form is non-negative. Where d is small it is a series in d, and
τ·d is computed from the logits without a detour through probabilities, so that the
factor τ² neither overflows nor amplifies rounding.
"""

import functools
import math
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from numpy.polynomial import chebyshev

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
# Below this |d| that of a mixture is.
_NEAR = 1.0
# Beyond this |d| the smaller of two probabilities is 0.
_FAR = 1000
# A probability so many times another leaves nothing of it, times a logarithm.
_HUGE = 1e36


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


class _Series(NamedTuple):
    """Coefficients of polynomials in d, for |d| <= 1; see `mixture_terms`.

    Attributes:
      share: b.
      tilt: c, 0 if b is above 0 and below 1.
      loss: those of d², d³, … in the terms over τ² and (p + b (q - p)) (1 + c u)⁴,
        with u = (q - p) / (q + p).
      of_p: those of d, d², … in s of p over τ.
      of_q: likewise of q.
    """

    share: float
    tilt: float
    loss: list[float]
    of_p: list[float]
    of_q: list[float]


@functools.cache
def _series_of(mixture: Mixture, count: int, terms: int) -> _Series:
    """Returns `count` coefficients of each, of as many terms of the series."""
    # In fractions, since they are of (1 - α)² where the skew α is close to 1.
    of_p, of_q, share_p, share_q = map(Fraction, mixture)
    # The larger share is rounded.
    share_p = share_p if share_p < share_q else 1 - share_q
    share_q = 1 - share_p
    exp = [Fraction(1, math.factorial(n)) for n in range(terms + 2)]
    # Of m / p, its logarithm and (q - p) / m: M L' = M' and M g = exp(d) - 1.
    m = [Fraction(1), *(share_q * x for x in exp[1:])]
    log_m, gap = [Fraction()], [Fraction()]
    for n in range(1, terms + 2):
        inner = range(1, n)
        log_m.append(m[n] - sum(k * log_m[k] * m[n - k] for k in inner) / Fraction(n))
        gap.append(exp[n] - sum(m[k] * gap[n - k] for k in inner))
    # log(m / q) is log(m / p) - d.
    log_m_q = [Fraction(), log_m[1] - 1, *log_m[2:]]
    over_p = []
    for n in range(2, terms + 2):
        times = sum(exp[n - k] * log_m_q[k] for k in range(1, n + 1))
        over_p.append(of_p * (m[n] - log_m[n]) + of_q * (m[n] - exp[n] - times))
    # With this share an error of d in all classes changes the sum of terms least: by
    # no more than its product with Σ d³, as Σ p exp(d) is 1.
    wanted = 3 * over_p[1] / over_p[0] - 1
    share = min(max(wanted, Fraction()), Fraction(1))
    tilt = (wanted - share) / 2
    about = _tilted([Fraction(1), *(share * x for x in exp[1:])], tilt, exp)
    loss = []
    for n, term in enumerate(over_p):
        loss.append(term - sum(about[n - k] * loss[k] for k in range(n)))
    skew = of_q * share_p - of_p * share_q
    logs = zip(log_m[1:], log_m_q[1:], gap[1:], strict=True)
    both = [
        (of_p * a + skew * share_p * g, of_q * b + skew * share_q * g)
        for a, b, g in logs
    ]
    series = loss, *zip(*both[:terms], strict=True)
    shortened = (_shortened(list(each), count) for each in series)
    return _Series(float(share), float(tilt), *shortened)


def _tilted(
    about: list[Fraction], tilt: Fraction, exp: list[Fraction]
) -> list[Fraction]:
    """Returns a series in d times (1 + c u)⁴, with u = (exp(d) - 1) / (exp(d) + 1)."""
    if not tilt:
        return about
    factor = [Fraction(1)]
    for n in range(1, len(exp)):
        inner = (exp[k] * factor[n - k] for k in range(1, n))
        factor.append((tilt * exp[n] - sum(inner, Fraction())) / 2)
    for _ in range(4):
        about = [
            sum((factor[k] * about[n - k] for k in range(n + 1)), Fraction())
            for n in range(len(about))
        ]
    return about


def _shortened(coefficients: list[Fraction], count: int) -> list[float]:
    """Returns those of the polynomial of fewer terms that is as close on [-1, 1].

    Each term that goes is replaced by what its Chebyshev polynomial has below it: what
    is left out falls by 6.4 from term to term, where the series itself falls by π.
    """
    left = coefficients
    while len(left) > count:
        *lower, last = chebyshev.cheb2poly([0] * (len(left) - 1) + [1])
        share = left[-1] / Fraction(float(last))
        pairs = zip(left[:-1], lower, strict=True)
        left = [x - share * Fraction(float(y)) for x, y in pairs]
    return [float(x) for x in left]


def _polynomial(coefficients: list[float], x: jax.Array) -> jax.Array:
    result = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _remainder(r: jax.Array, inverse: jax.Array, tau: jax.Array) -> jax.Array:
    """Returns τ (exp(-r) - 1 + r), with inverse = exp(-r)."""
    small = jnp.abs(r) <= SMALL
    step = jnp.where(small, r, 0)
    near = step * (step * _series(-step))
    return tau * jnp.where(small, near, (inverse - 1) + r)


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
    -p (s - Σ p s), and that by the logits of q likewise. Over p and τ all three are
    functions of d alone, and series where it is small.

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
    of_p, _, share_p, share_q = mixture
    is_even = of_p == share_p
    # An error of d in all classes takes digits of the slopes of a skew that has little
    # of the other in their series, and none in a difference of the probabilities.
    is_slight = not is_even and (share_p if of_p else share_q) > 0.5
    near = jnp.abs(d) <= (SMALL if is_slight else _NEAR)
    # What is left out is below 2⁻²⁶ of the sums, in float64 below 2⁻⁵⁵.
    sizes = (22, 36) if d.dtype == jnp.float64 else (12, 20)
    series = _series_of(mixture, *sizes)
    step = jnp.where(near, d, 0)
    close = tau * step if scaled is None else jnp.where(near, scaled, 0)
    apart = _even if is_even else _skewed
    loss, s_p, s_q = apart(mixture, p, q, jnp.clip(d, -_FAR, _FAR), tau)
    about = p + series.share * (q - p)
    if series.tilt:
        slope = (q - p) / jnp.maximum(q + p, jnp.finfo(p.dtype).tiny)
        about *= jnp.square(jnp.square(1 + series.tilt * slope))
    terms = about * close * (close * _polynomial(series.loss, step))
    loss = jnp.where(near, terms, loss)
    s_p = jnp.where(near, close * _polynomial(series.of_p, step), s_p)
    s_q = jnp.where(near, close * _polynomial(series.of_q, step), s_q)
    s_p, s_q = (jnp.where(a == 0, 0, finite(s)) for a, s in ((p, s_p), (q, s_q)))
    return loss, s_p, s_q


def _even(mixture, p, q, d, tau):
    """Returns what `mixture_terms` does where |d| > 1, of weights equal to the shares.

    With a and b the shares, `a p log(p / m) + b q log(q / m)`, by one logarithm: that
    of m over whichever of p and q it has more of.
    """
    _, _, a, b = mixture
    m = a * p + b * q
    tiny = jnp.finfo(m.dtype).tiny
    is_p = a * p >= b * q
    base = jnp.where(is_p, p, q)
    if a == b:
        log_m = jnp.log(jnp.maximum(m / jnp.maximum(base, tiny), tiny))
    else:
        # That has few digits where m is nearly one of them alone: of m / base, or of
        # base / m if that is larger, by how much it is above 1.
        apart = jnp.where(is_p, b * (q - p), a * (p - q))
        least = jnp.maximum(jnp.minimum(m, base), tiny)
        log_m = jnp.copysign(jnp.log1p(jnp.abs(apart) / least), apart)
    loss = jnp.where(is_p, b * q, -(a * p)) * d - m * log_m
    s_p = a * (tau * (log_m + jnp.where(is_p, 0, d)))
    s_q = b * (tau * (log_m - jnp.where(is_p, d, 0)))
    return tau * (tau * loss), s_p, s_q


def _skewed(mixture, p, q, d, tau):
    """Returns what `mixture_terms` does where d is not near, of one divergence."""
    if mixture.of_p:
        return _skewed_of_first(mixture.share_p, mixture.share_q, p, q, d, tau)
    loss, s_q, s_p = _skewed_of_first(mixture.share_q, mixture.share_p, q, p, -d, tau)
    return loss, s_p, s_q


def _skewed_of_first(own, other, p, q, d, tau):
    """Returns τ² times the terms of KL(p, own p + other q), and s of p and of q."""
    m = own * p + other * q
    tiny = jnp.finfo(m.dtype).tiny
    if other < 0.5:
        # A logarithm of m / p has few digits where m is nearly p alone.
        more = (q - p) / jnp.maximum(p, tiny)
        ratio = jnp.log1p(other * jnp.minimum(more, _HUGE))
        loss = excess(p, m, ratio, tau * ratio, tau)
    else:
        larger = jnp.maximum(jnp.maximum(p, q), tiny)
        ratio = jnp.log(jnp.maximum(m / larger, tiny)) + jnp.maximum(d, 0)
        loss = tau * (tau * (other * (q - p) - p * ratio))
    s_q = other * (other * (tau * ((p - q) / jnp.maximum(m, tiny))))
    if own > 0.5:
        # The terms of the sum below are nearly opposite.
        s_p = _remainder(ratio, p / jnp.maximum(m, tiny), tau) - s_q
    else:
        s_p = tau * ratio + own / other * s_q
    return loss, s_p, s_q
