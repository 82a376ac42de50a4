"""`jaxsoft devices` on every target: programs compiled for it, and their memory.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.surveying import survey
from jaxsoft.devices.target import TARGETS

MIB = 2**20
# Llama 3's head.
SHAPES = Shapes(1024, 4096, 128256)
LOGITS = SHAPES.tokens * SHAPES.vocabulary * 4
STATES = SHAPES.tokens * SHAPES.hidden * 4
# The largest tile, and what a program takes anyhow.
TILES = 3 * 32 * MIB
KERNELS = {"h100": "mosaic_gpu", "v5e": "mosaic_tpu", "v6e": "mosaic_tpu"}
KERNELS["7x"] = "mosaic_tpu"


@pytest.mark.parametrize("target", TARGETS)
def test_memory_of_streamed_logits(target):
    chosen = TARGETS[target]
    if not chosen.installed():
        pytest.skip(f"the extra aot is not installed: no {chosen.package}")
    names = ("linear_cross_entropy", "linear_sample", "hierarchical_log_prob")
    for found in survey(target, names, SHAPES):
        runs = {ran.name: ran for ran in found.implementations if not ran.refused}
        if found.operation == "linear_cross_entropy":
            wanted = {"xla", "reference", *filter(None, [KERNELS.get(target)])}
            assert wanted <= set(runs), found
        for name, ran in runs.items():
            for kind, size in ran.temporaries.items():
                assert size is not None
                if name == "reference":
                    # In bfloat16 at the least.
                    assert size >= LOGITS / 2, found
                else:
                    assert size <= TILES + (kind == "value_and_grad") * STATES, found
