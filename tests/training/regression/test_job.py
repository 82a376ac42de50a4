import csv
import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics
from sklearn.model_selection import train_test_split

from jaxsoft.training import (
    Listener,
    RunDirectoryError,
    StopRequest,
    TrainingInterrupted,
    run_directory,
)
from jaxsoft.training.errors import CheckpointError, TableError
from jaxsoft.training.regression.columns import Column
from jaxsoft.training.regression.estimator import SoftmaxRegression
from jaxsoft.training.regression.job import train_regression
from jaxsoft.training.regression.run_files import RegressionDirectory
from jaxsoft.training.regression.saving import load_model, load_table_model
from jaxsoft.training.regression.settings import RegressConfig
from jaxsoft.training.running import read_config

ROWS = 90
NAMES = np.array(["ant", "bee", "cat"])


def make_data():
    """Three classes that overlap, in columns of different scales and offsets."""
    random = np.random.default_rng(0)
    labels = np.arange(ROWS) % 3
    features = random.normal(size=(ROWS, 3)) + np.eye(3)[labels]
    return features * (1, 100, 0.01) + (0, 1e4, 5), NAMES[labels]


def write(path, features, labels):
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", "kind"])
        for row, label in zip(features.tolist(), labels, strict=True):
            writer.writerow([*row, label])
    return str(path)


def split(labels):
    """Returns the rows that the runs below train on, and those that they test on."""
    rows = np.arange(ROWS)
    return train_test_split(rows, test_size=23, stratify=labels, random_state=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.csv", *make_data())


def config_of(data, out, **changes):
    fields = {"dtype": "float64", "tol": 1e-10, "max_iter": 60, "solver": "lbfgs"}
    fields |= {"checkpoint_every": 0.0, "data": data, "out": str(out), "seed": 5}
    return RegressConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that was not stopped: its folder and its report."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train_regression(config_of(data, out))


def test_report_is_that_of_the_saved_model(finished):
    out, report = finished
    features, labels = make_data()
    train, test = split(labels)
    path = out / "model.safetensors"
    model: Any
    model, form = load_table_model(path, SoftmaxRegression)
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert form.names.label == "kind"
    assert form.columns == tuple(map(Column, ("a", "b", "c")))
    del model.feature_names_in_
    assert model.checkpoint_dir is None and model.random_state == 5
    for rows, measured in ((train, report.train), (test, report.test)):
        probabilities = model.predict_proba(features[rows])
        predicted = NAMES[probabilities.argmax(axis=1)]
        assert measured.rows == len(rows)
        assert measured.accuracy == metrics.accuracy_score(labels[rows], predicted)
        np.testing.assert_allclose(
            measured.log_loss,
            metrics.log_loss(labels[rows], probabilities),
            rtol=1e-6,
        )
    matrix = metrics.confusion_matrix(labels[test], predicted)
    np.testing.assert_array_equal(report.confusion, matrix)
    np.testing.assert_allclose(report.recall, matrix.diagonal() / matrix.sum(axis=1))
    assert report.classes == ("ant", "bee", "cat") and report.features == 3
    assert report.test.accuracy > 0.5 and report.scaling == "columns"


def test_the_model_depends_on_no_row_to_test_on(finished, tmp_path):
    """Nor does the scale of its features."""
    features, labels = make_data()
    features[split(labels)[1]] *= 3
    path, out = write(tmp_path / "a.csv", features, labels), tmp_path / "run"
    report = train_regression(config_of(path, out))
    assert report.train == finished[1].train and report.test != finished[1].test
    model, other = (
        load_model(each / "model.safetensors", SoftmaxRegression)
        for each in (out, finished[0])
    )
    np.testing.assert_array_equal(model.coef_, other.coef_)


def test_run_writes_its_files_and_no_others(finished):
    out, report = finished
    files = {file.name: file for file in out.iterdir()}
    pictures = {name for name in files if name.endswith(".png")}
    assert pictures == {
        f"{name}.png" for name in ("confusion", "reliability", "weights", "convergence")
    }
    assert all(files[name].read_bytes()[1:4] == b"PNG" for name in pictures)
    assert set(files) - pictures == {
        "config.json",
        "metrics.jsonl",
        "metrics.json",
        "model.safetensors",
        "checkpoints",
    }
    assert RegressionDirectory(out).read_report() == report


def test_resuming_a_finished_run_gives_its_report(finished, data):
    out, report = finished
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert train_regression(config_of(data, out), resume=True) == report
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


class StopAfter(Listener):
    """Asks to stop after some segments, or fails as a killed process would."""

    def __init__(self, segments, stop=None):
        self.left, self.request = segments, stop

    def step(self, record):
        self.left -= 1
        if self.left == 0 and self.request is not None:
            self.request.received = signal.SIGTERM
        elif self.left == 0:
            raise RuntimeError("killed")


def same_run(out, other):
    first, second = (
        load_model(each / "model.safetensors", SoftmaxRegression)
        for each in (out, other)
    )
    np.testing.assert_array_equal(first.coef_, second.coef_)
    np.testing.assert_array_equal(first.intercept_, second.intercept_)
    assert first.objective_ == second.objective_ and first.n_iter_ == second.n_iter_
    for each in (out, other):
        text = (each / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)) and len(steps) > 1
        assert steps[-1] == first.n_iter_ and lines[-1]["loss"] == first.objective_


def test_a_stopped_run_goes_on_bit_for_bit(finished, data, tmp_path):
    out, stop = tmp_path / "run", StopRequest()
    with pytest.raises(TrainingInterrupted) as interruption:
        train_regression(config_of(data, out), listener=StopAfter(1, stop), stop=stop)
    assert interruption.value.step is not None
    assert not (out / "metrics.json").exists()
    train_regression(config_of(data, out, checkpoint_every=9.0), resume=True)
    same_run(out, finished[0])


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished, data, tmp_path
):
    out, notes = tmp_path / "run", Notes()
    with pytest.raises(RuntimeError, match="killed"):
        train_regression(config_of(data, out), listener=StopAfter(3))
    steps = sorted(int(file.name) for file in (out / "checkpoints").glob("[0-9]*"))
    assert len(steps) > 1
    for file in (out / "checkpoints" / str(steps[-1])).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    train_regression(config_of(data, out), resume=True, listener=notes)
    assert f"going on from {steps[-2]}" in "".join(notes.texts)
    same_run(out, finished[0])
    (out / "checkpoints" / "fit.txt").write_bytes(b"\xff")
    (out / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match="are of a fit with other rows"):
        train_regression(config_of(data, out), resume=True)


class Notes(Listener):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def no_picture(*args):
    raise ValueError("no picture")


def test_a_failed_run_goes_on_bit_for_bit(finished, data, tmp_path, monkeypatch):
    """Its metrics are ahead of its checkpoint; later, a picture fails."""
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        train_regression(config_of(data, out), listener=StopAfter(2))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no picture"):
        patch.setattr(RegressionDirectory, "plot_confusion", no_picture)
        train_regression(config_of(data, out), resume=True)
    assert (out / "metrics.json").exists()
    report = train_regression(config_of(data, out), resume=True)
    assert report.test == finished[1].test
    same_run(out, finished[0])


def test_what_is_there_is_not_overwritten(finished, data, tmp_path):
    out, _ = finished
    with pytest.raises(RunDirectoryError, match=r"already holds a run \(config.json\)"):
        train_regression(config_of(data, out))
    with pytest.raises(RunDirectoryError, match="holds no run to resume"):
        train_regression(config_of(data, tmp_path), resume=True)
    with pytest.raises(RunDirectoryError, match="has `C` 1.0, not 2.0; resume it with"):
        train_regression(config_of(data, out, C=2.0), resume=True)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(
        RunDirectoryError, match=r"already holds a run \(metrics.json\)"
    ):
        train_regression(config_of(data, tmp_path))


def test_too_few_rows_to_calibrate(data, tmp_path):
    with pytest.raises(TableError, match="`calibrate` needs more than the 22 rows of"):
        config = config_of(data, tmp_path / "run", calibrate=True, test_fraction=0.75)
        train_regression(config)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_table_is_not_resumed(data, tmp_path):
    out, other = tmp_path / "run", tmp_path / "b.csv"
    with pytest.raises(RuntimeError):
        train_regression(config_of(data, out), listener=StopAfter(1))
    text = Path(data).read_text()
    for old, new in (("ant", "bee"), ("a,b,c", "a,b,d")):
        other.write_text(text.replace(old, new, 1))
        with pytest.raises(RunDirectoryError, match="data of the run in .* changed"):
            train_regression(config_of(str(other), out), resume=True)


@pytest.mark.parametrize(
    ("text", "fraction", "message"),
    [
        ("1,a\n2,a\n3,b\n", 0.5, "has one row only of the class 'b'; training and"),
        (
            "1,a\n2,a\n3,b\n4,b\n",
            0.2,
            "`test_fraction` 0.2 of the 4 rows of .* 2 classes",
        ),
        ("1,a\n2,a\n3,b\n4,b\n", 0.9, "`test_fraction` 0.9 of the 4 rows of .* give"),
    ],
)
def test_tables_that_cannot_be_split(tmp_path, text, fraction, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(TableError, match=message):
        train_regression(
            RegressConfig(
                data=str(tmp_path / "a.csv"),
                out=str(tmp_path / "run"),
                test_fraction=fraction,
            )
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "sgd"}, "`solver` must be one of 'auto', 'lbfgs', 'newton', "),
        (
            {"head": "sampled"},
            "`head` must be one of 'full', 'hierarchical', 'adaptive'",
        ),
        ({"dtype": "bfloat16"}, "`dtype` must be one of 'float32', 'float64'"),
        ({"test_fraction": 1.0}, "`test_fraction` must be between 0 and 1, got 1.0."),
        ({"C": 0.0}, "`C` must be positive, got 0.0."),
        ({"tol": float("nan")}, "`tol` must be positive, got nan."),
        ({"max_iter": -1}, "`max_iter` must be positive, got -1."),
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\), got 1.0."),
        ({"checkpoint_every": -1.0}, "`checkpoint_every` must not be negative, got -1"),
        ({"seed": -1}, r"`seed` must be in \[0, 2\*\*31\), got -1."),
        (
            {"head": "adaptive", "standardize": True},
            "`standardize` must be left out with `head` 'adaptive', got True.",
        ),
        (
            {"head": "hierarchical", "solver": "newton"},
            "`solver` must be left out with `head` 'hierarchical', got 'newton'.",
        ),
        (
            {"head": "adaptive", "calibrate": True},
            "`calibrate` must be left out with `head` 'adaptive', got True.",
        ),
        (
            {"head": "adaptive", "label_smoothing": 0.1},
            "`label_smoothing` must be left out with `head` 'adaptive', got 0.1.",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        RegressConfig(**changes)


def test_configuration_comes_back(finished, data):
    stored = json.loads((finished[0] / "config.json").read_text())
    assert read_config(finished[0], RegressConfig) == config_of(data, finished[0])
    fields = json.loads(json.dumps(dataclasses.asdict(config_of(data, finished[0]))))
    assert fields == stored["config"]


@pytest.mark.parametrize("content", ["{}", "[1]", '{"train": {}, "test": 1}'])
def test_a_damaged_report_is_one_line(finished, data, tmp_path, content):
    shutil.copy(finished[0] / "config.json", tmp_path)
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"metrics.json cannot be read \("):
        train_regression(config_of(data, tmp_path), resume=True)


def killed(*args):
    raise KeyboardInterrupt


def test_a_run_killed_as_it_starts_can_be_started_or_resumed(tmp_path, monkeypatch):
    directory = RegressionDirectory(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_directory, "write_atomically", killed)
        directory.start({})
    directory.check_vacant()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "touch", killed)
        directory.start({})
    directory.check_resumable()
    directory.truncate_metrics(0)
    assert list(directory.records()) == []


@pytest.mark.parametrize("row", range(8))
def test_values_that_the_dtype_cannot_hold(tmp_path, row):
    """Among the rows to train on, and among those to test on."""
    lines = [f"{index},{index % 2}\n" for index in range(8)]
    lines[row] = f"1e39,{row % 2}\n"
    (tmp_path / "a.csv").write_text("x,kind\n" + "".join(lines))
    config = RegressConfig(
        data=str(tmp_path / "a.csv"), out=str(tmp_path / "run"), standardize=False
    )
    with pytest.raises(TableError, match=rf"row {row}, column 'x' is 1e\+39, too larg"):
        train_regression(config)
    assert not (tmp_path / "run").exists()
