"""Strict JAX for every test, eight virtual devices, and programs compiled in haste."""

import collections
import json
import math
import os
import tempfile
import zlib
from pathlib import Path

import jax
import pytest

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
# Also compiled so, on the first of CI's Pythons: these hold the values against truth.
_OPTIMIZED_ONCE = (
    "test_gradients.py",
    "test_softmax.py",
    "test_values.py",
    "test_word2vec.py",
)
# On the second what could differ is JAX, not our numbers: it runs fewer cases.
_SECOND = os.environ.get("JAXSOFT_SECOND_PYTHON") == "1"
# "2/4" runs the second of four shares of the cases that are slow for being many.
_SHARE, _SHARES = map(int, (os.environ.get("JAXSOFT_SHARE") or "1/1").split("/"))

# Seconds that each file took once, by `python -m tests.durations`.
_DURATIONS = Path(__file__).with_name("durations.json")

# Files, or their folders, whose tests are not of the default tier.
_PROCESSES = (
    "benchmarks",
    "distributed",
    "test_categorical_vae.py",
    "test_comparison.py",
    "test_mesh.py",
    "test_readme.py",
    "test_resume.py",
)
_INTERPRETERS = (
    "test_kernel_gumbel.py",
    "test_kernel_logarithms.py",
    "test_kernel_rows.py",
    "test_mosaic_gpu.py",
    "test_mosaic_gpu_sample.py",
    "test_mosaic_tpu.py",
)
_SLOW = ("test_estimator.py", "test_scale.py", "test_torch.py")


def _file_of(item):
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _chance(item):
    """Returns a number that neighbours do not share: they differ in one parameter."""
    return zlib.crc32(item.nodeid.encode())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Sorts tests into tiers before `-m` picks them, and deals long files out first.

    The first and the last case of a test with `many_cases` are of the default tier, its
    others slow, and divided into shares. On the second Python a test has one case of
    each sixteen, of those that are not slow where it has any.
    """
    # A file without a record is new, and may be long.
    seconds = json.loads(_DURATIONS.read_text())
    items.sort(key=lambda item: -seconds.get(_file_of(item), math.inf))
    cases = collections.defaultdict(list)
    for item in items:
        place = set(item.path.relative_to(Path(__file__).parent).parts)
        if "accelerators" in place:
            continue
        for marker, places in (
            (pytest.mark.process, _PROCESSES),
            (pytest.mark.interpreter, _INTERPRETERS),
            (pytest.mark.slow, _SLOW),
        ):
            if not place.isdisjoint(places):
                item.add_marker(marker)
        cases[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for of_test in cases.values():
        if _SECOND:
            quick = [one for one in of_test if not one.get_closest_marker("slow")]
            among = sorted(quick or of_test, key=_chance)
            left_out.update(set(of_test).difference(among[: -(-len(among) // 16)]))
            continue
        for item in of_test[1:-1]:
            if not item.get_closest_marker("many_cases"):
                continue
            item.add_marker(pytest.mark.slow)
            if _chance(item) % _SHARES != _SHARE - 1:
                left_out.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_configure(config):
    """Lets a worker and the processes that it starts compile equal programs once.

    Training tests compile the same few over and over. Workers share no folder: JAX
    may read a program there while another process still writes it.
    """
    folder = tempfile.TemporaryDirectory(prefix="jaxsoft-tests-")
    config.add_cleanup(folder.cleanup)
    for name, value in {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    if jax.__version_info__ < (0, 11):
        _take_older_emitters()


def _compile(*, quickly):
    """Switches this process and those that it starts."""
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))


def _compiles_quickly():
    return os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"


def _take_older_emitters():
    """Has what is compiled quickly built by XLA's older emitters.

    They take half the time of its MLIR; newer JAX has no others.
    """
    from jax._src import compiler

    of_jax = compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **options):
        chosen = dict(env_options_overrides or {})
        if _compiles_quickly():
            chosen.setdefault("xla_cpu_use_fusion_emitters", False)
        return of_jax(*args, env_options_overrides=chosen or None, **options)

    compiler.get_compile_options = get_compile_options


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
    _compile(quickly=True)
    yield
    _compile(quickly=False)


@pytest.fixture
def optimized():
    """Compiles as users compile, in tests of memory or of bits from another process."""
    quickly = _compiles_quickly()
    _compile(quickly=False)
    yield
    _compile(quickly=quickly)


@pytest.fixture
def x64():
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Lets JAX count a single device."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
