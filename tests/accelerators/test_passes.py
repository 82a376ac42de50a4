"""How often a cross-entropy computes its logits on accelerators, and in what memory.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators import passes
from tests.accelerators.compiling import MIB, results

# The float32 sum of dkernel, which a reduced loss has beside its workspace, and that of
# dhidden, which every gradient has.
DKERNEL = 4 * passes.FEATURES * passes.CLASSES / MIB
DHIDDEN = 4 * passes.ROWS * passes.FEATURES / MIB
KERNEL = DKERNEL / 2
# Of memory, in MiB, beside the gradients themselves.
MOST = {
    "mean": 600 + DKERNEL,
    passes.SCALED: 600 + DKERNEL,
    "mean within 128 MiB": 128 + DHIDDEN,
    "none": 512 + DHIDDEN,
    "none with room": passes.ROOMY / MIB + DHIDDEN + 40,
}
# XLA lays the kernel out anew for a 7x, and its gradient after the loop: so many
# kernels more than elsewhere. For the mean it puts one where the result will be.
COPIES = {"mean within 128 MiB": 2, "none": 2.2, "none with room": 2}
# Of gigabytes that the mean reads and writes, where each instruction's count: the sum
# of dkernel alone is 4 for each of five chunks.
MOVED = {"h100": 85e9, "b200": 85e9, "v5e": 45e9, "v6e": 45e9, "7x": 92e9}


@pytest.mark.parametrize(
    "target",
    [
        "h100",
        "v6e",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("b200", "v5e", "7x")),
    ],
)
def test_logits_are_computed_once(target):
    found = {result["name"]: result for result in results("passes", target)}
    assert set(found) == {*passes.MEANS, *passes.OF_TOKENS}
    for name, result in found.items():
        # Of N·H·V flops, of which value and gradient of stored logits take 6; chunks
        # may compute a few rows twice.
        once = name in ("mean", passes.SCALED, "none with room")
        assert result["passes"] <= (6.05 if once else 8.05), result
        assert not result["least"], result
        copied = COPIES.get(name, 0) * KERNEL if target == "7x" else 0
        most = MOST[name] + copied
        assert result["mib"] <= most, (most, result)
        if name in ("mean", passes.SCALED):
            assert result["moved"] <= MOVED[target], result
