"""Plans: within the workspace; tiles that cover every class and row once."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxsoft.linear.plans import Layer, Tiling, choose

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


@pytest.mark.parametrize(
    "rows, classes, mebibytes",
    [(64, 10, 96), (2048, 65536, 128), (8192, 128256, 512)],
)
def test_the_workspace_that_nobody_names(rows, classes, mebibytes):
    layer = Layer(rows, 512, classes)
    assert layer.workspace(None) == mebibytes * 2**20
    assert layer.workspace(12345) == 12345


@pytest.mark.parametrize(
    "layers, given, rows", [(1, None, 232), (2, None, 232), (1, 2**29, 416)]
)
def test_rows_that_are_read_twice(layers, given, rows):
    """Gemma 2's head: a layer has 256 MiB where nobody names a workspace."""
    layer = Layer(4096, 2304, 256_000, kernel_bytes=2, layers=layers)
    stored = layer.rows_read_twice(given)
    assert stored is not None and stored[0] == rows
    taken = layers * rows * 256_000 * 4 + layer.streamed(stored[1])
    assert taken <= (given or layers * 2**28)


@pytest.mark.parametrize(
    "sizes, workspace, options, expected",
    [
        # At the default: chunks where the loss is reduced, else as much as there is
        # room for.
        ((2048, 512, 65536), None, {"reduced": True}, ("chunks", 65536, 416)),
        ((2048, 512, 65536), None, {}, ("keep", 13 * 1024, 0)),
        ((2048, 512, 65536), 2**30, {}, ("keep", 65536, 0)),
        # A chunk of few rows would spend its time on the sum of dkernel.
        ((2048, 512, 65536), 2**24, {"reduced": True}, ("keep", 1024, 0)),
        # There is none where the kernel is frozen.
        (
            (2048, 512, 65536),
            2**24,
            {"reduced": True, "kernel": False},
            ("chunks", 65536, 48),
        ),
        ((2048, 512, 65536), 2**12, {"reduced": True}, ("recompute", 0, 0)),
        ((64, 64, 10), None, {"reduced": True}, ("chunks", 10, 64)),
    ],
)
def test_plans_at_known_sizes(sizes, workspace, options, expected):
    plan = Layer(*sizes).plan(workspace, kept_bytes=4, **options)
    assert (plan.kind, plan.kept_classes, plan.chunk_rows) == expected


def test_what_cannot_be_kept_is_computed_again():
    plan = Layer(2048, 512, 65536).plan(2**40, kept_bytes=None, reduced=True)
    assert (plan.kind, plan.kept_classes) == ("recompute", 0)


# Of the first number of rows, tiles are narrower than of the second.
@example(2065, 1, 2239, 14417920, 8, 2, True)
@given(
    SIZES,
    st.integers(1, 20_000),
    SIZES,
    st.integers(2**22, 2**36),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 2),
    st.booleans(),
)
def test_plans_keep_to_the_workspace(rows, features, classes, given, size, layers, red):
    layer = Layer(rows, features, classes, layers=layers)
    plan = layer.plan(given, kept_bytes=size, reduced=red)
    tiles = plan.tiles
    kept_rows = plan.chunk_rows or rows
    assert (plan.kind == "chunks") == bool(plan.chunk_rows)
    assert (plan.kind == "recompute") == (plan.kept_classes == 0)
    taken = kept_rows * min(plan.kept_classes, classes) * size * layers
    # No tile is thinner than 512 classes, whatever they take.
    least = layers * 2 * 4 * 512 * (layers * tiles.block_rows + features)
    assert taken + layer.streamed(tiles) <= max(given, least)
    assert tiles.rows == kept_rows
