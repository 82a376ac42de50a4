"""The whole linear room compiled for accelerators that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PACKAGES = {"h100": "jax_plugins.xla_cuda13", "v6e": "libtpu"}
MODES = ("one", "vmap", "tokens", "mesh")
# Stored logits take 4,008 to 12,000 MiB.
BOUND = 256


def run(target, mode):
    """Returns the results of `room.py` by name and kind."""
    package = PACKAGES[target]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"the extra aot is not installed: no {package}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.accelerators.room", target, mode],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = [json.loads(line[7:]) for line in lines]
    return {(r["name"], r["what"]): r for r in results}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", PACKAGES)
def test_temporaries_and_traffic(target, mode):
    results = run(target, mode)
    assert len(results) >= 19
    for result in results.values():
        assert result["mib"] <= BOUND, result
        if mode in ("one", "vmap"):
            assert result["collectives"] == [], result
    if mode in ("one", "vmap"):
        return
    side = 2 if target == "h100" else 4
    rows, classes = 8192 // side, 256000 // side
    for (name, what), result in results.items():
        large = [
            (op, shape)
            for op, shape in result["collectives"]
            if any(f"{n}]" in shape for n in (2304, 1024, 512, classes, 256000))
        ]
        # Nothing as large as hidden states or a kernel moves but sums of gradients.
        assert all(op in ("all-reduce", "reduce-scatter") for op, _ in large), result
        if what == "value" and name not in ("expected", "gumbel"):
            assert large == [], result
    if mode == "tokens":
        return
    forward = results["cross_entropy", "value"]["collectives"]
    # One maximum, one sum of two numbers a token, and the mean.
    assert [op for op, _ in forward] == ["all-reduce"] * 3
    assert sorted(shape for _, shape in forward) == sorted(
        [f"f32[{rows},1]", f"f32[{rows},2]", "f32[]"]
    )
