"""Drafted classes kept or replaced, so that they are drawn from another softmax.

A class drawn with draft probabilities q is kept with probability min(1, p / q), and
else replaced by one drawn from max(p - q, 0): what comes out has probabilities p.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import block_sampling, checks, mesh_axes, noise
from jaxsoft._core.by_platform import by_platform
from jaxsoft._core.exporting import exportable_namedtuple
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    finite_peak,
    is_zero,
)
from jaxsoft.logits import rejection
from jaxsoft.logits.class_shards import WHOLE
from jaxsoft.logits.rows import Rows, in_tiles, tile_rows, to_rows

__all__ = ["SpeculativeSample", "speculative_sample"]


@exportable_namedtuple
class SpeculativeSample(NamedTuple):
    """What `speculative_sample` returns.

    Attributes:
      class_id: [...] int32, the draft's class or the one drawn in its place; -1 for a
        row without a sample.
      accepted: [...] bool, whether it is the draft's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import speculative_sample
      >>> logits = jnp.array([[0.0, 9.0, 0.0]])
      >>> speculative_sample(jax.random.key(0), logits, logits, jnp.array([1])).accepted
      Array([ True], dtype=bool)
    """

    class_id: jax.Array
    accepted: jax.Array


@mesh_axes.accepts_explicit("target_logits", axis="axis")
def speculative_sample(
    key: jax.Array,
    target_logits: ArrayLike,
    draft_logits: ArrayLike,
    draft_ids: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    draft_temperature: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    token_axes: str | Sequence[str] = (),
) -> SpeculativeSample:
    """Keeps drafted classes or draws others, so that all have target probabilities.

    With p the target's probabilities and q those that a draft was drawn with, the draft
    x is kept with probability min(1, p(x) / q(x)); in its place comes a class drawn
    from max(p - q, 0), normalised. So a class has probability p, whatever q is.

    Args:
      key: a JAX random key; another than the drafts were drawn with.
      target_logits: [..., V] with the classes on `axis`, any floating dtype.
      draft_logits: as `target_logits`, those that the drafts were drawn from.
      draft_ids: [...] integers, a class for each row. One that is not in [0, V), such
        as -1, or that has q = 0, is no draft: the class is drawn from p.
      temperature: τ in [0, ∞] of p, a scalar or an array that broadcasts against the
        logits with size 1 on the class axis, or lacks it. At τ = 0 the class is the
        lowest argmax.
      draft_temperature: that of q; None takes `temperature`. At 0 a draft is taken for
        the only class that could be drafted, and `draft_logits` do not count.
      axis: the class axis, which the results lack.
      where: booleans that broadcast to the logits; False drops a class from p and q.
      token_axes: inside `jax.shard_map`, the mesh axes of the rows, which number them:
        without them every shard would decide with the same bits. Of several axes of
        rows the first one is sharded.

    Returns:
      `SpeculativeSample(class_id, accepted)`: [...] int32 in [0, V), -1 for a row
      without any kept class, or with a NaN or +inf; and [...] bool, whether the class
      is the row's draft.

    Raises:
      TypeError: if logits or temperatures are not floating, `draft_ids` not integers,
        or `where` not boolean.
      ValueError: if a shape does not fit, or a known temperature is negative or NaN;
        with a traced one the row gives -1.

    Notes:
      Of a block of S drafts, [B, S, V], all are decided at once, each as if those
      before it were kept. A sequence ends with the first class that is not its draft:
      `num_accepted = accepted.cumprod(axis=-1).sum(axis=-1)` drafts are kept, and
      `class_id[..., :num_accepted + 1]` is drawn. If all are kept one more class may be
      drawn from the target's next logits, by `sample`, or here with a draft of -1.
      The bits of a row depend on the key and the row's place alone. A row without a
      draft draws the class of `sample(key, target_logits)` but for ties within
      rounding. Without a derivative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import speculative_sample
      >>> target = jnp.array([[0.0, 60.0, 0.0], [0.0, 60.0, 0.0], [0.0, 0.0, 60.0]])
      >>> draft = jnp.zeros((3, 3))
      >>> drawn = speculative_sample(jax.random.key(0), target, draft, [1, 2, 2])
      >>> print(drawn.class_id, drawn.accepted)
      [1 1 2] [ True False  True]
      >>> print(drawn.accepted.cumprod(axis=-1).sum(axis=-1))
      1

    References:
      Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative
      Decoding, arXiv:2211.17192, section 2.3; Chen et al., Accelerating Large Language
      Model Decoding with Speculative Sampling, arXiv:2302.01318, algorithm 2.
    """
    rows_over = mesh_axes.check_axes("token_axes", token_axes)
    target_logits = checks.floating("target_logits", target_logits)
    draft_logits = checks.floating("draft_logits", draft_logits)
    axis = checks.class_axis(axis, target_logits)
    shape = target_logits.shape
    checks.shape("draft_logits", draft_logits, shape, "target_logits.shape")
    ids = checks.integer("draft_ids", draft_ids)
    without = shape[:axis] + shape[axis + 1 :]
    checks.shape(
        "draft_ids", ids, without, "target_logits.shape without its class axis"
    )
    if draft_temperature is None:
        draft_temperature = temperature
    static_tau, target, back = to_rows(
        lax.stop_gradient(target_logits), temperature, axis, where
    )
    static_draft, draft, _ = to_rows(
        lax.stop_gradient(draft_logits), draft_temperature, axis, where, "draft_"
    )
    taus = (static_tau, static_draft)
    class_id, accepted = _sample(taus, rows_over, key, target, draft, ids.reshape(-1))
    return SpeculativeSample(back(class_id), back(accepted))


Taus = tuple[float | None, float | None]

# Compilers for TPUs lay out blocks of classes anew, in as many numbers of some rows.
_TPU_TILE = 2**24


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _sample(
    taus: Taus,
    rows_over: tuple[str, ...],
    key: jax.Array,
    target: Rows,
    draft: Rows,
    ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    count, classes = target.logits.shape
    if not count:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, bool)
    inside = (ids >= 0) & (ids < classes)
    ids = jnp.where(inside, ids, -1).astype(jnp.int32)
    words = noise.row_words(key, count, mesh_axes.offset(rows_over, count))
    arrays = (words, target, draft, ids)
    whole, tiled = (
        functools.partial(_draw, taus, is_tile) for is_tile in (False, True)
    )

    def by_tiles(size):
        return lambda arrays: in_tiles(tiled, arrays, count, size)

    return by_platform(
        arrays,
        cpu=by_tiles(tile_rows(2 * classes, 4)),
        tpu=by_tiles(tile_rows(2 * classes, 8, _TPU_TILE)),
        default=whole,
    )


class _Softmax(NamedTuple):
    """The exponentials of some rows, which are shares of a sum.

    Attributes:
      rows: the logits.
      tau: the temperature, a float or [R, 1] or [1, 1].
      top: [R, 1] the largest logits.
      weights: [R, V] exp((x - top) / τ).
      sums: [R, n] those of the blocks of classes.
      total: [R, 1] that of all.
    """

    rows: Rows
    tau: float | jax.Array
    top: jax.Array
    weights: jax.Array
    sums: jax.Array
    total: jax.Array

    @classmethod
    def of(
        cls, rows: Rows, static_tau: float | None, dtype: jnp.dtype, is_tile: bool
    ) -> _Softmax:
        """Computes them."""
        x = rows.numbers().astype(dtype)
        if is_tile:
            # A tile is copied anyway: its last block may as well be whole.
            x = rejection.whole_blocks(x)
            rows = Rows(x, rows.tau, None)
        tau = rows.temperature(static_tau)
        top = jnp.max(x, axis=1, keepdims=True)
        weights = jnp.exp(divide_by_temperature(x, finite_peak(top), tau))
        if is_tile:
            weights = lax.optimization_barrier(weights)
        sums = rejection.block_sums(weights, WHOLE)
        found = cls(rows, tau, top, weights, sums, jnp.sum(sums, axis=1, keepdims=True))
        if not is_tile:
            # Computed again they need no memory.
            weights = jnp.exp(found.log_weights(lax.optimization_barrier))
        return found._replace(weights=weights)

    def log_weights(self, take: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns the logarithms of the weights of the columns that are taken."""
        logits, _, where = self.rows
        if where is not None:
            where = take(jnp.broadcast_to(where, logits.shape))
        x = Rows(take(logits), None, where).numbers().astype(self.top.dtype)
        return divide_by_temperature(x, finite_peak(self.top), self.tau)


def _draw(
    taus: Taus, is_tile: bool, arrays: tuple[jax.Array, Rows, Rows, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Decides on the draft of each row, -1 for none."""
    words, *both, ids = arrays
    dtype = compute_dtype(*(rows.logits for rows in both))
    target, draft = (
        _Softmax.of(rows, tau, dtype, is_tile)
        for rows, tau in zip(both, taus, strict=True)
    )
    zero, of_draft = (is_zero(each.tau, dtype) for each in (target, draft))
    has_draft = (ids >= 0)[:, None] & ~of_draft
    lost = ~(jnp.abs(target.top) < jnp.inf) | jnp.isnan(target.total)
    lost |= has_draft & jnp.isnan(draft.total)
    at_ids = jnp.maximum(ids, 0)[:, None]
    *_, take = block_sampling.columns(at_ids, 1, target.weights.shape[1])
    log_p, log_q = (
        each.log_weights(take) - jnp.log(each.total) for each in (target, draft)
    )
    # Where only one class can be drawn, or drafted, one drawn from p is kept as often.
    has_draft &= ~zero & (log_q > -jnp.inf)
    gumbel, uniform, (share, from_one) = noise.block_gumbel(
        words, target.sums.shape[1], dtype
    )
    log_uniform = jnp.where(from_one, jnp.log1p(-share), jnp.log(share))[:, None]
    kept = has_draft & (log_uniform <= log_p - log_q)
    at = block_sampling.Place.of(uniform, zero)
    class_id = _replacement(target, draft, has_draft, gumbel, at, zero)
    class_id = jnp.where(kept[:, 0], ids, class_id)
    class_id = jnp.where(lost[:, 0], -1, class_id)
    return class_id, (class_id == ids) & (ids >= 0)


def _replacement(
    target: _Softmax,
    draft: _Softmax,
    has_draft: jax.Array,
    gumbel: jax.Array,
    at: block_sampling.Place,
    zero: jax.Array,
) -> jax.Array:
    """Draws from max(p - q, 0), or from p where that vanishes or no draft is, [R]."""
    share, of_draft = 1 / target.total, 1 / draft.total

    def excess(weights: jax.Array, of_q: jax.Array) -> jax.Array:
        return jnp.maximum(weights * share - of_q * of_draft, 0)

    sums = rejection.block_sums(excess(target.weights, draft.weights), WHOLE)
    replaces = has_draft & (jnp.sum(sums, axis=1, keepdims=True) > 0)
    sums = jnp.where(replaces, sums, target.sums)
    scores = block_sampling.scores(sums, gumbel, zero)
    best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)
    classes = target.weights.shape[1]
    block = block_sampling.block_size(classes)
    ids, kept, take = block_sampling.columns(best, block, classes)
    weights, of_q = (
        jnp.where(kept, jnp.exp(each.log_weights(take)), 0) for each in (target, draft)
    )
    rest = excess(weights, of_q)
    # Computed again, what was above 0 by rounding alone may vanish.
    replaces &= jnp.sum(rest, axis=1, keepdims=True) > 0
    weights = at.order(jnp.where(replaces, rest, weights))
    found = block_sampling.invert(weights, at.share * jnp.sum(weights, axis=1))
    return ids[:, 0] + at.column(found, ids.shape[1])
