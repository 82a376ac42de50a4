import math

import numpy as np
import pytest

import jaxsoft
from jaxsoft.training import (
    CorpusError,
    LanguageModelConfig,
    Listener,
    RunDirectoryError,
    evaluate_language_model,
    load_language_model,
    train_language_model,
)
from jaxsoft.training.heads import HEADS
from jaxsoft.training.run_directory import RunDirectory

TEXTS = {"a.txt": "alpha beta gamma é.\n" * 9, "b.txt": "delta epsilon zeta\n" * 4}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


class Steps(Listener):
    def __init__(self):
        self.steps, self.stopped = [], 0

    def start(self, step, steps):
        self.count = steps

    def step(self, record):
        self.steps.append(record["step"])

    def stop(self):
        self.stopped += 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.many_cases
def test_measurements_are_those_of_the_probabilities(tiny, texts, head):
    """Window by window, from the head's logits."""
    tiny |= {"head": head, "steps": 4, "num_samples": 16}
    train_language_model(LanguageModelConfig(**tiny))
    steps = Steps()
    report = evaluate_language_model(tiny["out"], texts, listener=steps)
    trained = load_language_model(tiny["out"])
    found = []
    for text in TEXTS.values():
        found.append([0, *trained.tokenizer.encode(text).ids])
    # The order is that of the contents' hashes.
    orders = [sum(found, []), sum(found[::-1], [])]
    losses = []
    for tokens in orders:
        count = len(tokens) - 1
        padded = np.pad(np.array(tokens), (0, -count % 16), mode="edge")
        places = np.arange(0, count, 16)[:, None] + np.arange(17)
        windows = padded[places].astype(np.int32)
        logits = trained.model.head(trained.model.trunk(windows[:, :-1]))
        probabilities = np.asarray(jaxsoft.softmax(logits)).reshape(-1, 270)[:count]
        labels = windows[:, 1:].reshape(-1)[:count]
        losses.append(-np.log(probabilities[np.arange(count), labels]).mean())
        if math.isclose(losses[-1], report.loss, rel_tol=1e-5):
            break
    np.testing.assert_allclose(report.loss, losses[-1], rtol=1e-5)
    assert (report.texts, report.tokens, report.step) == (2, count, 4)
    assert report.bytes == sum(len(text.encode()) for text in TEXTS.values())
    bits = report.loss * count / math.log(2) / report.bytes
    np.testing.assert_allclose(report.bits_per_byte, bits)
    np.testing.assert_allclose(report.perplexity, math.exp(report.loss))
    accuracy = (probabilities.argmax(1) == labels).mean()
    np.testing.assert_allclose(report.accuracy, accuracy)
    error = jaxsoft.expected_calibration_error(probabilities, labels)
    np.testing.assert_allclose(
        report.expected_calibration_error, error, rtol=1e-4, atol=1e-6
    )
    assert steps.steps == [*range(1, steps.count + 1)] and steps.stopped == 1
    png = RunDirectory(tiny["out"]).reliability.read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5_000


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run"):
        evaluate_language_model(tmp_path, tmp_path)


def test_a_corpus_without_text(tiny, tmp_path):
    train_language_model(LanguageModelConfig(**tiny | {"steps": 1}))
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        evaluate_language_model(tiny["out"], tmp_path / "nowhere")
    # A picture's title is no mathematics of TeX.
    (tmp_path / "$a_{$.txt").write_text("a")
    assert evaluate_language_model(tiny["out"], tmp_path / "$a_{$.txt").tokens == 1
