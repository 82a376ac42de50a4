"""The schedules of the TPU kernels, as the compiler wrote them for a TPU not here."""

import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import jaxsoft
from jaxsoft.devices.chips import CHIPS
from jaxsoft.devices.schedule import schedule_of
from jaxsoft.devices.surveying import dumping_to
from jaxsoft.devices.target import TARGETS
from tests.accelerators.compiling import compile_for, report

__all__ = ["CLASSES", "FEATURES", "KERNELS", "ROWS", "main"]

ROWS, FEATURES, CLASSES = 4096, 2560, 32768
KERNELS = (
    "jaxsoft_statistics_forward",
    "jaxsoft_statistics_backward",
    "jaxsoft_softmax_forward",
    "jaxsoft_softmax_backward",
)


def main(target):
    """Compiles the kernels, and reports what each one fills of matrix units."""
    shapes = (
        ((ROWS, FEATURES), jnp.bfloat16),
        ((FEATURES, CLASSES), jnp.bfloat16),
        ((ROWS, CLASSES), jnp.bfloat16),
        ((ROWS,), jnp.int32),
    )
    with tempfile.TemporaryDirectory() as folder:
        # The compiler reads it when it is loaded, with the first topology.
        os.environ |= dumping_to(folder, "tpu")
        place = SingleDeviceSharding(TARGETS[target].devices()[0])
        arrays = [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes]
        _, compiled = compile_for("tpu", jax.value_and_grad(_sum, (0, 1, 2)), arrays)
        schedule = schedule_of(
            pathlib.Path(folder),
            compiled.as_text() or "",
            CHIPS[target].branch_delay,
        )
    for part in schedule.parts:
        name = next((name for name in KERNELS if part.name.startswith(name)), None)
        if name is not None:
            taken = sum(loop.cycles * loop.busy["mxu"] for loop in part.loops)
            report(
                name,
                "schedule",
                compiled,
                runs=part.runs,
                least=part.is_least,
                cycles=part.cycles,
                busy=taken / part.cycles,
            )


def _sum(hidden, kernel, logits, labels):
    """Returns a loss, and a mean of probabilities, by kernels."""
    loss = jaxsoft.linear_cross_entropy(
        hidden, kernel, labels, implementation="mosaic_tpu"
    )
    probabilities = jaxsoft.softmax(logits, implementation="mosaic_tpu")
    return loss + (probabilities**2).mean(dtype=jnp.float32)
