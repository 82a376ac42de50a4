"""Softmax losses over a label and a few sampled classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpy import typing as npt

from jaxsoft._core import checks, mesh_axes, registry
from jaxsoft._core.exporting import Leaf, exportable_dataclass
from jaxsoft._core.numerics import (
    compute_dtype,
    is_zero,
    matmul,
    nan_where,
    operand_dtype,
    over_temperature,
)
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    Reduction,
    keep_temperature,
    labelled_tokens,
    reduce_losses,
)
from jaxsoft.hierarchical.layer import products_of_rows
from jaxsoft.hierarchical.same_rows import take_rows
from jaxsoft.linear.arguments import KernelLayout

__all__ = ["ClassSampler", "Sampler", "sampled_softmax_loss"]

# Probabilities are whole multiples of 2 to the power of minus this.
_BITS = 30


class Sampler(Protocol):
    """What draws classes for `sampled_softmax_loss`."""

    def sample(self, key: jax.Array, num_samples: int) -> jax.Array:
        """Returns classes [S], drawn with replacement."""
        ...

    def log_prob(self, class_ids: jax.Array) -> jax.Array:
        """Returns the log-probability of each class in one draw."""
        ...


@exportable_dataclass()
@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """Draws classes, with replacement, with probabilities that are known exactly.

    Probabilities are rounded to multiples of 2⁻³⁰, none of them to 0, when a sampler is
    made; draws and log-probabilities are then of the rounded ones, without an error. A
    pytree: pass it to a compiled function as an argument.

    Attributes:
      starts: [V + 1] int32, sums of the probabilities of the classes before, by 2³⁰.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import ClassSampler
      >>> sampler = ClassSampler.unigram([3, 0, 1])
      >>> print(jnp.exp(sampler.log_prob(jnp.arange(3))))
      [0.75 0.   0.25]
      >>> print(sampler.sample(jax.random.key(0), 8).shape)
      (8,)
    """

    starts: Leaf

    @classmethod
    def uniform(cls, num_classes: int) -> ClassSampler:
        """Every class alike.

        Args:
          num_classes: V in [1, 2²⁸].

        Returns:
          A sampler.
        """
        return cls.unigram(np.ones(_classes(num_classes)))

    @classmethod
    def log_uniform(cls, num_classes: int) -> ClassSampler:
        """Zipf's law, for classes in order of falling frequency.

        Args:
          num_classes: V in [1, 2²⁸].

        Returns:
          A sampler of class c with probability log(1 + 1/(c+1)) / log(V+1).
        """
        return cls.unigram(np.log1p(1 / np.arange(1.0, _classes(num_classes) + 1)))

    @classmethod
    def unigram(cls, counts: npt.ArrayLike, power: float = 1.0) -> ClassSampler:
        """Classes as often as they come, or by any other probabilities.

        Args:
          counts: [V] finite and not negative, not all 0; no traced array.
          power: of the counts, such as 0.75 in word2vec; a count of 0 stays 0.

        Returns:
          A sampler of each class with probability count^power, normalised.

        Raises:
          TypeError: if a type is wrong.
          ValueError: if an argument is out of its range.
        """
        weights = checks.counts(counts)
        _classes(len(weights))
        if not (weights > 0).any():
            raise ValueError("`counts` must not be all 0.")
        power = checks.scalar_in("power", power, 0, float("inf"))
        live = weights > 0
        weights = np.where(live, (weights / weights.max()) ** power, 0)
        weights = np.where(live, np.maximum(weights, np.finfo(np.float64).tiny), 0)
        # One each, and the rest in proportion, each to the nearest by its running sum.
        spare = 2**_BITS - int(live.sum())
        shares = np.cumsum(weights / weights.sum())
        ends = np.rint(np.minimum(shares / shares[-1], 1) * spare).astype(np.int64)
        ends += np.cumsum(live)
        return cls(np.concatenate([[0], ends]).astype(np.int32))

    @property
    def num_classes(self) -> int:
        """V."""
        return self.starts.shape[0] - 1

    def sample(self, key: jax.Array, num_samples: int) -> jax.Array:
        """Draws classes.

        Args:
          key: a JAX random key.
          num_samples: S.

        Returns:
          [S] int32 in [0, V).
        """
        bits = jax.random.bits(key, (num_samples,), jnp.uint32) >> (32 - _BITS)
        starts = jnp.asarray(self.starts)
        # Unrolled: a GPU makes one kernel of it, and the compiler for TPUs of JAX 0.12
        # fails at the loop beside the gradient of a table [V, H].
        following = jnp.searchsorted(
            starts, bits.astype(jnp.int32), side="right", method="scan_unrolled"
        )
        return following - 1

    @mesh_axes.accepts_explicit("class_ids", has_features=False)
    def log_prob(self, class_ids: ArrayLike) -> jax.Array:
        """Returns log-probabilities in one draw.

        Args:
          class_ids: [...] integers in [0, V).

        Returns:
          [...] float32; -inf for a class that is never drawn.
        """
        ids = checks.integer("class_ids", class_ids)
        starts = jnp.asarray(self.starts)
        share = starts[ids + 1] - starts[ids]
        return jnp.log(share.astype(jnp.float32) * jnp.float32(2.0**-_BITS))


def _classes(num_classes: int) -> int:
    if checks.positive_integer("num_classes", num_classes) > 2**28:
        raise ValueError(f"`num_classes` must be at most 2**28, got {num_classes}.")
    return int(num_classes)


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def sampled_softmax_loss(
    key: jax.Array,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    num_samples: int,
    *,
    sampler: Sampler,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    remove_accidental_hits: bool = True,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    reduction: Reduction = "mean",
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Cross-entropy of labels against a sample of classes that all tokens share.

    `-z_y/τ + log(exp(z_y/τ) + Σ_s exp(z_s/τ - log(S·q_s)))`, over S classes s drawn
    with replacement with probabilities q, those equal to the label left out, and
    `z = hidden @ kernel + bias`. The sum is an unbiased estimate of the softmax's own
    (logQ correction): with more samples the loss becomes `linear_cross_entropy`.

    Args:
      key: a JAX random key.
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      labels: [...] integers in [0, V).
      num_samples: S >= 1.
      sampler: a `ClassSampler` over V classes, or any object with its methods `sample`
        and `log_prob`; its arrays are NumPy's, or leaves of a pytree that it is.
      bias: [V] floating, added to the logits.
      temperature: τ in [0, ∞], a scalar, [...] or [..., 1].
      remove_accidental_hits: False counts sampled classes that are a token's label as
        wrong: the estimate is then too large by the label's own part.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing, whatever its label and hidden state.
      ignore_label: a label whose tokens have weight 0, such as -100; or None.
      reduction: "mean" (Σ weight · loss / Σ weight, 0 if the weights sum to 0), "sum"
        (Σ weight · loss) or "none" (weight · loss).
      kernel_layout: "hv" or "vh"; rows of the latter are read faster: to take columns
        of the former XLA copies the whole kernel on TPUs, and its gradient.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      A scalar, or [...] with reduction "none", in float32 (float64 if an input is). A
      label outside [0, V) gives NaN where its weight is not 0.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      O(N·S·H) and [N, S] logits. Differentiable in `hidden`, `kernel`, `bias`,
      `temperature` and `weights`; the gradient of the kernel is dense. The logarithm
      of an unbiased estimate is biased, below the truth: measure quality by
      `linear_cross_entropy`. The label's logit is not corrected, as it takes part
      always, not with probability q; TensorFlow's `sampled_softmax_loss` corrects it
      too, and with samples drawn with replacement then does not become the full
      softmax.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import ClassSampler, sampled_softmax_loss
      >>> kernel, labels = jnp.zeros((8, 1000)), jnp.array([3, 700])
      >>> loss = sampled_softmax_loss(
      ...     jax.random.key(0), jnp.ones((2, 8)), kernel, labels, 64,
      ...     sampler=ClassSampler.uniform(1000),
      ... )
      >>> print(f"{loss:.3f} {jnp.log(1000):.3f}")
      6.909 6.908

    References:
      Bengio and Senécal, Quick Training of Probabilistic Neural Nets by Importance
      Sampling, 2003; Jean et al., arXiv:1412.2007; Khrylchenko et al., Correcting the
      LogQ Correction, arXiv:2507.09331 (the label's logit).
    """
    registry.resolve("sampled_softmax_loss", implementation)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    checks.one_of("kernel_layout", kernel_layout, ("hv", "vh"))
    count = checks.positive_integer("num_samples", num_samples)
    kernel = checks.floating("kernel", kernel)
    if not jnp.ndim(hidden):
        raise ValueError("`hidden` must have shape [..., H], got a scalar.")
    hidden, labels, token_weight = labelled_tokens(
        hidden, labels, weights, ignore_label
    )
    rows, features = hidden.shape[:-1], hidden.shape[-1]
    if kernel.ndim != 2:
        raise ValueError(f"`kernel` must have two axes, got shape {kernel.shape}.")
    axis = 1 if kernel_layout == "hv" else 0
    classes = kernel.shape[axis]
    wanted = (features, classes) if axis else (classes, features)
    checks.shape("kernel", kernel, wanted, "(H, V)" if axis else "(V, H)")
    if isinstance(sampler, ClassSampler) and sampler.num_classes != classes:
        raise ValueError(
            f"`sampler` must be over {classes} classes, got {sampler.num_classes}."
        )
    if bias is not None:
        bias = checks.floating("bias", bias)
        checks.shape("bias", bias, (classes,), "(V,)")
    dtype = compute_dtype(hidden, kernel)
    tau = keep_temperature(token_weight, temperature)
    tau = checks.row_temperature(tau, dtype, rows)
    if not isinstance(tau, (int, float)):
        tau = jnp.broadcast_to(tau, rows).reshape(-1, 1)
    ids = checks.integer("sampler.sample(...)", sampler.sample(key, count))
    expected = sampler.log_prob(ids).astype(dtype) + math.log(count)
    flat = labels.reshape(-1)
    known = (flat >= 0) & (flat < classes)
    own = jnp.where(known, flat, -1).astype(jnp.int32)
    states = hidden.reshape(len(flat), features)
    scores, own_scores = _logits(
        states, kernel, bias, ids, own, axis=axis, precision=precision
    )
    others = scores - own_scores[:, None]
    others = over_temperature(others, float(tau) if isinstance(tau, int) else tau)
    others -= expected[None]
    if remove_accidental_hits:
        others = jnp.where(ids[None] == own[:, None], -jnp.inf, others)
    loss = _log_sum_with_one(others, is_zero(tau, dtype))
    loss = nan_where(~known, loss).reshape(rows)
    return reduce_losses(loss, token_weight, reduction)


def _logits(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    ids: jax.Array,
    own: jax.Array,
    *,
    axis: int,
    precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns logits [N, S] of shared classes and [N] of one class a token.

    The parameters of all are taken at once: their gradients are added up before they
    meet the kernel's.
    """
    count, last = len(ids), kernel.shape[axis] - 1
    every = jnp.clip(jnp.concatenate([ids.astype(own.dtype), own]), 0, last)
    vectors = take_rows(kernel, every, axis)
    vectors = (vectors.T if axis else vectors).astype(operand_dtype(hidden, kernel))
    dtype = compute_dtype(hidden, kernel)
    wide = hidden.astype(vectors.dtype)
    shared = matmul(wide, vectors[:count].T, precision, dtype)
    own_scores = products_of_rows(hidden, vectors[count:], dtype, precision)
    if bias is None:
        return shared, own_scores
    biases = take_rows(bias, every).astype(dtype)
    return shared + biases[None, :count], own_scores + biases[count:]


def _log_sum_with_one(x: jax.Array, cold: jax.Array) -> jax.Array:
    """Returns log(1 + Σ exp(x)) over the last axis, without a derivative where cold."""
    x = jnp.where(cold, lax.stop_gradient(x), x)
    peak = lax.stop_gradient(jnp.max(x, axis=-1))
    # Nothing to add, or too much of it.
    bounded = jnp.where(jnp.isfinite(peak), peak, 0)
    total = jnp.sum(jnp.exp(x - bounded[:, None]), axis=-1)
    none = total == 0
    log_sum = bounded + jnp.log(jnp.where(none, 1, total))
    log_total = jnp.logaddexp(jnp.where(none, 0, log_sum), jnp.zeros_like(log_sum))
    return jnp.where(none, 0, jnp.where(peak == jnp.inf, jnp.inf, log_total))
