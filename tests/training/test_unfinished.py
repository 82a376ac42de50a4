"""What is being written: locked while its process lives, swept when that is gone."""

import os
import subprocess
import sys

import pytest

from jaxsoft.training import unfinished
from jaxsoft.training.run_directory import write_atomically
from jaxsoft.training.unfinished import unfinished_file, unfinished_folder

# Prints what it makes and waits to be killed.
WRITER = """if True:
    import pathlib, sys, time
    from jaxsoft.training.unfinished import unfinished_file, unfinished_folder
    beside = pathlib.Path(sys.argv[1])
    with unfinished_file(beside) as file, unfinished_folder(beside) as folder:
        (folder / "part").touch()
        print(file.name, folder.name, flush=True)
        time.sleep(60)
"""


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("make", [unfinished_file, unfinished_folder])
def test_it_is_renamed_or_vanishes(tmp_path, make):
    with make(tmp_path / "done") as path:
        assert path.parent == tmp_path and path.name.startswith(".jaxsoft-")
        path.rename(tmp_path / "done")
    with pytest.raises(KeyboardInterrupt):
        with make(tmp_path / "other") as path:
            assert path.exists()
            raise KeyboardInterrupt
    assert names(tmp_path) == {"done"}
    assert not unfinished._OURS


def test_only_what_a_dead_process_left_is_swept(tmp_path):
    foreign = {".jaxsoft-notes", ".jaxsoft-0123456789abcdef.txt", ".unfinished-0"}
    for name in foreign:
        (tmp_path / name).touch()
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "x"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        written = set(process.stdout.readline().split())
        assert len(written) == 2
        write_atomically(tmp_path / "file", b"living")
        assert names(tmp_path) == foreign | written | {"file"}
        process.kill()
    write_atomically(tmp_path / "file", b"dead")
    assert names(tmp_path) == foreign | {"file"}


def test_what_cannot_be_locked_is_swept_when_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "fcntl", None)
    left = tmp_path / f".jaxsoft-{'a' * 16}"
    left.touch()
    write_atomically(tmp_path / "file", b"young")
    assert left.exists()
    os.utime(left, (0, 0))
    write_atomically(tmp_path / "file", b"old")
    assert names(tmp_path) == {"file"}


def test_discard_all_leaves_nothing(tmp_path):
    with unfinished_file(tmp_path / "x"), unfinished_folder(tmp_path / "x") as folder:
        (folder / "part").touch()
        unfinished.discard_all()
        assert not names(tmp_path)
