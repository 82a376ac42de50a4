"""Pallas's interpreters, which run kernels without their devices and look for races."""

import contextlib
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

__all__ = ["gpu_interpreter", "tpu_interpreter"]


@contextlib.contextmanager
def tpu_interpreter():
    """Runs TPUs' kernels, of which there must be one, and which must not race."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpret

    assert interpret.races is not None, "nothing was interpreted"
    assert not interpret.races.races_found


@contextlib.contextmanager
def gpu_interpreter():
    """Runs GPUs' kernels, which must not race; skips where JAX cannot."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX 0.10 interprets no plgpu.load and no out-of-bounds copies")
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as state
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    params = plgpu.InterpretGPUParams(detect_races=True)
    with plgpu.force_gpu_interpret_mode(params):
        yield
    assert not state.get_races().races_found
