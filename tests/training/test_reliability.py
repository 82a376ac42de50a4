"""The reliability diagram: what is drawn, and what is written."""

import doctest
import importlib.util

import numpy as np
import pytest

import jaxsoft
from jaxsoft.training import MissingExtraError, reliability, reliability_diagram
from tests import truth

RNG = np.random.default_rng(0)
PROBABILITIES = truth.softmax(3 * RNG.standard_normal((200, 5))).astype("float32")
LABELS = RNG.integers(0, 5, 200)


def test_writes_a_png_of_the_bins(tmp_path, monkeypatch):
    figures = []
    draw = reliability._figure
    monkeypatch.setattr(
        reliability, "_figure", lambda *args: figures.append(draw(*args)) or figures[0]
    )
    path = tmp_path / "before.png"
    path.write_text("old")
    written = reliability_diagram(PROBABILITIES, LABELS, str(path), 10, title="Before")
    assert written == path and path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["before.png"]
    top, bottom = figures[0].axes
    confidence, best = PROBABILITIES.max(1), PROBABILITIES.argmax(1)
    inside = (confidence > np.float32(0.9)) & (confidence <= 1)
    bars = top.containers[0].patches
    accuracy = (best == LABELS)[inside].mean()
    np.testing.assert_allclose(bars[-1].get_height(), accuracy, rtol=1e-6)
    gaps = top.containers[1].patches
    gap = confidence[inside].mean() - accuracy
    np.testing.assert_allclose(gaps[-1].get_height(), gap, rtol=1e-4)
    shares = [bar.get_height() for bar in bottom.containers[0].patches]
    np.testing.assert_allclose(shares[-1], inside.mean(), rtol=1e-6)
    error = jaxsoft.expected_calibration_error(PROBABILITIES, LABELS, 10)
    legend = [text.get_text() for text in top.get_legend().get_texts()]
    assert f"gap (ECE {error:.4f})" in legend
    assert figures[0].get_suptitle() == "Before"


def test_messages(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="must be finite, within"):
        reliability_diagram(PROBABILITIES, LABELS + 1, path)
    with pytest.raises(ValueError, match="`num_bins` must be at least 1"):
        reliability_diagram(PROBABILITIES, LABELS, path, 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "mat" in name else find(name)
    )
    with pytest.raises(MissingExtraError, match=r'matplotlib.*"jaxsoft\[train\]"'):
        reliability_diagram(PROBABILITIES, LABELS, path)
    assert not path.exists()


def test_its_docstring_runs():
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(reliability_diagram):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0
