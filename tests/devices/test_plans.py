"""The plan of a layer's gradient, its products and its memory, here and elsewhere."""

import jax
import pytest

from jaxsoft.devices.measuring import describe, here
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.surveying import survey
from jaxsoft.devices.target import TARGETS

MIB = 2**20
N, H, V = 2048, 64, 16384


def sizes(dtype: str, mebibytes: int) -> Shapes:
    return Shapes(N, H, V, dtype, mebibytes * MIB)


def check(found, kind, *, most=None):
    """Requires a plan of the default, and the products that go with it."""
    ran = found.implementations[0]
    (plan,) = ran.plans
    assert plan.kind == kind
    kept = plan.kept_classes / V
    assert {"recompute": kept == 0, "keep": 0 < kept < 1, "chunks": kept == 1}[kind]
    products = {k: work.dot_flops / (N * H * V) for k, work in ran.work.items()}
    # Tiles at the end may cover what others have.
    assert 2 <= products["value"] <= 2.2
    # Of tiles that are kept or computed again the most counts.
    most_products = 8 if 0 < kept < 1 else 8 - 2 * kept
    assert 8 - 2 * kept <= products["value_and_grad"] <= 1.1 * most_products
    for one in ran.work.values():
        assert not one.is_least and one.accessed > 2 * (N * H + H * V)
    taken = ran.temporaries["value_and_grad"]
    assert taken is not None and taken < (most or 4 * N * V)
    return plan


@pytest.mark.parametrize(
    "name, mebibytes, kind",
    [
        ("linear_log_prob", 2, "recompute"),
        ("linear_log_prob", 64, "keep"),
        ("linear_cross_entropy", 64, "chunks"),
    ],
)
def test_plans_here(name, mebibytes, kind, optimized, monkeypatch):
    # With more devices all classes are kept, or none.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (found,) = describe(here(), [name], sizes("float32", mebibytes))
    plan = check(found, kind, most=(mebibytes + 8) * MIB)
    assert (plan.chunk_rows > 0) == (kind == "chunks")
    stored = found.implementations[1]
    assert stored.name == "reference" and not stored.plans


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_plans_on_targets(target):
    if not TARGETS[target].installed():
        pytest.skip(f"the extra aot is not installed: no {TARGETS[target].package}")
    names = ["linear_log_prob", "linear_cross_entropy"]
    kept, reduced = survey(target, names, sizes("bfloat16", 32))
    check(kept, "keep")
    check(reduced, "chunks")
    kernel = kept.implementations[-1 if TARGETS[target].platform == "cuda" else -2]
    if kernel.refused is None:
        # Kernels keep nothing, and those for GPUs do not tell what they do.
        assert [plan.kind for plan in kernel.plans] == ["recompute"]
        is_silent = kernel.name == "mosaic_gpu"
        for work in kernel.work.values():
            assert work is not None and work.is_least == is_silent
