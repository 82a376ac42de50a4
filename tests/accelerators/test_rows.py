"""The kernels for rows compiled to machine code for chips that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators import rows
from tests.accelerators.compiling import MIB, results


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_rows_on_tpus(chip):
    """Whole rows fit in VMEM: each array is read once, or written once."""
    found = results("rows", "v6e", chip)
    assert len(found) == 7
    for result in found:
        backward = result["what"] == "gradient"
        assert result["kernels"] == list(rows.KERNELS[: 1 + backward]), result
        count, classes, dtype = rows.SHAPES[result["name"]]
        # Backward with the forward: x and y, then y and g and the gradient.
        accesses = 5 if backward else 2
        assert result["accesses"] == pytest.approx(accesses, rel=4e-3), result
        # The forward's y, and nothing else.
        count = rows.limited(chip, count)
        held = count * classes * (4 if dtype == "float32" else 2) / MIB
        assert result["mib"] <= held * backward + 1, result
