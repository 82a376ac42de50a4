"""The suite of trees finds wrong steps, and its truth agrees with other definitions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft
from benchmarks import __main__ as command
from benchmarks import (
    checks,
    contest,
    linear,
    report,
    timing,
    trees,
    trees_findings,
    trees_truth,
    truth,
    workloads,
)
from benchmarks.session import Finding, Result, Session

STEP, SAMPLE, FLAT, PEAKED = (workload.quick() for workload in workloads.TREES)


def run_smallest(workload, **changes):
    """Runs a workload at 64 classes alone."""
    session = Session(quick=True, rounds=1)
    changes = {"classes": (64,), "compared": 64, "growth": (32, 64)} | changes
    trees.run_workload(session, dataclasses.replace(workload, **changes))
    return session, {result.name: result for result in session.results}


def only(monkeypatch, rows=(), full=()):
    """Lets some contenders alone take a training step."""
    monkeypatch.setattr(trees, "ROW_OPTIMIZERS", rows)
    monkeypatch.setattr(trees, "FULL", full)


def test_quick_run_writes_results_findings_and_a_picture(tmp_path, capsys):
    path, image = tmp_path / "results.json", tmp_path / "plot.png"
    arguments = ["trees", "--quick", "--rounds", "1", "--minutes", "30"]
    arguments += ["--json", str(path), "--plot", str(image)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert {result["workload"] for result in document["results"]} == {
        workload.name for workload in workloads.TREES
    }
    for result in document["results"]:
        assert result["swept"] == "V" and result["case"] in printed
        if result["name"] == trees.SEARCH:
            assert result["status"] == "right"
            figures = result["figures"]
            assert figures["inner nodes"] == result["shape"]["V"] - 1
            assert 10 <= figures["visits"] < figures["inner nodes"]
            assert f"visits {figures['visits']:,.6g}" in printed
            continue
        assert result["status"] == "timed", result
        assert result["seconds"]["median"] > 0 and result["ratio"] > 0
        assert result["floor_seconds"] > 0 and result["temporary_bytes"] >= 0
        assert result["errors"]
    findings = {finding["what"]: finding for finding in document["findings"]}
    for name in (*trees.ROW_OPTIMIZERS, "hierarchical_sample", "hierarchical_top_k"):
        assert any(f"time of {name} at V = 2^8" in what for what in findings)
    assert all(finding["met"] is None for finding in findings.values())
    assert all(what in printed for what in findings)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert command.main(["--from", str(path), "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert "### trees: tree-step (N=67 H=32 dtype=float32)" in markdown
    assert all(what in markdown for what in findings)


def spoil_gradient(**changes):
    """Makes a spoiler of `(loss, dhidden, gradient)` out of functions of a field."""

    def spoil(found):
        loss, dhidden, gradient = found
        fields = {"loss": loss, "dhidden": dhidden, **gradient._asdict()}
        fields |= {name: change(fields[name]) for name, change in changes.items()}
        rest = {name: fields[name] for name in gradient._fields}
        return fields["loss"], fields["dhidden"], gradient._replace(**rest)

    return spoil


# What spoils the row gradients, and how the step must be found wrong.
WRONG_GRADIENTS = {
    "loss": (spoil_gradient(loss=lambda x: x * 1.001), "tree loss is off"),
    "dhidden": (
        spoil_gradient(dhidden=lambda x: x.at[-1].set(0)),
        "tree dhidden is off",
    ),
    "scale": (spoil_gradient(scales=lambda x: x * 1.001), "row_sgd moved is off"),
    "other rows": (spoil_gradient(rows=lambda x: x + 1), "untouched rows is off"),
    "a level left out": (
        spoil_gradient(rows=lambda x: x.at[-1].set(10**6)),
        "row_sgd moved is off",
    ),
}


@pytest.mark.parametrize("case", WRONG_GRADIENTS)
def test_wrong_row_gradient_is_found_and_not_timed(monkeypatch, case):
    only(monkeypatch, rows=("row_sgd",))
    spoil, reason = WRONG_GRADIENTS[case]
    right = jaxsoft.hierarchical_value_and_row_grad
    monkeypatch.setattr(
        jaxsoft,
        "hierarchical_value_and_row_grad",
        lambda *a, **k: spoil(right(*a, **k)),
    )
    # Few enough tokens that some rows are on no path.
    session, results = run_smallest(STEP, tokens=11)
    assert session.failed
    assert results["row_sgd"].status == "wrong" and results["row_sgd"].timing is None
    assert reason in results["row_sgd"].reason


def instead_of_adam(update):
    """Makes an optimizer of rows of `update(params, new params, state, new state)`."""

    def changed(params, gradient, state):
        new, after = jaxsoft.row_adam(2e-3).update(params, gradient, state)
        return update(params, new, state, after)

    return lambda rate: jaxsoft.RowOptimizer(jaxsoft.row_adam(rate).init, changed)


# What is done to Adam's rows and state instead, and how it must be found wrong.
WRONG_UPDATES = {
    "one row of all": (
        lambda old, new, before, after: (new * jnp.float32(1 + 1e-6), after),
        "untouched rows is off",
    ),
    "nothing": (
        lambda old, new, before, after: (old, after),
        "row_adam moved is off",
    ),
    "nothing remembered": (
        lambda old, new, before, after: (new, before),
        "row_adam slot 0 is off by 1.0e+00, allowed is 1.0e-04; row_adam slot 1",
    ),
}


@pytest.mark.parametrize("case", WRONG_UPDATES)
def test_wrong_update_is_found(monkeypatch, case):
    only(monkeypatch, rows=("row_adam",))
    update, reason = WRONG_UPDATES[case]
    right = jaxsoft.row_adam
    wrong = instead_of_adam(update)

    def optimizer(rate):
        # The wrong one calls the right one.
        monkeypatch.setattr(jaxsoft, "row_adam", right)
        return wrong(rate)

    monkeypatch.setattr(jaxsoft, "row_adam", optimizer)
    session, results = run_smallest(STEP, tokens=11)
    assert session.failed and results["row_adam"].status == "wrong"
    assert reason in results["row_adam"].reason


def test_wrong_full_step_is_found_beside_a_right_one(monkeypatch):
    only(monkeypatch, rows=("row_sgd",), full=trees_findings.FULL)
    right = jaxsoft.linear_cross_entropy
    monkeypatch.setattr(
        jaxsoft, "linear_cross_entropy", lambda *a, **k: 1.001 * right(*a, **k)
    )
    session, results = run_smallest(STEP)
    assert session.failed
    assert "full loss is off" in results["linear_cross_entropy"].reason
    assert "full moved is off" in results["linear_cross_entropy"].reason
    assert results["row_sgd"].status == results["optax"].status == "timed"
    # In the unit of the rows' time.
    assert results["optax"].baseline == "row_sgd" and results["row_sgd"].ratio == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ids: ids * 0,
        lambda ids: ids ^ 1 | 1,
        lambda ids: ids // 2,
        lambda ids: ids.at[3].set(-1),
    ],
    ids=["argmax", "last level", "left half", "no class"],
)
def test_wrong_samples_are_found(monkeypatch, spoil):
    right = jaxsoft.hierarchical_sample
    monkeypatch.setattr(
        jaxsoft, "hierarchical_sample", lambda *a, **k: spoil(right(*a, **k))
    )
    session, results = run_smallest(SAMPLE, tokens=1024)
    assert session.failed and results["hierarchical_sample"].status == "wrong"
    assert results["linear_sample"].status == "timed"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found: (found[0], found[1] ^ 1, found[2]), "at_ids is off"),
        (lambda found: (found[0] * 1.001, *found[1:]), "log_prob is off"),
        (lambda found: (*found[:2], found[2].at[-1].set(False)), "exact is off"),
    ],
)
def test_wrong_best_classes_are_found(monkeypatch, spoil, reason):
    right = jaxsoft.hierarchical_top_k
    monkeypatch.setattr(
        jaxsoft, "hierarchical_top_k", lambda *a, **k: spoil(right(*a, **k))
    )
    session, results = run_smallest(FLAT)
    assert session.failed and reason in results["hierarchical_top_k"].reason
    assert results["log_probs + lax.top_k"].status == "timed"


class TestLeftOut:
    def test_full_softmax_alone_where_the_budget_is_short(self, monkeypatch):
        monkeypatch.setattr(trees, "ROW_OPTIMIZERS", ("row_sgd",))
        hours = {"linear_cross_entropy": 10**13, "optax": 1}
        monkeypatch.setattr(trees, "_PASSES", hours)
        session = Session(quick=True, rounds=1, minutes=30)
        session.measure("copy", "matmul float32")
        trees.run_workload(session, dataclasses.replace(STEP, classes=(64,)))
        results = {result.name: result for result in session.results}
        assert results["linear_cross_entropy"].status == "not run"
        assert "more than is left" in results["linear_cross_entropy"].reason
        assert results["row_sgd"].status == results["optax"].status == "timed"

    def test_state_that_does_not_fit_in_memory_is_never_made(self, monkeypatch):
        only(monkeypatch, rows=("row_sgd", "row_adam"))
        made = []

        def init(self):
            made.append(self)

        monkeypatch.setattr(timing.Chain, "start", init)
        # The kernel has 63 rows of 32 numbers, and Adam's moments are as large.
        monkeypatch.setattr(contest.machine, "available_bytes", lambda: 8000)
        session, results = run_smallest(STEP)
        assert not made
        for result in results.values():
            assert result.status == "not run" and "are free" in result.reason


class TestChain:
    def program(self, size=3):
        def step(state, amount):
            x = state["x"] + amount
            return {"x": x}, x[0]

        return timing.compile_chain(
            "add", step, lambda: {"x": jnp.zeros(size)}, (jnp.float32(1),)
        )

    def test_each_call_goes_on_where_the_last_one_ended(self):
        program = self.program()
        for count in (1, 2, 3):
            (state, first), seconds = timing.call(program, (jnp.float32(2),))
            assert first == 2 * count and seconds > 0
            np.testing.assert_array_equal(state["x"], np.full(3, 2 * count))

    def test_state_is_overwritten_and_counted(self):
        program = self.program(size=1000)
        (state, _), _ = timing.call(program, (jnp.float32(1),))
        timing.call(program, (jnp.float32(1),))
        assert state["x"].is_deleted()
        assert program.state_bytes == 4000
        assert program.output_bytes is not None and program.output_bytes < 100

    def test_state_is_gone_with_the_executable(self):
        program = self.program()
        released = program.without_state()
        assert released.temporary_bytes == program.temporary_bytes
        assert released.state_bytes == program.state_bytes
        with pytest.raises(RuntimeError, match="was released"):
            released.executable()

    def test_samples_are_long_and_begin_untimed(self, monkeypatch):
        # However long a call takes on a busy machine.
        monkeypatch.setattr(timing, "_CHAIN_SECONDS", 1e9)
        program = self.program()
        timings = timing.interleave([program], (jnp.float32(1),), rounds=2)
        assert len(timings["add"].samples) == 2
        (_, first), _ = timing.call(program, (jnp.float32(1),))
        # One call to see how long it takes, and 64 and one more in both rounds.
        assert first == 1 + 2 * 65 + 1


class TestTruth:
    def problem(self, tokens=7, features=3, classes=16):
        random = np.random.default_rng(0)
        return (
            random.normal(size=(tokens, features)),
            random.normal(size=(classes - 1, features)),
            random.integers(0, classes, size=tokens),
        )

    def test_paths_are_those_of_the_library(self):
        path = trees_truth.paths(np.arange(32), 32)
        known = jaxsoft.ClassTree.balanced(32).paths(jnp.arange(32))
        np.testing.assert_array_equal(path.nodes, known.first_rows)
        np.testing.assert_array_equal(path.bits, known.choices)

    def test_log_probs_are_sums_along_paths(self):
        hidden, kernel, _ = self.problem()
        logits = hidden @ kernel.T
        nodes, leaves = trees_truth.log_probs(logits)
        second = 1 / (1 + np.exp(-logits))
        path = trees_truth.paths(np.arange(16), 16)
        for v in range(16):
            chosen = second[:, path.nodes[v]]
            chosen = np.where(path.bits[v], chosen, 1 - chosen)
            np.testing.assert_allclose(leaves[:, v], np.log(chosen).sum(axis=1))
            before = np.log(chosen[:, :-1]).sum(axis=1)
            np.testing.assert_allclose(nodes[:, path.nodes[v, -1]], before)
        np.testing.assert_allclose(np.exp(leaves).sum(axis=1), 1)

    def test_gradient_is_central_differences(self):
        hidden, kernel, labels = self.problem()

        def loss():
            _, leaves = trees_truth.log_probs(hidden @ kernel.T)
            return -leaves[np.arange(7), labels].sum()

        found = trees_truth.gradient(hidden, labels, 16, lambda rows: kernel[rows])
        assert found.loss == pytest.approx(loss(), rel=1e-12)
        dense = np.zeros(kernel.shape)
        dense[found.rows] = found.values
        for array, slopes in ((hidden, found.dhidden), (kernel, dense)):
            for place in np.ndindex(array.shape):
                kept, sides = array[place], []
                for step in (1e-5, -1e-5):
                    array[place] = kept + step
                    sides.append(loss())
                array[place] = kept
                slope = (sides[0] - sides[1]) / 2e-5
                assert slopes[place] == pytest.approx(slope, abs=1e-8)

    @pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
    def test_first_update_is_that_of_optax(self, name):
        gradient = np.random.default_rng(1).normal(size=(5, 3))
        found = trees_truth.row_update(f"row_{name}", gradient, 0.1)
        optimizer = getattr(optax, name)(0.1)
        grads = jnp.asarray(gradient, jnp.float32)
        # Its own promotions are not a caller's to forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(grads, optimizer.init(grads))
        np.testing.assert_allclose(found["moved"], updates, rtol=1e-5)

    @pytest.mark.parametrize("tile", [4, 16, 64])
    def test_full_gradient_is_that_of_the_linear_suite(self, monkeypatch, tile):
        monkeypatch.setattr(trees_truth, "_TILE", tile)
        hidden, _, labels = self.problem()
        kernel = np.random.default_rng(2).normal(size=(3, 16)).astype(np.float32)
        subset = checks.Subset.of(7, 16, 5)
        found = trees_truth.full_gradient(hidden, jnp.asarray(kernel), labels, subset)
        known = truth.linear_truth(hidden, kernel, labels, subset, cotangent=np.ones(7))
        assert found["loss"] == pytest.approx(7 * known["mean"], rel=1e-12)
        for name in ("dhidden", "dkernel"):
            np.testing.assert_allclose(found[name], known[name], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("k", [1, 3, 16])
    def test_visits_are_the_nodes_above_the_last_class_found(self, k):
        hidden, kernel, _ = self.problem(tokens=20)
        logits = hidden @ kernel.T
        nodes, leaves = trees_truth.log_probs(logits)
        last = np.sort(leaves, axis=1)[:, -k]
        # A node may hide one of the best classes if it is as probable as the last.
        needed = (nodes >= last[:, None]).sum(axis=1)
        found = [trees_truth.best_first_visits(row, k) for row in logits]
        assert found == needed.tolist()

    def test_right_samples_have_the_figures_that_they_must(self):
        random = np.random.default_rng(3)
        hidden, kernel, _ = self.problem(tokens=4000)
        _, every = trees_truth.log_probs(hidden @ kernel.T)
        ids = np.argmax(every + random.gumbel(size=every.shape), axis=1)

        def judge(ids):
            found = trees_truth.sample_statistics(hidden, ids, 16, kernel.__getitem__)
            known = trees_truth.sample_truth(4000, 16)
            return checks.judge(found, known, absolute=5 * 4000**-0.5)

        assert judge(ids).correct
        # Only the last level is wrong, and that for one class in eight.
        assert any("choices" in fault for fault in judge(ids | (ids < 2)).faults)


class TestFindings:
    def results(self, times):
        """Results of one round, of seconds by contender and V."""
        program = timing.Program("", lambda: None, 0.0, 1000, 0)
        return [
            Result(
                trees.SUITE,
                STEP.name,
                {"V": classes},
                "",
                name,
                "timed",
                timing=timing.Timing.of([seconds]),
                program=program,
            )
            for (name, classes), seconds in times.items()
        ]

    def test_growth_ratio_and_memory_are_held_against_what_is_asked(self):
        low, middle, high = 2**12, 2**18, 2**22
        times = {("row_sgd", low): 1.0, ("row_sgd", middle): 2.0}
        times |= {("row_sgd", high): 5.0, ("optax", middle): 3000.0}
        times |= {("linear_cross_entropy", middle): 2000.0}
        step = workloads.TREES[0]
        found = trees_findings.findings(self.results(times), step, asked=True)
        growth, memory, faster = found
        assert (growth.value, growth.at_most) == (5.0, 4.0)
        assert growth.record()["met"] is False
        assert (memory.value, memory.record()["met"]) == (0.0, True)
        assert (faster.value, faster.record()["met"]) == (1000.0, True)
        lines = report.findings({"findings": [f.record() for f in found]})
        assert lines[0].endswith("2^12: 5 (at most 4: MISSED)")
        assert lines[2].endswith("row_sgd's: 1e+03 (at least 500: met)")

    def test_nothing_is_asked_of_what_need_not_be_fast(self):
        times = {("optax", 2**12): 1.0, ("optax", 2**22): 1000.0}
        step = workloads.TREES[0]
        (growth,) = trees_findings.findings(self.results(times), step, asked=True)
        assert growth.record()["met"] is None

    def test_finding_without_bounds_is_neither_met_nor_missed(self):
        assert Finding("s", "w", 1.0).record()["met"] is None
        assert Finding("s", "w", 1.0, 1.0, 2.0).record()["met"] is False


def test_bars_and_curves_are_two_pictures(tmp_path):
    path, image = tmp_path / "results.json", tmp_path / "plot.png"
    session = Session(quick=True, rounds=1, path=path)
    linear.run_workload(session, workloads.LINEAR[0].quick(), linear.MAIN_CASES[:1])
    trees.run_workload(session, dataclasses.replace(PEAKED, classes=(64,)))
    session.finish()
    assert command.main(["--from", str(path), "--plot", str(image)]) == 0
    for name in ("plot.png", "plot-curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
