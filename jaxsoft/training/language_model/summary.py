"""A language model's measurements on a terminal, or in a log."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from jaxsoft.training.console import clock, say
from jaxsoft.training.language_model.comparison import ComparisonReport
from jaxsoft.training.language_model.evaluation import EvaluationReport
from jaxsoft.training.language_model.report import FinalReport

__all__ = [
    "summarise",
    "summarise_comparison",
    "summarise_evaluation",
    "summary_lines",
]

_MIB = 2**20


def summarise(console: Console, report: FinalReport, files: Sequence[Path]) -> None:
    """Prints the samples, the measurements and the files of a finished run.

    Args:
      console: where to print.
      report: the measurements.
      files: the run's files.
    """
    say(console, "\n--- prompt ---")
    say(console, report.prompt)
    for sample in report.samples:
        say(console, f"\n--- sampled at temperature {sample.temperature:g} ---")
        say(console, sample.text)
    say(console, "\n--- result ---")
    for line in summary_lines(report):
        say(console, line)
    say(console, "files: " + ", ".join(str(file) for file in files))


def summary_lines(report: FinalReport) -> list[str]:
    """The measurements of a finished run, a line each."""
    memory = report.memory
    gain = report.unigram_entropy - report.loss
    side = "below" if gain > 0 else "above"
    lines = [
        f"head: {report.head}",
        f"steps: {report.step:,} in {clock(report.seconds)}, after "
        f"{report.compile_seconds:.1f} s of compilation",
        f"validation loss: {report.loss:.3f} nats a token, perplexity "
        f"{report.perplexity:,.1f} ({report.tokens_evaluated:,} tokens)",
        f"unigram entropy of the corpus: {report.unigram_entropy:.3f} nats; the "
        f"validation loss is {abs(gain):.3f} nats {side} it",
        "training frequencies on the validation tokens: "
        f"{report.unigram_cross_entropy:.3f} nats",
        f"stored logits would take {memory.stored_logits / _MIB:,.1f} MiB a step, "
        f"{memory.stored_logits_with_gradient / _MIB:,.1f} MiB with their gradient"
        + (f", on each of {memory.devices} devices" if memory.devices > 1 else ""),
    ]
    if memory.step_temporaries is None:
        lines.append("the compiled step's memory: not reported on this platform")
    else:
        lines.append(
            f"the compiled step's temporaries take "
            f"{memory.step_temporaries / _MIB:,.1f} MiB in all"
        )
    return lines


def summarise_comparison(
    console: Console, report: ComparisonReport, files: Sequence[Path]
) -> None:
    """Prints the table of a comparison of heads, and its files.

    Args:
      console: where to print.
      report: the measurements.
      files: where they are.
    """
    table = Table(box=box.MARKDOWN)
    columns = ("perplexity", "steps", "ms a step", "head ms", "state MiB", "temp MiB")
    table.add_column("head", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name == "perplexity")
    for head in report.heads:
        temporary = head.cost.temporary_bytes
        table.add_row(
            head.head,
            f"{head.perplexity:,.1f}",
            f"{head.steps:,}",
            f"{1e3 * head.step_seconds:,.0f}",
            f"{1e3 * head.cost.seconds:,.1f}",
            f"{head.cost.state_bytes / _MIB:,.1f}",
            "?" if temporary is None else f"{temporary / _MIB:,.1f}",
        )
    say(console, "")
    console.print(table)
    for line in (
        f"each head was trained for {report.seconds:g} s on {report.tokens_per_step:,} "
        f"tokens a step, V = {report.vocab_size:,}, H = {report.features}",
        "perplexity by full normalised probabilities, on "
        f"{report.tokens_evaluated:,} validation tokens; unigram entropy of the corpus "
        f"{report.unigram_entropy:.3f} nats",
        "head ms, state and temp are of the head's step alone: loss, gradients and "
        "update; state is parameters, moments and tables",
        "files: " + ", ".join(str(file) for file in files),
    ):
        say(console, line)


def summarise_evaluation(
    console: Console, report: EvaluationReport, picture: Path
) -> None:
    """Prints what a model makes of a corpus.

    Args:
      console: where to print.
      report: the measurements.
      picture: the reliability diagram.
    """
    for line in (
        f"corpus: {report.corpus}, {report.bytes / 1e6:,.1f} MB; "
        f"{report.texts:,} texts",
        f"loss: {report.loss:.3f} nats a token, perplexity {report.perplexity:,.1f} "
        f"({report.tokens:,} tokens)",
        f"bits per byte: {report.bits_per_byte:.3f}",
        f"the likeliest token is right: {100 * report.accuracy:.1f} %, calibration "
        f"error (ECE) {report.expected_calibration_error:.4f}",
        f"files: {picture}",
    ):
        say(console, line)
