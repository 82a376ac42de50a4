"""What functions do here and on targets, wherever it takes another process to tell."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxsoft._core.registry import compiling_for
from jaxsoft.devices import child
from jaxsoft.devices.bundles import FLAGS
from jaxsoft.devices.measuring import Device, Found, describe, here
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.ptx import VARIABLES
from jaxsoft.devices.target import ENVIRONMENT, HERE, TARGETS, Target

__all__ = ["DeviceError", "device_of", "dumping_to", "survey"]


class DeviceError(RuntimeError):
    """Nothing could be compiled for a target; the message says why."""


def device_of(name: str) -> Device:
    """Returns a device in words.

    Args:
      name: of a target, or "here".
    """
    if name == HERE:
        return here()
    return Device(TARGETS[name].platform, TARGETS[name].description)


def survey(
    name: str,
    operations: Sequence[str],
    shapes: Shapes | None,
    *,
    schedule: bool = False,
) -> Iterator[Found]:
    """Yields what each function does on a device, as it becomes known.

    Args:
      name: of a target, or "here".
      operations: names of functions.
      shapes: sizes to compile for; None compiles nothing.
      schedule: whether to read the code that the target's compiler makes.

    Raises:
      DeviceError: if the target's compiler is not installed or fails.
    """
    if name == HERE:
        yield from describe(here(), operations, shapes)
    elif shapes is None:
        with compiling_for(TARGETS[name].chip):
            yield from describe(device_of(name), operations, None)
    elif TARGETS[name].installed():
        yield from _elsewhere(TARGETS[name], operations, shapes, schedule)
    else:
        raise DeviceError(
            f"compiling for {name} needs {TARGETS[name].package}, which the extra "
            '`aot` installs: pip install "jaxsoft[aot]"'
        )


def _elsewhere(
    target: Target, operations: Sequence[str], shapes: Shapes, schedule: bool
) -> Iterator[Found]:
    """Yields what a process finds that compiles for the target."""
    with tempfile.TemporaryDirectory(prefix="jaxsoft-code-") as folder:
        dumps = folder if schedule else None
        request = {
            "target": target.name,
            "operations": list(operations),
            "shapes": dataclasses.asdict(shapes),
            "dumps": dumps,
        }
        yield from _told(target.name, request, dumping_to(dumps, target.platform))


def dumping_to(folder: str | None, platform: str) -> dict[str, str]:
    """Returns the variables by which a compiler writes its code to a folder.

    They are read when the compiler is loaded, once in a process.

    Args:
      folder: it is there; None has nothing written.
      platform: of the target.
    """
    if folder is None:
        return {}
    new = {"LIBTPU_INIT_ARGS": FLAGS} if platform == "tpu" else VARIABLES
    return {
        name: f"{os.environ.get(name, '')} {value.format(folder=folder)}".strip()
        for name, value in new.items()
    }


def _told(
    name: str, request: Mapping[str, Any], variables: dict[str, str]
) -> Iterator[Found]:
    """Yields what a child says."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            [sys.executable, "-m", child.__name__, json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | ENVIRONMENT | variables,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(child.PREFIX):
                    yield Found.from_json(json.loads(line.removeprefix(child.PREFIX)))
            code = process.wait()
        finally:
            # Still there only if nobody reads on.
            process.kill()
        if code:
            said.seek(0)
            last = [line for line in said.read().splitlines() if line.strip()][-1:]
            raise DeviceError(
                f"the compiler for {name} failed, exit code {code}: " + " ".join(last)
            )
