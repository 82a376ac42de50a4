"""Softmax of stored logits at a temperature: no slower than without jaxsoft?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks import checks, contest, peers, truth, workloads
from benchmarks.session import Session, Work
from benchmarks.workloads import SoftmaxWorkload

SUITE = "softmax"

_TEMPERATURE = 0.7
_CHECKED_ROWS = 48

Temperature = Literal["float", "traced", "per row"]


@dataclasses.dataclass(frozen=True)
class SoftmaxCase:
    """What is asked of the softmax family.

    Attributes:
      operation: `"softmax"`, `"log_softmax"` or `"cross_entropy"`.
      temperature: a Python float, a traced scalar, or one traced number per row,
        whose gradient is then wanted too.
      gradient: whether the gradient of the logits is wanted.
      value: whether the value is.
      donated: whether outputs may overwrite logits and cotangent.
    """

    operation: str = "softmax"
    temperature: Temperature = "float"
    gradient: bool = False
    donated: bool = False
    value: bool = True

    @property
    def title(self) -> str:
        """The case in words."""
        temperature = {
            "float": f"T = {_TEMPERATURE}",
            "traced": "traced T",
            "per row": "traced T per row",
        }[self.temperature]
        wanted = " and ".join(["value"] * self.value + ["gradient"] * self.gradient)
        place = ", in place" if self.donated else ""
        return f"{self.operation}, {temperature}: {wanted}{place}"

    @property
    def passes(self) -> int:
        """Arrays of the logits' size that must be read or written."""
        if self.operation == "cross_entropy":
            return 2 if self.gradient else 1
        # The logits or the value; the cotangent and the gradient.
        return 1 + self.value + 2 * self.gradient


MAIN_CASES = (
    SoftmaxCase(),
    SoftmaxCase(gradient=True),
    SoftmaxCase(donated=True),
    SoftmaxCase(gradient=True, donated=True),
)
ALL_CASES = (
    *MAIN_CASES,
    SoftmaxCase(temperature="traced"),
    SoftmaxCase(temperature="traced", gradient=True),
    SoftmaxCase(temperature="per row", gradient=True),
    SoftmaxCase("log_softmax"),
    SoftmaxCase("log_softmax", gradient=True),
    SoftmaxCase("cross_entropy"),
    SoftmaxCase("cross_entropy", gradient=True),
)


def run(session: Session) -> None:
    """Runs every case at every workload."""
    chosen = workloads.select(
        workloads.SOFTMAX,
        session.workloads,
        platform=session.platform,
        quick=session.quick,
    )
    for workload in chosen:
        run_workload(session, workload, ALL_CASES)


def run_workload(
    session: Session,
    workload: SoftmaxWorkload,
    cases: tuple[SoftmaxCase, ...],
    suite: str = SUITE,
    *,
    timed: bool = True,
    without: frozenset[str] | None = None,
) -> None:
    """Checks and times cases at one shape.

    Args:
      session: where the results go.
      workload: the shape.
      cases: what is asked.
      suite: the question that the results answer.
      timed: whether they are timed once checked.
      without: who is left out of all implementations, and of peers where they are
        timed; None takes our default and the plain formula alone.
    """
    if timed:
        session.measure("copy")
    for case in _cases(workload, cases, suite, timed, without):
        contest.run_case(case, session)


def _cases(
    workload: SoftmaxWorkload,
    cases: tuple[SoftmaxCase, ...],
    suite: str,
    timed: bool,
    without: frozenset[str] | None,
) -> Iterator[contest.Case]:
    logits, labels, cotangent = workload.inputs()
    subset = checks.Subset.of(workload.rows, 1, _CHECKED_ROWS)
    limit = checks.limit(workload.dtype, matmul=False, platform="cpu")
    for case in cases:
        temperature = {
            "float": None,
            "traced": jnp.float32(_TEMPERATURE),
            "per row": jnp.linspace(0.5, 2.0, workload.rows)[:, None],
        }[case.temperature]
        arguments = (logits, labels, temperature, cotangent)
        yield contest.Case(
            suite=suite,
            workload=workload.name,
            shape={"N": workload.rows, "V": workload.classes, "dtype": workload.dtype},
            title=case.title,
            contenders=_contenders(case, without, timed),
            prepare=functools.partial(_prepare, case=case),
            arguments=arguments,
            truth=functools.partial(_truth, case, arguments, subset),
            observe=functools.partial(_observe, case=case, subset=subset),
            baseline="optax" if case.operation == "cross_entropy" else "jax.nn",
            limit=limit,
            slack=checks.slack(workload.dtype),
            work=lambda _, case=case: Work(bytes=case.passes * workload.logits_bytes),
            donated=_donated(case),
            timed=timed,
        )


def _contenders(
    case: SoftmaxCase, without: frozenset[str] | None, timed: bool
) -> list[peers.Contender]:
    usual = peers.softmax_contenders(case.operation)
    if without is None:
        return usual
    every = [*peers.softmax_implementations(without), *usual[1:]]
    if not timed:
        return every
    return [
        *every,
        *peers.softmax_of_torch(_TEMPERATURE, value=case.value, gradient=case.gradient),
    ]


def _donated(case: SoftmaxCase) -> tuple[int, ...]:
    if not case.donated:
        return ()
    return (0, 3) if case.gradient else (0,)


def _prepare(function: Callable[..., Any], case: SoftmaxCase) -> Callable[..., Any]:
    """Makes `f(logits, labels, temperature, cotangent)` of a function."""

    def value(logits: Any, labels: Any, temperature: Any, _: Any) -> Any:
        chosen = _TEMPERATURE if temperature is None else temperature
        return function(logits, labels, chosen)

    def value_and_gradient(
        logits: Any, labels: Any, temperature: Any, cotangent: Any
    ) -> Any:
        if case.temperature == "per row":
            outputs, pull = jax.vjp(
                lambda x, t: function(x, labels, t), logits, temperature
            )
        else:
            outputs, pull = jax.vjp(
                lambda x: value(x, labels, temperature, cotangent), logits
            )
        if case.operation == "cross_entropy":
            cotangent = jnp.ones_like(outputs)
        return (outputs,) * case.value + pull(cotangent)

    return value_and_gradient if case.gradient else value


def _truth(
    case: SoftmaxCase, arguments: tuple[Any, ...], subset: checks.Subset
) -> checks.Truth:
    logits, labels, temperature, cotangent = arguments
    if temperature is None:
        temperature = _TEMPERATURE
    elif case.temperature == "per row":
        temperature = temperature[subset.rows]
    return truth.softmax_truth(
        logits[subset.rows], labels[subset.rows], temperature, cotangent[subset.rows]
    )


def _observe(outputs: Any, case: SoftmaxCase, subset: checks.Subset) -> dict[str, Any]:
    names = ("d" + case.operation, "dtemperature")
    if case.value:
        names = (case.operation, *names)
    found = outputs if case.gradient else (outputs,)
    return {n: a[subset.rows] for n, a in zip(names, found, strict=False)}
