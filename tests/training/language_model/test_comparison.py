"""All heads for the same time: what is counted, written and refused."""

import dataclasses
import functools
import json
import math
import signal
import types

import jax
import numpy as np
import pytest

from jaxsoft.training import (
    LanguageModelConfig,
    Listener,
    NonFiniteLossError,
    RunDirectoryError,
    StopRequest,
    TrainingInterrupted,
    compare_heads,
)
from jaxsoft.training.heads import HEADS, HeadPlan
from jaxsoft.training.language_model import comparison
from jaxsoft.training.language_model.config import TransformerConfig
from jaxsoft.training.language_model.head_cost import measure_head
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.steps import Programs
from jaxsoft.training.run_directory import RunDirectory

# One worker: its runs serve many tests.


class Notes(Listener):
    def __init__(self):
        self.texts, self.places, self.ends = [], [], []

    def note(self, text):
        self.texts.append(text)

    def start(self, step, steps):
        assert step == 0
        self.ends.append(steps)

    def step(self, record):
        self.places.append(record["step"])


@pytest.fixture(scope="module")
def config(corpus_dir, cache_dir, tmp_path_factory):
    return LanguageModelConfig(
        corpus=str(corpus_dir),
        cache_dir=str(cache_dir),
        out=str(tmp_path_factory.mktemp("comparison") / "run"),
        vocab_size=270,
        learning_rate=0.03,
        num_samples=32,
        batch_size=4,
        sequence_length=16,
        features=16,
        layers=1,
        heads=2,
        evaluation_tokens=128,
    )


@pytest.fixture(scope="module", autouse=True)
def one_second_a_step():
    """A clock that ticks once between its readings, and programs compiled once."""
    ticks = iter(range(10**6))
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "time", clock)
        patch.setattr(comparison, "Programs", functools.cache(Programs))
        yield


@pytest.fixture(scope="module")
def compared(config):
    notes = Notes()
    return notes, compare_heads(config, 20.0, listener=notes)


def test_every_head_has_the_same_time(compared):
    notes, report = compared
    assert [one.head for one in report.heads] == list(HEADS)
    for one in report.heads:
        assert (one.steps, one.seconds, one.step_seconds) == (20, 20.0, 1.0)
        assert [place for place, _ in one.curve] == [4.0, 8.0, 12.0, 16.0, 20.0]
        assert one.curve[-1][1] == one.loss
        assert one.perplexity == math.exp(one.loss)
        assert one.cost.seconds > 0 and one.compile_seconds > 0
    assert notes.ends == [20] * 4 and notes.places == [*range(1, 21)] * 4


def test_every_head_learns(compared):
    _, report = compared
    for one in report.heads:
        assert one.loss < report.unigram_cross_entropy - 0.05, one.head
        assert one.loss < one.curve[0][1]
    assert report.tokens_evaluated == 4 * 128
    assert report.tokens_per_step == 64
    assert (report.vocab_size, report.features) == (270, 16)


def test_files(compared, config):
    _, report = compared
    directory = RunDirectory(config.out)
    names = [file.name for file in directory.files()]
    assert names == ["comparison.json", "comparison.png"]
    assert directory.comparison_curve.read_bytes().startswith(b"\x89PNG")
    record = json.loads(directory.comparison.read_text())
    assert record.pop("config") == dataclasses.asdict(config)
    assert record == json.loads(json.dumps(dataclasses.asdict(report)))
    with pytest.raises(RunDirectoryError, match=r"already holds a run \(comparison"):
        compare_heads(config, 5.0)


def test_a_stop_writes_nothing(config, tmp_path):
    stop = StopRequest()

    class Stops(Notes):
        def step(self, record):
            super().step(record)
            if len(self.places) == 3:
                stop.received = signal.SIGINT

    notes, out = Stops(), tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        compare_heads(
            dataclasses.replace(config, out=str(out)), 20.0, listener=notes, stop=stop
        )
    assert len(notes.places) == 3 and not out.exists()


def test_a_loss_that_is_not_finite_names_head_and_step(config, tmp_path, monkeypatch):
    step = Programs.step

    def poisoned(self, state, batch, rate, index):
        state, result = step(self, state, batch, rate, index)
        return state, result._replace(loss=result.loss * math.nan ** (index == 3))

    monkeypatch.setattr(Programs, "step", poisoned)
    other = dataclasses.replace(config, out=str(tmp_path / "run"))
    with pytest.raises(NonFiniteLossError, match="full head, step 3: loss nan.*`learn"):
        compare_heads(other, 20.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_time_must_be_positive(config, seconds):
    with pytest.raises(ValueError, match="`compare_heads` must be positive, got"):
        compare_heads(config, seconds)


V, H = 4096, 32


@pytest.mark.parametrize("head", HEADS)
def test_cost_of_a_head(head):
    model = TransformerConfig(num_classes=V, features=H, layers=1, heads=2)
    plan = HeadPlan(head, tuple(range(V, 0, -1)), 64)
    programs = Programs(model, OptimizerConfig(20, 1e-3), (2, 8), head=plan, seed=0)
    params = programs.init().params
    batch = np.random.default_rng(0).integers(0, V, (2, 9)).astype(np.int32)
    cost = measure_head(programs, params, batch)
    leaves = jax.tree.leaves(params["head"])
    # Parameters, two moments of each and the count of steps, besides the tables.
    least = 3 * sum(leaf.nbytes for leaf in leaves)
    assert least < cost.state_bytes < least + 40 * V
    assert not any(leaf.is_deleted() for leaf in leaves)
    assert cost.temporary_bytes is not None
    if head == "hierarchical":
        assert cost.temporary_bytes < V * H
    if head == "full":
        # The gradient of the kernel, which such a step stores.
        assert cost.temporary_bytes >= 4 * V * H
