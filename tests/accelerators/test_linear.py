"""The linear room compiled to machine code for accelerators that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators.compiling import NEWER, TARGETS, results

# Stored logits take 4,008 to 12,000 MiB, in bfloat16 a shard 1,000 at the least. A
# value takes tiles, a rank half of the largest workspace that is a default, and what
# needs the logits of two layers twice all of it; a gradient takes that, float32 sums of
# dhidden and of what is mixed, and tiles.
VALUE, GRADIENT = 256, 512 + 72 + 72 + 64
NEEDED_TWICE = ("forward_kl", "jensen_shannon", "labelled")
WORKSPACE = 512
# Losses that are reduced inside the call have a float32 sum of dkernel beside it, but
# not under vmap, whose examples' cotangents may differ.
REDUCED = (
    "cross_entropy",
    "forward_kl",
    "jensen_shannon",
    "labelled",
    "distillation_top_k",
    "labelled_top_k",
)
SUM = 2304 * 256000 * 4 / 2**20
# Gradients of a shard of kernel and values, which newer compilers for TPUs hold before
# they sum them over shards of tokens; a shard of bfloat16 logits takes 1,000 MiB.
SHARDS = (2304 + 512) * 128000 * 2 / 2**20
# Of the mean loss alone, beside the gradients: what chunks keep lies where dkernel
# will.
BOUNDS = {
    ("h100", "value"): 128,
    ("h100", "value_and_grad"): SUM + 128,
    ("v6e", "value"): 16,
    ("v6e", "value_and_grad"): SUM + 74,
}


@pytest.mark.parametrize("target", TARGETS)
def test_tied_embeddings_of_gemma2(target):
    found = results("linear", target, "table")
    assert len(found) == 2
    for result in found:
        what = result["what"]
        assert result["mib"] <= BOUNDS[target, what], result
        # Every matrix product reads bfloat16: none was widened.
        assert result["wide"] == 0, result
        # Logits once, and the gradients of both.
        assert result["products"] == (1 if what == "value" else 3), result


@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_short_kernels_adapters_masks_and_ranks(target):
    found = results("linear", target, "operands")
    assert len(found) == 9
    for result in found:
        # A kernel of int8 has 562 MiB, and one of bfloat16 1,125. With a mask a TPU
        # lays out what is kept of tiles twice, by rows and by classes.
        is_small = result["what"] == "value" and result["name"] != "ranks"
        assert result["mib"] <= (64 if is_small else 256), result


@pytest.mark.parametrize(
    "target, mode",
    [
        ("h100", "vmap"),
        ("h100", "tokens"),
        ("h100", "mesh"),
        ("h100", "explicit"),
        ("v6e", "mesh"),
        ("v6e", "explicit"),
    ],
)
def test_temporaries_and_traffic(target, mode):
    found = {(r["name"], r["what"]): r for r in results("linear", target, mode)}
    assert len(found) == (26 if target == "h100" else 5)
    for (name, what), result in found.items():
        most = VALUE if what == "value" else GRADIENT
        most = WORKSPACE if what == "value" and name in NEEDED_TWICE else most
        if what == "value_and_grad" and name in REDUCED and mode != "vmap":
            most += SUM if mode == "tokens" else SUM / 2
            # XLA lays it out anew, twice, where a TPU multiplies it by a cotangent.
            most += SUM * ((target, mode) == ("v6e", "explicit"))
        most += SHARDS if NEWER and (target, what) == ("v6e", "value_and_grad") else 0
        assert result["mib"] <= most, (most, result)
        if mode == "vmap":
            assert result["collectives"] == [], result
    if mode == "vmap":
        return
    rows, classes = 8192 // 2, 256000 // 2
    for (name, what), result in found.items():
        large = [
            (op, shape)
            for op, shape in result["collectives"]
            if any(f"{n}]" in shape for n in (2304, 1024, 512, classes, 256000))
        ]
        # Nothing as large as hidden states or a kernel moves but sums of gradients.
        assert all(op in ("all-reduce", "reduce-scatter") for op, _ in large), result
        # A drawn block has 512 classes, as many as what is mixed has numbers.
        if what == "value" and name not in ("expected", "gumbel", "filtered_sample"):
            assert large == [], result
    if mode == "tokens":
        return
    forward = found["cross_entropy", "value"]["collectives"]
    # One maximum with what says where it is NaN, one sum of two numbers a token, and
    # the mean.
    assert [op for op, _ in forward] == ["all-reduce"] * 3
    assert sorted(shape for _, shape in forward) == sorted(
        [f"f32[2,{rows},1]", f"f32[{rows},2]", "f32[]"]
    )
