"""On this accelerator: are our numbers right, and then, how fast are we?

Parity comes first: value and gradients of every kernel, without options and with all,
at unaligned shapes, against float64 NumPy. Then what the design promises is timed, at
the shapes that it names: mean cross-entropy by every plan and kernel, statistics, rows
of softmaxes, samples; then parity of everything else, and the heads of real models,
until the budget is spent. What did not fit is named, and measured by the same command
again: a run goes on where the one before it stopped. On a CPU the same is done at small
shapes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

import jaxsoft
from benchmarks import (
    checks,
    choices,
    contest,
    discrete,
    heads,
    linear,
    peers,
    promises,
    softmax,
    truth,
    workloads,
)
from benchmarks.session import Session, Work
from benchmarks.workloads import Layout, LinearWorkload, SoftmaxWorkload
from jaxsoft._core.registry import Implementation

SUITE = "device"
DEFAULT_MINUTES = 8.0
# Seconds that a contender may take to compile and answer; a kernel that waits for
# itself never does.
PATIENCE = 120.0
# Seconds kept back to measure the rates again.
_RESERVE = 15.0
_PARITY = f"{SUITE} parity"

_W = TypeVar("_W", LinearWorkload, SoftmaxWorkload)

# Nothing divides these: N and V are primes, H is odd; and what kernels for GPUs ask of
# H, and of V in a kernel [H, V], with a last tile that is cut.
_UNALIGNED = LinearWorkload("unaligned", 131, 67, 5003)
_OF_KERNELS: dict[Layout, LinearWorkload] = {
    "vh": LinearWorkload("unaligned-vh", 131, 192, 5003),
    "hv": LinearWorkload("unaligned-hv", 257, 192, 5008),
}
_ROWS = SoftmaxWorkload("unaligned", 67, 4099)

# What is timed after the promises, the most telling first.
_TIMED_HEADS = ("llama3-8b", "qwen3-8b", "gemma2-2b", "gemma3-4b")
_TIMED_DECODING = ("llama3-8b-decode",)
_TIMED_ROWS = ("quack-131k", "mistral-7b")
_DECODING = tuple(w for w in workloads.HEADS if w not in workloads.LINEAR)
_TIMED_CASES = (
    *linear.MAIN_CASES,
    workloads.LinearCase(layout="vh", gradient=True),
)


def run(session: Session) -> None:
    """Checks, then times."""
    small = session.quick or session.platform == "cpu"
    session.reserve = _RESERVE
    note = "No accelerator: JAX sees the CPU, and shapes are small."
    if session.platform == "cpu" and note not in session.notes:
        session.notes.append(note)
    _check_kernels(session)
    if peers.OURS not in (faulty := _faulty(session)):
        promises.run(session, small=small, without=faulty)
    session.findings = list(promises.findings(session))
    _check_rest(session)
    # A quick run shows that everything works; of the heads, the promises did.
    if peers.OURS not in _faulty(session) and not session.quick:
        _time_rest(session, small)


def _faulty(session: Session) -> frozenset[str]:
    """Names of ours that failed a check."""
    return frozenset(
        result.name
        for result in session.results
        if result.ours
        and result.suite == _PARITY
        and result.status in ("wrong", "failed")
    )


def _check_kernels(session: Session) -> None:
    """Checks each kernel that is timed, in its dtype, without options and with all."""
    for layout, workload in _OF_KERNELS.items():
        titles = ("every option",) if session.quick else ("no option", "every option")
        _check_linear(session, workload, layout, titles)
        choices.check_layer(session, workload, layout, _PARITY)
    cases = softmax.MAIN_CASES[:2]
    softmax.run_workload(
        session, _ROWS, cases, _PARITY, timed=False, without=frozenset()
    )
    choices.check_rows(session, _ROWS, _PARITY)


def _check_options(session: Session) -> None:
    """Checks what has kernels with each option, and in its other dtypes."""
    for dtype in ("bfloat16", "float32"):
        for layout, workload in _OF_KERNELS.items():
            workload = dataclasses.replace(workload, dtype=dtype)
            titles = ("every option",)
            if dtype == "bfloat16":
                titles = ("temperature per token", "soft-cap")
            _check_linear(session, workload, layout, titles)
            if dtype == "float32":
                choices.check_layer(session, workload, layout, _PARITY)
    rows = dataclasses.replace(_ROWS, dtype="bfloat16")
    choices.check_rows(session, rows, _PARITY)
    choices.check_losses(session, rows, _PARITY)


def _check_rest(session: Session) -> None:
    """Checks the rest of what has kernels, and what none was written for."""
    if not session.quick:
        _check_options(session)
    for dtype in ("float32",) if session.quick else ("float32", "bfloat16"):
        _check_heads(session, dtype)
        _check_rows(session, softmax.ALL_CASES, dtype)
        if not session.quick:
            workload = dataclasses.replace(_UNALIGNED, dtype=dtype)
            for layout in ("hv", "vh"):
                _check_linear(session, workload, layout, ("every option",))
    discrete.run_workload(session, _ROWS, suite=_PARITY, timed=False)


def _check_rows(
    session: Session, cases: tuple[softmax.SoftmaxCase, ...], dtype: str = "float32"
) -> None:
    workload = dataclasses.replace(_ROWS, dtype=dtype)
    softmax.run_workload(session, workload, cases, _PARITY, timed=False)


def _time_rest(session: Session, small: bool) -> None:
    """Times the heads of real models, and what else is done with stored logits."""
    for head in _chosen(session, workloads.LINEAR, _TIMED_HEADS):
        head = head.quick() if small else head
        linear.run_workload(session, head, _TIMED_CASES, SUITE)
    for rows in _chosen(session, workloads.SOFTMAX, _TIMED_ROWS):
        rows = rows.quick() if small else rows
        softmax.run_workload(session, rows, softmax.MAIN_CASES, SUITE)
        discrete.run_workload(session, rows, suite=SUITE)
    for head in _chosen(session, _DECODING, _TIMED_DECODING):
        head = head.quick() if small else head
        heads.run_workload(session, head, heads.HEADS, SUITE)


def _chosen(
    session: Session, every: tuple[_W, ...], usual: tuple[str, ...]
) -> list[_W]:
    """The workloads to time, in order; a quick run takes the first."""
    by_name = {workload.name: workload for workload in every}
    names = session.workloads or usual
    found = [by_name[name] for name in names if name in by_name]
    return found[:1] if session.quick else found


def _check_heads(session: Session, dtype: str) -> None:
    """Checks what else is done with a layer; float32 products are not rounded."""
    workload = dataclasses.replace(_UNALIGNED, dtype=dtype)
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        heads.run_workload(session, workload, heads.HEADS, _PARITY, timed=False)
        pairs = heads.as_pairs(workload)
        heads.run_workload(session, pairs, heads.CONTRASTIVE, _PARITY, timed=False)


def _check_linear(
    session: Session, workload: LinearWorkload, layout: Layout, titles: Any
) -> None:
    arguments = workload.inputs(layout)
    every = _options(arguments[2], workload)
    for title in titles:
        case = _parity_case(workload, layout, arguments, title, every[title])
        contest.run_case(case, session)


def _parity_case(
    workload: LinearWorkload,
    layout: Layout,
    arguments: tuple[jax.Array, ...],
    title: str,
    options: truth.LinearOptions,
) -> contest.Case:
    hidden, kernel, labels = arguments
    case = workloads.LinearCase(layout=layout, gradient=True)
    subset = checks.Subset.of(workload.tokens, workload.classes)
    # An ignored token has a loss, of 0, and no entropy.
    live = labels != (-1 if options.ignore_label is None else options.ignore_label)

    def loss(implementation: Implementation | None) -> Callable[..., Any]:
        def call(hidden: Any, kernel: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
            mean, statistics = jaxsoft.linear_cross_entropy(
                hidden,
                kernel,
                labels,
                kernel_layout=layout,
                precision="highest" if workload.dtype == "float32" else None,
                return_statistics=True,
                implementation=implementation,
                **vars(options),
            )
            return mean, statistics.entropy

        return call

    def observe(outputs: Any) -> dict[str, Any]:
        (mean, entropy), gradients = outputs
        found = linear.observe((mean, *gradients), case=case, subset=subset)
        return found | {"entropy": (entropy * live)[subset.rows]}

    ours = peers.by_implementation(loss, xla=False)
    return contest.Case(
        suite=_PARITY,
        workload=workload.name,
        shape=linear.shape_of(workload),
        title=f"{case.title}, {title}",
        contenders=[*ours, peers.Contender("reference", loss("reference"))],
        prepare=functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True),
        arguments=arguments,
        truth=functools.partial(
            truth.linear_truth,
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            subset,
            options=options,
        ),
        observe=observe,
        baseline="reference",
        limit=checks.limit(workload.dtype, matmul=True, platform="cpu"),
        slack=checks.slack(workload.dtype),
        work=lambda _: Work(),
        timed=False,
    )


def _options(
    labels: jax.Array, workload: LinearWorkload
) -> dict[str, truth.LinearOptions]:
    """The options that change the arithmetic, alone and all together."""
    tokens, classes = workload.tokens, workload.classes
    keys = jax.random.split(jax.random.key(5), 4)
    bias = jax.random.normal(keys[0], (classes,), workload.dtype)
    per_token = jax.random.uniform(keys[1], (tokens,), minval=0.3, maxval=3.0)
    kept = jax.random.bernoulli(keys[2], 0.8, (classes,)).at[labels].set(True)
    weights = jax.random.uniform(keys[3], (tokens,))
    return {
        "no option": truth.LinearOptions(),
        "temperature per token": truth.LinearOptions(temperature=per_token),
        "soft-cap": truth.LinearOptions(logit_softcap=2.0),
        "every option": truth.LinearOptions(
            bias=bias,
            temperature=per_token,
            logit_softcap=3.0,
            class_mask=kept,
            label_smoothing=0.1,
            z_loss=1e-3,
            weights=weights,
            ignore_label=int(labels[0]),
        ),
    }
