"""One run of the suites: its settings, its machine, and the results so far."""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import machine
from benchmarks.timing import Program, Timing

SCHEMA = 1

# A slow case takes fewer rounds than a fast one, unless a number was asked for.
_CASE_SECONDS = 30.0
# What a rate keeps from the start of an undisturbed run to its end.
_STEADY = 0.85


@dataclasses.dataclass(frozen=True)
class Work:
    """What a case cannot do without.

    Attributes:
      flops: multiplications and additions inside matmuls.
      bytes: of arrays read and written, each once.
      dtype: of the matmuls' operands.
    """

    flops: int = 0
    bytes: int = 0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one contender did in one case.

    Attributes:
      suite: the question.
      workload: the model's name.
      shape: its sizes and dtype, by letter.
      case: what was asked, in words.
      name: the contender's.
      status: `"timed"`; `"right"`, checked but not to be timed; `"wrong"`;
        `"failed"`, it raised; `"not run"`.
      reason: why it was neither timed nor right.
      errors: by output, relative to that output's size.
      timing: seconds of a call.
      ratio: the median over the rounds of its time over the baseline's.
      baseline: whose time that was.
      part_ratio: likewise, over the time of a part of the work.
      part: who did that part.
      program: what was compiled.
      work: the physical minimum.
      ours: whether a fault of it is jaxsoft's.
      swept: the letter of a size that differs from case to case, where cases are
        points of one curve.
      figures: what else was counted, by name.
    """

    suite: str
    workload: str
    shape: dict[str, Any]
    case: str
    name: str
    status: str
    reason: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    timing: Timing | None = None
    ratio: float | None = None
    baseline: str = ""
    part_ratio: float | None = None
    part: str = ""
    program: Program | None = None
    work: Work | None = None
    ours: bool = False
    swept: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def record(self, rates: dict[str, float]) -> dict[str, Any]:
        """The result as JSON takes it.

        Args:
          rates: the machine's, as `Session.rates` gives them.

        Returns:
          Numbers in seconds and bytes; None where something was not measured.
        """
        program, timing = self.program, self.timing
        return {
            "suite": self.suite,
            "workload": self.workload,
            "shape": self.shape,
            "case": self.case,
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "errors": {
                output: error if math.isfinite(error) else None
                for output, error in self.errors.items()
            },
            "seconds": dataclasses.asdict(timing) if timing else None,
            "ratio": self.ratio,
            "baseline": self.baseline,
            "part_ratio": self.part_ratio,
            "part": self.part,
            "floor_seconds": floor_seconds(self.work, rates) if timing else None,
            "compile_seconds": program.compile_seconds if program else None,
            "temporary_bytes": program.temporary_bytes if program else None,
            "output_bytes": program.output_bytes if program else None,
            "swept": self.swept,
            "figures": self.figures,
        }


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a suite concludes from its results, in one number.

    Attributes:
      suite: the question.
      what: the number is, in words.
      value: the number.
      at_most: what it should not exceed; None where nothing is asked.
      at_least: what it should not fall below, likewise.
    """

    suite: str
    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def record(self) -> dict[str, Any]:
        """The finding as JSON takes it."""
        met = [self.value <= self.at_most] if self.at_most is not None else []
        met += [self.value >= self.at_least] if self.at_least is not None else []
        return dataclasses.asdict(self) | {"met": all(met) if met else None}


def floor_seconds(work: Work | None, rates: dict[str, float]) -> float | None:
    """The least time that the machine could take.

    Args:
      work: what must be done.
      rates: per second, as `Session.rates` gives them.

    Returns:
      The larger of the matmuls' time and the copying's; None where nothing is known.
    """
    if work is None:
        return None
    floors = []
    if work.flops and (rate := rates.get(f"matmul {work.dtype}")):
        floors.append(work.flops / rate)
    if work.bytes and (rate := rates.get("copy")):
        floors.append(work.bytes / rate)
    return max(floors, default=None)


class Session:
    """Collects results; saves them after every one, so that a cut run keeps them."""

    def __init__(
        self,
        *,
        quick: bool = False,
        rounds: int | None = None,
        minutes: float | None = None,
        workloads: tuple[str, ...] = (),
        path: pathlib.Path | None = None,
        show: Callable[[Result], None] | None = None,
    ):
        """Starts the clock.

        Args:
          quick: whether sizes are cut to take milliseconds.
          rounds: samples of each contender; None takes 3 if quick, and if not 15,
            or 5 where that takes longer than half a minute.
          minutes: what the run may take; None sets no limit.
          workloads: names of those to run; none means those that suit the platform.
          path: of the JSON file; None writes none.
          show: called with each result as it comes.
        """
        self.quick = quick
        self.rounds = rounds or (3 if quick else 15)
        self.case_seconds = math.inf if rounds else _CASE_SECONDS
        self.workloads = workloads
        self.results: list[Result] = []
        self.notes: list[str] = []
        self.findings: list[Finding] = []
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._path = path
        self._show = show
        self._started = machine.now()
        self._finished: str | None = None
        self._machine = machine.describe()
        self._rates: dict[str, list[float]] = {}
        if (busy := machine.busy()) and not quick:
            self.notes.append(busy)

    @property
    def platform(self) -> str:
        """JAX's name of where the programs run."""
        return jax.default_backend()

    @property
    def failed(self) -> bool:
        """Whether a function of ours was wrong or raised."""
        return any(
            result.ours and result.status in ("wrong", "failed")
            for result in self.results
        )

    def rates(self) -> dict[str, float]:
        """The machine's best rates so far, per second: `copy`, `matmul <dtype>`."""
        return {name: max(values) for name, values in self._rates.items()}

    def measure(self, *names: str) -> None:
        """Measures rates that were not measured before in this run.

        Args:
          *names: `"copy"` or `"matmul <dtype>"`.
        """
        for name in names:
            if name not in self._rates:
                self._rates[name] = [self._rate(name)]

    def seconds_left(self) -> float:
        """Until the budget is spent; infinite where there is none."""
        if self._deadline is None:
            return float("inf")
        return self._deadline - time.monotonic()

    def add(self, result: Result) -> None:
        """Keeps a result, shows it and saves all of them."""
        self.results.append(result)
        if self._show:
            self._show(result)
        self.save()

    def finish(self) -> dict[str, Any]:
        """Measures the rates once more and saves.

        Returns:
          The document that was saved.
        """
        for name, values in self._rates.items():
            values.append(self._rate(name))
            if min(values) < _STEADY * max(values) and not self.quick:
                self.notes.append(
                    f"Disturbed: {name} ran at {min(values) / max(values):.0%} of its "
                    "rate at the other end of the run."
                )
        self._finished = machine.now()
        self.save()
        return self.document()

    def document(self) -> dict[str, Any]:
        """Everything that was measured, as JSON takes it."""
        rates = self.rates()
        return {
            "schema": SCHEMA,
            "quick": self.quick,
            "rounds": self.rounds,
            "started": self._started,
            "finished": self._finished,
            "machine": self._machine,
            "notes": self.notes,
            "rates_per_second": self._rates,
            "results": [result.record(rates) for result in self.results],
            "findings": [finding.record() for finding in self.findings],
        }

    def save(self) -> None:
        """Writes the JSON file, whole or not at all."""
        if self._path is None:
            return
        partial = self._path.with_name(self._path.name + ".partial")
        text = json.dumps(self.document(), indent=1, allow_nan=False)
        partial.write_text(text + "\n")
        os.replace(partial, self._path)

    def _rate(self, name: str) -> float:
        if name == "copy":
            return machine.measure_copy(quick=self.quick)
        return machine.measure_matmul(name.removeprefix("matmul "), quick=self.quick)
