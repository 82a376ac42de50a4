"""No function takes more of an accelerator than what a user would write.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

from typing import Any

import pytest

from benchmarks.everyday_case import OURS, PLAIN
from tests.accelerators import everyday
from tests.accelerators.compiling import TARGETS, results


@pytest.mark.parametrize("target", TARGETS)
def test_functions_of_logits_beside_formulas(target):
    reported: list[Any] = results("everyday", target)
    found = [(name, cell) for name, cell, _ in reported]
    cells = [(name, what) for name, whats in everyday.CELLS.items() for what in whats]
    assert sorted((name, cell["what"]) for name, cell in found) == sorted(cells)
    for name, cell in found:
        moved = cell["moved_bytes"]
        # A few columns of rows are no pass over the logits.
        assert moved[OURS] <= 1.01 * moved[PLAIN], (name, cell)
        if target == "v6e":
            bundles = cell["bundles"]
            assert bundles[OURS] <= bundles[PLAIN], (name, cell)
