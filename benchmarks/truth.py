"""What the functions should return, in float64 NumPy, gradients by formula."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.checks import Subset

_BLOCK_BYTES = 2**28

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class LinearOptions:
    """The options of `jaxsoft.linear_cross_entropy`, as it takes them.

    Attributes:
      bias: `[V]`.
      temperature: a scalar, or `[N]`.
      logit_softcap: a number.
      class_mask: `[V]`, boolean.
      label_smoothing: a number.
      z_loss: a number.
      weights: `[N]`.
      ignore_label: a label whose tokens count nothing.
    """

    bias: Any = None
    temperature: Any = 1.0
    logit_softcap: float | None = None
    class_mask: Any = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    weights: Any = None
    ignore_label: int | None = None


def linear_truth(
    hidden: Any,
    kernel: Any,
    labels: Any,
    subset: Subset,
    *,
    options: LinearOptions | None = None,
    cotangent: Any | None = None,
) -> dict[str, Array]:
    """The true loss and its gradients, on a subset of rows and classes.

    Args:
      hidden: `[N, H]`.
      kernel: `[H, V]`.
      labels: `[N]`.
      subset: which rows of `loss` and `dhidden`, and which classes of `dkernel`.
      options: None leaves every option at its default.
      cotangent: `[N]`, of the weighted loss per token; None means the mean's.

    Returns:
      `loss` of the subset's rows, weighted but not reduced; `mean` over all rows;
      `entropy` of the subset's rows, 0 where the weight is;
      `dhidden` of the subset's rows; `dkernel`, `[H, len(subset.classes)]`.
    """
    options = options or LinearOptions()
    hidden, kernel, labels = _float64(hidden), _float64(kernel), np.asarray(labels)
    count = labels.shape[0]
    weights = _weights(labels, options)
    total = weights.sum()
    upstream = np.full(count, 1 / total) if cotangent is None else _float64(cotangent)
    temperature = np.broadcast_to(_float64(options.temperature), (count,))

    loss, entropy, dhidden = np.zeros(count), np.zeros(count), []
    dkernel = np.zeros((kernel.shape[0], len(subset.classes)))
    step = max(1, _BLOCK_BYTES // (8 * kernel.shape[1]))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        block_loss, block_entropy, dlogits = _linear_block(
            hidden[rows] @ kernel, labels[rows], temperature[rows], options
        )
        loss[rows] = np.where(weights[rows] != 0, weights[rows] * block_loss, 0)
        entropy[rows] = np.where(weights[rows] != 0, block_entropy, 0)
        scale = (weights * upstream)[rows, None]
        dkernel += hidden[rows].T @ (dlogits[:, subset.classes] * scale)
        inside = subset.rows[(subset.rows >= start) & (subset.rows < start + step)]
        inside = inside - start
        dhidden.append((dlogits[inside] * scale[inside]) @ kernel.T)
    return {
        "loss": loss[subset.rows],
        "mean": np.asarray(loss.sum() / total),
        "entropy": entropy[subset.rows],
        "dhidden": np.concatenate(dhidden),
        "dkernel": dkernel,
    }


def softmax_truth(
    logits: Any, labels: Any, temperature: Any, cotangent: Any
) -> dict[str, Array]:
    """The softmax family at a temperature, over the last axis.

    Args:
      logits: `[N, V]`.
      labels: `[N]`.
      temperature: a scalar, or `[N, 1]`.
      cotangent: `[N, V]`, of the probabilities and of their logarithms. That of the
        cross-entropies is one.

    Returns:
      `softmax`, `log_softmax` and `cross_entropy`; the gradient of the logits from
      each, its name after a `d`; and `dtemperature`, `[N, 1]`, from `softmax`.
    """
    temperature, upstream = _float64(temperature), _float64(cotangent)
    scaled = _float64(logits) / temperature
    centred = scaled - scaled.max(axis=-1, keepdims=True)
    log_probs = centred - np.log(np.exp(centred).sum(axis=-1, keepdims=True))
    probs = np.exp(log_probs)
    picked = np.asarray(labels)[:, None] == np.arange(scaled.shape[-1])
    dscaled = probs * (upstream - (probs * upstream).sum(axis=-1, keepdims=True))
    dtemperature = -(dscaled * scaled).sum(axis=-1, keepdims=True) / temperature
    total = upstream.sum(axis=-1, keepdims=True)
    return {
        "softmax": probs,
        "log_softmax": log_probs,
        "cross_entropy": -log_probs[picked],
        "dsoftmax": dscaled / temperature,
        "dlog_softmax": (upstream - probs * total) / temperature,
        "dcross_entropy": (probs - picked) / temperature,
        "dtemperature": dtemperature,
    }


def _linear_block(
    logits: Array, labels: NDArray[Any], temperature: Array, options: LinearOptions
) -> tuple[Array, Array, Array]:
    """The loss and the entropy of each row, and the loss's gradient, of bare logits."""
    slope: Any = 1.0
    kept = None if options.class_mask is None else np.asarray(options.class_mask)
    if options.bias is not None:
        logits = logits + _float64(options.bias)
    if options.logit_softcap is not None:
        capped = np.tanh(logits / options.logit_softcap)
        logits, slope = options.logit_softcap * capped, 1 - capped**2
    scaled = logits / temperature[:, None]
    masked = scaled if kept is None else np.where(kept, scaled, -np.inf)
    largest = masked.max(axis=1)
    probs = np.exp(masked - largest[:, None])
    sums = probs.sum(axis=1)
    probs /= sums[:, None]
    lse = largest + np.log(sums)
    entropy = lse - (probs * scaled).sum(axis=1)

    rows = np.arange(len(labels))
    inside = (labels >= 0) & (labels < logits.shape[1])
    safe = np.where(inside, labels, 0)
    smoothing = options.label_smoothing
    loss = lse - (1 - smoothing) * scaled[rows, safe] + options.z_loss * lse**2
    dlogits = probs * (1 + 2 * options.z_loss * lse)[:, None]
    dlogits[rows, safe] -= 1 - smoothing
    if smoothing:
        spread = np.ones(logits.shape[1]) if kept is None else kept.astype(np.float64)
        spread *= smoothing / spread.sum()
        loss -= scaled @ spread
        dlogits -= spread
    return loss, entropy, dlogits * (slope / temperature[:, None])


def _weights(labels: NDArray[Any], options: LinearOptions) -> Array:
    weights = np.ones(labels.shape)
    if options.weights is not None:
        weights = _float64(options.weights)
    if options.ignore_label is not None:
        weights = np.where(labels == options.ignore_label, 0.0, weights)
    return weights


def _float64(value: Any) -> Array:
    return np.asarray(value).astype(np.float64)
