"""The hierarchical room compiled to machine code for accelerators that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason. Bounded are
temporaries, what a call takes beside its arguments and its results; XLA may keep some
of them where a result is to be.
"""

import pytest

from jaxsoft.linear.plans import Layer
from tests.accelerators.compiling import NEWER, results

MIB = 2**20
CLASSES, ROWS, FEATURES, SAMPLES = 10**6, 8192, 1024, 8192
# Hidden states in float32, and a kernel in bfloat16.
HIDDEN, KERNEL = ROWS * FEATURES * 4 / MIB, CLASSES * FEATURES * 2 / MIB
# The float32 sum of a reduced loss's dkernel, and the workspace of a call that names
# none.
SUM = 2 * KERNEL
WORKSPACE = Layer(ROWS, FEATURES, CLASSES).workspace(None) / MIB
# Paths, tables on their way through, and what a program takes anyhow.
SLACK = 32.0


def found_for(target, family):
    """Returns the results of a family by name."""
    return {
        result["what"]: result for result in results("hierarchical", target, family)
    }


@pytest.mark.parametrize(
    "target, family", [("h100", "huffman"), ("h100", "taxonomy"), ("v6e", "taxonomy")]
)
def test_trees_in_tables(target, family):
    found = found_for(target, family)
    assert len(found) == (2 if family == "taxonomy" else 7)
    # Beams are of 2**23 numbers, and so are all log-probabilities of some tokens, which
    # TPUs may pad to 128 tokens.
    best = 4 * 2**23 * 4 / MIB if target == "h100" else 128 * CLASSES * 4 / MIB
    bounds = {
        "value": HIDDEN + SLACK,
        "value_and_grad": 3 * HIDDEN + SLACK,
        "sgd step": 3 * HIDDEN + SLACK,
        "adagrad step": 3 * HIDDEN + SLACK,
        "adam step": 3 * HIDDEN + SLACK,
        "sample": SLACK,
        "top_k": best + SLACK + 16,
    }
    for name, result in found.items():
        # Far below the kernel: nothing has a number for every row of it and feature.
        assert result["mib"] <= bounds[name] < KERNEL / 3, result
        # Parameters and states are updated where they are.
        assert result["aliased"] >= result["donated"], result
        assert (result["donated"] > 0.99 * KERNEL) == name.endswith("step"), result


@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_rows_of_sampled_classes(target):
    (result,) = found_for(target, "sampled").values()
    # Logits of the sampled classes, and vectors of those and of the labels; newer
    # compilers for TPUs keep the derivative in bfloat16 beside them.
    numbers = 4 + 2 * (NEWER and target == "v6e")
    bound = ROWS * SAMPLES * numbers / MIB + 2 * HIDDEN
    assert result["mib"] <= bound < KERNEL / 4, result


def test_full_softmax_beside_them():
    found = found_for("h100", "full")
    assert len(found) == 8
    for name, result in found.items():
        if name.startswith("stored"):
            assert result["mib"] >= ROWS * CLASSES * 2 / MIB, result
        elif name.endswith("step"):
            # Its gradient has a number for every class and feature, summed in float32,
            # and is no result: the workspace finds no room where one will be.
            most = SUM + WORKSPACE + 3 * HIDDEN
            assert KERNEL <= result["mib"] <= most, result
        elif name.endswith("grad"):
            assert result["mib"] <= SUM + WORKSPACE + HIDDEN, result
        else:
            assert result["mib"] <= 2 * HIDDEN + SLACK, result
