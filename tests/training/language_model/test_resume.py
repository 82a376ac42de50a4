"""Real processes, really killed: a resumed run equals the uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxsoft.training.run_directory import WALL_CLOCK_FIELDS, RunDirectory

# One worker: its runs serve many tests.
STEPS = 500
REPOSITORY = Path(__file__).parents[3]


def start(corpus_dir, cache_dir, out, *more):
    command = [sys.executable, "-m", "jaxsoft", "train", "--out", str(out), *more]
    if "--resume" not in more:
        command += ["--corpus", str(corpus_dir), "--cache-dir", str(cache_dir)]
        command += f"""--vocab-size 300 --steps {STEPS} --batch-size 8
            --sequence-length 16 --features 32 --layers 1 --heads 2
            --evaluate-every 75 --evaluation-tokens 128 --checkpoint-every 60
            --sample-tokens 8""".split()
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": _python_path()},
    )


def _python_path():
    return os.pathsep.join(
        filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def records(out):
    return [
        {key: value for key, value in line.items() if key not in WALL_CLOCK_FIELDS}
        for line in RunDirectory(out).records()
    ]


def signal_after(process, out, step, number):
    """Sends a signal once the metrics show that a step was made."""
    metrics = RunDirectory(out).metrics
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b'"train"') >= step:
            process.send_signal(number)
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError("the run did not get to its steps")


@pytest.fixture(scope="module")
def uninterrupted(corpus_dir, cache_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output, errors = finish(start(corpus_dir, cache_dir, out))
    assert code == 0, errors
    return records(out)


def test_after_kill(uninterrupted, corpus_dir, cache_dir, tmp_path):
    out = tmp_path / "run"
    process = start(corpus_dir, cache_dir, out)
    signal_after(process, out, 150, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    killed = records(out)
    assert 150 <= killed[-1]["step"] < STEPS
    code, output, errors = finish(start(corpus_dir, cache_dir, out, "--resume"))
    assert code == 0, errors
    assert "resumed after step" in output
    assert records(out) == uninterrupted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_after_signal(uninterrupted, corpus_dir, cache_dir, tmp_path, number, code):
    out = tmp_path / "run"
    process = start(corpus_dir, cache_dir, out)
    signal_after(process, out, 100, number)
    stopped_with, _, errors = finish(process)
    assert stopped_with == code
    stopped = records(out)[-1]["step"]
    assert 100 <= stopped < STEPS
    assert errors.splitlines() == [
        f"stopped by {number.name}, saved step {stopped}; resume with: "
        f"jaxsoft train --out {out} --resume"
    ]
    code, output, errors = finish(start(corpus_dir, cache_dir, out, "--resume"))
    assert code == 0, errors
    assert f"resumed after step {stopped}" in output
    assert records(out) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_first_step_writes_nothing(tmp_path, number):
    out, cache = tmp_path / "run", tmp_path / "cache"
    (tmp_path / "text.txt").write_text("".join(f"word{i} " for i in range(600_000)))
    process = start(tmp_path / "text.txt", cache, out)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("corpus:")
    process.send_signal(number)
    code, _, errors = finish(process)
    assert code == 128 + number
    assert errors.splitlines() == [
        f"stopped by {number.name} before the first step; nothing was written to {out}"
    ]
    assert not out.exists()
    assert [file for file in cache.rglob("*") if file != cache / "tokens"] == []
