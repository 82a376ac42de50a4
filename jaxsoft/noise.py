"""Random bits that belong to a row and a class, and to nothing else.

Whoever draws for row r and class v gets the same bits, however rows and classes are
cut into tiles or over devices: they are a counter cipher of (stream, class) under a
key made from the caller's key and the row. The cipher is Threefry-2x32 with its 20
rounds, as in `jax.random`, here as arithmetic that XLA fuses into what uses it.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["BLOCKS", "CLASSES", "ROWS", "gumbel", "row_words", "threefry", "uniform"]

# Streams: what the bits are for.
CLASSES = 0
BLOCKS = 1
ROWS = 2

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Encrypts two 32-bit words with Threefry-2x32, 20 rounds.

    Args:
      key: two uint32 arrays.
      counter: two uint32 arrays, of shapes that broadcast against the key's.

    Returns:
      Two uint32 arrays of random bits.

    References:
      Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


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
    pair = threefry((root[0], root[1]), (jnp.zeros_like(numbers), numbers))
    return jnp.stack(pair, axis=1)


def _bits(words: jax.Array, stream: int, ids: jax.Array) -> jax.Array:
    """Returns uint32 bits [R, n] of rows [R, 2] and ids, [n] or [R, n]."""
    ids = ids.astype(jnp.uint32)
    ids = ids if ids.ndim == 2 else ids[None]
    return threefry((words[:, :1], words[:, 1:]), (jnp.uint32(stream), ids))[0]


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
      stream: `CLASSES` or `BLOCKS`.
      ids: [n] or [R, n] integers.
      dtype: float32 or float64.

    Returns:
      [R, n] noise.
    """
    dtype = jnp.dtype(dtype)
    u = jnp.minimum(_unit(_bits(words, stream, ids), dtype), dtype.type(1 - 2.0**-24))
    return -jnp.log(-jnp.log1p(-u))
