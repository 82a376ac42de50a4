"""Tiles: within the budget, balanced, and covering every class and row once."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxsoft.linear.arguments import default_tile_bytes
from jaxsoft.linear.tiles import Tiling, choose

SIZES = st.integers(1, 300_000)


@given(SIZES, SIZES, st.sampled_from([4, 8]), st.integers(1, 2**28))
@example(17, 73, 4, 4608)
def test_tiles_cover_the_matrix_within_the_budget(rows, classes, itemsize, budget):
    tiles = choose(rows, classes, itemsize, budget)
    assert (tiles.row_blocks - 1) * tiles.block_rows < rows
    assert (tiles.class_blocks - 1) * tiles.block_classes < classes
    assert tiles.row_blocks * tiles.block_rows >= rows
    assert tiles.class_blocks * tiles.block_classes >= classes
    least = 8 * 128 * itemsize
    assert tiles.block_rows * tiles.block_classes * itemsize <= max(budget, least)


@pytest.mark.parametrize(
    "rows, classes, budget, expected",
    [
        (2048, 65536, 2**23, (2048, 1024)),
        (8192, 256000, 2**25, (8192, 1024)),
        (5, 7, 2**23, (5, 7)),
    ],
)
def test_choices_at_known_shapes(rows, classes, budget, expected):
    tiles = choose(rows, classes, 4, budget)
    assert (tiles.block_rows, tiles.block_classes) == expected


@pytest.mark.parametrize(
    "rows, column, expected",
    [
        # Llama 3's head in bfloat16: tokens enough, fewer, and none worth a slice.
        (2048, 8192, (2048, 4096)),
        (1024, 8192, (1024, 8064)),
        (128, 8192, (128, 8064)),
        (65, 8192, (65, 128256)),
        # No slice is too thin for a product, nor one tile of all classes cut.
        (128, 2**20, (128, 512)),
    ],
)
def test_slices_of_the_kernel_stay_small(rows, column, expected):
    tiles = choose(rows, 128256, 4, 2**25, column_bytes=column)
    assert (tiles.block_rows, tiles.block_classes) == expected
    if tiles.class_blocks > 1:
        assert tiles.block_classes * column <= max(2 * 2**25, 512 * column)


def test_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="`block_rows` must lie in"):
        Tiling(4, 4, 5, 1)
    with pytest.raises(ValueError, match="`block_classes` must lie in"):
        Tiling(4, 4, 1, 0)


def test_default_budget_is_bounded():
    assert default_tile_bytes(0) == 4 * 2**20
    assert default_tile_bytes(2**27) == 2**23
    assert default_tile_bytes(2**40) == 32 * 2**20
