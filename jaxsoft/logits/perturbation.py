"""Logits with Gumbel noise of their own, for each row and class."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import noise, numerics
from jaxsoft._core.by_platform import by_platform
from jaxsoft._core.numerics import is_zero
from jaxsoft.logits.centre import centre
from jaxsoft.logits.rows import Rows, in_tiles, tile_rows
from jaxsoft.logits.softmax import exponentials

__all__ = ["argmax_one_hot", "gumbel", "perturbed", "relaxed", "relaxed_and_one_hot"]


Arrays = TypeVar("Arrays")
Result = TypeVar("Result")


def _by_platform(
    function: Callable[[bool, Arrays], Result],
    arrays: Arrays,
    num_rows: int,
    num_classes: int,
) -> Result:
    """Calls `function(fused, arrays)`: in tiles of rows on a CPU, else all at once.

    The bits of a whole array would pass through a CPU's memory after every four rounds
    of the cipher; those of a tile stay in cache. Other platforms compute them in
    registers.
    """

    def tiled(arrays):
        apart = functools.partial(function, False)
        return in_tiles(apart, arrays, num_rows, tile_rows(num_classes))

    whole = functools.partial(function, True)
    return by_platform(arrays, cpu=tiled, default=whole)


def _noisy(
    generator: noise.Generator, fused: bool, words: jax.Array, rows: Rows
) -> jax.Array:
    """Returns [R, V] x - max x plus noise, -inf at dropped classes.

    Centred first: beside an offset of 10⁶ noise would lose most of its bits.
    """
    x = rows.logits.astype(numerics.compute_dtype(rows.logits))
    drawn = noise.first_gumbel(
        words, noise.CLASSES, x.shape[1], x.dtype, generator, fused=fused
    )
    return centre(x, 1.0, rows.where, 1).values + drawn


def _one_hot(noisy: jax.Array) -> jax.Array:
    """Returns 1 at each row's largest entry, the lowest of equals; NaN from NaN."""
    best = jnp.argmax(noisy, axis=1, keepdims=True)
    classes = lax.broadcasted_iota(best.dtype, noisy.shape, 1)
    top = jnp.max(noisy, axis=1, keepdims=True)
    chosen = (classes == best) & (top != -jnp.inf)
    return jnp.where(jnp.isnan(top), top, chosen.astype(noisy.dtype))


def _softmax(noisy: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns softmax(noisy / τ), at τ = 0 the lowest of equals alone."""
    weights, total = exponentials(centre(noisy, tau, None, 1), 1)
    p = weights / total
    if isinstance(tau, float) and tau >= jnp.finfo(noisy.dtype).tiny:
        return p
    return jnp.where(is_zero(tau, noisy.dtype), _one_hot(noisy), p)


def relaxed(
    static_tau: float | None, generator: noise.Generator, words: jax.Array, rows: Rows
) -> jax.Array:
    """Returns softmax((x + noise) / τ), [R, V], in the dtype of the logits."""

    def tile(fused, arrays):
        words, rows = arrays
        noisy = _noisy(generator, fused, words, rows)
        return _softmax(noisy, rows.temperature(static_tau)).astype(rows.logits.dtype)

    return _by_platform(tile, (words, rows), *rows.logits.shape)


def argmax_one_hot(
    generator: noise.Generator, words: jax.Array, rows: Rows
) -> jax.Array:
    """Returns the one-hot argmax of x + noise, [R, V], in the dtype of the logits."""

    def tile(fused, arrays):
        words, rows = arrays
        drawn = _one_hot(_noisy(generator, fused, words, rows))
        return drawn.astype(rows.logits.dtype)

    return _by_platform(tile, (words, rows), *rows.logits.shape)


def relaxed_and_one_hot(
    static_tau: float | None, generator: noise.Generator, words: jax.Array, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """Returns `relaxed` and `argmax_one_hot` of the same noise."""

    def tile(fused, arrays):
        words, rows = arrays
        noisy = _noisy(generator, fused, words, rows)
        dtype = rows.logits.dtype
        p = _softmax(noisy, rows.temperature(static_tau)).astype(dtype)
        return p, _one_hot(noisy).astype(dtype)

    return _by_platform(tile, (words, rows), *rows.logits.shape)


def perturbed(generator: noise.Generator, words: jax.Array, rows: Rows) -> jax.Array:
    """Returns x - max x + noise, [R, V], -inf at dropped classes."""

    def tile(fused, arrays):
        return _noisy(generator, fused, *arrays)

    return _by_platform(tile, (words, rows), *rows.logits.shape)


def gumbel(
    generator: noise.Generator, words: jax.Array, num_classes: int, dtype: jnp.dtype
) -> jax.Array:
    """Returns noise alone, [R, V]."""

    def tile(fused, words):
        return noise.first_gumbel(
            words, noise.CLASSES, num_classes, dtype, generator, fused=fused
        )

    return _by_platform(tile, words, words.shape[0], num_classes)
