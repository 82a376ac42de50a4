"""Tiles of logits merged into running statistics, inside a Mosaic GPU kernel.

As `Statistics.merge`, but in the registers of a warpgroup, whose threads share the rows
of an accumulator as the matrix unit leaves them: the columns of a tile are first folded
into a few that need nothing of other threads, which then meet once a tile.
"""

import functools
import math
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core.numerics import finite_peak
from jaxsoft.kernels.layer.mosaic_gpu.plan import GROUP, GpuPlan
from jaxsoft.kernels.typing import Factors, Scalar

__all__ = [
    "CHUNK",
    "RowFacts",
    "Running",
    "columns",
    "initial_statistics",
    "iota",
    "layout",
    "merge_tile",
    "tanh",
    "tile_groups",
]

# The columns that are folded at a time: 4 registers a thread for 64 rows, 8 for 128.
CHUNK = 8
# A finite number in place of -inf: its product with 0 is 0, and 2 to its power is 0.
_LOWEST = -1e4
# A number above every column, to which a column can be added without overflow.
_NO_COLUMN = 2**30
# tanh(x) = x + x³ P(x²) below _SMALL; from a least-squares fit of relative errors.
_SMALL = 0.55
_TANH = (-0.333333147, 0.133324806, -0.0538405286, 0.021020595, -0.00619878127)


class Running(NamedTuple):
    """Statistics of the tiles so far, by the names of `Statistics`; None if not wanted.

    All are [R] in a kernel, float32 but for the integers `number` and `argmax`.
    """

    max: jax.Array
    sum: jax.Array
    label: jax.Array | None
    gap: jax.Array | None
    number: jax.Array | None
    weighted: jax.Array | None
    argmax: jax.Array | None


class RowFacts(NamedTuple):
    """What a computing warpgroup knows of its rows; None where there is none.

    Attributes:
      label: [R] int32.
      factors: a, b and c of `GpuInputs`, [R] or floats each.
      layout: the name of how threads share the accumulator.
    """

    label: jax.Array | None
    factors: Factors
    layout: str

    def centred(self, u: jax.Array, peak: jax.Array) -> jax.Array:
        """Returns (u - peak) / τ in base 2, of [R, B] or of [R]."""
        before, *others = (columns(a, u.shape) for a in self.factors)
        peak = columns(peak, u.shape)
        c = u - peak if before is None else u * before - peak * before
        for factor in others:
            c = c if factor is None else c * factor
        return c


def initial_statistics(plan: GpuPlan) -> Running:
    """Returns the statistics of rows before their first tile, [R] each."""

    def full(value: ArrayLike, dtype: DTypeLike = jnp.float32) -> jax.Array:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        shape = (plan.blocks.rows,)
        of_rows = layout(plan.blocks.layout, 1)
        return plgpu.layout_cast(jnp.full(shape, value, dtype), of_rows)

    return Running(
        max=full(-jnp.inf),
        sum=full(0),
        label=full(-jnp.inf) if plan.labels else None,
        gap=full(0) if plan.mean else None,
        number=full(0, jnp.int32) if plan.mean else None,
        weighted=full(0) if plan.expected else None,
        argmax=full(0, jnp.int32) if plan.argmax else None,
    )


def merge_tile(
    first: Scalar, chunks: list[jax.Array], running: Running, row: RowFacts
) -> Running:
    """Merges a tile of logits into the running statistics.

    Args:
      first: the tile's first class.
      chunks: its logits, `CHUNK` columns each.
      running: the statistics of the tiles before, [R] each.
      row: what is known of the rows.

    Returns:
      The statistics with this tile.
    """
    tile_max = functools.reduce(jnp.maximum, chunks).max(axis=1)
    new = jnp.maximum(running.max, tile_max)
    peak = finite_peak(new)
    back = row.centred(running.max, peak)
    rescale = jnp.exp2(back)
    label, argmax = running.label, running.argmax
    gap, number, weighted = running.gap, running.number, running.weighted
    if argmax is not None:
        lowest = _lowest(chunks, tile_max, row.layout) + first
        argmax = jnp.where(tile_max > running.max, lowest, argmax)
    if label is not None:
        assert row.label is not None
        label = jnp.maximum(label, _pick(chunks, row.label - first, row.layout))
    if gap is not None and number is not None:
        moved = jnp.where(number == 0, 0.0, running.max - peak)
        gap = gap + number.astype(jnp.float32) * moved
        gaps, counted = _gaps(chunks, peak)
        gap, number = gap + gaps, number + counted
    sums, terms = _sums_of_exponentials(chunks, peak, row, weighted is not None)
    if weighted is not None:
        assert terms is not None
        moved = weighted + running.sum * jnp.maximum(back, _LOWEST)
        weighted = rescale * moved + terms.sum(axis=1)
    return Running(
        max=new,
        sum=rescale * running.sum + sums.sum(axis=1),
        label=label,
        gap=gap,
        number=number,
        weighted=weighted,
        argmax=argmax,
    )


def tile_groups(
    chunks: list[jax.Array], row: RowFacts
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the maximum and the sum of exponentials of each group of a tile, [R]."""
    groups, size = [], GROUP // CHUNK
    for first in range(0, len(chunks), size):
        group = chunks[first : first + size]
        largest = functools.reduce(jnp.maximum, group).max(axis=1)
        peak = finite_peak(largest)
        sums, _ = _sums_of_exponentials(group, peak, row, False)
        groups.append((largest, sums.sum(axis=1)))
    return groups


def _sums_of_exponentials(
    chunks: list[jax.Array], peak: jax.Array, row: RowFacts, expected: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns Σ 2^c, and Σ 2^c c where it is wanted, of each chunk's column."""
    sums = terms = None
    for u in chunks:
        c = row.centred(u, peak)
        weights = jnp.exp2(c)
        sums = weights if sums is None else sums + weights
        if expected:
            term = weights * jnp.maximum(c, _LOWEST)
            terms = term if terms is None else terms + term
    assert sums is not None
    return sums, terms


def _pick(chunks: list[jax.Array], column: jax.Array, name: str) -> jax.Array:
    """Returns the logits [R] in the given columns of a tile; -inf outside it."""
    picked = None
    for index, u in enumerate(chunks):
        # The offset is subtracted from the label's column: sums of iota and an offset
        # would be kept in registers, one for each column of the tile.
        is_label = iota(u.shape, name) == columns(column - index * CHUNK, u.shape)
        u = jnp.where(is_label, u, -jnp.inf)
        picked = u if picked is None else jnp.maximum(picked, u)
    assert picked is not None
    return picked.max(axis=1)


def _gaps(chunks: list[jax.Array], peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns Σ (u - peak) over the kept classes of a tile, and their number."""
    gaps = counts = 0.0
    for u in chunks:
        kept = u != -jnp.inf
        gaps = gaps + jnp.where(kept, u - columns(peak, u.shape), 0.0)
        counts = counts + jnp.where(kept, 1.0, 0.0)
    assert isinstance(gaps, jax.Array) and isinstance(counts, jax.Array)
    return gaps.sum(axis=1), counts.sum(axis=1).astype(jnp.int32)


def _lowest(chunks: list[jax.Array], tile_max: jax.Array, name: str) -> jax.Array:
    """Returns the lowest column of a tile that reaches its maximum."""
    first = None
    for index, u in enumerate(chunks):
        is_largest = u == columns(tile_max, u.shape)
        column = jnp.where(is_largest, index * CHUNK, _NO_COLUMN)
        first = column if first is None else jnp.minimum(first, column)
    assert first is not None
    return (first + iota(first.shape, name)).min(axis=1)


def tanh(x: jax.Array) -> jax.Array:
    """Returns the tangent to 3e-7 of itself; the hardware's has 11 bits."""
    size = jnp.maximum(x, -x)
    power = jnp.exp2(size * (-2 * math.log2(math.e)))
    large = (1.0 - power) / (1.0 + power)
    square = x * x
    series = jnp.full(x.shape, _TANH[-1], x.dtype)
    for coefficient in _TANH[-2::-1]:
        series = series * square + coefficient
    small = x + x * square * series
    large = jnp.where(x < 0, -large, large)
    return jnp.where(size < _SMALL, small, large)


@overload
def columns(row: jax.Array, shape: tuple[int, ...]) -> jax.Array: ...


@overload
def columns(
    row: float | jax.Array | None, shape: tuple[int, ...]
) -> float | jax.Array | None: ...


def columns(row, shape):
    """Returns [R] repeated for the columns of [R, B]; floats and None as they are."""
    if not isinstance(row, jax.Array) or row.ndim == len(shape):
        return row
    return lax.broadcast_in_dim(row, shape, [0])


def layout(name: str, without: int | None = None) -> Any:
    """Returns how threads share an accumulator, or what is left without an axis."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = getattr(plgpu.Layout, name)
    return layout if without is None else layout.reduce(without)


def iota(shape: tuple[int, ...], name: str) -> jax.Array:
    """Returns the column of every element."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout(name))
