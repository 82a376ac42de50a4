"""The passes over the logits that benchmarks name are those that programs take."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import (
    asked,
    heads,
    linear,
    peers,
    programs_figures,
    timing,
    workloads,
)
from benchmarks.passes import cross_entropy
from benchmarks.programs_cases import Program
from benchmarks.session import Result, Session
from jaxsoft.linear.plans import Layer

LAYER = workloads.LinearWorkload("tiny", 64, 32, 4096, "float32")
# Of those heads whose passes depend on the plan; all but one have titles of their own.
# The products of an adapter, beside the layer's, count as no passes.
HEADS = {
    head.title.partition(":")[0]: head
    for head in (*heads.TRAINING, *heads.CONTRASTIVE)
    if head.moving and "b" not in head.moving
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Takes one device: with more, all classes are kept or none."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def flops(function, *arguments):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "vocab"))
    program = Program(function, arguments, (P(),) * len(arguments))
    return programs_figures.measure(program, mesh, "cpu")["dot flops"]


@pytest.mark.parametrize(
    ("reduction", "workspace", "passes"),
    [
        # By chunks, and by keeping all logits, five of eight parts, and none.
        ("mean", None, 3),
        ("none", None, 3),
        ("none", 2**20, 3.375),
        ("none", 2**10, 4),
    ],
)
def test_passes_of_cross_entropy(reduction, workspace, passes):
    spaces = () if workspace is None else (workspace,)
    case = workloads.LinearCase(reduction=reduction, gradient=True, workspaces=spaces)
    ours = [c for c in peers.linear_contenders(case, LAYER) if c.ours][-1]
    assert ours.gradient_matmuls == passes
    hidden, kernel, labels = LAYER.inputs("hv")
    arguments = (hidden, kernel, labels, None, hidden[:, 0])
    assert ours.function is not None
    function = linear.prepare(ours.function, case)
    found = flops(function, *arguments) / LAYER.matmul_flops
    assert passes <= found <= math.ceil(passes)


@pytest.fixture(params=[2**26, 2**20, 2**10])
def usual(monkeypatch, request):
    """The workspace of calls that name none; what was traced with another is gone."""
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "workspace", lambda layer, given: given or request.param)
        yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("title", HEADS)
@pytest.mark.usefixtures("usual")
def test_passes_of_heads(title):
    head, workload = HEADS[title], LAYER
    if head in heads.CONTRASTIVE:
        workload = heads.as_pairs(workload)
    inputs = dict(zip(("hidden", "kernel", "labels"), LAYER.inputs("hv"), strict=True))
    inputs |= head.draws(workload, jax.random.key(4))
    cotangents = heads._cotangents(jax.eval_shape(head.ours, inputs))
    function = heads._prepare(head.ours, head.moving)
    passes = head.passes[peers.OURS]
    passes = passes(workload) if callable(passes) else passes
    found = flops(function, inputs, cotangents)
    # Of tiles that are kept or computed again a program's text has both.
    assert passes <= found / workload.matmul_flops <= math.ceil(passes)


def test_kernels_for_accelerators_keep_nothing():
    assert cross_entropy(LAYER) == cross_entropy(LAYER, implementation="xla") == 3
    assert cross_entropy(LAYER, implementation="mosaic_gpu") == 4


class TestWhatIsAsked:
    def session(self, **fields):
        session = Session(quick=False)
        timed = timing.Timing.of([1.0])
        for name, ratio, temporaries in (("jaxsoft", 0.97, 100), ("optax", 1.0, 1000)):
            program = timing.Program(name, lambda: None, 0.0, temporaries, 0)
            result = Result(
                "linear",
                "train-65k",
                {"N": 1},
                "mean, [H, V]: value and gradient",
                name,
                "timed",
                timing=timed,
                ratio=ratio,
                baseline="optax",
                program=program,
            )
            session.add(dataclasses.replace(result, **fields))
        return session

    def test_time_and_temporaries_are_held_against_bounds(self):
        found = [f.record() for f in asked.findings(self.session(), "linear")]
        assert [f["value"] for f in found] == [0.97, 0.1]
        assert [f["at_most"] for f in found] == [0.95, 1 / 8]
        assert [f["met"] for f in found] == [False, True]

    @pytest.mark.parametrize(
        "fields",
        [
            {"suite": "heads"},
            {"workload": "gpt2-odd"},
            {"case": "mean, [H, V]: value"},
            {"case": "mean, [H, V], temperature: value and gradient"},
            {"name": "jaxsoft, 64 MiB"},
        ],
    )
    def test_nothing_is_asked_of_others(self, fields):
        session = self.session(**fields)
        assert list(asked.findings(session, fields.get("suite", "linear"))) == []

    def test_every_bound_is_of_a_result_of_its_suite(self):
        titles = {case.title for case in linear.ALL_CASES}
        titles |= {head.title for head in (*heads.HEADS, *heads.CONTRASTIVE)}
        for bound in asked._BOUNDS:
            assert any(title.startswith(bound.case) for title in titles), bound
