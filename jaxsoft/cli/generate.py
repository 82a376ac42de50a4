"""The subcommand `jaxsoft generate`."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxsoft.cli.text import UsageError, asking, flag
from jaxsoft.training.reporting import printable

if TYPE_CHECKING:
    from jaxsoft.training.language_model.loading import Piece, TrainedLanguageModel

__all__ = ["add_commands"]

_NUMBERS = {
    "temperature": (float, 1.0, "0 takes the likeliest token"),
    "top_k": (int, None, "draw from so many tokens, the likeliest"),
    "top_p": (float, None, "of these, from those with this probability together"),
    "min_p": (float, None, "of these, from those with this share of the largest one"),
    "seed": (int, 0, "the same seed gives the same texts"),
    "number": (int, 1, "texts for each prompt"),
    "max_tokens": (int, 128, "the longest text, in tokens"),
}


def add_commands(commands: Any) -> None:
    """Adds the subcommand.

    Args:
      commands: what `add_subparsers` returned.
    """
    generate = commands.add_parser(
        "generate",
        help="continue texts by a language model of `jaxsoft train`",
        description="Continues prompts by a language model that `jaxsoft train` has "
        "trained, and prints each token when it is drawn.",
    )
    generate.set_defaults(
        run=_generate, farewell=lambda parsed: str, fields=(*_NUMBERS, "prompt")
    )
    generate.add_argument("folder", metavar="RUN", help="folder of a finished run")
    generate.add_argument(
        "--prompt",
        default="-",
        metavar="TEXT",
        help="text to continue; empty starts a new one, - reads prompts from standard "
        "input, one a line (default: -)",
    )
    for name, (kind, default, text) in _NUMBERS.items():
        generate.add_argument(
            flag(name),
            type=kind,
            default=default,
            metavar=name.rpartition("_")[2].upper(),
            help=text if default is None else f"{text} (default: {default})",
        )
    generate.add_argument(
        "--log-probs",
        action="store_true",
        help="print a line a token: its log-probability at that temperature, before it "
        "was filtered, and the characters that it made whole",
    )


def _generate(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft generate`."""
    from jaxsoft.training.language_model.loading import load_language_model

    trained = load_language_model(parsed.folder)
    several = parsed.prompt == "-" or parsed.number > 1
    prompts = _lines() if parsed.prompt == "-" else iter([parsed.prompt])
    count = 0
    for prompt in prompts:
        for text in _texts(trained, prompt, parsed):
            count += 1
            if several:
                print(f"--- {count} ---", flush=True)
            if not parsed.log_probs:
                _write(prompt)
            for piece in text:
                if not parsed.log_probs:
                    _write(piece.text)
                elif piece.log_prob is not None:
                    _write(f"{piece.log_prob:9.4f} {piece.text!r}\n")
            if not parsed.log_probs:
                _write("\n")
    return 0


def _texts(
    trained: "TrainedLanguageModel", prompt: str, parsed: argparse.Namespace
) -> Iterator[Iterator["Piece"]]:
    """Yields the pieces of each text; those of the first as they come."""
    options = {name: getattr(parsed, name) for name in _NUMBERS}
    with asking():
        steps = trained.stream(prompt, log_probs=parsed.log_probs, **options)
    rest: list[list[Piece]] = [[] for _ in range(parsed.number)]

    def first() -> Iterator["Piece"]:
        for pieces in steps:
            for row, piece in zip(rest, pieces, strict=True):
                row += [] if piece is None else [piece]
            if pieces[0] is not None:
                yield pieces[0]

    yield first()
    yield from map(iter, rest[1:])


def _lines() -> Iterator[str]:
    """Yields the lines of standard input."""
    for line in sys.stdin.buffer:
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input must be UTF-8 ({error}).") from None


def _write(text: str) -> None:
    """Writes text at once, control characters spelled out."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()
