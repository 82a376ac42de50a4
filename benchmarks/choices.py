"""Do kernels choose the classes, and draw the noise, that everyone of ours does?

Random bits belong to a row and a class, so samples are the same whoever draws them:
those of a kernel are held against XLA's, relaxed ones against float64 of the same
noise. Two right ways to round a sum may part where classes tie, in few rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft
from benchmarks import checks, contest, peers
from benchmarks.session import Session, Work
from benchmarks.workloads import Layout, LinearWorkload, SoftmaxWorkload
from jaxsoft._core import noise
from jaxsoft._core.registry import Implementation

_TEMPERATURE, _SOFTCAP, _SMOOTHING = 0.7, 3.0, 0.1
# Of all rows, those that may part.
_PARTING = 0.02

_Ours = Callable[[Implementation | None], Callable[..., Any]]


def check_layer(
    session: Session, workload: LinearWorkload, layout: Layout, suite: str
) -> None:
    """Checks the largest logit's class and the samples of a layer.

    Args:
      session: where the results go.
      workload: the shape.
      layout: of the kernel.
      suite: the question that the results answer.
    """
    hidden, kernel, _ = workload.inputs(layout)
    keys = jax.random.split(jax.random.key(7), 3)
    bias = jax.random.normal(keys[0], (workload.classes,), workload.dtype)
    kept = jax.random.bernoulli(keys[1], 0.8, (workload.classes,))
    options: dict[str, Any] = {
        "bias": bias,
        "class_mask": kept,
        "logit_softcap": _SOFTCAP,
        "temperature": _TEMPERATURE,
        "kernel_layout": layout,
        "precision": "highest" if workload.dtype == "float32" else None,
    }

    def largest(implementation: Implementation | None) -> Callable[..., jax.Array]:
        def call(hidden: Any, kernel: Any) -> Any:
            return jaxsoft.linear_statistics(
                hidden,
                kernel,
                return_argmax=True,
                implementation=implementation,
                **options,
            ).argmax

        return call

    def drawn(implementation: Implementation | None) -> Callable[..., jax.Array]:
        return lambda hidden, kernel: jaxsoft.linear_sample(
            keys[2], hidden, kernel, implementation=implementation, **options
        )

    def known_largest() -> Any:
        table = kernel if layout == "hv" else kernel.T
        logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64)
        logits = _SOFTCAP * np.tanh((logits + np.asarray(bias, np.float64)) / _SOFTCAP)
        return np.where(kept, logits, -np.inf).argmax(axis=1)

    shape = {"N": workload.tokens, "H": workload.features, "V": workload.classes}
    shape |= {"dtype": workload.dtype}
    for what, ours, known in (
        ("largest logit", largest, known_largest),
        ("sample", drawn, lambda: jax.jit(drawn("xla"))(hidden, kernel)),
    ):
        case = _of_classes(ours, known, (hidden, kernel))
        title = f"{what}, {'[H, V]' if layout == 'hv' else '[V, H]'}, every option"
        contest.run_case(case(suite, workload.name, shape, title), session)


def check_rows(session: Session, workload: SoftmaxWorkload, suite: str) -> None:
    """Checks relaxed samples of stored logits, and their one-hot.

    Args:
      session: where the results go.
      workload: the shape.
      suite: the question that the results answer.
    """
    key = jax.random.key(9)
    logits, _, cotangent = workload.inputs()
    shape = {"N": workload.rows, "V": workload.classes, "dtype": workload.dtype}
    for generator in noise.GENERATORS:

        def ours(
            implementation: Implementation | None,
            hard: bool = False,
            generator: noise.Generator = generator,
        ) -> Callable[..., jax.Array]:
            return lambda logits: jaxsoft.gumbel_softmax(
                key,
                logits,
                _TEMPERATURE,
                hard=hard,
                generator=generator,
                implementation=implementation,
            )

        known = functools.cache(
            functools.partial(_relaxed, key, logits, cotangent, generator)
        )
        title = f"gumbel_softmax, {generator}: value and gradient"
        case = _of_samples(ours, known, (logits, cotangent), workload.dtype)
        contest.run_case(case(suite, workload.name, shape, title), session)

        def one_hot(implementation: Any, ours: Any = ours) -> Callable[..., Any]:
            return lambda logits: jnp.argmax(ours(implementation, True)(logits), axis=1)

        case = _of_classes(
            one_hot,
            lambda known=known: known()["value"].argmax(axis=1),
            (logits,),
        )
        title = f"gumbel_softmax, {generator}: one-hot"
        contest.run_case(case(suite, workload.name, shape, title), session)


def check_losses(session: Session, workload: SoftmaxWorkload, suite: str) -> None:
    """Checks log-probabilities, entropies and losses of stored logits.

    Args:
      session: where the results go.
      workload: the shape.
      suite: the question that the results answer.
    """
    logits, labels, cotangent = workload.inputs()
    shape = {"N": workload.rows, "V": workload.classes, "dtype": workload.dtype}

    def log_softmax(implementation: Any) -> Callable[..., jax.Array]:
        return lambda logits: jaxsoft.log_softmax(
            logits, temperature=_TEMPERATURE, implementation=implementation
        )

    def of_rows(implementation: Any) -> Callable[..., jax.Array]:
        def call(logits: Any) -> jax.Array:
            entropy = jaxsoft.entropy(
                logits, temperature=_TEMPERATURE, implementation=implementation
            )
            loss = jaxsoft.softmax_cross_entropy(
                logits,
                labels,
                _TEMPERATURE,
                label_smoothing=_SMOOTHING,
                implementation=implementation,
            )
            return jnp.stack([entropy, loss], axis=1)

        return call

    known = functools.cache(functools.partial(_logarithms, logits, labels, cotangent))
    of_two = cotangent[:, :2].astype(jnp.float32)
    cases = {
        "log_softmax": (log_softmax, cotangent),
        "entropy and smoothed loss": (of_rows, of_two),
    }
    for name, (ours, cotangents) in cases.items():
        case = _of_samples(
            ours,
            lambda name=name: known()[name],
            (logits, cotangents),
            workload.dtype,
        )
        title = f"{name}: value and gradient"
        contest.run_case(case(suite, workload.name, shape, title), session)


def _of_classes(
    ours: _Ours, known: Callable[[], Any], arguments: Any
) -> Callable[..., contest.Case]:
    """A case that asks in how many rows the class is the known one."""
    known = functools.cache(known)

    def observe(class_ids: Any) -> dict[str, Any]:
        return {"agreeing": np.mean(np.asarray(class_ids) == np.asarray(known()))}

    return _case(ours, lambda: {"agreeing": np.ones(())}, observe, arguments, _PARTING)


def _of_samples(
    ours: _Ours, known: Callable[[], Any], arguments: Any, dtype: str
) -> Callable[..., contest.Case]:
    """A case that asks for values of stored logits and their gradients."""

    def prepare(function: Callable[..., Any]) -> Callable[..., Any]:
        def both(logits: Any, cotangent: Any) -> Any:
            value, pull = jax.vjp(function, logits)
            return value, *pull(cotangent)

        return both

    def observe(outputs: Any) -> dict[str, Any]:
        return dict(zip(("value", "gradient"), outputs, strict=True))

    limit = checks.limit(dtype, matmul=False, platform="cpu")
    return _case(ours, known, observe, arguments, limit, prepare)


def _case(
    ours: _Ours,
    truth: Callable[[], Any],
    observe: Callable[[Any], Any],
    arguments: Any,
    limit: float,
    prepare: Callable[..., Any] = lambda function: function,
) -> Callable[..., contest.Case]:
    """A case of ours by every implementation that the platform has."""

    def case(
        suite: str, workload: str, shape: dict[str, Any], title: str
    ) -> contest.Case:
        return contest.Case(
            suite=suite,
            workload=workload,
            shape=shape,
            title=title,
            contenders=peers.by_implementation(ours, xla=False),
            prepare=prepare,
            arguments=arguments,
            truth=truth,
            observe=observe,
            baseline="",
            limit=limit,
            slack=0.0,
            work=lambda _: Work(),
            timed=False,
        )

    return case


def _relaxed(
    key: Any, logits: Any, cotangent: Any, generator: noise.Generator
) -> dict[str, Any]:
    """The relaxed samples and their gradients in float64, of the canonical noise."""
    words = noise.row_words(key, logits.shape[0])
    drawn = noise.first_gumbel(
        words, noise.CLASSES, logits.shape[1], jnp.dtype(jnp.float32), generator
    )
    x, g = (np.asarray(array, np.float64) for array in (logits, cotangent))
    x = (x + np.asarray(drawn, np.float64)) / _TEMPERATURE
    y = np.exp(x - x.max(axis=1, keepdims=True))
    y /= y.sum(axis=1, keepdims=True)
    mean = (y * g).sum(axis=1, keepdims=True)
    return {"value": y, "gradient": y * (g - mean) / _TEMPERATURE}


def _logarithms(logits: Any, labels: Any, cotangent: Any) -> dict[str, dict[str, Any]]:
    """Log-probabilities, entropy and smoothed loss, and gradients, in float64."""
    x, g = (np.asarray(array, np.float64) for array in (logits, cotangent))
    c = (x - x.max(axis=1, keepdims=True)) / _TEMPERATURE
    log_p = c - np.log(np.exp(c).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(axis=1, keepdims=True)
    targets = np.full(x.shape, _SMOOTHING / x.shape[1])
    targets[np.arange(len(x)), np.asarray(labels)] += 1 - _SMOOTHING
    loss = -(targets * log_p).sum(axis=1, keepdims=True)
    slopes = g - p * g.sum(axis=1, keepdims=True)
    of_rows = -p * (log_p + entropy) * g[:, :1] + (p - targets) * g[:, 1:2]
    return {
        "log_softmax": {"value": log_p, "gradient": slopes / _TEMPERATURE},
        "entropy and smoothed loss": {
            "value": np.concatenate([entropy, loss], axis=1),
            "gradient": of_rows / _TEMPERATURE,
        },
    }
