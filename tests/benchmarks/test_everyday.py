"""Everything public is compared with a formula, and what is wrong is not timed."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from benchmarks import __main__ as command
from benchmarks import everyday, everyday_compiled, everyday_report, timing
from benchmarks.everyday_case import GRADIENT, OURS, PLAIN, VALUE, Inputs, Pair, Size

CASES = [
    pytest.param(room, case, id=f"{case.name} {room.name}")
    for room in everyday.ROOMS
    for case in room.cases
]


@pytest.fixture(autouse=True)
def defaults():
    """A user's formulas are written with JAX's own rules of promotion."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def run(*arguments):
    return command.main(["everyday", "--rounds", "1", *map(str, arguments)])


def cells_of(tmp_path, *arguments):
    path = tmp_path / "cells.json"
    code = run("--sizes", "64x10", "--out", path, *arguments)
    return code, json.loads(path.read_text())["cells"]


def cell_of(function, ratio, *, compile_excess=0.5, **fields):
    return {
        "room": "stored logits",
        "function": function,
        "title": "",
        "what": VALUE,
        "size": "64x10",
        "dtype": "float32",
        "status": "timed",
        "reason": "",
        "compile_seconds": {PLAIN: 0.1, OURS: 0.2},
        "compile_bound": 0.4,
        "compile_excess": compile_excess,
        "temporary_bytes": {PLAIN: 2**20, OURS: 2**19},
        "seconds": {PLAIN: 1e-3, OURS: ratio * 1e-3},
        "ratio": ratio,
        "ratio_bound": 1.05,
        "ratio_excess": ratio / 1.05,
        **fields,
    }


class TestCoverage:
    def test_every_public_name_has_cells_or_a_reason(self):
        assert everyday.unexplained() == []
        timed = {case.function for room in everyday.ROOMS for case in room.cases}
        assert timed.isdisjoint(everyday.UNTIMED)
        assert timed | {*everyday.UNTIMED} == {*jaxsoft.__all__}

    def test_a_name_without_either_fails_the_run(self, monkeypatch, tmp_path, capsys):
        monkeypatch.delitem(everyday.UNTIMED, "over_mesh")
        code, _ = cells_of(tmp_path, "--only", "logsumexp")
        assert code == 1
        assert "over_mesh has no cell, and no reason" in capsys.readouterr().err

    def test_no_two_cells_have_the_same_name(self):
        names = [
            (room.name, case.name, what, size)
            for room in everyday.ROOMS
            for case in room.cases
            for size in filter(case.at, room.sizes)
            for what in case.whats
        ]
        assert len(names) == len(set(names))

    @pytest.mark.parametrize(("room", "case"), CASES)
    def test_the_formula_has_the_shapes_of_ours(self, room, case):
        size = next(filter(case.at, room.sizes))
        if case.chained:
            assert case.ours(size).program and case.plain(size).program
            return
        inputs = Inputs(room, size)
        arrays = [inputs[name] for name in case.inputs.split()]
        found, known = (
            jax.tree.leaves(jax.eval_shape(function, *arrays))[: case.compared]
            for function in (case.ours, case.plain)
        )
        assert [x.shape for x in found] == [x.shape for x in known]
        assert {*case.moving.split()} <= {*case.inputs.split()}


class TestRun:
    def test_cells_are_written_shown_and_drawn(self, tmp_path, capsys):
        path, image = tmp_path / "cells.json", tmp_path / "map.png"
        only = ("softmax_cross_entropy", "sample", "linear_top_k", "row_sgd")
        sizes = ("64x10", "64x64x10", "256x128x64")
        options = ("--only", *only, "--sizes", *sizes, "--out", path, "--plot", image)
        assert run(*options) == 0
        terminal = capsys.readouterr().out
        document = json.loads(path.read_text())
        assert document["machine"]["versions"]["jax"] == jax.__version__
        cells = document["cells"]
        assert {cell["function"] for cell in cells} == {*only}
        assert {cell["size"] for cell in cells} == {*sizes}
        assert {cell["dtype"] for cell in cells} == {"float32", "bfloat16"}
        for cell in cells:
            assert cell["status"] == "timed", cell
            assert cell["rounds"] == 1
            assert min(cell["seconds"].values()) > 0
            short = cell["seconds"][PLAIN] < 50e-6
            assert cell["ratio_bound"] == (1.10 if short else 1.05)
            limit = max(2.5 * cell["compile_seconds"][PLAIN], 0.4)
            assert cell["compile_bound"] == pytest.approx(limit, rel=1e-3)
            assert cell["temporary_bytes"][OURS] >= 0
        assert "linear_top_k, k = 10" in terminal
        assert "over_mesh needs devices" in terminal
        assert image.read_bytes().startswith(b"\x89PNG")
        assert run("--from", path, "--markdown") == 0
        markdown = capsys.readouterr().out
        assert all(f"| `{name}` |" in markdown for name in only)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--only", "nonsense"], "invalid choice: 'nonsense'"),
            (["--sizes", "1x1"], "invalid choice: '1x1'"),
            (["--rounds", "0"], "must be positive"),
            (["--out", "no/such/folder/cells.json"], "there is no folder"),
            (["--from", "no-such-file.json"], "No such file"),
            (["--only", "nt_xent", "--sizes", "64x10"], "no cell of that name"),
        ],
    )
    def test_bad_input_is_answered_in_one_line(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as exit_:
            command.main(["everyday", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


class TestWrongFunctions:
    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda x: x * 1.001, "output 0 is off"),
            (lambda x: x * 0, "output 0 is off"),
            (lambda x: x[..., None], "output 0 has shape"),
            (lambda x: x.at[-1].set(jnp.nan), "output 0 is off"),
        ],
        ids=["scaled", "zero", "shape", "nan"],
    )
    def test_wrong_value(self, monkeypatch, tmp_path, spoil, reason):
        right = jaxsoft.logsumexp
        monkeypatch.setattr(jaxsoft, "logsumexp", lambda *a, **k: spoil(right(*a, **k)))
        code, (value, _) = cells_of(tmp_path, "--only", "logsumexp")
        assert code == 1
        assert value["status"] == "wrong" and "seconds" not in value
        assert reason in value["reason"]

    def test_wrong_gradient_under_a_right_value(self, monkeypatch, tmp_path):
        right = jaxsoft.logsumexp

        def wrong(x, **options):
            found = right(x, **options)
            return 2 * found - jax.lax.stop_gradient(found)

        monkeypatch.setattr(jaxsoft, "logsumexp", wrong)
        code, (value, gradient) = cells_of(tmp_path, "--only", "logsumexp")
        assert code == 1
        assert (value["status"], gradient["status"]) == ("timed", "wrong")
        assert gradient["what"] == GRADIENT and "output 1 is off" in gradient["reason"]

    def test_class_out_of_range(self, monkeypatch, tmp_path):
        right = jaxsoft.gumbel_top_k

        def wrong(*arguments):
            values, class_ids = right(*arguments)
            return values, class_ids + 3

        monkeypatch.setattr(jaxsoft, "gumbel_top_k", wrong)
        code, (cell,) = cells_of(tmp_path, "--only", "gumbel_top_k")
        assert code == 1
        assert "a class that is none of 10" in cell["reason"]

    def test_exception_is_a_result(self, monkeypatch, tmp_path):
        def broken(*_, **__):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(jaxsoft, "logsumexp", broken)
        code, cells = cells_of(tmp_path, "--only", "logsumexp")
        assert code == 1
        assert [cell["status"] for cell in cells] == ["failed", "failed"]
        assert "no such kernel" in cells[0]["reason"]


class TestCompiled:
    def test_bytes_are_those_of_the_programs(self, tmp_path, capsys):
        path = tmp_path / "cells.json"
        only = ("softmax", "linear_cross_entropy", "row_sgd")
        options = ["--only", *only, "--sizes", "64x10", "64x64x10", "--out", str(path)]
        assert command.main(["everyday", "--compiled", "cpu", *options]) == 0
        cells = json.loads(path.read_text())
        # A step that carries its state is none of them.
        assert {cell["function"] for cell in cells} == {*only[:2]}
        assert {cell["what"] for cell in cells} == {VALUE, GRADIENT}
        for cell in cells:
            least = 4 * 64 * 10 if cell["function"] == "softmax" else 2 * 2 * 64 * 10
            assert cell["target"] == "cpu"
            assert min(cell["moved_bytes"].values()) >= least
            assert min(cell["temporary_bytes"].values()) >= 0
        said = capsys.readouterr().out
        assert "softmax, T = 0.7" in said and "64x64x10 bf16" in said

    def test_the_largest_size_is_taken_if_none_is_named(self):
        room = everyday.ROOMS[0]
        sizes = {
            case.name: [
                size.name for size in everyday_compiled.sizes_of(room, case, ())
            ]
            for case in room.cases
        }
        assert sizes["softmax, T = 0.7"] == ["1024x65536"]
        assert sizes["sample, top_p=0.9"] == ["512x8192"]

    def test_the_most_beside_the_formula_comes_first(self, capsys):
        cells = [
            {
                "target": "v6e",
                "function": name,
                "title": "",
                "what": VALUE,
                "size": "64x10",
                "dtype": "float32",
                "moved_bytes": {PLAIN: 2**24, OURS: moved},
                "temporary_bytes": {PLAIN: 2**24, OURS: temporaries},
            }
            for name, moved, temporaries in (
                ("softmax", 2**23, 2**23),
                ("entropy", 2**25, 0),
                ("reinmax", 0, 2**26),
                ("logsumexp", 0, 0),
            )
        ]
        cells[-1] |= {
            "bundles": {PLAIN: 10**6, OURS: 5 * 10**6},
            "open_bundles": [OURS],
        }
        failed = {"target": "v6e", "function": "sample", "error": "too large"}
        everyday_compiled.print_table([*cells, failed])
        said = capsys.readouterr().out
        places = [
            said.index(name) for name in ("logsumexp", "reinmax", "entropy", "softmax")
        ]
        assert places == sorted(places)
        assert "v6e · sample: too large" in said
        assert re.search(r"≥ 5,000,000 +\|? *1,000,000 +\|? *5\.00", said), said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--compiled", "v5"], "no target 'v5'"),
            (["--compiled", "cpu", "--only", "row_sgd"], "no cell of that name"),
        ],
    )
    def test_bad_input_is_answered_in_one_line(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as exit_:
            command.main(["everyday", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


class TestReport:
    def document(self, *cells):
        machine = {
            "device": "a device",
            "platform": "cpu",
            "cores": 2,
            "versions": {"jax": "1", "jaxsoft": "2"},
            "commit": "abc",
            "modified": False,
            "source_sha256": "def",
        }
        return {
            "machine": machine,
            "started": "2026-01-01",
            "notes": [],
            "rates_per_second": {},
            "cells": list(cells),
        }

    def test_the_worst_cell_comes_first(self, capsys):
        cells = [
            cell_of("softmax", 0.9),
            cell_of("entropy", 1.2),
            cell_of("reinmax", 1.0, compile_excess=1.5),
            cell_of("sample", 0.5, status="wrong", reason="output 0 is off"),
        ]
        everyday_report.print_terminal(self.document(*cells))
        said = capsys.readouterr().out
        places = [said.index(name) for name in ("reinmax", "entropy", "softmax")]
        assert places == sorted(places)
        assert "sample, value · 64x10 wrong: output 0 is off" in said
        assert (
            "3 of 4 cells timed, 1 above their bound of time, 1 above their bound of "
            "compilation" in said
        )

    def test_the_summary_has_a_line_for_each_function(self, capsys):
        cells = [
            cell_of("softmax", r, size=s) for r, s in ((0.8, "64x10"), (2.1, "9x9"))
        ]
        everyday_report.print_markdown(self.document(*cells))
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(
            "| `softmax` | value · 9x9 | 2 | 1 | 1.45 | 2.10 | 1.05 |"
        )


class TestRounds:
    @pytest.mark.parametrize(
        ("ratios", "expected"),
        [
            # One round tells what is half as long, or twice, and no less.
            ([0.5], True),
            ([2.0], True),
            ([1.3], False),
            ([0.9], False),
            # What is far away may vary; what is near its bound takes many rounds.
            ([0.4, 0.5, 0.6], True),
            ([0.9, 0.6, 1.3], False),
            ([1.3] * 5, True),
            ([1.2] * 5, False),
            ([1.2] * 12, True),
            ([1.04, 1.06] * 20, False),
        ],
    )
    def test_rounds_go_on_while_a_ratio_may_be_on_either_side(self, ratios, expected):
        ours = [ratio * 1e-3 for ratio in ratios]
        assert everyday.settled(ours, [1e-3] * len(ours), 1.0) is expected

    def test_short_calls_and_what_is_allowed_move_the_bound(self):
        assert everyday.settled([1.2e-3] * 12, [1e-3] * 12, 1.0)
        assert not everyday.settled([1.2e-5] * 12, [1e-5] * 12, 1.0)
        assert not everyday.settled([1.2e-3] * 12, [1e-3] * 12, 1.1)

    def test_cells_far_from_their_bound_have_fewer_rounds(self, monkeypatch):
        seconds = {PLAIN: 1e-3}

        def interleave(programs, arguments, rounds, *, called, enough):
            samples = {PLAIN: [], OURS: []}
            for _ in range(rounds):
                for name, each in seconds.items():
                    samples[name].append(each)
                if enough(samples):
                    break
            return {n: timing.Timing.of(found) for n, found in samples.items()}

        monkeypatch.setattr(timing, "interleave", interleave)
        monkeypatch.setattr(everyday.time, "perf_counter", itertools.count().__next__)
        monkeypatch.setattr(everyday, "_CELL_SECONDS", 1000)
        size = Size(64, 10)
        case = everyday.ROOMS[0].cases[0]
        program = timing.Program("", lambda: jnp.ones((64, 10)), 0.0, 0, 0)
        pair = Pair(
            dataclasses.replace(program, name=PLAIN),
            dataclasses.replace(program, name=OURS),
            (),
        )

        def rounds(ratio, given=None):
            seconds[OURS] = ratio * 1e-3
            cell = everyday._of_calls(pair, case, VALUE, size, given)
            assert cell["ratio"] == pytest.approx(ratio)
            return cell["rounds"]

        assert rounds(0.4) == rounds(3.0) == 1
        assert 1 < rounds(1.3) < rounds(1.2) < 40
        assert rounds(1.0) == 40
        assert rounds(0.4, given=7) == 7
        monkeypatch.setattr(everyday, "_CELL_SECONDS", 0.5)
        assert rounds(1.0) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_are_of_the_same_dtypes_as_the_formulas_take(dtype):
    """No input has 64 bits, which a device would not keep, and all are drawn alike."""
    for room in everyday.ROOMS[:3]:
        size = next(each for each in room.sizes if each.dtype in (dtype, "float32"))
        drawn, again = Inputs(room, size), Inputs(room, size)
        for name, draw in room.arrays(size).items():
            found = draw()
            if isinstance(found, np.ndarray):
                assert found.dtype.itemsize <= 4, name
                assert jnp.array_equal(drawn[name], again[name]), name
                assert drawn[name].dtype == found.dtype, name


def test_a_size_is_named_as_it_is_asked_for():
    assert Size(64, 10).name == "64x10"
    assert Size(64, 10, 32, "bfloat16").name == "64x32x10"
    assert Size(64, 0, 32).name == "64x32"
    assert Size(64, 0, 32).logits == 64 * 64
