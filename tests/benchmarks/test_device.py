"""The device suite goes on where it stopped, or hung, and keeps what it promises."""

import json
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from benchmarks import __main__ as command
from benchmarks import (
    checks,
    choices,
    contest,
    device,
    linear,
    peers,
    promises,
    torch_peer,
    watch,
    workloads,
)
from benchmarks.session import Result, Session, Work
from jaxsoft._core import defaults, registry

TINY = workloads.LinearWorkload("tiny", 19, 16, 131)


def cases_of(session, count=3):
    """Runs some cases; each counts how often its truth was asked for."""
    asked = []
    for index in range(count):

        def truth(index=index):
            asked.append(index)
            return {"x": np.full(4, 2.0 + index)}

        case = contest.Case(
            suite="s",
            workload="w",
            shape={"N": 4, "dtype": "float32"},
            title=f"plus {index}",
            contenders=[
                peers.Contender(peers.OURS, lambda x, i=index: x + 1 + i),
                peers.Contender("plain", lambda x, i=index: x + (1 + i)),
                peers.Contender("nobody", absent="not installed"),
            ],
            prepare=lambda function: function,
            arguments=(jnp.ones(4),),
            truth=truth,
            observe=lambda x: {"x": x},
            baseline="plain",
            limit=1e-6,
            slack=1e-6,
            work=lambda _: Work(bytes=32),
        )
        contest.run_case(case, session)
    return asked


def resumed(path, **options):
    session = Session(quick=True, rounds=1, path=path, **options)
    session.resume(json.loads(path.read_text()))
    return session


class TestResume:
    def test_only_what_is_missing_is_measured(self, tmp_path):
        path = tmp_path / "results.json"
        first = Session(quick=True, rounds=1, path=path)
        first.measure("copy")
        assert cases_of(first, 2) == [0, 1]
        first.finish()
        second = resumed(path)
        second.measure("copy")
        assert cases_of(second) == [2]
        second.finish()
        document = json.loads(path.read_text())
        assert [r["case"] for r in document["results"]] == [
            f"plus {i}" for i in range(3) for _ in range(3)
        ]
        assert len(document["runs"]) == 2
        assert len(document["rates_per_second"]["copy"]) == 4
        assert document["results"][:6] == [
            r | {"floor_seconds": f["floor_seconds"]}
            for r, f in zip(
                json.loads(json.dumps(first.document()))["results"],
                document["results"],
                strict=False,
            )
        ]

    def test_what_did_not_fit_is_measured_next_time(self, tmp_path):
        path = tmp_path / "results.json"
        first = Session(quick=True, rounds=1, minutes=1e-9, path=path)
        assert cases_of(first) == []
        assert [r.status for r in first.results] == [
            "not run",
            "skipped",
            "skipped",
        ] * 3
        second = resumed(path)
        assert cases_of(second) == [0, 1, 2]
        assert [r.status for r in second.results] == ["not run", "timed", "timed"] * 3

    def test_a_case_that_was_cut_is_run_again(self, tmp_path):
        path = tmp_path / "results.json"
        cases_of(Session(quick=True, rounds=1, path=path))
        document = json.loads(path.read_text())
        document["results"].pop()
        path.write_text(json.dumps(document))
        second = resumed(path)
        assert cases_of(second) == [2]
        names = [(r.case, r.name) for r in second.results]
        assert len(names) == len(set(names)) == 9

    def test_who_ended_the_process_is_not_run_again(self, tmp_path):
        path = tmp_path / "results.json"
        cases_of(Session(quick=True, rounds=1, path=path))
        document = json.loads(path.read_text())
        (ours,) = (
            r
            for r in document["results"]
            if (r["case"], r["name"]) == ("plus 1", peers.OURS)
        )
        ours |= {"status": "running", "seconds": None, "ratio": None}
        document["results"] = [
            r for r in document["results"] if r["case"] != "plus 1" or r is ours
        ]
        path.write_text(json.dumps(document))
        second = resumed(path)
        assert cases_of(second) == [1]
        found = {r.name: r for r in second.results if r.case == "plus 1"}
        assert found[peers.OURS].status == "failed" and second.failed
        assert "the process ended" in found[peers.OURS].reason
        assert found["plain"].status == "timed"

    @pytest.mark.parametrize("name", ["device", "versions", "commit", "source_sha256"])
    def test_another_device_version_or_commit_is_refused(self, tmp_path, name):
        path = tmp_path / "results.json"
        Session(quick=True, path=path).save()
        document = json.loads(path.read_text())
        document["machine"][name] = "another"
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=f"another {name}: name another file"):
            resumed(path)

    def test_the_command_refuses_in_one_line(self, tmp_path, monkeypatch, capsys):
        path = tmp_path / "results.json"
        Session(path=path).save()
        monkeypatch.setenv(watch.CHILD, "1")
        with pytest.raises(SystemExit):
            command.main(["device", "--quick", "--json", str(path)])
        assert "results of another quick" in capsys.readouterr().err


HANGS = """
import sys, time, pathlib
from benchmarks.session import Result, Session
path = pathlib.Path(sys.argv[1])
session = Session(quick=True, rounds=1, path=path, minutes=float(sys.argv[-1]))
if path.exists():
    import json
    session.resume(json.loads(path.read_text()))
session.guard(0.5)
if not session.results:
    session.step(Result("s", "w", {}, "c", "kernel", "running"))
    time.sleep(60)
session.finish()
"""


class TestWatch:
    def test_a_contender_that_hangs_is_named_and_left_behind(self, tmp_path):
        path = tmp_path / "results.json"
        start = time.monotonic()
        code = watch.supervise([sys.executable, "-c", HANGS, path], 5, path)
        assert code == 0 and time.monotonic() - start < 55
        document = json.loads(path.read_text())
        (result,) = document["results"]
        assert (result["name"], result["status"]) == ("kernel", "failed")
        assert result["reason"] == "did not end in time"
        assert len(document["runs"]) == 2 and document["finished"]

    def test_a_process_that_ends_and_leaves_nothing_is_not_started_again(
        self, tmp_path
    ):
        line = f"import os; print('x', file=open({str(tmp_path / 'n')!r}, 'a'))"
        program = [sys.executable, "-c", f"{line}; os._exit(9)"]
        assert watch.supervise(program, 5, tmp_path / "none.json") == 1
        assert (tmp_path / "n").read_text() == "x\n"

    def test_the_command_starts_a_process_with_what_is_left(
        self, tmp_path, monkeypatch
    ):
        given = []

        def run(arguments, *, env, check):
            given.append((arguments, env[watch.CHILD]))
            return types.SimpleNamespace(returncode=0)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.delenv(watch.CHILD, raising=False)
        path = str(tmp_path / "results.json")
        assert command.main(["device", "--json", path]) == 0
        ((arguments, child),) = given
        assert arguments[1:6] == ["-m", "benchmarks", "device", "--json", path]
        assert arguments[6] == "--minutes" and child == "1"
        assert 7.5 < float(arguments[7]) < device.DEFAULT_MINUTES


def fake_torch(cuda=True):
    return types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: cuda))


class TestPeersOnAGpu:
    @pytest.mark.parametrize(
        ("platform", "cuda", "names", "reason"),
        [
            ("gpu", True, {"torch", "liger", "cce", "quack"}, ""),
            ("gpu", False, set(), "finds no GPU"),
            ("tpu", True, set(), "on a"),
            ("cpu", True, {"torch"}, "takes part on a GPU only"),
        ],
    )
    def test_packages_of_torch(self, monkeypatch, platform, cuda, names, reason):
        torch = fake_torch(cuda)
        torch.nn = types.SimpleNamespace(
            functional=types.SimpleNamespace(linear_cross_entropy=None)
        )
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(peers, "import_package", lambda name: (torch, ""))
        found = peers.torch_contenders(workloads.LinearCase(layout="vh"))
        assert {c.name for c in found if c.program} == names
        assert all(reason in c.absent for c in found if not c.program)
        hv = peers.torch_contenders(workloads.LinearCase(layout="hv"))
        assert {c.name for c in hv if c.program} == names & {"torch"}

    def test_a_package_that_is_not_installed(self):
        assert peers.import_package("no_such.package") == (None, "not installed")
        found = peers.torch_contenders(workloads.LinearCase(layout="vh"))
        assert all(c.absent for c in found[1:])

    @pytest.mark.parametrize(
        ("platform", "kernel"),
        [("gpu", "mosaic_gpu"), ("tpu", "mosaic_tpu"), ("cpu", "")],
    )
    def test_implementations_are_those_of_the_platform(
        self, monkeypatch, platform, kernel
    ):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        found = list(peers.implementations().values())
        assert found == [None] + [kernel] * bool(kernel)

    def test_xla_takes_part_where_it_is_not_the_default(self, monkeypatch):
        """Elsewhere the same program would be timed twice."""
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        one = defaults.Default("statistics", "mosaic_tpu", "v6e", "timed", 1, (1, 9), 1)
        monkeypatch.setattr(defaults, "DEFAULTS", (one,))
        for chip, found in (
            ("v5e", [None, "mosaic_tpu"]),
            ("v6e", [None, "xla", "mosaic_tpu"]),
        ):
            with registry.compiling_for(registry.TPUS[chip]):
                assert list(peers.implementations().values()) == found

    @pytest.mark.skipif(
        peers.import_package("torch")[0] is None, reason="torch is not installed"
    )
    def test_softmax_of_torch(self):
        torch: Any = peers.import_package("torch")[0]
        x = jnp.linspace(-1, 1, 10).reshape(2, 5)
        arguments = (x, None, None, x)
        for value in (True, False):
            program = torch_peer.softmax_program(
                torch,
                lambda t: torch.softmax(t, dim=-1),
                arguments,
                "torch",
                0.7,
                value=value,
                gradient=True,
            )
            y, pull = jax.vjp(lambda x: jax.nn.softmax(x / 0.7), x)
            expected = (y,) * value + pull(x)
            for mine, theirs in zip(
                program.executable(*arguments), expected, strict=True
            ):
                np.testing.assert_allclose(mine, theirs, atol=1e-6)


class TestPromises:
    @pytest.mark.parametrize("layout", ["hv", "vh"])
    def test_truth_of_blocks_is_that_of_float64(self, monkeypatch, layout):
        monkeypatch.setattr(promises, "_BLOCK_ROWS", 8)
        hidden, kernel, labels = TINY.inputs(layout)
        subset = checks.Subset.of(TINY.tokens, TINY.classes, size=5)
        found = promises._truth(hidden, kernel, labels, layout, subset, gradient=True)
        known = linear.truth.linear_truth(
            hidden, kernel if layout == "hv" else kernel.T, labels, subset
        )
        for name, array in found.items():
            assert checks.relative_error(array, known[name]) < 1e-5, name
        found = promises._truth(hidden, kernel, labels, layout, subset, gradient=False)
        assert checks.relative_error(found["entropy"], known["entropy"]) < 1e-5
        assert checks.relative_error(-found["log_prob"], known["loss"]) < 1e-5

    def test_a_kernel_that_this_machine_lacks_is_not_a_fault(self, monkeypatch):
        named = {peers.OURS: None, "jaxsoft mosaic_gpu": "mosaic_gpu"}
        monkeypatch.setattr(peers, "implementations", lambda: named)
        session = Session(quick=True, rounds=1)
        promises._run_case(session, TINY, "vh", promises._statistics, frozenset())
        found = {r.name: r for r in session.results}
        assert found["jaxsoft mosaic_gpu"].status == "not run"
        assert "mosaic_gpu" in found["jaxsoft mosaic_gpu"].reason
        assert found[peers.OURS].status == "timed" and not session.failed
        assert found[promises.MATMUL].status == "timed"
        assert set(found[peers.OURS].errors) == {"lse", "log_prob", "entropy"}

    def test_a_faulty_kernel_is_left_out_and_a_faulty_default_ends_it(
        self, monkeypatch
    ):
        asked = []
        monkeypatch.setattr(
            promises, "run", lambda session, *, small, without: asked.append(without)
        )
        for name in ("_check_rows", "_check_rest", "_time_rest"):
            monkeypatch.setattr(device, name, lambda *args: None)
        for faulty in ("jaxsoft mosaic_gpu", peers.OURS):

            def fail(session, faulty=faulty):
                result = Result(
                    device._PARITY, "w", {}, "c", faulty, "wrong", ours=True
                )
                session.add(result)

            monkeypatch.setattr(device, "_check_kernels", fail)
            device.run(Session(quick=True))
        assert asked == [{"jaxsoft mosaic_gpu"}]

    def test_targets_are_asked_of_an_h100_alone(self, monkeypatch):
        session = Session(quick=True, rounds=1)
        session.add(self.result("kernel", 0.040, part_ratio=1.05, ratio=0.9))
        session.add(self.result("jaxsoft", 0.050, part_ratio=1.25, ratio=1.2))
        named = {"kernel": "xla", "jaxsoft": None}
        monkeypatch.setattr(peers, "implementations", lambda: named)
        for kind, met in (
            ("NVIDIA H100 80GB HBM3", [True, False]),
            ("B200", [None] * 2),
        ):
            devices = [types.SimpleNamespace(device_kind=kind)]
            monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
            found = [f.record() for f in promises.findings(session)]
            assert [f["met"] for f in found] == [m for m in met for _ in range(2)]
        assert found[0]["what"].endswith("[V, H]: kernel, seconds")

    def result(self, name, seconds, **ratios):
        timing = contest.timing.Timing.of([seconds] * 3)
        return Result(
            promises.SUITE,
            promises.LOSS.name,
            {},
            "mean, [V, H]",
            name,
            "timed",
            timing=timing,
            **ratios,
        )


def test_other_classes_than_the_canonical_are_a_fault(monkeypatch):
    draw, statistics = jaxsoft.linear_sample, jaxsoft.linear_statistics

    def odd(key, *arguments, implementation=None, **options):
        drawn = draw(key, *arguments, implementation=implementation, **options)
        return drawn if implementation else drawn ^ 1

    monkeypatch.setattr(jaxsoft, "linear_sample", odd)
    session = Session(quick=True, rounds=1)
    choices.check_layer(session, TINY, "vh", "s")
    found = {r.case.split(",")[0]: r for r in session.results}
    assert found["largest logit"].status == "right", found
    assert found["sample"].status == "wrong" and session.failed
    monkeypatch.setattr(
        jaxsoft,
        "linear_statistics",
        lambda hidden, *arguments, **options: statistics(
            -hidden, *arguments, **options
        ),
    )
    session = Session(quick=True, rounds=1)
    choices.check_layer(session, TINY, "vh", "s")
    assert session.results[0].status == "wrong"


def test_other_noise_than_the_canonical_is_a_fault(monkeypatch):
    relaxed = jaxsoft.gumbel_softmax
    workload = workloads.SoftmaxWorkload("tiny", 3, 130)
    for shift, status in ((0, "right"), (1, "wrong")):

        def call(key, *arguments, shift=shift, **options):
            return relaxed(jax.random.fold_in(key, shift), *arguments, **options)

        monkeypatch.setattr(jaxsoft, "gumbel_softmax", call if shift else relaxed)
        session = Session(quick=True, rounds=1)
        choices.check_rows(session, workload, "s")
        assert len(session.results) == 4
        assert {r.status for r in session.results} == {status}


def test_losses_that_are_not_those_of_float64_are_a_fault(monkeypatch):
    entropy = jaxsoft.entropy
    workload = workloads.SoftmaxWorkload("tiny", 3, 130)
    for scale, status in ((1, "right"), (1.01, "wrong")):
        monkeypatch.setattr(
            jaxsoft,
            "entropy",
            lambda *arguments, scale=scale, **options: (
                scale * entropy(*arguments, **options)
            ),
        )
        session = Session(quick=True, rounds=1)
        choices.check_losses(session, workload, "s")
        assert [r.status for r in session.results] == ["right", status]


def test_a_machine_that_has_lost_its_device_starts_anew(tmp_path, monkeypatch):
    ended = []

    def leave(code=watch.AGAIN):
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(watch, "leave", leave)
    monkeypatch.setattr(contest.machine, "healthy", lambda: False)
    path = tmp_path / "results.json"
    session = Session(quick=True, rounds=1, path=path)
    session.guard(600)

    def broken(*_, **__):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(jaxsoft, "linear_cross_entropy", broken)
    with pytest.raises(SystemExit):
        linear.run_workload(session, TINY, linear.MAIN_CASES[:1])
    session.finish()
    assert ended == [watch.AGAIN]
    saved = {r["name"]: r["status"] for r in json.loads(path.read_text())["results"]}
    assert saved[peers.OURS] == "failed" and "optax" not in saved
