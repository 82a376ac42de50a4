"""What the figures were measured on, and the physical floor under them.

No program that multiplies matrices beats the machine's matmul rate, none that reads
an array and writes another beats its copy bandwidth. Both are measured in the run
whose figures they stand beside, before and after; the better of the two counts.
"""

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

import jaxsoft
from benchmarks import timing

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a run writes is no change of the source.
_SOURCE = ("jaxsoft", "benchmarks", ":(exclude)benchmarks/results")
# A load, over the cores, that leaves timings alone.
_QUIET_LOAD = 0.25
_PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "flax",
    "jax-cce",
    "tokamax",
    "torch",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "triton",
    "absl-py",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "libtpu",
)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe() -> dict[str, Any]:
    """Names device, driver, versions and the state of the source."""
    device = jax.devices()[0]
    changes = _output("git", "status", "--porcelain", "--", *_SOURCE)
    return {
        "platform": device.platform,
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "device_count": jax.device_count(),
        "runtime": device.client.platform_version,
        "driver": _driver() if device.platform == "gpu" else None,
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": _versions(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "source_sha256": _source_digest(),
    }


def measure_matmul(dtype: str, *, quick: bool) -> float:
    """Measures operations per second of one large square matmul.

    Args:
      dtype: of both operands.
      quick: whether to take a small one.

    Returns:
      Operations per second, of the fastest round.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 256 if quick else 2048 if on_cpu else 8192
    left = jax.random.normal(jax.random.key(1), (size, size), dtype)
    right = jax.random.normal(jax.random.key(2), (size, size), dtype)
    program = timing.compile_program("matmul", jnp.matmul, (left, right))
    measured = timing.interleave([program], (left, right), rounds=5)
    return 2 * size**3 / measured["matmul"].best


def measure_copy(*, quick: bool) -> float:
    """Measures bytes read and written per second, over memory already mapped.

    The array is overwritten in place by its negation: a fresh output would measure
    how fast the operating system hands out pages.

    Args:
      quick: whether to take a small array.

    Returns:
      Bytes per second, of the fastest round.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2**20 if quick else 2**26 if on_cpu else 2**28
    array = jnp.ones(size, jnp.float32)
    program = timing.compile_program("copy", jnp.negative, (array,), donated=(0,))
    measured = timing.interleave([program], (array,), rounds=7)
    return 2 * array.nbytes / measured["copy"].best


def busy() -> str:
    """Says so where other work takes the processor; empty where none does."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, count = os.getloadavg()[0], cores()
    if load < _QUIET_LOAD * count:
        return ""
    return f"Disturbed: before the run, the load was {load:.1f} on {count} CPU cores."


def healthy() -> bool:
    """Whether the device still computes: after some faults nothing does."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


def available_bytes() -> int | None:
    """Memory that a program may still take on the first device, if it can be known."""
    device = jax.devices()[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    if device.platform != "cpu":
        return None
    return _available_host_bytes()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_host_bytes() -> int | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "jaxsoft": jaxsoft.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """What a command prints when run in the repository; None where it fails."""
    try:
        process = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def _source_digest() -> str:
    """Hashes the library's source: it names the code where there is no commit."""
    digest = hashlib.sha256()
    for path in sorted((_ROOT / "jaxsoft").rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
