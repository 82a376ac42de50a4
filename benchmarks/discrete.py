"""Do samples and relaxed samples of stored logits cost what reading them costs?

Against JAX's and PyTorch's own, and beside one read of the logits.
"""

import functools
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft
from benchmarks import (
    contest,
    heads_truth,
    machine,
    peers,
    timing,
    torch_peer,
    workloads,
)
from benchmarks.session import Finding, Session, Work
from benchmarks.workloads import SoftmaxWorkload

SUITE = "discrete"

SAMPLE, RELAXED = "sample", "gumbel_softmax, T = 0.7: value and gradient"
_TEMPERATURE = 0.7
_READ = "one read"
_FEWER_ROUNDS = "jaxsoft, threefry13"
_CHECKED_ROWS = 256
_CHECKED_GRADIENTS = 16

# What is asked on a CPU: of categorical's time, and of the bandwidth of one read.
_OF_CATEGORICAL, _OF_BANDWIDTH = 1 / 8, 0.4
_OF_PLAIN = {peers.OURS: 0.6, _FEWER_ROUNDS: 0.45}


def run(session: Session) -> None:
    """Runs samplers and relaxations at every workload, and says what is met."""
    for operation, shapes in (
        (SAMPLE, workloads.SAMPLING),
        (RELAXED, workloads.RELAXATION),
    ):
        chosen = workloads.select(
            shapes, session.workloads, platform=session.platform, quick=session.quick
        )
        for workload in chosen:
            run_workload(session, workload, (operation,))
            if not session.quick:
                session.findings.extend(_findings(session, workload))
                session.save()


def run_workload(
    session: Session,
    workload: SoftmaxWorkload,
    operations: tuple[str, ...] = (SAMPLE, RELAXED),
    suite: str = SUITE,
    *,
    timed: bool = True,
) -> None:
    """Checks and times what is asked at one shape.

    Args:
      session: where the results go.
      workload: the shape.
      operations: `SAMPLE`, `RELAXED` or both.
      suite: the question that the results answer.
      timed: whether they are timed once checked.
    """
    if timed:
        session.measure("copy")
    logits, _, cotangent = workload.inputs()
    torch = _torch()
    for operation in operations:
        make = _sampling if operation == SAMPLE else _relaxation
        contest.run_case(
            make(session, workload, logits, cotangent, torch, suite, timed), session
        )


def _torch() -> tuple[ModuleType | None, str]:
    module, absent = peers.import_package("torch")
    if module is not None and (absent := torch_peer.absent(module)):
        return None, absent
    return module, absent


def _torch_contender(torch: Any, run: Callable[..., Any]) -> peers.Contender:
    """PyTorch's function of the case's arguments, which it shares with JAX."""
    module, absent = torch
    if module is None:
        return peers.Contender("torch", absent=absent)

    def program(arguments: tuple[Any, ...]) -> timing.Program:
        module.set_num_threads(machine.cores())

        def call(*arguments: Any) -> Any:
            outputs = run(module, *arguments)
            if jax.default_backend() == "gpu":
                module.cuda.synchronize()
            return outputs

        start = time.perf_counter()
        outputs = call(*arguments)
        seconds = time.perf_counter() - start
        size = sum(output.nbytes for output in jax.tree.leaves(outputs))
        return timing.Program("torch", call, seconds, None, size)

    return peers.Contender("torch", program=program)


def _sampling(session, workload, logits, cotangent, torch, suite, timed):
    del cotangent
    rows = np.arange(min(workload.rows, _CHECKED_ROWS))

    @functools.cache
    def known() -> dict[str, Any]:
        every = heads_truth.log_probs(np.asarray(logits[rows], np.float64))
        return {"every": every} | heads_truth.uniform_grid(len(rows))

    def observe(class_ids: Any) -> dict[str, Any]:
        return heads_truth.sample_statistics(known()["every"], class_ids[rows])

    def observe_read(largest: Any) -> dict[str, Any]:
        del largest
        return heads_truth.uniform_grid(len(rows))

    def run_torch(module: Any, key: Any, logits: Any) -> Any:
        del key
        p = module.softmax(module.from_dlpack(logits), dim=1)
        return jnp.from_dlpack(module.multinomial(p, 1)[:, 0].int())

    limit = 3 / len(rows) ** 0.5
    return contest.Case(
        suite=suite,
        workload=workload.name,
        shape=_shape(workload),
        title=SAMPLE,
        contenders=[
            peers.Contender(peers.OURS, jaxsoft.sample),
            peers.Contender("jax.random", _categorical),
            peers.Contender(_READ, _read, observe=observe_read),
            _torch_contender(torch, run_torch),
        ],
        prepare=lambda function: function,
        arguments=(jax.random.key(5), logits),
        truth=known,
        observe=observe,
        baseline="jax.random",
        part=_READ,
        limit=limit,
        slack=limit,
        work=lambda _: Work(bytes=workload.logits_bytes),
        timed=timed,
    )


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    # In bfloat16, the noise would be too: its largest values are then all the same.
    return jax.random.categorical(key, logits.astype(jnp.float32))


def _read(key: jax.Array, logits: jax.Array) -> jax.Array:
    """The largest logit of each row: nobody can sample without reading them all."""
    del key
    return jnp.max(logits, axis=1)


def _relaxation(session, workload, logits, cotangent, torch, suite, timed):
    del session
    rows = np.arange(min(workload.rows, _CHECKED_ROWS))
    some = rows[:_CHECKED_GRADIENTS]

    @functools.cache
    def known() -> dict[str, Any]:
        every = heads_truth.log_probs(np.asarray(logits[rows], np.float64))
        ones = np.ones(len(some))
        uniform = heads_truth.uniform_grid(len(rows))
        return {"every": every, "total": ones, "slope": ones, "rest": ones} | uniform

    def observe(outputs: Any) -> dict[str, Any]:
        return _relaxation_statistics(known()["every"], cotangent, outputs, rows, some)

    def run_torch(module: Any, key: Any, logits: Any, cotangent: Any) -> Any:
        del key
        x = module.from_dlpack(logits).detach().requires_grad_()
        y = module.nn.functional.gumbel_softmax(x, tau=_TEMPERATURE)
        y.backward(module.from_dlpack(cotangent))
        return jnp.from_dlpack(y.detach()), jnp.from_dlpack(x.grad)

    limit = 3 / len(rows) ** 0.5
    return contest.Case(
        suite=suite,
        workload=workload.name,
        shape=_shape(workload),
        title=RELAXED,
        contenders=[
            peers.Contender(peers.OURS, _ours),
            peers.Contender(
                _FEWER_ROUNDS,
                functools.partial(_ours, generator="threefry13"),
                ours=True,
            ),
            *(
                peers.Contender(
                    name,
                    functools.partial(_ours, implementation=implementation),
                    ours=True,
                )
                for name, implementation in peers.implementations().items()
                # The default is that.
                if implementation not in (None, "xla")
            ),
            peers.Contender("jax.nn", _plain),
            _torch_contender(torch, run_torch),
        ],
        prepare=_value_and_gradient,
        arguments=(jax.random.key(5), logits, cotangent),
        truth=known,
        observe=observe,
        baseline="jax.nn",
        limit=limit,
        slack=limit,
        work=lambda _: Work(bytes=4 * workload.logits_bytes),
        timed=timed,
    )


def _ours(key: jax.Array, logits: jax.Array, **options: Any) -> jax.Array:
    return jaxsoft.gumbel_softmax(key, logits, _TEMPERATURE, **options)


def _plain(key: jax.Array, logits: jax.Array) -> jax.Array:
    drawn = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax((logits + drawn) / jnp.asarray(_TEMPERATURE, logits.dtype))


def _value_and_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    def both(key: jax.Array, logits: jax.Array, cotangent: jax.Array) -> Any:
        value, pull = jax.vjp(functools.partial(function, key), logits)
        return value, *pull(cotangent)

    return both


def _relaxation_statistics(
    every: Any, cotangent: Any, outputs: Any, rows: Any, some: Any
) -> dict[str, Any]:
    """What is known of a relaxed sample whatever its noise.

    Its largest entry is a sample of the softmax; it sums to 1; and its gradient is a
    function of itself and the cotangent, along which it has the slope 1 and off which
    it has nothing (`rest` is 1 plus what there is).
    """
    value, gradient = outputs
    class_ids = np.asarray(jnp.argmax(value[rows], axis=1))
    p, given, found = (
        np.asarray(array[some], np.float64) for array in (value, cotangent, gradient)
    )
    mean = (p * given).sum(axis=1, keepdims=True)
    exact = p * (given - mean) / _TEMPERATURE
    size = (exact**2).sum(axis=1)
    rest = np.sqrt(((found - exact) ** 2).sum(axis=1) / size)
    return {
        "total": p.sum(axis=1),
        "slope": (found * exact).sum(axis=1) / size,
        "rest": 1 + rest,
    } | heads_truth.sample_statistics(every, class_ids)


def _shape(workload: SoftmaxWorkload) -> dict[str, Any]:
    return {"N": workload.rows, "V": workload.classes, "dtype": workload.dtype}


def _findings(session: Session, workload: SoftmaxWorkload) -> Iterator[Finding]:
    """Holds the figures of a CPU against what is asked there."""
    asked = session.platform == "cpu"
    for result in session.results:
        if (result.suite, result.workload) != (SUITE, workload.name):
            continue
        if result.ratio is None or not result.ours:
            continue
        what = f"{workload.name}: {result.name}, {result.case.split(',')[0]}"
        if result.case == SAMPLE:
            bound = _OF_CATEGORICAL if asked else None
            yield Finding(SUITE, f"{what}, of jax.random", result.ratio, at_most=bound)
            if result.part_ratio:
                bound = _OF_BANDWIDTH if asked else None
                share = 1 / result.part_ratio
                text = f"{what}, of the bandwidth of one read"
                yield Finding(SUITE, text, share, at_least=bound)
        else:
            bound = _OF_PLAIN[result.name] if asked else None
            yield Finding(SUITE, f"{what}, of jax.nn", result.ratio, at_most=bound)
