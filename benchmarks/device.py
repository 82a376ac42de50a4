"""On this accelerator: are our numbers right, and then, how fast are we?

Parity comes first: value and gradients of every option, at unaligned shapes, against
the `reference` implementation and against float64 NumPy. Then the heads of real
models are timed until the budget is spent; what did not fit is named. On a CPU the
same is done at small shapes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax

import jaxsoft
from benchmarks import (
    checks,
    contest,
    discrete,
    heads,
    linear,
    peers,
    softmax,
    truth,
    workloads,
)
from benchmarks.session import Session, Work
from benchmarks.workloads import Layout, LinearWorkload, SoftmaxWorkload
from jaxsoft.implementation import Implementation

SUITE = "device"
DEFAULT_MINUTES = 4.0

_W = TypeVar("_W", LinearWorkload, SoftmaxWorkload)

# Nothing divides these: N and V are primes, H is odd.
_UNALIGNED = LinearWorkload("unaligned", 131, 67, 5003)
_ALIGNED = LinearWorkload("aligned", 128, 256, 8192)
_ROWS = SoftmaxWorkload("unaligned", 67, 4099)

# What is timed, the most telling first.
_TIMED_HEADS = ("llama3-8b", "qwen3-8b", "gemma2-2b", "liger-131k", "gemma3-4b")
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
    if session.platform == "cpu":
        session.notes.append("No accelerator: JAX sees the CPU, and shapes are small.")
    for dtype in ("float32", "bfloat16"):
        _check_linear(session, dtype)
        _check_heads(session, dtype)
        softmax.run_workload(
            session,
            dataclasses.replace(_ROWS, dtype=dtype),
            softmax.ALL_CASES,
            f"{SUITE} parity",
            timed=False,
        )
    discrete.run_workload(session, _ROWS, suite=f"{SUITE} parity", timed=False)
    if session.failed:
        return
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
        suite = f"{SUITE} parity"
        heads.run_workload(session, workload, heads.HEADS, suite, timed=False)
        pairs = heads.as_pairs(workload)
        heads.run_workload(session, pairs, heads.CONTRASTIVE, suite, timed=False)


def _check_linear(session: Session, dtype: str) -> None:
    for workload in (_UNALIGNED,) if session.quick else (_UNALIGNED, _ALIGNED):
        workload = dataclasses.replace(workload, dtype=dtype)
        for layout in ("hv", "vh"):
            arguments = workload.inputs(layout)
            every = _options(arguments[2], workload)
            for title in ("every option",) if session.quick else tuple(every):
                options = every[title]
                case = _parity_case(workload, layout, arguments, title, options)
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

    def loss(implementation: Implementation) -> Callable[..., jax.Array]:
        return functools.partial(
            jaxsoft.linear_cross_entropy,
            kernel_layout=layout,
            precision="highest" if workload.dtype == "float32" else None,
            implementation=implementation,
            **vars(options),
        )

    return contest.Case(
        suite=f"{SUITE} parity",
        workload=workload.name,
        shape=linear.shape_of(workload),
        title=f"{case.title}, {title}",
        contenders=[
            peers.Contender(peers.OURS, loss("xla")),
            peers.Contender("reference", loss("reference")),
        ],
        prepare=functools.partial(jax.value_and_grad, argnums=(0, 1)),
        arguments=arguments,
        truth=functools.partial(
            truth.linear_truth,
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            subset,
            options=options,
        ),
        observe=lambda outputs: linear.observe(
            (outputs[0], *outputs[1]), case=case, subset=subset
        ),
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
