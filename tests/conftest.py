"""Strict JAX for every test, with no silent promotion, and eight virtual devices."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

_COMPILED_QUICKLY = (
    "benchmarks",
    "examples",
    "nn",
    "test_public_api.py",
    "training",
)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees a file's compiled programs after it.

    Each takes a few memory mappings, of which Linux gives a process 65,530; a worker
    that kept the programs of the whole suite ran out of them and died in the compiler.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request):
    """Compiles without optimizations where no test is of the program that comes out.

    A test of training compiles for seconds what runs for milliseconds.
    """
    if (
        request.path.relative_to(Path(__file__).parent).parts[0]
        not in _COMPILED_QUICKLY
    ):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Lets JAX count a single device."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
