"""The kernels for softmaxes of rows, to compile for chips that are not here.

The argument is the slice of TPUs, v5e:2x2, v6e:2x2 or tpu7x:2x2x1, or the GPU. By hand:

    python -m tests.accelerators.compiling rows v6e v5e:2x2
"""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import jaxsoft
from jaxsoft._core.registry import compiling_for
from jaxsoft.devices.target import TARGETS
from tests.accelerators.compiling import compile_for, report, topology
from tests.accelerators.mosaic_gpu import captured

__all__ = ["KERNELS", "SHAPES", "limited", "main"]

# Rows, classes, dtype. The first is too long for one multiprocessor of a GPU. Noise
# alone is for the last two: of the one a multiprocessor keeps it, the other is too long
# for a cluster of them, and for TPUs' VMEM.
SHAPES = {
    "long": (16384, 131072, "float32"),
    "short": (2048, 32768, "float32"),
    "unaligned": (1003, 50257, "bfloat16"),
    "kept": (2048, 32000, "bfloat16"),
    "longest": (64, 10**6 + 3, "float32"),
}
KERNELS = (
    "jaxsoft_softmax_forward",
    "jaxsoft_softmax_backward",
    "jaxsoft_gumbel_softmax_forward",
    "jaxsoft_log_softmax_forward",
    "jaxsoft_row_statistics_forward",
)


def main(target, chip):
    """Compiles the softmax of rows and its derivative, each alone, and reports them."""
    platform, devices = topology(target, chip)
    implementation = "mosaic_tpu" if platform == "tpu" else "mosaic_gpu"
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    place = SingleDeviceSharding(devices[0])
    with compiling_for(TARGETS[target].gpu):
        _report_all(platform, implementation, place, chip)


def _report_all(platform, implementation, place, chip):
    """Compiles and reports every shape."""
    for name, (rows, classes, dtype) in SHAPES.items():
        if name == "kept" and platform == "tpu":
            continue
        rows = limited(chip, rows)
        x = jax.ShapeDtypeStruct((rows, classes), dtype, sharding=place)
        tau = jax.ShapeDtypeStruct((rows, 1), jnp.float32, sharding=place)
        draw = functools.partial(
            jaxsoft.gumbel_softmax, jax.random.key(0), implementation=implementation
        )
        _report(platform, name, "noise", draw, (x, 0.7))
        if name in ("kept", "longest"):
            hard = functools.partial(draw, hard=True, generator="threefry13")
            _report(platform, name, "hard", hard, (x, tau))
            if platform == "cuda" and name == "longest":
                # Rows so few that clusters share what is folded.
                _report(platform, name, "entropy", _entropy, (x, tau))
            continue

        def value(x, tau=1.0):
            return jaxsoft.softmax(x, temperature=tau, implementation=implementation)

        _report(platform, name, "value", value, (x, 0.7))
        _report(platform, name, "gradient", functools.partial(_vjp, value), (x, x))
        if name == "unaligned":
            _report(platform, name, "temperatures", value, (x, tau))
        if platform == "cuda":
            _report_logarithms(name, x, tau, place)


def _report_logarithms(name, x, tau, place):
    """Compiles and reports what a GPU's kernels alone have, of one shape."""
    options: Any = {"implementation": "mosaic_gpu"}

    def log_softmax(x, tau=1.0):
        return jaxsoft.log_softmax(x, temperature=tau, **options)

    def losses(x, labels):
        def total(x):
            return jaxsoft.softmax_cross_entropy(
                x, labels, label_smoothing=0.1, reduction="mean", **options
            )

        return jax.value_and_grad(total)(x)

    labels = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32, sharding=place)
    _report("cuda", name, "log", log_softmax, (x, 0.7))
    backward = functools.partial(_vjp, log_softmax)
    _report("cuda", name, "log gradient", backward, (x, x))
    _report("cuda", name, "entropy", _entropy, (x, tau))
    _report("cuda", name, "losses", losses, (x, labels))


def _entropy(x, tau):
    return jaxsoft.entropy(x, temperature=tau, implementation="mosaic_gpu")


def limited(chip, rows):
    """Returns rows that a chip has memory for, with y and the gradients."""
    most = {"v5e:2x2": 4096, "v6e:2x2": 8192}
    return min(rows, most[chip]) if chip in most else rows


def _vjp(function, x, cotangent):
    return jax.vjp(function, x)[1](cotangent)


def _report(platform, name, what, call, args):
    """Compiles a program; reports its kernels, bytes, and what its assembler said."""
    arrays = tuple(a for a in args if not isinstance(a, float))
    rest = args[len(arrays) :]
    with captured() as said:
        _, compiled = compile_for(platform, lambda *a: call(*a, *rest), arrays)
    text = compiled.as_text() or ""
    size = arrays[0].size * arrays[0].dtype.itemsize
    cost = compiled.cost_analysis() or {}
    report(
        name,
        what,
        compiled,
        kernels=[k for k in KERNELS if k in text],
        accesses=cost.get("bytes accessed", 0) / size,
        targets=re.findall(r"^\.target (\S+)", said[0], re.MULTILINE),
        registers=re.findall(r"Used (\d+) registers", said[0]),
        spills=re.findall(r"([1-9]\d*) bytes (?:stack|spill)", said[0]),
    )
