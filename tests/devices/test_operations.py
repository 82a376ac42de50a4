"""The table of functions: all of them, and what each may be asked for."""

import inspect
from collections.abc import Iterator
from typing import Any, get_args

import jax
import pytest

import jaxsoft
from jaxsoft._core import registry
from jaxsoft._core.registry import Gpu, Implementation, compiling_for
from jaxsoft.devices.measuring import Device, Found, describe
from jaxsoft.devices.operations import operations
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.target import TARGETS

MOSAIC = ("mosaic_tpu", "mosaic_gpu")
CPU, CUDA = Device("cpu", "a CPU"), Device("cuda", "a GPU")
KERNEL_FUNCTIONS = (
    dict.fromkeys(
        ("linear_statistics", "linear_cross_entropy", "linear_log_prob"),
        ("xla", "reference", *MOSAIC),
    )
    | {
        "softmax": ("xla", *MOSAIC),
        "gumbel_softmax": ("xla", *MOSAIC),
    }
    | dict.fromkeys(
        (
            "log_softmax",
            "logsumexp",
            "entropy",
            "softmax_cross_entropy",
            "linear_sample",
        ),
        ("xla", "mosaic_gpu"),
    )
)


def found_on(device: Device, *names: str) -> dict[str, Found]:
    return {one.operation: one for one in describe(device, names, None)}


def programs() -> Iterator[tuple[str, Any]]:
    for name, operation in operations().items():
        if operation.chooses:
            yield name, operation


def test_every_public_function_is_there():
    public = {
        name for name in jaxsoft.__all__ if inspect.isfunction(getattr(jaxsoft, name))
    }
    # What makes another function of one of them.
    assert set(operations()) == public - {"over_mesh"}


def test_functions_take_what_is_said_and_nothing_else():
    found = found_on(CPU, *operations())
    for name, operation in programs():
        said = [ran.name for ran in found[name].implementations]
        program = operation.program(Shapes())
        for other in get_args(Implementation):
            options = operation.options(other)
            if other in MOSAIC and other in said:
                continue
            try:
                jax.eval_shape(
                    lambda *a, p=program, o=options: p.function(*a, **o),
                    *program.arrays,
                )
                taken = True
            except NotImplementedError:
                taken = False
            assert taken == (other in said), (name, other)


def test_kernels_are_of_the_functions_that_have_them():
    found = found_on(CPU, *operations())
    for name, one in found.items():
        names = tuple(ran.name for ran in one.implementations)
        assert one.uses == names[0] == "xla"
        kernels = KERNEL_FUNCTIONS.get(name)
        assert names == kernels if kernels else not set(names) & set(MOSAIC), name
        # None of them runs on a CPU.
        refused = {ran.name for ran in one.implementations if ran.refused}
        assert refused == {n for n in names if n in MOSAIC}


def test_the_default_is_the_resolvers(monkeypatch):
    reversed_ = ("reference", "xla")
    monkeypatch.setitem(registry._OPERATIONS, "linear_cross_entropy", reversed_)
    (one,) = found_on(CPU, "linear_cross_entropy").values()
    assert one.uses == "reference"
    assert [ran.name for ran in one.implementations] == ["reference", "xla"]


@pytest.mark.parametrize(
    "capability, shapes, reason",
    [
        ("9.0", Shapes(), None),
        ("8.0", Shapes(), "compute capability 9.0"),
        ("9.0", Shapes(hidden=60), "must be a multiple of 16"),
        ("9.0", Shapes(dtype="float32"), "bfloat16"),
    ],
)
def test_a_gpu_elsewhere_is_asked_what_its_kernel_asks(
    capability, shapes, reason, monkeypatch
):
    monkeypatch.setattr("jaxsoft.devices.measuring.Shapes", lambda: shapes)
    with compiling_for(Gpu(capability, 132)):
        (one,) = found_on(CUDA, "linear_statistics").values()
    refused = {ran.name: ran.refused for ran in one.implementations}
    assert refused["xla"] is refused["reference"] is None
    assert refused["mosaic_tpu"] == "it is for tpu"
    if reason is None:
        assert refused["mosaic_gpu"] is None
    else:
        assert reason in refused["mosaic_gpu"]


def test_targets_describe_themselves():
    found = {
        target.name: (target.gpu, target.description) for target in TARGETS.values()
    }
    assert found["h100"][0] == ("9.0", 132) and found["b200"][0] == ("10.0", 148)
    assert "B200" in found["b200"][1]
    assert found["7x"] == (None, "TPU 7x")
