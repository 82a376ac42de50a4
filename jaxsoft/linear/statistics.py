"""Statistics of the softmax over `hidden @ kernel`, from one stream over classes."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxsoft import checks, dtypes
from jaxsoft.implementation import Implementation, resolve
from jaxsoft.linear import derivative
from jaxsoft.linear.operands import Config, Fields, KernelLayout, Operands
from jaxsoft.linear.tiling import default_tile_bytes
from jaxsoft.temperature import over_temperature

__all__ = ["Call", "LogitStatistics", "linear_statistics", "prepare"]

IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitStatistics:
    """Statistics of the softmax over classes, one number a row; a pytree.

    With u the logits, m their maximum, τ the temperature and c = (u - m) / τ, the
    fields are the centred quantities that losses are made of. No gradient flows
    through `max`, so gradients of single fields mean little; the properties, in which
    the centre cancels, have exact gradients.

    Attributes:
      max: m [...]; -inf in a row without any kept class.
      log_sum: ℓ = log Σ exp(c) [...], >= 0.
      label: the centred logit of the label [...], <= 0; NaN for a label outside
        [0, V); None without labels.
      mean: the mean of c over the kept classes [...]; None where not computed.
      expected: Σ p c [...]; None where not computed.
      argmax: the lowest class with the largest logit [...], int32; None where not
        asked for.
      temperature: τ, a scalar or [...].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import linear_statistics
      >>> statistics = linear_statistics(jnp.ones((1, 1)), jnp.zeros((1, 4)))
      >>> print(f"{statistics.lse[0]:.4f} {statistics.entropy[0]:.4f}")
      1.3863 1.3863
    """

    max: jax.Array
    log_sum: jax.Array
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None
    argmax: jax.Array | None
    temperature: jax.Array

    @property
    def lse(self) -> jax.Array:
        """Log Σ exp(u / τ) [...]; -inf in a row without any kept class."""
        return self._peak() + self.log_sum

    @property
    def label_logit(self) -> jax.Array:
        """The tempered logit of the label, u_label / τ [...]."""
        return self._peak() + self._need("label")

    @property
    def log_prob(self) -> jax.Array:
        """The log-probability of the label [...], never above 0."""
        return self._need("label") - self.log_sum

    @property
    def entropy(self) -> jax.Array:
        """The entropy in nats [...], in [0, log V]."""
        return self.log_sum - self._need("expected")

    def _peak(self) -> jax.Array:
        tau = jnp.broadcast_to(self.temperature, self.max.shape)
        return over_temperature(jax.lax.stop_gradient(self.max), tau)

    def _need(self, name: str) -> jax.Array:
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"`{name}` must have been computed, got None. Pass labels, or ask "
                "for the statistics with linear_statistics."
            )
        return value


def linear_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: Any = None,
    vocab_axis: str | None = None,
    token_axes: tuple[str, ...] = (),
    return_argmax: bool = False,
    tile_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> LogitStatistics:
    """Log-sum-exp, log-probability, entropy and more of a softmax layer's logits.

    The logits `u = softcap(hidden @ kernel + bias)` are computed tile by tile and
    never stored: memory is a tile, not [N, V]. At 2048 × 512 × 65536 in float32 that
    is some 20 MiB in place of 512 MiB, and twice that with the gradient.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`, such as a tied
        embedding table; it is never transposed nor padded in memory.
      labels: [...] integers in [0, V), or None.
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞], a scalar or [...].
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: must be None; sharded vocabularies are not implemented yet.
      token_axes: must be empty; likewise.
      return_argmax: whether to compute `argmax`, at some cost.
      tile_bytes: the most bytes that a tile of logits may take; None takes a
        sixteenth of the bytes of `hidden` and `kernel`, within [4, 32] MiB. Peak memory
        is one to three tiles and, with gradients, a float32 sum of the shape of
        `hidden`.
      implementation: None, "xla" or "reference" (stored logits, for checking).

    Returns:
      A `LogitStatistics` with arrays of shape [...], in float32 (float64 if an
      input is).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for mesh axes, and for implementations not available.

    Notes:
      Matrix products take the dtype of the inputs (the wider of the two) and
      accumulate in float32. Differentiable in reverse mode, to first order in reverse
      and any order in forward-over-reverse, in `hidden`, `kernel`, `bias` and
      `temperature`. Under `jax.vmap` with a shared kernel the batch becomes rows.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_statistics
      >>> statistics = linear_statistics(jnp.eye(2), jnp.eye(2), jnp.array([0, 1]))
      >>> print(np.asarray([statistics.log_prob, statistics.entropy]).round(4))
      [[-0.3133 -0.3133]
       [ 0.5822  0.5822]]

    References:
      Milakov and Gimelshein, Online normalizer calculation for softmax,
      arXiv:1805.02867; Wijmans et al., Cut Your Losses in Large-Vocabulary Language
      Models, arXiv:2411.09009.
    """
    call = prepare(
        "linear_statistics",
        hidden,
        kernel,
        labels,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        token_axes=token_axes,
        tile_bytes=tile_bytes,
        implementation=implementation,
        wanted=("mean", "expected") + (("argmax",) if return_argmax else ()),
    )
    return call.run()


class Call(NamedTuple):
    """A checked call: the configuration, the arrays as given, and the shape of rows."""

    config: Config
    arrays: Operands

    def run(self) -> LogitStatistics:
        """Computes the statistics."""
        return _run(self.config, self.arrays)


def prepare(
    name: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None,
    *,
    bias: ArrayLike | None,
    temperature: ArrayLike,
    logit_softcap: float | None,
    class_mask: ArrayLike | None,
    kernel_layout: KernelLayout,
    precision: Any,
    vocab_axis: str | None,
    token_axes: tuple[str, ...],
    tile_bytes: int | None,
    implementation: Implementation | None,
    wanted: tuple[str, ...],
) -> Call:
    """Checks the arguments that the functions of this room share.

    Args:
      name: the public function's name, for messages.
      hidden: see `linear_statistics`, as are all other arguments but the last.
      kernel: [H, V] or [V, H].
      labels: [...].
      bias: [V].
      temperature: scalar or [...].
      logit_softcap: the cap.
      class_mask: [V].
      kernel_layout: "hv" or "vh".
      precision: of the matrix products.
      vocab_axis: must be None.
      token_axes: must be empty.
      tile_bytes: the budget.
      implementation: None or a name.
      wanted: which of "mean", "expected" and "argmax" to compute.

    Returns:
      The call, ready to run.
    """
    chosen = resolve(name, implementation, IMPLEMENTATIONS)
    if vocab_axis is not None or tuple(token_axes):
        raise NotImplementedError(
            "`vocab_axis` and `token_axes` must be None and (), got "
            f"{vocab_axis!r} and {token_axes!r}: sharded vocabularies come later."
        )
    arrays = _check_arrays(hidden, kernel, labels, bias, class_mask, kernel_layout)
    hidden, kernel = arrays.hidden, arrays.kernel
    if logit_softcap is not None:
        logit_softcap = checks.scalar_in("logit_softcap", logit_softcap, 0, math.inf)
        if logit_softcap == 0:
            raise ValueError("`logit_softcap` must be positive, got 0.")
    tau = checks.temperature(temperature, dtypes.compute_dtype(hidden, kernel))
    if isinstance(tau, jax.Array) and tau.ndim:
        checks.shape("temperature", tau, hidden.shape[:-1], "hidden.shape[:-1] or ()")
    if tile_bytes is None:
        tile_bytes = default_tile_bytes(
            hidden.size * hidden.dtype.itemsize + kernel.size * kernel.dtype.itemsize
        )
    config = Config(
        kernel_layout=kernel_layout,
        static_tau=None if isinstance(tau, jax.Array) else tau,
        softcap=logit_softcap,
        precision=precision,
        tile_bytes=checks.positive_integer("tile_bytes", tile_bytes),
        mean="mean" in wanted,
        expected="expected" in wanted,
        argmax="argmax" in wanted,
        implementation=chosen,
    )
    array_tau = tau if isinstance(tau, jax.Array) else None
    return Call(config, arrays._replace(tau=array_tau))


def _check_arrays(hidden, kernel, labels, bias, class_mask, kernel_layout) -> Operands:
    """Returns the arrays of a call but the temperature, their shapes checked."""
    hidden = checks.floating("hidden", hidden)
    kernel = checks.floating("kernel", kernel)
    checks.one_of("kernel_layout", kernel_layout, ("hv", "vh"))
    if hidden.ndim < 1:
        raise ValueError("`hidden` must have shape [..., H], got a scalar.")
    rows, features = hidden.shape[:-1], hidden.shape[-1]
    legend = "[H, V]" if kernel_layout == "hv" else "[V, H]"
    class_axis = 1 if kernel_layout == "hv" else 0
    if kernel.ndim != 2 or kernel.shape[1 - class_axis] != features:
        raise ValueError(
            f"`kernel` must have shape {legend} with H = {features}, "
            f"got {kernel.shape}. kernel_layout says which axis holds the classes."
        )
    num_classes = kernel.shape[class_axis]
    if num_classes == 0:
        raise ValueError(f"`kernel` must have a class, got shape {kernel.shape}.")
    if labels is not None:
        labels = checks.integer("labels", labels)
        checks.shape("labels", labels, rows, "hidden.shape[:-1]")
    if bias is not None:
        bias = checks.floating("bias", bias)
        checks.shape("bias", bias, (num_classes,), "[V]")
    if class_mask is not None:
        class_mask = checks.boolean("class_mask", class_mask)
        checks.shape("class_mask", class_mask, (num_classes,), "[V]")
    return Operands(hidden, kernel, bias, None, labels, class_mask)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(config: Config, arrays: Operands) -> LogitStatistics:
    """Folds leading axes into rows, computes, and unfolds."""
    rows = arrays.hidden.shape[:-1]
    count = math.prod(rows)
    num_classes = arrays.num_classes(config)
    labels, valid = arrays.labels, None
    if labels is not None:
        valid = (labels >= 0) & (labels < num_classes)
        # Labels of a narrow or an unsigned dtype hold -1 and V only after widening.
        labels = jnp.where(valid, labels, 0).astype(jnp.int32)
        labels = jnp.where(valid, labels, -1).reshape(count)
    dtype = dtypes.compute_dtype(arrays.hidden, arrays.kernel)
    tau = arrays.tau
    operands = arrays._replace(
        hidden=arrays.hidden.reshape(count, arrays.hidden.shape[-1]),
        labels=labels,
        tau=None if tau is None else jnp.broadcast_to(tau, rows).reshape(count),
    )
    if count:
        fields = derivative.statistics(config, operands)
        fields = jax.tree.map(lambda a: a.reshape(rows), fields)
    else:
        fields = _no_rows(config, rows, labels is not None, dtype)
    label = fields.label
    if label is not None and valid is not None:
        label = jnp.where(valid, label, jnp.nan)
    temperature = jnp.asarray(config.static_tau, dtype) if tau is None else tau
    return LogitStatistics(
        max=fields.max,
        log_sum=fields.log_sum,
        label=label,
        mean=fields.mean,
        expected=fields.expected,
        argmax=fields.argmax,
        temperature=temperature,
    )


def _no_rows(
    config: Config, rows: tuple[int, ...], labelled: bool, dtype: DTypeLike
) -> Fields:
    """Returns the fields of no rows at all."""
    empty = jnp.zeros(rows, dtype)
    return Fields(
        empty,
        empty,
        empty if labelled else None,
        empty if config.mean else None,
        empty if config.expected else None,
        jnp.zeros(rows, jnp.int32) if config.argmax else None,
    )
