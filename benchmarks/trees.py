"""Does a softmax over a tree of classes cost O(log V)?

A training step, in place, from thousands of classes to millions, with the step of the
softmax over all classes beside it; sampling; and the ten best classes, which no exact
search finds in O(log V) where many classes are nearly as probable as they are.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks import (
    checks,
    contest,
    heads_truth,
    trees_findings,
    trees_steps,
    trees_truth,
    workloads,
)
from benchmarks.peers import Contender
from benchmarks.session import Session, Work
from benchmarks.trees_checks import StepCheck
from benchmarks.trees_findings import FULL, ROW_OPTIMIZERS, SEARCH, SUITE
from benchmarks.workloads import TreeWorkload

# Passes over the logits: where they are not stored, they are computed again.
_PASSES = {"linear_cross_entropy": 4, "optax": 3}
# Arrays as large as the kernel that an update reads and writes.
_ARRAYS = {"row_sgd": 1, "row_adagrad": 2, "row_adam": 3}
_BEST = 10
_CHECKED_TOP_K = 16
# Log-probabilities that the check of `linear_sample` may compute.
_FULL_SAMPLES = 2**30
# Standard deviations that a right sampler's figures may be off by.
_DEVIATIONS = 5.0


def run(session: Session) -> None:
    """Runs every workload at every V, and says how time and memory grew."""
    chosen = workloads.select(
        workloads.TREES,
        session.workloads,
        platform=session.platform,
        quick=session.quick,
    )
    if chosen:
        session.measure("copy", "matmul float32")
    for workload in chosen:
        run_workload(session, workload)


def run_workload(session: Session, workload: TreeWorkload) -> None:
    """Checks and times one workload, from the smallest V to the largest.

    Args:
      session: where the results and findings go.
      workload: the layer, and what is done with it.
    """
    run_classes = {
        "tree-step": _run_step,
        "tree-sample": _run_sample,
        "tree-top-k-flat": _run_top_k,
        "tree-top-k-peaked": _run_top_k,
    }[workload.name]
    for classes in workload.classes:
        # What a case holds, gigabytes at last, is gone before the next one.
        run_classes(session, workload, classes)
    asked = not session.quick
    session.findings += trees_findings.findings(session.results, workload, asked=asked)


def _run_step(session: Session, workload: TreeWorkload, classes: int) -> None:
    hidden = workload.hidden()[0]
    labels = workload.labels(classes, trees_steps.BATCHES)
    check = StepCheck(workload, classes, hidden, labels[0])
    works = _step_works(workload, classes, labels[0])
    rows = [
        dataclasses.replace(
            trees_steps.row_training(name, workload, classes),
            observe=functools.partial(check.tree, name),
        )
        for name in ROW_OPTIMIZERS
    ]
    full, planned = [], [works[name] for name in ROW_OPTIMIZERS]
    for name in FULL:
        # The steps of rows are not given up where only this one would take too long.
        absent = contest.out_of_time([*planned, works[name]], session)
        contender = trees_steps.full_training(name, workload, classes, absent=absent)
        full.append(dataclasses.replace(contender, observe=check.full))
        planned += [] if absent else [works[name]]
    case = _case(
        session,
        workload,
        classes,
        title="training step",
        contenders=[*rows, *full],
        arguments=({"hidden": hidden, "labels": labels},),
        truth=lambda: check.truth(full=any(not c.absent for c in full)),
        baseline=ROW_OPTIMIZERS[0],
        work=lambda contender: works[contender.name],
    )
    contest.run_case(case, session)


def _step_works(
    workload: TreeWorkload, classes: int, labels: jax.Array
) -> dict[str, Work]:
    """Rows, or kernel, read and written once; products with every row, or class."""
    nodes = trees_truth.paths(np.asarray(labels), classes).nodes
    vector = workload.features * jax.numpy.dtype(workload.dtype).itemsize
    product = 2 * workload.tokens * workload.features
    works = {
        name: Work(
            # Logits, and both gradients.
            flops=3 * product * nodes.shape[1],
            bytes=2 * len(np.unique(nodes)) * vector * _ARRAYS[name],
            dtype=workload.dtype,
        )
        for name in ROW_OPTIMIZERS
    }
    return works | {
        name: Work(
            flops=passes * product * classes,
            bytes=2 * classes * vector,
            dtype=workload.dtype,
        )
        for name, passes in _PASSES.items()
    }


def _run_sample(session: Session, workload: TreeWorkload, classes: int) -> None:
    tokens, features = workload.tokens, workload.features
    hidden = workload.hidden()[0]
    exact = np.asarray(hidden).astype(np.float64)
    product = 2 * tokens * features
    works = {
        "hierarchical_sample": Work(
            flops=product * (classes.bit_length() - 1), dtype=workload.dtype
        ),
        "linear_sample": Work(flops=product * classes, dtype=workload.dtype),
    }
    inputs = {
        "key": jax.random.key(7),
        "hidden": hidden,
        "node_kernel": workload.kernel(classes - 1, "vh"),
    }
    absent = contest.out_of_time(works.values(), session)
    if tokens * classes > _FULL_SAMPLES:
        absent = "checking its samples would take minutes"
    if not absent:
        inputs["kernel"] = workload.kernel(classes, "hv")

    def observe_tree(returned: Any) -> dict[str, Any]:
        return trees_truth.sample_statistics(
            exact,
            np.asarray(returned[1]["class_ids"]),
            classes,
            lambda rows: np.asarray(inputs["node_kernel"][rows]),
        )

    def observe_full(returned: Any) -> dict[str, Any]:
        kernel = np.asarray(inputs["kernel"]).astype(np.float64)
        ids = np.asarray(returned[1]["class_ids"])
        return trees_truth.full_sample_statistics(exact, ids, kernel)

    tree = trees_steps.tree_sampling(classes)
    full = trees_steps.full_sampling(absent=absent)
    case = _case(
        session,
        workload,
        classes,
        title="sample",
        contenders=[
            dataclasses.replace(tree, observe=observe_tree),
            dataclasses.replace(full, observe=observe_full),
        ],
        arguments=(inputs,),
        truth=lambda: trees_truth.sample_truth(tokens, classes),
        baseline=tree.name,
        work=lambda contender: works[contender.name],
        limit=_DEVIATIONS * tokens**-0.5,
    )
    contest.run_case(case, session)


def _run_top_k(session: Session, workload: TreeWorkload, classes: int) -> None:
    hidden = workload.hidden(trees_steps.BATCHES)
    kernel = workload.kernel(classes - 1, "vh")
    first = np.asarray(hidden[0]).astype(np.float64)
    logits = first @ np.asarray(kernel).astype(np.float64).T
    visits = [trees_truth.best_first_visits(row, _BEST) for row in logits]
    rows = checks.Subset.of(workload.tokens, 1, _CHECKED_TOP_K).rows
    log_p = trees_truth.log_probs(logits[rows])[1]
    truth = heads_truth.top_k(_BEST)(log_p, {}, {}).outputs
    truth["exact"] = np.ones(len(rows))
    product = 2 * workload.features
    works = {
        # A search looks at these at least, another's may at more.
        "hierarchical_top_k": Work(flops=product * sum(visits), dtype=workload.dtype),
        "log_probs + lax.top_k": Work(
            flops=product * workload.tokens * (classes - 1), dtype=workload.dtype
        ),
    }

    def observe(returned: Any) -> dict[str, Any]:
        found = {name: np.asarray(a)[rows] for name, a in returned[1].items()}
        ids = found.pop("class_ids")
        return found | heads_truth.top_k_statistics(truth["every"], ids)

    contenders = [
        dataclasses.replace(make(classes, _BEST), observe=observe)
        for make in (trees_steps.tree_top_k, trees_steps.full_top_k)
    ]
    case = _case(
        session,
        workload,
        classes,
        title=f"top_k, k = {_BEST}",
        contenders=contenders,
        arguments=({"hidden": hidden, "node_kernel": kernel},),
        truth=lambda: truth,
        baseline="log_probs + lax.top_k",
        work=lambda contender: works[contender.name],
    )
    contest.run_case(case, session)
    low, _, high = np.quantile(visits, [0.25, 0.5, 0.75]).tolist()
    figures = {
        "visits": float(np.mean(visits)),
        "low": low,
        "high": high,
        "inner nodes": float(classes - 1),
    }
    session.add(case.result(Contender(SEARCH), "right", figures=figures))


def _case(
    session: Session,
    workload: TreeWorkload,
    classes: int,
    title: str,
    **rest: Any,
) -> contest.Case:
    """A case of which every contender says itself what is checked of it."""
    usual = checks.limit(workload.dtype, matmul=True, platform=session.platform)
    return contest.Case(
        suite=SUITE,
        workload=workload.name,
        shape={
            "N": workload.tokens,
            "H": workload.features,
            "V": classes,
            "dtype": workload.dtype,
        },
        title=f"{title}, V = {trees_findings.power(classes)}",
        prepare=lambda function: function,
        observe=dict,
        slack=checks.slack(workload.dtype),
        swept="V",
        **{"limit": usual, **rest},
    )
