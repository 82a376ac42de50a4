"""Random bits that belong to a row and a class, and to nothing else.

Whoever draws for row r and class v gets the same bits, however rows and classes are
cut into tiles or over devices: they are a counter cipher of (stream, counter) under a
key made from the caller's key and the row. The cipher is Threefry-2x32: by default
with the 20 rounds of `jax.random`, or with 13, the fewest for which its authors know
no statistical flaw (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011,
and the notes of their Random123 library).

Random123 is made for keys and counters that are plain numbers. So the key of a row is
that of the caller with the row's number added, and a program has one cipher, which
takes a compiler longer than all else of a draw.

An encryption gives two words, and classes and blocks use both: number 256 q + 128 h + r
has word h of counter 128 q + r, so that whole lanes of 128 stay together.

| function | gives | called by |
|---|---|---|
| `row_words` | the key of each row | all samplers |
| `uniform` | a uniform number a row | draws from few classes |
| `block_gumbel` | noise of some blocks, `uniform` twice | draws by blocks of classes |
| `gumbel` | noise, a whole cipher a number | nodes of trees |
| `paired_gumbel` | noise of some classes | mixtures |
| `first_gumbel` | noise of the first classes | perturbed rows |
| `span_bits`, `pair_bits` | bits, in a kernel | kernels of rows, for TPU and for GPU |
| `gumbel_of_bits`, `unit_of_bits` | numbers of bits, in a kernel | the same |
"""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "BLOCKS",
    "CLASSES",
    "GENERATORS",
    "NODES",
    "ROWS",
    "Generator",
    "block_gumbel",
    "first_gumbel",
    "gumbel",
    "gumbel_of_bits",
    "pair_bits",
    "paired_gumbel",
    "row_words",
    "span_bits",
    "uniform",
    "unit_of_bits",
]

# Streams: what the bits are for.
CLASSES = 0
BLOCKS = 1
ROWS = 2
NODES = 3

# How far the streams of an attempt are from those of the one before it.
_ATTEMPT = 16

Generator = Literal["threefry", "threefry13"]
GENERATORS: tuple[Generator, ...] = get_args(Generator)
_ROUNDS = {"threefry": 20, "threefry13": 13}

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_LANES = 128

# Digits of pi: what tells our keys from those that JAX itself encrypts with.
_OURS = (0x243F6A88, 0x85A308D3)
# The golden ratio's 32 bits: its multiples lie far from each other.
_STRIDE = 0x9E3779B9
# After so many rounds a CPU stores the words of classes: fewer are slower to compile,
# more are computed more than once.
_STAGE = 4


def row_words(key: jax.Array, rows: int, first: jax.Array | int = 0) -> jax.Array:
    """Returns one Threefry key for each row.

    All rows of a key differ, and those of keys from seeds below 2³² from each other.

    Args:
      key: a JAX random key of any kind.
      rows: N.
      first: the number of the first row.

    Returns:
      [N, 2] uint32.
    """
    root = _root(key)
    numbers, word = (lax.broadcasted_iota(jnp.uint32, (rows, 2), i) for i in range(2))
    numbers += jnp.asarray(first).astype(jnp.uint32)
    # Selected, not joined: a TPU pads each array of a column.
    return jnp.where(word == 0, root[0] + numbers * jnp.uint32(_STRIDE), root[1])


def _root(key: jax.Array) -> jax.Array:
    """Returns two words of a key, uint32: its own if it has two."""
    data = jax.random.key_data(key)
    has_two = data.shape == (2,)
    if has_two and not jax.debug_key_reuse.value:
        return data ^ jnp.asarray(_OURS, jnp.uint32)
    # JAX refuses an array of keys here, and takes note of the key that is used.
    drawn = jax.random.bits(key, (2,), jnp.uint32)
    return data ^ jnp.asarray(_OURS, jnp.uint32) if has_two else drawn


def _encrypt(
    keys: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Encrypts counters, two words [n] each, under keys [R, 2]; gives two [R, n]."""
    shape = (keys.shape[0], first.shape[0])
    counters = [jnp.broadcast_to(word[None], shape) for word in (first, second)]
    rounds = _ROUNDS["threefry"]

    pair = _threefry([keys[:, i, None] for i in range(2)], counters, rounds)
    return lax.platform_dependent(
        *pair,
        cpu=lambda *pair: lax.optimization_barrier(pair),
        default=lambda *pair: pair,
    )


def _stored(*words: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the same few words, computed once however often they are used.

    XLA for CPUs would compute a cipher again wherever a part of it is used, and JAX
    0.10 leaves barriers out there. It never repeats a reduction, but computes what it
    reduces twice here.
    """

    def reduced(*words):
        is_word = lax.iota(jnp.int32, 2) == 0
        return tuple(
            lax.reduce_or(jnp.where(is_word, word[..., None], 0), [word.ndim])
            for word in words
        )

    return lax.platform_dependent(*words, cpu=reduced, default=lambda *words: words)


def _threefry(
    keys: Sequence[jax.Array],
    counters: Sequence[jax.Array],
    rounds: int,
    stage: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Encrypts counters of any shape under keys that broadcast to it.

    Every `stage` rounds are computed before what follows, if that is not None.
    """
    key0, key1 = keys
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    a, b = (c + k for c, k in zip(counters, keys, strict=True))
    for number in range(rounds):
        step, place = divmod(number, 4)
        rotation = _ROTATIONS[step % 2][place]
        a = a + b
        left = lax.shift_left(b, jnp.full_like(b, rotation))
        right = lax.shift_right_logical(b, jnp.full_like(b, 32 - rotation))
        b = a ^ (left | right)
        if place == 3:
            a = a + schedule[(step + 1) % 3]
            b = b + schedule[(step + 2) % 3] + jnp.uint32(step + 1)
        is_last = number + 1 == rounds
        if stage is not None and (is_last or (number + 1) % stage == 0):
            a, b = lax.optimization_barrier((a, b))
    return a, b


def _paired_counters(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the counters of numbers, and which of the two words is theirs."""
    ids = ids.astype(jnp.uint32)
    counters = ids // (2 * _LANES) * _LANES + ids % _LANES
    return counters, ids // _LANES % 2


def _first_counters(count: int) -> jax.Array:
    """Returns the counters of the first n numbers, [groups, lanes]."""
    shape = (-(-count // (2 * _LANES)), min(count, _LANES))
    group, lane = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(2))
    return group * jnp.uint32(_LANES) + lane


def _first_of_pairs(first: jax.Array, second: jax.Array, count: int) -> jax.Array:
    """Returns the first n numbers [R, n] from both words [R, groups, lanes]."""
    if count <= _LANES:
        return first[:, 0]
    rows, groups, lanes = first.shape

    def selected(first, second):
        # XLA for CPUs leaves it in a loop that it vectorises.
        word = lax.broadcasted_iota(jnp.int32, (rows, groups, 2, lanes), 2)
        return jnp.where(word == 0, first[:, :, None], second[:, :, None])

    def joined(first, second):
        return jnp.stack([first, second], axis=2)

    bits = lax.platform_dependent(first, second, cpu=selected, default=joined)
    return bits.reshape(rows, groups * 2 * lanes)[:, :count]


def _first_bits(
    words: jax.Array, stream: int, count: int, rounds: int, stage: int | None
) -> jax.Array:
    """Returns uint32 bits [R, n] of rows [R, 2] and the first n numbers of a stream."""
    counters = _first_counters(count)
    counters = jnp.broadcast_to(counters, (words.shape[0], *counters.shape))
    keys = [words[:, i, None, None] for i in range(2)]
    streams = jnp.full_like(counters, stream)
    pair = _threefry(keys, (streams, counters), rounds, stage)
    return _first_of_pairs(*pair, count)


def _unit(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns numbers in (0, 1], the middles of 2³² equal cells."""
    return (bits.astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-32)


def _to_gumbel(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns standard Gumbel noise from uniform bits.

    `-log(E)` with `E = -log(1 - u)`, an exponential whose small values, those of large
    noise, keep all 32 bits: the noise lies in [-2.9, 22.9] and is always finite.
    """
    u = _unit(bits, dtype)
    return lax.platform_dependent(u, cpu=_of_unit_by_log, default=_of_unit)


def _of_unit(u: jax.Array) -> jax.Array:
    """Returns standard Gumbel noise from uniform numbers."""
    u = jnp.minimum(u, u.dtype.type(1 - 2.0**-24))
    return -jnp.log(-jnp.log1p(-u))


def _of_unit_by_log(u: jax.Array) -> jax.Array:
    """Returns what `_of_unit` does, without `log1p`, which is slow on a CPU.

    With `v = 1 - u` as it is rounded, `-log(1 - u) = u - (1 - v) - log(v)` up to half a
    rounding: 1 - v is exact, and differs from u only where v is above 1/2.
    """
    u = jnp.minimum(u, u.dtype.type(1 - 2.0**-24))
    v = 1 - u
    return -jnp.log(u - (1 - v) - jnp.log(v))


def uniform(
    words: jax.Array, dtype: jnp.dtype, attempt: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns one number for each row, as its distance from the nearer end of [0, 1].

    So both ends keep all 32 bits.

    Args:
      words: [R, 2] from `row_words`.
      dtype: float32 or float64.
      attempt: how often these rows were drawn from before.

    Returns:
      The distances, [R], in (0, 1/2]; and whether they are from 1, [R].
    """
    bits, _ = _stored(*_encrypt(words, *_of_row(attempt)))
    return _from_an_end(bits[:, 0], jnp.dtype(dtype))


def _of_row(attempt: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the stream and the counter of a row's own number, [1] each."""
    number = jnp.zeros(1, jnp.uint32)
    return jnp.full_like(number, ROWS + _ATTEMPT * attempt), number


def _from_an_end(bits: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns what `uniform` does, of the bits of each row."""
    from_one = bits >= jnp.uint32(2**31)
    return _unit(jnp.where(from_one, ~bits, bits), dtype), from_one


def block_gumbel(
    words: jax.Array,
    blocks: jax.Array | int,
    dtype: jnp.dtype,
    attempt: jax.Array | int = 0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns standard Gumbel noise of rows and some blocks, and `uniform`.

    Args:
      words: [R, 2] from `row_words`.
      blocks: n integers, or how many of the first ones.
      dtype: float32 or float64.
      attempt: how often these rows were drawn from before.

    Returns:
      [R, n] noise; what `uniform` returns; and the same of another number.
    """
    dtype = jnp.dtype(dtype)
    if isinstance(blocks, int):
        counters = _first_counters(blocks)
    else:
        counters, word = _paired_counters(blocks)
    flat = counters.reshape(-1)
    row_stream, row_counter = _of_row(attempt)
    stream = jnp.full_like(flat, BLOCKS + _ATTEMPT * attempt)
    pair = _stored(
        *_encrypt(
            words,
            jnp.concatenate([stream, row_stream]),
            jnp.concatenate([flat, row_counter]),
        )
    )
    place, other = (_from_an_end(a[:, -1], dtype) for a in pair)
    first, second = (a[:, :-1].reshape(-1, *counters.shape) for a in pair)
    if isinstance(blocks, int):
        bits = _first_of_pairs(first, second, blocks)
    else:
        bits = jnp.where(word[None] == 0, first, second)
    return _to_gumbel(bits, dtype), place, other


def gumbel(
    words: jax.Array, stream: int, ids: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns standard Gumbel noise of rows and numbers, a whole cipher for each.

    Args:
      words: [R, 2] from `row_words`.
      stream: `NODES`.
      ids: [n] integers.
      dtype: float32 or float64.

    Returns:
      [R, n] noise.
    """
    ids = ids.astype(jnp.uint32)
    bits, _ = _encrypt(words, jnp.full_like(ids, stream), ids)
    return _to_gumbel(bits, jnp.dtype(dtype))


def paired_gumbel(
    words: jax.Array, stream: int, ids: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns standard Gumbel noise of rows and some classes or blocks.

    Args:
      words: [R, 2] from `row_words`.
      stream: `CLASSES` or `BLOCKS`.
      ids: [n] integers.
      dtype: float32 or float64.

    Returns:
      [R, n] noise, that of `first_gumbel` with its default generator.
    """
    counters, word = _paired_counters(ids)
    first, second = _encrypt(words, jnp.full_like(counters, stream), counters)
    return _to_gumbel(jnp.where(word[None] == 0, first, second), jnp.dtype(dtype))


def first_gumbel(
    words: jax.Array,
    stream: int,
    count: int,
    dtype: jnp.dtype,
    generator: Generator = "threefry",
    *,
    fused: bool | None = None,
) -> jax.Array:
    """Returns standard Gumbel noise of rows and the first classes or blocks.

    Args:
      words: [R, 2] from `row_words`.
      stream: `CLASSES` or `BLOCKS`.
      count: n.
      dtype: float32 or float64.
      generator: "threefry" or "threefry13".
      fused: whether the cipher may be compiled into one piece with what comes after it;
        a CPU would compute it more than once. None chooses by platform.

    Returns:
      [R, n] noise.
    """

    def noise(fused: bool, words: jax.Array) -> jax.Array:
        stage = None if fused else _STAGE
        bits = _first_bits(words, stream, count, _ROUNDS[generator], stage)
        return _to_gumbel(bits, jnp.dtype(dtype))

    if fused is None:
        apart, whole = (functools.partial(noise, fused) for fused in (False, True))
        return lax.platform_dependent(words, cpu=apart, default=whole)
    return noise(fused, words)


def span_bits(
    words: Sequence[jax.Array],
    stream: int,
    start: jax.Array | int,
    count: int,
    generator: Generator = "threefry",
) -> jax.Array:
    """Returns uniform bits of rows and a span, as a kernel can compute them.

    Args:
      words: the two columns of `row_words`, [R, 1] each.
      stream: `CLASSES` or `BLOCKS`.
      start: the first number, a multiple of 256.
      count: n.
      generator: "threefry" or "threefry13".

    Returns:
      [R, n] uint32, the bits that `first_gumbel` turns into noise.
    """
    groups = -(-count // (2 * _LANES))
    shape = (words[0].shape[0], groups * _LANES)
    counters = lax.broadcasted_iota(jnp.int32, shape, 1) + (start >> 1)
    pair = pair_bits(words, stream, counters.astype(jnp.uint32), generator)
    lanes = [
        word[:, first : first + _LANES]
        for first in range(0, shape[1], _LANES)
        for word in pair
    ]
    return jnp.concatenate(lanes, axis=1)[:, :count]


def pair_bits(
    words: Sequence[jax.Array],
    stream: int,
    counters: jax.Array,
    generator: Generator = "threefry",
) -> tuple[jax.Array, jax.Array]:
    """Returns the two words of each counter, as a kernel can compute them.

    Args:
      words: the two columns of `row_words`, which broadcast against the counters.
      stream: `CLASSES` or `BLOCKS`.
      counters: uint32, 128 q + r for the numbers 256 q + r and 256 q + 128 + r.
      generator: "threefry" or "threefry13".

    Returns:
      uint32 of both numbers, in the shape of the counters.
    """
    streams = jnp.full_like(counters, stream)
    return _threefry(words, (streams, counters), _ROUNDS[generator])


def gumbel_of_bits(bits: jax.Array) -> jax.Array:
    """Returns standard Gumbel noise from uniform bits, as a kernel can compute it.

    Args:
      bits: uint32 of any shape.

    Returns:
      float32 noise, that of `first_gumbel` up to the rounding of logarithms.
    """
    return _of_unit(unit_of_bits(bits))


def unit_of_bits(bits: jax.Array) -> jax.Array:
    """Returns float32 numbers in (0, 1] from uint32 bits, as a kernel can do it."""
    # TPUs convert signed numbers alone. Both halves are exact, and the sum rounds once.
    high = lax.shift_right_logical(bits, jnp.full_like(bits, 16))
    low = bits & jnp.uint32(0xFFFF)
    high, low = (half.astype(jnp.int32).astype(jnp.float32) for half in (high, low))
    return (high * 65536 + low + 0.5) * 2.0**-32
