"""A class drawn for each row from what filters leave of a layer's classes.

Filters need a row's logits more than once: those of some rows at a time are stored, as
many as the workspace has room for, and drawn from as stored logits are.
"""

import dataclasses
from typing import Annotated, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype
from jaxsoft.linear.arguments import Axes, Operands
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.folds.draw import Drawn
from jaxsoft.linear.kept import KeptTile
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import compute_tile
from jaxsoft.logits.filters import Filters
from jaxsoft.logits.rows import Rows, in_tiles, tile_rows
from jaxsoft.logits.sampling import draw_rows, draw_with_log_prob, sharded

__all__ = ["FilteredDraw", "Filtering"]

Tree = TypeVar("Tree")

# Compilers for TPUs lay out blocks of classes anew, several times where filters look at
# them: of so many numbers, or rows, at once.
_TPU_TILE, _ROWS = 2**22, 8


class Filtering(NamedTuple):
    """The arrays of a call.

    Attributes:
      operands: those of the logits.
      words: [N, 2], see `noise.row_words`.
      top_k: [N], as all filters of `Filters`, or None.
      top_p: likewise.
      min_p: likewise.
      top_n_sigma: likewise.
    """

    operands: Operands
    words: Annotated[jax.Array, Axes("nj")]
    top_k: Annotated[jax.Array | None, Axes("n")]
    top_p: Annotated[jax.Array | None, Axes("n")]
    min_p: Annotated[jax.Array | None, Axes("n")]
    top_n_sigma: Annotated[jax.Array | None, Axes("n")]

    def filters(self) -> Filters:
        """The filters as columns."""
        names = Filters._fields
        columns = (getattr(self, name) for name in names)
        return Filters(*(None if a is None else a[:, None] for a in columns))


class _Columns(NamedTuple):
    """The logits of a tile.

    Attributes:
      start: its first class.
      logits: [R, B], -inf at dropped classes and at those of the tile before.
      is_new: [B] which classes the tile before has not.
    """

    start: jax.Array
    logits: jax.Array
    is_new: jax.Array


@dataclasses.dataclass(frozen=True)
class FilteredDraw(Fold[Filtering, jax.Array, Drawn, Drawn]):
    """One class for each row; without a derivative.

    Attributes:
      most: what no row's top_k is larger than, if that is known.
      with_log_prob: whether the log-probabilities are asked for.
    """

    most: int | None = None
    with_log_prob: bool = False

    def operands(self, arrays: Filtering) -> Operands:
        return arrays.operands

    def local(self, arrays: Filtering) -> Filtering:
        """Returns the arrays, those of rows as what all shards of the classes have."""
        words, *chosen = self._joined(arrays[1:])
        tau = self._joined(arrays.operands.tau)
        return Filtering(arrays.operands._replace(tau=tau), words, *chosen)

    def _joined(self, numbers: Tree) -> Tree:
        """Returns numbers that are the same on all shards as JAX can tell that."""

        def joined(array: jax.Array) -> jax.Array:
            varying = mesh_axes.varying_axes(array)
            axes = tuple(a for a in self.config.vocab_axes if a in varying)
            return mesh_axes.maximum(array, axes)

        return jax.tree.map(joined, numbers)

    def tiles(self, arrays: Filtering) -> Tiling:
        """Returns tiles of as many rows as are stored, of all classes if they can be.

        A tile's slice of the kernel is copied where it is converted, as CPUs do before
        they multiply numbers of 16 bits.
        """
        kernel = arrays.operands.kernel
        is_copied = kernel.dtype != arrays.operands.matmul_dtype()
        is_copied |= self.config.moves_bits and kernel.dtype.itemsize == 2
        layer = self.layer(arrays)
        return layer.stored_rows(self.config.workspace_bytes, whole=not is_copied)

    def tile(
        self,
        part: Filtering,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> _Columns:
        tile = compute_tile(self.config, part.operands, tiles, index, kept=kept)
        classes = tile.start + lax.iota(jnp.int32, tiles.block_classes)
        is_new = classes >= index * tiles.block_classes
        return _Columns(tile.start, tile.logits, is_new)

    def start(self, rows: int, arrays: Filtering) -> jax.Array:
        operands = arrays.operands
        dtype = compute_dtype(operands.hidden, operands.kernel)
        return jnp.zeros((rows, operands.num_classes(self.config)), dtype)

    def step(self, carry: jax.Array, tile: _Columns, part: Filtering) -> jax.Array:
        if tile.logits.shape == carry.shape:
            return tile.logits
        old = lax.dynamic_slice_in_dim(carry, tile.start, tile.is_new.size, 1)
        new = jnp.where(tile.is_new, tile.logits, old)
        return lax.dynamic_update_slice_in_dim(carry, new, tile.start, 1)

    def close(self, carry: jax.Array, part: Filtering, tiles: Tiling) -> Drawn:
        tau = part.operands.tau
        rows = Rows(carry, None if tau is None else tau[:, None], None)
        count, classes = carry.shape
        axes = self.config.vocab_axes
        total = part.operands.all_classes(self.config)

        def draw(arrays: tuple[jax.Array, Rows, Filters]) -> Drawn:
            words, rows, chosen = arrays
            rows, shard = sharded(rows, axes, total)
            given = (self.config.static_tau, words, rows, chosen, self.most, shard)
            if not self.with_log_prob:
                return Drawn(draw_rows(*given))
            return Drawn(*draw_with_log_prob(*given))

        def in_parts(arrays: tuple[jax.Array, Rows, Filters]) -> Drawn:
            size = tile_rows(classes, _ROWS, _TPU_TILE)
            return self._joined(in_tiles(draw, arrays, count, size))

        arrays = (part.words, rows, part.filters())
        return lax.platform_dependent(arrays, tpu=in_parts, default=draw)

    def finish(self, carry: Drawn, arrays: Filtering) -> Drawn:
        return carry

    def result(self, saved: Drawn) -> Drawn:
        return saved
