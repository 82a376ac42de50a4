"""The softmax cross-entropy of stored logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics, registry
from jaxsoft._core.numerics import (
    divide_stored,
    finite,
    inverse,
    over_temperature,
    times,
)
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    Reduction,
    keep_tokens,
    reduce_losses,
)
from jaxsoft.logits.arguments import (
    check_temperature,
    check_where,
    has_no_tangent,
    keep_rows,
    pick_temperature,
    row_weights,
)
from jaxsoft.logits.centre import centre, mean_of_kept
from jaxsoft.logits.softmax import (
    nonzero,
    over_temperatures,
    visible,
    weights,
)

__all__ = ["softmax_cross_entropy"]


@mesh_axes.accepts_explicit("logits", axis="axis")
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    *,
    targets: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    reduction: Reduction = "none",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Cross-entropy between labels or target distributions and a tempered softmax.

    `-(1 - ε) log p_label - ε mean_v log p_v + z_loss · lse²`, with ε the smoothing,
    the mean over the kept classes, and lse = log Σ exp(x / τ). With `targets` the
    first term is `-(1 - ε) Σ_v targets_v log p_v`.

    Args:
      logits: [..., V] with the classes on `axis`, any floating dtype.
      labels: [...] integers in [0, V). Exactly one of `labels` and `targets`.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it.
      targets: [..., V] of the shape of `logits`, floating; non-negative weights of
        classes, not required to sum to 1.
      axis: the class axis.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      label_smoothing: ε in [0, 1], spread evenly over the kept classes.
      z_loss: weight >= 0 of the squared log-sum-exp, which keeps logits from
        drifting.
      weights: [...] booleans or reals, one weight a row, or None; a row of weight 0
        contributes exactly nothing, whatever it holds.
      ignore_label: the label whose rows have weight 0, such as -100, or None.
      reduction: "none", "sum", or "mean" (Σ weight · loss / Σ weight, 0 if the weights
        sum to 0). The streamed twin's default is "mean".
      implementation: None, "xla", or "mosaic_gpu", not yet measured: a kernel for
        labels on Hopper and Blackwell GPUs, float32, bfloat16 or float16 (needs
        absl-py).

    Returns:
      [...], or a scalar with a reduction, float32 (float64 for float64 logits). NaN
      where a label lies outside [0, V); inf where it names a dropped class; 0 in a row
      without any kept class.

    Raises:
      TypeError: if `logits` or `targets` is not floating, or `labels` not integer.
      ValueError: if not exactly one of `labels` and `targets` is given, a shape does
        not fit, or an option or a known temperature is out of its range.
      NotImplementedError: for what the implementation does not have.

    Notes:
      Differentiable in `logits`, `targets` and `temperature`, in both modes. The loss
      of an example with a bad label is NaN, its gradient that of the terms without
      the label, so `jnp.where(valid, loss, 0)` masks value and gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import softmax_cross_entropy
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> print(softmax_cross_entropy(logits, jnp.array([0, 1])).round(4))
      [0.2395 1.0986]

    References:
      Szegedy et al., Rethinking the Inception Architecture, arXiv:1512.00567 (label
      smoothing); Chowdhery et al., PaLM, arXiv:2204.02311 (z-loss).
    """
    logits = checks.floating("logits", logits)
    axis = checks.class_axis(axis, logits)
    where = check_where(where, logits)
    tau = check_temperature(temperature, logits, axis)
    smoothing = checks.scalar_in("label_smoothing", label_smoothing, 0, 1)
    z_weight = checks.scalar_in("z_loss", z_loss, 0, float("inf"))
    if (labels is None) == (targets is None):
        raise ValueError(
            "`labels` and `targets` must not both be given, nor both be missing: "
            f"got labels={type(labels).__name__}, targets={type(targets).__name__}."
        )
    if targets is not None:
        targets = checks.floating("targets", targets)
        checks.shape("targets", targets, logits.shape, "logits.shape")
    ids = None
    if labels is not None:
        ids = checks.integer("labels", labels)
        rows = logits.shape[:axis] + logits.shape[axis + 1 :]
        checks.shape("labels", ids, rows, "logits.shape without the class axis")
    elif ignore_label is not None:
        raise ValueError("`ignore_label` must be None without `labels`, got both None.")
    weight = row_weights(weights, logits, axis, labels, ignore_label)
    if ids is not None:
        ids = keep_tokens(weight, ids)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    chosen = registry.resolve("softmax_cross_entropy", implementation)
    if targets is not None and registry.platform_of(chosen) is not None:
        raise NotImplementedError(
            f'`targets` must be None with implementation "{chosen}". Use '
            'implementation="xla".'
        )
    static_tau, tau = (tau, None) if isinstance(tau, float) else (None, tau)
    options = _Options(axis, static_tau, smoothing, z_weight, chosen)
    keep = None if weight is None else weight != 0
    loss = _cross_entropy(options, logits, tau, where, ids, targets, keep)
    return reduce_losses(loss, weight, reduction)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _hold_rows(keep: jax.Array, array: jax.Array, axis: int) -> jax.Array:
    """Returns an array whose rows that do not count keep what they hold, but no slope.

    Then whatever follows from these rows alone has no slope either, be it NaN. The
    caller leaves out what it computes of them, as NaN may be there. XLA for CPUs would
    store what a select gives.
    """
    return array


@_hold_rows.defjvp
def _hold_rows_jvp(axis, primals, tangents):
    keep, array = primals
    return _hold_rows(keep, array, axis), keep_rows(keep, tangents[1], axis)


class _Options(NamedTuple):
    axis: int
    static_tau: float | None
    smoothing: float
    z_weight: float
    implementation: Implementation


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _cross_entropy(options, logits, tau, where, labels, targets, keep):
    axis, static_tau, smoothing, z_weight, implementation = options
    kernel = registry.kernel("cross_entropy_statistics", implementation)
    x = logits if kernel else logits.astype(numerics.compute_dtype(logits))
    targets = None if targets is None else targets.astype(x.dtype)
    if keep is not None:
        # At one temperature of all rows they meet: its slope is the sum of theirs. What
        # is smoothed is summed in another way where a class of any row is dropped.
        several = tau is None or tau.size > 1
        settle = _hold_rows if several and not smoothing else keep_rows
        x = settle(keep, x, axis)
        targets = None if targets is None else settle(keep, targets, axis)
        if tau is not None and several:
            tau = keep_rows(keep, tau, axis, 1)
    if kernel:
        temperature = pick_temperature(static_tau, tau)
        lse, picked, mean = kernel(
            implementation, x, temperature, axis, where, labels, smoothing > 0
        )
    else:
        lse, picked, mean, _ = _row_statistics(
            axis, static_tau, smoothing > 0, x, tau, where, labels, targets
        )
    loss = -numerics.scaled(1 - smoothing, picked)
    if smoothing:
        loss = loss - smoothing * mean
    if z_weight:
        # Where lse overflows the loss is inf, and has no gradient.
        overflow = jnp.isinf(lse)
        square = jnp.where(overflow, 0, lse) ** 2
        loss = loss + z_weight * jnp.where(overflow, jnp.inf, square)
    return loss if keep is None else jnp.where(keep, loss, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _row_statistics(axis, static_tau, has_mean, x, tau, where, labels, targets):
    """Returns what losses are made of, each [...], all 0 in rows without a kept class.

    Args:
      axis: the class axis.
      static_tau: the temperature, if it is a Python float.
      has_mean: whether the mean is wanted; without it that is 0.
      x: logits in the dtype to compute in.
      tau: the temperature, if it is an array.
      where: the class mask, or None.
      labels: [...] integers, or None.
      targets: weights of classes, of the shape and dtype of `x`, or None.

    Returns:
      lse; log p of the label, or its sum weighted by the targets; the mean over kept
      classes of log p; and how many these are, at least 1.
    """
    tau = pick_temperature(static_tau, tau)
    centred = centre(x, tau, where, axis)
    sums = jnp.sum(jnp.exp(centred.values), axis, keepdims=True)
    log_total = jnp.log(nonzero(sums))
    lse = over_temperature(centred.peak, tau) + log_total
    mean, number = jnp.zeros_like(sums), jnp.ones_like(sums)
    if has_mean:
        mean, number = mean_of_kept(centred, tau, where, axis)
        mean = mean - log_total
    if targets is None:
        label = jnp.expand_dims(labels, axis)
        logit = _at_label(x, where, label, axis)
        picked = divide_stored(logit, centred.peak, tau) - log_total
    else:
        log_p = centred.values - log_total
        picked = jnp.sum(times(targets, log_p), axis, keepdims=True)
    lse, picked, mean = (jnp.where(sums == 0, 0, a) for a in (lse, picked, mean))
    lse, picked, mean, number = (
        jnp.squeeze(a, axis) for a in (lse, picked, mean, number)
    )
    if targets is None:
        picked = numerics.nan_where(_beyond(labels, x.shape[axis]), picked)
    return lse, picked, mean, number


def _beyond(labels, classes):
    """Tells which labels are those of no class."""
    return (labels < 0) | (labels >= classes)


def _at_label(x, where, label, axis):
    """Returns the logits of labels, -inf where their class is dropped.

    Compilers for GPUs and TPUs select them in the pass that takes the maximum.
    """
    index = jnp.clip(label, 0, x.shape[axis] - 1)
    return jax.lax.platform_dependent(
        x,
        where,
        index,
        cpu=functools.partial(_gathered, axis),
        default=functools.partial(_selected, axis),
    )


def _gathered(axis, x, where, index):
    logit = jnp.take_along_axis(x, index, axis)
    if where is None:
        return logit
    keeps = jnp.take_along_axis(jnp.broadcast_to(where, x.shape), index, axis)
    return jnp.where(keeps, logit, -jnp.inf)


def _selected(axis, x, where, index):
    here = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) == index.astype(jnp.int32)
    x = x if where is None else jnp.where(where, x, -jnp.inf)
    return jnp.max(jnp.where(here, x, -jnp.inf), axis, keepdims=True)


@functools.partial(_row_statistics.defjvp, symbolic_zeros=True)
def _row_statistics_jvp(axis, static_tau, has_mean, primals, tangents):
    x, tau_array, where, labels, targets = primals
    dx, dtau, _, _, dtargets = tangents
    tau = pick_temperature(static_tau, tau_array)
    arrays = x, tau_array, where, labels, targets
    out = _row_statistics(axis, static_tau, has_mean, *arrays)
    centred = centre(x, tau, where, axis)
    e = weights(axis, static_tau, x, tau_array, where)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    sums = total(e)
    empty = sums == 0
    log_total = jnp.log(nonzero(sums))
    inverse_tau = inverse(tau, x.dtype)
    inverse_total = 1 / nonzero(sums)
    if targets is None:
        label = jnp.expand_dims(labels, axis)
        logit = _at_label(x, where, label, axis)
        beyond = _beyond(label, x.shape[axis])
        # A label of a dropped class has no slope, as if it were none of the classes.
        none = beyond | (logit == -jnp.inf)
        label = jnp.where(none, -1, label.astype(jnp.int32))
        picks = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) == label
        mass = 1
    else:
        # So does a row whose targets have weight where there is no probability, and one
        # without any class.
        picked = jnp.expand_dims(out[1], axis)
        held = jnp.where(jnp.isinf(picked) | empty, 0, 1)
        mass = total(targets) * held
    tangent = [jnp.zeros_like(e, shape=empty.shape) for _ in out]
    if not has_no_tangent(dx):
        mean_p = total(e * dx) * (inverse_total * inverse_tau)
        if targets is None:
            at_label = total(jnp.where(picks, dx, 0)) * inverse_tau
        else:
            at_label = total(targets * dx) * (held * inverse_tau)
        tangent[0] += mean_p
        tangent[1] += at_label - mass * mean_p
        if has_mean:
            number = jnp.expand_dims(out[3], axis)
            of_mean = total(jnp.where(centred.kept, dx, 0)) / number
            tangent[2] += of_mean * inverse_tau - mean_p
    if not has_no_tangent(dtau):
        slope = functools.partial(over_temperatures, inverse_tau, dtau)
        c = centred.values
        peak = over_temperature(centred.peak, tau)
        expected = total(e * visible(c)) * inverse_total
        if targets is None:
            at_label = finite(divide_stored(logit, centred.peak, tau))
            at_label = jnp.where(beyond, 0, at_label)
        else:
            at_label = total(targets * finite(c)) * held
        tangent[0] -= slope(jnp.where(empty, 0, finite(peak + expected)))
        tangent[1] -= slope(jnp.where(empty, 0, finite(at_label - mass * expected)))
        if has_mean:
            mean = finite(mean_of_kept(centred, tau, where, axis)[0])
            tangent[2] -= slope(jnp.where(empty, 0, finite(mean - expected)))
    if not has_no_tangent(dtargets):
        log_p = centred.values - log_total
        lost = (log_p == -jnp.inf) & (targets == 0)
        change = total(jnp.where(lost, 0, finite(log_p)) * dtargets) * held
        tangent[1] += jnp.where(empty, 0, change)
    return out, tuple(jnp.squeeze(field, axis) for field in tangent)
