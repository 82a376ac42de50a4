"""A class drawn for each row from a softmax over the classes of a layer.

The draw is that of `block_sampling.py`, whose blocks are those of the whole vocabulary:
tiles cover whole blocks, and where a shard of the classes begins or ends inside one,
the shards agree on it in `finish`.

    shard 0                    | shard 1                    | shard 2
    block 0 | block 1 | block 2 ..... | block 3 | block 4 ..... | block 5
                      tail of 0 | head of 1       tail of 1 | head of 2
"""

import dataclasses
import functools
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import block_sampling, mesh_axes
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    finite_peak,
    is_zero,
    maximum_or_nan,
    round_up,
)
from jaxsoft.linear.arguments import Axes, Operands
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.kept import KeptTile
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import compute_tile, tiles_of

__all__ = ["Draw", "Drawing", "Drawn"]


class Drawing(NamedTuple):
    """The arrays of a call.

    Attributes:
      operands: those of the logits.
      words: [N, 2], see `noise.row_words`.
    """

    operands: Operands
    words: Annotated[jax.Array, Axes("nj")]


class Drawn(NamedTuple):
    """The class of every row, and its log-probabilities if they are asked for.

    Attributes:
      class_id: [N] int32; -1 where there is none.
      log_prob: [N] under the temperature alone, or None.
      filtered_log_prob: [N] among the classes that filters leave, or None.
    """

    class_id: Annotated[jax.Array, Axes("n")]
    log_prob: Annotated[jax.Array | None, Axes("n")] = None
    filtered_log_prob: Annotated[jax.Array | None, Axes("n")] = None


class _Blocks(NamedTuple):
    """A tile as blocks of the whole vocabulary.

    Attributes:
      logits: [R, C], -inf outside the tile; the last block may be shorter.
      first: the number of the first block.
    """

    logits: jax.Array
    first: jax.Array | int


class _Vocabulary(NamedTuple):
    """How the classes of this shard lie in the whole vocabulary.

    Attributes:
      first: the first class of this shard.
      classes: how many it has.
      total: V.
      block: the number of classes of a block.
    """

    first: jax.Array | int
    classes: int
    total: int
    block: int


@dataclasses.dataclass(frozen=True)
class Draw(Fold[Drawing, block_sampling.Drawn, Drawn, Drawn]):
    """One class for each row; without a derivative.

    Attributes:
      with_log_prob: whether its log-probability is asked for.
    """

    with_log_prob: bool = False
    kernel_step: ClassVar[str | None] = "draw"

    def operands(self, arrays: Drawing) -> Operands:
        return arrays.operands

    def _vocabulary(self, operands: Operands) -> _Vocabulary:
        classes = operands.num_classes(self.config)
        total = operands.all_classes(self.config)
        return _Vocabulary(
            mesh_axes.offset(self.config.vocab_axes, classes),
            classes,
            total,
            block_sampling.block_size(total),
        )

    def tiles(self, arrays: Drawing) -> Tiling:
        block = self._vocabulary(arrays.operands).block
        tiles = tiles_of(self.config, arrays.operands, block)
        if not self.config.vocab_axes or tiles.class_blocks == 1:
            return tiles
        # The first block may have begun on the shard before.
        return dataclasses.replace(tiles, extra=block - 1)

    def tile(
        self,
        part: Drawing,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> _Blocks:
        """Returns a tile that starts where a block does.

        It has whole blocks, but for one of all classes of a vocabulary that is here.
        """
        first, _, _, block = self._vocabulary(part.operands)
        is_sharded = bool(self.config.vocab_axes)
        is_alone = tiles.class_blocks == 1
        shift = first % block if is_sharded else 0
        tile = compute_tile(
            self.config, part.operands, tiles, index, 0 if is_alone else shift, kept
        )
        begin = index * tiles.block_classes - shift
        u = tile.logits
        if is_alone and is_sharded:
            room = u.shape[1] + block - 1
            padding = round_up(room, block) - u.shape[1]
            u = jnp.pad(u, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        if is_sharded or tiles.classes_overlap:
            # Logits move to the front of their block; only ends of a shard have to.
            moved = tile.start - begin
            roll = functools.partial(jnp.roll, shift=moved, axis=1)
            u = lax.cond(moved == 0, lambda u: u, roll, u)
        return _Blocks(u, (first + begin) // block)

    def start(self, rows: int, arrays: Drawing) -> block_sampling.Drawn:
        dtype = compute_dtype(arrays.operands.hidden, arrays.operands.kernel)
        lowest = jnp.full(rows, -jnp.inf, dtype)
        empty = block_sampling.Drawn(lowest, lowest, jnp.full(rows, -1, jnp.int32))
        if not self.with_log_prob:
            return empty
        return empty._replace(total=jnp.zeros(rows, dtype), logit=lowest)

    def step(
        self, carry: block_sampling.Drawn, tile: _Blocks, part: Drawing
    ) -> block_sampling.Drawn:
        tau = part.operands.temperature(self.config)
        _, classes, total, block = self._vocabulary(part.operands)
        width = tile.logits.shape[1]
        # The only block of a short vocabulary ends where that does.
        block = min(block, width)
        new = block_sampling.draw(
            tile.logits,
            tau,
            part.words,
            tile.first,
            block,
            with_log_prob=self.with_log_prob,
        )
        if width == classes == total:
            return new
        return block_sampling.later(carry, new, _of_rows(tau))

    def finish(self, carry: block_sampling.Drawn, arrays: Drawing) -> Drawn:
        if self.config.vocab_axes:
            carry = self._meet(carry, arrays)
        carry = carry.without_nan()
        if not self.with_log_prob:
            return Drawn(carry.class_id)
        tau = _of_rows(arrays.operands.temperature(self.config))
        if isinstance(tau, jax.Array):
            # It is the same on every shard of the classes, and now known to be.
            tau = mesh_axes.maximum(tau, self.config.vocab_axes)
        # Without filters it is the same after them.
        return Drawn(carry.class_id, *[carry.log_prob(tau)] * 2)

    def result(self, saved: Drawn) -> Drawn:
        return saved

    def _meet(
        self, carry: block_sampling.Drawn, arrays: Drawing
    ) -> block_sampling.Drawn:
        """Returns the best of all shards' draws and of the blocks that shards share.

        The logits of a shard's first and last block, where another shard has the rest,
        are computed again; the shards exchange their sums, and agree on the block's
        score and on whose part of it the drawn class lies in. A shard's own draw has
        its part of such a block too: with the same noise and less than the block's sum,
        it cannot beat the block.
        """
        candidates = [carry, *self._of_shared_blocks(carry, arrays)]
        best = self._agree(candidates, arrays)
        return self._measure(best, candidates, arrays) if self.with_log_prob else best

    def _edges(self, arrays: Drawing) -> list["_Edge"]:
        """Returns this shard's parts of its first and last block, if others share."""
        first, classes, total, block = self._vocabulary(arrays.operands)
        end = first + classes
        size = min(block, classes)
        head, tail = first // block, (end - 1) // block
        is_head_cut = first % block != 0
        is_tail_cut = (end % block != 0) & (end < total)
        is_tail_cut &= (tail != head) | ~is_head_cut
        return [
            _Edge.of(self, arrays.operands, begin, size, number, first, block)
            for begin, number in (
                (0, jnp.where(is_head_cut, head, -1)),
                (classes - size, jnp.where(is_tail_cut, tail, -1)),
            )
        ]

    def _of_shared_blocks(
        self, carry: block_sampling.Drawn, arrays: Drawing
    ) -> list[block_sampling.Drawn]:
        """Returns what is drawn in the blocks at both ends of this shard."""
        axes, words = self.config.vocab_axes, arrays.words
        tau = arrays.operands.temperature(self.config)
        # Temperatures of the rows lie along the second axis.
        row_tau = tau.T if isinstance(tau, jax.Array) else tau
        zero = is_zero(tau, carry.max.dtype)
        first = self._vocabulary(arrays.operands).first
        edges = self._edges(arrays)
        numbers = jnp.stack([edge.number for edge in edges])
        of_edges, at = block_sampling.bits(words, numbers, zero, carry.max.dtype)
        all_edges = 2 * mesh_axes.size(axes)
        # The edges of all shards, [edges, N], in the order of the classes.
        all_numbers = lax.all_gather(numbers, axes)
        all_numbers = all_numbers.reshape(all_edges)
        all_tops, all_sums = (
            lax.all_gather(jnp.stack(a), axes).reshape(all_edges, -1)
            for a in ([e.top for e in edges], [e.sum for e in edges])
        )
        drawn = []
        for place, edge in enumerate(edges):
            own = 2 * lax.axis_index(axes) + place
            same = ((all_numbers == edge.number) & (edge.number >= 0))[:, None]
            top = jnp.max(jnp.where(same, all_tops, -jnp.inf), axis=0)
            peak = finite_peak(top)
            rescale = jnp.exp(divide_by_temperature(all_tops, peak[None], row_tau))
            parts = jnp.where(same, all_sums * rescale, 0)
            total = jnp.sum(parts, axis=0)
            noise = of_edges[:, place : place + 1]
            score = block_sampling.scores(total[:, None], noise, zero)
            target = at.share * total
            ordered = at.order(parts.T)
            holder = at.column(block_sampling.invert(ordered, target), all_edges)
            ahead = jnp.cumsum(ordered, axis=1) - ordered
            mine = jnp.full(ahead.shape[:1], own, jnp.int32)
            column = at.column(mine, all_edges)[:, None]
            before = jnp.take_along_axis(ahead, column, axis=1)[:, 0]
            weights = at.order(edge.weights * rescale[own][:, None])
            inside = block_sampling.invert(weights, jnp.maximum(target - before, 0))
            column = at.column(inside, edge.weights.shape[1])
            class_id = jnp.where(holder == own, first + edge.begin + column, -1)
            score = jnp.where(edge.number >= 0, score[:, 0], -jnp.inf)
            new = block_sampling.Drawn(top, score, class_id)
            if self.with_log_prob:
                *_, take = block_sampling.columns(
                    column[:, None], 1, edge.weights.shape[1]
                )
                new = new._replace(logit=take(edge.logits)[:, 0])
            drawn.append(new)
        return drawn

    def _agree(
        self, candidates: list[block_sampling.Drawn], arrays: Drawing
    ) -> block_sampling.Drawn:
        """Returns the candidate with the best score of all shards."""
        axes = self.config.vocab_axes
        tau = arrays.operands.temperature(self.config)
        row_tau = tau.T if isinstance(tau, jax.Array) else tau
        tops, scores, ids = (
            jnp.stack([getattr(each, name) for each in candidates])
            for name in ("max", "score", "class_id")
        )
        top = mesh_axes.maximum(jnp.max(tops, axis=0), axes)
        scores += divide_by_temperature(tops, finite_peak(top)[None], row_tau)
        best = mesh_axes.maximum(maximum_or_nan(scores, axis=0), axes)
        none = jnp.iinfo(jnp.int32).max
        here = (scores == best[None]) & (ids >= 0)
        class_id = mesh_axes.lowest(jnp.min(jnp.where(here, ids, none), axis=0), axes)
        class_id = jnp.where(class_id == none, -1, class_id)
        return block_sampling.Drawn(top, best, class_id)

    def _measure(
        self,
        best: block_sampling.Drawn,
        candidates: list[block_sampling.Drawn],
        arrays: Drawing,
    ) -> block_sampling.Drawn:
        """Returns the best candidate with its logit and the sum over all shards."""
        own = candidates[0]
        assert own.total is not None
        ids, logits = (
            jnp.stack([getattr(each, name) for each in candidates])
            for name in ("class_id", "logit")
        )
        here = (ids == best.class_id[None]) & (ids >= 0)
        # One shard alone has a class.
        logit = jnp.max(jnp.where(here, logits, -jnp.inf), axis=0)
        logit = jnp.where(jnp.any(here, axis=0), logit, 0)
        tau = _of_rows(arrays.operands.temperature(self.config))
        total = own.total * block_sampling.exponentials(own.max, best.max, tau)
        total, logit = lax.psum(jnp.stack([total, logit]), self.config.vocab_axes)
        return best._replace(total=total, logit=logit)


def _of_rows(tau: float | jax.Array) -> float | jax.Array:
    """Returns temperatures [N, 1] as [N], a float as it is."""
    return tau[:, 0] if isinstance(tau, jax.Array) else tau


class _Edge(NamedTuple):
    """This shard's part of a block that other shards share.

    Attributes:
      number: of the block; -1 if the shard has all of it.
      begin: the first class of the part, counted from the shard's first.
      logits: [N, B] of its classes, -inf for those of other blocks.
      weights: [N, B] exp(c) of its classes about its own largest logit.
      top: [N] that logit.
      sum: [N] of the weights.
    """

    number: jax.Array
    begin: int
    logits: jax.Array
    weights: jax.Array
    top: jax.Array
    sum: jax.Array

    @classmethod
    def of(
        cls,
        fold: Draw,
        operands: Operands,
        begin: int,
        size: int,
        number: jax.Array,
        first: jax.Array | int,
        block: int,
    ) -> "_Edge":
        """Computes the logits of `size` classes from `begin` that lie in a block."""
        rows = operands.hidden.shape[0]
        classes = operands.num_classes(fold.config)
        tiles = Tiling(rows, classes, rows, size)
        u = compute_tile(fold.config, operands, tiles, 0, -begin).logits
        ids = begin + lax.iota(jnp.int32, size)
        start = number * block - first
        u = jnp.where((ids >= start) & (ids < start + block), u, -jnp.inf)
        top = jnp.max(u, axis=1)
        tau = operands.temperature(fold.config)
        weights = jnp.exp(divide_by_temperature(u, finite_peak(top)[:, None], tau))
        return cls(number, begin, u, weights, top, jnp.sum(weights, axis=1))
