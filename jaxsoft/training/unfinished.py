"""What is being written: under a name of our own, locked, and gone when it fails.

Nobody sees it half-written, and a process that is killed leaves it to the next one to
clear away. The lock is the operating system's and ends with the process, so what a
living one writes is never taken, whatever its age. Names are random: no file of the
user's is touched.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["discard_all", "unfinished_file", "unfinished_folder"]

_NAME = re.compile(r"\.jaxsoft-[0-9a-f]{16}")
# Where files cannot be locked, what is older is nobody's.
_STALE_SECONDS = 24 * 3600.0
# What this process is writing.
_OURS: set[Path] = set()


@contextlib.contextmanager
def unfinished_file(beside: Path) -> Iterator[Path]:
    """Makes an empty file beside another, to be renamed; else it vanishes.

    Args:
      beside: a path in the same folder.
    """
    with _made(beside.parent, folder=False) as path:
        yield path


@contextlib.contextmanager
def unfinished_folder(beside: Path) -> Iterator[Path]:
    """Makes an empty folder beside another, to be renamed; else it vanishes.

    Args:
      beside: a path in the same folder.
    """
    with _made(beside.parent, folder=True) as path:
        yield path


def discard_all() -> None:
    """Removes what this process is writing, before it ends in the middle of that."""
    for path in list(_OURS):
        _remove(path)


@contextlib.contextmanager
def _made(parent: Path, *, folder: bool) -> Iterator[Path]:
    """Makes a file or a folder and holds its lock."""
    _sweep(parent)
    while True:
        path = parent / f".jaxsoft-{secrets.token_hex(8)}"
        _OURS.add(path)
        try:
            path.mkdir() if folder else path.open("x").close()
            with _locked(path) as locked:
                # Another process's sweep may come between the making and the lock.
                if locked is False or not path.exists():
                    continue
                yield path
                return
        finally:
            _remove(path)
            _OURS.discard(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Locks what is at a path; False if another has it, None if nobody can."""
    if fcntl is None:
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        except OSError:
            locked = None
        yield locked
    finally:
        os.close(descriptor)


def _sweep(parent: Path) -> None:
    """Removes what killed processes left in a folder."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for path in [Path(each) for each in entries if _NAME.fullmatch(each.name)]:
            with contextlib.suppress(OSError), _locked(path) as locked:
                age = time.time() - path.stat().st_mtime
                if locked or (locked is None and age > _STALE_SECONDS):
                    _remove(path)


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and that can be done.

    A folder gets another name first. Whoever would give it its own at the same time
    then has it whole, or not at all.
    """
    with contextlib.suppress(OSError):
        if path.is_dir():
            path = path.rename(path.with_name(f".jaxsoft-{secrets.token_hex(8)}"))
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
