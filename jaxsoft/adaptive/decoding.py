"""Samples and the best classes of an adaptive softmax."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, noise
from jaxsoft._core.numerics import nan_where
from jaxsoft._core.registry import Implementation
from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.adaptive.layer import AdaptiveTail, Layer, prepare
from jaxsoft.adaptive.log_probs import log_prob_of_ranks, log_probs_by_rank
from jaxsoft.adaptive.row_blocks import RowBlocks, take
from jaxsoft.linear.sampling import linear_sample
from jaxsoft.linear.top_k import linear_top_k
from jaxsoft.logits.rows import Rows
from jaxsoft.logits.sampling import draw_rows

__all__ = ["adaptive_sample", "adaptive_top_k"]

# Up to so many log-probabilities, 1 MiB in float32, all are computed: it takes no
# longer than to look only into the tails that are drawn or may have some of the best,
# and one sampler in place of several is less to compile.
_STORED = 2**18


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
      [...] int32 in [0, V); -1 where a NaN was met, or all classes are masked.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Exact. A tail costs in proportion to the tokens that come to it; of at most 2¹⁸
      log-probabilities at one temperature all are computed. Without a derivative.

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
    # At τ = 0 entries are taken one after another.
    is_cold = layer.constant < float(jnp.finfo(layer.dtype).tiny)
    if _is_small(layer) and layer.row_tau is None and not is_cold:
        words = noise.row_words(key, layer.hidden.shape[0])
        return draw_rows(1.0, words, Rows(log_probs_by_rank(layer), None, None))
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
    looks only into the tails whose entries reach its k best classes so far, unless
    there are so few tokens and classes that all log-probabilities are stored.

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
      and class ids [..., k] int32; equal ones are ordered by band.

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


class _Ranked(NamedTuple):
    """Some ranks of each row, and what they are ordered by, [N, K].

    Attributes:
      keys: log-probabilities, the lowest finite number in place of -inf, so that the
        ranks there come before the places that have none, whose key is -inf.
      ranks: int32, -1 where there is none.
    """

    keys: jax.Array
    ranks: jax.Array

    @classmethod
    def of(cls, log_probs: jax.Array, ranks: jax.Array) -> _Ranked:
        """Returns ranks with their log-probabilities."""
        keys = jnp.maximum(log_probs, jnp.finfo(log_probs.dtype).min)
        return cls(jnp.where(ranks < 0, -jnp.inf, keys), ranks)

    def rows(self, rows: jax.Array) -> _Ranked:
        """Returns those of some rows."""
        return _Ranked(take(self.keys, rows), take(self.ranks, rows))

    def best(self, k: int, *later: _Ranked) -> _Ranked:
        """Returns the best k, of which equal ones stay in order."""
        every = (self, *later)
        keys, places = lax.top_k(jnp.concatenate([r.keys for r in every], axis=1), k)
        ranks = jnp.concatenate([r.ranks for r in every], axis=1)
        return _Ranked(keys, jnp.take_along_axis(ranks, places, axis=1))

    @property
    def log_probs(self) -> jax.Array:
        """Log-probabilities, -inf where there is no rank."""
        lowest = jnp.finfo(self.keys.dtype).min
        return jnp.where(self.keys == lowest, -jnp.inf, self.keys)


def _is_small(layer: Layer) -> bool:
    """Tells whether the log-probabilities of all classes are computed."""
    return layer.hidden.shape[0] * layer.num_classes <= _STORED


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _top_k(k: int, layer: Layer) -> tuple[jax.Array, jax.Array]:
    best = (_best_of_all if _is_small(layer) else _best_of_bands)(k, layer)
    return best.log_probs, best.ranks


def _best_of_all(k: int, layer: Layer) -> _Ranked:
    """Returns the best of all classes, whose log-probabilities are stored."""
    biases = layer.bias, *(tail.bias for tail in layer.tails)
    kernels = layer.kernel[:, : layer.shortlist], *(t.kernel for t in layer.tails)
    kept = [
        jnp.full(kernel.shape[1], True)
        if bias is None
        else bias[: kernel.shape[1]] != -jnp.inf
        for bias, kernel in zip(biases, kernels, strict=True)
    ]
    ranks = jnp.arange(layer.num_classes, dtype=jnp.int32)
    ranks = jnp.where(jnp.concatenate(kept), ranks, -1)
    every = _Ranked.of(log_probs_by_rank(layer), ranks[None])
    keys, places = lax.top_k(every.keys, k)
    return _Ranked(keys, ranks[places])


def _best_of_bands(k: int, layer: Layer) -> _Ranked:
    """Returns the best of the shortlist and of those tails that may have others."""
    rows, size, entries = layer.hidden.shape[0], layer.shortlist, layer.kernel.shape[1]
    operands, options = layer.call()
    # A tail whose entry is not among so many has k classes of the shortlist before it.
    listed = min(k + len(layer.tails), entries)
    log_probs, found = linear_top_k(*operands, listed, **options)
    missing = _Ranked(
        jnp.full((rows, k), -jnp.inf, layer.dtype), jnp.full((rows, k), -1, jnp.int32)
    )
    shortlist = _Ranked.of(log_probs, jnp.where(found < size, found, -1))
    best = shortlist.best(k, missing)
    # All log-probabilities of a row are NaN, or none.
    unknown = jnp.isnan(log_probs[:, 0])
    for index, start in enumerate(layer.starts):
        tail = layer.tail(index)
        own = jnp.where(found == size + index, log_probs, -jnp.inf)
        bound = nan_where(unknown, jnp.max(own, axis=1))

        def step(chosen, best, *, tail=tail, bound=bound, start=start):
            operands, options = tail.rows(chosen).call()
            log_probs, places = linear_top_k(
                *operands, min(k, tail.num_classes), **options
            )
            log_probs += take(bound, chosen)[:, None]
            new = _Ranked.of(log_probs, jnp.where(places < 0, -1, start + places))
            return jax.tree.map(
                lambda whole, part: whole.at[chosen].set(part, mode="drop"),
                best,
                best.rows(chosen).best(k, new),
            )

        # Not `bound >= best`, so that a NaN is seen.
        best = RowBlocks(~(bound < best.keys[:, -1])).fold(step, best)
    return best
