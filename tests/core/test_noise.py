"""Random bits: the cipher, who gets which, and whether they look random.

The statistical tests are those of Crush that a suite has time for (L'Ecuyer and
Simard, TestU01, 2007), on bits laid out as softmaxes use them: along classes, along
rows, and between keys. Keys are fixed, thresholds are those that a perfect source
passes all but once in some 10⁵ times.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxsoft._core import block_sampling, noise

RARE = 1e-5
ROWS, CLASSES = 256, 8192


def first_bits(words, count, generator: noise.Generator = "threefry"):
    """Returns the bits of the first classes, which `first_gumbel` turns into noise.

    Not under jit: a CPU's compiler does not end when given the cipher as one piece.
    """
    columns = words[:, :1], words[:, 1:]
    return np.asarray(noise.span_bits(columns, noise.CLASSES, 0, count, generator))


@pytest.fixture(scope="module", params=noise.GENERATORS)
def generator(request):
    return request.param


@pytest.fixture(scope="module")
def bits(generator):
    """Bits of consecutive rows and classes under one key."""
    words = noise.row_words(jax.random.key(1), ROWS)
    return first_bits(words, CLASSES, generator)


def assert_normal(z):
    """Requires standard normal numbers not to be extreme, each and together."""
    z = np.atleast_1d(z)
    assert np.abs(z).max() < stats.norm.isf(RARE / 2 / z.size)
    assert RARE / 2 < stats.chi2.sf((z**2).sum(), z.size) < 1 - RARE / 2


@pytest.mark.parametrize(
    "generator, ones, cipher",
    [
        ("threefry", False, (0x6B200159, 0x99BA4EFE)),
        ("threefry", True, (0x1CB996FC, 0xBB002BE7)),
        ("threefry13", False, (0x9D1C5EC6, 0x8BD50731)),
        ("threefry13", True, (0xFD36D048, 0x2D17272C)),
    ],
)
def test_the_cipher_is_that_of_random123(generator, ones, cipher):
    """By the known answers that come with Random123: key and counter alike."""
    word = 2**32 - 1 if ones else 0
    counter = jnp.asarray([word], jnp.uint32)
    drawn = noise.pair_bits((counter, counter), word, counter, generator)
    assert tuple(int(w[0]) for w in drawn) == cipher


@pytest.mark.parametrize("count", [1, 128, 129, 700])
@pytest.mark.many_cases
def test_the_first_numbers_get_the_bits_of_each(count):
    dtype, half = jnp.dtype("float32"), count // 2
    words = noise.row_words(jax.random.key(2), 3)

    @jax.jit
    def draw(words):
        ids = jnp.arange(count)
        first = [
            noise.first_gumbel(words, noise.BLOCKS, count, dtype, fused=fused)
            for fused in (None, False)
        ]
        first.append(noise.block_gumbel(words, count, dtype)[0])
        first.append(noise.block_gumbel(words, ids, dtype)[0])
        few = noise.paired_gumbel(words[1:2], noise.BLOCKS, ids[half:], dtype)
        return noise.paired_gumbel(words, noise.BLOCKS, ids, dtype), first, few

    each, first, few = draw(words)
    # Not under jit: a CPU's compiler does not end when given the cipher as one piece.
    fused = noise.first_gumbel(words, noise.BLOCKS, count, dtype, fused=True)
    for drawn in (*first, fused):
        np.testing.assert_array_equal(drawn, each)
    np.testing.assert_array_equal(few, each[1:2, half:])


@functools.partial(jax.jit, static_argnums=1)
def all_noise(words, generator):
    """Returns the noise of as many classes as `bits` has."""
    dtype = jnp.dtype("float32")
    return noise.first_gumbel(words, noise.CLASSES, CLASSES, dtype, generator)


GUMBEL_OF_BITS = jax.jit(noise.gumbel_of_bits)
# What a CPU computes, and what a kernel and other platforms do.
OF_BITS = pytest.mark.parametrize(
    "of_bits",
    [
        jax.jit(lambda bits: noise._to_gumbel(bits, jnp.dtype("float32"))),
        GUMBEL_OF_BITS,
    ],
    ids=["cpu", "kernel"],
)


def test_noise_is_made_of_the_bits(generator, bits):
    drawn = all_noise(noise.row_words(jax.random.key(1), ROWS), generator)
    np.testing.assert_allclose(drawn, GUMBEL_OF_BITS(bits), rtol=1e-5, atol=1e-6)


def test_bits_belong_to_a_row_and_an_id():
    key = jax.random.key(5)
    ids, dtype = jnp.arange(20), jnp.dtype("float32")

    @jax.jit
    def draw(key):
        words = noise.row_words(key, 10)
        streams = [
            noise.gumbel(words, noise.NODES, ids, dtype),
            noise.paired_gumbel(words, noise.BLOCKS, ids, dtype),
            noise.paired_gumbel(words, noise.CLASSES, ids, dtype),
        ]
        part = noise.gumbel(words[3:5], noise.NODES, ids[7:9], dtype)
        return words, noise.row_words(key, 6, first=4), jnp.stack(streams), part

    words, last, drawn, part = map(np.asarray, draw(key))
    np.testing.assert_array_equal(words[4:], last)
    assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(drawn[0][3:5, 7:9], part)


def test_a_row_has_its_place_beside_the_noise_of_any_blocks():
    dtype = jnp.dtype("float32")

    @jax.jit
    def draw(key, attempt):
        words = noise.row_words(key, 5)
        place = noise.uniform(words, dtype, attempt)
        blocks = (3, jnp.asarray([2, 700]))
        drawn = [noise.block_gumbel(words, n, dtype, attempt) for n in blocks]
        return place, drawn

    known = []
    for attempt in (0, 2):
        place, drawn = draw(jax.random.key(5), attempt)
        for gumbel, beside, other in drawn:
            np.testing.assert_array_equal(beside[0], place[0])
            np.testing.assert_array_equal(beside[1], place[1])
            assert not np.isin(other[0], place[0]).any()
            known.append(gumbel)
    np.testing.assert_array_equal(known[0][:, 2], known[1][:, 0])
    every = np.concatenate([known[0], known[1][:, 1:], known[2], known[3][:, 1:]], 1)
    assert len(np.unique(every)) == every.size


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_kind(impl):
    key = jax.random.key(0, impl=impl)
    words = [noise.row_words(k, 3) for k in jax.random.split(key)]
    assert (np.asarray(words[0]) != np.asarray(words[1])).any()
    with pytest.raises(ValueError, match="a single key"):
        noise.row_words(jax.random.split(key, 3), 3)


def test_no_two_rows_of_neighbouring_seeds_are_alike():
    """Seeds that count in either half of their 64 bits."""
    halves = [(high, low) for high in range(30) for low in range(30)]
    keys = jax.random.wrap_key_data(jnp.asarray(halves, jnp.uint32))
    words = jax.vmap(lambda key: noise.row_words(key, 1000))(keys)
    np.testing.assert_array_equal(words[7], noise.row_words(keys[7], 1000))
    words = np.asarray(words).reshape(-1, 2)
    assert len(np.unique(words, axis=0)) == len(words)


def test_a_key_that_was_used_is_told_from_a_new_one():
    with jax.debug_key_reuse(True):
        key = jax.random.key(3)
        words = noise.row_words(key, 3)
        with pytest.raises(jax.errors.KeyReuseError):
            noise.row_words(key, 3)
    np.testing.assert_array_equal(words, noise.row_words(jax.random.key(3), 3))


def test_every_bit_is_fair(bits):
    ones = np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1).sum(0, int)
    assert_normal((2 * ones - bits.size) / np.sqrt(bits.size))


def test_words_are_uniform(bits):
    for shift in (0, 8, 16, 20):
        counts = np.bincount((bits >> shift).ravel() & 0xFFF, minlength=4096)
        assert RARE < stats.chisquare(counts).pvalue < 1 - RARE


@pytest.mark.parametrize("lag", [1, 2, 127, 128, 129, 256, 4096])
def test_no_correlation_along_classes(bits, lag):
    """128 classes on is the other word of the same encryption."""
    u = bits / 2**32 - 0.5
    products = (u[:, lag:] * u[:, :-lag]).mean() * 12
    differing = np.bitwise_count(bits[:, lag:] ^ bits[:, :-lag]).mean() - 16
    number = u[:, lag:].size
    assert_normal(np.array([products, differing / np.sqrt(8)]) * np.sqrt(number))


@pytest.mark.parametrize("lag", [1, 2, 128])
def test_no_correlation_between_rows(bits, lag):
    u = bits / 2**32 - 0.5
    products = (u[lag:] * u[:-lag]).mean() * 12
    differing = np.bitwise_count(bits[lag:] ^ bits[:-lag]).mean() - 16
    number = u[lag:].size
    assert_normal(np.array([products, differing / np.sqrt(8)]) * np.sqrt(number))


def test_pairs_and_triples_of_neighbours_are_uniform(bits):
    high = (bits >> 26).astype(np.int64)
    along = [high[:, i : CLASSES - 2 + i].ravel() for i in range(3)]
    across = [high[i : ROWS - 2 + i].ravel() for i in range(3)]
    for a, b, c in (along, across):
        pairs = np.bincount(a * 64 + b, minlength=4096)
        triples = np.bincount(((a >> 2) * 16 + (b >> 2)) * 16 + (c >> 2))
        for counts in (pairs, triples):
            assert RARE < stats.chisquare(counts).pvalue < 1 - RARE


def test_birthday_spacings(bits):
    """Marsaglia's test: how many spacings between sorted birthdays are equal."""
    for size, shift, width in ((4096, 0, 32), (512, 0, 24), (512, 8, 24)):
        days = bits.reshape(-1, size).astype(np.int64) >> shift & (2**width - 1)
        spacings = np.sort(np.diff(np.sort(days, axis=1), axis=1), axis=1)
        repeats = (np.diff(spacings, axis=1) == 0).sum()
        each = size * (size - 1) * (size - 2) / (4 * 2**width)
        expected = each * len(days)
        assert_normal((repeats - expected) / np.sqrt(expected))


def test_ranks_of_bit_matrices(bits):
    """The share of 32 × 32 matrices over two elements of rank 32, 31 and less."""
    rows = bits.reshape(-1, 32).copy()
    rank = np.zeros(len(rows), int)
    for column in range(32):
        has = (rows >> column & 1).astype(bool)
        pivot = has.argmax(1)
        found = has.any(1)
        rank += found
        value = np.where(found, rows[np.arange(len(rows)), pivot], 0)
        rows[np.arange(len(rows)), pivot] = np.where(
            found, 0, rows[np.arange(len(rows)), pivot]
        )
        rows ^= np.where(rows >> column & 1, value[:, None], 0).astype(rows.dtype)
    share = np.array([0.2887880951, 0.5775761902, 0.1336357147])
    counts = [(rank == 32).sum(), (rank == 31).sum(), (rank < 31).sum()]
    assert stats.chisquare(counts, share * len(rank)).pvalue > RARE


def test_a_changed_bit_changes_half_of_all(generator):
    """Of the key of a row, and of the counter."""
    rng = np.random.default_rng(0)
    key0, key1, counters = rng.integers(0, 2**32, (3, 512), dtype=np.uint32)
    stream = int(rng.integers(0, 2**32))

    def encrypt(key0, key1, stream, counters):
        words = jnp.asarray(key0), jnp.asarray(key1)
        return np.stack(
            noise.pair_bits(words, stream, jnp.asarray(counters), generator)
        )

    start = (key0, key1, stream, counters)
    first = encrypt(*start)
    for word in range(4):
        for bit in range(32):
            flip = 1 << bit if word == 2 else np.uint32(1 << bit)
            other = encrypt(*start[:word], start[word] ^ flip, *start[word + 1 :])
            changed = np.bitwise_count(other ^ first).sum()
            assert abs(changed / (32 * first.size) - 0.5) < 0.02, (word, bit)


def test_consecutive_seeds_are_unrelated():
    @jax.jit
    def words_of(seeds):
        keys = jax.vmap(jax.random.key)(seeds)
        return jax.vmap(lambda key: noise.row_words(key, ROWS // 64))(keys)

    words = words_of(np.arange(64)).reshape(-1, 2)
    drawn = first_bits(words, CLASSES).reshape(64, -1)
    u = drawn / 2**32 - 0.5
    every = np.asarray(np.corrcoef(u))
    correlation = every[np.triu_indices(64, 1)] * np.sqrt(u.shape[1])
    assert np.abs(correlation).max() < stats.norm.isf(RARE / 2 / correlation.size)


def test_places_keep_all_bits_at_both_ends():
    """The nearest of so many places lie some 2⁻²⁰ from an end."""
    shape = (256, 4096)
    words = jax.jit(noise.row_words, static_argnums=1)(jax.random.key(4), 2**20)
    distance, from_one = jax.jit(noise.uniform, static_argnums=1)(
        words, jnp.dtype("float32")
    )
    columns = words[:, 0].reshape(shape), words[:, 1].reshape(shape)
    bits, _ = noise.pair_bits(columns, noise.ROWS, jnp.zeros(shape, jnp.uint32))
    bits = np.asarray(bits).reshape(-1)
    middles = (bits.astype(np.float64) + 0.5) / 2**32
    truth = np.minimum(middles, 1 - middles)
    assert max(middles.min(), 1 - middles.max()) < 2**-17
    np.testing.assert_allclose(distance, truth, rtol=1.2e-7)
    np.testing.assert_array_equal(from_one, middles > 0.5)


@OF_BITS
def test_noise_is_finite_and_monotonic_at_the_edges_of_the_bits(of_bits):
    edges = jnp.asarray([[0, 1, 2**31, 2**32 - 2, 2**32 - 1]], jnp.uint32)
    drawn = of_bits(edges)
    assert np.isfinite(drawn).all() and drawn.max() > 22 and drawn.min() > -3
    assert (np.diff(np.asarray(drawn, np.float32)) <= 0).all()


@OF_BITS
def test_noise_is_that_of_its_uniform_number(of_bits):
    scattered = 2.0 ** np.random.default_rng(0).uniform(0, 32, 20000)
    bits = np.concatenate([np.arange(3000), 2**31 + np.arange(3000), scattered])
    bits = np.concatenate([bits, 2**32 - 1 - bits]).astype(np.uint32)
    middles = (bits.astype(np.float32) + np.float32(0.5)) / np.float32(2**32)
    middles = np.minimum(middles, np.float32(1 - 2**-24))
    truth = -np.log(-np.log1p(-middles.astype(np.float64)))
    np.testing.assert_allclose(of_bits(bits), truth, rtol=4e-7, atol=4e-7)


@OF_BITS
@pytest.mark.parametrize("power", [1, 2, 8, 16, 24, 28, 30])
def test_tails_have_their_probability(of_bits, power):
    """How many of all 2³² words give noise beyond a bound, found by bisection."""
    bound = -np.log(-np.log1p(-(2.0**-power)))
    low, high = 0, 2**32  # Large noise comes of small words.
    while low < high:
        middle = (low + high) // 2
        if float(of_bits(np.uint32(middle))) > bound:
            low = middle + 1
        else:
            high = middle
    assert low / 2**32 == pytest.approx(2.0**-power, rel=1e-5, abs=2.0**-32)


def test_gumbel_has_the_right_quantiles(generator):
    drawn = all_noise(noise.row_words(jax.random.key(1), ROWS), generator)
    drawn = np.sort(np.asarray(drawn, np.float64).ravel())
    uniform = np.exp(-np.exp(-drawn))
    expected = (np.arange(drawn.size) + 0.5) / drawn.size
    # Kolmogorov-Smirnov: beyond 1.95 / √n once in a thousand.
    assert np.abs(uniform - expected).max() < 1.95 / np.sqrt(drawn.size)


@pytest.mark.parametrize("classes", [1, 127, 128, 16384, 16385, 131072, 10**7])
def test_blocks_are_about_the_square_root(classes):
    size = block_sampling.block_size(classes)
    assert size >= 128 and size & (size - 1) == 0
    assert size == 128 or classes**0.5 <= size < 2 * classes**0.5 + 1


@pytest.mark.parametrize("columns", [5, 40])
def test_inversion_never_leaves_the_classes_with_mass(columns):
    """As a CPU inverts, and as all else does."""
    targets = jnp.asarray([0, 0.99, 1.0, 2.9, 3.0, 9.0], jnp.float32)
    weights = np.zeros((6, columns), "float32")
    weights[:, 1], weights[:, columns - 2] = 1, 2
    ways = (block_sampling.invert, block_sampling._invert_by_groups)
    for found in jax.jit(lambda *given: [way(*given) for way in ways])(
        weights, targets
    ):
        last = columns - 2
        np.testing.assert_array_equal(found, [1, 1, last, last, last, last])
    rng = np.random.default_rng(0)
    weights = rng.random((500, columns)) ** 9 * (rng.random((500, columns)) < 0.5)
    weights[:, 2] = 1e-3
    until = np.cumsum(weights, axis=1)
    targets = rng.random(500) * until[:, -1]
    expected = (until <= targets[:, None]).sum(1)
    for way in ways:
        found = way(jnp.asarray(weights, "float32"), jnp.asarray(targets, "float32"))
        assert (found != expected).mean() < 0.01
