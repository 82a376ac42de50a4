"""The linear room compiled to machine code for accelerators that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason. They run in
processes of their own, since compilers for TPUs and GPUs are chosen before JAX starts.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

TARGETS = pathlib.Path(__file__).parent / "targets"
MIB = 2**20
PACKAGES = {"h100": "jax_plugins.xla_cuda13", "v6e": "libtpu"}
# Gemma 2's head. Temporaries beside the gradients; stored logits take 12,000 MiB.
# The float32 sum of dhidden is 72 MiB of it.
SHAPE = {"rows": 8192, "features": 2304, "classes": 256000}
BOUNDS = {
    ("h100", "value"): 128,
    ("h100", "value_and_grad"): 128,
    ("v6e", "value"): 16,
    ("v6e", "value_and_grad"): 74,
}

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
import jaxsoft

target, layout, rows, features, classes = json.loads(sys.argv[1])
if target == "h100":
    platform = "cuda"
    topology = topologies.get_topology_desc(
        platform=platform, topology_name="", topology="1x1x4",
        target_config=open(sys.argv[2]).read())
else:
    platform = "tpu"
    topology = topologies.get_topology_desc(platform=platform, topology_name="v6e:2x2")
sharding = SingleDeviceSharding(topology.devices[0])

def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

kernel = (features, classes) if layout == "hv" else (classes, features)
args = (array((rows, features), jnp.bfloat16), array(kernel, jnp.bfloat16),
        array((rows,), jnp.int32))

def loss(hidden, kernel, labels):
    return jaxsoft.linear_cross_entropy(hidden, kernel, labels, kernel_layout=layout)

for name, function in (("value", loss),
                       ("value_and_grad", jax.value_and_grad(loss, (0, 1)))):
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    products = [l for l in lowered.as_text().splitlines() if "dot_general" in l]
    compiled = lowered.compile()
    print("RESULT", json.dumps({
        "name": name,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "products": len(products),
        "wide": sum("bf16" not in l.split("->")[0].split(":")[-1] for l in products),
    }))
"""


@pytest.mark.parametrize("layout", ["hv", "vh"])
@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_temporaries_at_gemma2(target, layout):
    package = PACKAGES[target]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"the extra aot is not installed: no {package}")
    argument = json.dumps([target, layout, *SHAPE.values()])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument, str(TARGETS / "h100.textproto")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = {r["name"]: r for r in (json.loads(line[7:]) for line in lines)}
    assert set(results) == {"value", "value_and_grad"}
    for name, result in results.items():
        assert result["temporaries"] <= BOUNDS[target, name] * MIB, result
        # Every matrix product reads bfloat16: none was widened.
        assert result["wide"] == 0, result
    assert results["value"]["products"] == 1
    assert results["value_and_grad"]["products"] == 4
