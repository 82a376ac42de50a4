"""Random bits that belong to a row and a class, and to nothing else.

Whoever draws for row r and class v gets the same bits, however rows and classes are
cut into tiles or over devices: they are a counter cipher of (stream, class) under a
key made from the caller's key and the row. The cipher is JAX's Threefry-2x32 with its
20 rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32

__all__ = ["BLOCKS", "CLASSES", "NODES", "ROWS", "gumbel", "row_words", "uniform"]

# Streams: what the bits are for.
CLASSES = 0
BLOCKS = 1
ROWS = 2
NODES = 3


def row_words(key: jax.Array, rows: int, first: jax.Array | int = 0) -> jax.Array:
    """Returns one Threefry key for each row.

    Args:
      key: a JAX random key of any kind.
      rows: N.
      first: the number of the first row.

    Returns:
      [N, 2] uint32.
    """
    root = jax.random.bits(key, (2,), jnp.uint32)
    numbers = lax.iota(jnp.uint32, rows) + jnp.asarray(first).astype(jnp.uint32)
    words = _encrypt(root[None], jnp.zeros_like(numbers), numbers)
    return jnp.stack(words, axis=2)[0]


def _encrypt(
    keys: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Encrypts counters, two words [n] each, under keys [R, 2]; gives two [R, n]."""
    count = jnp.concatenate([first, second])
    words = jax.vmap(lambda key: threefry_2x32((key[0], key[1]), count))(keys)
    return words[:, : first.shape[0]], words[:, first.shape[0] :]


def _bits(words: jax.Array, stream: int, ids: jax.Array) -> jax.Array:
    """Returns uint32 bits [R, n] of rows [R, 2] and ids [n]."""
    ids = ids.astype(jnp.uint32)
    return _encrypt(words, jnp.full_like(ids, stream), ids)[0]


def _unit(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns numbers in (0, 1], the middles of 2³² equal cells."""
    return (bits.astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-32)


def uniform(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns one number in (0, 1] for each row, [R] from [R, 2]."""
    dtype = jnp.dtype(dtype)
    return _unit(_bits(words, ROWS, jnp.zeros(1, jnp.uint32)), dtype)[:, 0]


def gumbel(
    words: jax.Array, stream: int, ids: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns standard Gumbel noise of rows and ids.

    `-log(E)` with `E = -log(1 - u)`, an exponential whose small values, those of large
    noise, keep all 32 bits: the noise lies in [-2.9, 22.9] and is always finite.

    Args:
      words: [R, 2] from `row_words`.
      stream: `CLASSES`, `BLOCKS` or `NODES`.
      ids: [n] integers.
      dtype: float32 or float64.

    Returns:
      [R, n] noise.
    """
    dtype = jnp.dtype(dtype)
    u = jnp.minimum(_unit(_bits(words, stream, ids), dtype), dtype.type(1 - 2.0**-24))
    return -jnp.log(-jnp.log1p(-u))
