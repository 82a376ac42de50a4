"""Compiles the linear room for a target that is not here, and prints what it takes.

Run as `python -m tests.accelerators.room TARGET MODE`, in a process of its own, since
compilers for TPUs and GPUs are chosen before JAX starts. Modes: `one` device, `vmap`
over 8 on one device, `tokens` (hidden states over 4 devices), `mesh` (hidden states and
classes over all devices, 4 GPUs or 16 TPUs).
"""

import json
import os
import pathlib
import re
import sys

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxsoft

TARGETS = pathlib.Path(__file__).parent / "targets"
# Gemma 2's head, a narrower teacher, and an embedding table to mix.
ROWS, FEATURES, CLASSES, TEACHER, WIDTH, LISTED = 8192, 2304, 256000, 1024, 512, 16
SHAPES = {
    "hidden": ((ROWS, FEATURES), jnp.bfloat16, P("data")),
    "kernel": ((FEATURES, CLASSES), jnp.bfloat16, P(None, "vocab")),
    "labels": ((ROWS,), jnp.int32, P("data")),
    "ids": ((ROWS, LISTED), jnp.int32, P("data")),
    "log_probs": ((ROWS, LISTED), jnp.float32, P("data")),
    "teacher_hidden": ((ROWS, TEACHER), jnp.bfloat16, P("data")),
    "teacher_kernel": ((TEACHER, CLASSES), jnp.bfloat16, P(None, "vocab")),
    "values": ((CLASSES, WIDTH), jnp.bfloat16, P("vocab")),
    "first": ((ROWS, WIDTH), jnp.bfloat16, P("data")),
    "second": ((ROWS, WIDTH), jnp.bfloat16, P("data")),
}
KEY = jax.random.key(0)


def calls(wrap):
    """Returns functions of named arrays, and which of those are floats."""
    log_prob = wrap(jaxsoft.linear_log_prob)
    expected = wrap(jaxsoft.linear_expected)
    distil = wrap(jaxsoft.linear_distillation)
    layer, pair = ("hidden", "kernel"), ("teacher_hidden", "teacher_kernel")

    def mixture(hidden, kernel, values, **options):
        return expected(hidden, kernel, values, **options).astype("float32").sum()

    return {
        "cross_entropy": (wrap(jaxsoft.linear_cross_entropy), layer, ("labels",)),
        "log_prob": (lambda *a: sum(x.sum() for x in log_prob(*a)), layer, ("labels",)),
        "log_prob_at": (
            lambda *a: wrap(jaxsoft.linear_log_prob_at)(*a).sum(),
            layer,
            ("ids",),
        ),
        "sample": (lambda *a: wrap(jaxsoft.linear_sample)(KEY, *a), (), layer),
        "top_k": (
            lambda *a: wrap(jaxsoft.linear_top_k)(*a, LISTED)[0].sum(),
            layer,
            (),
        ),
        "expected": (mixture, (*layer, "values"), ()),
        "gumbel": (lambda *a: mixture(*a, key=KEY), (*layer, "values"), ()),
        "forward_kl": (lambda *a: distil(*a, temperature=2.0), layer + pair, ()),
        "jensen_shannon": (
            lambda *a: distil(*a, divergence="jensen_shannon"),
            layer + pair,
            (),
        ),
        "distillation_top_k": (
            wrap(jaxsoft.linear_distillation_top_k),
            layer,
            ("ids", "log_probs"),
        ),
        "nt_xent": (jaxsoft.nt_xent, ("first", "second"), ()),
        "clip_loss": (jaxsoft.clip_loss, ("first", "second"), ()),
        "supervised_contrastive": (
            jaxsoft.supervised_contrastive,
            ("first",),
            ("labels",),
        ),
    }


def topology(target, mode):
    """Returns JAX's platform and a mesh of abstract devices."""
    if target == "h100":
        text = (TARGETS / "h100.textproto").read_text()
        platform = "cuda"
        found = topologies.get_topology_desc(
            platform=platform, topology_name="", topology="1x1x4", target_config=text
        )
    else:
        platform = "tpu"
        name = "v6e:4x4" if mode == "mesh" else "v6e:2x2"
        found = topologies.get_topology_desc(name, platform)
    devices = np.array(found.devices)
    data = int(len(devices) ** 0.5) if mode == "mesh" else len(devices)
    return platform, Mesh(devices.reshape(data, -1), ("data", "vocab"))


def over_batches(function, names):
    """Maps a function over 8 parts of the tokens."""
    axes = [0 if SHAPES[name][2] == P("data") else None for name in names]

    def mapped(*args):
        parts = [
            a.reshape(8, -1, *a.shape[1:]) if axis == 0 else a
            for a, axis in zip(args, axes, strict=True)
        ]
        return jax.vmap(function, axes)(*parts).sum()

    return mapped


def main(target, mode):
    """Compiles every function, and prints a line of JSON for each."""
    platform, mesh = topology(target, mode)
    sharded = mode in ("tokens", "mesh")

    def wrap(function):
        # Compilers for TPU do not cut a program by custom partitioning.
        if not sharded or platform != "tpu":
            return function
        return jaxsoft.over_mesh(
            function, mesh, vocab_axis="vocab", token_axes=("data",)
        )

    for name, (function, floats, others) in calls(wrap).items():
        contrastive = "first" in floats
        if contrastive and mode != "one":
            continue
        args = []
        for key in floats + others:
            shape, dtype, spec = SHAPES[key]
            place = SingleDeviceSharding(mesh.devices[0, 0])
            if sharded:
                place = NamedSharding(mesh, spec)
            args.append(jax.ShapeDtypeStruct(shape, dtype, sharding=place))
        if mode == "vmap":
            function = over_batches(function, floats + others)
        whats = {"value": function}
        if floats:
            argnums = tuple(range(len(floats)))
            whats["value_and_grad"] = jax.value_and_grad(function, argnums)
        for what, call in whats.items():
            lowered = jax.jit(call).trace(*args).lower(lowering_platforms=(platform,))
            compiled = lowered.compile()
            analysis = compiled.memory_analysis()
            assert analysis is not None
            result = {
                "name": name,
                "what": what,
                "mib": analysis.temp_size_in_bytes / 2**20,
                "collectives": collectives(compiled.as_text() or ""),
            }
            print("RESULT", json.dumps(result), flush=True)


def collectives(text):
    """Returns the collectives of a program: each operation and its result's shape."""
    pattern = (
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\("
    )
    found = [re.search(pattern, line) for line in text.splitlines()]
    return [(m[2], re.sub(r"\{[^}]*\}", "", m[1])) for m in found if m]


if __name__ == "__main__":
    main(*sys.argv[1:])
