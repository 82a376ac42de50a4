"""Strict JAX for every test, with no silent promotion, and eight virtual devices."""

import os
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
# On the second of CI's Pythons: what the numbers are when all is optimized, the first
# has shown.
_COMPILED_QUICKLY_IF_ASKED = ("hierarchical", "linear", "logits")
# They run for longer than they compile.
_COMPUTING = ("test_sampling.py", "test_memory.py")


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
    """Compiles without LLVM's optimizations where no test is of the machine code.

    A test of training compiles for seconds what runs for milliseconds. XLA's own passes
    run all the same.
    """
    place = request.path.relative_to(Path(__file__).parent).parts
    quick = place[0] in _COMPILED_QUICKLY or (
        os.environ.get("JAXSOFT_COMPILE_QUICKLY") == "1"
        and place[0] in _COMPILED_QUICKLY_IF_ASKED
        and place[-1] not in _COMPUTING
    )
    if not quick:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    # The processes that a test starts, too.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
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
