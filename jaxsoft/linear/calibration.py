"""The temperature that fits a softmax layer's labels best, without its logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, numerics
from jaxsoft._core.registry import Implementation
from jaxsoft._core.temperature_fit import (
    DEFAULT_BOUNDS,
    RowFit,
    TemperatureFit,
    check_bounds,
    fit_rows,
    row_weights,
)
from jaxsoft._core.tokens import labelled_tokens
from jaxsoft.linear.arguments import Call, KernelLayout, MeshAxes, prepare
from jaxsoft.linear.folds.statistics import LogitStatistics, statistics

__all__ = ["linear_fit_temperature"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_fit_temperature(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> TemperatureFit:
    """The temperature at which a softmax layer fits labels best, its logits streamed.

    `fit_temperature` of `u = softcap(hidden @ kernel + bias)`, which is never stored:
    each of the 4 to 13 temperatures that the search tries is one stream over the
    classes (2·N·H·V flops), whose statistics hold both the NLL and its derivative. A
    vocabulary of 256,000 classes needs a tile of memory, where 4096 tokens' logits
    would take 4 GiB.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      labels: [...] integers in [0, V).
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      weights: [...] booleans or reals >= 0, one weight a token; a token of weight 0
        counts nothing, whatever its label and hidden state.
      bounds: the lowest and the highest temperature, within [1e-30, 1e30].
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens: the fit is that
        of all shards.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference".

    Returns:
      A `TemperatureFit` of three scalars, as `jaxsoft.fit_temperature`; float32
      (float64 if an input is).

    Raises:
      TypeError: if a dtype is wrong, or `bounds` is no pair.
      ValueError: if a shape does not fit, or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Labels out of range, tokens without weight and bounds count as in
      `fit_temperature`. No gradient flows through the fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import linear_fit_temperature, linear_sample
      >>> hidden = jax.random.normal(jax.random.key(0), (1000, 16))
      >>> kernel = jax.random.normal(jax.random.key(1), (16, 500)) / 4
      >>> labels = linear_sample(jax.random.key(2), hidden, kernel)
      >>> fit = linear_fit_temperature(hidden, 3 * kernel, labels)
      >>> print(f"{fit.temperature:.1f} {fit.at_bound}")
      3.0 0

    References:
      Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks,
      arXiv:1706.04599.
    """
    axes = mesh_axes.check_token_axes(token_axes, vocab_axis)
    hidden, labels, token_weight = labelled_tokens(hidden, labels, weights)
    call = prepare(
        "linear_fit_temperature",
        hidden,
        kernel,
        labels,
        bias=bias,
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    config = dataclasses.replace(call.config, static_tau=None)
    arrays, token_weight = jax.lax.stop_gradient((call.arrays, token_weight))
    return _fit(config, axes, check_bounds(bounds), arrays, token_weight)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _fit(config, token_axes, bounds, arrays, weights) -> TemperatureFit:
    def rows(tau: jax.Array) -> RowFit:
        call = Call(config, arrays._replace(tau=tau))
        of_tokens = statistics(call, ("mean", "expected"))
        return _row_fit(of_tokens.with_one_label())

    dtype = numerics.compute_dtype(arrays.hidden, arrays.kernel)
    return fit_rows(rows, row_weights(weights), bounds, dtype, token_axes)


def _row_fit(of_tokens: LogitStatistics) -> RowFit:
    """Returns the NLL of each token and its slope, 0 for a row without any class."""
    label, mean, expected = of_tokens.label, of_tokens.mean, of_tokens.expected
    assert label is not None and mean is not None and expected is not None
    empty = (of_tokens.max == -jnp.inf) & ~jnp.isnan(label)
    fit = RowFit(of_tokens.log_sum - label, label - expected, mean)
    return RowFit._make(jnp.where(empty, 0, values) for values in fit)
