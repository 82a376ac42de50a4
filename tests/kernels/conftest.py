"""Fixtures of the tests of kernels for layers."""

import pytest

from jaxsoft._core.registry import Gpu
from jaxsoft.kernels import chips
from jaxsoft.kernels.layer.mosaic_gpu import plan as planning


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes few blocks of small tiles: the interpreter compiles each block anew."""

    def shrink(splits=2, cluster=1, stages=2):
        def choose(rows, classes, swizzle, multiprocessors=132, tensor_memory=False):
            del rows, multiprocessors
            blocks = planning.GpuBlocks(
                classes=64,
                stages=stages,
                cluster=cluster,
                swizzle=swizzle,
                rows=128 if tensor_memory else 64,
                tensor_memory=tensor_memory,
            )
            return blocks, min(splits, -(-classes // 64))

        monkeypatch.setattr(planning, "choose_gpu_blocks", choose)

    shrink()
    return shrink


@pytest.fixture(params=["9.0", "10.0"])
def chip(request, monkeypatch):
    """Takes the kernel for each chip."""
    monkeypatch.setattr(chips, "gpus", lambda: [Gpu(request.param, 132)])
