"""The classes with the largest logits, and their log-probabilities.

The classes of a tile come in blocks, and the K best classes of a row lie in the K
blocks with the largest maxima, the earlier one where maxima are equal: any other class
has K classes before it. So the K best of a tile's maxima are found, and the logits of
those blocks kept; only after the last tile are they compared.

    maxima of a tile's blocks -> the best K blocks so far, and their logits [R, K, B]
    after the last tile       -> the best K of those K·B, by class where they are equal
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import (
    block_maxima,
    compute_dtype,
    divide_by_temperature,
    finite_peak,
)
from jaxsoft.linear.arguments import Axes, Operands
from jaxsoft.linear.fold import Fold, stream
from jaxsoft.linear.folds.statistics import Statistics
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import Tile, tiles_of

__all__ = ["Best"]

# Classes come in blocks where a tile has so many for each of the K that are wanted.
_CLASSES_OF_ONE = 64

# For the sake of blocks the slice of the kernel that a tile needs takes no more than
# this part of the workspace.
_SLICES_OF_A_WORKSPACE = 3

# The maxima, starts and members of `_Blocks`.
_Three = tuple[jax.Array, jax.Array, jax.Array | None]


class _Result(NamedTuple):
    """The best classes of every row, [N, K] each, the best first.

    Attributes:
      log_probs: log-probabilities, -inf where there are no more classes.
      ids: int32, -1 there.
    """

    log_probs: Annotated[jax.Array, Axes("nk")]
    ids: Annotated[jax.Array, Axes("nk")]


class _Blocks(NamedTuple):
    """The blocks with the best classes so far.

    Attributes:
      tops: [R, K] the largest logit of each, descending.
      starts: [R, K] the first class of each in this shard, int32.
      members: [R, K, B] the logits of its classes, -inf for those of other tiles; None
        where a block is one class.
      total: [R] Σ exp(c) of all classes, about the largest logit.
    """

    tops: jax.Array
    starts: jax.Array
    members: jax.Array | None
    total: jax.Array


class _Classes(NamedTuple):
    """The best classes of all tiles.

    Attributes:
      logits: [R, K], descending.
      ids: [R, K], -1 where there are no more classes.
      total: [R] Σ exp(c) of all classes, about the best logit.
    """

    logits: jax.Array
    ids: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Best(Fold[Operands, _Blocks, _Result, _Result]):
    """The best classes of each row; equal logits are ordered by id.

    Attributes:
      config: of the layer.
      k: how many classes.
    """

    k: int

    def operands(self, arrays: Operands) -> Operands:
        return arrays

    def tiles(self, arrays: Operands) -> Tiling:
        """Returns tiles that are wide enough for blocks, as far as there is room."""
        layer = self.layer(arrays)
        room = layer.workspace(self.config.workspace_bytes) // _SLICES_OF_A_WORKSPACE
        most = room // (max(layer.features, 1) * layer.logit_bytes)
        wide = 2 ** math.ceil(math.log2(_CLASSES_OF_ONE * self.k))
        return tiles_of(
            self.config, arrays, min(wide, 2 ** int(math.log2(max(most, 1))))
        )

    def start(self, rows: int, arrays: Operands) -> _Blocks:
        dtype = compute_dtype(arrays.hidden, arrays.kernel)
        block = self._block(self.tiles(arrays).block_classes)
        members = (rows, self.k, block)
        return _Blocks(
            jnp.full((rows, self.k), -jnp.inf, dtype),
            jnp.full((rows, self.k), -1, jnp.int32),
            None if block == 1 else jnp.full(members, -jnp.inf, dtype),
            jnp.zeros(rows, dtype),
        )

    def step(self, carry: _Blocks, tile: Tile, part: Operands) -> _Blocks:
        u, tau = tile.logits, part.temperature(self.config)
        block = self._block(u.shape[1])
        tops = block_maxima(u, block)
        # The only tile has nothing before it.
        is_alone = u.shape[1] == part.num_classes(self.config)
        if is_alone:
            tops, starts, members = self._best_of(u, tops, block)
        else:
            tops, starts, members = self._better(carry, tile, tops, block)
        peak = finite_peak(tops[:, :1])
        total = jnp.sum(jnp.exp(divide_by_temperature(u, peak, tau)), axis=1)
        if not is_alone:
            before = divide_by_temperature(carry.tops[:, :1], peak, tau)
            total += carry.total * jnp.exp(before)[:, 0]
        return _Blocks(tops, starts, members, total)

    def close(self, carry: _Blocks, part: Operands, tiles: Tiling) -> _Classes:
        logits, ids, members, total = carry
        if members is not None:
            starts, block = ids, members.shape[2]
            if tiles.class_blocks > 1:
                order = jnp.argsort(starts, axis=1)
                starts = jnp.take_along_axis(starts, order, axis=1)
                members = jnp.take_along_axis(members, order[:, :, None], axis=1)
            # Less than K maxima is not among the best: told at once, it is not sorted.
            members = jnp.where(members < logits[:, -1:, None], -jnp.inf, members)
            members = members.reshape(members.shape[0], -1)
            logits, places = _top_k(members, self.k)
            ids = jnp.take_along_axis(starts, places // block, axis=1) + places % block
        classes = part.num_classes(self.config)
        ids += mesh_axes.offset(self.config.vocab_axes, classes)
        return _Classes(logits, jnp.where(logits == -jnp.inf, -1, ids), total)

    def finish(self, carry: _Classes, arrays: Operands) -> _Result:
        logits, ids, total = carry
        tau, axes = arrays.temperature(self.config), self.config.vocab_axes
        if axes:
            gathered = [
                jnp.moveaxis(lax.all_gather(a, axes), 0, 1).reshape(a.shape[0], -1)
                for a in (logits, ids)
            ]
            logits, places = _top_k(gathered[0], self.k)
            ids = jnp.take_along_axis(gathered[1], places, axis=1)
            # They are the same on every shard, and now known to be.
            logits, ids = mesh_axes.maximum(logits, axes), mesh_axes.maximum(ids, axes)
            peak = finite_peak(logits[:, :1])
            rescale = jnp.exp(divide_by_temperature(carry.logits[:, :1], peak, tau))
            total = lax.psum(total * rescale[:, 0], axes)
            # So are temperatures.
            if isinstance(tau, jax.Array):
                tau = mesh_axes.maximum(tau, axes)
        c = divide_by_temperature(logits, finite_peak(logits[:, :1]), tau)
        log_sum = jnp.log(jnp.where(total == 0, 1, total))[:, None]
        return _Result(c - log_sum, ids)

    def result(self, saved: _Result) -> _Result:
        return saved

    def _block(self, classes: int) -> int:
        """Returns the classes of a block of tiles of so many: a power of two, or 1.

        Near 2√(C/K), where maxima and members together are the fewest, members being
        copied while maxima are compared.
        """
        if classes < _CLASSES_OF_ONE * self.k:
            return 1
        return 2 ** int(math.log2(4 * classes / self.k) / 2)

    def _best_of(self, u: jax.Array, tops: jax.Array, block: int) -> _Three:
        """Returns the maxima, starts and members of a tile's best blocks.

        Blocks of more than one class come in their order, of one by their maxima.
        """
        # The classes of another shard may be fewer than K.
        best, places = _top_k(tops, min(self.k, tops.shape[1]))
        if block == 1:
            return best, places, None
        return best, *_members(u, block * jnp.sort(places, axis=1), block)

    def _better(
        self, carry: _Blocks, tile: Tile, tops: jax.Array, block: int
    ) -> _Three:
        """Returns the same of the best blocks among those before and a tile's own."""
        best, places = _top_k(jnp.concatenate([carry.tops, tops], axis=1), self.k)
        is_old = places < self.k
        old = jnp.minimum(places, self.k - 1)
        starts = jnp.take_along_axis(carry.starts, old, axis=1)
        columns, members = jnp.maximum(places - self.k, 0) * block, carry.members
        if members is not None:
            columns, new = _members(tile.logits, columns, block)
            members = jnp.take_along_axis(members, old[:, :, None], axis=1)
            members = jnp.where(is_old[:, :, None], members, new)
        starts = jnp.where(is_old, starts, tile.start + columns)
        return best, starts, members

    def differentiable(self, moving: Operands) -> Callable[[Operands], _Result]:
        """Returns the log-probabilities of the best classes, computed anew."""
        del moving
        fold = Statistics(self.config, frozenset({"label"}))

        def log_probs_at_best(operands):
            ids = stream(self, jax.tree.map(lax.stop_gradient, operands)).ids
            fields = stream(fold, operands._replace(labels=ids))
            assert fields.label is not None
            log_probs = fields.label - fields.log_sum[:, None]
            return _Result(jnp.where(ids < 0, -jnp.inf, log_probs), ids)

        return log_probs_at_best


def _members(
    u: jax.Array, starts: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the first columns [R, K] of blocks of a tile, and their logits [R, K, B].

    The last block, if it is shorter, begins earlier instead, and has -inf there.
    """
    within = jnp.minimum(starts, u.shape[1] - block)

    def of_row(row: jax.Array, starts: jax.Array) -> jax.Array:
        return jax.vmap(lambda at: lax.dynamic_slice(row, (at,), (block,)))(starts)

    members = jax.vmap(of_row)(u, within)
    if u.shape[1] % block:
        columns = within[:, :, None] + lax.broadcasted_iota(jnp.int32, members.shape, 2)
        members = jnp.where(columns < starts[:, :, None], -jnp.inf, members)
    return within, members


def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns `lax.top_k`; XLA would sort instead where its values are sliced."""
    best, places = lax.top_k(values, k)
    return lax.optimization_barrier(best), places
