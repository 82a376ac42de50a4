"""The Mosaic GPU kernels compiled to machine code for GPUs that are not here.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import jax

from jaxsoft.kernels.layer.mosaic_gpu import blackwell, hopper
from jaxsoft.kernels.layer.mosaic_gpu import plan as planning
from tests.accelerators.compiling import MIB, results

HEADS = {"llama3": (4096, 128256), "qwen3": (4096, 151936), "gemma3": (2560, 262144)}


def partials(rows, classes, floats=5, integers=1, chip=(132, False)):
    """Returns the MiB of the statistics of every split, and of their merge."""
    blocks, splits = planning.choose_gpu_blocks(rows, classes, 128, *chip)
    tile = blocks.block_rows * blocks.cluster
    padded = -(-rows // tile) * tile
    # Joining the splits may take as much again, beside a MiB of small change.
    return 2 * 4 * padded * splits * (floats + integers) / MIB + 1


def groups(rows, features, classes):
    """Returns the MiB of a sample's groups, twice, and of what it reads again."""
    padded = -(-rows // 128) * 128
    gathered = min(rows, 128) * features * planning.GROUP * 2
    return (2 * 2 * 4 * padded * classes / planning.GROUP + 2 * gathered) / MIB + 1


def check(result, spills=False, name=hopper.KERNEL_NAME):
    """Requires one call of our kernel, in Hopper's own code, without spills."""
    assert result["calls"] == [name], result
    # Empty where the same kernel was compiled before.
    assert set(result["targets"]) <= {"sm_90a"}, result
    assert not result["targets"] or result["wgmma"] > 0, result
    assert spills or result["spills"] == [], result


def test_heads_of_real_models():
    found = {r["name"]: r for r in results("mosaic_gpu", "h100", "heads")}
    for name, (_, classes) in HEADS.items():
        for rows in (4096, 8):
            result = found[f"{name} {rows}"]
            check(result)
            assert result["targets"] == ["sm_90a"] and result["registers"] == ["168"]
            assert result["mib"] <= partials(rows, classes), result


def test_options_layouts_and_the_gradient():
    found = {r["name"]: r for r in results("mosaic_gpu", "h100", "options")}
    bounds = {
        # With the bias and the mask as one float32 row.
        "every option": partials(1000, 262144, 5, 2) + 1,
        "vh 50257": partials(4096, 50257, 3, 0),
        "hv 50288": partials(100, 50288, 3, 0),
        "vh narrow": partials(300, 50256, 3, 0),
        "hv narrow": partials(300, 50304),
        "sample 64": groups(64, 4096, 151936),
        "sample vh": groups(300, 768, 50257),
        # XLA's backward pass: a tile, the float32 sum of dhidden, and columns of rows.
        "gradient": 128 + 1,
    }
    for name, bound in bounds.items():
        # The soft-cap's tangents may spill some 400 times a tile, none of them in the
        # loop of the products; a narrower tile would read more.
        sample = name.startswith("sample")
        kernel = hopper.SAMPLE_NAME if sample else hopper.KERNEL_NAME
        check(found[name], spills=name == "every option", name=kernel)
        if name in ("vh 50257", "sample vh") and jax.__version_info__ < (0, 11):
            # XLA then copied the slice that leaves the last class out.
            bound += 50256 * 768 * 2 / MIB
        assert found[name]["mib"] <= bound, found[name]


def test_shards_of_tokens_and_classes():
    for result in results("mosaic_gpu", "h100", "mesh"):
        check(result)
        # One maximum, one sum of a token's numbers, and the mean; nothing is gathered.
        assert result["collectives"] == ["all-reduce"] * 3, result
        assert result["mib"] <= partials(2048, 64128), result


def test_blackwell():
    """Its kernel has tcgen05's instructions, for its own architecture, and no spill."""
    found = {r["name"]: r for r in results("mosaic_gpu", "b200", "both")}
    chip = (148, True)
    bounds = {
        "llama3 4096": partials(4096, 128256, chip=chip),
        "llama3 8": partials(8, 128256, chip=chip),
        "every option": partials(1000, 262144, 5, 2, chip) + 1,
        "vh 50257": partials(4096, 50257, 3, 0, chip),
        "hv 50288": partials(100, 50288, 3, 0, chip),
        "vh narrow": partials(300, 50256, 3, 0, chip),
        "hv narrow": partials(300, 50304, 5, 1, chip),
        "sample 64": groups(64, 4096, 151936),
        "sample vh": groups(300, 768, 50257),
    }
    for name, bound in bounds.items():
        result = found[name]
        sample = name.startswith("sample")
        kernel = blackwell.SAMPLE_NAME if sample else blackwell.KERNEL_NAME
        assert result["calls"] == [kernel], result
        assert set(result["targets"]) <= {"sm_100a"}, result
        assert not result["targets"] or result["tcgen05"] > 0, result
        assert result["wgmma"] == 0 and result["spills"] == [], result
        if name in ("vh 50257", "sample vh") and jax.__version_info__ < (0, 11):
            bound += 50256 * 768 * 2 / MIB
        assert result["mib"] <= bound, result
    assert found["llama3 4096"]["targets"] == ["sm_100a"]
