"""The Mosaic TPU kernels compiled to machine code for TPUs that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators import mosaic_tpu
from tests.accelerators.compiling import MIB, NEWER, results

# A column of numbers, one a row, fills the lanes of a register.
COLUMN = mosaic_tpu.ROWS * 128 * 4


@pytest.mark.parametrize("chips", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_at_real_heads(chips):
    found = results("mosaic_tpu", "v6e", chips)
    assert len(found) == (6 if chips.startswith("v6e") else 5)
    for result in found:
        name, what = result["name"], result["what"]
        backward = what == "value_and_grad"
        assert result["kernels"] == list(mosaic_tpu.KERNELS[: 1 + backward]), result
        if name == "unaligned":
            continue
        # Every matrix product, in kernels too, reads bfloat16: none was widened.
        assert result["products"] >= (3 if backward else 1), result
        assert result["wide"] == 0, result
        # The float32 sum of dhidden, and a few columns; no logits.
        features, classes, *_ = mosaic_tpu.HEADS.get(name, mosaic_tpu.HEADS["llama3"])
        sums = mosaic_tpu.ROWS * features * 4 if backward else 0
        if name == "mesh" and NEWER:
            # A shard's dkernel, kept beside the sum over shards.
            sums += 2 * features * classes // 2
        assert result["mib"] <= (sums + 8 * COLUMN) / MIB, result
        if name == "mesh":
            continue
        assert result["collectives"] == [], result
    if not chips.startswith("v6e"):
        return
    moved = found[-1]["collectives"]
    # Sums and maxima of rows and of gradients; neither hidden states nor a kernel.
    assert {op for op, _ in moved} <= {"all-reduce", "reduce-scatter"}, moved
