"""Strict JAX for every test, eight virtual devices, and programs compiled in haste."""

import collections
import os
import tempfile
from pathlib import Path

import jax
import pytest
from jax._src import compiler

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Compiled as users compile. What an accelerator's compiler is told stays as it is, and
# the files of the second line run for longer than they compile.
_OPTIMIZED = (
    "accelerators",
    "test_memory.py",
    "test_noise.py",
    "test_sampling.py",
)
# The numbers of all optimized programs.
_OPTIMIZED_ONCE = (
    "test_gradients.py",
    "test_values.py",
    "test_word2vec.py",
)


# On the second of CI's Pythons: what could differ there is JAX, not our numbers, so
# some cases of each test will do, and all of them compiled quickly.
_SECOND = os.environ.get("JAXSOFT_SECOND_PYTHON") == "1"


def pytest_collection_modifyitems(config, items):
    """Keeps the first, the middle and the last case of a test on the second Python."""
    if not _SECOND:
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        one
        for each in cases.values()
        for one in (each[0], each[len(each) // 2], each[-1])
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure(config):
    """Compiles equal programs once for all workers and the processes that they start.

    Training tests compile the same few programs over and over.
    """
    settings = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    if not settings["jax_compilation_cache_dir"]:
        folder = tempfile.TemporaryDirectory(prefix="jaxsoft-tests-")
        config.add_cleanup(folder.cleanup)
        settings["jax_compilation_cache_dir"] = folder.name
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


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

    Most tests compile for seconds what runs for milliseconds. XLA's own passes run all
    the same.
    """
    place = request.path.relative_to(Path(__file__).parent).parts
    optimized = _OPTIMIZED
    if not _SECOND:
        optimized += _OPTIMIZED_ONCE
    if not set(place).isdisjoint(optimized):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        # The processes that a test starts, too.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        if jax.__version_info__ < (0, 11):
            patch.setattr(compiler, "get_compile_options", _by_llvm_alone)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def _by_llvm_alone(
    *args, env_options_overrides=None, of_jax=compiler.get_compile_options, **options
):
    """JAX's options with XLA's older emitters, that take half the time of its MLIR.

    Newer JAX has no others.
    """
    chosen = {"xla_cpu_use_fusion_emitters": False} | (env_options_overrides or {})
    return of_jax(*args, env_options_overrides=chosen, **options)


@pytest.fixture
def x64():
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Lets JAX count a single device."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
