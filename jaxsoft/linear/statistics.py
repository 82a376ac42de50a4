"""Statistics of the softmax over `hidden @ kernel`, from one stream over classes."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks, dtypes, registry
from jaxsoft._core.exporting import exportable_dataclass
from jaxsoft._core.registry import Implementation
from jaxsoft._core.temperature import over_temperature
from jaxsoft.linear import derivative, sharding
from jaxsoft.linear.operands import Config, Fields, KernelLayout, Operands
from jaxsoft.linear.tiling import default_tile_bytes

__all__ = [
    "Call",
    "LogitStatistics",
    "MeshAxes",
    "fold_rows",
    "linear_statistics",
    "prepare",
]

MeshAxes = str | Sequence[str] | None


@exportable_dataclass()
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
      rest: log Σ exp(c) over the classes that are not among K labels; None where not
        computed.

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
    rest: jax.Array | None = None

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

    def with_one_label(self) -> "LogitStatistics":
        """Returns the statistics with `label` [...] in place of [..., 1]."""
        if self.label is None:
            return self
        return dataclasses.replace(self, label=self.label[..., 0])

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
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
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
      vocab_axis: inside `jax.shard_map`, the mesh axis (or axes) that the classes are
        sharded over: `kernel`, `bias` and `class_mask` are this shard's, labels and V
        those of the whole. None: the classes are all here.
      token_axes: inside `jax.shard_map`, the mesh axes that the tokens are sharded
        over; the statistics of a token do not depend on them.
      return_argmax: whether to compute `argmax`, at some cost.
      tile_bytes: the most bytes that a tile of logits may take; None takes a
        sixteenth of the bytes of `hidden` and `kernel`, within [4, 32] MiB. Peak memory
        is one to three tiles, slices of the kernel of at most two, and as much for
        slices of its gradient, with a float32 sum of the shape of `hidden`.
      implementation: None, "xla", "reference" (stored logits, for checking) or
        a kernel, not yet measured: "mosaic_tpu" for TPUs, float32 or bfloat16;
        "mosaic_gpu" for GPUs of compute capability 9.0 (Hopper) or 10.0 (Blackwell),
        bfloat16 or float16, H a multiple of 16, as is V in the layout "hv" (needs
        absl-py); of 64 they are read fastest.

    Returns:
      A `LogitStatistics` with arrays of shape [...], in float32 (float64 if an
      input is).

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

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
    sharding.check_axes("token_axes", token_axes)
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
        tile_bytes=tile_bytes,
        implementation=implementation,
        wanted=("mean", "expected") + (("argmax",) if return_argmax else ()),
    )
    return call.run().with_one_label()


class Call(NamedTuple):
    """A checked call.

    Attributes:
      config: what is known when it is traced.
      arrays: the arrays as given, with leading axes; `labels` [..., K].
    """

    config: Config
    arrays: Operands

    def run(self) -> LogitStatistics:
        """Computes the statistics; `label` is [..., K]."""
        return _run(self.config, self.arrays)

    def num_classes(self) -> int:
        """V, of all shards."""
        return sharding.num_classes(self.config, self.arrays)


def prepare(
    name: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    class_ids: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: Any = None,
    vocab_axis: MeshAxes = None,
    tile_bytes: int | None = None,
    implementation: Implementation | None = None,
    wanted: tuple[str, ...] = (),
    prefix: str = "",
) -> Call:
    """Checks the arguments that the functions of this room share.

    Args:
      name: the public function's name, for messages.
      hidden: see `linear_statistics`, as are all other arguments not said here.
      kernel: [H, V] or [V, H].
      labels: [...] integers, or None.
      class_ids: [..., K] integers in place of labels, or None.
      excluded: [..., K] integers, classes that a row drops, or None.
      bias: [V].
      temperature: scalar or [...].
      logit_softcap: the cap.
      class_mask: [V].
      kernel_layout: "hv" or "vh".
      precision: of the matrix products.
      vocab_axis: the mesh axes of the classes.
      tile_bytes: the budget.
      implementation: None or a name.
      wanted: which of "mean", "expected", "argmax" and "rest" to compute.
      prefix: what the names of hidden, kernel and their options start with.

    Returns:
      The call, ready to run.
    """
    chosen = registry.resolve(name, implementation)
    axes = sharding.check_axes("vocab_axis", vocab_axis)
    if axes and chosen == "reference":
        raise NotImplementedError(
            '`implementation` must be None or "xla" with a vocab_axis, got "reference".'
        )
    arrays = _check_arrays(hidden, kernel, bias, class_mask, kernel_layout, prefix)
    hidden, kernel = arrays.hidden, arrays.kernel
    for argument, array in (("hidden", hidden), ("kernel", kernel)):
        registry.check_dtype("statistics", chosen, argument, array.dtype)
    if logit_softcap is not None:
        logit_softcap = checks.scalar_in(
            f"{prefix}logit_softcap", logit_softcap, 0, math.inf
        )
        if logit_softcap == 0:
            raise ValueError(f"`{prefix}logit_softcap` must be positive, got 0.")
    tau = checks.temperature(temperature, dtypes.compute_dtype(hidden, kernel))
    if isinstance(tau, jax.Array) and tau.ndim:
        rows = f"{prefix}hidden.shape[:-1] or ()"
        checks.shape("temperature", tau, hidden.shape[:-1], rows)
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
        rest="rest" in wanted,
        implementation=chosen,
        vocab_axes=axes,
        total_classes=getattr(vocab_axis, "number", None),
    )
    array_tau = tau if isinstance(tau, jax.Array) else None
    rows = hidden.shape[:-1]
    if labels is not None:
        labels = checks.integer("labels", labels)
        checks.shape("labels", labels, rows, f"{prefix}hidden.shape[:-1]")
        class_ids = labels[..., None]
    elif class_ids is not None:
        class_ids = _check_ids("class_ids", class_ids, rows)
    if excluded is not None:
        excluded = _check_ids("excluded", excluded, rows)
    return Call(
        config, arrays._replace(tau=array_tau, labels=class_ids, excluded=excluded)
    )


def _check_ids(name: str, ids: ArrayLike, rows: tuple[int, ...]) -> jax.Array:
    """Returns integers whose shape must be [..., K], K at least 1."""
    ids = checks.integer(name, ids)
    if ids.ndim == 0 or ids.shape[:-1] != rows or ids.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must have shape [..., K] with hidden.shape[:-1] = {rows} and "
            f"K >= 1, got {ids.shape}."
        )
    return ids


def _check_arrays(hidden, kernel, bias, class_mask, kernel_layout, prefix) -> Operands:
    """Returns the floating arrays and the mask of a call, their shapes checked."""
    hidden = checks.floating(f"{prefix}hidden", hidden)
    kernel = checks.floating(f"{prefix}kernel", kernel)
    checks.one_of(f"{prefix}kernel_layout", kernel_layout, ("hv", "vh"))
    if hidden.ndim < 1:
        raise ValueError(f"`{prefix}hidden` must have shape [..., H], got a scalar.")
    features = hidden.shape[-1]
    legend = "[H, V]" if kernel_layout == "hv" else "[V, H]"
    class_axis = 1 if kernel_layout == "hv" else 0
    if kernel.ndim != 2 or kernel.shape[1 - class_axis] != features:
        raise ValueError(
            f"`{prefix}kernel` must have shape {legend} with H = {features}, got "
            f"{kernel.shape}. {prefix}kernel_layout says which axis holds the classes."
        )
    num_classes = kernel.shape[class_axis]
    if num_classes == 0:
        raise ValueError(
            f"`{prefix}kernel` must have a class, got shape {kernel.shape}."
        )
    if bias is not None:
        bias = checks.floating(f"{prefix}bias", bias)
        checks.shape(f"{prefix}bias", bias, (num_classes,), "[V]")
    if class_mask is not None:
        class_mask = checks.boolean("class_mask", class_mask)
        checks.shape("class_mask", class_mask, (num_classes,), "[V]")
    return Operands(hidden, kernel, bias, None, None, class_mask)


def fold_rows(config: Config, arrays: Operands) -> Operands:
    """Folds leading axes into rows; labels that are no class become -1."""
    rows = arrays.hidden.shape[:-1]
    count = math.prod(rows)
    num_classes = sharding.num_classes(config, arrays)

    def ids(classes):
        if classes is None:
            return None
        valid = (classes >= 0) & (classes < num_classes)
        # Labels of a narrow or an unsigned dtype hold -1 and V only after widening.
        classes = jnp.where(valid, classes, 0).astype(jnp.int32)
        return jnp.where(valid, classes, -1).reshape(count, classes.shape[-1])

    tau = arrays.tau
    return arrays._replace(
        hidden=arrays.hidden.reshape(count, arrays.hidden.shape[-1]),
        labels=ids(arrays.labels),
        tau=None if tau is None else jnp.broadcast_to(tau, rows).reshape(count),
        excluded=ids(arrays.excluded),
    )


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(config: Config, arrays: Operands) -> LogitStatistics:
    """Folds leading axes into rows, computes, and unfolds."""
    rows = arrays.hidden.shape[:-1]
    operands = fold_rows(config, arrays)
    dtype = dtypes.compute_dtype(arrays.hidden, arrays.kernel)
    if operands.hidden.shape[0]:
        fields = derivative.statistics(config, operands)
        fields = jax.tree.map(lambda a: a.reshape(rows + a.shape[1:]), fields)
    else:
        fields = _no_rows(config, rows, arrays.labels, dtype)
    label = fields.label
    if label is not None and operands.labels is not None:
        valid = operands.labels.reshape(label.shape) >= 0
        label = jnp.where(valid, label, jnp.nan)
    tau = arrays.tau
    temperature = jnp.asarray(config.static_tau, dtype) if tau is None else tau
    return LogitStatistics(
        max=fields.max,
        log_sum=fields.log_sum,
        label=label,
        mean=fields.mean,
        expected=fields.expected,
        argmax=fields.argmax,
        temperature=temperature,
        rest=fields.rest,
    )


def _no_rows(
    config: Config,
    rows: tuple[int, ...],
    labels: jax.Array | None,
    dtype: DTypeLike,
) -> Fields:
    """Returns the fields of no rows at all."""
    empty = jnp.zeros(rows, dtype)
    return Fields(
        empty,
        empty,
        None if labels is None else jnp.zeros(labels.shape, dtype),
        empty if config.mean else None,
        empty if config.expected else None,
        jnp.zeros(rows, jnp.int32) if config.argmax else None,
        empty if config.rest else None,
    )
