"""The table of kernels that TPUs take unasked has those for which there is evidence.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from jaxsoft._core.defaults import DEFAULTS
from jaxsoft._core.registry import TPUS
from tests.accelerators import defaults
from tests.accelerators.compiling import results


@pytest.mark.parametrize("chip", TPUS)
def test_a_default_is_what_there_is_evidence_for(chip):
    table = [one for one in DEFAULTS if one.chip == chip and one.step == "statistics"]
    found = results("defaults", chip)
    assert [tuple(one["sizes"]) for one in found] == list(defaults.SIZES)
    assert bool(table) == all(map(defaults.qualifies, found)), found
    for one in table:
        # The ends of the sizes are among those that were compiled.
        ends = {(one.rows, h, one.classes) for h in one.features}
        assert ends <= set(defaults.SIZES), one
