"""Both softmaxes of a square of similarities, by rows and by columns, in one stream.

The similarities of N images and N texts make two softmaxes: over texts for each image,
and over images for each text. One pass over the tiles merges each into the statistics
of its rows and of its columns, and one backward pass turns it into the derivative of
both; what the forward pass keeps of it is not computed again. That is 3 products of
2·N·N·D flops for value and gradient, 4 without room to keep anything.

Tiles have texts as rows, which devices may share, and images as columns, which are
whole on each of them: the sums of images meet, those of texts are complete. With m the
largest similarity of a row or column, τ the temperature and c = (u - m) / τ, the loss
is log Σ exp(c) - c at the diagonal.
"""

import dataclasses
import math
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    finite,
    finite_peak,
    inverse,
    times,
)
from jaxsoft.linear.arguments import Axes, Config, Operands
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.gradients import Into, Share, Wanted, accumulate
from jaxsoft.linear.kept import Keep, KeptTile, Place, tiles_in_all
from jaxsoft.linear.plans import Plan, Tiling
from jaxsoft.linear.tiles import (
    Tile,
    compute_tile,
    slice_rows,
    tiles_of,
)

__all__ = ["BothWays", "PairLosses", "Pairs"]


class Pairs(NamedTuple):
    """The arrays of a call.

    Attributes:
      image: [N, D] floating.
      text: [N, D] floating, or those of this shard: the axis that shards share is that
        of classes elsewhere, along which `Fold` lets sums meet.
      tau: [1] in the dtype of the statistics, or None if it is static.
    """

    image: Annotated[jax.Array, Axes("mh")]
    text: Annotated[jax.Array, Axes("vh")]
    tau: Annotated[jax.Array | None, Axes("t")]


class PairLosses(NamedTuple):
    """The cross-entropy of each image among texts, and of each text among images.

    Attributes:
      image: [N].
      text: [N], or those of this shard.
    """

    image: Annotated[jax.Array, Axes("m")]
    text: Annotated[jax.Array, Axes("v")]


class _Saved(NamedTuple):
    """The statistics of each image and text, [N] each.

    Attributes:
      losses: of each.
      image_max: the largest similarity of an image.
      image_total: Σ exp(c) of it.
      text_max: the largest similarity of a text.
      text_total: Σ exp(c) of it.
    """

    losses: PairLosses | None
    image_max: Annotated[jax.Array, Axes("m")]
    image_total: Annotated[jax.Array, Axes("m")]
    text_max: Annotated[jax.Array, Axes("v")]
    text_total: Annotated[jax.Array, Axes("v")]


class _Softmax(NamedTuple):
    """A softmax as it grows, [R, 1] for rows or [1, B] for columns.

    Attributes:
      max: the largest similarity.
      sum: Σ exp(c).
    """

    max: jax.Array
    sum: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype: DTypeLike) -> "_Softmax":
        """Returns those of no similarity."""
        return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))

    def merge(self, u: jax.Array, axis: int, tau: float | jax.Array) -> "_Softmax":
        """Returns the same with a tile of similarities, summed over an axis."""
        largest = jnp.maximum(self.max, jnp.max(u, axis=axis, keepdims=True))
        c = divide_by_temperature(u, finite_peak(largest), tau)
        new = jnp.sum(jnp.exp(c), axis=axis, keepdims=True)
        return _Softmax(largest, self.about(largest, tau) + new)

    def about(self, largest: jax.Array, tau: float | jax.Array) -> jax.Array:
        """Returns the sum about another centre."""
        back = divide_by_temperature(self.max, finite_peak(largest), tau)
        return jnp.exp(back) * self.sum


class _Products(NamedTuple):
    """The similarities that are kept for the derivative.

    They are those of whole images, so that it does not matter how devices share texts.

    Attributes:
      numbers: [N, W] of each text with the first images, in the dtype of the
        statistics.
    """

    numbers: Annotated[jax.Array, Axes("vi")]

    def kept_tiles(self, tiles: Tiling) -> int:
        """Returns of how many tiles of images there is room."""
        # The last tile of all images is no wider than the room that it has.
        return math.ceil(self.numbers.shape[1] / tiles.block_classes)

    def _at(self, place: Place, tiles: Tiling) -> tuple[Any, Any]:
        """Returns where a tile is, as `compute_tile` lays it."""
        last = self.numbers.shape[1] - tiles.block_classes
        return place.row, jnp.minimum(place.index * tiles.block_classes, last)

    def read(self, place: Place, tiles: Tiling) -> KeptTile:
        """Returns what was kept of a tile."""
        shape = (tiles.block_rows, tiles.block_classes)
        return KeptTile(lax.dynamic_slice(self.numbers, self._at(place, tiles), shape))

    def write(self, place: Place, tiles: Tiling, tile: KeptTile) -> "_Products":
        """Returns the same with what is kept of a tile."""
        at = self._at(place, tiles)
        return _Products(lax.dynamic_update_slice(self.numbers, tile.numbers, at))

    def in_bits(self) -> "_Products":
        """Returns the same: products are of 32 or 64 bits."""
        return self

    def in_floats(self) -> "_Products":
        """Returns the same."""
        return self

    def is_of(self, config: Config, operands: Operands) -> jax.Array:
        """Tells whether it was kept of the classes that are here, as it always was."""
        del config, operands
        return jnp.asarray(True)


class _Carry(NamedTuple):
    """What is folded, of all rows and columns or of those of a tile.

    Attributes:
      rows: of texts.
      diagonal: [R, 1] the similarity of each text and its image; -inf before it is met.
      columns: of images.
    """

    rows: _Softmax
    diagonal: jax.Array
    columns: _Softmax


class _Side(NamedTuple):
    """What the derivative by similarities needs of rows or columns, [N] each.

    Attributes:
      max: the largest similarity.
      of_weight: the coefficient of exp(c).
      of_label: that of the diagonal, subtracted.
    """

    max: Annotated[jax.Array, Axes("n")]
    of_weight: Annotated[jax.Array, Axes("n")]
    of_label: Annotated[jax.Array, Axes("n")]

    @classmethod
    def of(cls, largest, total, cotangent, scale: jax.Array) -> "_Side":
        """Returns those of losses; `scale` is 1 / τ, and a cotangent of None is 0."""
        of_label = jnp.zeros_like(total) if cotangent is None else cotangent * scale
        return cls(largest, of_label / total, of_label)

    def at(self, axis: int) -> "_Side":
        """Returns the same with an axis of one element."""
        return _Side._make(jnp.expand_dims(a, axis) for a in self)

    def slope(self, tile: Tile, tau: float | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the derivative by a tile's similarities, and c."""
        # As the forward pass has it, so that XLA computes one tile's weights once.
        c = divide_by_temperature(tile.logits, finite_peak(self.max), tau)
        return tile.with_added(jnp.exp(c) * self.of_weight, -self.of_label), c


@dataclasses.dataclass(frozen=True)
class BothWays(Fold[Pairs, _Carry, _Saved, PairLosses]):
    """The losses of each image among texts, and of each text among images."""

    def operands(self, arrays: Pairs) -> Operands:
        count, tau = arrays.text.shape[0], arrays.tau
        first = mesh_axes.offset(self.config.vocab_axes, count)
        return Operands(
            arrays.text,
            arrays.image,
            bias=None,
            tau=None if tau is None else jnp.broadcast_to(tau, (count,)),
            labels=(first + lax.iota(jnp.int32, count))[:, None],
            class_mask=None,
        )

    def plan(self, arrays: Pairs, moving: Pairs, reduced: bool = False) -> Plan:
        """Returns the plan, for shards of texts."""
        del moving, reduced
        layer, shards = self.layer(arrays), self.config.shards
        if shards is not None:
            layer = layer.shared(shards.count(shards.classes), 1)
        return layer.plan(
            self.config.workspace_bytes,
            kept_bytes=layer.logit_bytes if self.config.can_keep else None,
        )

    def keep(self, arrays: Pairs, moving: Pairs, plan: Plan) -> Keep | None:
        """Returns what every shard keeps: of all its texts, some images."""
        del arrays, moving
        if not plan.kept_classes:
            return None
        blocks = (plan.tiles.block_rows, plan.tiles.block_classes)
        return Keep("products", plan.kept_classes, blocks)

    def _temperature(self, arrays: Pairs) -> float | jax.Array:
        """Returns the temperature as a float or as [1, 1]."""
        if arrays.tau is not None:
            return arrays.tau[:, None]
        assert self.config.static_tau is not None
        return self.config.static_tau

    def start(self, rows: int, arrays: Operands) -> _Carry:
        """Returns the carry of R rows and of all columns."""
        dtype = compute_dtype(arrays.hidden, arrays.kernel)
        return _Carry(
            _Softmax.empty((rows, 1), dtype),
            jnp.full((rows, 1), -jnp.inf, dtype),
            _Softmax.empty((1, arrays.num_classes(self.config)), dtype),
        )

    def step(self, carry: _Carry, tile: Tile, part: Pairs) -> _Carry:
        """Returns the carry of the tile's rows and columns with that tile."""
        tau, u = self._temperature(part), tile.logits
        assert tile.labels is not None
        at = jnp.maximum(tile.labels, 0)
        met = jnp.take_along_axis(u, at, axis=1, mode="clip")
        met = jnp.where(tile.labels >= 0, met, -jnp.inf)
        return _Carry(
            carry.rows.merge(u, 1, tau),
            jnp.maximum(carry.diagonal, met),
            carry.columns.merge(u, 0, tau),
        )

    def finish(self, carry: _Carry, arrays: Pairs) -> _Saved:
        axes, tau = self.config.vocab_axes, self._temperature(arrays)
        rows, columns = carry.rows, carry.columns
        c_text = divide_by_temperature(carry.diagonal, finite_peak(rows.max), tau)
        largest = mesh_axes.maximum(columns.max, axes)
        # The diagonal of an image is where its text is.
        count = carry.diagonal.shape[0]
        first = mesh_axes.offset(axes, count)
        peak = lax.dynamic_slice_in_dim(finite_peak(largest), first, count, 1)
        own = divide_by_temperature(carry.diagonal.T, peak, tau)
        c_image = lax.dynamic_update_slice_in_dim(
            mesh_axes.like(jnp.zeros_like(largest), own), own, first, 1
        )
        sums = {"total": columns.about(largest, tau), "diagonal": c_image}
        sums = mesh_axes.add(sums, axes)
        losses = PairLosses(
            (jnp.log(sums["total"]) - sums["diagonal"])[0],
            (jnp.log(rows.sum) - c_text)[:, 0],
        )
        return _Saved(
            losses, largest[0], sums["total"][0], rows.max[:, 0], rows.sum[:, 0]
        )

    def result(self, saved: _Saved) -> PairLosses:
        assert saved.losses is not None
        return saved.losses

    def residuals(self, saved: _Saved) -> _Saved:
        return saved._replace(losses=None)

    def room(
        self, arrays: Pairs, keep: Keep | None, shards: int = 1
    ) -> tuple["_Products", ...]:
        del shards
        if keep is None:
            return ()
        operands = self.operands(arrays)
        tiles = tiles_of(self.config, operands)
        width = min(keep.classes or tiles.classes, tiles.classes)
        dtype = compute_dtype(operands.hidden, operands.kernel)
        return (_Products(lax.empty((tiles.rows, width), dtype)),)

    def forward(
        self,
        arrays: Pairs,
        keep: Keep | None = None,
        room: tuple["_Products", ...] = (),
    ) -> tuple[_Saved, tuple["_Products", ...]]:
        """Folds all tiles; the statistics of columns outlive a block of rows."""
        del keep
        operands = self.operands(arrays)
        tiles = tiles_of(self.config, operands)
        count = tiles_in_all(room, tiles)
        carry = self.start(tiles.rows, operands)
        carry, room = mesh_axes.like((carry, room), arrays)

        def over_rows(index: jax.Array, carry: _Carry, room: Any) -> tuple[_Carry, Any]:
            def block(number, state):
                return self._block(arrays, operands, tiles, number, index, *state)

            if tiles.row_blocks == 1:
                return block(0, (carry, room))
            return lax.fori_loop(0, tiles.row_blocks, block, (carry, room))

        if count:
            carry, room = lax.fori_loop(
                0, count, lambda index, state: over_rows(index, *state), (carry, room)
            )
        if count < tiles.class_blocks:
            carry = lax.fori_loop(
                count,
                tiles.class_blocks,
                lambda index, carry: over_rows(index, carry, ())[0],
                carry,
            )
        return self.finish(carry, arrays), room

    def _block(
        self,
        arrays: Pairs,
        operands: Operands,
        tiles: Tiling,
        number: jax.Array | int,
        index: jax.Array,
        carry: _Carry,
        room: tuple["_Products", ...],
    ) -> tuple[_Carry, tuple["_Products", ...]]:
        """Merges the tile of a block of rows and one of columns, and keeps it."""
        rows, size = tiles.block_rows, tiles.block_classes
        row = number * rows
        first = jnp.minimum(row, tiles.rows - rows)
        start = jnp.minimum(index * size, tiles.classes - size)
        part, of_rows = operands, (carry.rows, carry.diagonal)
        if tiles.row_blocks > 1:
            part, of_rows = slice_rows((operands, of_rows), first, rows)
        columns = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, start, size, 1), carry.columns
        )
        tile = compute_tile(self.config, part, tiles, index)
        if tiles.rows_overlap:
            fresh = (first + lax.iota(jnp.int32, rows) >= row)[:, None]
            tile = tile._replace(logits=jnp.where(fresh, tile.logits, -jnp.inf))
        new = self.step(_Carry(*of_rows, columns), tile, arrays)
        place = Place(first, index)
        assert tile.product is not None
        kept = KeptTile(tile.product)
        room = tuple(each.write(place, tiles, kept) for each in room)

        def written(axis: int, at: jax.Array, old: Any, new: Any) -> Any:
            return jax.tree.map(
                lambda a, b: lax.dynamic_update_slice_in_dim(a, b, at, axis), old, new
            )

        return _Carry(
            written(0, first, carry.rows, new.rows),
            written(0, first, carry.diagonal, new.diagonal),
            written(1, start, carry.columns, new.columns),
        ), room

    def gradients(
        self,
        arrays: Pairs,
        saved: _Saved,
        cotangents: PairLosses,
        moving: Pairs,
        kept: tuple["_Products", ...] = (),
        into: Into | None = None,
    ) -> Pairs:
        del into
        operands = self.operands(arrays)
        wanted = Wanted(bool(moving.text), bool(moving.image), False, bool(moving.tau))
        tau, dtype = self._temperature(arrays), saved.image_total.dtype
        scale = jnp.reshape(inverse(tau, dtype), ())
        images = _Side.of(saved.image_max, saved.image_total, cotangents.image, scale)
        texts = _Side.of(saved.text_max, saved.text_total, cotangents.text, scale)

        def share(part: Operands, rows: _Side, tile: Tile, *_: Any) -> Share:
            del part
            size = tile.logits.shape[1]
            columns = slice_rows(images, tile.start, size)
            by_rows, c_rows = rows.at(1).slope(tile, tau)
            by_columns, c_columns = columns.at(0).slope(tile, tau)
            moments = None
            if wanted.tau:
                terms = times(by_rows, finite(c_rows))
                terms += times(by_columns, finite(c_columns))
                moments = jnp.sum(terms, axis=1, keepdims=True)
            return Share(by_rows + by_columns, moments)

        found, moments = accumulate(
            self.config, operands, wanted, share, texts, kept=cast(Any, kept)
        )
        of_tau = None if moments is None else -jnp.sum(moments, axis=0)
        return Pairs._make((found.kernel, found.hidden, of_tau))
