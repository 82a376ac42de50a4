"""`jaxsoft devices` on targets: programs compiled for it, and their memory.

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
# A few of the largest.
TILES = 4 * 32 * MIB
KERNELS = {"h100": "mosaic_gpu", "v5e": "mosaic_tpu"}


# Other tests compile for v6e. For 7x, XLA copies the kernel: 1010 MiB for the value,
# 2321 MiB with the gradient, of linear_cross_entropy.
@pytest.mark.parametrize("target", ["h100", "b200", "v5e"])
def test_memory_of_streamed_logits(target):
    chosen = TARGETS[target]
    if not chosen.installed():
        pytest.skip(f"the extra aot is not installed: no {chosen.package}")
    names = ["linear_cross_entropy"]
    if chosen.platform == "cuda":
        names += ["linear_sample", "hierarchical_log_prob"]
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
                    continue
                bound = TILES + (kind == "value_and_grad") * STATES
                assert size <= bound, found
