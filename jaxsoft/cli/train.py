"""The subcommand `jaxsoft train`."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxsoft.cli.process import Signals
from jaxsoft.cli.text import asking, farewell, flag, terminal
from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.language_model.config import LanguageModelConfig, load_config
from jaxsoft.training.run_directory import RunDirectory
from jaxsoft.training.running import require_train_extra

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = ["add_commands"]

# What --compare-heads gives each head, unless told.
_COMPARE_SECONDS = 120.0

_TRAIN_HELP = {
    "corpus": "text file, folder of text files, or .gz, .bz2, .xz or .zst of one text "
    "(default: the standard library's sources)",
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
    "memory": "the most memory that files and the model may take, such as 4G "
    "(default: half of what is free)",
    "workspace": "the temporary memory that the loss of a full head may take, such as "
    "1GiB: with more, less is computed twice (default: a quarter of the logits, within "
    "96 and 512 MiB)",
    "evaluate_every": "steps between validations",
    "evaluation_tokens": "tokens of a validation; the last one reads four times more",
    "checkpoint_every": "steps between checkpoints",
    "sample_tokens": "length of the sampled texts",
    "prompt": "text that the samples continue (default: some validation text)",
}


def add_commands(commands: Any) -> None:
    """Adds the subcommand.

    Args:
      commands: what `add_subparsers` returned.
    """
    train = commands.add_parser(
        "train",
        help="train a language model without storing its logits",
        description="Trains a small causal language model on text, without ever "
        "storing its logits.",
    )
    train.set_defaults(
        run=_train,
        farewell=_farewell,
        fields=(*_TRAIN_HELP, "resume", "mesh", "compare_heads"),
    )
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


def _train(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft train`."""
    given = {
        field.name: getattr(parsed, field.name)
        for field in dataclasses.fields(LanguageModelConfig)
        if hasattr(parsed, field.name)
    }
    seconds = parsed.compare_heads
    with asking():
        require_train_extra()
        if seconds is not None:
            _check_comparison(parsed, given)
        out = given.setdefault("out", LanguageModelConfig.out)
        stored = load_config(out) if parsed.resume else LanguageModelConfig()
        config = dataclasses.replace(stored, **given)
    with Signals.request() as stop:
        if seconds is not None:
            return _compare(stop, config, seconds)
        return _train_until(stop, config, resume=parsed.resume, mesh=_mesh(parsed))


def _mesh(parsed: argparse.Namespace) -> "Mesh | None":
    """Returns the devices asked for."""
    if parsed.mesh is None:
        return None
    from jaxsoft.training.mesh import parse_mesh

    with asking():
        return parse_mesh(parsed.mesh)


def _farewell(parsed: argparse.Namespace) -> Callable[[TrainingInterrupted], str]:
    """Returns what to say of an interrupted run."""
    out = getattr(parsed, "out", LanguageModelConfig.out)
    if parsed.compare_heads is not None:
        return lambda interruption: f"{interruption}; nothing was written to {out}"
    words = ["jaxsoft", "train", "--out", out, "--resume"]
    mesh = [] if parsed.mesh is None else ["--mesh", parsed.mesh]
    return lambda interruption: farewell(interruption, [*words, *mesh], out)


def _seconds(text: str) -> float:
    """Reads a time."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _check_comparison(parsed: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raises unless all that was asked for goes with a comparison of heads."""
    for name in ("head", "steps", "workspace", "resume", "mesh"):
        value = given.get(name) or getattr(parsed, name, None)
        if value:
            raise ValueError(
                f"`{name}` must be left out with `compare_heads`, got {value!r}."
            )


def _compare(stop: StopRequest, config: LanguageModelConfig, seconds: float) -> int:
    """Compares heads, prints the table, and returns the exit code."""
    from jaxsoft.training.console import ConsoleListener
    from jaxsoft.training.language_model.comparison import compare_heads
    from jaxsoft.training.language_model.summary import summarise_comparison

    console = terminal()
    report = compare_heads(
        config, seconds, listener=ConsoleListener(console, "second"), stop=stop
    )
    summarise_comparison(console, report, RunDirectory(config.out).files())
    return 0


def _train_until(
    stop: StopRequest, config: LanguageModelConfig, *, resume: bool, mesh: "Mesh | None"
) -> int:
    """Trains, prints the summary, and returns the exit code."""
    from jaxsoft.training.console import ConsoleListener
    from jaxsoft.training.language_model.summary import summarise
    from jaxsoft.training.language_model.trainer import train_language_model

    console = terminal()
    report = train_language_model(
        config,
        resume=resume,
        mesh=mesh,
        listener=ConsoleListener(console),
        stop=stop,
    )
    summarise(console, report, RunDirectory(config.out).files())
    return 0
