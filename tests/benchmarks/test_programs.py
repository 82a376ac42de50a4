"""What programs take is counted as it is, and what grew is found."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
from benchmarks import __main__ as command
from benchmarks import programs, programs_cases, programs_figures


def record_of(**figures):
    return {"programs": {"cpu": {"f value": figures}}}


@functools.cache
def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), programs_cases.AXES)


class TestChanges:
    def test_little_is_no_change(self):
        old, new = record_of(dots=100, temporaries=1000), record_of(dots=102, flops=0)
        new["programs"]["cpu"]["f value"]["temporaries"] = 981
        assert programs.changes(old, new) == []

    def test_the_worst_comes_first(self):
        old = record_of(dots=4, temporaries=100)
        new = record_of(dots=2, temporaries=103, flops=7)
        assert programs.changes(old, new) == [
            ("cpu", "f value", "flops", 0, 7, math.inf),
            ("cpu", "f value", "temporaries", 100, 103, 1.03),
            ("cpu", "f value", "dots", 4, 2, 0.5),
        ]

    @pytest.mark.parametrize("figure", ["all-reduce bytes", "all_gather"])
    def test_collectives_may_not_change_at_all(self, figure):
        old, new = record_of(**{figure: 1000}), record_of(**{figure: 999})
        assert len(programs.changes(old, new)) == 1

    def test_a_program_that_compiles_no_longer_grew_without_end(self):
        old, new = record_of(dots=4), record_of(error="Out of memory.")
        assert programs.changes(old, new)[0][-1] == math.inf
        assert programs.changes(new, old)[0][-1] == 0
        assert programs.changes(new, new) == []

    def test_what_one_record_lacks_is_no_change(self):
        other = {"programs": {"h100": {}, "cpu": {"g value": {"dots": 1}}}}
        assert programs.changes(record_of(dots=4), other) == []


class TestMeasure:
    def test_a_loop_counts_as_often_as_it_runs(self):
        def function(x, matrix):
            return jax.lax.fori_loop(0, 5, lambda _, x: jnp.exp(x @ matrix), x)

        arrays = [jax.ShapeDtypeStruct(s, "float32") for s in ((3, 8), (8, 8))]
        program = programs_cases.Program(function, tuple(arrays), (P(), P()))
        figures = programs_figures.measure(program, mesh(), "cpu")
        assert figures["dots"] == figures["machine dots"] == 1
        assert figures["dot flops"] == figures["dot flops f32"] == 5 * 2 * 3 * 8 * 8
        assert figures["transcendentals"] == 5 * 3 * 8
        assert figures["arguments"] == 4 * (3 * 8 + 8 * 8)
        assert "open loops" not in figures

    def test_collectives_are_those_of_one_device(self):
        def function(x):
            sum_of_rows = functools.partial(jax.lax.psum, axis_name="data")
            return jax.shard_map(
                sum_of_rows, mesh=mesh(), in_specs=P("data"), out_specs=P()
            )(x)

        array = jax.ShapeDtypeStruct((6, 5), "float32")
        program = programs_cases.Program(
            function, (array,), (P("data"),), programs_cases.MESH
        )
        figures = programs_figures.measure(program, mesh(), "cpu")
        for name in ("all_reduce", "all-reduce"):
            assert (figures[name], figures[f"{name} bytes"]) == (1, 4 * 3 * 5)


@pytest.mark.parametrize(
    ("title", "least", "most"),
    [
        # Passes over the logits: with all of them, by chunks, with a part, with none;
        # the last tiles overlap. Of a part a program's text has both, as with none.
        ("linear_cross_entropy default", 3, 3),
        ("linear_cross_entropy chunks", 3, 3.2),
        ("linear_cross_entropy kept", 3.5, 4),
        ("linear_log_prob kept", 3.5, 4),
        ("linear_cross_entropy", 4, 4),
    ],
)
def test_programs_have_every_plan(title, least, most):
    program = programs_cases.programs(mesh(), "float32")[f"{title} gradient"]
    figures = programs_figures.measure(program, mesh(), "cpu")
    (rows, features), (_, classes) = (array.shape for array in program.arrays[:2])
    assert least <= figures["dot flops"] / (2 * rows * features * classes) <= most


def test_a_record_is_compared_with_an_earlier_one(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    options = ["programs", "--targets", "cpu", "--only", "logsumexp", "--out"]
    assert command.main([*options, str(old)]) == 0
    record = json.loads(old.read_text())
    (figures,) = record["programs"]["cpu"].values()
    assert figures["transcendentals"] > figures["results"] / 4
    signature = record["signatures"]["jaxsoft.logsumexp"]
    assert signature.startswith("(logits: ArrayLike, ")
    assert record["signatures"].keys() >= {f"jaxsoft.{n}" for n in jaxsoft.__all__} - {
        "jaxsoft.schedules"
    }
    figures["transcendentals"] //= 2
    record["signatures"]["jaxsoft.logsumexp"] = "(x)"
    old.write_text(json.dumps(record))
    capsys.readouterr()
    assert command.main([*options, str(new), "--against", str(old)]) == 1
    said = capsys.readouterr().out
    assert "- jaxsoft.logsumexp(x)\n+ jaxsoft.logsumexp(logits" in said
    assert "1 of 1 programs compared, 1 figures grew, 0 shrank" in said
