"""Random bits: the cipher, its range, and who gets which."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import blocks, noise


def test_bits_are_the_cipher_of_stream_and_id_under_the_key_of_the_row():
    words = jnp.asarray([[1, 2], [0x13198A2E, 0x03707344]], jnp.uint32)
    ids = jnp.asarray([5, 0x85A308D3], jnp.uint32)
    drawn = noise._bits(words, 7, ids)
    for row in range(2):
        for column in range(2):
            count = jnp.asarray([7, ids[column]], jnp.uint32)
            truth = jax.extend.random.threefry_2x32(words[row], count)
            assert drawn[row, column] == truth[0]


def test_bits_belong_to_a_row_and_an_id():
    key = jax.random.key(5)
    words = noise.row_words(key, 10)
    np.testing.assert_array_equal(words[4:], noise.row_words(key, 6, first=4))
    ids = jnp.arange(20)
    whole = noise.gumbel(words, noise.CLASSES, ids, jnp.float32)
    part = noise.gumbel(words[3:5], noise.CLASSES, ids[7:9], jnp.float32)
    np.testing.assert_array_equal(whole[3:5, 7:9], part)
    other = noise.gumbel(words, noise.BLOCKS, ids, jnp.float32)
    assert (np.asarray(other) != np.asarray(whole)).all()
    assert len(np.unique(np.asarray(whole))) == whole.size


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_kind(impl):
    key = jax.random.key(0, impl=impl)
    words = [noise.row_words(k, 3) for k in jax.random.split(key)]
    assert (np.asarray(words[0]) != np.asarray(words[1])).any()


def test_noise_is_finite_at_the_edges_of_the_bits(monkeypatch):
    edges = jnp.asarray([[0, 1, 2**31, 2**32 - 2, 2**32 - 1]], jnp.uint32)
    monkeypatch.setattr(noise, "_bits", lambda *_: edges)
    for dtype in (jnp.float32,):
        drawn = noise.gumbel(jnp.zeros((1, 2), jnp.uint32), 0, jnp.arange(5), dtype)
        assert np.isfinite(drawn).all() and drawn.max() > 22 and drawn.min() > -3
        assert (np.diff(np.asarray(drawn)) <= 0).all()


def test_gumbel_has_the_right_quantiles():
    words = noise.row_words(jax.random.key(1), 64)
    drawn = noise.gumbel(words, noise.CLASSES, jnp.arange(4096), jnp.float32)
    drawn = np.sort(np.asarray(drawn, np.float64).ravel())
    uniform = np.exp(-np.exp(-drawn))
    expected = (np.arange(drawn.size) + 0.5) / drawn.size
    # Kolmogorov-Smirnov: beyond 1.95 / √n once in a thousand.
    assert np.abs(uniform - expected).max() < 1.95 / np.sqrt(drawn.size)


@pytest.mark.parametrize("classes", [1, 127, 128, 16384, 16385, 131072, 10**7])
def test_blocks_are_about_the_square_root(classes):
    size = blocks.block_size(classes)
    assert size >= 128 and size & (size - 1) == 0
    assert size == 128 or classes**0.5 <= size < 2 * classes**0.5 + 1


def test_inversion_never_leaves_the_classes_with_mass():
    weights = jnp.asarray([[0.0, 1.0, 0.0, 2.0, 0.0]])
    for target, truth in ((0, 1), (0.99, 1), (1.0, 3), (2.9, 3), (3.0, 3), (9.0, 3)):
        assert blocks.invert(weights, jnp.asarray([target], jnp.float32))[0] == truth
