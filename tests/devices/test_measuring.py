"""Memory of compiled programs, on the device that is here."""

import jax.numpy as jnp
import pytest

from jaxsoft._core import defaults
from jaxsoft._core.defaults import Default
from jaxsoft._core.registry import TPUS, compiling_for
from jaxsoft.devices.chips import CHIPS
from jaxsoft.devices.hlo import Work
from jaxsoft.devices.measuring import Device, Ran, describe, here
from jaxsoft.devices.operations import operations
from jaxsoft.devices.programs import Program, Shapes, array
from jaxsoft.devices.ptx import Kernel

SHAPES = Shapes(2048, 8, 4096, "float32", workspace=4 * 2**20)
LOGITS = 4 * SHAPES.tokens * SHAPES.vocabulary


def test_temporaries_of_streamed_and_stored_logits(optimized):
    (loss,) = describe(here(), ["linear_cross_entropy"], SHAPES)
    streamed, stored, *kernels = loss.implementations
    assert (streamed.name, stored.name) == ("xla", "reference")
    for kind in ("value", "value_and_grad"):
        # The gradient's float32 sum is small.
        few, many = streamed.temporaries[kind], stored.temporaries[kind]
        assert few is not None and many is not None
        assert few < 0.8 * LOGITS <= many
    assert all(one.refused and not one.temporaries for one in kernels)


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("softmax", ["value", "value_and_grad"]),
        ("linear_sample", ["value"]),
        # Both at once, of the rows on paths.
        ("hierarchical_value_and_row_grad", ["value_and_grad"]),
    ],
)
def test_what_there_is_to_compile(name, kinds):
    program = operations()[name].program(Shapes())
    assert [kind for kind, _, _ in program.calls({})] == kinds


def test_value_and_gradient_are_those_of_the_function():
    def function(x, y, *, scale):
        return x * y * scale, jnp.arange(3)

    x = array(3, dtype="float32")
    program = Program(function, (x, x), 1, lambda result: result[0])
    calls = {kind: call for kind, call, _ in program.calls({"scale": 2.0})}
    ones = jnp.ones(3)
    assert calls["value"](ones, 3 * ones)[0].tolist() == [6, 6, 6]
    value, (gradient,) = calls["value_and_grad"](ones, ones, 3 * ones)
    assert value.tolist() == gradient.tolist() == [6, 6, 6]


def test_what_does_not_compile_is_said(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("`hidden` must be\nnarrower.")

    monkeypatch.setattr("jaxsoft.devices.measuring._compiled", refuse)
    (one,) = describe(here(), ["linear_sample"], Shapes())
    assert one.implementations[0].refused == "`hidden` must be narrower."


def test_functions_of_layers_alone_have_passes_of_kernels(monkeypatch):
    """A softmax may be asked for by the same name, and takes no kernel of a layer."""
    table = [
        Default("statistics", "mosaic_tpu", chip, "scheduled", 1, (1, 9), 1)
        for chip in ("v5e", "v6e")
    ]
    monkeypatch.setattr(defaults, "DEFAULTS", tuple(table))
    names = ["softmax", "log_softmax", "linear_cross_entropy", "linear_sample"]
    device = Device("tpu", "v6e")
    with compiling_for(TPUS["v6e"]):
        found = list(describe(device, names, None))
        taken = {one.operation: one.implementations[0].defaults for one in found}
        assert taken.pop("linear_cross_entropy") == (table[1],)
        assert not any(taken.values())
        monkeypatch.setenv(defaults.VARIABLE, "0")
        (one,) = describe(device, ["linear_cross_entropy"], None)
        assert one.implementations[0].defaults == ()


@pytest.mark.parametrize(
    "kernel, known",
    [
        (None, False),
        (Kernel("one_mosaic_gpu_kernel", 384), False),
        (Kernel("one_mosaic_gpu_kernel", 384, loop={"matrix": 4}, copies=9), False),
        (Kernel("one_mosaic_gpu_kernel", 384, loop={"matrix": 0}, copies=9), True),
        # Code without any loop.
        (Kernel("one_mosaic_gpu_kernel", 384, loop=None, copies=0), True),
    ],
)
def test_the_least_time_of_a_kernel_that_hides_products(kernel, known):
    """Bytes alone would bound a product by a small part of its time."""
    chip, work = CHIPS["h100"], Work(0, 3352 * 10**6, is_least=True, is_untold=True)
    fusion = Kernel("a_fusion", 128, loop={"matrix": 0}, copies=0)
    kernels = {} if kernel is None else {"value": [fusion, kernel]}
    least = Ran("mosaic_gpu", work={"value": work}, kernels=kernels).least(
        "value", chip
    )
    assert (least is not None) == known
    if least is not None:
        assert least.seconds == pytest.approx(1e-3)


def test_three_classes_have_bands_and_best_classes():
    names = ["adaptive_top_k", "gumbel_top_k"]
    shapes = Shapes(tokens=2, hidden=1, vocabulary=3, dtype="float32")
    for one in describe(here(), names, shapes):
        assert one.implementations[0].refused is None
