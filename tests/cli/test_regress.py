"""`jaxsoft regress` and `jaxsoft predict`, in this process; one run is killed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import dump_svmlight_file

from jaxsoft.cli import main as cli
from jaxsoft.training import SoftmaxRegression, TrainingInterrupted
from jaxsoft.training.errors import TableError
from jaxsoft.training.regression import job, prediction
from jaxsoft.training.regression.column_roles import ColumnNames
from jaxsoft.training.regression.prediction import predict_table
from jaxsoft.training.regression.saving import save_model
from jaxsoft.training.regression.table_form import TableForm

REPOSITORY = Path(__file__).parents[2]
LABELS = np.arange(60) % 3
FEATURES = np.random.default_rng(0).normal(size=(60, 4)) + 2 * np.eye(3, 4)[LABELS]
KINDS = np.array(["ant", "bee", "cat"])[LABELS]
HEADER = ["a", "b", "c", "d"]
REGRESS = "regress data.csv --label kind --out run --max-iter 30".split()


def write_csv(path, features, labels=None, header=HEADER):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [] if header is None else [header]
        if labels is None:
            writer.writerows([*names, *features.tolist()])
        else:
            named = [["kind", *name] for name in names]
            rows = zip(labels.tolist(), features.tolist(), strict=True)
            writer.writerows([*named, *([label, *row] for label, row in rows)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a table and a finished run, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_csv(folder / "data.csv", FEATURES, KINDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(REGRESS) == 0
    return folder


@pytest.fixture
def place(finished, monkeypatch):
    monkeypatch.chdir(finished)
    return finished


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv("data.csv", FEATURES, KINDS)
    return tmp_path


def fails(capsys, arguments, code=2):
    """Runs the command; returns the one line that it says on stderr."""
    try:
        assert cli.main(arguments) == code
    except SystemExit as stop:
        assert stop.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_regress_prints_its_measurements_and_files(place, capsys):
    """Of a finished run they are printed again."""
    assert cli.main(["regress", "--out", "run", "--resume"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for pattern in (
        r"the run in run finished at iteration \d+",
        r"\| true \\ predicted +\| ant +\| bee +\| cat +\| recall \|",
        r"\| train +\| +45 \| +[01]\.\d{4} \| +\d\.\d{4} \| 0\.\d{4} \|",
        r"\| test +\| +15 \| +[01]\.\d{4} \| +\d\.\d{4} \| 0\.\d{4} \|",
        r"solver: \w+, \d+ iterations in 0:\d\d, (not )?converged \(\w+\)",
        r"objective: 0\.\d+ nats a row",
        r"files: run/config.json, run/metrics.jsonl, run/checkpoints, run/model.safe",
    ):
        assert re.search(pattern, captured.out), pattern
    said = fails(capsys, REGRESS)
    assert "already holds a run (config.json)" in said and "--resume" in said


def test_regress_shows_progress(fresh, capsys):
    assert cli.main([*REGRESS, "--checkpoint-every", "0"]) == 0
    said = capsys.readouterr().out
    assert (
        "data: data.csv, 45 rows to train on and 15 to test on, 4 features, 3" in said
    )
    assert re.search(r"iteration \d+/30  objective \d\.\d{6}  [\d,]+ rows/s\n", said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["nowhere.csv"], "the table nowhere.csv does not exist."),
        (["keys.npz"], "keys.npz has no array `X`, `x` or `data`; it has 'y'."),
        (["words.csv"], "column 'c' has numbers, but line 3 has 'red'; mend it, or"),
        (
            ["inf.csv"],
            "inf.csv: line 2, column 'd' is inf; give a finite number, or leave",
        ),
        (["one.csv"], "one.csv has one class only, 'ant'; training needs two or more."),
        (["--label", "sort"], "no column 'sort'; it has 'kind', 'a', 'b', 'c', 'd'."),
        (["--test-fraction", "0.01"], "--test-fraction 0.01 of the 60 rows"),
        (["--C", "-1"], "--C must be positive, got -1.0."),
        (["--C", "much"], "argument --C: invalid float value: 'much'"),
        (["--solver", "sgd"], "--solver must be one of 'auto', 'lbfgs'"),
        (
            ["--head", "adaptive", "--standardize"],
            "--standardize must be left out with",
        ),
        (["--out", "data.csv"], "--out data.csv is a file, not a folder."),
        (["--resume"], "--out run holds no run to resume (no config.json)."),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(fresh, capsys, changes, message):
    write_csv("one.csv", FEATURES, np.full(60, "ant"))
    np.savez("keys.npz", y=LABELS)
    text = (fresh / "data.csv").read_text().splitlines()
    broken = text[1].rpartition(",")[0] + ",inf"
    (fresh / "inf.csv").write_text("\n".join([text[0], broken, *text[2:]]))
    cells = text[2].split(",")
    words = ",".join([*cells[:3], "red", *cells[4:]])
    (fresh / "words.csv").write_text("\n".join([*text[:2], words, *text[3:]]))
    before = sorted(fresh.iterdir())
    arguments = [*REGRESS, *changes]
    if changes[0].endswith((".csv", ".npz")):
        arguments[1] = arguments.pop()
    said = fails(capsys, arguments)
    assert message in said and said.startswith("jaxsoft")
    assert sorted(fresh.iterdir()) == before


def test_resume_with_other_options(place, capsys):
    said = fails(capsys, ["regress", "--out", "run", "--resume", "--C", "2"])
    assert "the run in run has --C 1.0, not 2.0; resume it with the same" in said


@pytest.mark.parametrize("step", [20, None])
def test_farewell_of_an_interrupted_run(place, capsys, monkeypatch, step):
    def stopped(config, **rest):
        raise TrainingInterrupted(signal.SIGTERM, step)

    monkeypatch.setattr(job, "train_regression", stopped)
    said = fails(capsys, ["regress", "--out", "run", "--resume"], code=143)
    assert said.endswith("jaxsoft regress --out run --resume")
    assert said.startswith("stopped by SIGTERM")
    assert ("saved iteration 20" in said) == (step == 20)
    said = fails(capsys, ["regress", "--out", "new"], code=143)
    if step is None:
        assert said.endswith("before the first iteration; nothing was written to new")


def test_missing_extra_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for arguments in (["regress"], ["predict", "run", "data.csv"]):
        said = fails(capsys, arguments)
        assert said.endswith('pip install "jaxsoft[train]"') and "safetensors" in said


def test_predict_measures_where_labels_are_known(place, capsys):
    assert cli.main(["predict", "run/model.safetensors", "data.csv"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    metrics = json.loads(Path("run/metrics.json").read_text())
    right = sum(
        metrics[part]["accuracy"] * metrics[part]["rows"] for part in ("train", "test")
    )
    assert f"| rows |   60 |   {right / 60:.4f} |" in captured.out
    assert "nothing was written; --out FILE writes" in captured.out


def test_predict_writes_classes_and_probabilities(place, capsys, tmp_path):
    write_csv(tmp_path / "new.csv", FEATURES[:, ::-1], header=HEADER[::-1])
    (tmp_path / ".b.csv").write_text("mine")
    arguments = ["predict", "run", str(tmp_path / "new.csv"), "--out"]
    assert cli.main([*arguments, str(tmp_path / "a.csv"), "--probabilities"]) == 0
    assert cli.main([*arguments, str(tmp_path / "b.csv")]) == 0
    said = capsys.readouterr().out
    assert "60 rows, without labels" in said and f"files: {tmp_path / 'a.csv'}" in said
    with open(tmp_path / "a.csv") as file:
        header, *rows = csv.reader(file)
    assert header == [
        "prediction",
        *(f"probability_{k}" for k in ("ant", "bee", "cat")),
    ]
    model = load_file("run/model.safetensors")
    logits = FEATURES @ model["coef_"].T + model["intercept_"]
    truth = np.exp(logits - logits.max(axis=1, keepdims=True))
    truth /= truth.sum(axis=1, keepdims=True)
    written = np.array([row[1:] for row in rows], np.float64)
    np.testing.assert_allclose(written, truth, rtol=1e-5)
    names = np.array(["ant", "bee", "cat"])
    assert [row[0] for row in rows] == names[truth.argmax(axis=1)].tolist()
    text = (tmp_path / "b.csv").read_text()
    assert text.splitlines() == ["prediction", *(row[0] for row in rows)]
    said = fails(capsys, [*arguments, str(tmp_path / "b.csv")])
    assert (
        said == f"jaxsoft predict: --out {tmp_path / 'b.csv'} exists already; name "
        "another file."
    )
    assert (tmp_path / "b.csv").read_text() == text
    assert list(tmp_path.glob(".*")) == [tmp_path / ".b.csv"]
    assert (tmp_path / ".b.csv").read_text() == "mine"


def test_predict_reads_other_formats(place, capsys, tmp_path):
    np.savez(tmp_path / "a.npz", X=FEATURES.astype(np.float32))
    dump_svmlight_file(FEATURES[:, :3], LABELS, str(tmp_path / "a.svm"))
    assert cli.main(["predict", "run", str(tmp_path / "a.npz")]) == 0
    assert "60 rows, without labels" in capsys.readouterr().out
    said = fails(capsys, ["predict", "run", str(tmp_path / "a.svm")])
    assert "a.svm: the label '0' of row 0 is none of the model's 3 classes." in said


def test_predict_of_bad_input(place, capsys, tmp_path):
    write_csv(tmp_path / "few.csv", FEATURES[:, :2], header=None)
    write_csv(tmp_path / "odd.csv", FEATURES, np.full(60, "dog"))
    write_csv(tmp_path / "nameless.csv", FEATURES, KINDS, header=None)
    np.savez(tmp_path / "keys.npz", y=LABELS)
    write_csv(tmp_path / "named.csv", FEATURES, header=["a", "b", "c", "e"])
    for model, data, more, message in (
        ("nowhere", "data.csv", [], "the model nowhere does not exist."),
        ("data.csv", "data.csv", [], "data.csv is not a model of jaxsoft ("),
        ("run", "nowhere.csv", [], "the table nowhere.csv does not exist."),
        ("run", "few.csv", [], "few.csv has 2 columns, the model has 4 features; give"),
        ("run", "nameless.csv", [], "which one has the labels; name it by --label."),
        ("run", "keys.npz", [], "keys.npz has no array `X`, `x` or `data`; it has"),
        (
            "run",
            "odd.csv",
            [],
            "odd.csv: the label 'dog' of line 2 is none of the model",
        ),
        ("run", "named.csv", [], "named.csv has no column 'd', which the model needs;"),
        (
            "run",
            "data.csv",
            ["--out", "no/p.csv"],
            "--out no/p.csv cannot be written (no such",
        ),
    ):
        table = tmp_path / data if (tmp_path / data).exists() else data
        said = fails(capsys, ["predict", model, str(table), *more])
        assert message in said, said
    before = sorted(tmp_path.iterdir())
    arguments = ["predict", "run", str(tmp_path / "odd.csv"), "--out"]
    fails(capsys, [*arguments, str(tmp_path / "p.csv")])
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def simple(tmp_path):
    """A model of two features, whose class is the larger of them."""
    model: Any = SoftmaxRegression(dtype="float32")
    model.coef_, model.intercept_ = np.eye(2, dtype=np.float32), np.zeros(2, "f4")
    model.classes_, model.n_features_in_ = np.arange(2), 2
    model.temperature_ = 1.0
    form = TableForm(ColumnNames(label="0"))
    return save_model(model, tmp_path / "model", form)


def test_predict_finds_the_labels_where_they_were(simple, tmp_path):
    (tmp_path / "a.csv").write_text("0,5,0\n1,0,5\n1,2,3\n")
    report = predict_table(simple, tmp_path / "a.csv")
    assert report.measures is not None and report.measures.accuracy == 1
    assert report.counts == (1, 2)


def test_predict_refuses_what_its_model_cannot_hold(simple, tmp_path):
    (tmp_path / "a.csv").write_text("5,0\n0,1e39\n")
    with pytest.raises(TableError, match=r"row 1, column 1 is 1e\+39, too large for"):
        predict_table(simple, tmp_path / "a.csv")


def test_predict_stopped(place, capsys, monkeypatch):
    def stopped(*args, **rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction, "predict_table", stopped)
    said = fails(capsys, ["predict", "run", "data.csv"], code=130)
    assert said == "stopped by SIGINT; nothing was written"


def test_help_tells_the_options(capsys):
    for command in ("regress", "predict"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    said = capsys.readouterr().out
    for part in ("--no-standardize", "--max-iter ITER", "(default: 0)", "MODEL"):
        assert part in said


# Computes as the tests' own process does, so that results are comparable bit for bit.
KILLED = """if True:
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from jaxsoft.cli.main import main
    main(sys.argv[1:])
"""


# Programs of another process have these bits only if they are compiled alike.
@pytest.mark.usefixtures("optimized")
@pytest.mark.process
def test_after_kill_the_result_is_the_same_bit_for_bit(fresh, capsys):
    features = np.random.default_rng(1).normal(size=(900, 30))
    noise = np.random.default_rng(2).gumbel(size=(900, 10))
    scores = features @ np.random.default_rng(3).normal(size=(30, 10))
    labels = (scores + noise).argmax(axis=1)
    write_csv("data.csv", features, labels, [f"x{index}" for index in range(30)])
    options = "--label kind --dtype float64 --tol 1e-12 --max-iter 400 --solver lbfgs"
    arguments = ["regress", "data.csv", *options.split()]
    command = [*arguments, "--out", "killed", "--checkpoint-every", "0"]
    path = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *command],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    ) as process:
        metrics, deadline = Path("killed/metrics.jsonl"), time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not Path("killed/metrics.json").exists()
    assert cli.main(["regress", "--out", "killed", "--resume"]) == 0
    assert re.search(r"resumed after iteration \d+", capsys.readouterr().out)
    assert cli.main([*arguments, "--out", "whole"]) == 0
    first, second = (
        json.loads(Path(out, "metrics.json").read_text()) for out in ("whole", "killed")
    )
    for name in ("objective", "iterations", "test"):
        assert first[name] == second[name]
    killed = load_file("killed/model.safetensors")
    for name, value in load_file("whole/model.safetensors").items():
        np.testing.assert_array_equal(killed[name], value)
