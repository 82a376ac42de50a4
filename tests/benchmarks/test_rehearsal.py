"""The device suite rehearsed: all of its steps at full size, without a device.

Nothing is computed and no array is made: calls and compilations move a clock by what
they would take on an H200, so that a run of eight minutes takes a second. What no run
has recorded is taken as twice and a half the least time at the chip's rates, and a
compilation as what XLA took for an H100 on a machine of 16 cores.
"""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    contest,
    device,
    heads,
    machine,
    peers,
    promises,
    session,
    timing,
    torch_peer,
    workloads,
)
from benchmarks.session import Session
from jaxsoft.linear.plans import Layer

# Of an H200: copies, and products of bfloat16 and float32, a second.
RATES = {"copy": 4.0e12, "matmul bfloat16": 7.0e14, "matmul float32": 4.0e14}
COMPILE_SECONDS = 4.0
# A package of PyTorch compiles kernels of its own, and tunes them.
TORCH_SECONDS = 15.0
TRUTH_SECONDS = 3.0
SLOWER_THAN_LEAST = 2.5
SMALLEST_CALL = 5e-5
PEERS = {"torch", "liger", "cce", "quack"}


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


@dataclasses.dataclass
class Rehearsal:
    """What the suite was asked to do."""

    clock: Clock
    compiled: list
    timed: list
    ends_at: float = float("inf")

    def spend(self, seconds):
        self.clock.now += seconds
        if self.clock.now > self.ends_at:
            raise InterruptedError


def fake_inputs(self, layout=None, seed=0):
    """Arrays of any size that take no memory: every number of one is the same."""
    if layout is None:
        shapes = (self.rows, self.classes), (self.rows,), (self.rows, self.classes)
    else:
        kernel = (self.features, self.classes)
        kernel = kernel if layout == "hv" else kernel[::-1]
        shapes = (self.tokens, self.features), kernel, (self.tokens,)
    dtypes = [self.dtype, self.dtype, self.dtype]
    dtypes[1 if layout is None else 2] = "int32"
    return tuple(
        np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def fake_draws(draws, workload, key):
    """What a head draws, without memory; keys are real ones."""
    shapes = jax.eval_shape(functools.partial(draws, workload), key)
    return {
        name: key
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)
        else np.broadcast_to(np.zeros((), shape.dtype), shape.shape)
        for name, shape in shapes.items()
    }


@pytest.fixture
def rehearsal(monkeypatch):
    found = Rehearsal(Clock(), [], [])
    run_case, make_head = contest.run_case, heads._case

    def seconds_of(case, contender):
        least = session.floor_seconds(case.work(contender), RATES) or 0.0
        return max(least * SLOWER_THAN_LEAST, SMALLEST_CALL)

    def run(case, given):
        seconds = {c.name: seconds_of(case, c) for c in case.contenders}

        def program(case, contender, arguments, donated=()):
            found.spend(TORCH_SECONDS if contender.name in PEERS else COMPILE_SECONDS)
            found.compiled.append((*case.key, contender.name))
            return timing.Program(contender.name, dict, COMPILE_SECONDS, 0, 0)

        def call(program, arguments, mark=None):
            found.spend(seconds[program.name])
            return {}, seconds[program.name]

        def interleave(programs, arguments, rounds, limit, before):
            start, turn = found.clock.now, 0
            while turn < rounds and (
                turn < timing.FEWEST_ROUNDS or found.clock.now - start < limit
            ):
                turn += 1
                for each in programs:
                    before(each.name)
                    once = seconds[each.name]
                    found.spend(once * timing._calls_per_sample(each, once))
            for each in programs:
                found.timed.append((case.suite, case.workload, case.title, each.name))
            samples = {name: [value] * turn for name, value in seconds.items()}
            return {
                p.name: timing.Timing.of(samples[p.name], "device") for p in programs
            }

        monkeypatch.setattr(contest, "_program", program)
        monkeypatch.setattr(timing, "call", call)
        monkeypatch.setattr(timing, "interleave", interleave)

        def truth():
            found.spend(TRUTH_SECONDS if case.timed else 0.1)
            return {}

        contenders = [dataclasses.replace(c, observe=None) for c in case.contenders]
        run_case(
            dataclasses.replace(
                case, contenders=contenders, truth=truth, observe=lambda _: {}
            ),
            given,
        )

    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: True),
        nn=types.SimpleNamespace(
            functional=types.SimpleNamespace(linear_cross_entropy=None)
        ),
        softmax=len,
        from_dlpack=None,
    )
    right = types.SimpleNamespace(correct=True, errors={}, faults=[])
    monkeypatch.setattr(contest, "run_case", run)
    monkeypatch.setattr(contest.checks, "judge", lambda *args, **kwargs: right)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        peers,
        "import_package",
        lambda name: (
            (None, "not installed") if name in ("jax_cce", "tokamax") else (torch, "")
        ),
    )
    monkeypatch.setattr(torch_peer, "absent", lambda torch: "")
    monkeypatch.setattr(machine, "available_bytes", lambda: None)
    monkeypatch.setattr(
        Session, "_rate", lambda self, name: (found.spend(1.0), RATES[name])[1]
    )
    monkeypatch.setattr(session, "time", found.clock)
    monkeypatch.setattr(
        heads,
        "_case",
        lambda given, workload, head, *rest: make_head(
            given,
            workload,
            dataclasses.replace(head, draws=functools.partial(fake_draws, head.draws)),
            *rest,
        ),
    )
    for kind in (workloads.LinearWorkload, workloads.SoftmaxWorkload):
        monkeypatch.setattr(kind, "inputs", fake_inputs)
    return found


def key_of(record):
    return session.key_of(*(record[n] for n in ("suite", "workload", "shape", "case")))


def start(path, **options):
    one = Session(minutes=device.DEFAULT_MINUTES, path=path, **options)
    if path.exists():
        one.resume(json.loads(path.read_text()))
    return one


def test_a_call_of_eight_minutes_answers_in_order(rehearsal, tmp_path):
    path = tmp_path / "device.json"
    one = start(path)
    device.run(one)
    one.finish()
    assert rehearsal.clock.now <= 60 * device.DEFAULT_MINUTES
    suites = [suite for suite, *_ in rehearsal.compiled]
    first = suites.index(promises.SUITE)
    assert set(suites[:first]) == {device._PARITY}
    checked = {name for *_, name in rehearsal.compiled[:first]}
    assert {peers.OURS, f"{peers.OURS} mosaic_gpu"} <= checked
    timed = [entry for entry in rehearsal.timed if entry[0] == promises.SUITE]
    asked = list(dict.fromkeys(title for _, _, title, _ in timed))
    kinds = [title.split(",")[0] for title in asked]
    assert kinds[:5] == ["mean", "statistics", "softmax", "softmax", "sample"]
    who = {name for _, _, title, name in timed if title == asked[0]}
    assert who == {
        peers.OURS,
        f"{peers.OURS} mosaic_gpu",
        *map(peers.with_workspace, promises.WORKSPACES),
        "optax",
        *PEERS,
    }
    decoded = {workload for _, workload, title, _ in timed if "sample" in title}
    assert decoded == {workload.name for workload in promises.SAMPLES}


def test_a_run_that_was_cut_goes_on_behind_what_it_knows(rehearsal, tmp_path):
    path = tmp_path / "device.json"
    rehearsal.ends_at = 200.0
    with pytest.raises(InterruptedError):
        device.run(start(path))
    known = json.loads(path.read_text())["results"]
    assert known and not any(r["suite"] == device.SUITE for r in known)
    rehearsal.ends_at, rehearsal.compiled[:] = float("inf"), []
    calls = 1
    while True:
        one = start(path)
        device.run(one)
        document = one.finish()
        calls += 1
        if not any(r["status"] == "skipped" for r in document["results"]):
            break
        assert calls < 12
    finished = {(*key_of(r), r["name"]) for r in known if r["status"] == "right"}
    # The case that was cut is done again, and no other.
    again = finished & set(rehearsal.compiled)
    assert len(finished) > 20 and len(again) <= 3
    every = [(*key_of(r), r["name"]) for r in document["results"]]
    assert len(every) == len(set(every))


def test_each_workspace_is_a_plan_of_its_own():
    size = promises.LOSS
    layer = Layer(size.tokens, size.features, size.classes, 4, 2, 2, 2)
    plans = [
        layer.plan(workspace, kept_bytes=2, reduced=True)
        for workspace in (None, *promises.WORKSPACES)
    ]
    assert [plan.kind for plan in plans] == ["chunks", "keep", "chunks"]
    # Of a few tiles: the gradient computes nearly every logit a second time.
    assert plans[1].kept_classes < size.classes / 16
    assert plans[0].chunk_rows < size.tokens == plans[2].chunk_rows
