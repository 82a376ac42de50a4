"""One case: check every contender, then time those that are right, by turns."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from benchmarks import checks, machine, peers, timing
from benchmarks.session import Result, Session, Work, floor_seconds, key_of

# What compiling, checking and warming up one contender may take, for the budget.
_SECONDS_PER_CONTENDER = 4.0
# Programs run below the machine's best rate: an estimate, for the budget alone.
_USUAL_EFFICIENCY = 0.4
_SPARE_MEMORY = 1.1
_NOTE = "Some times are by the host's clock: the trace of the device lacks samples."


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked, of whom, and what the answer is.

    Attributes:
      suite: the question.
      workload: the model's name.
      shape: its sizes and dtype, by letter.
      title: what was asked, in words.
      contenders: ours first; those that cannot take part say why.
      prepare: turns a contender's function into what is compiled.
      arguments: of the timed programs.
      truth: computes what the checked outputs should be.
      observe: picks the checked outputs, by the truth's names.
      baseline: whose time is the unit, and whose error ours must not exceed.
      limit: the largest error that any contender may have.
      slack: what our error may exceed the baseline's by.
      work: the physical minimum of a contender.
      donated: positions of the arguments that outputs may overwrite.
      check_arguments: fewer rows, where the truth of all of them costs too much;
        None checks what the timed programs return.
      timed: whether the right ones are timed.
      part: who does a part of the work that nobody can do without, as a second
        unit of time; empty where nobody does.
      swept: the letter of a size that differs from case to case, where cases are
        points of one curve.
    """

    suite: str
    workload: str
    shape: dict[str, Any]
    title: str
    contenders: list[peers.Contender]
    prepare: Callable[[Callable[..., Any]], Callable[..., Any]]
    arguments: tuple[Any, ...]
    truth: Callable[[], checks.Truth]
    observe: Callable[[Any], Mapping[str, Any]]
    baseline: str
    limit: float
    slack: float
    work: Callable[[peers.Contender], Work]
    donated: tuple[int, ...] = ()
    check_arguments: tuple[Any, ...] | None = None
    timed: bool = True
    part: str = ""
    swept: str = ""

    @property
    def key(self) -> Any:
        """What tells it from other cases."""
        return key_of(self.suite, self.workload, self.shape, self.title)

    def result(self, contender: peers.Contender, status: str, **details: Any) -> Result:
        """A contender's result in this case."""
        return Result(
            self.suite,
            self.workload,
            self.shape,
            self.title,
            contender.name,
            status,
            ours=contender.ours or contender.name == peers.OURS,
            swept=self.swept,
            **details,
        )


def run_case(case: Case, session: Session) -> None:
    """Checks, times and records one case, unless an earlier run has done so.

    Args:
      case: what is asked.
      session: where the results go.
    """
    if session.known(case.key).keys() >= {c.name for c in case.contenders}:
        return
    failures = session.forget(case.key)
    present = []
    for contender in case.contenders:
        if contender.name in failures:
            continue
        if contender.absent:
            result = case.result(contender, "not run", reason=contender.absent)
            session.add(result)
        else:
            present.append(contender)
    if reason := out_of_time(map(case.work, present), session):
        for contender in present:
            session.add(case.result(contender, "skipped", reason=reason))
        return
    session.step()
    truth = case.truth()
    outcomes = {}
    for contender in present:
        outcome = _check(case, contender, truth, session)
        outcomes[contender.name] = outcome
        if outcome.status == "failed" and session.guarded and not machine.healthy():
            # What failed took the device's memory with it.
            _record(case, session, contender, outcome, {})
            session.restart()
    _compare_with_plain(case, outcomes, truth)
    timings = _time(case, present, outcomes, session)
    for contender in present:
        _record(case, session, contender, outcomes[contender.name], timings)
    session.step()


def _time(
    case: Case,
    present: list[peers.Contender],
    outcomes: dict[str, "_Outcome"],
    session: Session,
) -> dict[str, timing.Timing]:
    """Times those that are right, for as long as there is time."""
    able = [c for c in present if not outcomes[c.name].status]
    if not case.timed or not able:
        return {}
    once = sum(outcomes[contender.name].seconds for contender in able)
    least = once * (1 + min(session.rounds, timing.FEWEST_ROUNDS))
    if least > session.seconds_left():
        for contender in able:
            outcomes[contender.name].status = "skipped"
            outcomes[contender.name].reason = _needs(least)
        return {}
    named = {contender.name: case.result(contender, "running") for contender in able}
    programs: list[timing.Program] = []
    for contender in able:
        program = outcomes[contender.name].program
        assert program is not None
        programs.append(program)
    session.step(*named.values())
    timings = timing.interleave(
        programs,
        case.arguments,
        session.rounds,
        min(session.case_seconds, max(session.seconds_left() - once, 0)),
        before=lambda name: session.turn(named[name]),
    )
    clocks = {measured.clock for measured in timings.values()}
    if clocks == {"host"} and session.platform != "cpu" and _NOTE not in session.notes:
        session.notes.append(_NOTE)
    return timings


@dataclasses.dataclass
class _Outcome:
    """Where a contender stands before it is timed; no status means that it may be."""

    program: timing.Program | None = None
    status: str = ""
    reason: str = ""
    outputs: Mapping[str, Any] | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def _check(
    case: Case, contender: peers.Contender, truth: checks.Truth, session: Session
) -> _Outcome:
    """Compiles a contender, runs it once and compares what it returns."""
    outcome = _Outcome()
    if reason := out_of_time([case.work(contender)], session):
        outcome.status, outcome.reason = "skipped", reason
        return outcome
    session.step(case.result(contender, "running"))
    try:
        outcome.program = _program(case, contender, case.arguments, case.donated)
        if reason := too_large(outcome.program):
            outcome.status, outcome.reason = "not run", reason
            return outcome
        checked, arguments = outcome.program, case.arguments
        if case.check_arguments is not None:
            arguments = case.check_arguments
            checked = _program(case, contender, arguments)
            # Fails here, if it must.
            outcome.seconds = timing.call(outcome.program, case.arguments)[1]
        outputs, seconds = timing.call(checked, arguments)
        outcome.seconds = outcome.seconds or seconds
        observe = contender.observe or case.observe
        observed = jax.device_get(dict(observe(outputs)))
    except NotImplementedError as error:
        # Whether our default is there for all, the tests of the library ask.
        outcome.status = "failed" if contender.name == peers.OURS else "not run"
        outcome.reason = str(error).strip()[:300]
        return outcome
    except Exception as error:  # A contender's failure is a result, not ours to raise.
        outcome.status = "failed"
        outcome.reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return outcome
    verdict = checks.judge(observed, truth, absolute=case.limit)
    outcome.outputs, outcome.errors = observed, verdict.errors
    if not verdict.correct:
        outcome.status, outcome.reason = "wrong", "; ".join(verdict.faults)
    return outcome


def _program(
    case: Case,
    contender: peers.Contender,
    arguments: tuple[Any, ...],
    donated: tuple[int, ...] = (),
) -> timing.Program:
    if contender.program:
        return contender.program(arguments)
    assert contender.function is not None
    function = case.prepare(contender.function)
    return timing.compile_program(contender.name, function, arguments, donated)


def _compare_with_plain(
    case: Case, outcomes: dict[str, _Outcome], truth: checks.Truth
) -> None:
    """Holds ours to the error of the plain formula, where both were checked."""
    ours, plain = outcomes.get(peers.OURS), outcomes.get(case.baseline)
    if ours is None or ours.outputs is None or plain is None or not plain.errors:
        return
    verdict = checks.judge(
        ours.outputs, truth, absolute=case.limit, plain=plain.errors, slack=case.slack
    )
    if not verdict.correct:
        ours.status, ours.reason = "wrong", "; ".join(verdict.faults)


def _record(
    case: Case,
    session: Session,
    contender: peers.Contender,
    outcome: _Outcome,
    timings: dict[str, timing.Timing],
) -> None:
    measured, unit = timings.get(contender.name), timings.get(case.baseline)
    part = timings.get(case.part)
    session.add(
        case.result(
            contender,
            outcome.status or ("timed" if measured else "right"),
            reason=outcome.reason,
            errors=outcome.errors,
            timing=measured,
            ratio=timing.paired_ratio(measured, unit) if measured and unit else None,
            baseline=case.baseline if unit else "",
            part_ratio=timing.paired_ratio(measured, part)
            if measured and part
            else None,
            part=case.part if part else "",
            # What a result keeps does not hold the memory of a state.
            program=outcome.program and outcome.program.without_state(),
            work=case.work(contender),
        )
    )


def too_large(program: timing.Program) -> str:
    """Says so where a program needs more memory than there is; empty where not."""
    available = machine.available_bytes()
    if available is None or program.temporary_bytes is None:
        return ""
    needed = program.temporary_bytes + (program.output_bytes or 0)
    needed += program.state_bytes
    if needed * _SPARE_MEMORY <= available:
        return ""
    return f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"


def out_of_time(works: Iterable[Work], session: Session) -> str:
    """Says so where the run's budget does not allow what must be done.

    Args:
      works: what each contender cannot do without.
      session: with the machine's rates, as far as they were measured.

    Returns:
      A reason, empty where there is time enough.
    """
    seconds = 0.0
    for work in works:
        each = (floor_seconds(work, session.rates()) or 0.0) / _USUAL_EFFICIENCY
        # The rounds, one warm-up and one check.
        seconds += _SECONDS_PER_CONTENDER + 2 * each
        seconds += min(session.rounds * each, max(session.case_seconds, 5 * each))
    if seconds <= session.seconds_left():
        return ""
    return _needs(seconds)


def _needs(seconds: float) -> str:
    return f"needs about {seconds:.0f} s, more than is left"
