"""What the subcommands of the command line say in the same way."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.reporting import printable
from jaxsoft.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["UsageError", "asking", "farewell", "flag", "one_line", "terminal"]


class UsageError(ValueError):
    """What was asked for is out of the question; the message says why."""


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turns any `ValueError` about options into a `UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def flag(field: str) -> str:
    """The command-line option of a configuration field."""
    return "--" + field.replace("_", "-")


def one_line(text: str) -> str:
    """Puts a text on one line, control characters spelled out."""
    return printable(" ".join(text.split()))


def terminal() -> "Console":
    """Returns the console; a pipe that nobody reads raises `BrokenPipeError`."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # Rich would exit with code 1.

    return Terminal()


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
