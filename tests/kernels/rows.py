"""Rows of logits for the kernels, which run in JAX's interpreters."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.interpreters import gpu_interpreter, tpu_interpreter

__all__ = ["CLASSES", "KERNELS", "ROWS", "both", "close", "interpreted", "logits"]

ROWS, CLASSES = 13, 300
KERNELS = ("mosaic_tpu", "mosaic_gpu")


def interpreted(kernel):
    """Runs kernels in the interpreter for their device."""
    return {"mosaic_tpu": tpu_interpreter, "mosaic_gpu": gpu_interpreter}[kernel]()


def logits(dtype="float32", rows=ROWS, classes=CLASSES):
    """Rows of many kinds: dropped classes, no class left, NaN, infinite, an offset."""
    x = np.random.default_rng(0).standard_normal((rows, classes)) * 3
    x[1, ::3] = -np.inf
    x[2] = -np.inf
    x[3, classes // 2] = np.nan
    x[4, -1] = np.inf
    x[5] += 1e4
    x[6, 1:] = -3e38
    x[7] = np.round(x[7])
    return jnp.asarray(x, dtype)


def both(function, *args, kernel="mosaic_tpu"):
    """Returns what XLA and what a kernel gives, jitted as users do."""
    run = jax.jit(function, static_argnums=0)
    theirs = jax.block_until_ready(run("xla", *args))
    with interpreted(kernel):
        return theirs, jax.block_until_ready(run(kernel, *args))


def close(theirs, mine, dtype):
    """Compares trees, up to the rounding of their dtype; NaN where the other has it."""
    slack = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, "float64") for v in (a, b))
        scale = np.nanmax(np.abs(a), initial=0, where=np.isfinite(a))
        np.testing.assert_allclose(b, a, rtol=slack, atol=slack * scale)
        assert scale > 0
