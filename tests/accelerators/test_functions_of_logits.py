"""Every function of stored logits, compiled to machine code for five accelerators.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.surveying import survey
from jaxsoft.devices.target import TARGETS
from tests.accelerators.bounds import check
from tests.accelerators.functions import HOW_MUCH


@pytest.mark.parametrize("target", HOW_MUCH)
def test_memory_and_kernels(target):
    check("logits", target, HOW_MUCH[target])


def test_jaxsoft_devices_compiles_in_another_process():
    if not TARGETS["h100"].installed():
        pytest.skip(f"the extra aot is not installed: no {TARGETS['h100'].package}")
    (found,) = survey("h100", ["linear_cross_entropy"], Shapes(1024, 256, 32768))
    runs = {ran.name: ran.temporaries for ran in found.implementations}
    assert runs.pop("mosaic_tpu") == {}
    logits = 4 * 1024 * 32768
    for name, sizes in runs.items():
        assert list(sizes) == ["value", "value_and_grad"]
        for size in sizes.values():
            assert size is not None
            assert size >= logits / 2 if name == "reference" else size < logits / 4
