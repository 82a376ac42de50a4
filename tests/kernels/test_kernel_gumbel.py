"""The kernels for Gumbel-softmax in JAX's interpreters: the noise that XLA draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._core import exact_sum, noise
from jaxsoft._core.registry import Gpu
from jaxsoft.kernels import chips
from jaxsoft.kernels.rows.mosaic_gpu import call as mosaic_gpu
from jaxsoft.kernels.rows.mosaic_gpu import gumbel
from jaxsoft.kernels.rows.mosaic_gpu.call import Ring
from jaxsoft.kernels.rows.mosaic_tpu import call as mosaic_tpu
from jaxsoft.kernels.rows.mosaic_tpu.call import RowBlocks
from tests.kernels.rows import KERNELS, ROWS, both, close, interpreted, logits


@pytest.fixture(autouse=True, scope="module")
def apart():
    """Computes ciphers in parts: XLA's CPU compiler takes long for one piece."""
    whole = noise._threefry

    def threefry(keys, counters, rounds, stage=None):
        del stage
        return whole(keys, counters, rounds, 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_threefry", threefry)
        yield


@pytest.fixture
def take(monkeypatch):
    """Has kernels take blocks, or a ring with all rows in one block of threads."""

    def take(chosen):
        def choose(*args):
            keeps = args[-1] is True and getattr(chosen, field)
            return dataclasses.replace(chosen, **{field: keeps})

        module, name, field = mosaic_gpu, "choose_ring", "keeps_noise"
        if isinstance(chosen, RowBlocks):
            module, name, field = mosaic_tpu, "choose_row_blocks", "keeps_perturbed"
        monkeypatch.setattr(module, name, choose)

    monkeypatch.setattr(chips, "gpus", lambda: [Gpu("9.0", 1)])
    jax.clear_caches()
    yield take
    jax.clear_caches()


def draw(implementation, x, tau, hard=False, **options):
    return jaxsoft.gumbel_softmax(
        jax.random.key(7), x, tau, hard=hard, implementation=implementation, **options
    )


def test_spans_and_pairs_have_the_bits_of_each_class():
    words = noise.row_words(jax.random.key(3), 5)
    of_all = jax.jit(noise._first_bits, static_argnums=(1, 2, 3, 4))
    bits = of_all(words, noise.CLASSES, 900, 13, 4)
    span = jax.jit(noise.span_bits, static_argnums=(1, 3, 4))(
        (words[:, :1], words[:, 1:]), noise.CLASSES, 512, 388, "threefry13"
    )
    np.testing.assert_array_equal(span, bits[:, 512:])
    counters = 128 + jnp.arange(128, dtype="uint32")
    pair = jax.jit(noise.pair_bits, static_argnums=(1, 3))(
        (words[4, 0], words[4, 1]), noise.CLASSES, counters, "threefry13"
    )
    np.testing.assert_array_equal(jnp.concatenate(pair), bits[4, 256:512])


def test_noise_of_bits_is_that_of_xla():
    """Also by the GPU's series, on both sides of where it takes over."""
    some = jax.random.bits(jax.random.key(0), (5000,))
    middle = np.arange(2**30 - 500, 2**30 + 500, dtype="uint32")
    edges = np.asarray([0, 2**16 - 1, 2**24 + 1, 2**32 - 1], "uint32")
    powers = np.uint32(2) ** np.arange(32, dtype="uint32")
    bits = np.concatenate([some, middle, edges, powers])

    @jax.jit
    def drawn(bits):
        wanted = noise._to_gumbel(bits, jnp.dtype("float32"))
        return wanted, noise.gumbel_of_bits(bits), gumbel.gumbel(bits)

    wanted, found, of_gpu = drawn(bits)
    np.testing.assert_allclose(found, wanted, 1e-6, 1e-7)
    np.testing.assert_allclose(of_gpu, wanted, 1e-6, 3e-7)


def test_sums_and_what_rounding_took_are_exact():
    rng = np.random.default_rng(0)
    scales = np.resize([1e-3, 1, 30, 1e4, 1e9], 4000)
    x = (rng.standard_normal(4000) * scales).astype("float32")
    y = rng.gumbel(size=4000).astype("float32")
    total, rest = (
        np.asarray(a, "float64") for a in exact_sum.exact_sum(*map(jnp.asarray, (x, y)))
    )
    np.testing.assert_array_equal(total + rest, x.astype("float64") + y)
    assert (rest[scales == 1e4] != 0).mean() > 0.9
    ends = jnp.asarray([-jnp.inf, jnp.inf, jnp.nan, -3.4e38], "float32")
    total, rest = exact_sum.exact_sum(ends, jnp.full(4, 5.0))
    np.testing.assert_array_equal(total, ends)
    np.testing.assert_array_equal(rest, [0, 0, 0, 5])
    below = exact_sum.gap(total, rest, *exact_sum.LOWEST)
    assert below[0] == -jnp.inf and not np.isnan(below[3])


def test_tpus_draw_what_xla_draws():
    """Values and gradients at the limits too, and of rows with NaN or no class."""
    x = logits()
    tau = jnp.asarray(np.resize([0.3, 1, 2, 0, np.inf], (ROWS, 1)), "float32")
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), "f")

    def function(implementation, x, tau):
        hard, back = jax.vjp(lambda *a: draw(implementation, *a, hard=True), x, tau)
        return hard, draw(implementation, x, tau), back(cotangent)

    theirs, mine = both(function, x, tau)
    close(theirs, mine, "float32")
    np.testing.assert_array_equal(theirs[0], mine[0])


BLOCKS = {
    # Two of 512 classes, drawn twice; and a block that has no room for noise.
    "streamed": (600, "bfloat16", RowBlocks(16, 512, 16, 2**20, chunk=256)),
    "whole": (257, "float32", RowBlocks(8, 257, 8, 2**20, chunk=256)),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_tpus_draw_again_what_vmem_does_not_hold(case, take):
    classes, dtype, blocks = BLOCKS[case]
    take(blocks)
    tau = jnp.asarray(np.resize([0.3, 2, 0, 1, np.inf, 1e-6], (ROWS, 1)), "float32")
    if case == "whole":
        tau = 0.7

    def function(implementation, x):
        hard = case == "whole"
        return draw(implementation, x, tau, hard=hard, generator="threefry13")

    close(*both(function, logits(dtype, classes=classes)), dtype)


# The first keeps the noise of 5 lines, of which the last chunk has one; the second
# reads what two slots do not hold, and draws, again; the third has a line without its
# pair; of the last, two blocks have one and two chunks.
RINGS = {
    "kept": (
        600,
        "float32",
        Ring(lines=5, chunk=2, slots=3, blocks=1, keeps_noise=True),
    ),
    "streamed": (1000, "bfloat16", Ring(lines=8, chunk=2, slots=2, blocks=1)),
    "odd": (
        300,
        "float16",
        Ring(lines=3, chunk=3, slots=1, blocks=1, keeps_noise=True),
    ),
    "shared": (
        600,
        "float32",
        Ring(5, chunk=2, slots=2, blocks=1, keeps_noise=True, cluster=2),
    ),
}


@pytest.mark.parametrize("case", RINGS)
def test_gpus_draw_what_xla_draws(case, take):
    """With gradients, at the limits, hard, and one row after another."""
    classes, dtype, ring = RINGS[case]
    take(ring)
    x = logits(classes=classes)[jnp.array([0, 1, 7, 3, 2, 5, 4])].astype(dtype)
    tau = jnp.asarray([[0.3], [1e-5], [0], [1], [np.inf], [0.5], [2]], "float32")
    mask = np.random.default_rng(2).uniform(size=x.shape) < 0.7
    mask[3] = True

    def kept(implementation, x, tau):
        y, back = jax.vjp(lambda *a: draw(implementation, *a), x, tau)
        return y, back(jnp.sin(jnp.where(jnp.isfinite(x), x, 0)))

    def odd(implementation, x, tau):
        del tau
        options = {"where": mask, "generator": "threefry13"}
        return draw(implementation, x, 0.7, hard=True, **options)

    function = {"kept": kept, "odd": odd}.get(case, draw)
    close(*both(function, x, tau, kernel="mosaic_gpu"), dtype)


@pytest.mark.parametrize(
    "kernel, chosen",
    [
        ("mosaic_tpu", RowBlocks(8, 512, 8, 2**20, chunk=256)),
        ("mosaic_gpu", Ring(lines=5, chunk=2, slots=2, blocks=1)),
        ("mosaic_gpu", RINGS["shared"][2]),
    ],
)
def test_noise_beside_a_large_offset_decides(kernel, chosen, take):
    """The larger one is drawn of two sums that a float32 does not tell apart."""
    take(chosen)
    # These five classes are seen by one thread of a GPU.
    x = np.where(np.arange(600) % 128 == 3, 2.0**23, -np.inf)
    x = np.tile(x, (16, 1))

    def function(implementation, x):
        return draw(implementation, x, hard=True, tau=0.5)

    theirs, mine = both(function, jnp.asarray(x, "float32"), kernel=kernel)
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "kernel, chosen",
    [
        ("mosaic_tpu", RowBlocks(8, 256, 8, 2**20, chunk=256)),
        ("mosaic_gpu", Ring(lines=3, chunk=2, slots=2, blocks=1)),
    ],
)
def test_the_lowest_of_equals_is_drawn(kernel, chosen, take, monkeypatch):
    """As τ falls to 0; without noise, which has no equals."""
    for module, name in ((noise, "gumbel_of_bits"), (gumbel, "gumbel")):
        monkeypatch.setattr(module, name, lambda bits: jnp.zeros(bits.shape))
    take(chosen)
    x = jnp.asarray(np.random.default_rng(3).integers(-2, 2, (4, 300)), "float32")
    x = x.at[3, :257].set(-jnp.inf)
    with interpreted(kernel):
        drawn = jax.jit(functools.partial(draw, kernel))(x, jnp.zeros((4, 1)))
        np.testing.assert_array_equal(drawn, np.eye(300)[np.argmax(x, axis=1)])


def test_noise_is_kept_where_it_fits_beside_its_row():
    for itemsize, kept, drawn in ((4, 196608, 196609), (2, 262144, 262145)):
        for classes in (1, 130, 1000, 28673, 131072, kept, drawn, 10**7):
            ring = mosaic_gpu.choose_ring(classes, itemsize, 1, True)
            assert ring.keeps_noise == (classes <= kept)
            slot = ring.chunk * 128 * (itemsize + 4 * ring.keeps_noise)
            assert ring.blocks * (ring.slots * slot + 2**10) <= 227 * 2**10
            assert ring.chunks == 1 or ring.chunk % 8 == 0
    assert not mosaic_gpu.choose_ring(1000, 4, 1).keeps_noise
    with pytest.raises(ValueError, match="`slots` must be 13 to keep noise, got 2"):
        Ring(lines=100, chunk=8, slots=2, blocks=1, keeps_noise=True)
    for classes, keeps, whole in ((262144, 1, 1), (350000, 0, 1), (10**6, 0, 0)):
        blocks = mosaic_tpu.choose_row_blocks(99, classes, (4, 4), 64 * 2**20, True)
        assert (blocks.keeps_perturbed, blocks.classes == classes) == (keeps, whole)
        # Ciphers are of 256 classes.
        assert whole or blocks.classes % blocks.chunk == blocks.chunk % 256 == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_gumbel_softmax_errors(kernel):
    key, x = jax.random.key(0), jnp.zeros((2, 128))
    with pytest.raises(NotImplementedError, match='must be None or "xla" on cpu'):
        jaxsoft.gumbel_softmax(key, x, implementation=kernel)
    function = functools.partial(jaxsoft.gumbel_softmax, implementation=kernel)
    with pytest.raises(NotImplementedError, match="must have dtype float32 or bfl"):
        jax.eval_shape(function, key, jax.ShapeDtypeStruct((2, 8), "float8_e5m2"))
    assert jax.eval_shape(function, key, x).shape == x.shape
