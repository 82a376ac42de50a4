"""The benchmarks run, write what they say, and do not time a wrong function."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from benchmarks import __main__ as command
from benchmarks import (
    checks,
    contest,
    linear,
    peers,
    plot,
    timing,
    workloads,
    workspace,
)
from benchmarks.session import Session, Work, floor_seconds

PEERS = ("jax-cce", "tokamax", "torch", "liger", "cce", "quack")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_suites(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def reject_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize(
    ("suite", "baselines"),
    [
        ("linear", {"optax"}),
        ("workspace", {"optax", "products alone"}),
        ("softmax", {"optax", "jax.nn"}),
        ("discrete", {"jax.nn", "jax.random", "one read"}),
        ("heads", {"jax.nn", "jax.random", "matmul", "jax.lax"}),
        ("device", {"optax", "jax.nn", "reference", "one read", "matmul"}),
    ],
)
def test_quick_run_of_a_suite_writes_its_results(tmp_path, suite, baselines):
    path = tmp_path / "results.json"
    # One round: what is tested is that it works, not what it measures.
    run = run_suites(suite, "--quick", "--rounds", 1, "--minutes", 30, "--json", path)
    assert run.returncode == 0, run.stderr[-3000:]
    document = json.loads(path.read_text(), parse_constant=reject_constant)
    machine = document["machine"]
    assert machine["platform"] == jax.default_backend()
    assert machine["versions"]["jax"] == jax.__version__
    assert machine["versions"]["jaxsoft"] == jaxsoft.__version__
    assert document["quick"] and document["started"] <= document["finished"]
    for rates in document["rates_per_second"].values():
        assert len(rates) == 2 and min(rates) > 0
    results = document["results"]
    assert {r["name"] for r in results} >= {"jaxsoft", *baselines}
    for result in results:
        if result["status"] == "not run":
            assert result["name"] in PEERS
            assert result["reason"]
            continue
        if (
            not result["name"].startswith("jaxsoft")
            and result["shape"]["dtype"] == "bfloat16"
        ):
            continue  # The plain formula may be wrong: it is then not the measure.
        assert result["status"] in ("timed", "right"), result
        # What is said of samples is statistical, with 3/√N as its limit.
        statistical = result["case"].startswith(("sample", "gumbel"))
        limit = 3 / result["shape"]["N"] ** 0.5 + 0.05 if statistical else 0.05
        assert result["errors"] and max(result["errors"].values()) < limit
        assert result["temporary_bytes"] >= 0 and result["compile_seconds"] > 0
        if result["status"] == "timed":
            assert len(result["seconds"]["samples"]) == 1
            assert result["seconds"]["median"] > 0 and result["ratio"] > 0
            assert result["floor_seconds"] > 0
    assert all(result["case"] in run.stdout for result in results)


def test_peers_are_reported_even_where_they_cannot_take_part():
    for case in linear.ALL_CASES:
        contenders = peers.linear_contenders(case, workloads.LINEAR[0])
        assert [c.name for c in contenders] == [
            "jaxsoft",
            *(peers.with_workspace(each) for each in case.workspaces),
            "optax",
            "jax-cce",
            "tokamax",
            *PEERS[2:],
        ]
        for contender in contenders:
            called = contender.function or contender.program
            assert (called is None) == bool(contender.absent)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nonsense"], "no suite 'nonsense'"),
            (["--rounds", "0"], "must be positive"),
            (["--json", "no/such/folder/out.json"], "there is no folder"),
            (["--from", "no-such-file.json"], "No such file"),
        ],
    )
    def test_bad_input_is_answered_in_one_line(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as exit_:
            command.main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err

    def test_workload_of_no_suite_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["linear", "--quick", "--workload", "mistral-7b"])
        assert "workload of that name" in capsys.readouterr().err

    def test_results_are_shown_and_drawn_from_their_file(self, tmp_path, capsys):
        path, image = tmp_path / "results.json", tmp_path / "plot.png"
        session = Session(quick=True, rounds=2, path=path)
        workload = workloads.LINEAR[0].quick()
        linear.run_workload(session, workload, linear.MAIN_CASES[:1])
        session.finish()
        assert command.main(["--from", str(path), "--plot", str(image)]) == 0
        terminal = capsys.readouterr().out
        assert command.main(["--from", str(path), "--markdown"]) == 0
        markdown = capsys.readouterr().out
        results = json.loads(path.read_text())["results"]
        median = next(r["seconds"]["median"] for r in results if r["seconds"])
        for text in (terminal, markdown):
            assert f"{median * 1e3:.4g}" in text
            assert "not run" in text
        assert "| mean, [H, V]: value | jaxsoft |" in markdown
        assert image.read_bytes().startswith(b"\x89PNG")


def test_time_over_workspace_is_drawn_beside_bars(tmp_path):
    image = tmp_path / "plot.png"
    session = Session(quick=True, rounds=1)
    workload = workloads.LINEAR[0].quick()
    linear.run_workload(session, workload, linear.MAIN_CASES[:1])
    few = dataclasses.replace(workload, classes=256)
    workspace.run_workload(session, few)
    plot.draw(session.finish(), image)
    for path in (image, tmp_path / "plot-workspace.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_wrong_products_are_no_floor(monkeypatch):
    right = workspace._products
    monkeypatch.setattr(
        workspace, "_products", lambda *a: (right(*a)[0], right(*a)[1] * 1.001)
    )
    monkeypatch.setattr(workspace, "_SHARES", ())
    session = Session(quick=True, rounds=1)
    few = dataclasses.replace(workloads.LINEAR[0].quick(), classes=256)
    workspace.run_workload(session, few)
    results = [r for r in session.results if r.name == workspace.PRODUCTS]
    assert [r.status for r in results] == ["wrong", "wrong"]
    assert "products by kernel is off" in results[0].reason


class TestChecks:
    def test_zeros_have_an_error_of_one(self):
        true = np.array([3.0, -4.0, 1.0])
        assert checks.relative_error(np.zeros(3), true) == 1
        assert checks.relative_error(true, true) == 0
        assert checks.relative_error(true + [0, 0.4, 0], true) == pytest.approx(0.1)

    @pytest.mark.parametrize("wrong", [np.full(3, np.nan), np.ones(2), np.ones((1, 3))])
    def test_nan_or_another_shape_is_infinitely_wrong(self, wrong):
        assert checks.relative_error(wrong, np.ones(3)) == math.inf

    def test_ours_may_not_be_worse_than_the_plain_formula(self):
        true, found = {"x": np.ones(4)}, {"x": np.full(4, 1.001)}
        assert checks.judge(found, true, absolute=0.01).correct
        plain = {"x": 1e-5}
        verdict = checks.judge(found, true, absolute=0.01, plain=plain, slack=1e-4)
        assert not verdict.correct and "x is off by 1.0e-03" in verdict.faults[0]
        assert checks.judge(found, true, absolute=0.01, plain=plain, slack=1e-3).correct

    def test_subset_has_both_ends(self):
        subset = checks.Subset.of(1000, 7, size=10)
        assert subset.rows[0] == 0 and subset.rows[-1] == 999 and len(subset.rows) == 10
        assert subset.classes.tolist() == list(range(7))


class TestWrongFunctions:
    """A function that is wrong anywhere is found and not timed."""

    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda losses: losses * 1.001,
            lambda losses: losses * 0,
            lambda losses: losses.at[..., -1].set(jnp.nan),
        ],
        ids=["scaled", "zero", "nan"],
    )
    def test_wrong_value(self, monkeypatch, spoil, gradient):
        right = jaxsoft.linear_cross_entropy
        monkeypatch.setattr(
            jaxsoft, "linear_cross_entropy", lambda *a, **k: spoil(right(*a, **k))
        )
        case = workloads.LinearCase(reduction="none", gradient=gradient)
        self.expect_wrong(case, "loss is off")

    def test_wrong_gradient_under_a_right_value(self, monkeypatch):
        right = jaxsoft.linear_cross_entropy

        def wrong(hidden, kernel, labels, **options):
            value = right(hidden, kernel, labels, **options)
            doubled = 2 * right(
                jax.lax.stop_gradient(hidden), kernel, labels, **options
            )
            return value + doubled - jax.lax.stop_gradient(doubled)

        monkeypatch.setattr(jaxsoft, "linear_cross_entropy", wrong)
        self.expect_wrong(workloads.LinearCase(gradient=True), "dkernel is off")

    def test_exception_is_a_result(self, monkeypatch):
        def broken(*_, **__):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(jaxsoft, "linear_cross_entropy", broken)
        self.expect_wrong(workloads.LinearCase(), "no such kernel", status="failed")

    def expect_wrong(self, case, reason, status="wrong"):
        session = Session(quick=True, rounds=1)
        linear.run_workload(session, workloads.LINEAR[0].quick(), (case,))
        results = {result.name: result for result in session.results}
        assert session.failed
        assert results["jaxsoft"].status == status
        assert reason in results["jaxsoft"].reason
        assert results["jaxsoft"].timing is None
        assert results["optax"].status == "timed"


def test_spent_budget_skips_and_names_what_is_left():
    session = Session(quick=True, rounds=1, minutes=1e-9)
    linear.run_workload(session, workloads.LINEAR[0].quick(), linear.MAIN_CASES)
    assert {r.name for r in session.results} >= {"jaxsoft", "optax"}
    absent = {result.name for result in session.results if result.status == "not run"}
    assert absent <= set(PEERS)
    left = [result for result in session.results if result.name not in absent]
    assert all(result.status == "skipped" for result in left)
    assert any("more than is left" in result.reason for result in session.results)
    assert not session.failed


def test_program_that_does_not_fit_in_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(contest.machine, "available_bytes", lambda: 1000)
    session = Session(quick=True, rounds=1)
    linear.run_workload(session, workloads.LINEAR[0].quick(), linear.MAIN_CASES[1:])
    ours = next(result for result in session.results if result.name == "jaxsoft")
    assert ours.status == "not run" and "GiB are free" in ours.reason


class TestDisturbance:
    def test_load_before_the_run_is_noted(self, monkeypatch):
        monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
        assert "the load was 99.0" in Session().notes[0]
        monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 99.0, 99.0))
        assert Session().notes == []

    def test_rate_that_fell_is_noted(self, monkeypatch):
        monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
        rates = iter([100.0, 80.0])
        monkeypatch.setattr(
            contest.machine, "measure_copy", lambda *, quick: next(rates)
        )
        session = Session()
        session.measure("copy")
        assert session.finish()["notes"] == [
            "Disturbed: copy ran at 80% of its rate at the other end of the run."
        ]
        assert session.rates() == {"copy": 100.0}


class TestTiming:
    def test_donated_arguments_are_copied_first(self):
        argument = jnp.arange(1000.0)
        program = timing.compile_program("n", jnp.negative, (argument,), donated=(0,))
        for _ in range(3):
            outputs, seconds = timing.call(program, (argument,))
            np.testing.assert_array_equal(outputs, -np.arange(1000.0))
            assert seconds > 0
        assert program.output_bytes == 0

    def test_temporaries_and_outputs_are_read_off_the_program(self):
        argument = jnp.ones((64, 1000))
        program = timing.compile_program(
            "largest", lambda x: jnp.sort(x)[:, -1], (argument,)
        )
        assert program.temporary_bytes is not None
        assert program.temporary_bytes >= argument.nbytes
        assert program.output_bytes == 4 * 64

    def test_contenders_take_turns_and_the_first_place_rotates(self):
        order = []
        programs = [
            timing.Program(
                name, lambda name=name: order.append(name), 0.0, 0, 0, donated=(0,)
            )
            for name in "abc"
        ]
        timings = timing.interleave(programs, (), rounds=3)
        assert "".join(order) == "abc" + "abc" + "bca" + "cab"
        assert all(len(timings[name].samples) == 3 for name in "abc")

    def test_a_long_call_that_was_made_already_is_the_first_sample(self):
        count = iter(range(9))
        program = timing.Program("p", lambda: next(count), 0.0, 0, 0)
        found = timing.interleave([program], (), rounds=3, called={"p": 1.0})
        assert next(count) == 2
        assert len(found["p"].samples) == 3 and found["p"].samples[0] == 1.0

    def test_a_short_call_that_was_made_already_is_no_sample(self):
        count = iter(range(99))
        program = timing.Program("p", lambda: next(count), 0.0, 0, 0)
        timing.interleave([program], (), rounds=2, called={"p": 0.0025})
        # Two calls each round, and none before.
        assert next(count) == 4

    def test_only_what_was_not_called_is_called_before(self):
        order = []
        programs = [
            timing.Program(name, lambda name=name: order.append(name), 0.0, 0, 0)
            for name in "ab"
        ]
        called = {"a": 1.0, "b": 1.0}
        timing.interleave(programs, (), rounds=2, called=called)
        assert "".join(order) == "ba"
        order.clear()
        timing.interleave(programs, (), rounds=1, called={"a": 1.0})
        assert {*order} == {"b"}

    def test_no_round_begins_once_there_are_enough(self):
        program = timing.Program("p", lambda: None, 0.0, 0, 0, donated=(0,))
        timings = timing.interleave(
            [program], (), rounds=9, enough=lambda samples: len(samples["p"]) == 4
        )
        assert len(timings["p"].samples) == 4

    def test_no_round_begins_once_the_time_is_spent_and_there_were_five(self):
        program = timing.Program("p", lambda: None, 0.0, 0, 0, donated=(0,))
        timings = timing.interleave([program], (), rounds=9, seconds=0)
        assert len(timings["p"].samples) == 5
        timings = timing.interleave([program], (), rounds=2, seconds=0)
        assert len(timings["p"].samples) == 2

    def test_summary_and_ratio_are_medians(self):
        ours = timing.Timing.of([1.0, 2.0, 9.0])
        assert (ours.median, ours.best, ours.low, ours.high) == (2, 1, 1.5, 5.5)
        theirs = timing.Timing.of([2.0, 8.0, 9.0])
        assert timing.paired_ratio(ours, theirs) == 0.5


def test_floor_is_the_larger_of_both():
    rates = {"copy": 10.0, "matmul float32": 100.0}
    assert floor_seconds(Work(flops=300), rates) == 3
    assert floor_seconds(Work(flops=300, bytes=50), rates) == 5
    assert floor_seconds(Work(flops=300, dtype="bfloat16"), rates) is None
    assert floor_seconds(None, rates) is None
