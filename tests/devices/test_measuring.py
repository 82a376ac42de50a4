"""Memory of compiled programs, on the device that is here."""

import jax.numpy as jnp
import pytest

from jaxsoft.devices.measuring import describe, here
from jaxsoft.devices.programs import Program, Shapes, array

SHAPES = Shapes(tokens=2048, hidden=8, vocabulary=4096, dtype="float32")
LOGITS = 4 * SHAPES.tokens * SHAPES.vocabulary


def test_temporaries_of_streamed_and_stored_logits(optimized):
    names = ["linear_cross_entropy", "hierarchical_value_and_row_grad", "row_sgd"]
    loss, tree, rows = describe(here(), names, SHAPES)
    streamed, stored, *kernels = loss.implementations
    assert (streamed.name, stored.name) == ("xla", "reference")
    for kind in ("value", "value_and_grad"):
        # A tile is 4 MiB at the least; the gradient's float32 sum is small.
        assert streamed.temporaries[kind] < 0.8 * LOGITS <= stored.temporaries[kind]
    assert all(one.refused and not one.temporaries for one in kernels)
    (one,) = tree.implementations
    # It is value and gradient at once, of the rows on paths.
    assert set(one.temporaries) == {"value_and_grad"}
    (one,) = rows.implementations
    assert set(one.temporaries) == {"value"}


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

    monkeypatch.setattr("jaxsoft.devices.measuring._temporaries", refuse)
    (one,) = describe(here(), ["linear_sample"], Shapes())
    assert one.implementations[0].refused == "`hidden` must be narrower."


@pytest.mark.parametrize("vocabulary", [3, 4, 101])
def test_small_vocabularies_have_bands_and_best_classes(vocabulary):
    names = ["adaptive_top_k", "hierarchical_top_k", "gumbel_top_k", "linear_top_k"]
    shapes = Shapes(tokens=2, hidden=1, vocabulary=vocabulary, dtype="float32")
    for one in describe(here(), names, shapes):
        assert one.implementations[0].refused is None
