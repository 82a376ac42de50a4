"""Panics of libraries in Rust, which print several lines before they are raised."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from jaxsoft.training.errors import first_line

__all__ = ["Stderr", "panics_as_errors"]


class Stderr:
    """The stderr of this process, which Rust writes to by its number.

    Attributes:
      ours: whether the process is a command of ours, so that stderr may be held back.
      descriptor: where it is at the moment.
    """

    ours = False
    descriptor = 2


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Makes a panic a `ValueError`.

    A command of ours holds back meanwhile what is written to stderr: of a panic it is
    dropped, as the error says it, and otherwise it is written then.
    """
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(_held_back()) if Stderr.ours else None
        try:
            yield
        except BaseException as error:  # A panic is no `Exception`.
            panic = type(error).__name__ == "PanicException"
            if held is not None and (panic or b"panicked at" in _text(held)):
                held.truncate(0)
                held.seek(0)
            if not panic:
                raise
            raise ValueError(first_line(error)) from error


@contextlib.contextmanager
def _held_back() -> Iterator[IO[bytes] | None]:
    """Has a temporary file for stderr, and writes it there at the end."""
    if Stderr.descriptor != 2:
        yield None  # It is held back already.
        return
    with contextlib.ExitStack() as stack:
        try:
            # Without a buffer, as others write into it.
            held = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            before = os.dup(2)
        except OSError:
            yield None
            return
        stack.callback(os.close, before)
        if sys.stderr is not None:
            sys.stderr.flush()
        Stderr.descriptor = before
        os.dup2(held.fileno(), 2)
        try:
            yield held
        finally:
            os.dup2(before, 2)
            Stderr.descriptor = 2
            if text := _text(held):
                with contextlib.suppress(OSError):
                    os.write(2, text)


def _text(held: IO[bytes]) -> bytes:
    held.seek(0)
    return held.read()
