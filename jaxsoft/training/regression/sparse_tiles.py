"""Sparse features in tiles of rows, each padded to the same number of entries."""

import jax
import numpy as np
from flax import struct

from jaxsoft.training.regression.inputs import Csr

__all__ = ["SparseTiles", "sparse_tiles", "tile_rows"]

# Bytes that the products of a tile's entries with the kernel's rows may take.
_TILE_BYTES = 2**25


class SparseTiles(struct.PyTreeNode):
    """The non-zero entries of a matrix, by tiles of its rows.

    Attributes:
      values: [T, Z], or [Z] for one tile; padding is 0.
      columns: [T, Z] int32 in [0, d).
      rows: [T, Z] int32 within the tile, ascending; padding has the last row.
      tile_rows: rows of a tile; T of them are at least the matrix's.
    """

    values: jax.Array | np.ndarray
    columns: jax.Array | np.ndarray
    rows: jax.Array | np.ndarray
    tile_rows: int = struct.field(pytree_node=False)

    @property
    def num_tiles(self) -> int:
        """T."""
        return self.values.shape[0]

    def tile(self, index: jax.Array) -> "SparseTiles":
        """Returns one tile."""
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self
        )

    def matmul(self, kernel: jax.Array) -> jax.Array:
        """Returns the product of one tile with a kernel.

        Args:
          kernel: [R, d].

        Returns:
          [R, tile_rows].
        """
        terms = self.values[:, None] * kernel.T[self.columns]
        return jax.ops.segment_sum(
            terms, self.rows, self.tile_rows, indices_are_sorted=True
        ).T


def tile_rows(matrix: Csr, num_rows: int, devices: int) -> int:
    """Returns how many rows of a matrix make a tile.

    Args:
      matrix: scipy's CSR, [n, d].
      num_rows: R, rows of the kernel.
      devices: that the rows are divided over.
    """
    count = matrix.shape[0]
    row_bytes = max(1.0, matrix.nnz / count) * num_rows * matrix.dtype.itemsize
    return max(1, min(-(-count // devices), int(_TILE_BYTES // row_bytes)))


def sparse_tiles(matrix: Csr, rows: int, devices: int) -> SparseTiles:
    """Cuts a matrix into tiles.

    Args:
      matrix: scipy's CSR, [n, d].
      rows: of a tile.
      devices: T is a multiple of their number.

    Returns:
      The tiles, as NumPy arrays.
    """
    count = matrix.shape[0]
    tiles = -(-count // rows)
    tiles += -tiles % devices
    starts = np.minimum(np.arange(tiles + 1) * rows, count)
    bounds = matrix.indptr[starts].astype(np.int64)
    width = max(1, int(np.diff(bounds).max()))
    values = np.zeros((tiles, width), matrix.dtype)
    columns = np.zeros((tiles, width), np.int32)
    places = np.full((tiles, width), rows - 1, np.int32)
    for index in range(tiles):
        low, high = bounds[index], bounds[index + 1]
        lengths = np.diff(matrix.indptr[starts[index] : starts[index + 1] + 1])
        values[index, : high - low] = matrix.data[low:high]
        columns[index, : high - low] = matrix.indices[low:high]
        places[index, : high - low] = np.repeat(np.arange(len(lengths)), lengths)
    return SparseTiles(values, columns, places, rows)
