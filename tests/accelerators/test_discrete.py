"""Samples of stored logits compiled to machine code for accelerators not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators.compiling import TARGETS, results
from tests.accelerators.discrete import CLASSES, DRAWN, RELAXED, ROWS

MIB = 2**20
LOGITS = 4 * ROWS * CLASSES / MIB  # in float32


@pytest.mark.parametrize("target", TARGETS)
def test_temporaries(target):
    found = {(r["name"], r["what"]): r["mib"] for r in results("discrete", target)}
    assert len(found) == 2 * (len(DRAWN) + 2 * len(RELAXED))
    for (name, what), mib in found.items():
        if name == "sample":
            assert mib < LOGITS / 16, (name, what, mib)
        elif name in ("gumbel_softmax", "threefry13", "hard", "reinmax"):
            assert mib < 1.1 * LOGITS, (name, what, mib)
        else:
            # Noise or thresholds of all classes, but not one for each of ten draws.
            assert mib < 5 * LOGITS, (name, what, mib)
