"""What every check by compiling for accelerators that are not here needs.

A module of programs has a function `main(target, *arguments)` that compiles them and
reports each. It runs in a process of its own, since compilers for TPUs and GPUs are
chosen before JAX starts. By hand, for a table of their temporaries:

    python -m tests.accelerators.compiling linear h100 one
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from jaxsoft.devices import target as devices

__all__ = ["NEWER", "TARGETS", "compile_for", "report", "results", "topology"]

# Compilers that come with a JAX newer than 0.10 take more for some gradients, those for
# TPUs most.
NEWER = jax.__version_info__ >= (0, 11)

# For which everything is compiled; some is for others too.
TARGETS = ("h100", "v6e")
FOLDER = pathlib.Path(__file__).parent
MIB = 2**20


def results(programs: str, target: str, *arguments: str) -> list[dict[str, Any]]:
    """Returns what a module of programs reports; skips without the extra `aot`."""
    chosen = devices.TARGETS[target]
    if not chosen.installed():
        pytest.skip(f"the extra aot is not installed: no {chosen.package}")
    module = f"{__package__}.{programs}"
    code = "import sys, importlib; importlib.import_module(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}.main(*sys.argv[2:])"]
        + [module, target, *arguments],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        env=os.environ | devices.ENVIRONMENT,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def topology(target: str, slice_of_tpus: str = "v6e:2x2") -> tuple[str, list]:
    """Returns JAX's platform and abstract devices, four GPUs or a slice of TPUs."""
    chosen = devices.TARGETS[target]
    shape = slice_of_tpus if chosen.platform == "tpu" else "1x1x4"
    return chosen.platform, chosen.devices(shape)


def compile_for(
    platform: str, function: Any, arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Any, Any]:
    """Returns the lowered and the compiled program."""
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(platform,))
    return lowered, lowered.compile()


def report(name: str, what: str, compiled: Any, **more: Any) -> None:
    """Prints a program's memory, and more, for `results`."""
    memory = compiled.memory_analysis()
    assert memory is not None
    result = {
        "name": name,
        "what": what,
        "mib": memory.temp_size_in_bytes / MIB,
        "aliased": memory.alias_size_in_bytes / MIB,
    }
    print("RESULT", json.dumps(result | more), flush=True)


if __name__ == "__main__":
    for result in results(*sys.argv[1:]):
        print(f"{result['name']:20} {result['what']:16} {result['mib']:9.1f} MiB")
