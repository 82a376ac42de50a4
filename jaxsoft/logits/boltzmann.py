"""Boltzmann policies: what reinforcement learning does with a tempered softmax.

The policy is the softmax of action values. Its mean value, the Boltzmann operator, and
its mean position, the soft argmax, are sums over differences from a reference, so that
a common offset of values or positions costs no digits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, numerics
from jaxsoft.logits.arguments import (
    check_temperature,
    check_where,
    has_no_tangent,
    pick_temperature,
)
from jaxsoft.logits.centre import centre, mean_gap
from jaxsoft.logits.softmax import nonzero, softmax, visible, weights

__all__ = ["boltzmann_operator", "boltzmann_policy", "soft_argmax"]


@mesh_axes.accepts_explicit("values", axis="axis")
def boltzmann_policy(
    values: ArrayLike,
    temperature: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Probabilities of actions from their values, for bandits and RL.

    `π_a = exp(z_a / τ) / Σ_b exp(z_b / τ)`, the sum over the kept actions: the policy
    that trades the mean value against τ times the entropy best. Small temperatures
    exploit, large ones explore.

    Args:
      values: [..., V] estimated action values on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `values`
        with size 1 on the action axis, or lacks it: one for each row, or a traced one
        that a schedule anneals. τ = 0 is the greedy policy, uniform over ties, with
        zero gradients. τ = ∞ is uniform over the kept actions.
      axis: the action axis.
      where: booleans that broadcast to `values`; False drops an illegal action. None
        keeps all.

    Returns:
      An array of the shape and dtype of `values`. Dropped actions, and those of value
      -inf, have probability 0; a row without any kept action is all 0.

    Raises:
      TypeError: if `values` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, or a known temperature is negative or NaN.

    Notes:
      It is `jaxsoft.softmax` under the names of reinforcement learning. No action has
      less probability than one of lower value. Differentiable in `values` and
      `temperature`, in both modes and to any order. A traced negative temperature
      gives NaN, as do NaN and +inf values.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import boltzmann_policy
      >>> values = jnp.array([1.0, 2.0, 2.0])
      >>> print(boltzmann_policy(values, 0.0))
      [0.  0.5 0.5]
      >>> print(np.asarray(boltzmann_policy(values, 0.5)).round(3))
      [0.063 0.468 0.468]

    References:
      Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition, 2018;
      Cesa-Bianchi et al., Boltzmann Exploration Done Right, arXiv:1705.10257.
    """
    values = checks.floating("values", values)
    axis = checks.class_axis(axis, values, "values")
    return softmax(values, temperature=temperature, axis=axis, where=where)


@mesh_axes.accepts_explicit("values", axis="axis")
def boltzmann_operator(
    values: ArrayLike,
    temperature: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Mean value under the Boltzmann policy: a soft maximum, and a soft mean.

    `Σ_a p_a z_a = m + Σ_a p_a (z_a - m)` with `p = softmax(z / τ)` over the kept
    actions and m the largest kept value.

    Args:
      values: [..., V] action values on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `values`
        with size 1 on the action axis, or lacks it. τ = 0 gives the maximum, τ = ∞ the
        mean of the kept values.
      axis: the action axis, which the result lacks.
      where: booleans that broadcast to `values`; False drops an action. None keeps
        all.

    Returns:
      [...] float32 (float64 for float64 values), at most the largest kept value. A
      value of -inf counts for nothing; a row without any kept action gives 0.

    Raises:
      TypeError: if `values` or `temperature` is not floating, or `where` not boolean.
      ValueError: if a shape does not fit, or a known temperature is negative or NaN.

    Notes:
      Differentiable in `values`, with `p (1 + (z - result) / τ)`, and in
      `temperature`, with `-Var_p(z / τ)`: finite at every temperature, and at τ = 0
      the gradient of the maximum, shared by ties, and 0. The gradient of a value may
      be negative: unlike the maximum and `τ · logsumexp`, the operator is neither
      monotone nor a non-expansion, and value iteration with it may fail to converge.
      A traced negative temperature gives NaN, as do NaN and +inf values.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import boltzmann_operator
      >>> values = jnp.array([0.0, 1.0])
      >>> print([round(float(boltzmann_operator(values, t)), 3) for t in (0.0, 1.0)])
      [1.0, 0.731]

    References:
      Asadi and Littman, An Alternative Softmax Operator for Reinforcement Learning,
      arXiv:1612.05628.
    """
    values = checks.floating("values", values)
    axis = checks.class_axis(axis, values, "values")
    where = check_where(where, values)
    tau = check_temperature(temperature, values, axis)
    static_tau, tau = (tau, None) if isinstance(tau, float) else (None, tau)
    return _compiled_operator(axis, static_tau, values, tau, where)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _compiled_operator(axis, static_tau, values, tau, where):
    x = values.astype(numerics.compute_dtype(values))
    return _operator(axis, static_tau, x, tau, where)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _operator(axis, static_tau, x, tau, where):
    temperature = pick_temperature(static_tau, tau)
    centred = centre(x, temperature, where, axis)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    e = jnp.exp(centred.values)
    sums = total(e)
    gap, scale = mean_gap(centred, temperature, e, nonzero(sums), axis)
    mean = (centred.peak * scale + gap) / scale
    return jnp.squeeze(jnp.where(sums == 0, 0, mean), axis)


@functools.partial(_operator.defjvp, symbolic_zeros=True)
def _operator_jvp(axis, static_tau, primals, tangents):
    """Returns Σ p z and Σ p (1 + c - Σ p c) dz - Var_p(c) dτ."""
    x, tau, where = primals
    dx, dtau, _ = tangents
    out = _operator(axis, static_tau, x, tau, where)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True)
    e = weights(axis, static_tau, x, tau, where)
    sums = nonzero(total(e))
    c = visible(centre(x, pick_temperature(static_tau, tau), where, axis).values)
    excess = c - total(e * c) / sums
    tangent = jnp.zeros_like(sums)
    if not has_no_tangent(dx):
        tangent += total(e * (1 + excess) * dx) / sums
    if not has_no_tangent(dtau):
        tangent -= total(e * excess**2) / sums * dtau
    return out, jnp.squeeze(tangent, axis)


@mesh_axes.accepts_explicit("logits", axis="axis")
def soft_argmax(
    logits: ArrayLike,
    temperature: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> jax.Array:
    """Mean index of a class, or mean position, under the tempered softmax.

    `Σ_v p_v position_v` with `p = softmax(logits / τ)` over the kept classes: a
    differentiable argmax, for keypoints of heatmaps, disparities and offsets.

    Args:
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it. τ = 0 gives the argmax, the mean
        position of ties, with zero gradients; τ = ∞ the mean position of the kept
        classes.
      axis: the class axis, which the result lacks.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      positions: [V] or [V, D] finite positions of the classes, floating. None means
        their indices 0, …, V - 1.

    Returns:
      float32 (float64 if `logits` or `positions` is): [...], the shape of `logits`
      without the class axis; with positions [V, D] it is [..., D], D last whatever
      the class axis. A row without any kept class gives 0.

    Raises:
      TypeError: if `logits`, `temperature` or `positions` is not floating, or `where`
        not boolean.
      ValueError: if a shape does not fit, or a known temperature is negative or NaN.

    Notes:
      Positions are taken relative to that of class V // 2 and multiplied in full
      precision, so a common offset of the positions costs no digits. Differentiable in
      `logits`, with `p (position - result) / τ`, in `temperature` and in `positions`,
      in both modes and to any order. A traced negative temperature gives NaN, as do
      NaN and +inf logits.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import soft_argmax
      >>> logits = jnp.array([0.0, 0.0, 4.0, 4.0])
      >>> print(f"{soft_argmax(logits, 1.0):.3f} {soft_argmax(logits, 0.0):.3f}")
      2.464 2.500

    References:
      Finn et al., Deep Spatial Autoencoders for Visuomotor Learning,
      arXiv:1509.06113; Luvizon et al., Human Pose Regression by Combining Indirect
      Part Detection and Contextual Information, arXiv:1710.02322.
    """
    logits = checks.floating("logits", logits)
    axis = checks.class_axis(axis, logits)
    where = check_where(where, logits)
    dtype = numerics.compute_dtype(logits)
    if positions is not None:
        positions = checks.floating("positions", positions)
        classes = logits.shape[axis]
        if positions.ndim not in (1, 2) or positions.shape[0] != classes:
            raise ValueError(
                f"`positions` must have shape (V,) or (V, D) with V = {classes}, "
                f"got {positions.shape}."
            )
        dtype = numerics.compute_dtype(logits, positions)
    logits = logits.astype(dtype)
    tau = check_temperature(temperature, logits, axis)
    static_tau, tau = (tau, None) if isinstance(tau, float) else (None, tau)
    return _soft_argmax(axis, static_tau, logits, tau, where, positions)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _soft_argmax(axis, static_tau, x, tau, where, positions):
    middle = x.shape[axis] // 2
    e = weights(axis, static_tau, x, tau, where)
    total = jnp.sum(e, axis)
    present, total = total != 0, nonzero(total)
    if positions is None:
        # A sum, and no product of matrices: it is taken along with the exponentials.
        index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) - middle
        offset = jnp.sum(e * index.astype(x.dtype), axis) / total
        return jnp.where(present, middle + offset, 0)
    positions = positions.astype(x.dtype)
    origin = positions[middle]
    relative = positions - origin[None]
    p = e / jnp.expand_dims(total, axis)
    offset = jnp.tensordot(p, relative, (axis, 0), precision="highest")
    present = present.reshape(present.shape + (1,) * origin.ndim)
    origin = origin.reshape((1,) * (offset.ndim - origin.ndim) + origin.shape)
    return jnp.where(present, origin + offset, 0)
