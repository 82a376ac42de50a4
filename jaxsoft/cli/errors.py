"""What a command says when it fails: one line, and where to read the rest."""

import errno
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path

from jaxsoft.cli.text import UsageError, flag, one_line
from jaxsoft.training.errors import (
    CheckpointError,
    CorpusError,
    MeshError,
    MissingExtraError,
    ModelFileError,
    NonFiniteLossError,
    PredictionError,
    RunDirectoryError,
    SvmlightError,
    TableError,
)

__all__ = ["fail"]

_BAD_INPUT = (
    CorpusError,
    MeshError,
    MissingExtraError,
    ModelFileError,
    PredictionError,
    RunDirectoryError,
    SvmlightError,
    TableError,
    UsageError,
)
_FAILURE = (CheckpointError, MemoryError, NonFiniteLossError)
# The disk's, and no fault of what was asked for.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def fail(
    error: BaseException,
    command: str,
    *,
    fields: Iterable[str] = (),
    out: str | None = None,
    debug: bool = False,
) -> int:
    """Prints an error as one line, options spelled as flags; returns the exit code.

    An error that nobody expected has its traceback in a new file.

    Args:
      error: what went wrong.
      command: the subcommand.
      fields: names that are options of the subcommand.
      out: folder of the run, where such a file goes if it is there.
      debug: print the traceback of any error instead of writing it to a file.
    """
    code = _code(error)
    text = one_line(str(error))
    if fields:
        text = re.sub(f"`({'|'.join(fields)})`", lambda match: flag(match[1]), text)
    if debug:
        traceback.print_exception(error)
    if code is None:
        # The first sentence will do: the file has all of it.
        text = f"{type(error).__name__}: {text[:300]}".removesuffix(": ")
        text += "; nobody expected this"
        if not debug:
            text += f": {_log(error, out)}, or run it again with --debug"
    print(f"jaxsoft {command}: {text}", file=sys.stderr)
    return 1 if code is None else code


def _code(error: BaseException) -> int | None:
    """Returns the exit code of an expected error, None of another."""
    if any(getattr(each, "errno", 0) in _DISK for each in (error, error.__cause__)):
        return 1
    if isinstance(error, _BAD_INPUT):
        return 2
    if isinstance(error, _FAILURE) or str(error).startswith("RESOURCE_EXHAUSTED"):
        return 1
    return 2 if isinstance(error, OSError) and error.filename is not None else None


def _log(error: BaseException, out: str | None) -> str:
    """Writes a traceback to a new file, and says where it is."""
    text = f"{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    for folder in (out, tempfile.gettempdir()):
        if folder is None or not os.path.isdir(folder):
            continue
        try:
            descriptor, name = tempfile.mkstemp(".log", "jaxsoft-error-", folder)
            with open(
                descriptor, "w", encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.write(text)
        except OSError:
            continue
        return f"please report it with {one_line(str(Path(name)))}"
    return "no folder takes its traceback"
