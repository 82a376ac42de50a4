"""The kernels for rows compiled to machine code for chips that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators import rows
from tests.accelerators.compiling import MIB, results


def kernels(what):
    """Returns the names of the kernels that a program has."""
    named = {"gradient": rows.KERNELS[:2]}
    named |= dict.fromkeys(("noise", "hard"), rows.KERNELS[2:3])
    named |= dict.fromkeys(("log", "log gradient"), rows.KERNELS[3:4])
    named |= dict.fromkeys(("entropy", "losses"), rows.KERNELS[4:])
    return list(named.get(what, rows.KERNELS[:1]))


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_rows_on_tpus(chip):
    """Rows that fit in VMEM: each array is read once, or written once."""
    found = results("rows", "v6e", chip)
    assert len(found) == 12
    for result in found:
        backward = result["what"] == "gradient"
        assert result["kernels"] == kernels(result["what"]), result
        count, classes, dtype = rows.SHAPES[result["name"]]
        # Backward with the forward: x and y, then y and g and the gradient.
        accesses = 5 if backward else 2 + (result["name"] == "longest")
        assert result["accesses"] == pytest.approx(accesses, rel=5e-3), result
        # The forward's y, or the keys of rows, which fill lanes; and nothing else.
        count = rows.limited(chip, count)
        held = count * classes * (4 if dtype == "float32" else 2) * backward
        assert result["mib"] <= (held + count * 128 * 4) / MIB + 1, result


@pytest.mark.parametrize("chip, code", [("h100", "sm_90a"), ("b200", "sm_100a")])
def test_rows_on_gpus(chip, code):
    """Machine code without spills, and of 128-number lines no copy but y."""
    found = results("rows", chip, chip)
    assert len(found) == 27
    for result in found:
        backward = result["what"] == "gradient"
        assert result["kernels"] == kernels(result["what"]), result
        # Empty where the same kernel was compiled before.
        assert set(result["targets"]) <= {code}, result
        assert result["spills"] == [], result
        assert all(int(registers) <= 128 for registers in result["registers"]), result
        count, classes, dtype = rows.SHAPES[result["name"]]
        held = count * classes * (4 if dtype == "float32" else 2) / MIB
        # Rows that TMA cannot read are padded, and their results cut.
        padded = 2 if result["name"] in ("unaligned", "longest") else 0
        assert result["mib"] <= held * 1.01 * (backward + padded) + 1, result
