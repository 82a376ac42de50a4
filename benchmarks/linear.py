"""Linear cross-entropy: how fast without stored logits, and in how much memory?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import asked, checks, contest, peers, truth, workloads
from benchmarks.session import Session, Work
from benchmarks.workloads import MIB, LinearCase, LinearWorkload

SUITE = "linear"

# A tile, an eighth and a half of the logits of the first workload, and all of them.
_WORKSPACES = tuple(mebibytes * MIB for mebibytes in (16, 64, 256, 512))

# Where the truth of every token costs more than this, fewer tokens are checked.
_TRUTH_FLOPS = 2e11
_TEMPERATURE = 0.7

MAIN_CASES = (LinearCase(), LinearCase(gradient=True))
ALL_CASES = (
    LinearCase(),
    LinearCase(gradient=True, workspaces=_WORKSPACES),
    LinearCase(reduction="none"),
    LinearCase(reduction="none", gradient=True),
    LinearCase(layout="vh"),
    LinearCase(layout="vh", gradient=True, workspaces=_WORKSPACES),
    LinearCase(temperature=True),
    LinearCase(temperature=True, gradient=True),
)
_GRADIENTS = (
    LinearCase(gradient=True),
    LinearCase(layout="vh", gradient=True),
)


def run(session: Session) -> None:
    """Runs every case of the first workload, and the mean of the others."""
    select = functools.partial(
        workloads.select,
        names=session.workloads,
        platform=session.platform,
        quick=session.quick,
    )
    for position, workload in enumerate(select(workloads.LINEAR)):
        run_workload(session, workload, MAIN_CASES if position else ALL_CASES)
    for workload in select(workloads.LAYERS):
        run_workload(session, workload, _GRADIENTS)
    session.findings += asked.findings(session, SUITE)


def run_workload(
    session: Session,
    workload: LinearWorkload,
    cases: tuple[LinearCase, ...],
    suite: str = SUITE,
) -> None:
    """Checks and times cases at one shape.

    Args:
      session: where the results go.
      workload: the shape.
      cases: what is asked.
      suite: the question that the results answer.
    """
    session.measure(f"matmul {workload.dtype}")
    for layout in ("hv", "vh"):
        wanted = [case for case in cases if case.layout == layout]
        if wanted:
            arguments = workload.inputs(layout)
            for case in make_cases(session, workload, arguments, wanted, suite):
                contest.run_case(case, session)


def make_cases(
    session: Session,
    workload: LinearWorkload,
    inputs: tuple[jax.Array, ...],
    wanted: Sequence[LinearCase],
    suite: str,
) -> Iterator[contest.Case]:
    """Makes cases at one shape, of one layout.

    Args:
      session: that will run them.
      workload: the shape.
      inputs: hidden, kernel and labels.
      wanted: what is asked.
      suite: the question that the results answer.

    Yields:
      A case for each that is wanted.
    """
    hidden, kernel, labels = inputs
    cotangent = jax.random.normal(jax.random.key(3), labels.shape)
    affordable = int(_TRUTH_FLOPS * workload.tokens / workload.matmul_flops)
    tokens = max(1, min(workload.tokens, affordable))
    subset = checks.Subset.of(tokens, workload.classes)

    def arguments(case: LinearCase, rows: int) -> tuple[Any, ...]:
        temperature = jnp.float32(_TEMPERATURE) if case.temperature else None
        return (hidden[:rows], kernel, labels[:rows], temperature, cotangent[:rows])

    @functools.cache
    def known(case: LinearCase) -> checks.Truth:
        return _truth(case, arguments(case, tokens), subset)

    for case in wanted:
        yield contest.Case(
            suite=suite,
            workload=workload.name,
            shape=shape_of(workload),
            title=case.title,
            contenders=peers.linear_contenders(case, workload),
            prepare=functools.partial(prepare, case=case),
            arguments=arguments(case, workload.tokens),
            truth=functools.partial(
                known, dataclasses.replace(case, gradient=True, workspaces=())
            ),
            observe=functools.partial(observe, case=case, subset=subset),
            baseline="optax",
            limit=checks.limit(workload.dtype, matmul=True, platform=session.platform),
            slack=checks.slack(workload.dtype),
            work=functools.partial(_work, case=case, workload=workload),
            check_arguments=(
                arguments(case, tokens) if tokens < workload.tokens else None
            ),
        )


def shape_of(workload: LinearWorkload) -> dict[str, Any]:
    """Sizes and dtype by letter."""
    return {
        "N": workload.tokens,
        "H": workload.features,
        "V": workload.classes,
        "dtype": workload.dtype,
    }


def prepare(loss: Callable[..., Any], case: LinearCase) -> Callable[..., Any]:
    """Makes `f(hidden, kernel, labels, temperature, cotangent)` of a loss."""

    def value(hidden: Any, kernel: Any, labels: Any, temperature: Any, _: Any) -> Any:
        return loss(hidden, kernel, labels, temperature)

    def value_and_gradient(
        hidden: Any, kernel: Any, labels: Any, temperature: Any, cotangent: Any
    ) -> Any:
        losses, pull = jax.vjp(
            lambda h, k: loss(h, k, labels, temperature), hidden, kernel
        )
        upstream = jnp.ones_like(losses) if losses.ndim == 0 else cotangent
        return losses, *pull(upstream.astype(losses.dtype))

    return value_and_gradient if case.gradient else value


def _work(
    contender: peers.Contender, case: LinearCase, workload: LinearWorkload
) -> Work:
    passes = contender.gradient_matmuls if case.gradient else 1
    return Work(flops=round(passes * workload.matmul_flops), dtype=workload.dtype)


def _truth(
    case: LinearCase, arguments: tuple[Any, ...], subset: checks.Subset
) -> checks.Truth:
    hidden, kernel, labels, temperature, cotangent = arguments
    return truth.linear_truth(
        hidden,
        kernel if case.layout == "hv" else kernel.T,
        labels,
        subset,
        options=truth.LinearOptions(
            temperature=1.0 if temperature is None else temperature
        ),
        cotangent=None if case.reduction == "mean" else cotangent,
    )


def observe(outputs: Any, case: LinearCase, subset: checks.Subset) -> dict[str, Any]:
    """Picks what is compared with the truth.

    Args:
      outputs: the loss, or a tuple of the loss and its two gradients.
      case: what was computed.
      subset: which rows and classes of it.

    Returns:
      The outputs under the names that the truth gives them.
    """
    losses, *gradients = outputs if case.gradient else (outputs,)
    if case.reduction == "mean":
        observed = {"mean": losses}
    else:
        observed = {"loss": losses[subset.rows]}
    if gradients:
        dhidden, dkernel = gradients
        observed["dhidden"] = dhidden[subset.rows]
        observed["dkernel"] = (
            dkernel[:, subset.classes]
            if case.layout == "hv"
            else dkernel[subset.classes].T
        )
    return observed
