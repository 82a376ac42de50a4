"""The Mosaic GPU kernels at the heads of real models, to compile for a GPU elsewhere.

Modes: `heads` (three models, many tokens and few), `options` (all options of the
statistics, numbers of classes that fit nothing, the gradient), `both` (some of either)
and `mesh` (four GPUs). Reports temporaries, and what PTX and its assembler say.
"""

import contextlib
import functools
import os
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._core.registry import compiling_for
from jaxsoft.devices.target import TARGETS
from jaxsoft.kernels.layer.mosaic_gpu import blackwell, hopper
from tests.accelerators.compiling import compile_for, report, topology

LLAMA3, QWEN3, GEMMA3 = (4096, 128256), (4096, 151936), (2560, 262144)


def cases(mode):
    """Yields names, functions, N, H, V, and options."""
    statistics, loss = jaxsoft.linear_statistics, jaxsoft.linear_cross_entropy
    heads = {"llama3": LLAMA3, "qwen3": QWEN3, "gemma3": GEMMA3}
    if mode in ("heads", "both"):
        for name, head in list(heads.items())[: 1 if mode == "both" else 3]:
            yield f"{name} 4096", statistics, 4096, *head, {}
            yield f"{name} 8", loss, 8, *head, {}
        if mode == "heads":
            return
    every = {
        "bias": True,
        "class_mask": True,
        "temperature": True,
        "logit_softcap": 30.0,
        "return_argmax": True,
        "kernel_layout": "vh",
    }
    yield "every option", statistics, 1000, *GEMMA3, every
    yield "vh 50257", loss, 4096, 768, 50257, {"kernel_layout": "vh"}
    yield "hv 50288", loss, 100, 768, 50288, {}
    yield "vh narrow", loss, 300, 784, 50256, {"kernel_layout": "vh"}
    yield "hv narrow", statistics, 300, 96, 50304, {}
    yield "sample 64", sample, 64, *QWEN3, {"temperature": True}
    yield "sample vh", sample, 300, 768, 50257, {"kernel_layout": "vh"}
    if mode == "both":
        return
    yield "gradient", jax.grad(of_arrays(loss), allow_int=True), 2048, *LLAMA3, {}


def sample(*, labels, **options):
    """Draws with a key that is known."""
    del labels
    return jaxsoft.linear_sample(jax.random.key(0), **options)


def of_arrays(function):
    """Returns a function of a dictionary, by the kernels."""
    return lambda args, **flags: function(**args, **flags, implementation="mosaic_gpu")


def main(target, mode):
    """Compiles the cases of a mode, and reports each."""
    platform, devices = topology(target)
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    with compiling_for(TARGETS[target].gpu):
        if mode == "mesh":
            return mesh(platform, devices)
        place = SingleDeviceSharding(devices[0])
        for name, function, rows, features, classes, options in cases(mode):
            args, flags = arguments(rows, features, classes, options, place)
            call = function if name == "gradient" else of_arrays(function)
            show(name, platform, functools.partial(call, **flags), args)


def arguments(rows, features, classes, options, place):
    """Returns the arrays by name, and the options that are none."""
    vh = options.get("kernel_layout") == "vh"
    kinds = {
        "hidden": ((rows, features), jnp.bfloat16),
        "kernel": ((classes, features) if vh else (features, classes), jnp.bfloat16),
        "labels": ((rows,), jnp.int32),
        "bias": ((classes,), jnp.bfloat16),
        "class_mask": ((classes,), jnp.bool_),
        "temperature": ((rows,), jnp.float32),
    }
    names = [n for n in kinds if n in ("hidden", "kernel", "labels") or n in options]
    arrays = {n: jax.ShapeDtypeStruct(*kinds[n], sharding=place) for n in names}
    return arrays, {n: v for n, v in options.items() if n not in kinds}


def mesh(platform, devices):
    """Compiles the loss for two shards of tokens and two of classes."""
    grid = Mesh(np.array(devices).reshape(2, 2), ("data", "vocab"))
    specs = {"hidden": P("data"), "kernel": P(None, "vocab"), "labels": P("data")}
    args, _ = arguments(4096, *LLAMA3, {}, None)
    args = {
        name: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(grid, specs[name])
        )
        for name, a in args.items()
    }

    mapped = jaxsoft.over_mesh(
        jaxsoft.linear_cross_entropy, grid, vocab_axis="vocab", token_axes=("data",)
    )
    loss = of_arrays(jaxsoft.linear_cross_entropy)
    show("jit", platform, loss, args)
    show("shard_map", platform, of_arrays(mapped), args)


def show(name, platform, function, args):
    """Compiles a function of the arrays, and reports it."""
    with captured() as said:
        _, compiled = compile_for(platform, function, (args,))
    text = compiled.as_text() or ""
    collectives = re.findall(r"(all-reduce|all-gather|all-to-all)(?:-start)?\(", text)
    kernels = (hopper, blackwell)
    names = "|".join(f"{k.KERNEL_NAME}|{k.SAMPLE_NAME}" for k in kernels)
    calls = re.findall(rf"custom-call\(.*({names})", text)
    report(
        name,
        "value",
        compiled,
        calls=calls,
        collectives=collectives,
        targets=re.findall(r"^\.target (\S+)", said[0], re.MULTILINE),
        wgmma=said[0].count("wgmma.mma_async"),
        tcgen05=said[0].count("tcgen05.mma"),
        registers=re.findall(r"Used (\d+) registers", said[0]),
        # Stack frames, spills, and wgmma that have to wait for each other.
        spills=re.findall(r"([1-9]\d*) bytes (?:stack|spill)|C7511", said[0]),
    )


@contextlib.contextmanager
def captured():
    """Yields a list that will hold what the compiler printed: PTX, and of its assembly.

    Told to write files it would write 50 MB of each of its passes too.
    """
    said = []
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        said.append(file.read().decode(errors="replace"))
