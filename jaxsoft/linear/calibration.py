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
from jaxsoft.linear import reference
from jaxsoft.linear.arguments import (
    Call,
    Config,
    KernelLayout,
    MeshAxes,
    Operands,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import keep_products, of_products
from jaxsoft.linear.folds.statistics import (
    LogitStatistics,
    Statistics,
    of_fields,
    statistics,
)
from jaxsoft.linear.lora import LoRA
from jaxsoft.linear.tiles import layer_of
from jaxsoft.logits.calibration import row_fits

__all__ = ["linear_fit_temperature"]

# A fit of stored logits takes them, centred ones, exponentials and one array more.
_ARRAYS = 4


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_fit_temperature(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
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

    `fit_temperature` of `u = softcap(hidden @ kernel + bias)`, which need not be
    stored: each of the 4 to 13 temperatures that the search tries is one stream over
    the classes (2·N·H·V flops), whose statistics hold both the NLL and its derivative.
    A vocabulary of 256,000 classes needs a tile of memory, where 4096 tokens' logits
    would take 4 GiB. Where the workspace has room for the logits they are computed
    once, and read by every stream.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      labels: [...] integers in [0, V).
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      class_bits: [..., ceil(V / 32)] uint32 or int32, a mask of each token: bit v % 32
        of word v // 32 is 1 where class v is kept, of all shards' classes. None keeps
        all.
      kernel_scale: floating, for a kernel of int8, float8 or other short numbers, which
        it multiplies: a scalar, [V], or one for each block of the kernel, whose axes
        its own divide. No gradient flows to such a kernel. None for no scale.
      lora: a `LoRA`, whose `(hidden @ a) @ b` is added to the products; or None.
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
        class_bits=class_bits,
        kernel_scale=kernel_scale,
        lora=lora,
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
    dtype = numerics.compute_dtype(arrays.hidden, arrays.kernel)
    operands = fold_rows(config, arrays._replace(tau=jnp.ones((), dtype)))
    count = operands.hidden.shape[0]
    if _have_room(config, operands):
        x = reference.logits(config, arrays)
        of_stored = row_fits(x.ndim - 1, x, arrays.labels[..., 0], None)
        return fit_rows(of_stored, row_weights(weights), bounds, dtype, token_axes)
    # Where their products alone have room these are computed once.
    spread = Statistics(config, frozenset(("mean",)))
    stored = keep_products(spread, operands) if count else None

    def rows(tau: jax.Array) -> RowFit:
        if stored is None:
            call = Call(config, arrays._replace(tau=tau))
            return _row_fit(statistics(call, ("mean", "expected")).with_one_label())
        of_spread, keep, kept = stored
        moved = operands._replace(tau=jnp.broadcast_to(tau, (count,)))
        fold = Statistics(config, frozenset(("label", "expected")))
        fields = of_products(fold, moved, keep, kept)._replace(mean=of_spread.mean)
        assert operands.labels is not None
        found = of_fields(fields, operands.labels >= 0, moved.tau, None)
        fit = _row_fit(found.with_one_label())
        return RowFit._make(a.reshape(arrays.hidden.shape[:-1]) for a in fit)

    return fit_rows(rows, row_weights(weights), bounds, dtype, token_axes)


def _have_room(config: Config, operands: Operands) -> bool:
    """Tells whether the workspace has room for a fit of stored logits."""
    if config.implementation != "xla" or config.vocab_axes or config.shards:
        return False
    layer = layer_of(config, operands)
    logits = layer.rows * layer.classes * layer.logit_bytes
    return _ARRAYS * logits <= layer.workspace(config.workspace_bytes)


def _row_fit(of_tokens: LogitStatistics) -> RowFit:
    """Returns the NLL of each token and its slope, 0 for a row without any class."""
    label, mean, expected = of_tokens.label, of_tokens.mean, of_tokens.expected
    assert label is not None and mean is not None and expected is not None
    empty = (of_tokens.max == -jnp.inf) & ~jnp.isnan(label)
    fit = RowFit(of_tokens.log_sum - label, label - expected, mean)
    return RowFit._make(jnp.where(empty, 0, values) for values in fit)
