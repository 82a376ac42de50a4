"""What do the other things that people do with a softmax layer cost?

In time and memory, without stored logits, against the plain formula that stores them.
Another case is another `Head` in `HEADS`; see `heads_cases.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import asked, checks, contest, heads_cases, linear, peers, workloads
from benchmarks.heads_cases import Head
from benchmarks.heads_options import IN_BATCH, OPERANDS, SERVING
from benchmarks.session import Session, Work
from benchmarks.workloads import LinearWorkload

SUITE = "heads"
TRAINING = (*heads_cases.TRAINING, *OPERANDS)
HEADS = (*heads_cases.DECODING, *SERVING, *TRAINING)
CONTRASTIVE = (*heads_cases.CONTRASTIVE, IN_BATCH)

# Where the truth of every token costs more than this, fewer tokens are checked.
_TRUTH_FLOPS = 2e11


def run(session: Session) -> None:
    """Runs every head at the first workload, those of training at the others.

    And the losses of pairs of embeddings at workloads of their own.
    """
    select = functools.partial(
        workloads.select,
        names=session.workloads,
        platform=session.platform,
        quick=session.quick,
    )
    for position, workload in enumerate(select(workloads.HEADS)):
        run_workload(session, workload, TRAINING if position else HEADS)
    for workload in select(workloads.CONTRASTIVE):
        run_workload(session, as_pairs(workload), CONTRASTIVE)
    session.findings += asked.findings(session, SUITE)


def as_pairs(workload: LinearWorkload) -> LinearWorkload:
    """Makes one whose classes are its tokens, as contrastive losses have it."""
    return dataclasses.replace(workload, classes=workload.tokens)


def run_workload(
    session: Session,
    workload: LinearWorkload,
    heads: tuple[Head, ...],
    suite: str = SUITE,
    *,
    timed: bool = True,
) -> None:
    """Checks and times heads at one shape.

    Args:
      session: where the results go.
      workload: the shape.
      heads: what is asked.
      suite: the question that the results answer.
      timed: whether they are timed once checked.
    """
    if timed:
        session.measure(f"matmul {workload.dtype}")
    names = ("hidden", "kernel", "labels")
    inputs = workload.inputs("hv")
    shared: dict[str, jax.Array] = dict(zip(names, inputs, strict=True))
    for head in heads:
        case = _case(session, workload, head, shared, suite, timed)
        contest.run_case(case, session)


def _case(
    session: Session,
    workload: LinearWorkload,
    head: Head,
    shared: dict[str, jax.Array],
    suite: str,
    timed: bool,
) -> contest.Case:
    inputs = shared | head.draws(workload, jax.random.key(4))
    outputs = jax.eval_shape(head.ours, inputs)
    cotangents = _cotangents(outputs) if head.moving else {}
    tokens = workload.tokens
    if head.moving:
        affordable = int(_TRUTH_FLOPS * tokens / workload.matmul_flops)
        tokens = max(1, min(tokens, affordable))
    subset = checks.Subset.of(tokens, workload.classes, head.checked)
    fewer = _cut(inputs, head, tokens), _cut(cotangents, None, tokens)

    @functools.cache
    def known() -> dict[str, Any]:
        return head.truth(*fewer, subset)

    def work(contender: peers.Contender) -> Work:
        passes = head.passes.get(contender.name, 1)
        passes = passes(workload) if callable(passes) else passes
        return Work(flops=round(passes * workload.matmul_flops), dtype=workload.dtype)

    usual = checks.limit(workload.dtype, matmul=True, platform=session.platform)
    limit = head.limit(len(subset.rows)) if head.limit else usual
    return contest.Case(
        suite=suite,
        workload=workload.name,
        shape=linear.shape_of(workload),
        title=head.title,
        contenders=[
            peers.Contender(peers.OURS, head.ours, ours=True),
            *(peers.Contender(name, way, ours=True) for name, way in head.ways.items()),
            peers.Contender(head.plain_name, head.plain),
            *(peers.Contender(name, other) for name, other in head.others.items()),
            *(peers.Contender(name, part) for name, part in head.part.items()),
        ],
        prepare=functools.partial(_prepare, moving=head.moving),
        arguments=(inputs, cotangents),
        truth=known,
        observe=lambda found: head.observe(_observe(found, subset, tokens), known()),
        baseline=head.plain_name,
        limit=limit,
        slack=limit if head.limit else checks.slack(workload.dtype),
        work=work,
        check_arguments=fewer if tokens < workload.tokens else None,
        timed=timed,
        part=next(iter(head.part), ""),
    )


def _cotangents(outputs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Draws one for each output, so that no two elements count the same."""
    keys = jax.random.split(jax.random.key(3), len(outputs))
    return {
        name: jax.random.normal(key, outputs[name].shape, outputs[name].dtype)
        for key, name in zip(keys, sorted(outputs), strict=True)
    }


def _cut(arrays: Mapping[str, Any], head: Head | None, tokens: int) -> dict[str, Any]:
    """The first tokens of what has one row a token; of everything without a head."""
    return {
        name: array[:tokens]
        if array.ndim and (head is None or name in head.per_token)
        else array
        for name, array in arrays.items()
    }


def _prepare(
    function: Callable[..., Any], moving: tuple[str, ...]
) -> Callable[..., Any]:
    """Makes `f(inputs, cotangents)`, gradients beside the outputs where wanted."""

    def value(inputs: dict[str, Any], _: Any) -> Any:
        return function(inputs)

    def value_and_gradient(inputs: dict[str, Any], cotangents: Any) -> Any:
        still = {name: a for name, a in inputs.items() if name not in moving}
        outputs, pull = jax.vjp(
            lambda moved: function(still | moved), {n: inputs[n] for n in moving}
        )
        upstream = {n: cotangents[n].astype(outputs[n].dtype) for n in outputs}
        (gradients,) = pull(upstream)
        return outputs | {"d" + name: gradients[name] for name in moving}

    return value_and_gradient if moving else value


def _observe(
    outputs: Mapping[str, jax.Array], subset: checks.Subset, tokens: int
) -> dict[str, jax.Array]:
    """Cuts outputs to the rows and gradients to the rows and classes compared."""
    classes = {"dkernel": 1, "dvalues": 0, "db": 1}
    found = {}
    for name, output in outputs.items():
        if name in classes:
            found[name] = jnp.take(output, subset.classes, axis=classes[name])
        elif output.ndim and output.shape[0] == tokens:
            found[name] = output[subset.rows]
        else:
            found[name] = output
    return found
