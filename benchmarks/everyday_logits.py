"""Every function of stored logits beside the formula that a user would write."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoft
from benchmarks.everyday_case import Case

_TAU, _SOFT, _SMOOTHING, _Z_LOSS = 0.7, 2.0, 0.1, 1e-4
_HEADS, _BINS = 4, 15
# Of Jensen-Shannon, and a skew.
_BETA, _ALPHA = 0.1, 0.1
_CANDIDATES = 4


# Losses.


def _cross_entropy(x: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def _smoothed(x: Any, labels: Any) -> jax.Array:
    # Optax's `smooth_labels` of one-hot labels takes six times as long on a CPU.
    uniform = jax.nn.logsumexp(x, axis=-1) - x.mean(axis=-1)
    return (1 - _SMOOTHING) * _cross_entropy(x, labels) + _SMOOTHING * uniform


def _with_z_loss(x: Any, labels: Any) -> jax.Array:
    return _cross_entropy(x, labels) + _Z_LOSS * jax.nn.logsumexp(x, axis=-1) ** 2


def _weighted_mean(x: Any, labels: Any, weights: Any) -> jax.Array:
    return jnp.sum(_cross_entropy(x, labels) * weights) / jnp.sum(weights)


def _entropy(x: Any) -> jax.Array:
    log_p = jax.nn.log_softmax(x / _TAU)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _log_probs(*logits: Any) -> tuple[jax.Array, ...]:
    return tuple(jax.nn.log_softmax(x / _SOFT) for x in logits)


def _forward_kl(student: Any, teacher: Any) -> jax.Array:
    log_q, log_p = _log_probs(student, teacher)
    return _SOFT**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def _reverse_kl(student: Any, teacher: Any) -> jax.Array:
    log_q, log_p = _log_probs(student, teacher)
    return _SOFT**2 * optax.losses.kl_divergence_with_log_targets(log_p, log_q)


def _jensen_shannon(student: Any, teacher: Any) -> jax.Array:
    log_q, log_p = _log_probs(student, teacher)
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    log_mean = jnp.log((p + q) / 2)
    terms = p * (log_p - log_mean) + q * (log_q - log_mean)
    return _SOFT**2 / 2 * jnp.sum(terms, axis=-1)


def _of_mixture(student: Any, teacher: Any) -> jax.Array:
    log_q, log_p = _log_probs(student, teacher)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.log(_BETA * p + (1 - _BETA) * q)
    terms = _BETA * p * (log_p - log_m) + (1 - _BETA) * q * (log_q - log_m)
    return _SOFT**2 * jnp.sum(terms, axis=-1)


def _skewed(student: Any, teacher: Any) -> jax.Array:
    log_q, log_p = _log_probs(student, teacher)
    p = jnp.exp(log_p)
    log_m = jnp.log(_ALPHA * p + (1 - _ALPHA) * jnp.exp(log_q))
    return _SOFT**2 * jnp.sum(p * (log_p - log_m), axis=-1)


def _distillation_top_k(x: Any, ids: Any, log_p: Any) -> jax.Array:
    log_q = jnp.take_along_axis(jax.nn.log_softmax(x), ids, axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    rest_p, rest_q = 1 - p.sum(axis=-1), 1 - q.sum(axis=-1)
    listed = jnp.sum(p * (log_p - log_q), axis=-1)
    return listed + rest_p * jnp.log(rest_p / rest_q)


def _codistillation(heads: Any) -> jax.Array:
    log_p = jax.nn.log_softmax(heads / _SOFT)
    p = jnp.exp(jax.lax.stop_gradient(log_p))
    others = (p.sum(axis=0, keepdims=True) - p) / (_HEADS - 1)
    return _SOFT**2 * optax.kl_divergence(log_p, others)


def _concrete(relaxed: Any, x: Any) -> jax.Array:
    classes, log_y = x.shape[-1], jnp.log(relaxed)
    scores = x - _TAU * log_y
    return (
        jax.lax.lgamma(float(classes))
        + (classes - 1) * jnp.log(_TAU)
        + jnp.sum(scores - log_y, axis=-1)
        - classes * jax.nn.logsumexp(scores, axis=-1)
    )


# Calibration.


def newton_temperature(x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fits a temperature by Newton's steps in its inverse, in which the loss is convex.

    Args:
      x: [N, V] logits.
      labels: [N] integers.

    Returns:
      The temperature and its mean loss.
    """
    own = jnp.take_along_axis(x, labels[:, None], axis=-1)[:, 0]

    def step(state: Any) -> Any:
        inverse, _, count = state
        p = jax.nn.softmax(inverse * x)
        mean = jnp.sum(p * x, axis=-1)
        spread = jnp.sum(p * x**2, axis=-1) - mean**2
        change = jnp.mean(mean - own) / jnp.mean(spread)
        return inverse - change, jnp.abs(change / inverse), count + 1

    def goes_on(state: Any) -> jax.Array:
        return (state[1] > 1e-5) & (state[2] < 20)

    inverse, *_ = jax.lax.while_loop(goes_on, step, (1.0, 1.0, 0))
    return 1 / inverse, _cross_entropy(inverse * x, labels).mean()


def _calibration_error(p: Any, labels: Any) -> jax.Array:
    confidence = p.max(axis=-1)
    gap = (p.argmax(axis=-1) == labels) - confidence
    bins = jnp.clip(jnp.ceil(confidence * _BINS).astype(jnp.int32) - 1, 0, _BINS - 1)
    return jnp.abs(jax.ops.segment_sum(gap, bins, _BINS)).sum() / len(labels)


CASES = (
    Case(
        "softmax",
        f"T = {_TAU}",
        lambda x: jaxsoft.softmax(x, temperature=_TAU),
        lambda x: jax.nn.softmax(x / _TAU),
        "logits",
        "logits",
    ),
    Case(
        "softmax",
        "T a row",
        lambda x, tau: jaxsoft.softmax(x, temperature=tau),
        lambda x, tau: jax.nn.softmax(x / tau),
        "logits temperatures",
        "logits temperatures",
        value=False,
    ),
    Case(
        "log_softmax",
        f"T = {_TAU}",
        lambda x: jaxsoft.log_softmax(x, temperature=_TAU),
        lambda x: jax.nn.log_softmax(x / _TAU),
        "logits",
        "logits",
    ),
    Case(
        "logsumexp",
        f"T = {_TAU}",
        lambda x: jaxsoft.logsumexp(x, temperature=_TAU),
        lambda x: jax.nn.logsumexp(x / _TAU, axis=-1),
        "logits",
        "logits",
    ),
    Case(
        "entropy",
        f"T = {_TAU}",
        lambda x: jaxsoft.entropy(x, temperature=_TAU),
        _entropy,
        "logits",
        "logits",
    ),
    Case(
        "softmax_cross_entropy",
        "labels",
        jaxsoft.softmax_cross_entropy,
        _cross_entropy,
        "logits labels",
        "logits",
    ),
    Case(
        "softmax_cross_entropy",
        "traced T",
        jaxsoft.softmax_cross_entropy,
        lambda x, labels, tau: _cross_entropy(x / tau, labels),
        "logits labels temperature",
        "logits temperature",
        value=False,
    ),
    Case(
        "softmax_cross_entropy",
        "targets",
        lambda x, targets: jaxsoft.softmax_cross_entropy(x, targets=targets),
        optax.softmax_cross_entropy,
        "logits targets",
        "logits",
    ),
    Case(
        "softmax_cross_entropy",
        f"label_smoothing={_SMOOTHING}",
        lambda x, labels: jaxsoft.softmax_cross_entropy(
            x, labels, label_smoothing=_SMOOTHING
        ),
        _smoothed,
        "logits labels",
        "logits",
        value=False,
    ),
    Case(
        "softmax_cross_entropy",
        f"z_loss={_Z_LOSS}",
        lambda x, labels: jaxsoft.softmax_cross_entropy(x, labels, z_loss=_Z_LOSS),
        _with_z_loss,
        "logits labels",
        "logits",
        value=False,
    ),
    Case(
        "softmax_cross_entropy",
        "where",
        lambda x, labels, kept: jaxsoft.softmax_cross_entropy(x, labels, where=kept),
        lambda x, labels, kept: _cross_entropy(jnp.where(kept, x, -jnp.inf), labels),
        "logits kept_labels kept",
        "logits",
        value=False,
    ),
    Case(
        "softmax_cross_entropy",
        "weights, mean",
        lambda x, labels, weights: jaxsoft.softmax_cross_entropy(
            x, labels, weights=weights, reduction="mean"
        ),
        _weighted_mean,
        "logits labels weights",
        "logits",
        value=False,
    ),
    Case(
        "distillation_loss",
        "forward_kl",
        lambda x, teacher: jaxsoft.distillation_loss(x, teacher, _SOFT),
        _forward_kl,
        "logits others",
        "logits",
    ),
    Case(
        "distillation_loss",
        "reverse_kl",
        lambda x, teacher: jaxsoft.distillation_loss(
            x, teacher, _SOFT, divergence="reverse_kl"
        ),
        _reverse_kl,
        "logits others",
        "logits",
        value=False,
    ),
    Case(
        "distillation_loss",
        "jensen_shannon",
        lambda x, teacher: jaxsoft.distillation_loss(
            x, teacher, _SOFT, divergence="jensen_shannon"
        ),
        _jensen_shannon,
        "logits others",
        "logits",
        value=False,
    ),
    Case(
        "distillation_loss",
        f"jensen_shannon, beta = {_BETA:g}",
        lambda x, teacher: jaxsoft.distillation_loss(
            x, teacher, _SOFT, divergence="jensen_shannon", beta=_BETA
        ),
        _of_mixture,
        "logits others",
        "logits",
        value=False,
    ),
    Case(
        "distillation_loss",
        f"forward_kl, alpha = {_ALPHA:g}",
        lambda x, teacher: jaxsoft.distillation_loss(x, teacher, _SOFT, alpha=_ALPHA),
        _skewed,
        "logits others",
        "logits",
        value=False,
    ),
    Case(
        "distillation_loss_top_k",
        f"k = {_CANDIDATES}",
        jaxsoft.distillation_loss_top_k,
        _distillation_top_k,
        "logits candidates listed",
        "logits",
        value=False,
    ),
    Case(
        "codistillation_loss",
        f"{_HEADS} heads",
        lambda heads: jaxsoft.codistillation_loss(heads, _SOFT),
        _codistillation,
        "heads",
        "heads",
        value=False,
    ),
    Case(
        "concrete_log_prob",
        "",
        lambda y, x: jaxsoft.concrete_log_prob(y, x, _TAU),
        _concrete,
        "relaxed logits",
        "logits",
    ),
    Case(
        "boltzmann_policy",
        "",
        lambda x: jaxsoft.boltzmann_policy(x, _TAU),
        lambda x: jax.nn.softmax(x / _TAU),
        "logits",
        "logits",
    ),
    Case(
        "boltzmann_operator",
        "",
        lambda x: jaxsoft.boltzmann_operator(x, _TAU),
        lambda x: jnp.sum(jax.nn.softmax(x / _TAU) * x, axis=-1),
        "logits",
        "logits",
    ),
    Case(
        "soft_argmax",
        "",
        lambda x: jaxsoft.soft_argmax(x, _TAU),
        lambda x: jnp.sum(jax.nn.softmax(x / _TAU) * jnp.arange(x.shape[-1]), axis=-1),
        "logits",
        "logits",
    ),
    Case(
        "fit_temperature",
        "",
        lambda x, labels: jaxsoft.fit_temperature(x, labels)[:2],
        newton_temperature,
        "logits drawn_labels",
    ),
    Case(
        "expected_calibration_error",
        f"{_BINS} bins",
        lambda p, labels: jaxsoft.expected_calibration_error(p, labels, _BINS),
        _calibration_error,
        "targets labels",
    ),
)
