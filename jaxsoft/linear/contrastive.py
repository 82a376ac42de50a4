"""Contrastive losses: a softmax over a batch of embeddings, similarities streamed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.numerics import (
    compute_dtype,
    operand_dtype,
)
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import Config, fold_rows, prepare
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.pairs import BothWays, Pairs
from jaxsoft.linear.folds.statistics import (
    Fields,
    LogitStatistics,
    Statistics,
    statistics,
)
from jaxsoft.linear.token_losses import TokenLoss, reduced, statistics_loss
from jaxsoft.linear.total import RowLoss

__all__ = ["as_groups", "clip_loss", "nt_xent", "scalar", "supervised_contrastive"]


@mesh_axes.accepts_explicit("anchors")
def nt_xent(
    anchors: ArrayLike,
    positives: ArrayLike,
    temperature: ArrayLike = 0.5,
    *,
    normalize: bool = True,
    precision: jax.lax.PrecisionLike = None,
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Normalised temperature-scaled cross-entropy of pairs, as in SimCLR.

    With z all 2N embeddings and j the partner of i, the mean over i of
    `-log(exp(z_i·z_j / τ) / Σ_{k≠i} exp(z_i·z_k / τ))`.

    Args:
      anchors: [N, D] floating.
      positives: [N, D] floating; row i is the partner of row i of `anchors`.
      temperature: τ in [0, ∞], a scalar; differentiable.
      normalize: whether embeddings are divided by their Euclidean norms first.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference".

    Returns:
      A scalar, float32 (float64 if an input is); 0 for N = 0.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The [2N, 2N] similarities are streamed; the gradient takes blocks of rows of them
      that the workspace has room for. Differentiable in both embeddings and the
      temperature. Devices that share a batch gather the embeddings, [N, D], first.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import nt_xent
      >>> print(f"{nt_xent(jnp.eye(4), jnp.eye(4), 0.5):.4f}")
      0.5944

    References:
      Chen et al., A Simple Framework for Contrastive Learning, arXiv:2002.05709.
    """
    first, second = _pair("anchors", anchors, "positives", positives)
    count = first.shape[0]
    if not count:
        return jnp.zeros((), compute_dtype(first))
    z = _normalized(jnp.concatenate([first, second]), normalize)
    own = jnp.arange(2 * count)
    call = prepare(
        "nt_xent",
        z,
        z,
        jnp.roll(own, count),
        excluded=own[:, None],
        temperature=scalar(temperature),
        kernel_layout="vh",
        precision=precision,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    return statistics_loss(call, (), _Surprise(), None, "mean")


@dataclasses.dataclass(frozen=True)
class _Surprise(TokenLoss):
    """The negative log-probability of each row's label."""

    def of_tokens(self, statistics: LogitStatistics) -> jax.Array:
        return -statistics.with_one_label().log_prob


@mesh_axes.accepts_explicit("image")
def clip_loss(
    image: ArrayLike,
    text: ArrayLike,
    temperature: ArrayLike = 0.07,
    *,
    normalize: bool = True,
    precision: jax.lax.PrecisionLike = None,
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The symmetric contrastive loss of CLIP.

    The mean of two cross-entropies of `image @ text.T / τ` with labels 0 … N-1: over
    texts for each image, and over images for each text.

    Args:
      image: [N, D] floating.
      text: [N, D] floating; row i belongs to row i of `image`.
      temperature: τ in [0, ∞], a scalar; differentiable. CLIP learns
        `logit_scale = log(1 / τ)`: pass `jnp.exp(-logit_scale)`.
      normalize: whether embeddings are divided by their Euclidean norms first.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference".

    Returns:
      A scalar, float32 (float64 if an input is); 0 for N = 0.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The [N, N] similarities are streamed, once for both directions; what the
      workspace has room for is kept for the gradient, and all else computed again.
      Differentiable in both embeddings and the temperature. Devices that share a batch
      gather the images, [N, D], first, and each streams its own texts.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import clip_loss
      >>> print(f"{clip_loss(jnp.eye(4), jnp.eye(4), 0.5):.4f}")
      0.3408

    References:
      Radford et al., Learning Transferable Visual Models From Natural Language
      Supervision, arXiv:2103.00020.
    """
    images, texts = _pair("image", image, "text", text)
    count = images.shape[0]
    if not count:
        return jnp.zeros((), compute_dtype(images))
    images, texts = _normalized(images, normalize), _normalized(texts, normalize)
    similarities = functools.partial(
        prepare,
        "clip_loss",
        temperature=scalar(temperature),
        kernel_layout="vh",
        precision=precision,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    call = similarities(images, texts)
    if call.config.implementation == "reference":

        def log_prob(rows, columns):
            call = similarities(rows, columns, jnp.arange(count))
            return statistics(call).with_one_label().log_prob

        of_images = jnp.mean(log_prob(images, texts))
        return -(of_images + jnp.mean(log_prob(texts, images))) / 2
    tau = call.arrays.tau
    pairs = Pairs(images, texts, None if tau is None else tau.reshape(1))
    return _both_ways(BothWays(_by_classes(call.config)), pairs)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _both_ways(fold: BothWays, pairs: Pairs) -> jax.Array:
    """Returns the mean of the losses of both directions."""
    losses = stream(fold, pairs)
    return (jnp.mean(losses.image) + jnp.mean(losses.text)) / 2


def _by_classes(config: Config) -> Config:
    """Returns a call's configuration, where devices share classes in place of rows."""
    shards = config.shards
    if shards is None:
        return config
    shards = shards._replace(rows=(), classes=shards.rows)
    return dataclasses.replace(config, shards=shards)


@mesh_axes.accepts_explicit("embeddings")
def supervised_contrastive(
    embeddings: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike = 0.1,
    *,
    normalize: bool = True,
    precision: jax.lax.PrecisionLike = None,
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Supervised contrastive loss: all embeddings of a label are positives.

    With P(i) the other embeddings that have the label of i, the mean over all i with
    a non-empty P(i) of
    `-1/|P(i)| Σ_{p∈P(i)} log(exp(z_i·z_p / τ) / Σ_{k≠i} exp(z_i·z_k / τ))`.

    Args:
      embeddings: [N, D] floating.
      labels: [N] integers, any values.
      temperature: τ in (0, ∞], a scalar; differentiable.
      normalize: whether embeddings are divided by their Euclidean norms first.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference".

    Returns:
      A scalar, float32 (float64 if an input is); 0, with gradient 0, where no two
      embeddings have the same label.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      This is the loss that the paper calls L_out. The [N, N] similarities are
      streamed, and compared with labels as they are; the gradient takes blocks of rows
      of them that the workspace has room for. Differentiable in the embeddings and the
      temperature. Devices that share a batch gather the embeddings, [N, D], first.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import supervised_contrastive
      >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> loss = supervised_contrastive(embeddings, jnp.array([5, 5, 7]), 0.5)
      >>> print(f"{loss:.4f}")
      0.1269

    References:
      Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362.
    """
    z = _matrix("embeddings", embeddings)
    labels = as_groups(labels)
    count = z.shape[0]
    checks.shape("labels", labels, (count,), "[N]")
    dtype = compute_dtype(z)
    if not count:
        return jnp.zeros((), dtype)
    z = _normalized(z, normalize)
    call = prepare(
        "supervised_contrastive",
        z,
        z,
        excluded=jnp.arange(count)[:, None],
        temperature=scalar(temperature),
        kernel_layout="vh",
        precision=precision,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    groups = call.arrays._replace(group=labels[:, None], class_groups=labels)
    operands = fold_rows(call.config, groups)
    return reduced(
        Statistics(call.config, frozenset(("mean",))),
        _OfPositives(),
        operands,
        (),
        _have_positives(labels).astype(dtype),
        "mean",
        (),
    )


@jax.jit
def _have_positives(labels: jax.Array) -> jax.Array:
    """Tells which rows have the label of another one, [N]."""
    return jnp.sum(labels[:, None] == labels[None], axis=1, dtype=jnp.int32) > 1


@dataclasses.dataclass(frozen=True)
class _OfPositives(RowLoss):
    """The loss of each row: the mean of its group is that of its positives."""

    def of_rows(self, result: Fields, rows: tuple[()]) -> jax.Array:
        del rows
        assert result.mean is not None
        return result.log_sum - result.mean


def as_groups(labels: ArrayLike, name: str = "labels") -> jax.Array:
    """Returns integers that are equal where the labels are, whatever their size."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        # Without x64 JAX keeps the low 32 bits alone.
        numbers = np.unique(labels, return_inverse=True)[1]
        return jnp.asarray(numbers.reshape(labels.shape).astype(np.int32))
    array = jnp.asarray(labels)
    checks.integer(name, array)
    return array


def _matrix(name: str, value: ArrayLike) -> jax.Array:
    array = checks.floating(name, value)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"`{name}` must have shape [N, D], got {array.shape}.")
    return array


def _pair(
    first: str, a: ArrayLike, second: str, b: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns two matrices of one shape, in one dtype."""
    one, two = _matrix(first, a), _matrix(second, b)
    checks.shape(second, two, one.shape, f"{first}.shape")
    dtype = operand_dtype(one, two)
    return one.astype(dtype), two.astype(dtype)


def _normalized(z: jax.Array, normalize: bool) -> jax.Array:
    """Returns rows of unit length; a row of zeros stays, with gradient 0."""
    if not normalize:
        return z
    wide = z.astype(compute_dtype(z))
    # Scaled by the largest entry, so that no square overflows or vanishes.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=1, keepdims=True))
    empty = largest == 0
    wide = wide / jnp.where(empty, 1, largest)
    square = jnp.sum(wide * wide, axis=1, keepdims=True)
    norm = jnp.sqrt(jnp.where(empty, 1, square))
    return jnp.where(empty, 0, wide / norm).astype(z.dtype)


def scalar(temperature: ArrayLike) -> ArrayLike:
    """Returns a temperature, which must be a scalar."""
    if jnp.ndim(temperature):
        raise ValueError(
            f"`temperature` must be a scalar, got shape {jnp.shape(temperature)}."
        )
    return temperature
