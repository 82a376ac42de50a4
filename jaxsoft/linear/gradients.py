"""Gradients of what is streamed over a layer's tiles, in plain XLA.

`accumulate` takes one tile of logits after another, computed again or as the forward
pass kept it, turns it into the derivative by the logits and multiplies that twice
(4·N·H·V flops, 6 where logits are computed again): into a float32 sum for the rows and
into a tile of dkernel, which is written once, in its own dtype, or added to a sum over
chunks of rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.kept import (
    Kept,
    Place,
    loaded,
    stored,
    stored_dtype,
    tiles_in_all,
)
from jaxsoft.linear.plans import CLASS_MULTIPLE, Tiling
from jaxsoft.linear.tiles import (
    Tile,
    compute_tile,
    dot,
    kernel_slice,
    lora_slice,
    number_slice,
    scale_slice,
    slice_rows,
    tiles_of,
)

__all__ = ["Gradients", "Into", "Share", "Wanted", "accumulate"]


class Wanted(NamedTuple):
    """Which cotangents of operands to compute."""

    hidden: bool
    kernel: bool
    bias: bool
    tau: bool
    values: bool = False
    kernel_scale: bool = False
    lora_hidden: bool = False
    lora_kernel: bool = False

    @classmethod
    def of(cls, moving: Operands, values: object = False) -> "Wanted":
        """Returns what is wanted where some operands, and maybe values, move."""
        moves = moving._asdict() | {"values": values}
        return cls._make(bool(moves[name]) for name in cls._fields)


class Gradients(NamedTuple):
    """Cotangents of the operands; None where not wanted.

    Attributes:
      hidden: [N, H] in the dtype of `hidden`.
      kernel: in the shape and dtype of `kernel`.
      bias: [V] in the dtype of `bias`.
      tau: [N].
      values: in the shape and dtype of an array [V, D] that is mixed.
      kernel_scale: [S, V] in the dtype of the scales.
      lora_hidden: [N, Q] in the dtype of the adapters' states.
      lora_kernel: [Q, V] in the dtype of the adapters' kernel.
    """

    hidden: jax.Array | None
    kernel: jax.Array | None
    bias: jax.Array | None
    tau: jax.Array | None
    values: jax.Array | None = None
    kernel_scale: jax.Array | None = None
    lora_hidden: jax.Array | None = None
    lora_kernel: jax.Array | None = None

    @classmethod
    def of_classes(
        cls, operands: Operands, values: jax.Array | None = None
    ) -> "Gradients":
        """Returns the arrays of classes in the places of their gradients."""
        return cls(
            None,
            operands.kernel,
            operands.bias,
            None,
            values,
            kernel_scale=operands.kernel_scale,
            lora_kernel=operands.lora_kernel,
        )

    def where(self, wanted: Wanted) -> "Gradients":
        """Returns the same with None where nothing is wanted."""
        pairs = zip(self, wanted, strict=True)
        return Gradients._make(array if wants else None for array, wants in pairs)

    def with_tau(self, moments: jax.Array | None) -> "Gradients":
        """Returns the same with τ's, minus the moments [N, 1] over it, if wanted."""
        return self if moments is None else self._replace(tau=-moments[:, 0])

    def of_operands(self) -> Operands:
        """Returns the cotangents in the places of their operands."""
        found = self._asdict()
        del found["values"]
        return Operands.gradients(**found)


class Into(NamedTuple):
    """Where gradients by the arrays of classes go.

    Attributes:
      sums: those of earlier rows, in the dtype of the statistics.
      adds: whether there were earlier rows.
    """

    sums: Any
    adds: bool

    def of(self, operands: Operands, values: jax.Array | None = None) -> "Into":
        """Returns the same, `sums` being `Gradients`, from those of some arrays."""
        return Into(Gradients.of_classes(operands, values), self.adds)


class Share(NamedTuple):
    """What a tile of R rows and B classes contributes to the gradients.

    Attributes:
      logits: [R, B], by the logits u after the soft-cap.
      moments: [R, 1], a sum over the classes for the temperature: that of `logits`
        times the centred logits c, or what else the fold makes τ's gradient of; None if
        not wanted.
      mix: weights [R, B] and rows [R, D] whose product, summed over R, is the gradient
        of the tile's values; None if not wanted.
    """

    logits: jax.Array
    moments: jax.Array | None
    mix: tuple[jax.Array, jax.Array] | None = None


def accumulate(
    config: Config,
    operands: Operands,
    wanted: Wanted,
    share: Callable[..., Share],
    rows: object,
    *,
    kept: tuple[Kept, ...] = (),
    into: Into | None = None,
    values: jax.Array | None = None,
    tiles: Tiling | None = None,
) -> tuple[Gradients, jax.Array | None]:
    """Adds up what tiles contribute to gradients.

    Args:
      config: what is known at trace time.
      operands: the arrays, their classes those of this shard.
      wanted: which gradients to compute.
      share: gives a tile's contribution from the operands of R rows, their part of
        `rows`, the tile, its index, and what was kept of it in each layer.
      rows: further arrays; see `slice_rows`.
      kept: what the forward pass kept, of this layer first; () for nothing.
      into: where gradients by the classes' arrays go, `Gradients`; None makes new ones.
      values: an array like the gradient `values`.
      tiles: the tiles, if not those of `tiles_of`.

    Returns:
      The gradients but `tau`, and the moments [N, 1], None if not wanted. With `into`
      all are in the dtype of the statistics.
    """
    plan = tiles_of(config, operands) if tiles is None else tiles
    dtype = compute_dtype(operands.hidden, operands.kernel)
    if into is None:
        like = Gradients.of_classes(operands, values).where(wanted)
    else:
        like = into.sums
    before = like
    if into is None or not into.adds:
        # Every class is written once.
        as_bits = config.moves_bits
        before = jax.tree.map(
            lambda a: jnp.zeros(a.shape, stored_dtype(a.dtype) if as_bits else a.dtype),
            like,
        )
    rows_like = Gradients(
        operands.hidden, None, None, None, lora_hidden=operands.lora_hidden
    )
    of_rows = jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), rows_like.where(wanted))
    moments = jnp.zeros((operands.hidden.shape[0], 1), dtype) if wanted.tau else None
    sums = _Sums(
        of_rows.hidden,
        before.kernel,
        before.bias,
        moments,
        before.values,
        before.kernel_scale,
        of_rows.lora_hidden,
        before.lora_kernel,
    )

    adds = into is not None and into.adds
    step = _Step(config, operands, share, rows, plan, like, adds, kept)
    sums = mesh_axes.like(sums, (operands, rows, kept))
    if into is not None and step.can_join():
        sums = step.joined(sums)
    else:
        sums = lax.fori_loop(0, plan.class_blocks, step.over_rows, sums)
    of_rows = Gradients(sums.hidden, None, None, None, lora_hidden=sums.lora_hidden)
    if into is None:
        of_rows = jax.tree.map(
            lambda a, b: a.astype(b.dtype), of_rows, rows_like.where(wanted)
        )
    found = {name: getattr(sums, name) for name in _CLASS_AXES}
    of_classes = Gradients(None, **found, tau=None)
    of_classes = jax.tree.map(lambda a, b: loaded(a, b.dtype), of_classes, like)
    gradients = of_classes._replace(
        hidden=of_rows.hidden, lora_hidden=of_rows.lora_hidden
    )
    return gradients, sums.moments


# The axis of the classes in their arrays; a kernel's is that of its layout.
_CLASS_AXES = {"kernel": None, "bias": 0, "values": 0} | dict.fromkeys(
    ("kernel_scale", "lora_kernel"), 1
)


class _Sums(NamedTuple):
    """Gradients as they grow; those of rows in the dtype of the statistics."""

    hidden: jax.Array | None
    kernel: jax.Array | None
    bias: jax.Array | None
    moments: jax.Array | None
    values: jax.Array | None
    kernel_scale: jax.Array | None
    lora_hidden: jax.Array | None
    lora_kernel: jax.Array | None


class _Slopes(NamedTuple):
    """The derivative by a tile's logits, in the dtype of the products' operands.

    Attributes:
      logits: [R, B], times the first of `_scales` where classes have a scale each.
      bias: [B] its sum over the rows; None without a bias.
      moments: see `Share`.
      mix: see `Share`, both in the dtype of the rows.
      lora: [R, B] without the scales, in the dtype of adapters; None without them.
      kernel_scale: [S, B] by the scales; None where not wanted.
    """

    logits: jax.Array
    bias: jax.Array | None
    moments: jax.Array | None
    mix: tuple[jax.Array, jax.Array] | None
    lora: jax.Array | None = None
    kernel_scale: jax.Array | None = None


class _Step(NamedTuple):
    """How tiles are added to the gradients; the arguments are those of `accumulate`.

    Attributes:
      like: arrays in the dtypes of the gradients by the classes' arrays.
      adds: whether the gradients by the classes' arrays are sums, of earlier rows too.
    """

    config: Config
    operands: Operands
    share: Callable[..., Share]
    rows: object
    tiles: Tiling
    like: Gradients
    adds: bool
    kept: tuple[Kept, ...]

    def over_rows(self, index: jax.Array, sums: _Sums) -> _Sums:
        """Adds the tile `index` of classes, of every block of rows."""
        operands, tiles = self.operands, self.tiles
        size, axis = tiles.block_classes, self.config.class_axis
        start, fresh = self._classes(index)
        dtype = compute_dtype(operands.hidden, operands.kernel)
        axes = _CLASS_AXES | {"kernel": axis}

        def zeros(name: str) -> jax.Array | None:
            array = getattr(sums, name)
            if array is None:
                return None
            shape = list(array.shape)
            shape[axes[name]] = size
            return jnp.zeros(shape, dtype)

        of_tile = sums._replace(**{name: zeros(name) for name in axes})

        def block(number, of_tile):
            return self._block(number, index, of_tile)

        if tiles.row_blocks == 1:
            of_tile = block(0, of_tile)
        else:
            of_tile = mesh_axes.like(of_tile, (operands, self.rows, sums))
            of_tile = lax.fori_loop(0, tiles.row_blocks, block, of_tile)

        def write(name: str) -> jax.Array | None:
            total, like = getattr(sums, name), getattr(self.like, name)
            if total is None:
                return None
            tile = getattr(of_tile, name).astype(like.dtype)
            if total.dtype != like.dtype:
                tile = stored(tile)
            return self._write(total, tile, start, axes[name], fresh)

        return of_tile._replace(**{name: write(name) for name in axes})

    def can_join(self) -> bool:
        """Tells whether slopes can lie where weights of all classes were kept.

        XLA for GPUs pads whole operands of a product over a number of classes that its
        tiles do not divide.
        """
        kept, tiles = self.kept, self.tiles
        operands = self.operands
        return (
            self.config.for_gpu
            and operands.kernel_scale is None
            and operands.lora_kernel is None
            and len(kept) == 1
            and kept[0].peaks is not None
            and tiles_in_all(kept, tiles) == tiles.class_blocks
            and tiles.classes % CLASS_MULTIPLE == 0
        )

    def joined(self, sums: _Sums) -> _Sums:
        """Adds the slopes of all tiles as one matrix, in the place of what was kept.

        A tile at a time reads and writes the sum for the rows once a tile, and adds
        that for the classes in a pass of its own.
        """
        tiles = self.tiles

        def tile(index, state):
            def block(number, state):
                kept, bias = state
                part, part_rows, row, row_start = self._part(number)
                place = Place(row_start, index)
                found = self._slopes(
                    part, part_rows, index, row, row_start, (kept.read(place, tiles),)
                )
                is_new = row_start + lax.iota(jnp.int32, tiles.block_rows) >= row
                kept = kept.with_slopes(place, tiles, found.logits, is_new)
                return kept, None if bias is None else bias + found.bias

            kept, biases = state
            dtype = compute_dtype(self.operands.hidden, self.operands.kernel)
            bias = None
            if biases is not None:
                bias = jnp.zeros(tiles.block_classes, dtype)
            state = mesh_axes.like((kept, bias), (self.operands, self.rows, sums))
            kept, bias = lax.fori_loop(0, tiles.row_blocks, block, state)
            if biases is not None:
                start, fresh = self._classes(index)
                biases = self._write(biases, bias, start, 0, fresh)
            return kept, biases

        state = (self.kept[0].in_floats(), sums.bias)
        kept, bias = lax.fori_loop(0, tiles.class_blocks, tile, state)
        whole = Tiling(tiles.rows, tiles.classes, tiles.rows, tiles.classes)
        one = self._replace(tiles=whole)
        slopes = _Slopes(kept.numbers, None, None, None)
        found = one._add(self.operands, 0, 0, sums._replace(bias=None), slopes)
        kernel = found.kernel
        if kernel is not None and sums.kernel is not None and self.adds:
            kernel = sums.kernel + kernel
        return found._replace(kernel=kernel, bias=bias)

    def _classes(self, index):
        """Returns where a tile's classes start, and which are no other tile's, [B]."""
        size = self.tiles.block_classes
        first = index * size
        start = jnp.minimum(first, self.tiles.classes - size)
        return start, start + lax.iota(jnp.int32, size) >= first

    def _part(self, number):
        """Returns a block of rows: operands, further arrays, and where it starts.

        The last block may start earlier, over rows of the one before.
        """
        tiles = self.tiles
        row = number * tiles.block_rows
        row_start = jnp.minimum(row, tiles.rows - tiles.block_rows)
        part, part_rows = self.operands, self.rows
        if tiles.row_blocks > 1:
            part = slice_rows(part, row_start, tiles.block_rows)
            part_rows = slice_rows(part_rows, row_start, tiles.block_rows)
        return part, part_rows, row, row_start

    def _block(self, number, index, of_tile: _Sums) -> _Sums:
        """Adds a block of rows to the gradients of a tile."""
        tiles = self.tiles
        part, part_rows, row, row_start = self._part(number)
        place = Place(row_start, index)

        def slopes(is_kept: bool) -> _Slopes:
            kept = tuple(k.read(place, tiles) for k in self.kept) if is_kept else ()
            found = self._slopes(part, part_rows, index, row, row_start, kept)
            return mesh_axes.like(found, (part, part_rows, self.kept))

        count = tiles_in_all(self.kept, tiles)
        if 0 < count < tiles.class_blocks:
            found = lax.cond(index < count, lambda: slopes(True), lambda: slopes(False))
        else:
            found = slopes(count > 0)
        return self._add(part, row_start, index, of_tile, found)

    def _slopes(self, part, part_rows, index, row, row_start, kept) -> _Slopes:
        """Returns the derivative by a tile's logits, and what is made of it."""
        config, tiles = self.config, self.tiles
        tile = compute_tile(config, part, tiles, index, kept=kept[0] if kept else None)
        d, moments, mix = self.share(part, part_rows, tile, index, kept)
        if tile.slope is not None:
            d = d * tile.slope
        if tiles.rows_overlap:
            fresh = (row_start + lax.iota(jnp.int32, tiles.block_rows) >= row)[:, None]
            d = jnp.where(fresh, d, 0)
            moments = None if moments is None else jnp.where(fresh, moments, 0)
            mix = None if mix is None else (mix[0], jnp.where(fresh, mix[1], 0))
        bias = None if part.bias is None else jnp.sum(d, axis=0)
        if mix is not None:
            weights, of_rows = mix
            mix = (weights.astype(of_rows.dtype), of_rows)
        lora = None if part.lora_hidden is None else d.astype(part.lora_hidden.dtype)
        scale = None
        if self.like.kernel_scale is not None:
            scale = self._slopes_of_scale(part, tile, d)
        if part.has_scale_of_class():
            d = d * _scales(part, tile.start, d.shape[1])[0]
        return _Slopes(d.astype(part.matmul_dtype()), bias, moments, mix, lora, scale)

    def _slopes_of_scale(self, part: Operands, tile: Tile, d: jax.Array) -> jax.Array:
        """Returns the derivative by the scales of a tile, [S, B]."""
        if part.has_scale_of_class():
            assert tile.product is not None
            return jnp.sum(d * tile.product, axis=0, keepdims=True)
        assert part.kernel_scale is not None
        axis, precision = self.config.class_axis, self.config.precision
        rows = part.hidden.astype(part.matmul_dtype())
        numbers = number_slice(self.config, part, self.tiles, tile.start)
        numbers = numbers.astype(rows.dtype)
        count = part.kernel_scale.shape[0]
        size = rows.shape[1] // count

        def of_block(index: jax.Array) -> jax.Array:
            # Products of a few features, and not a tile of dkernel: XLA for TPUs would
            # copy the whole kernel to lay it out as that is.
            states, some = (
                lax.dynamic_slice_in_dim(array, index * size, size, along)
                for array, along in ((rows, 1), (numbers, 1 - axis))
            )
            product = dot(states, some, (1, 1 - axis), precision, d.dtype)
            return jnp.sum(d * product, axis=0)

        return lax.map(of_block, jnp.arange(count))

    def _add(self, part, row_start, index, sums: _Sums, slopes: _Slopes) -> _Sums:
        """Adds what a tile contributes to its gradients."""
        config, tiles = self.config, self.tiles
        axis, d = config.class_axis, slopes.logits
        dtype = compute_dtype(part.hidden, part.kernel)
        hidden, kernel, bias, moments, values = sums[:5]
        if bias is not None and slopes.bias is not None:
            bias = bias + slopes.bias
        if hidden is not None:
            start, _ = self._classes(index)
            of_tile = kernel_slice(config, part, tiles, start)
            new = dot(d, of_tile, (1, axis), config.precision, dtype)
            if part.has_scale_of_class():
                new = new * _scales(part, start, tiles.block_classes)[1]
            hidden = _add_rows(hidden, new, row_start, tiles)
        if kernel is not None:
            rows = part.hidden.astype(part.matmul_dtype())
            pair = (rows, d) if axis == 1 else (d, rows)
            new = dot(*pair, (0, 0), config.precision, dtype)
            kernel = new if tiles.row_blocks == 1 else kernel + new
        if moments is not None and slopes.moments is not None:
            moments = _add_rows(moments, slopes.moments, row_start, tiles)
        if values is not None and slopes.mix is not None:
            values += dot(*slopes.mix, (0, 0), config.precision, dtype)
        sums = _Sums(hidden, kernel, bias, moments, values, *sums[5:])
        if slopes.kernel_scale is not None:
            assert sums.kernel_scale is not None
            scale = sums.kernel_scale + slopes.kernel_scale
            sums = sums._replace(kernel_scale=scale)
        if slopes.lora is not None:
            sums = self._add_lora(part, row_start, index, sums, slopes.lora)
        return sums

    def _add_lora(self, part, row_start, index, sums: _Sums, d: jax.Array) -> _Sums:
        """Adds what a tile contributes to the gradients of adapters."""
        config, tiles = self.config, self.tiles
        dtype = compute_dtype(part.hidden, part.kernel)
        hidden, kernel = sums.lora_hidden, sums.lora_kernel
        if hidden is not None:
            start, _ = self._classes(index)
            columns = lora_slice(config, part, start, tiles.block_classes)
            new = dot(d, columns, (1, 1), config.precision, dtype)
            hidden = _add_rows(hidden, new, row_start, tiles)
        if kernel is not None:
            kernel += dot(part.lora_hidden, d, (0, 0), config.precision, dtype)
        return sums._replace(lora_hidden=hidden, lora_kernel=kernel)

    def _write(self, total, tile, start, axis: int, fresh):
        """Writes or adds a tile of classes, except where it covers classes again."""
        if self.tiles.classes_overlap or self.adds:
            old = lax.dynamic_slice_in_dim(total, start, tile.shape[axis], axis)
            if self.adds:
                tile = tile + old
            if self.tiles.classes_overlap:
                shape = [1] * tile.ndim
                shape[axis] = tile.shape[axis]
                tile = jnp.where(fresh.reshape(shape), tile, old)
        return lax.dynamic_update_slice_in_dim(total, tile, start, axis)


def _scales(part: Operands, start, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the scales [1, B] of a tile over the largest of them, and that.

    Float16 holds no slope of 1e-4 times a scale of 1e-4.
    """
    scale = scale_slice(part, start, size)
    largest = jnp.max(jnp.abs(scale))
    largest = jnp.where(largest == 0, 1, largest)
    return scale / largest, largest


def _add_rows(total: jax.Array, new: jax.Array, start, tiles: Tiling):
    """Adds a block of rows to a sum over tiles."""
    if tiles.row_blocks == 1:
        return total + new
    old = lax.dynamic_slice_in_dim(total, start, new.shape[0])
    return lax.dynamic_update_slice_in_dim(total, old + new, start, 0)
