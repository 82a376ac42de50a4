"""A training run on a terminal, or in a log: progress and the closing summary."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jaxsoft.training.language_model.comparison import ComparisonReport
from jaxsoft.training.reporting import FinalReport, Listener

# Where there is no terminal to redraw, a line at most this often.
_LOG_SECONDS = 10.0
_MIB = 2**20


class ConsoleListener(Listener):
    """Shows a progress bar on a terminal, and a line now and then elsewhere."""

    def __init__(
        self,
        console: Console,
        unit: str = "step",
        *,
        things: str = "tokens",
        measure: str = "loss",
        digits: int = 3,
        remaining: bool = True,
    ):
        """Keeps the console.

        Args:
            console: Where to print.
            unit: What progress is counted in.
            things: What the rate counts; a record has it as `<things>_per_second`.
            measure: What the loss is called.
            digits: Decimals of the loss.
            remaining: Show the time left; not for a run that may end before its last
                step.
        """
        self._console, self._unit = console, unit
        self._things, self._measure, self._digits = things, measure, digits
        self._remaining = remaining
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = self._started_at = 0
        self._started = self._logged = 0.0
        self._unlogged = ""

    def note(self, text: str) -> None:
        """Prints a line."""
        say(self._console, text)

    def start(self, step: int, steps: int) -> None:
        """Opens the bar."""
        self._steps, self._started_at = steps, step
        self._started = time.monotonic()
        self._logged = -math.inf
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn(self._unit + " {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn(self._measure + " {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} " + self._things + "/s"),
            TimeElapsedColumn(),
            *([TextColumn("left"), TimeRemainingColumn()] if self._remaining else []),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "train", total=steps, completed=step, loss="-", rate="-"
        )
        self._progress.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Moves the bar, or prints a line if the last one is old enough."""
        step = record["step"]
        loss = f"{record['loss']:.{self._digits}f}"
        rate = f"{record[self._things + '_per_second']:,.0f}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, loss=loss, rate=rate)
            return
        now = time.monotonic()
        line = (
            f"{self._unit} {step}/{self._steps}  {self._measure} {loss}  "
            f"{rate} {self._things}/s"
        )
        if now - self._logged < _LOG_SECONDS and step != self._steps:
            self._unlogged = line
            return
        self._logged, self._unlogged = now, ""
        made = max(step - self._started_at, 1)
        left = (now - self._started) / made * (self._steps - step)
        self.note(f"{line}  {clock(left)} left" if self._remaining else line)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Prints the validation loss."""
        self.note(f"step {record['step']}  validation loss {record['loss']:.3f}")

    def stop(self) -> None:
        """Closes the bar, or prints the last line if it was left out."""
        if self._unlogged:
            self.note(self._unlogged)
            self._unlogged = ""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def say(console: Console, text: str) -> None:
    """Prints text as it is: no markup, no colouring, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def summarise(console: Console, report: FinalReport, files: list[Path]) -> None:
    """Prints the samples, the measurements and the files of a finished run.

    Args:
        console: Where to print.
        report: The measurements.
        files: The run's files.
    """
    say(console, "\n--- prompt ---")
    say(console, printable(report.prompt))
    for sample in report.samples:
        say(console, f"\n--- sampled at temperature {sample.temperature:g} ---")
        say(console, printable(sample.text))
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
    console: Console, report: ComparisonReport, files: list[Path]
) -> None:
    """Prints the table of a comparison of heads, and its files.

    Args:
        console: Where to print.
        report: The measurements.
        files: Where they are.
    """
    table = Table(box=box.MARKDOWN)
    columns = ("perplexity", "steps", "ms a step", "head ms", "state MiB", "temp MiB")
    table.add_column("head", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name == "perplexity")
    for one in report.heads:
        temporary = one.cost.temporary_bytes
        table.add_row(
            one.head,
            f"{one.perplexity:,.1f}",
            f"{one.steps:,}",
            f"{1e3 * one.step_seconds:,.0f}",
            f"{1e3 * one.cost.seconds:,.1f}",
            f"{one.cost.state_bytes / _MIB:,.1f}",
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


def printable(text: str) -> str:
    """Spells out control characters, which sampled text may hold, line ends apart."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
