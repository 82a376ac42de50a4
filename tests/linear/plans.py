"""Plans of a derivative that a test chooses: each by a number of bytes of its own."""

import functools
from collections.abc import Iterator

import pytest

from jaxsoft.linear.plans import Layer, Plan, tiling_of
from jaxsoft.linear.total import _Chunks

# Tiles of 16 rows and 128 classes; they overlap in both axes where a test's sizes do
# not divide, and so do chunks of 8 rows.
_BLOCKS, _CHUNK = (16, 128), 8
_BLOCKS_ON_GPU = (16, 256)
# What each plan is asked for by: nothing else would take such numbers.
RECOMPUTE, SOME, ALL, CHUNKS, ONE_CHUNK, ON_GPU, ONE_ON_GPU = range(900_001, 900_008)
PLANS = {
    "recompute": RECOMPUTE,
    "some tiles kept": SOME,
    "all tiles kept": ALL,
    "chunks": CHUNKS,
    "one chunk": ONE_CHUNK,
}
# The chunks of a GPU, on any device; tiles that leave a rest of a multiple of 128.
PLANS_OF_GPUS = {"chunks on a GPU": ON_GPU, "one chunk on a GPU": ONE_ON_GPU}
_MANY, _ONE = (CHUNKS, ON_GPU), (ONE_CHUNK, ONE_ON_GPU)


def _plan(layer: Layer, workspace: int, reduced: bool) -> Plan:
    """Returns the plan of a number."""
    rows = layer.rows
    if reduced and workspace in _MANY:
        rows = min(_CHUNK, rows)
    tiles = tiling_of(rows, layer.classes, _BLOCKS)
    everything = tiles.class_blocks * tiles.block_classes
    if workspace in PLANS_OF_GPUS.values():
        tiles = tiling_of(rows, layer.classes, _BLOCKS_ON_GPU)
    if workspace == RECOMPUTE:
        return Plan("recompute", tiles)
    if workspace == SOME:
        some = tiles.block_classes * (tiles.class_blocks // 2)
        return Plan("keep", tiles, some) if some else Plan("recompute", tiles)
    if reduced and workspace in (*_MANY, *_ONE):
        return Plan("chunks", tiles, everything, rows)
    return Plan("keep", tiles, everything)


@pytest.fixture(autouse=True)
def chosen_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the numbers above stand for their plans."""
    original = Layer.plan

    @functools.wraps(original)
    def plan(self, given, *, kept_bytes, reduced=False, **others):
        if given not in (*PLANS.values(), *PLANS_OF_GPUS.values()):
            return original(
                self, given, kept_bytes=kept_bytes, reduced=reduced, **others
            )
        if kept_bytes is None:
            return Plan("recompute", tiling_of(self.rows, self.classes, _BLOCKS))
        return _plan(self, given, reduced)

    call = _Chunks.call

    @functools.wraps(call)
    def call_as_planned(self, arrays, rows):
        is_on_gpu = self.fold.config.workspace_bytes in PLANS_OF_GPUS.values()
        return call(self.on_gpu() if is_on_gpu else self, arrays, rows)

    monkeypatch.setattr(Layer, "plan", plan)
    monkeypatch.setattr(_Chunks, "call", call_as_planned)
    yield
