"""One run of the suites: its settings, its machine, and the results so far."""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from benchmarks import machine, watch
from benchmarks.timing import Program, Timing

SCHEMA = 1

# A slow case takes fewer rounds than a fast one, unless a number was asked for.
_CASE_SECONDS = 30.0
# What a rate keeps from the start of an undisturbed run to its end.
_STEADY = 0.85
# What must be the same for a run to go on where another stopped.
_SAME = (
    "platform",
    "device",
    "device_count",
    "runtime",
    "driver",
    "versions",
    "commit",
    "source_sha256",
)
_ENDED = "the process ended while it ran"


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
        `"failed"`, it raised; `"not run"`, it cannot take part; `"skipped"`, there was
        no time; `"running"`, where the process was ended meanwhile.
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

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its case from others."""
        return key_of(self.suite, self.workload, self.shape, self.case)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Result":
        """The result that a record was made of; its program is gone."""
        given = dict(record)
        given.pop("floor_seconds")
        seconds, work = given.pop("seconds"), given["work"]
        compiling, *sizes = (
            given.pop(name)
            for name in ("compile_seconds", "temporary_bytes", "output_bytes")
        )
        if seconds:
            given["timing"] = Timing(**seconds | {"samples": tuple(seconds["samples"])})
        if compiling is not None:
            program = Program(given["name"], lambda: None, compiling, *sizes)
            given["program"] = program.without_state()
        given["work"] = Work(**work) if work else None
        given["errors"] = {
            output: math.inf if error is None else error
            for output, error in given["errors"].items()
        }
        return cls(**given)

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
            "ours": self.ours,
            "work": dataclasses.asdict(self.work) if self.work else None,
        }


def key_of(suite: str, workload: str, shape: dict[str, Any], case: str) -> Any:
    """What tells a case from others."""
    return suite, workload, json.dumps(shape, sort_keys=True), case


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
        # What is kept back of the time to measure the rates again.
        self.reserve = 0.0
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._earlier: dict[Any, dict[str, Result]] = {}
        self._watch: watch.Watch | None = None
        self._running: list[Result] = []
        self._path = path
        self._show = show
        self._started = machine.now()
        self._finished: str | None = None
        self._machine = machine.describe()
        self._rates: dict[str, list[float]] = {}
        self._measured: set[str] = set()
        self._runs: list[str] = [self._started]
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
            if name not in self._measured:
                rate = self._rate(name)
                self._rates.setdefault(name, []).append(rate)
                self._measured.add(name)

    def seconds_left(self) -> float:
        """Until the budget is spent; infinite where there is none."""
        if self._deadline is None:
            return float("inf")
        return self._deadline - self.reserve - time.monotonic()

    def add(self, result: Result) -> None:
        """Keeps a result, shows it and saves all of them."""
        self._running = [r for r in self._running if not _alike(r, result)]
        self.results.append(result)
        if self._show:
            self._show(result)
        self.save()

    def resume(self, document: Mapping[str, Any]) -> None:
        """Takes over what an earlier run saved.

        Args:
          document: as `document` makes it.

        Raises:
          ValueError: if that run was of another device, version, commit or size.
        """
        was = document["machine"] | {"quick": document["quick"]}
        now = json.loads(json.dumps(self._machine)) | {"quick": self.quick}
        if other := [name for name in (*_SAME, "quick") if was[name] != now[name]]:
            raise ValueError(
                f"has results of another {' and '.join(other)}: name another file"
            )
        self.results = [Result.of(record) for record in document["results"]]
        for place, result in enumerate(self.results):
            if result.status == "running":
                self.results[place] = dataclasses.replace(
                    result, status="failed", reason=_ENDED
                )
        for result in self.results:
            self._earlier.setdefault(result.key, {})[result.name] = result
        self._rates = {n: list(v) for n, v in document["rates_per_second"].items()}
        self._measured = set()
        self.notes = [*document["notes"], *self.notes]
        self._started = document["started"]
        self._runs = [*document["runs"], *self._runs]

    def known(self, key: Any) -> dict[str, Result]:
        """The results of a case that an earlier run ended with, by contender."""
        found = self._earlier.get(key, {})
        return {name: r for name, r in found.items() if r.status != "skipped"}

    def forget(self, key: Any) -> set[str]:
        """Drops an earlier run's results of a case, but for failures.

        Returns:
          The names of the contenders that failed.
        """
        old = self._earlier.pop(key, {})
        failures = {name for name, r in old.items() if r.status == "failed"}
        drop = [r for name, r in old.items() if name not in failures]
        self.results = [
            result for result in self.results if not any(result is r for r in drop)
        ]
        return failures

    def guard(self, seconds: float) -> None:
        """Has this process end, to be started again, where a step takes longer.

        Args:
          seconds: that a step may take: to compile and run a contender, say.
        """
        end = math.inf if self._deadline is None else self._deadline
        self._watch = watch.Watch(seconds, end, self._give_up)

    def step(self, *results: Result) -> None:
        """Says what runs from now on; a process that is ended leaves it in the file.

        Args:
          *results: what is known of it.
        """
        self._running = list(results)
        if self._watch is not None:
            self._watch.step()
            self.save()

    def turn(self, result: Result) -> None:
        """Says which of those that run has its turn: it is who does not end."""
        self._running = [result]

    @property
    def guarded(self) -> bool:
        """Whether this process is started again when it ends itself."""
        return self._watch is not None

    def restart(self) -> NoReturn:
        """Ends this process, to be started again where it stopped."""
        self.save()
        watch.leave()

    def _give_up(self, spent: bool) -> int:
        """Keeps what is known where a step has taken too long; the exit code."""
        status = "skipped" if spent else "failed"
        reason = "needs more time than is left" if spent else "did not end in time"
        for result in self._running:
            self.results.append(
                dataclasses.replace(result, status=status, reason=reason)
            )
        self._running = []
        self.save()
        return int(self.failed) if spent else watch.AGAIN

    def finish(self) -> dict[str, Any]:
        """Measures the rates once more and saves.

        Returns:
          The document that was saved.
        """
        self._running = []
        for name, values in self._rates.items():
            if name in self._measured:
                values.append(self._rate(name))
            if min(values) < _STEADY * max(values) and not self.quick:
                self.notes.append(
                    f"Disturbed: {name} ran at {min(values) / max(values):.0%} of its "
                    "rate at the other end of the run."
                )
        self._finished = machine.now()
        if self._watch is not None:
            self._watch.stop()
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
            "runs": self._runs,
            "machine": self._machine,
            "notes": self.notes,
            "rates_per_second": self._rates,
            "results": [
                result.record(rates) for result in (*self.results, *self._running)
            ],
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
        self.step()
        if name == "copy":
            return machine.measure_copy(quick=self.quick)
        return machine.measure_matmul(name.removeprefix("matmul "), quick=self.quick)


def _alike(one: Result, other: Result) -> bool:
    return one.name == other.name and one.key == other.key
