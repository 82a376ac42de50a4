"""A training run on a terminal, or in a log."""

import math
import time
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxsoft.training.reporting import Listener, Record, printable

__all__ = ["ConsoleListener", "clock", "say"]

# Where there is no terminal to redraw, a line at most this often.
_LOG_SECONDS = 10.0


class ConsoleListener(Listener):
    """Shows a progress bar on a terminal, and a line now and then elsewhere."""

    def __init__(
        self,
        console: Console,
        unit: str = "step",
        *,
        things: Literal["tokens", "rows"] = "tokens",
        measure: str = "loss",
        digits: int = 3,
        remaining: bool = True,
    ):
        """Keeps the console.

        Args:
          console: where to print.
          unit: what progress is counted in.
          things: what the rate counts; a record has it as `<things>_per_second`.
          measure: what the loss is called.
          digits: decimals of the loss.
          remaining: show the time left; not for a run that may end before its last
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

    @classmethod
    def for_fit(cls, console: Console, *, remaining: bool = True) -> "ConsoleListener":
        """Makes the listener of a regression's fit; see the constructor."""
        return cls(
            console,
            "iteration",
            things="rows",
            measure="objective",
            digits=6,
            remaining=remaining,
        )

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

    def step(self, record: Record) -> None:
        """Moves the bar, or prints a line if the last one is old enough."""
        step = record["step"]
        loss = f"{record['loss']:.{self._digits}f}"
        tokens = self._things == "tokens"
        rate = record["tokens_per_second"] if tokens else record["rows_per_second"]
        rate = f"{rate:,.0f}"
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

    def validation(self, record: Record) -> None:
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
    """Prints text without markup, colours and wrapping, control characters spelled."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
