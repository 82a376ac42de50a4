"""What is true: the formulas in float64 NumPy, and how close to it a result must be.

Nothing here imports jaxsoft.
"""

import math
from typing import Any

import numpy as np

DISTRIBUTIONS = ("unit", "zero", "peaked", "offset", "negative", "range")
# The options of a divergence, and what it is made of: its weights of KL(p, m) and
# KL(q, m), and the shares of p and q in m.
DIVERGENCES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "forward_kl": ({"divergence": "forward_kl"}, (1, 0, 0, 1)),
    "beta": ({"divergence": "jensen_shannon", "beta": 0.1}, (0.1, 0.9, 0.1, 0.9)),
    "skew_forward": ({"divergence": "forward_kl", "alpha": 0.1}, (1, 0, 0.1, 0.9)),
    "skew_reverse": ({"divergence": "reverse_kl", "alpha": 0.4}, (0, 1, 0.6, 0.4)),
    "reverse_kl": ({"divergence": "reverse_kl"}, (0, 1, 1, 0)),
    "jensen_shannon": ({"divergence": "jensen_shannon"}, (0.5, 0.5, 0.5, 0.5)),
}


def logits(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns logits of a named kind, exactly representable in float32."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    values = {
        "unit": noise,
        "zero": np.zeros(shape),
        "peaked": np.where(noise == noise.max(-1, keepdims=True), 60.0, noise),
        "offset": np.round(noise * 4) / 4 + 1e6,
        "negative": noise - 1000,
        "range": noise * 30,
    }[kind]
    return values.astype(np.float32)


def centred(x, temperature: Any = 1.0, where=None):
    """Returns (x - max) / τ in float64 over the last axis, -inf where dropped."""
    x = np.asarray(x, np.float64)
    if where is not None:
        x = np.where(where, x, -np.inf)
    peak = x.max(-1, keepdims=True)
    peak = np.where(np.isinf(peak), 0, peak)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (x - peak) / np.asarray(temperature, np.float64)


def log_softmax(x, temperature: Any = 1.0, where=None):
    """Returns log-probabilities; -inf where dropped."""
    c = centred(x, temperature, where)
    total = np.exp(c).sum(-1, keepdims=True)
    return c - np.log(np.where(total == 0, 1, total))


def softmax(x, temperature: Any = 1.0, where=None):
    """Returns probabilities."""
    return np.exp(log_softmax(x, temperature, where))


def logsumexp(x, temperature: Any = 1.0, where=None):
    """Returns log Σ exp(x / τ)."""
    x = np.asarray(x, np.float64)
    c = centred(x, temperature, where)
    kept = x if where is None else np.where(where, x, -np.inf)
    tau = np.broadcast_to(np.asarray(temperature, np.float64), (*x.shape[:-1], 1))
    return kept.max(-1) / tau[..., 0] + np.log(np.exp(c).sum(-1))


def entropy(x, temperature: Any = 1.0, where=None):
    """Returns -Σ p log p."""
    log_p = log_softmax(x, temperature, where)
    p = np.exp(log_p)
    return -(p * np.where(p == 0, 0, log_p)).sum(-1)


def divergence(p, q, name: str):
    """Returns a divergence of `DIVERGENCES` of probabilities, over the last axis."""
    of_p, of_q, share_p, share_q = DIVERGENCES[name][1]
    m = share_p * p + share_q * q

    def from_mixture(p):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(p == 0, 0, p * (np.log(p) - np.log(m))).sum(-1)

    total = 0.0
    for weight, probabilities in ((of_p, p), (of_q, q)):
        total = total + weight * from_mixture(probabilities) if weight else total
    return total


def scaled_divergence(student, teacher, temperature, name: str):
    """Returns τ² times a divergence, and its slopes by both arrays of logits.

    At high temperatures too: the probabilities and their logarithms are those of
    exp(c) - 1, whose digits a sum of exponentials lacks.
    """
    of_p, of_q, share_p, share_q = DIVERGENCES[name][1]
    # There is nothing but the limit at 1e30.
    tau = np.minimum(np.asarray(temperature, np.float64), 1e30)

    def compared(x):
        c = centred(x, tau)
        growth = np.expm1(c).mean(-1, keepdims=True)
        return np.exp(c) / x.shape[-1] / (1 + growth), c - np.log1p(growth)

    (q, log_q), (p, log_p) = compared(student), compared(teacher)
    d = log_q - log_p
    # q - p over the mixture.
    apart = np.where(d < 0, p, -q) * np.expm1(-np.abs(d)) / (share_p * p + share_q * q)

    def terms(p, own, other, d):
        """Returns p (m / p - 1 - r), with r = log(m / p) and m = own p + other q."""
        r = np.log1p(other * np.expm1(d)) if own else d
        series = sum(r**k / math.factorial(k + 2) for k in range(12))
        return p * np.where(np.abs(r) < 0.1, r**2 * series, np.expm1(r) - r), r

    loss_p, r_p = terms(p, share_p, share_q, d)
    loss_q, r_q = terms(q, share_q, share_p, -d)
    loss = (of_p * loss_p if of_p else 0) + (of_q * loss_q if of_q else 0)
    s_p = of_p * (share_p * share_q * apart - r_p) - of_q * share_p**2 * apart
    s_q = of_q * (-share_p * share_q * apart - r_q) + of_p * share_q**2 * apart

    def slope(p, s):
        return tau * p * (s - (p * s).sum(-1, keepdims=True))

    return (tau**2 * loss).sum(-1), slope(q, s_q), slope(p, s_p)


def gap(value, truth) -> float:
    """Returns the largest distance of finite true values.

    Infinities must agree exactly; NaN never passes.
    """
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert value.shape == truth.shape, (value.shape, truth.shape)
    infinite = np.isinf(truth)
    if np.isnan(value).any() or (value[infinite] != truth[infinite]).any():
        return np.inf
    return float(np.abs(value[~infinite] - truth[~infinite]).max(initial=0))


def error(value, truth) -> float:
    """Returns the largest error, relative to the largest finite true value.

    See `gap` for what is not finite. An all-zero `value` has error 1.
    """
    distance = gap(value, truth)
    truth = np.asarray(truth, np.float64)
    scale = np.abs(truth[np.isfinite(truth)]).max(initial=0)
    return float(distance / scale) if scale else distance


def assert_as_good(value, plain, truth, slack=3e-7):
    """Requires the error of `value` to be at most that of `plain`, and a little.

    Args:
      value: ours.
      plain: the plain formula's result in the same dtype.
      truth: in float64.
      slack: relative to the size of the truth.
    """
    ours, theirs = error(value, truth), error(plain, truth)
    assert ours <= theirs + slack, (ours, theirs)
    if np.abs(np.asarray(truth)[np.isfinite(truth)]).max(initial=0) > 0:
        assert error(np.zeros_like(truth), truth) > theirs + slack
