"""What the subcommands of the command line say in the same way."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence

from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.run_directory import RunDirectory

__all__ = ["fail", "farewell", "flag"]


def flag(field: str) -> str:
    """The command-line option of a configuration field."""
    return "--" + field.replace("_", "-")


def fail(command: str, error: Exception, code: int, fields: Iterable[str]) -> int:
    """Prints an error as one line, options spelled as flags; returns the code.

    Args:
      command: the subcommand.
      error: what went wrong.
      code: the exit code.
      fields: names that are options of the subcommand.
    """
    pattern = f"`({'|'.join(fields)})`"
    text = re.sub(pattern, lambda match: flag(match[1]), " ".join(str(error).split()))
    print(f"jaxsoft {command}: {text}", file=sys.stderr)
    return code


def farewell(
    interruption: TrainingInterrupted,
    words: Sequence[str],
    out: str,
    unit: str = "step",
) -> str:
    """Says where an interrupted run stands and how to resume it.

    Args:
      interruption: what stopped it.
      words: the command that resumes it.
      out: its folder.
      unit: what it counts.
    """
    command = shlex.join(words)
    if interruption.step is not None:
        return (
            f"{interruption}, saved {unit} {interruption.step}; resume with: {command}"
        )
    if not RunDirectory(out).config.is_file():
        return f"{interruption} before the first {unit}; nothing was written to {out}"
    return f"{interruption}; resume from the last checkpoint with: {command}"
