"""The subcommand `jaxsoft evaluate`."""

import argparse
import json
from typing import Any

from jaxsoft.cli.text import asking, terminal
from jaxsoft.training.run_directory import RunDirectory

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Adds the subcommand.

    Args:
      commands: what `add_subparsers` returned.
    """
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a language model of `jaxsoft train` on other texts",
        description="Measures a language model that `jaxsoft train` has trained on "
        "texts: perplexity, bits per byte, and how well it knows its next token, whose "
        "reliability diagram goes to the run's folder.",
    )
    evaluate.set_defaults(
        run=_evaluate, farewell=lambda parsed: str, fields=("corpus", "memory")
    )
    evaluate.add_argument("folder", metavar="RUN", help="folder of a finished run")
    evaluate.add_argument(
        "--corpus",
        required=True,
        metavar="PATH",
        help="text file, folder of text files, or .gz, .bz2, .xz or .zst of one text",
    )
    evaluate.add_argument(
        "--memory",
        metavar="SIZE",
        help="the most that the texts may take, such as 4G (default: half of what is "
        "free)",
    )
    evaluate.add_argument(
        "--json", action="store_true", help="print one JSON document instead"
    )


def _evaluate(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft evaluate`."""
    from jaxsoft.training.running import require_train_extra

    require_train_extra()
    from jaxsoft.training.console import ConsoleListener
    from jaxsoft.training.language_model.evaluation import evaluate_language_model
    from jaxsoft.training.language_model.summary import summarise_evaluation
    from jaxsoft.training.memory import MemoryBudget

    with asking():
        MemoryBudget.parse(parsed.memory)
    console = terminal()
    listener = None if parsed.json else ConsoleListener(console, "batch")
    report = evaluate_language_model(
        parsed.folder, parsed.corpus, memory=parsed.memory, listener=listener
    )
    if parsed.json:
        print(json.dumps(report.record(), indent=2))
    else:
        picture = RunDirectory(parsed.folder).reliability
        summarise_evaluation(console, report, picture)
    return 0
