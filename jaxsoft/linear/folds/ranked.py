"""The statistics of a softmax with the rank of its label, or with its best classes.

The best classes are merged tile by tile beside the statistics. A rank counts the logits
that beat the label's, which is known after the last tile alone: every tile is needed
twice, with the same bits, or equal logits would not be told from larger ones. Products
are kept for the second look where the workspace has room for those of enough rows, and
computed again by the same instructions where it has not. Logits are compared before
their soft-cap, which keeps their order: the same hyperbolic tangent may have other bits
in another place of a program.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype
from jaxsoft.linear import reference
from jaxsoft.linear.arguments import Axes, Call, Operands
from jaxsoft.linear.folds.best import Best
from jaxsoft.linear.folds.statistics import (
    Columns,
    Fields,
    LogitStatistics,
    Saved,
    Statistics,
    run,
)
from jaxsoft.linear.gradients import Into
from jaxsoft.linear.kept import Keep, Keeping, Kept, KeptTile, Place
from jaxsoft.linear.plans import Plan, Tiling
from jaxsoft.linear.tiles import Tile, compute_tile, fold_tiles, map_rows

__all__ = ["ranked_statistics"]


class _Carry(NamedTuple):
    """What is known of R rows so far.

    Attributes:
      columns: of the statistics.
      best: what `Best` has of the best classes; None where none are wanted.
      logit: [R, 1] that of the label without a soft-cap, -inf before it is met; None
        where no rank is wanted.
    """

    columns: Columns
    best: Any
    logit: jax.Array | None


class _Look(NamedTuple):
    """A tile, and the same without a soft-cap."""

    tile: Tile
    uncapped: Tile


class _Known(NamedTuple):
    """The operands of a shard, and what a stream found of their labels.

    Attributes:
      operands: class ids are those of this shard.
      label: [N, 1] the class, counted from the first of all shards.
      logit: [N, 1] its logit without a soft-cap.
    """

    operands: Operands
    label: Annotated[jax.Array, Axes("nk")]
    logit: Annotated[jax.Array, Axes("nk")]


class _Found(NamedTuple):
    """What a stream found.

    Attributes:
      saved: the statistics, and best classes.
      logit: [N, 1] of the labels, from all shards; None where no rank is wanted.
    """

    saved: Saved
    logit: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Ranked(Statistics):
    """The statistics of each row, and more.

    Attributes:
      k: how many of the best classes; 0 for none.
    """

    k: int = 0
    kernel_step: ClassVar[str | None] = None
    gradient_step: ClassVar[str | None] = None

    @property
    def _ranks(self) -> bool:
        """Whether the rank of the label is wanted."""
        return "rank" in self.wanted

    @property
    def _best(self) -> Best:
        return Best(self.config, self.k)

    def tiles(self, arrays: Operands) -> Tiling:
        return self._best.tiles(arrays) if self.k else super().tiles(arrays)

    def tile(
        self,
        part: Operands,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> _Look:
        tile = super().tile(part, tiles, index, kept)
        if self.config.softcap is None or not self._ranks:
            return _Look(tile, tile)
        product = KeptTile(tile.product)
        return _Look(tile, self._uncapped(part, tiles, index, product))

    def _uncapped(
        self,
        part: Operands,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> Tile:
        """Returns a tile without a soft-cap; see `tile`."""
        config = dataclasses.replace(self.config, softcap=None)
        return compute_tile(config, part, tiles, index, kept=kept)

    def start(self, rows: int, arrays: Operands) -> Any:
        best, logit = None, None
        if self.k:
            best = self._best.start(rows, arrays)
        if self._ranks:
            dtype = compute_dtype(arrays.hidden, arrays.kernel)
            logit = jnp.full((rows, 1), -jnp.inf, dtype)
        return _Carry(super().start(rows, arrays), best, logit)

    def step(self, carry: Any, tile: Any, part: Operands) -> Any:
        best, logit = None, None
        if self.k:
            best = self._best.step(carry.best, tile.tile, part)
        if self._ranks:
            logit = jnp.maximum(carry.logit, tile.uncapped.pick())
        return _Carry(super().step(carry.columns, tile.tile, part), best, logit)

    def kept_of(
        self, tile: Any, keep: Keep, carry: Any, part: Operands
    ) -> tuple[KeptTile, ...]:
        return super().kept_of(tile.tile, keep, carry.columns, part)

    def close(self, carry: Any, part: Operands, tiles: Tiling) -> Any:
        if not self.k:
            return carry
        return carry._replace(best=self._best.close(carry.best, part, tiles))

    def finish(self, carry: Any, arrays: Operands) -> Any:
        saved = super().finish(carry.columns, arrays)
        if self.k:
            best = self._best.finish(carry.best, arrays)
            saved = _with(saved, top_log_probs=best.log_probs, top_ids=best.ids)
        logit = carry.logit
        if logit is not None:
            # No gradient flows through a rank.
            logit = mesh_axes.maximum(lax.stop_gradient(logit), self.config.vocab_axes)
        return _Found(saved, logit)

    def of_no_rows(self, operands: Operands) -> Fields:
        fields = Statistics(self.config, self.wanted).of_no_rows(operands)
        if self._ranks:
            fields = fields._replace(rank=jnp.zeros(0, jnp.int32))
        if self.k:
            shape = (0, self.k)
            fields = fields._replace(
                top_log_probs=jnp.zeros(shape, fields.max.dtype),
                top_ids=jnp.zeros(shape, jnp.int32),
            )
        return fields

    def compute(self, arrays: Operands) -> Fields:
        fields = super().compute(arrays)
        if self.config.implementation != "reference":
            return fields
        if self._ranks:
            fields = fields._replace(rank=reference.rank(self.config, arrays))
        if self.k:
            log_probs, ids = reference.top_k(self.config, arrays, self.k)
            fields = fields._replace(top_log_probs=log_probs, top_ids=ids)
        return fields

    def can_keep(self, arrays: Operands, moving: Operands) -> Keeping | None:
        """Returns "products": logits are compared, and their slopes at many classes."""
        del arrays, moving
        return "products" if self.config.can_keep else None

    def plan(self, arrays: Operands, moving: Operands, reduced: bool = False) -> Plan:
        """Returns the plan of the derivative.

        Where not all tiles have room to be kept for it, a rank keeps all of a few rows.
        """
        plan = super().plan(arrays, moving, reduced)
        if self._ranks and plan.kept_classes < plan.tiles.classes:
            return Plan("recompute", plan.tiles)
        return plan

    def forward(
        self,
        arrays: Operands,
        keep: Keep | None = None,
        room: tuple[Kept, ...] = (),
    ) -> tuple[Saved, tuple[Kept, ...]]:
        """Runs the stream and, for a rank, another one that counts."""
        if not self._ranks:
            found, kept = self._stream(arrays, keep, room)
            return found.saved, kept
        if keep is not None:
            return self._of_kept(arrays, keep, room)
        layer, stored = self.layer(arrays), None
        if self.config.can_keep:
            stored = layer.rows_read_twice(self.config.workspace_bytes)
        if stored is None:
            return self._twice(arrays), ()
        rows, tiles = stored
        keep = Keep("products", None, (tiles.block_rows, tiles.block_classes))
        fold = self.keeping(keep)

        def saved(part: Operands) -> Saved:
            return fold._of_kept(part, keep, fold.room(part, keep))[0]

        by_bits = self.config.moves_bits
        return map_rows(saved, arrays, layer.rows, rows, by_bits), ()

    def _stream(
        self, arrays: Operands, keep: Keep | None, room: tuple[Kept, ...]
    ) -> tuple[_Found, tuple[Kept, ...]]:
        """Returns what `finish` makes of all tiles, and what was kept of them."""
        return cast(Any, self._fold(arrays, keep, room))

    def _of_kept(
        self, arrays: Operands, keep: Keep, room: tuple[Kept, ...]
    ) -> tuple[Saved, tuple[Kept, ...]]:
        """Streams all tiles, then counts by the products of them that it kept."""
        found, kept = self._stream(arrays, keep, room)
        local = self.local(arrays)
        tiles = self.tiles(local)

        def step(above: jax.Array, part: _Known, place: Place, read: Any) -> Any:
            tile = self._uncapped(part.operands, tiles, place.index, *read)
            return above + self._beating(tile, part), ()

        known = _known(local, arrays, found.logit)
        above, _ = fold_tiles(known, tiles, _none, step, kept=kept)
        return self._with_rank(found, known, above), kept

    def _twice(self, arrays: Operands) -> Saved:
        """Streams all tiles twice by the same instructions, and counts as it does so.

        The first time the labels' logits are not known, and its numbers are dropped.
        """
        local = self.local(arrays)
        tiles = self.tiles(local)

        def start(rows: int) -> Any:
            return self.start(rows, local), _none(rows)

        def step(state: Any, part: _Known, place: Place, _: Any) -> Any:
            carry, above = state
            look = self.tile(part.operands, tiles, place.index)
            above = above + self._beating(look.uncapped, part)
            return (self.step(carry, look, part.operands), above), ()

        def close(state: Any, part: _Known) -> Any:
            return self.close(state[0], part.operands, tiles), state[1]

        def once(logit: jax.Array, _: object) -> Any:
            known = _known(local, arrays, logit)
            state, _ = fold_tiles(known, tiles, start, step, close=close)
            carry, above = state
            found = self.finish(carry, local)
            saved = self._with_rank(found, known, above)
            return mesh_axes.like(found.logit, local), saved

        unknown = self.start(arrays.hidden.shape[0], local).logit
        unknown = mesh_axes.like(unknown, local)
        _, both = lax.scan(once, unknown, length=2)
        return jax.tree.map(lambda a: a[1], both)

    def _beating(self, tile: Tile, part: _Known) -> jax.Array:
        """Returns how many logits of a tile beat the labels', [R, 1]."""
        u, number = tile.logits, part.operands.num_classes(self.config)
        first = mesh_axes.offset(self.config.vocab_axes, number) + tile.start
        classes = first + lax.broadcasted_iota(jnp.int32, u.shape, 1)
        beat = jnp.where(classes < part.label, u >= part.logit, u > part.logit)
        return jnp.sum(beat, axis=1, keepdims=True, dtype=jnp.int32)

    def _with_rank(self, found: _Found, known: _Known, above: jax.Array) -> Saved:
        """Returns what is saved with ranks, from counts of this shard [N, 1]."""
        axes, fields = self.config.vocab_axes, found.saved.fields
        above = lax.psum(above, axes) if axes else above
        # Shards have the same labels, but are not known to.
        label = mesh_axes.maximum(known.label, axes)
        assert fields.label is not None
        log_prob = fields.label - fields.log_sum[:, None]
        is_kept = (label >= 0) & (found.logit != -jnp.inf) & ~jnp.isnan(log_prob)
        last = known.operands.all_classes(self.config)
        return _with(found.saved, rank=jnp.where(is_kept, above, last)[:, 0])

    def gradients(
        self,
        arrays: Operands,
        saved: Saved,
        cotangents: Fields,
        moving: Operands,
        kept: tuple[Kept, ...] = (),
        into: Into | None = None,
    ) -> Operands:
        """Returns the gradients: the best classes are further labels of theirs."""
        top = cotangents.top_log_probs
        if top is not None:
            assert saved.fields.top_ids is not None
            ids = saved.fields.top_ids
            top = jnp.where(ids < 0, 0, top)
            log_sum, label = -jnp.sum(top, axis=1), top
            if cotangents.log_sum is not None:
                log_sum = log_sum + cotangents.log_sum
            if arrays.labels is not None:
                of_label = cotangents.label
                if of_label is None:
                    of_label = jnp.zeros(arrays.labels.shape, top.dtype)
                ids = jnp.concatenate([arrays.labels, ids], axis=1)
                label = jnp.concatenate([of_label, top], axis=1)
            arrays = arrays._replace(labels=ids)
            cotangents = cotangents._replace(log_sum=log_sum, label=label)
            fold = Statistics(self.config, self.wanted | {"label"})
            return fold.gradients(arrays, saved, cotangents, moving, kept, into)
        return super().gradients(arrays, saved, cotangents, moving, kept, into)


def _with(saved: Saved, **fields: jax.Array | None) -> Saved:
    """Returns what is saved with other fields."""
    return saved._replace(fields=saved.fields._replace(**fields))


def _known(local: Operands, arrays: Operands, logit: jax.Array | None) -> _Known:
    """Returns operands with what is known of their labels."""
    assert arrays.labels is not None and logit is not None
    return mesh_axes.like(_Known(local, arrays.labels, logit), local)


def _none(rows: int) -> jax.Array:
    """Returns the counts of R rows before their first tile."""
    return jnp.zeros((rows, 1), jnp.int32)


def ranked_statistics(
    call: Call, wanted: tuple[str, ...], *, rank: bool, k: int
) -> LogitStatistics:
    """Computes the statistics of a call, with ranks or best classes.

    Args:
      call: the checked call, of "xla" or "reference"; one label a row, or none.
      wanted: as for `statistics`.
      rank: whether to rank the label.
      k: how many of the best classes; 0 for none.

    Returns:
      The statistics; `label`, where there are labels, is [..., 1].
    """
    names = wanted if call.arrays.labels is None else ("label", *wanted)
    names = (*names, "rank") if rank else names
    return run(_Ranked(call.config, frozenset(names), k), call.arrays)
