"""What a forward pass keeps of its tiles for the derivative, and where it lies.

What is kept of all classes lies as they do, so that devices that share the classes of a
kernel share it alike. What is kept of some is that of the first tiles of each shard: it
is for programs whose devices are known when they are traced.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype, round_up
from jaxsoft.linear.arguments import Axes, Config, Operands
from jaxsoft.linear.plans import Tiling

__all__ = [
    "Keep",
    "Keeping",
    "Kept",
    "KeptTile",
    "Place",
    "loaded",
    "stored",
    "stored_dtype",
    "tiles_in_all",
]

Keeping = Literal["products", "weights"]

# The numbers of tiles have a multiple of so many columns, where the classes are few and
# many, that devices can share them.
_SHARES, _MANY_SHARES = 48, 384
_MANY_CLASSES = 2**15


def stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of large arrays of which loops read and write parts.

    XLA for CPUs computes with float32 in the place of shorter floats, and takes the
    update of a slice for a computation: it would convert all of an array for every
    tile. Bits are only moved; but no derivative flows through them.
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 2 or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return jnp.dtype(jnp.uint16 if dtype.itemsize == 2 else jnp.uint8)


def stored(array: jax.Array) -> jax.Array:
    """Returns an array in its `stored_dtype`."""
    return loaded(array, stored_dtype(array.dtype))


def loaded(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns an array of a dtype from what `stored` made of it."""
    # A derivative flows through nothing but the array itself.
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


class Place(NamedTuple):
    """Where a tile lies.

    Attributes:
      row: its first row.
      index: which tile of the classes it is.
    """

    row: jax.Array | int
    index: jax.Array | int


class KeptTile(NamedTuple):
    """What is kept of a tile.

    Attributes:
      numbers: [R, B] products of states and kernel, or weights exp((u - peak) / τ).
      peak: [R, 1] of weights; None for products.
    """

    numbers: jax.Array
    peak: jax.Array | None = None


class _OfAll(NamedTuple):
    numbers: Annotated[jax.Array, Axes("nv")]
    peaks: Annotated[jax.Array | None, Axes("np")]


class _OfSome(NamedTuple):
    numbers: Annotated[jax.Array, Axes("nw")]
    peaks: Annotated[jax.Array | None, Axes("np")]


class Kept:
    """What was kept of tiles.

    Attributes:
      numbers: [N, V], or [N, W] of the first W classes; uint16 are bits of bfloat16.
      peaks: [N, P] of weights, the first class of the shard, how many it has, and one
        number a tile; None for products.
    """

    numbers: jax.Array
    peaks: jax.Array | None

    def _with(self, numbers: jax.Array, peaks: jax.Array | None) -> "Kept":
        raise NotImplementedError

    def kept_tiles(self, tiles: Tiling) -> int:
        """Returns of how many tiles all is here."""
        width, size = self.numbers.shape[1], tiles.block_classes
        count = tiles.class_blocks if width == tiles.classes else width // size
        return count if self.peaks is None else min(count, self.peaks.shape[1] - 2)

    def read(self, place: Place, tiles: Tiling) -> KeptTile:
        """Returns what was kept of a tile."""
        numbers = self._read(place, tiles)
        if numbers.dtype == jnp.uint16:
            numbers = loaded(numbers, jnp.bfloat16)
        if self.peaks is None:
            return KeptTile(numbers)
        at = (place.row, place.index + 2)
        return KeptTile(
            numbers, lax.dynamic_slice(self.peaks, at, (tiles.block_rows, 1))
        )

    def with_slopes(
        self, place: Place, tiles: Tiling, slopes: jax.Array, is_new: jax.Array
    ) -> "Kept":
        """Returns the same with slopes in the place of what was kept of a tile.

        Args:
          place: of the tile.
          tiles: all of them.
          slopes: [R, B].
          is_new: [R], False for rows of the block before.
        """
        first, start = self._starts(place, tiles)
        slopes = slopes.astype(self.numbers.dtype)
        if tiles.rows_overlap or tiles.classes_overlap:
            ours = start + lax.iota(jnp.int32, tiles.block_classes) >= first
            before = self._read(place, tiles)
            slopes = jnp.where(is_new[:, None] & ours[None], slopes, before)
        at = (place.row, start)
        numbers = lax.dynamic_update_slice(self.numbers, slopes, at)
        return self._with(numbers, self.peaks)

    def write(self, place: Place, tiles: Tiling, tile: KeptTile) -> "Kept":
        """Returns the same with what is kept of a tile."""
        short = self.numbers.dtype == jnp.uint16
        numbers = tile.numbers.astype(jnp.bfloat16 if short else self.numbers.dtype)
        numbers = stored(numbers) if short else numbers
        first, start = self._starts(place, tiles)
        peaks = self.peaks
        if peaks is not None and tile.peak is not None:
            at = (place.row, place.index + 2)
            peaks = lax.dynamic_update_slice(peaks, tile.peak, at)
            if tiles.classes_overlap:
                # Weights of the tile before are about another peak.
                ours = start + lax.iota(jnp.int32, numbers.shape[1]) >= first
                numbers = jnp.where(ours[None], numbers, self._read(place, tiles))
        at = (place.row, start)
        return self._with(lax.dynamic_update_slice(self.numbers, numbers, at), peaks)

    def in_bits(self) -> "Kept":
        """Returns the same with the bits of bfloat16."""
        if self.numbers.dtype != jnp.bfloat16:
            return self
        return self._with(stored(self.numbers), self.peaks)

    def in_floats(self) -> "Kept":
        """Returns the same with bfloat16 in the place of its bits."""
        if self.numbers.dtype != jnp.uint16:
            return self
        return self._with(loaded(self.numbers, jnp.bfloat16), self.peaks)

    def is_of(self, config: Config, operands: Operands) -> jax.Array:
        """Tells whether its tiles were those of the classes that are here."""
        if self.peaks is None:
            return jnp.bool_(True)
        here = _classes_here(config, operands, self.peaks.dtype)
        return jnp.all(self.peaks[:, :2] == here[None])

    def _read(self, place: Place, tiles: Tiling) -> jax.Array:
        _, start = self._starts(place, tiles)
        shape = (tiles.block_rows, tiles.block_classes)
        return lax.dynamic_slice(self.numbers, (place.row, start), shape)

    def _starts(self, place: Place, tiles: Tiling):
        """Returns the first class of a tile, and where its columns start."""
        first = place.index * tiles.block_classes
        return first, jnp.minimum(first, tiles.classes - tiles.block_classes)


class KeptAll(_OfAll, Kept):
    """What was kept of all tiles."""

    def _with(self, numbers: jax.Array, peaks: jax.Array | None) -> "KeptAll":
        return KeptAll(numbers, peaks)


class KeptSome(_OfSome, Kept):
    """What was kept of the first tiles of each shard."""

    def _with(self, numbers: jax.Array, peaks: jax.Array | None) -> "KeptSome":
        return KeptSome(numbers, peaks)


class KeepsTiles(Protocol):
    """What has numbers of tiles that were kept, however they lie."""

    def kept_tiles(self, tiles: Tiling) -> int:
        """Returns of how many tiles all is here."""
        ...


def tiles_in_all(kept: Sequence[KeepsTiles], tiles: Tiling) -> int:
    """Returns of how many tiles each has all; 0 where nothing was kept."""
    return min((each.kept_tiles(tiles) for each in kept), default=0)


def _classes_here(config: Config, operands: Operands, dtype: DTypeLike) -> jax.Array:
    """Returns the first class of this shard and how many it has, [2]."""
    number = operands.num_classes(config)
    first = mesh_axes.offset(config.vocab_axes, number)
    return jnp.stack([jnp.asarray(a).astype(dtype) for a in (first, number)])


@dataclasses.dataclass(frozen=True)
class Keep:
    """What a forward pass keeps for the derivative.

    Attributes:
      what: products in the dtype of the statistics, from which a tile is made as at
        first; or weights in the dtype of the operands, half the bytes where that is
        bfloat16.
      classes: of how many classes, those of all shards; None for all.
      blocks: rows and classes of a tile.
    """

    what: Keeping
    classes: int | None
    blocks: tuple[int, int]

    def room(self, config: Config, operands: Operands, shards: int) -> Kept:
        """Returns room for what one of some shards keeps."""
        rows, classes = operands.hidden.shape[0], operands.num_classes(config)
        dtype = compute_dtype(operands.hidden, operands.kernel)
        is_weights = self.what == "weights"
        of_numbers = operands.matmul_dtype() if is_weights else dtype
        if config.moves_bits:
            of_numbers = stored_dtype(of_numbers)
        width = classes if self.classes is None else self.classes // shards
        numbers = lax.empty((rows, width), of_numbers)
        peaks = None
        if is_weights:
            multiple = _SHARES if classes * shards < _MANY_CLASSES else _MANY_SHARES
            count = math.ceil(classes * shards / self.blocks[1]) + 2 * multiple
            count = round_up(count, multiple) // shards
            here = _classes_here(config, operands, dtype)
            peaks = jnp.zeros((rows, count), dtype).at[:, :2].set(here)
        kept = (KeptAll if self.classes is None else KeptSome)(numbers, peaks)
        return mesh_axes.like(kept, operands)
