"""The evidence for TPU kernels: their least times beside XLA's, for chips not here.

By hand, with a line for each pass and size:

    python -m tests.accelerators.defaults v6e
"""

import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

import jaxsoft
from jaxsoft._core.registry import compiling_for
from jaxsoft.devices.chips import CHIPS, least_time
from jaxsoft.devices.measuring import Device, _compiled
from jaxsoft.devices.schedule import Schedule
from jaxsoft.devices.surveying import dumping_to
from jaxsoft.devices.target import TARGETS
from tests.accelerators.compiling import results

__all__ = ["MOST", "SIZES", "main", "qualifies"]

# What a kernel may take at the most of the least time of XLA's program.
MOST = 0.85
# Rows, features and classes: a small layer, a wide one, the heads of two models.
SIZES = (
    (1024, 1024, 32768),
    (1024, 5120, 32768),
    (4096, 2560, 262144),
    (4096, 4096, 128256),
)


def qualifies(found: dict[str, Any]) -> bool:
    """Whether what `main` reports of a size is evidence for the kernel."""
    ours, xla = found["mosaic_tpu"], found["xla"]
    return (
        not ours["is_least"]
        and not ours["spills"]
        and ours["seconds"] <= MOST * xla["seconds"]
    )


def main(target: str) -> None:
    """Compiles the forward pass by the kernel and by XLA, and reports least times."""
    chosen = TARGETS[target]
    with tempfile.TemporaryDirectory() as folder, compiling_for(chosen.chip):
        # The compiler reads it when it is loaded, with the first topology.
        os.environ |= dumping_to(folder, "tpu")
        device = Device(
            "tpu",
            target,
            chosen.devices()[0],
            CHIPS[target],
            dumps=pathlib.Path(folder),
        )
        for rows, features, classes in SIZES:
            arrays = (
                jax.ShapeDtypeStruct((rows, features), jnp.bfloat16),
                jax.ShapeDtypeStruct((features, classes), jnp.bfloat16),
                jax.ShapeDtypeStruct((rows,), jnp.int32),
            )
            found: dict[str, Any] = {"sizes": (rows, features, classes)}
            for name in ("mosaic_tpu", "xla"):
                found[name] = _least(device, name, arrays)
            print("RESULT", json.dumps(found), flush=True)


def _least(device: Device, implementation: Any, arrays: Any) -> dict[str, Any]:
    """Returns the least time of a value, and what of registers is spilled."""

    def value(hidden, kernel, labels):
        return jaxsoft.linear_cross_entropy(
            hidden, kernel, labels, implementation=implementation
        )

    _, work, _, _, schedule = _compiled(device, value, arrays, ())
    assert work is not None and device.chip is not None
    assert isinstance(schedule, Schedule)
    least = least_time(device.chip, work.accessed, work.dot_flops, schedule.cycles)
    return {
        "seconds": least.seconds,
        "is_least": work.is_least or schedule.is_least,
        "spills": schedule.busy["spill"],
    }


if __name__ == "__main__":
    for one in results("defaults", sys.argv[1]):
        ours, xla = one["mosaic_tpu"], one["xla"]
        print(
            *one["sizes"],
            f"{ours['seconds'] * 1e3:.3f} of {xla['seconds'] * 1e3:.3f} ms:",
            f"{ours['seconds'] / xla['seconds']:.2f},",
            f"{ours['spills']:.2f} of the store slots spill,",
            "evidence" if qualifies(one) else "no evidence",
        )
