"""The schedules of the TPU kernels: how much of the matrix units they fill.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators import schedule
from tests.accelerators.compiling import results

# Of the slots of the matrix units the share that a kernel takes at the least.
FILLED = {
    "v5e": {"forward": 0.86, "backward": 0.90},
    "v6e": {"forward": 0.67, "backward": 0.80},
    "7x": {"forward": 0.63, "backward": 0.80},
}
# Bundles for each register of 1024 logits, at the most.
BUNDLES = {"forward": 5.3, "backward": 4.1}


@pytest.mark.parametrize("target", FILLED)
def test_kernels_fill_their_units(target):
    found = {result["name"]: result for result in results("schedule", target)}
    assert set(found) == set(schedule.KERNELS)
    # How often each loop runs is written in the code.
    assert all(r["runs"] == 1 and not r["least"] for r in found.values()), found
    for name, least in FILLED[target].items():
        result = found[f"jaxsoft_statistics_{name}"]
        assert result["busy"] >= least, result
    registers = schedule.ROWS * schedule.CLASSES / 1024
    for name, most in BUNDLES.items():
        result = found[f"jaxsoft_softmax_{name}"]
        assert result["cycles"] <= most * registers, result
