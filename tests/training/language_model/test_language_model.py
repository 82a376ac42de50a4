import dataclasses
import json
import math
import shutil
import signal
import sys

import numpy as np
import pytest

from jaxsoft.training import (
    CorpusError,
    FinalReport,
    LanguageModelConfig,
    Listener,
    MissingExtraError,
    NonFiniteLossError,
    RunDirectoryError,
    StopRequest,
    TrainingInterrupted,
    load_config,
    train_language_model,
)
from jaxsoft.training.language_model import trainer
from jaxsoft.training.language_model.corpus import read_corpus
from jaxsoft.training.language_model.steps import Programs
from jaxsoft.training.run_directory import WALL_CLOCK_FIELDS, RunDirectory

# One worker: its runs serve many tests.


class Notes(Listener):
    def __init__(self):
        self.texts, self.steps, self.validations = [], [], []
        self.opened = self.closed = 0

    def note(self, text):
        self.texts.append(text)

    def start(self, step, steps):
        self.opened += 1

    def step(self, record):
        self.steps.append(record["step"])

    def validation(self, record):
        self.validations.append(record["step"])

    def stop(self):
        self.closed += 1


class DiesAfter(Notes):
    """Ends the run in the middle without a word, as a kill would."""

    def __init__(self, step):
        super().__init__()
        self.last = step

    def step(self, record):
        super().step(record)
        if record["step"] == self.last:
            raise MemoryError


def records(out):
    lines = RunDirectory(out).records()
    return [
        {key: value for key, value in line.items() if key not in WALL_CLOCK_FIELDS}
        for line in lines
    ]


@pytest.fixture(scope="module")
def uninterrupted(corpus_dir, cache_dir, tmp_path_factory):
    """A finished run: its configuration, notes and report."""
    config = LanguageModelConfig(
        corpus=str(corpus_dir),
        cache_dir=str(cache_dir),
        out=str(tmp_path_factory.mktemp("finished") / "run"),
        vocab_size=270,
        steps=12,
        learning_rate=0.03,
        batch_size=4,
        sequence_length=16,
        features=16,
        layers=1,
        heads=2,
        evaluate_every=5,
        evaluation_tokens=128,
        checkpoint_every=5,
        sample_tokens=8,
    )
    notes = Notes()
    return config, notes, train_language_model(config, listener=notes)


def test_metrics_hold_every_step_validation_and_the_end(uninterrupted):
    config, notes, report = uninterrupted
    lines = records(config.out)
    assert [x["step"] for x in lines if x["event"] == "train"] == [*range(1, 13)]
    assert [x["step"] for x in lines if x["event"] == "validation"] == [5, 10]
    assert lines[-1]["event"] == "final" and lines[-1]["loss"] == report.loss
    assert notes.steps == [*range(1, 13)] and notes.validations == [5, 10]
    assert (notes.opened, notes.closed) == (1, 1)


def test_training_starts_at_the_unigram_loss_and_goes_down(uninterrupted):
    config, _, report = uninterrupted
    losses = [x["loss"] for x in records(config.out) if x["event"] == "train"]
    assert abs(losses[0] - report.unigram_cross_entropy) < 0.2
    assert report.loss < report.unigram_cross_entropy - 0.1
    assert math.isclose(report.perplexity, math.exp(report.loss))


def test_report_counts_what_it_says(uninterrupted):
    config, _, report = uninterrupted
    assert report.step == 12
    assert report.tokens_evaluated == 4 * 128
    assert report.vocab_size == 270
    assert report.memory.stored_logits == 4 * 16 * 270 * 4
    assert [sample.temperature for sample in report.samples] == [0.0, 0.7, 1.0]
    assert FinalReport.from_record(json.loads(json.dumps(report.record()))) == report


def test_samples_continue_validation_text_or_the_prompt(uninterrupted, tiny, tmp_path):
    config, _, report = uninterrupted
    assert report.prompt in "\n".join(read_corpus(config.corpus).validation)
    assert len(report.prompt) > 10
    given = LanguageModelConfig(**tiny | {"steps": 1, "prompt": "alpha beta"})
    assert train_language_model(given).prompt == "alpha beta"


def test_all_files_are_written(uninterrupted):
    config, _, _ = uninterrupted
    names = {file.name for file in RunDirectory(config.out).files()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "tokenizer.json",
        "counts.npy",
        "checkpoints",
        "model.safetensors",
        "model-card.md",
    }
    png = RunDirectory(config.out).curve.read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    assert load_config(config.out) == config


def test_finished_run_is_not_run_again(uninterrupted):
    config, _, report = uninterrupted
    before = RunDirectory(config.out).metrics.read_bytes()
    notes = Notes()
    assert train_language_model(config, resume=True, listener=notes) == report
    assert "finished at step 12" in notes.texts[-1] and not notes.steps
    assert RunDirectory(config.out).metrics.read_bytes() == before


@pytest.mark.parametrize("last", [3, 8])
def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, last):
    """Dies before the first checkpoint, and between two with metrics to drop."""
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))
    with pytest.raises(MemoryError):
        train_language_model(config, listener=DiesAfter(last))
    directory = RunDirectory(config.out)
    directory.tokenizer.unlink()  # as if killed before it was copied
    with directory.metrics.open("a") as file:
        file.write('{"event": "train", "st')  # cut short by the kill
    notes = Notes()
    train_language_model(config, resume=True, listener=notes)
    assert notes.steps[0] == (1 if last == 3 else 6)
    assert records(config.out) == records(uninterrupted[0].out)
    whole = RunDirectory(uninterrupted[0].out)
    assert directory.tokenizer.read_bytes() == whole.tokenizer.read_bytes()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    uninterrupted, tmp_path
):
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))
    with pytest.raises(MemoryError):
        train_language_model(config, listener=DiesAfter(11))
    for file in (RunDirectory(config.out).checkpoints / "10").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    notes = Notes()
    train_language_model(config, resume=True, listener=notes)
    assert any("checkpoint 10 is damaged (" in text for text in notes.texts)
    assert notes.steps == [*range(6, 13)]
    assert records(config.out) == records(uninterrupted[0].out)


@pytest.mark.parametrize("last", [5, 7])
def test_stopped_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, last):
    """Also where the signal comes before or in a validation, which is made up for."""
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))
    stop = StopRequest()

    class Stops(Notes):
        def step(self, record):
            assert stop.patient == (record["step"] > 1)
            if record["step"] == last:
                stop.received = signal.SIGTERM

    with pytest.raises(TrainingInterrupted) as stopped:
        train_language_model(config, listener=Stops(), stop=stop)
    assert stopped.value.step == last and not stop.patient
    assert records(config.out)[-1] == records(uninterrupted[0].out)[last - (last == 5)]
    train_language_model(config, resume=True)
    assert records(config.out) == records(uninterrupted[0].out)


def test_run_killed_after_its_last_step_is_finished_by_resume(uninterrupted, tmp_path):
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))

    class DiesAtTheEnd(Notes):
        def stop(self):
            raise MemoryError

    with pytest.raises(MemoryError):
        train_language_model(config, listener=DiesAtTheEnd())
    assert RunDirectory(config.out).final_record() is None
    notes = Notes()
    train_language_model(config, resume=True, listener=notes)
    assert notes.steps == []
    assert records(config.out) == records(uninterrupted[0].out)


def test_resume_elsewhere_needs_the_same_texts_only(uninterrupted, tmp_path):
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))
    with pytest.raises(MemoryError):
        train_language_model(config, listener=DiesAfter(6))
    moved = tmp_path / "moved"
    shutil.copytree(config.corpus, moved)
    elsewhere = dataclasses.replace(
        config, corpus=str(moved), cache_dir=str(tmp_path / "cache")
    )
    train_language_model(elsewhere, resume=True)
    assert records(config.out) == records(uninterrupted[0].out)
    (moved / "text00.txt").write_text("something else\n")
    RunDirectory(config.out).truncate_metrics(5)
    with pytest.raises(RunDirectoryError, match="the corpus of the run in"):
        train_language_model(elsewhere, resume=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 13), ("seed", 1), ("learning_rate", 0.1), ("prompt", "a")],
)
def test_resume_with_another_configuration_is_an_error(uninterrupted, field, value):
    config = dataclasses.replace(uninterrupted[0], **{field: value})
    with pytest.raises(RunDirectoryError, match=f"has `{field}` .*, not {value!r}"):
        train_language_model(config, resume=True)


def test_changed_versions_are_noted(uninterrupted, tmp_path):
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))
    with pytest.raises(MemoryError):
        train_language_model(config, listener=DiesAfter(6))
    directory = RunDirectory(config.out)
    description = json.loads(directory.config.read_text())
    description["versions"]["jax"] = "0.0.1"
    directory.config.write_text(json.dumps(description))
    notes = Notes()
    train_language_model(config, resume=True, listener=notes)
    assert any("versions changed" in text for text in notes.texts)


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    uninterrupted, tmp_path, monkeypatch
):
    config = dataclasses.replace(uninterrupted[0], out=str(tmp_path / "run"))
    step = Programs.step

    def poisoned(self, *args):
        state, result = step(self, *args)
        poisoned.calls += 1
        if poisoned.calls == 7:
            result = result._replace(loss=result.loss * math.nan)
        return state, result

    poisoned.calls = 0
    monkeypatch.setattr(Programs, "step", poisoned)
    notes = Notes()
    with pytest.raises(
        NonFiniteLossError, match="step 7: loss nan.*checkpoint 5 is kept"
    ):
        train_language_model(config, listener=notes)
    assert notes.closed == 1
    assert [x["step"] for x in records(config.out) if x["event"] == "train"][-1] == 6
    monkeypatch.setattr(Programs, "step", step)
    train_language_model(config, resume=True)
    assert records(config.out) == records(uninterrupted[0].out)


def test_overflow_is_found_in_a_real_run(tiny):
    config = LanguageModelConfig(**tiny | {"learning_rate": 1e38})
    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss"):
        train_language_model(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100_000}, "too small: .* training tokens"),
        ({"sequence_length": 2_000}, "too small: .* validation tokens"),
    ],
)
def test_corpus_smaller_than_a_batch_is_an_error(tiny, tmp_path, changes, message):
    with pytest.raises(CorpusError, match=message):
        train_language_model(LanguageModelConfig(**tiny | changes))
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_left_alone(tiny, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(RunDirectoryError, match=r"already holds a run \(metrics"):
        train_language_model(LanguageModelConfig(**tiny))
    assert [file.name for file in out.iterdir()] == ["metrics.jsonl"]
    assert (out / "metrics.jsonl").read_text() == "precious\n"


def test_folder_with_other_files_may_be_used(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine\n")
    train_language_model(LanguageModelConfig(**tiny | {"steps": 1}))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine\n"


def test_a_workspace_reaches_the_loss_and_leaves_it_as_it_is(
    uninterrupted, tiny, tmp_path, monkeypatch
):
    heads, make = [], trainer.compiled_programs

    def spied(*args, head, **options):
        heads.append(head)
        return make(*args, head=head, **options)

    monkeypatch.setattr(trainer, "compiled_programs", spied)
    config = LanguageModelConfig(**tiny | {"learning_rate": 0.03, "workspace": "8KiB"})
    with pytest.raises(MemoryError):
        train_language_model(config, listener=DiesAfter(7))
    # A run may go on with another one.
    config = dataclasses.replace(config, workspace="1MiB")
    report = train_language_model(config, resume=True)
    assert [head.workspace_bytes for head in heads] == [2**13, 2**20]
    found, expected = (
        [line["loss"] for line in records(out) if line["event"] == "train"]
        for out in (config.out, uninterrupted[0].out)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert math.isclose(report.loss, uninterrupted[2].loss, rel_tol=1e-3)


def test_missing_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r'tokenizers, .*"jaxsoft\[train\]"'):
        train_language_model(LanguageModelConfig(**tiny))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "`steps` must be positive, got 0."),
        ("batch_size", -1, "`batch_size` must be positive, got -1."),
        ("sequence_length", 0, "`sequence_length` must be positive, got 0."),
        ("steps", 2**31, "`steps` must be at most 2,147,483,647, got"),
        ("layers", 10**6, "`layers` must be at most 1,000, got 1000000."),
        ("memory", "much", "`memory` must be a size such as 4G, got 'much'."),
        ("workspace", "4X", "`workspace` must be a size such as 4G, got '4X'."),
        ("vocab_size", 256, "`vocab_size` must be at least 257"),
        ("seed", -1, "`seed` must be in"),
        ("learning_rate", math.nan, "`learning_rate` must be positive, got nan."),
        ("features", 12, "`features` must be a multiple"),
        ("checkpoint_every", 0, "`checkpoint_every` must be positive, got 0."),
    ],
)
def test_configuration_is_checked(field, value, message):
    with pytest.raises(ValueError) as caught:
        LanguageModelConfig(**{field: value})
    assert message in str(caught.value)
