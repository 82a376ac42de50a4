"""What the design promises of an accelerator, at the shapes that it names.

Every implementation of ours that runs on the platform, what JAX has without us, and the
packages of PyTorch that are installed. Truth is float32 on the device, with products
that are exact, in blocks of rows: a few rows and classes of the whole problem.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft
from benchmarks import checks, contest, heads_truth, linear, passes, peers, softmax
from benchmarks.session import Finding, Result, Session, Work
from benchmarks.workloads import (
    MIB,
    Layout,
    LinearCase,
    LinearWorkload,
    SoftmaxWorkload,
)
from jaxsoft._core.registry import Implementation

SUITE = "promises"

STATISTICS = LinearWorkload("liger-131k-forward", 4096, 4096, 131072)
LOSS = LinearWorkload("liger-131k", 8192, 4096, 131072)
# Beside the default, which takes a chunk of tokens after another: tiles of which hardly
# anything is kept; and one chunk of all tokens.
WORKSPACES = (128 * MIB, 4608 * MIB)
ROWS = SoftmaxWorkload("quack-131k", 16384, 131072)
SAMPLES = tuple(
    LinearWorkload(f"qwen3-8b-decode-{tokens}", tokens, 4096, 151936)
    for tokens in (1, 8, 64)
)
_SOFTMAX = (
    softmax.SoftmaxCase(),
    softmax.SoftmaxCase(gradient=True, value=False),
)

MATMUL, READ, STORED, SAMPLE = "matmul", "one read", "jax.nn", "sample"
_BLOCK_ROWS = 256
# The targets, on an H100.
_TARGET = "H100"
_RATE, _BANDWIDTH, _READS, _SECONDS, _MEMORY = 0.9, 0.9, 1.1, 0.042, 0.15


def run(session: Session, *, small: bool, without: frozenset[str]) -> None:
    """Checks and times everything that is promised.

    Args:
      session: where the results go.
      small: whether sizes are cut to take milliseconds.
      without: names of contenders that were found faulty.
    """
    of_layer: list[tuple[LinearWorkload, Layout, Callable[..., contest.Case]]] = [
        (LOSS, "vh", _loss),
        (STATISTICS, "hv", _statistics),
    ]
    later: list[Any] = [(LOSS, "hv", _loss), (STATISTICS, "vh", _statistics)]
    _run_layers(session, of_layer, small, without)
    rows = ROWS.quick() if small else ROWS
    softmax.run_workload(session, rows, _SOFTMAX, SUITE, without=without)
    for workload in SAMPLES[:1] if session.quick else SAMPLES:
        workload = workload.quick() if small else workload
        _run_case(session, workload, "hv", _sample, without)
    if not session.quick:
        _run_layers(session, later, small, without)


def _run_layers(session, asked, small, without) -> None:
    for workload, layout, make in asked:
        workload = workload.quick() if small else workload
        _run_case(session, workload, layout, make, without)


def _run_case(session, workload, layout, make, without) -> None:
    """Runs one case; its arrays are gone before the next is made."""
    session.step()
    session.measure("copy", f"matmul {workload.dtype}")
    case = make(session, workload, layout)
    left = [each for each in case.contenders if each.name not in without]
    contest.run_case(dataclasses.replace(case, contenders=left), session)


def _statistics(
    session: Session, workload: LinearWorkload, layout: Layout
) -> contest.Case:
    hidden, kernel, labels = arguments = workload.inputs(layout)
    subset = checks.Subset.of(workload.tokens, workload.classes)

    def ours(implementation: Implementation | None) -> Callable[..., Any]:
        def call(hidden: Any, kernel: Any, labels: Any) -> dict[str, jax.Array]:
            found = jaxsoft.linear_statistics(
                hidden,
                kernel,
                labels,
                kernel_layout=layout,
                implementation=implementation,
            )
            return {
                "lse": found.lse,
                "log_prob": found.log_prob,
                "entropy": found.entropy,
            }

        return call

    def stored(hidden: Any, kernel: Any, labels: Any) -> dict[str, jax.Array]:
        return _of_logits(_product(hidden, kernel, layout), labels)

    def multiply(hidden: Any, kernel: Any, labels: Any) -> dict[str, jax.Array]:
        del labels
        return {"products": _product(hidden, kernel, layout)}

    known = functools.cache(
        lambda: _truth(hidden, kernel, labels, layout, subset, gradient=False)
    )

    def observe(outputs: dict[str, jax.Array]) -> dict[str, Any]:
        found = {name: array[subset.rows] for name, array in outputs.items()}
        if "products" in found:
            found["products"] = found["products"][:, subset.classes]
        return found

    return contest.Case(
        **_shared(session, workload),
        title=f"statistics, {_shape(layout)}",
        contenders=[
            *peers.by_implementation(ours),
            peers.Contender(STORED, stored),
            peers.Contender(MATMUL, multiply),
        ],
        prepare=lambda function: function,
        arguments=arguments,
        truth=known,
        observe=observe,
        baseline=STORED,
        part=MATMUL,
        work=lambda _: Work(flops=workload.matmul_flops, dtype=workload.dtype),
    )


def _loss(session: Session, workload: LinearWorkload, layout: Layout) -> contest.Case:
    hidden, kernel, labels = workload.inputs(layout)
    subset = checks.Subset.of(workload.tokens, workload.classes)
    case = LinearCase(layout=layout, gradient=True, workspaces=WORKSPACES)

    def ours(implementation: Implementation | None) -> Callable[..., Any]:
        return lambda hidden, kernel, labels, temperature: jaxsoft.linear_cross_entropy(
            hidden,
            kernel,
            labels,
            kernel_layout=layout,
            implementation=implementation,
        )

    def matmuls(implementation: Implementation | None) -> float:
        return passes.cross_entropy(
            workload, implementation=implementation, reduced=True
        )

    every = peers.linear_contenders(case, workload)
    return contest.Case(
        **_shared(session, workload),
        title=case.title,
        contenders=[
            *peers.by_implementation(ours, gradient_matmuls=matmuls),
            *(contender for contender in every if contender.name != peers.OURS),
        ],
        prepare=functools.partial(linear.prepare, case=case),
        arguments=(hidden, kernel, labels, None, jnp.ones(labels.shape)),
        truth=lambda: _truth(hidden, kernel, labels, layout, subset, gradient=True),
        observe=functools.partial(linear.observe, case=case, subset=subset),
        baseline="optax",
        work=lambda contender: Work(
            flops=round(contender.gradient_matmuls * workload.matmul_flops),
            dtype=workload.dtype,
        ),
    )


def _sample(session: Session, workload: LinearWorkload, layout: Layout) -> contest.Case:
    hidden, kernel, _ = workload.inputs(layout)

    def ours(implementation: Implementation | None) -> Callable[..., Any]:
        return lambda key, hidden, kernel: jaxsoft.linear_sample(
            key, hidden, kernel, implementation=implementation
        )

    def stored(key: Any, hidden: Any, kernel: Any) -> jax.Array:
        logits = _product(hidden, kernel, layout).astype(jnp.float32)
        return jax.random.categorical(key, logits)

    def read(key: Any, hidden: Any, kernel: Any) -> jax.Array:
        del key, hidden
        return jnp.max(kernel)

    @functools.cache
    def known() -> dict[str, Any]:
        logits = _exact(hidden, kernel, layout)
        every = heads_truth.log_probs(np.asarray(logits, np.float64))
        largest = np.asarray(kernel.max(), np.float64)
        uniform = heads_truth.uniform_grid(workload.tokens)
        return {"every": every, "largest": largest} | uniform

    # As in `heads_cases`; of a single sample it asks little.
    limit = 3 / workload.tokens**0.5
    size = workload.features * workload.classes * jnp.dtype(workload.dtype).itemsize
    return contest.Case(
        **_shared(session, workload) | {"limit": limit, "slack": limit},
        title=f"{SAMPLE}, {_shape(layout)}",
        contenders=[
            *peers.by_implementation(ours),
            peers.Contender("jax.random", stored),
            peers.Contender(READ, read, observe=lambda found: {"largest": found}),
        ],
        prepare=lambda function: function,
        arguments=(jax.random.key(5), hidden, kernel),
        truth=known,
        observe=lambda ids: heads_truth.sample_statistics(known()["every"], ids),
        baseline="jax.random",
        part=READ,
        work=lambda contender: Work(bytes=size),
    )


def _shared(session: Session, workload: LinearWorkload) -> dict[str, Any]:
    """What cases of a layer have in common."""
    return {
        "suite": SUITE,
        "workload": workload.name,
        "shape": linear.shape_of(workload),
        "limit": checks.limit(workload.dtype, matmul=True, platform=session.platform),
        "slack": checks.slack(workload.dtype),
    }


def _shape(layout: Layout) -> str:
    return {"hv": "[H, V]", "vh": "[V, H]"}[layout]


def _product(hidden: Any, kernel: Any, layout: Layout) -> jax.Array:
    return hidden @ (kernel if layout == "hv" else kernel.T)


@functools.partial(jax.jit, static_argnames="layout")
def _exact(hidden: Any, kernel: Any, layout: Layout) -> jax.Array:
    """Logits in float32, of products without rounding."""
    hidden, kernel = hidden.astype(jnp.float32), kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return _product(hidden, kernel, layout)


def _of_logits(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The plain formulas, in float32."""
    logits = logits.astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)
    lse = jax.nn.logsumexp(logits, axis=1)
    return {"lse": lse, "log_prob": picked, "entropy": entropy}


@functools.partial(jax.jit, static_argnames="layout")
def _block_truth(hidden, kernel, labels, classes, layout) -> dict[str, jax.Array]:
    """What a block of rows comes to; `dlogits` of the summed loss, at some classes."""
    logits = _exact(hidden, kernel, layout)
    found = _of_logits(logits, labels)
    probs = jnp.exp(logits - found["lse"][:, None])
    picked = labels[:, None] == jnp.arange(logits.shape[1], dtype=labels.dtype)[None]
    dlogits = probs - picked.astype(jnp.float32)
    wide = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        dhidden = _product(dlogits, wide, "vh" if layout == "hv" else "hv")
    at_classes = {"products": logits[:, classes], "dlogits": dlogits[:, classes]}
    return found | at_classes | {"dhidden": dhidden}


def _truth(hidden, kernel, labels, layout, subset, *, gradient: bool) -> dict[str, Any]:
    """The true statistics of some rows; or the mean loss and its gradients, of all."""
    rows = np.arange(len(hidden)) if gradient else subset.rows
    classes = jnp.asarray(subset.classes)
    dkernel = np.zeros((hidden.shape[1], len(subset.classes)))
    blocks: dict[str, list[Any]] = {}
    for start in range(0, len(rows), _BLOCK_ROWS):
        chosen = rows[start : start + _BLOCK_ROWS]
        block = _block_truth(hidden[chosen], kernel, labels[chosen], classes, layout)
        some = np.isin(chosen, subset.rows)
        exact = {n: np.asarray(a, np.float64) for n, a in block.items()}
        dkernel += np.asarray(hidden[chosen], np.float64).T @ exact["dlogits"]
        if gradient:
            exact["dhidden"] = exact["dhidden"][some]
        for name, array in exact.items():
            blocks.setdefault(name, []).append(array)
    found = {name: np.concatenate(parts) for name, parts in blocks.items()}
    if not gradient:
        return found
    count = len(rows)
    return {
        "mean": -found["log_prob"].mean(),
        "dhidden": found["dhidden"] / count,
        "dkernel": dkernel / count,
    }


def findings(session: Session) -> Iterator[Finding]:
    """Holds what was measured against what is promised of an H100."""
    asked = _TARGET in jax.devices()[0].device_kind
    by_case: dict[Any, dict[str, Result]] = {}
    for result in session.results:
        if result.suite == SUITE and result.timing:
            by_case.setdefault(result.key, {})[result.name] = result
    for results in by_case.values():
        for name, result in results.items():
            if name not in peers.implementations():
                continue
            what = f"{result.workload}, {result.case}: {name}"
            for text, value, bound, least in _compared(result, results, session):
                known = bound if asked else None
                bounds = {"at_least" if least else "at_most": known}
                yield Finding(SUITE, f"{what}, {text}", value, **bounds)


def _compared(
    result: Result, results: dict[str, Result], session: Session
) -> Iterator[tuple[str, float, float, bool]]:
    """Figures of one result: what it is, the bound, and whether that is the least."""
    assert result.timing is not None
    if result.workload == STATISTICS.name and result.part_ratio:
        yield "of the rate of a matmul", 1 / result.part_ratio, _RATE, True
    if result.workload == LOSS.name:
        yield "seconds", result.timing.median, _SECONDS, False
        if result.ratio:
            yield "of the time of stored logits", result.ratio, 1.0, False
        stored = results.get("optax")
        ours, theirs = (
            r.program.temporary_bytes if r and r.program else None
            for r in (result, stored)
        )
        if ours is not None and theirs:
            yield "of the temporaries of stored logits", ours / theirs, _MEMORY, False
    if result.workload == ROWS.name and result.work:
        copied = session.rates().get("copy")
        if copied:
            share = result.work.bytes / copied / result.timing.median
            yield "of the bandwidth of a copy", share, _BANDWIDTH, True
    if result.case.startswith(SAMPLE) and result.part_ratio:
        yield "of one read of the kernel", result.part_ratio, _READS, False
