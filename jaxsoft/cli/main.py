"""The command line: `jaxsoft train`, `regress`, `predict` and `devices`.

Exit codes: 0 done; 1 the job itself failed; 2 bad input, said in one line on
stderr, with nothing written; 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jax.sharding import Mesh

from jaxsoft import __version__
from jaxsoft.cli import devices as cli_devices
from jaxsoft.cli import regress as cli_regress
from jaxsoft.cli.text import fail, farewell, flag
from jaxsoft.training import (
    CheckpointError,
    CorpusError,
    LanguageModelConfig,
    MeshError,
    MissingExtraError,
    NonFiniteLossError,
    RunDirectoryError,
    StopRequest,
    TrainingInterrupted,
    compare_heads,
    load_config,
    parse_mesh,
    require_train_extra,
    train_language_model,
)

__all__ = ["main"]

# What --compare-heads gives each head, unless told.
_COMPARE_SECONDS = 120.0

_TRAIN_HELP = {
    "corpus": "text file, folder of text files, or .gz of one text (default: the "
    "standard library's sources)",
    "vocab_size": "tokens of the byte-level BPE",
    "steps": "updates to make",
    "batch_size": "sequences a step",
    "sequence_length": "tokens a sequence",
    "features": "width of the model",
    "layers": "attention blocks",
    "heads": "attention heads",
    "learning_rate": "peak learning rate",
    "head": "full, hierarchical (a Huffman tree of the corpus's counts), adaptive or "
    "sampled",
    "num_samples": "classes that a sampled head draws a step",
    "seed": "seed of parameters, data order and samples",
    "out": "folder of the run",
    "cache_dir": "root of the token cache (default: the user's cache folder)",
    "evaluate_every": "steps between validations",
    "evaluation_tokens": "tokens of a validation; the last one reads four times more",
    "checkpoint_every": "steps between checkpoints",
    "sample_tokens": "length of the sampled texts",
    "prompt": "text that the samples continue (default: some validation text)",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: the words after the program's name; None reads them from `sys`.

    Returns:
      The exit code.
    """
    parsed = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    return run(parsed)


def _parser() -> argparse.ArgumentParser:
    """Builds the parser, one subcommand a job."""
    parser = _Parser(prog="jaxsoft", description="The softmax layer of JAX.")
    parser.add_argument("--version", action="version", version=f"jaxsoft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a language model without storing its logits",
        description="Trains a small causal language model on text, without ever "
        "storing its logits.",
    )
    train.set_defaults(run=_train)
    for field in dataclasses.fields(LanguageModelConfig):
        text = _TRAIN_HELP[field.name]
        if field.default is not None:
            text += f" (default: {field.default})"
        train.add_argument(
            flag(field.name),
            type=field.type if field.type in (int, float) else str,
            default=argparse.SUPPRESS,
            metavar=field.name.rpartition("_")[2].upper(),
            help=text,
        )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out; options not given are the run's own",
    )
    train.add_argument(
        "--compare-heads",
        nargs="?",
        type=_seconds,
        const=_COMPARE_SECONDS,
        metavar="SECONDS",
        help="train every head for so long instead, and print a table of quality, time "
        f"and memory (SECONDS: {_COMPARE_SECONDS:g} if not given)",
    )
    train.add_argument(
        "--mesh",
        metavar="AXES",
        help="use all devices, such as data=2,vocab=4 for eight: batches are sharded "
        "over data, the head's classes over vocab; --resume may take another mesh "
        "(default: one device)",
    )
    cli_regress.add_commands(commands)
    cli_devices.add_command(commands)
    return parser


def _train(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft train`."""
    given = {
        field.name: getattr(parsed, field.name)
        for field in dataclasses.fields(LanguageModelConfig)
        if hasattr(parsed, field.name)
    }
    seconds = parsed.compare_heads
    try:
        require_train_extra()
        if seconds is not None:
            _check_comparison(parsed, given)
        out = given.setdefault("out", LanguageModelConfig.out)
        stored = load_config(out) if parsed.resume else LanguageModelConfig()
        config = dataclasses.replace(stored, **given)
        mesh = None if parsed.mesh is None else parse_mesh(parsed.mesh)
    except (MissingExtraError, ValueError) as error:
        return _fail("train", error, 2)
    try:
        with StopRequest() as stop:
            if seconds is not None:
                return _compare(stop, config, seconds)
            return _train_until(stop, config, resume=parsed.resume, mesh=mesh)
    except TrainingInterrupted as interruption:
        said = f"{interruption}; nothing was written to {out}"
        if seconds is None:
            words = ["jaxsoft", "train", "--out", out, "--resume"]
            mesh_words = [] if parsed.mesh is None else ["--mesh", parsed.mesh]
            said = farewell(interruption, [*words, *mesh_words], out)
        print(said, file=sys.stderr)
        return 128 + interruption.signal_number
    except (CorpusError, MeshError, RunDirectoryError) as error:
        return _fail("train", error, 2)
    except (CheckpointError, NonFiniteLossError, OSError) as error:
        return _fail("train", error, 1)


def _seconds(text: str) -> float:
    """Reads a time."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _check_comparison(parsed: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raises unless all that was asked for goes with a comparison of heads."""
    for name in ("head", "steps", "resume", "mesh"):
        value = given.get(name) or getattr(parsed, name, None)
        if value:
            raise ValueError(
                f"`{name}` must be left out with `compare_heads`, got {value!r}."
            )


def _compare(stop: StopRequest, config: LanguageModelConfig, seconds: float) -> int:
    """Compares heads, prints the table, and returns the exit code."""
    from rich.console import Console

    from jaxsoft.training.console import ConsoleListener
    from jaxsoft.training.language_model.summary import summarise_comparison
    from jaxsoft.training.run_directory import RunDirectory

    console = Console()
    report = compare_heads(
        config, seconds, listener=ConsoleListener(console, "second"), stop=stop
    )
    summarise_comparison(console, report, RunDirectory(config.out).files())
    return 0


def _train_until(
    stop: StopRequest, config: LanguageModelConfig, *, resume: bool, mesh: Mesh | None
) -> int:
    """Trains, prints the summary, and returns the exit code."""
    from rich.console import Console

    from jaxsoft.training.console import ConsoleListener
    from jaxsoft.training.language_model.summary import summarise
    from jaxsoft.training.run_directory import RunDirectory

    console = Console()
    report = train_language_model(
        config,
        resume=resume,
        mesh=mesh,
        listener=ConsoleListener(console),
        stop=stop,
    )
    summarise(console, report, RunDirectory(config.out).files())
    return 0


def _fail(command: str, error: Exception, code: int) -> int:
    """Prints an error as one line, options spelled as flags; returns the code."""
    return fail(command, error, code, (*_TRAIN_HELP, "resume", "mesh", "compare_heads"))
