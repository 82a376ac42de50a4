"""The in-batch softmax of retrieval: a query's candidate among those of all queries."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.numerics import compute_dtype, operand_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import (
    Reduction,
    keep_tokens,
    reduce_losses,
    token_weights,
)
from jaxsoft.linear.arguments import Call, MeshAxes, prepare
from jaxsoft.linear.contrastive import as_groups, scalar
from jaxsoft.linear.folds.ranked import ranked_statistics
from jaxsoft.linear.losses import CrossEntropy
from jaxsoft.linear.token_losses import statistics_loss

__all__ = ["MixedNegatives", "in_batch_cross_entropy"]

# Beyond this temperature only log_q is left of logits in float32.
_HOTTEST = 2.0**100


class MixedNegatives(NamedTuple):
    """Candidates that are nobody's positive, such as uniform draws from an index.

    Attributes:
      candidates: [M, H] floating.
      log_q: [M] their log-probabilities of being sampled; None for no correction.
      candidate_ids: [M] integers; None where none of them can be a row's positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import MixedNegatives, in_batch_cross_entropy
      >>> batch = jnp.eye(4)
      >>> extra = MixedNegatives(jnp.zeros((2, 4)))
      >>> print(f"{in_batch_cross_entropy(batch, batch, extra=extra):.4f}")
      1.0436

    References:
      Yang et al., Mixed Negative Sampling for Learning Two-tower Neural Networks in
      Recommendations, WWW 2020.
    """

    candidates: ArrayLike
    log_q: ArrayLike | None = None
    candidate_ids: ArrayLike | None = None


@mesh_axes.accepts_explicit("queries")
def in_batch_cross_entropy(
    queries: ArrayLike,
    candidates: ArrayLike,
    log_q: ArrayLike | None = None,
    candidate_ids: ArrayLike | None = None,
    extra: MixedNegatives | tuple[Any, ...] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_statistics: bool = False,
    precision: jax.lax.PrecisionLike = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Cross-entropy of each query's candidate among those of the batch.

    With the logits `u_ij = queries_i · candidates_j / τ - log_q_j` the loss of row i is
    `log Σ_j exp(u_ij) - u_ii`, over all candidates of the batch and of `extra` but row
    i's accidental hits: the others that have the id of its own. It is what two-tower
    retrievers are trained by; the [N, N + M] logits are streamed.

    Args:
      queries: [N, H] floating.
      candidates: [N, H] floating; row i is the positive of query i.
      log_q: [N] the log-probability that each candidate was sampled into the batch,
        subtracted from its logits, those of positives too; None for no correction, and
        inf drops a candidate.
      candidate_ids: [N] integers, any values, equal where candidates are the same item;
        None for batches without accidental hits.
      extra: further negatives, a `MixedNegatives` or a tuple of its fields; None for
        none.
      temperature: τ in [0, ∞], a scalar; differentiable.
      weights: [N] booleans or reals, one weight a query; a query of weight 0
        contributes exactly nothing, but its candidate is a negative of the others.
      reduction: "mean" (Σ weight · loss / Σ weight, 0 if the weights sum to 0), "sum"
        (Σ weight · loss) or "none" (weight · loss).
      return_statistics: whether to return the `LogitStatistics` as well, with `rank`.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      token_axes: inside `jax.shard_map`, the mesh axes that the batch is sharded over:
        the candidates of all shards are negatives, and "mean" and "sum" are those of
        all shards. What `extra` has is gathered over those axes that it differs over.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`.
      implementation: None, "xla" or "reference" (stored logits, for checking).

    Returns:
      A scalar, or [N] with reduction "none", in float32 (float64 if an input is); with
      `return_statistics`, a pair of it and a `LogitStatistics`. 0 for N = 0.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Differentiable in reverse mode in both embeddings, `log_q`, the embeddings and
      log-probabilities of `extra`, `temperature` and `weights`. Candidates are read as
      they lie; with `extra` both kinds are copied into one array, [N + M, H], and
      devices that share a batch gather its candidates, [N, H], first. At τ = ∞ logits
      are `-log_q` alone. Ids that exceed 32 bits, such as hashes, stay apart where all
      of them come as NumPy arrays.

    Example:
      The item 7 comes twice, and is no negative of itself; recall at 1 is that of the
      candidates of the batch:

      >>> import jax.numpy as jnp
      >>> from jaxsoft import in_batch_cross_entropy
      >>> users = jnp.array([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
      >>> items = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
      >>> log_q = jnp.log(jnp.array([0.5, 0.1, 0.5]))
      >>> loss, statistics = in_batch_cross_entropy(
      ...     users, items, log_q, jnp.array([7, 3, 7]), return_statistics=True
      ... )
      >>> print(f"{loss:.4f} {(statistics.rank < 1).mean():.4f}")
      0.5377 0.6667

    References:
      Bengio and Senecal, Adaptive Importance Sampling to Accelerate Training of a
      Neural Probabilistic Language Model, IEEE Transactions on Neural Networks 2008;
      Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
      Recommendations, RecSys 2019 (logQ correction).
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    axes = mesh_axes.check_axes("token_axes", token_axes)
    queries = _matrix("queries", queries)
    given = [MixedNegatives(candidates, log_q, candidate_ids)]
    if extra is not None:
        if not isinstance(extra, tuple) or not 1 <= len(extra) <= 3:
            raise TypeError(
                "`extra` must be a MixedNegatives or a tuple of its fields, got "
                f"{type(extra).__name__}."
            )
        given.append(MixedNegatives(*cast("tuple[Any, ...]", extra)))
    ids = _ids([one.candidate_ids for one in given])
    names = ("", "extra.")
    checked = [
        _checked(name, one._replace(candidate_ids=own), queries.shape[1])
        for name, one, own in zip(names, given, ids, strict=False)
    ]
    rows = queries.shape[:1]
    checks.shape("candidates", checked[0].candidates, queries.shape, "queries.shape")
    token_weight = token_weights(rows, weights, legend="queries.shape[:1]")
    call = _prepared(
        keep_tokens(token_weight, queries),
        checked,
        axes,
        scalar(temperature),
        precision=precision,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    loss = CrossEntropy(0.0, 0.0)
    if not return_statistics:
        return statistics_loss(call, (), loss, token_weight, reduction, axes)
    of_rows = ranked_statistics(call, ("expected",), rank=True, k=0)
    losses = reduce_losses(loss.of_tokens(of_rows), token_weight, reduction, axes)
    return losses, of_rows.with_one_label()


class _Candidates(NamedTuple):
    """Checked candidates; see `MixedNegatives`."""

    candidates: jax.Array
    log_q: jax.Array | None
    ids: jax.Array | None


def _prepared(
    queries: jax.Array,
    candidates: list[_Candidates],
    axes: tuple[str, ...],
    temperature: ArrayLike,
    **options: Any,
) -> Call:
    """Returns the call of a layer whose classes are candidates.

    Args:
      queries: [N, H].
      candidates: those of the batch and maybe further ones.
      axes: the mesh axes of the batch.
      temperature: a scalar.
      **options: of `prepare`.
    """
    count, features = queries.shape
    batch = jax.tree.map(lambda a: _gathered(a, axes), candidates[0])
    for extra in candidates[1:]:
        batch = _joined(
            batch, jax.tree.map(lambda a: _gathered(a, _varying(a, axes)), extra)
        )
    if not batch.candidates.shape[0]:
        # A layer has a class, though nothing is computed without a row.
        batch = _Candidates(jnp.zeros((1, features), queries.dtype), None, None)
    dtype = compute_dtype(queries, batch.candidates)
    tau, bias = checks.temperature(temperature, dtype), None
    if batch.log_q is not None:
        is_array = isinstance(tau, jax.Array)
        tau = jnp.minimum(tau, _HOTTEST) if is_array else min(tau, _HOTTEST)
        is_dropped = batch.log_q == jnp.inf
        log_q = jnp.where(is_dropped, 0, batch.log_q.astype(dtype))
        bias = jnp.where(is_dropped, -jnp.inf, -tau * log_q)
    first = mesh_axes.offset(axes, count)
    call = prepare(
        "in_batch_cross_entropy",
        queries,
        batch.candidates,
        first + jnp.arange(count, dtype=jnp.int32),
        bias=bias,
        temperature=tau,
        kernel_layout="vh",
        **options,
    )
    if batch.ids is None:
        return call
    own = lax.dynamic_slice_in_dim(batch.ids, first, count)
    return call._replace(
        config=dataclasses.replace(call.config, drops_group=True),
        arrays=call.arrays._replace(group=own[:, None], class_groups=batch.ids),
    )


def _checked(prefix: str, given: MixedNegatives, features: int) -> _Candidates:
    """Returns checked candidates; their names start with `prefix`."""
    name = f"{prefix}candidates"
    array = _matrix(name, given.candidates)
    if array.shape[1] != features:
        raise ValueError(
            f"`{name}` must have shape [*, H] with H = {features}, got {array.shape}."
        )
    rows, legend = array.shape[:1], f"{name}.shape[:1]"
    log_q, ids = given.log_q, given.candidate_ids
    if log_q is not None:
        log_q = checks.floating(f"{prefix}log_q", log_q)
        checks.shape(f"{prefix}log_q", log_q, rows, legend)
    if ids is not None:
        ids = jnp.asarray(ids)
        checks.shape(f"{prefix}candidate_ids", ids, rows, legend)
    return _Candidates(array, log_q, ids)


def _ids(given: list[ArrayLike | None]) -> list[jax.Array | None]:
    """Returns integers that are equal where ids are, those of all candidates alike."""
    known = [ids for ids in given if ids is not None]
    if given[0] is None and known:
        raise ValueError(
            "`candidate_ids` must be given where extra has them, got None."
        )
    names = ("candidate_ids", "extra.candidate_ids")
    if len(known) < 2:
        return [
            None if ids is None else as_groups(ids, name)
            for name, ids in zip(names, given, strict=False)
        ]
    if all(isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" for ids in known):
        sizes = [np.size(ids) for ids in known]
        # NumPy would join unsigned with signed numbers as floats.
        flat = [np.ravel(ids).astype(np.int64) for ids in known]
        parts = jnp.split(as_groups(np.concatenate(flat)), np.cumsum(sizes)[:-1])
        return [
            part.reshape(np.shape(ids)) for part, ids in zip(parts, known, strict=True)
        ]
    arrays = [
        as_groups(jnp.asarray(ids), name)
        for name, ids in zip(names, known, strict=True)
    ]
    is_wide = any(array.dtype.itemsize == 8 for array in arrays)
    return [array.astype(jnp.int64 if is_wide else jnp.int32) for array in arrays]


def _varying(array: jax.Array, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the mesh axes, of some, that an array differs over."""
    return tuple(axis for axis in axes if axis in mesh_axes.varying_axes(array))


def _gathered(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the rows of all shards; the array itself without mesh axes."""
    if not axes:
        return array
    return lax.all_gather(mesh_axes.vary(array, axes), axes, tiled=True)


def _joined(batch: _Candidates, extra: _Candidates) -> _Candidates:
    """Returns the candidates of a batch and, after them, further ones."""
    dtype = operand_dtype(batch.candidates, extra.candidates)
    pair = [one.candidates.astype(dtype) for one in (batch, extra)]
    log_q = None
    if batch.log_q is not None or extra.log_q is not None:
        wide = compute_dtype(*pair)
        log_q = jnp.concatenate(
            [
                jnp.zeros(one.candidates.shape[0], wide)
                if one.log_q is None
                else one.log_q.astype(wide)
                for one in (batch, extra)
            ]
        )
    ids = batch.ids
    if ids is not None:
        others = extra.ids
        if others is None:
            # Numbers from 0 on leave one that is nobody's id.
            ids = jnp.unique(ids, return_inverse=True, size=ids.size)[1]
            others = jnp.full(extra.candidates.shape[0], -1, ids.dtype)
        ids = jnp.concatenate([ids, others])
    return _Candidates(jnp.concatenate(pair), log_q, ids)


def _matrix(name: str, value: ArrayLike) -> jax.Array:
    array = checks.floating(name, value)
    if array.ndim != 2:
        raise ValueError(f"`{name}` must have shape [N, H], got {array.shape}.")
    return array
