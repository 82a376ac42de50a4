"""Samples of stored logits compiled to machine code for accelerators not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators.compiling import TARGETS, results
from tests.accelerators.discrete import CLASSES, DRAWN, RELAXED, ROWS

# The logits in float32, which XLA stores where more than one pass needs them.
LOGITS = 4 * ROWS * CLASSES / 2**20
# On a TPU rows are laid out anew for the blocks of a sampler.
FILTERED = {"h100": 3, "v6e": 8}
RELAXED_BOUND = {"h100": 1.6, "v6e": 4.1}


@pytest.mark.parametrize("target", TARGETS)
def test_temporaries(target):
    found = {(r["name"], r["what"]): r["mib"] for r in results("discrete", target)}
    assert len(found) == len(DRAWN) + 2 * len(RELAXED)
    for (name, what), mib in found.items():
        bound = (FILTERED if name in DRAWN else RELAXED_BOUND)[target]
        assert mib <= bound * LOGITS, (name, what, mib)
