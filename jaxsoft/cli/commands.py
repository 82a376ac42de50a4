"""The subcommands, and what becomes of their errors."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxsoft import __version__
from jaxsoft.cli import devices, evaluate, generate, process, regress, train
from jaxsoft.cli.errors import fail
from jaxsoft.cli.text import UsageError, one_line
from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.interruption import SIGNALS
from jaxsoft.training.panics import Stderr

__all__ = ["parser", "run"]

# Files of these options are opened by their bytes, whatever those are.
_ANY_BYTES = ("corpus", "data", "folder", "model")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with code 2."""
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def run(arguments: Sequence[str]) -> int:
    """Runs a subcommand.

    Args:
      arguments: the words after the program's name.

    Returns:
      The exit code.
    """
    parsed = parser().parse_args(arguments)
    process.Signals.farewell = parsed.farewell = parsed.farewell(parsed)
    Stderr.ours = True
    try:
        _check_text(parsed)
        return parsed.run(parsed)
    except KeyboardInterrupt as error:
        if not isinstance(error, TrainingInterrupted):
            error = TrainingInterrupted(SIGNALS[0])
        print(parsed.farewell(error), file=sys.stderr)
        return 128 + error.signal_number
    except BrokenPipeError:
        return process.BROKEN_PIPE
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # A panic of Rust's is no `Exception`.
        return fail(
            error,
            parsed.command,
            fields=parsed.fields,
            out=getattr(parsed, "out", None),
            debug=parsed.debug,
        )
    finally:
        Stderr.ours = False


def parser() -> argparse.ArgumentParser:
    """Builds the parser, one subcommand a job."""
    parser = _Parser(prog="jaxsoft", description="The softmax layer of JAX.")
    parser.add_argument("--version", action="version", version=f"jaxsoft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in (train, generate, evaluate, regress, devices):
        module.add_commands(commands)
    for each, default in [
        (parser, False),
        *((command, argparse.SUPPRESS) for command in commands.choices.values()),
    ]:
        each.add_argument(
            "--debug",
            action="store_true",
            default=default,
            help="print the traceback of an error",
        )
    return parser


def _check_text(parsed: argparse.Namespace) -> None:
    """Raises `UsageError` where an option has bytes that are no text."""
    for name, value in vars(parsed).items():
        if name in _ANY_BYTES:
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise UsageError(
                        f"`{name}` must be UTF-8, got {os.fsencode(text)!r}."
                    ) from None
