"""What each function does on an accelerator elsewhere, as told to a parent process.

    python -m jaxsoft.devices.child REQUEST

under `target.ENVIRONMENT`; the request is JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsoft._core.registry import compiling_for
from jaxsoft.devices.chips import CHIPS
from jaxsoft.devices.measuring import Device, describe
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.target import TARGETS

__all__ = ["PREFIX", "main"]

# Lines for the parent begin with this; compilers print others.
PREFIX = "jaxsoft devices: "


def main(request: Mapping[str, Any]) -> None:
    """Prints a line for each function.

    Args:
      request: "target" and "operations", names, "shapes", the fields of `Shapes`, and
        "dumps", where the compiler writes code, or None.
    """
    target = TARGETS[request["target"]]
    device = Device(
        target.platform,
        target.description,
        target.devices()[0],
        CHIPS[target.name],
        Path(request["dumps"]) if request["dumps"] else None,
        target.limits if request["dumps"] else None,
    )
    with compiling_for(target.chip):
        shapes = Shapes(**request["shapes"])
        for found in describe(device, request["operations"], shapes):
            print(PREFIX + json.dumps(dataclasses.asdict(found)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
