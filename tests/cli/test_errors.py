"""Whatever goes wrong is one line; what nobody expected goes to a file."""

import errno
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jaxsoft.cli.main import main
from jaxsoft.training.errors import ModelFileError, TableError
from jaxsoft.training.regression import job, prediction

REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = ["regress", "t.csv", "--out", "run"]


class Panic(BaseException):
    """Rust's are no `Exception`s."""


@pytest.fixture
def raises(tmp_path, monkeypatch):
    """Returns what makes `jaxsoft regress` raise, in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(temporary))

    def fails(error):
        def fail(*args, **rest):
            raise error

        monkeypatch.setattr(job, "train_regression", fail)
        monkeypatch.setattr(prediction, "predict_table", fail)

    return fails


def line(capsys):
    """Returns the one line on stderr."""
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.parametrize("folder", ["run", "temporary"])
@pytest.mark.parametrize("error", [KeyError("x\x1b"), Panic("x"), RecursionError()])
def test_the_unexpected_goes_to_a_new_file(raises, capsys, tmp_path, error, folder):
    """Which lies in the run's folder if there is one."""
    (tmp_path / folder).mkdir(exist_ok=True)
    raises(error)
    for count in (1, 2):
        assert main(ARGUMENTS) == 1
        said = line(capsys)
        assert said.startswith(f"jaxsoft regress: {type(error).__name__}")
        assert "nobody expected this" in said and "--debug" in said
        assert said.isprintable()
        logs = list((tmp_path / folder).iterdir())
        assert len(logs) == count
        path = re.search(r"\S+\.log", said)
        assert path is not None and Path(path[0]).samefile(
            max(logs, key=os.path.getmtime)
        )
        assert "Traceback (most recent call last)" in Path(path[0]).read_text()


def test_no_folder_for_the_file(raises, capsys, tmp_path, monkeypatch):
    raises(KeyError("x"))
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path / "nowhere"))
    assert main(ARGUMENTS) == 1
    assert "no folder takes its traceback" in line(capsys)


@pytest.mark.parametrize(
    "arguments", [["--debug", *ARGUMENTS], [*ARGUMENTS, "--debug"]]
)
@pytest.mark.parametrize(("error", "code"), [(KeyError("x"), 1), (TableError("x"), 2)])
def test_debug_shows_the_traceback(raises, capsys, tmp_path, arguments, error, code):
    raises(error)
    assert main(arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)") and "fail" in said
    assert list((tmp_path / "temporary").iterdir()) == []


def full_disk():
    """An error whose cause is no fault of what was asked for."""
    error = ModelFileError("the model cannot be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TableError("`label` 'a\x1b[31m\nb'"), 2),
        (PermissionError(errno.EACCES, "denied", "t.csv"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), 1),
        (full_disk(), 1),
        (MemoryError("Unable to allocate"), 1),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n while trying"), 1),
    ],
)
@pytest.mark.parametrize("command", ["regress", "predict"])
def test_the_expected_is_one_line(raises, capsys, tmp_path, error, code, command):
    raises(error)
    assert main([command, "m", "t.csv"] if command == "predict" else ARGUMENTS) == code
    said = line(capsys)
    assert said.startswith(f"jaxsoft {command}: ") and said.isprintable()
    assert type(error).__name__ not in said
    assert list((tmp_path / "temporary").iterdir()) == []


def test_nobody_reads_on(raises, capsys):
    raises(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert main(ARGUMENTS) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--out", "r\udcff"], r"--out must be UTF-8, got b'r\xff'."),
        (["train", "--prompt", "\udcff"], r"--prompt must be UTF-8, got b'\xff'."),
        (["predict", "m", "t", "--label", "\udcff"], r"--label must be UTF-8, got"),
        (["train", "--corpus", "n\udcff"], r"the corpus n\udcff does not exist."),
        (["regress", "n\udcff.csv"], r"the table n\udcff.csv does not exist."),
        (["train", "--out", "r" * 300], "rrr cannot be written (File name too long)."),
        (["train", "--out", "x/" * 3000], "cannot be written (File name too long)."),
        (["train", "--out", "/proc/x"], "--out /proc/x cannot be written ("),
        (
            ["regress", "--out", "r" * 300],
            "rrr cannot be written (File name too long).",
        ),
        (["predict", "m", "t", "--out", "r" * 300], "rrr cannot be written (File name"),
        (
            ["train", "--vocab-size", "1" + "0" * 12],
            "--vocab-size must be at most 16,7",
        ),
        (["train", "--layers", "1000000"], "--layers must be at most 1,000, got"),
        (["train", "--sample-tokens", "9" * 10], "--sample-tokens must be at most 1,0"),
        (["train", "--steps", "9" * 20], "--steps must be at most 2,147,483,647, got"),
        (["train", "--features", "800000"], "a step of this model would take"),
        (["train", "--sequence-length", "9" * 8], "a step of this model would take"),
        (
            ["train", "--memory", "much"],
            "--memory must be a size such as 4G, got 'much'",
        ),
        (["train", "\x1b[31m"], r"unrecognized arguments: \x1b[31m"),
    ],
)
def test_absurd_arguments(capsys, tmp_path, arguments, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == (1 if "would take" in said else 2)
    assert said in line(capsys)
    assert list(tmp_path.iterdir()) == []


def run(*arguments, **environment):
    """Runs the command as a user does, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "jaxsoft", *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), **environment},
    )


LIGHT = """if True:
    import sys
    from jaxsoft.cli.main import main
    try:
        main(sys.argv[1:])
    except SystemExit:
        pass
    print({"jax", "rich", "flax"} & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", ["--version", "--help", "train --help", "regress --nay"]
)
def test_jax_is_not_imported_to_answer(words):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *words.split()], capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "set()"


TABLE = "a,b,y\n" + "".join(
    f"{i % 7},{i % 5},{'東' if i % 3 else 'é'}\n" for i in range(90)
)


@pytest.mark.process
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_what_the_output_cannot_encode_is_spelled_out(tmp_path, environment):
    table, out = tmp_path / "t.csv", tmp_path / "run"
    table.write_text(TABLE, encoding="utf-8")
    done = run("regress", table, "--out", out, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u6771" in done.stdout
    done = run("predict", out, table, "--out", tmp_path / "p.csv", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "東" in (tmp_path / "p.csv").read_text(encoding="utf-8")


@pytest.mark.process
def test_a_pipe_that_is_closed_ends_quietly(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE, encoding="utf-8")
    words = ["regress", tmp_path / "t.csv", "--out", tmp_path / "run"]
    with subprocess.Popen(
        [sys.executable, "-m", "jaxsoft", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"data:")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert (tmp_path / "run" / "config.json").exists()
