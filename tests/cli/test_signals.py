"""Real processes, stopped at many moments: one line, soon, and what can be resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
# Seconds after a process heeds signals; the last ones are after the imports.
MOMENTS = (0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5, 7.0)
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

pytestmark = pytest.mark.process


def start(folder, words):
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxsoft", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)},
    )
    # Before its first lines a process heeds nothing but Ctrl-C, as Python does.
    while process.poll() is None and not heeds(process.pid, signal.SIGTERM):
        time.sleep(0.01)
    return process


def heeds(pid, number):
    """Whether a process handles a signal; true where nobody tells."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return True
    caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.M)
    return caught is None or bool(int(caught[1], 16) >> (number - 1) & 1)


def stop(process, number):
    """Sends a signal; returns the exit code and the one line."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert errors.count("\n") == (process.returncode > 0), errors
    return process.returncode, errors


def hidden(folder):
    """Files that nobody finished."""
    return list(folder.rglob(".*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus that takes seconds to tokenise, a table that takes some to fit."""
    root = tmp_path_factory.mktemp("work")
    (root / "text.txt").write_text("".join(f"word{i} " for i in range(500_000)))
    source = np.random.default_rng(0)
    labels = source.integers(0, 5, 20_000)
    features = source.normal(size=(20_000, 60)) + 0.1 * labels[:, None]
    np.savez(root / "table.npz", X=features.astype("f4"), y=labels)
    # The fit of this one takes a minute.
    labels = source.integers(0, 100, 60_000)
    features = source.normal(size=(60_000, 100)) + 0.01 * labels[:, None]
    np.savez(root / "long.npz", X=features.astype("f4"), y=labels)
    done = start(root, ["regress", "table.npz", "--out", "model"])
    assert done.communicate()[1] == "" and done.returncode == 0
    return root


TRAIN = """train --corpus text.txt --vocab-size 2000 --steps 100000 --batch-size 8
    --sequence-length 32 --features 32 --layers 1 --heads 2""".split()
REGRESS = "regress long.npz --solver minibatch --max-iter 100000 --tol 1e-30".split()
PREDICT = "predict model table.npz".split()


@pytest.mark.parametrize("words", [TRAIN, REGRESS, PREDICT], ids=lambda w: w[0])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_a_moment(folder, tmp_path, words, moment):
    out = tmp_path / ("p.csv" if words is PREDICT else "run")
    words = [*words, "--out", out]
    if words[0] == "train":
        words += ["--cache-dir", tmp_path / "cache"]
    number = NUMBERS[MOMENTS.index(moment) % 3]
    process = start(folder, words)
    time.sleep(moment)
    code, said = stop(process, number)
    if words[0] == "predict" and code == 0:
        return  # It has predicted.
    assert code == 128 + number
    assert said.startswith(f"stopped by {number.name}")
    assert hidden(tmp_path) == []
    if words[0] == "predict":
        assert "nothing was written" not in said or not out.exists()
        return
    assert ("--resume" in said) == (out / "config.json").exists()
    saved = re.search(r"saved (step|iteration) (\d+)", said)
    if saved:
        assert (out / "checkpoints" / saved[2]).is_dir()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == int(saved[2])


def test_what_was_saved_is_resumed(folder, tmp_path):
    """Also after the second signal, which does not wait for the step in hand."""
    words = [*TRAIN, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    for again in (False, True):
        process = start(folder, [*words, "--resume"] if again else words)
        assert process.stdout is not None
        for said in process.stdout:
            if said.startswith("step "):
                break
        if again:
            process.send_signal(signal.SIGTERM)
        code, said = stop(process, signal.SIGTERM)
        assert code == 143 and "--resume" in said
    process = start(folder, [*words, "--resume"])
    assert process.stdout is not None
    for said in process.stdout:
        if said.startswith("resumed after step"):
            break
    assert stop(process, signal.SIGINT)[0] == 130


def test_nohup_outlives_its_terminal(folder, tmp_path):
    words = [*REGRESS, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        # What nohup does, without a fork of the process of these tests.
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-m", "jaxsoft"]
        + [os.fspath(word) for word in words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)},
    )
    for _ in range(4):
        time.sleep(1)
        process.send_signal(signal.SIGHUP)
    assert process.poll() is None
    assert stop(process, signal.SIGINT)[0] == 130


def test_a_killed_run_leaves_nothing_for_long(folder, tmp_path):
    """Whatever it was writing, the next one clears away."""
    words = [*TRAIN, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    process = start(folder, words)
    assert process.stdout is not None
    for said in process.stdout:
        if said.startswith("training a byte-level"):
            break
    deadline = time.monotonic() + 60
    while not hidden(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert hidden(tmp_path)
    process = start(folder, words)
    assert process.stdout is not None
    for said in process.stdout:
        if said.startswith("tokens:"):
            break
    assert stop(process, signal.SIGINT)[0] == 130
    assert hidden(tmp_path) == []
