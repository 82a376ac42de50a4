"""Samples and the best classes of an adaptive softmax."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.registry import Implementation
from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.adaptive.layer import AdaptiveTail, Layer, prepare
from jaxsoft.adaptive.log_probs import log_prob_of_ranks
from jaxsoft.adaptive.row_blocks import RowBlocks, take
from jaxsoft.linear.log_probs import linear_log_prob_at
from jaxsoft.linear.sampling import linear_sample
from jaxsoft.linear.top_k import linear_top_k

__all__ = ["adaptive_sample", "adaptive_top_k"]


@mesh_axes.accepts_explicit("hidden")
def adaptive_sample(
    key: jax.Array,
    hidden: ArrayLike,
    head_kernel: ArrayLike,
    tails: Sequence[AdaptiveTail],
    bands: ClassBands,
    *,
    head_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Draws classes from the probabilities of `adaptive_log_probs`.

    An entry of the head is drawn; where it is a tail, one of the tail's classes.

    Args:
      key: a JAX random key.
      hidden: [..., H] floating.
      head_kernel: [H, S + T] floating: the shortlist by rank, then one entry a tail.
      tails: T `AdaptiveTail`, or tuples (projection, kernel[, bias]).
      bands: the classes by frequency: S of the shortlist, T tails.
      head_bias: [S + T] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every softmax; see
        `adaptive_log_prob`. At 0 the likeliest entry is taken: greedily, which need
        not end at the likeliest class.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      [...] int32 in [0, V); -1 where a NaN was met.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Exact. A tail costs in proportion to the tokens that come to it. Without a
      derivative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import AdaptiveTail, ClassBands, adaptive_sample
      >>> bands = ClassBands.in_order(4, (1,))
      >>> tail = AdaptiveTail(jnp.ones((1, 1)), jnp.array([[0.0, 0.0, 60.0]]))
      >>> kernel = jnp.array([[0.0, 60.0]])
      >>> key, hidden = jax.random.key(0), jnp.ones((3, 1))
      >>> print(adaptive_sample(key, hidden, kernel, [tail], bands))
      [3 3 3]

    References:
      Grave et al., Efficient softmax approximation for GPUs, arXiv:1609.04309.
    """
    layer = prepare(
        "adaptive_sample",
        hidden,
        head_kernel,
        tails,
        bands,
        head_bias=head_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    ranks = _sample(key, lax.stop_gradient(layer))
    return bands.class_of(ranks).reshape(layer.shape)


@functools.partial(jax.jit, inline=True)
def _sample(key: jax.Array, layer: Layer) -> jax.Array:
    operands, options = layer.call()
    entries = linear_sample(jax.random.fold_in(key, 0), *operands, **options)
    ranks = entries
    for index, start in enumerate(layer.starts):
        tail = layer.tail(index)
        tail_key = jax.random.fold_in(key, index + 1)

        def step(rows, carry, *, tail=tail, tail_key=tail_key, start=start):
            ranks, block = carry
            operands, options = tail.rows(rows).call()
            place = linear_sample(
                jax.random.fold_in(tail_key, block), *operands, **options
            )
            place = jnp.where(place < 0, -1, start + place)
            return ranks.at[rows].set(place, mode="drop"), block + 1

        blocks = RowBlocks(entries == layer.shortlist + index)
        ranks, _ = blocks.fold(step, (ranks, jnp.int32(0)))
    return ranks


@mesh_axes.accepts_explicit("hidden")
def adaptive_top_k(
    hidden: ArrayLike,
    head_kernel: ArrayLike,
    tails: Sequence[AdaptiveTail],
    k: int,
    bands: ClassBands,
    *,
    head_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k most probable classes of each token under an adaptive softmax, exactly.

    No class of a tail is more probable than the tail's entry in the head, so a token
    looks only into the tails whose entries reach its k best classes so far.

    Args:
      hidden: [..., H] floating.
      head_kernel: [H, S + T] floating: the shortlist by rank, then one entry a tail.
      tails: T `AdaptiveTail`, or tuples (projection, kernel[, bias]).
      k: how many classes, in [1, V].
      bands: the classes by frequency: S of the shortlist, T tails.
      head_bias: [S + T] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every softmax; see
        `adaptive_log_prob`. The order of the classes depends on it.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      A pair: log-probabilities [..., k], descending, float32 (float64 if an input is),
      and class ids [..., k] int32; equal ones are ordered by rank.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Log-probabilities are differentiable as those of `adaptive_log_prob`, which the
      derivative computes anew.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import AdaptiveTail, ClassBands, adaptive_top_k
      >>> bands = ClassBands.in_order(4, (1,))
      >>> tail = AdaptiveTail(jnp.ones((1, 1)), jnp.array([[0.0, 0.0, 1.0]]))
      >>> kernel = jnp.array([[0.0, 1.0]])
      >>> log_probs, ids = adaptive_top_k(jnp.ones((1, 1)), kernel, [tail], 2, bands)
      >>> print(ids, np.asarray(log_probs).round(2))
      [[3 0]] [[-0.86 -1.31]]

    References:
      Grave et al., Efficient softmax approximation for GPUs, arXiv:1609.04309.
    """
    layer = prepare(
        "adaptive_top_k",
        hidden,
        head_kernel,
        tails,
        bands,
        head_bias=head_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    k = checks.positive_integer("k", k)
    if k > bands.num_classes:
        raise ValueError(f"`k` must be at most V = {bands.num_classes}, got {k}.")
    best: tuple[jax.Array, jax.Array] = _differentiable_top_k(k, layer)
    log_probs, ranks = best
    shape = (*layer.shape, k)
    return log_probs.reshape(shape), bands.class_of(ranks).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_top_k(k: int, layer: Layer) -> tuple[jax.Array, jax.Array]:
    return _top_k(k, layer)


def _top_k_fwd(
    k: int, layer: Layer
) -> tuple[tuple[jax.Array, jax.Array], tuple[Layer, jax.Array]]:
    log_probs, ranks = _top_k(k, layer)
    return (log_probs, ranks), (layer, ranks)


def _top_k_bwd(
    k: int,
    residuals: tuple[Layer, jax.Array],
    cotangents: tuple[jax.Array, np.ndarray],
) -> tuple[Layer]:
    layer, ranks = residuals

    def log_probs(layer):
        return log_prob_of_ranks(layer.repeated(k), ranks.reshape(-1))

    _, pull = jax.vjp(log_probs, layer)
    return pull(cotangents[0].reshape(-1))


_differentiable_top_k.defvjp(_top_k_fwd, _top_k_bwd)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _top_k(k: int, layer: Layer) -> tuple[jax.Array, jax.Array]:
    rows, size, entries = layer.hidden.shape[0], layer.shortlist, layer.kernel.shape[1]
    operands, options = layer.call()
    log_probs, ranks = linear_top_k(
        *operands, min(k + len(layer.tails), entries), **options
    )
    ranks = jnp.where(ranks < size, ranks, -1)
    empty = jnp.full((rows, k), -1, jnp.int32)
    best = _best(
        (jnp.full((rows, k), -jnp.inf, layer.dtype), empty),
        (jnp.where(ranks < 0, -jnp.inf, log_probs), ranks),
    )
    if not layer.tails or not rows:
        return best
    tail_entries = jnp.arange(size, entries, dtype=jnp.int32)
    tail_entries = jnp.broadcast_to(tail_entries, (rows, len(layer.tails)))
    bounds = linear_log_prob_at(*operands, tail_entries, **options)
    for index, start in enumerate(layer.starts):
        tail, bound = layer.tail(index), bounds[:, index]

        def step(chosen, best, *, tail=tail, bound=bound, start=start):
            operands, options = tail.rows(chosen).call()
            log_probs, places = linear_top_k(
                *operands, min(k, tail.num_classes), **options
            )
            new = (
                take(bound, chosen)[:, None] + log_probs,
                jnp.where(places < 0, -1, start + places),
            )
            old = (take(best[0], chosen), take(best[1], chosen))
            return jax.tree.map(
                lambda whole, part: whole.at[chosen].set(part, mode="drop"),
                best,
                _best(old, new),
            )

        # Not `bound >= best`, so that a NaN is seen.
        best = RowBlocks(~(bound < best[0][:, -1])).fold(step, best)
    return best


def _best(
    old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Merges log-probabilities and ranks of rows into the k best of `old`'s width."""
    k = old[0].shape[1]
    log_probs, ranks = (
        jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)
    )
    last = jnp.where(ranks < 0, jnp.iinfo(jnp.int32).max, ranks)
    keys, _, ranks = lax.sort((-log_probs, last, ranks), num_keys=2)
    return -keys[:, :k], ranks[:, :k]
