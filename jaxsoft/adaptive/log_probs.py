"""Adaptive softmax: common classes in full width, rare ones in narrow tails.

A softmax over a shortlist and one entry for each tail; below each entry a softmax over
the tail's classes, of a projection of the hidden state. Only the tokens that fall into
a tail pay for it: they are sorted to the front and worked on in blocks, as many as
there are tokens for, under one static shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype, matmul, operand_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    keep_temperature,
    keep_tokens,
    labelled_tokens,
    weigh_tokens,
)
from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.adaptive.layer import AdaptiveTail, Layer, TailLayer, prepare
from jaxsoft.adaptive.row_blocks import RowBlocks, take
from jaxsoft.linear.losses import linear_cross_entropy
from jaxsoft.logits.softmax import log_softmax, log_softmax_of_finite

__all__ = [
    "adaptive_log_prob",
    "adaptive_log_probs",
    "log_prob_of_ranks",
    "log_probs_by_rank",
]


@mesh_axes.accepts_explicit("hidden")
def adaptive_log_prob(
    hidden: ArrayLike,
    head_kernel: ArrayLike,
    tails: Sequence[AdaptiveTail],
    labels: ArrayLike,
    bands: ClassBands,
    *,
    head_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Log-probabilities of labels under an adaptive softmax.

    `log p_v` of the head's softmax for a class v of the shortlist; for one of tail i
    `log p_(S+i)` of the head's softmax plus that of v in the tail's,
    `softmax(hidden @ projection @ kernel + bias)`.

    Args:
      hidden: [..., H] floating.
      head_kernel: [H, S + T] floating: the shortlist by rank, then one entry a tail.
      tails: T `AdaptiveTail`, or tuples (projection, kernel[, bias]).
      labels: [...] integers in [0, V).
      bands: the classes by frequency: S of the shortlist, T tails.
      head_bias: [S + T] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every softmax: at τ = 1 these are
        the model's probabilities; at others each choice on the way is tempered, which
        is not the tempered softmax over all classes.
      weights: [...] booleans or reals, one weight a token, which its log-probability
        is multiplied by; a token of weight 0 has log-probability 0, and gradients of
        0, whatever its label and hidden state, NaN included. None weights all by 1.
      ignore_label: a label whose tokens have weight 0, such as -100; or None.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      [...] float32 (float64 if an input is), at most 0; NaN for a label outside [0, V).

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Differentiable in reverse mode in all but the labels, with dense gradients. No
      [N, V] array is stored, and a tail costs in proportion to the tokens whose label
      is in it, rounded up to blocks. Over all classes the probabilities add up to 1: a
      tail whose bias masks all of its classes by -inf is left out of the head.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import AdaptiveTail, ClassBands, adaptive_log_prob
      >>> bands = ClassBands.in_order(100, (9, 50))
      >>> tails = [
      ...     AdaptiveTail(jnp.zeros((8, 4)), jnp.zeros((4, 41))),
      ...     AdaptiveTail(jnp.zeros((8, 2)), jnp.zeros((2, 50))),
      ... ]
      >>> log_prob = adaptive_log_prob(
      ...     jnp.ones((2, 8)), jnp.zeros((8, 11)), tails, jnp.array([3, 99]), bands
      ... )
      >>> print(jnp.exp(-log_prob).round())
      [ 11. 550.]

    References:
      Grave et al., Efficient softmax approximation for GPUs, arXiv:1609.04309.
    """
    hidden, labels, token_weight = labelled_tokens(
        hidden, labels, weights, ignore_label
    )
    layer = prepare(
        "adaptive_log_prob",
        hidden,
        head_kernel,
        tails,
        bands,
        head_bias=head_bias,
        temperature=keep_temperature(token_weight, temperature),
        precision=precision,
        implementation=implementation,
    )
    # A token without weight falls into no tail, which then need not be computed.
    ranks = keep_tokens(token_weight, bands.rank_of(labels), -1).reshape(-1)
    log_prob = log_prob_of_ranks(layer, ranks).reshape(layer.shape)
    return weigh_tokens(token_weight, log_prob)


@mesh_axes.accepts_explicit("hidden")
def adaptive_log_probs(
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
    """Log-probabilities of all classes under an adaptive softmax.

    Args:
      hidden: [..., H] floating.
      head_kernel: [H, S + T] floating: the shortlist by rank, then one entry a tail.
      tails: T `AdaptiveTail`, or tuples (projection, kernel[, bias]).
      bands: the classes by frequency: S of the shortlist, T tails.
      head_bias: [S + T] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every softmax; see
        `adaptive_log_prob`.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      [..., V] float32 (float64 if an input is), at most 0.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Differentiable in all arguments. This stores [..., V]: for the classes of labels
      take `adaptive_log_prob`, for the best ones `adaptive_top_k`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import AdaptiveTail, ClassBands, adaptive_log_probs
      >>> bands = ClassBands.in_order(4, (1,))
      >>> tail = AdaptiveTail(jnp.zeros((8, 2)), jnp.zeros((2, 3)))
      >>> log_probs = adaptive_log_probs(jnp.ones(8), jnp.zeros((8, 2)), [tail], bands)
      >>> print(jnp.exp(-log_probs).round())
      [2. 6. 6. 6.]

    References:
      Grave et al., Efficient softmax approximation for GPUs, arXiv:1609.04309.
    """
    layer = prepare(
        "adaptive_log_probs",
        hidden,
        head_kernel,
        tails,
        bands,
        head_bias=head_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    log_probs = log_probs_by_rank(layer)
    if bands.ranks is not None:
        # Rows are gathered: the derivative adds up rows much faster than columns.
        log_probs = log_probs.T[jnp.asarray(bands.ranks)].T
    return log_probs.reshape(*layer.shape, bands.num_classes)


@functools.partial(jax.jit, inline=True)
def log_probs_by_rank(layer: Layer) -> jax.Array:
    """Returns the log-probabilities of all classes in order of rank, [N, V]."""
    head = _all_log_probs(layer)
    size = layer.shortlist
    of_tails = [
        head[:, size + index, None] + _all_log_probs(layer.tail(index))
        for index in range(len(layer.tails))
    ]
    return jnp.concatenate([head[:, :size], *of_tails], axis=1)


def _all_log_probs(layer: Layer | TailLayer) -> jax.Array:
    (hidden, kernel), options = layer.call()
    operand = operand_dtype(hidden, kernel)
    logits = matmul(
        hidden.astype(operand), kernel.astype(operand), layer.precision, layer.dtype
    )
    tau = options["temperature"]
    tau = tau[:, None] if isinstance(tau, jax.Array) else tau
    if options["bias"] is None:
        # A logit of -inf would be that of an infinite parameter.
        return log_softmax_of_finite(logits, tau)
    logits += jnp.asarray(options["bias"])[None].astype(layer.dtype)
    return log_softmax(logits, temperature=tau, implementation=layer.implementation)


@functools.partial(jax.jit, inline=True)
def log_prob_of_ranks(layer: Layer, ranks: jax.Array) -> jax.Array:
    """Returns the log-probabilities of ranks [N]; NaN for a negative one."""
    size = layer.shortlist
    # The entry of the head that each rank is found at.
    entries = jnp.minimum(ranks, size)
    for start in layer.starts[1:]:
        entries += (ranks >= start).astype(jnp.int32)
    log_probs = _log_prob(layer, entries)
    for index, start in enumerate(layer.starts):
        log_probs += _log_prob_in_tail(
            layer.tail(index), ranks - start, entries == size + index
        )
    return log_probs


def _log_prob(layer: Layer | TailLayer, labels: jax.Array) -> jax.Array:
    operands, options = layer.call()
    with mesh_axes.within(layer.shards):
        return -linear_cross_entropy(*operands, labels, reduction="none", **options)


@jax.custom_vjp
def _log_prob_in_tail(
    layer: TailLayer, labels: jax.Array, member: jax.Array
) -> jax.Array:
    """Returns the log-probabilities [N] in a tail, 0 where a row is no member."""

    def step(rows, log_probs):
        part = _log_prob(layer.rows(rows), take(labels, rows))
        return log_probs.at[rows].set(part, mode="drop")

    return RowBlocks(member).fold(step, jnp.zeros(labels.shape, layer.dtype))


_Residuals = tuple[TailLayer, jax.Array, jax.Array]


def _log_prob_in_tail_fwd(
    layer: TailLayer, labels: jax.Array, member: jax.Array
) -> tuple[jax.Array, _Residuals]:
    return _log_prob_in_tail(layer, labels, member), (layer, labels, member)


def _log_prob_in_tail_bwd(
    residuals: _Residuals, cotangent: jax.Array
) -> tuple[TailLayer, None, None]:
    layer, labels, member = residuals
    parameters, hidden, tau = layer.parameters, layer.hidden, layer.row_tau

    def step(rows, carry):
        total, by_row = carry
        part = layer.rows(rows)

        def log_prob(parameters, hidden, tau):
            moved = dataclasses.replace(
                part, parameters=parameters, hidden=hidden, row_tau=tau
            )
            return _log_prob(moved, take(labels, rows))

        _, pull = jax.vjp(log_prob, parameters, part.hidden, part.row_tau)
        of_parameters, *of_rows = pull(take(cotangent, rows))
        total = jax.tree.map(
            lambda sum_, new: sum_ + new.astype(sum_.dtype), total, of_parameters
        )
        by_row = jax.tree.map(
            lambda whole, new: whole.at[rows].set(new, mode="drop"),
            by_row,
            tuple(of_rows),
        )
        return total, by_row

    wide = jax.tree.map(
        lambda a: jnp.zeros(a.shape, compute_dtype(a)),
        parameters,
    )
    start = (wide, jax.tree.map(jnp.zeros_like, (hidden, tau)))
    total, (of_hidden, of_tau) = RowBlocks(member).fold(step, start)
    total = jax.tree.map(lambda sum_, a: sum_.astype(a.dtype), total, parameters)
    moved = dataclasses.replace(
        layer, parameters=total, hidden=of_hidden, row_tau=of_tau
    )
    return moved, None, None


_log_prob_in_tail.defvjp(_log_prob_in_tail_fwd, _log_prob_in_tail_bwd)
