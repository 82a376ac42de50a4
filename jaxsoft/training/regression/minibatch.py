"""Minibatch training: any Optax optimizer, any head, data larger than memory."""

import functools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxsoft import ClassTree
from jaxsoft._core import checks
from jaxsoft.nn import HierarchicalSoftmaxHead
from jaxsoft.training.heads import Head, HeadPlan, Params
from jaxsoft.training.mesh import DATA, usable_mesh
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.minibatch_solver import MinibatchSolver, TrainingRows
from jaxsoft.training.regression.minibatch_step import (
    MakeOptimizer,
    Numbers,
    Plan,
    Tables,
    WarmupCosine,
)
from jaxsoft.training.regression.padding import rows_within
from jaxsoft.training.regression.settings import HEADS
from jaxsoft.training.regression.sources import BatchOrder, RowSource
from jaxsoft.training.unigram import unigram_log_probs

__all__ = [
    "PATIENCE",
    "Optimizer",
    "RegressionHead",
    "default_batch_size",
    "minibatch_solver",
]

RegressionHead = Literal["full", "hierarchical", "adaptive"]
# A transformation of Optax, or a function from a learning rate to one.
Optimizer: TypeAlias = optax.GradientTransformation | MakeOptimizer

# Where none are given. A step of Adam at the peak moves a logit by at most about
# `_MOST_MOVE`, whatever the features' number and scale. On digits, raw and
# standardised, iris, wine and `make_classification` (20,000 x 100, 20 classes), a third
# of it or three times it ended nearer to the optimum on the last alone.
_BATCH_SIZE = 256
_MOST_MOVE, _HIGHEST_RATE, _ROWS_MEASURED = 2.0, 0.3, 1024
PATIENCE = 5

# Rows of a batch are dense: so many bytes of them at most, where no size is given, and
# of rows that are looked at besides.
_BATCH_BYTES = 1 << 28

# A segment takes a fraction of a second by these guesses of a CPU's rates, which cost
# nothing where they are wrong: results do not depend on the length of a segment.
_FLOPS, _BYTES, _SECONDS = 5e10, 1e10, 0.4
_BLOCK_BYTES, _MOST_STEPS = 1 << 25, 256
_MOST_WARMUP = 100


def default_batch_size(width: int, dtype: DTypeLike) -> int:
    """Returns the rows of a batch: 256, or as many as are 256 MiB, at least 1.

    Args:
      width: features of a row, which is dense in a batch.
      dtype: that they are computed with.
    """
    return min(_BATCH_SIZE, rows_within(_BATCH_BYTES, width, dtype))


def minibatch_solver(
    source: RowSource,
    labels: np.ndarray | None,
    weights: np.ndarray | None = None,
    *,
    num_classes: int,
    targets: np.ndarray | None = None,
    head: RegressionHead = "full",
    C: float = 1.0,  # noqa: N803
    fit_intercept: bool = True,
    reference: int | None = None,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    target_weight: float = 1.0,
    optimizer: Optimizer | None = None,
    learning_rate: float | optax.Schedule | None = None,
    batch_size: int | None = None,
    max_iter: int | None = 1000,
    tol: float = 1e-4,
    seed: int = 0,
    mesh: Mesh | None = None,
    start: Coefficients | Head | None = None,
    dtype: DTypeLike = np.float32,
) -> MinibatchSolver:
    """Makes a minibatch solver.

    The objective is `Σ w·loss / Σ w + ‖W‖² / (2·C·Σ w)`, W all parameters but biases:
    of the full head its kernel, of a tree its node kernel, of an adaptive head the
    kernels of shortlist and tails, and the projections.

    Args:
      source: features of N rows.
      labels: [N] integers in [0, V), or None with targets.
      weights: [N], not negative, class weights multiplied in; None for 1.
      num_classes: V.
      targets: [N, V], a teacher's probabilities at `temperature`, for the full head.
      head: "full"; "hierarchical", by the Huffman tree of the labels; or "adaptive",
        whose bands are cut by them.
      C: inverse of the penalty's strength; infinity for none.
      fit_intercept: whether there are biases.
      reference: a class of the full head whose row stays 0, or None.
      label_smoothing: ε in [0, 1], of the full head.
      temperature: T of the targets' softmax, whose loss is multiplied by T².
      target_weight: share of the targets' loss where there are labels, too.
      optimizer: a transformation of Optax; or a function from a learning rate to one,
        such as `optax.sgd`. None takes Adam; with the hierarchical head, in the rows on
        the labels' paths alone (see Notes).
      learning_rate: a number, the peak of a linear warm-up and of a cosine's decay to 0
        over `max_iter` epochs; or a schedule. None takes 2 over the mean absolute sum
        of a row's features, at most 0.3. Not with a transformation, which has its own.
      batch_size: B; None takes `default_batch_size`, or N where that is less.
      max_iter: epochs, at most. None is for `partial_fit`: the rate does not decay.
      tol: an epoch whose mean objective is not this much below the best one is stale.
        After five of them the rate goes down to 0, over as many steps as there were
        and at least 20 epochs, and the run ends; with a caller's schedule or
        transformation it ends at once. 0 for no such rule.
      seed: of the order of the rows, and of initial parameters.
      mesh: devices that share each batch along its axis `data`; None takes the first.
      start: parameters to start at: a row a class of the full head, or a head.
      dtype: float32, or float64 in a context that enables it.

    Returns:
      The solver.

    Raises:
      MeshError: if the mesh does not divide the batch.
      TypeError: if an argument has a wrong type.
      ValueError: if it is out of its range, or does not go with another.

    Notes:
      The mean objective of an epoch is unbiased, whatever weights the batches have.
      With row updates, moments are those of `jaxsoft.row_adam`, and a row's penalty is
      spread over the visits that it has in an epoch: rows that the batch does not visit
      are not decayed in this step, and more in their next one.
    """
    rows = TrainingRows(source, labels, targets, weights)
    _check_head(head, rows, label_smoothing, reference)
    default = default_batch_size(source.num_features, dtype)
    size = _batch_size(batch_size, default, len(source), max_iter, mesh)
    order = BatchOrder(len(source), size, seed)
    steps = order.steps_per_epoch
    schedule, peak, make = _optimization(optimizer, learning_rate, source, dtype)
    total = rows.total_weight()
    if not total > 0:
        raise ValueError(f"`weights` must have a positive sum, got {total:g}.")
    by_rows = head == "hierarchical" and optimizer is None
    graph, params, tables = _start(
        rows, num_classes, head, by_rows, fit_intercept, reference, seed, start, dtype
    )
    if start is None and head == "full" and max_iter is None:
        # The first rows of `partial_fit` need not have all classes.
        params["bias"] = jnp.zeros_like(params["bias"])
    plan = Plan(
        optimizer=make,
        schedule=schedule,
        mesh=usable_mesh(mesh, size),
        by_rows=by_rows,
        anneals=peak is not None,
        graph=graph,
        intercept=fit_intercept,
        reference=reference,
        label_smoothing=label_smoothing,
        temperature=temperature,
        target_weight=target_weight,
    )
    share = steps / total
    penalty = 0.0 if math.isinf(C) else 1.0 / (C * total)
    planned = math.inf if max_iter is None else max_iter * steps
    rate = _default_rate(peak or 0.0, planned)
    return MinibatchSolver(
        rows,
        plan,
        Numbers(share, penalty, steps, tol if tol > 0 else -math.inf, PATIENCE, rate),
        order,
        params=params,
        tables=tables,
        batch_size=size,
        segment_steps=_segment_steps(rows, size, params, by_rows, dtype),
        max_iter=max_iter,
        dtype=dtype,
    )


@dataclass(frozen=True)
class _Given:
    """Makes a transformation that has its own learning rate; equal for an equal one."""

    optimizer: optax.GradientTransformation

    def __call__(self, rate: object) -> optax.GradientTransformation:
        return self.optimizer


def _default_rate(peak: float, planned: float) -> WarmupCosine:
    """Returns the rate over some steps, a tenth of them, at most 100, on the way up."""
    warmup = min(max(1, planned // 10), _MOST_WARMUP)
    return WarmupCosine(peak, warmup, max(1, planned - warmup))


def _peak(source: RowSource, dtype: DTypeLike) -> float:
    """Returns the default learning rate, from rows at even distances."""
    count = min(_ROWS_MEASURED, len(source))
    rows = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    step = rows_within(_BATCH_BYTES, source.num_features, dtype)
    parts = (source.read(rows[at : at + step], dtype) for at in range(0, count, step))
    sizes = [np.abs(part).sum(axis=1, dtype=np.float64) for part in parts]
    sizes = np.concatenate(sizes)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    size = float(sizes.mean()) if len(sizes) else 1.0
    return min(_MOST_MOVE / size, _HIGHEST_RATE)


def _optimization(
    optimizer: Optimizer | None,
    learning_rate: float | optax.Schedule | None,
    source: RowSource,
    dtype: DTypeLike,
) -> tuple[optax.Schedule | None, float | None, MakeOptimizer]:
    """Returns a caller's schedule, or else a peak, and the optimizer by rate."""
    if isinstance(optimizer, optax.GradientTransformation):
        if learning_rate is not None:
            raise ValueError(
                "`learning_rate` must be None with a transformation, which has its "
                f"own, got {learning_rate!r}; give a function such as optax.sgd as "
                "`optimizer` to set the rate."
            )
        return None, None, _Given(optimizer)
    make = optax.adam if optimizer is None else optimizer
    if not callable(make):
        raise TypeError(
            "`optimizer` must be an Optax transformation, a function from a learning "
            f"rate to one, or None, got {optimizer!r}."
        )
    if callable(learning_rate):
        return learning_rate, None, make
    rate = _peak(source, dtype) if learning_rate is None else learning_rate
    rate = checks.scalar_in("learning_rate", rate, 0, math.inf)
    return None, rate, make


def _check_head(
    head: str, rows: TrainingRows, label_smoothing: float, reference: int | None
) -> None:
    """Raises where options do not go together."""
    checks.one_of("head", head, HEADS)
    if rows.labels is None and rows.targets is None:
        raise ValueError("`labels` must be given where there are no targets, got None.")
    if head == "full":
        return
    for name, wrong, value in (
        ("targets", rows.targets is not None, "an array"),
        ("label_smoothing", label_smoothing != 0, label_smoothing),
        ("reference", reference is not None, reference),
    ):
        if wrong:
            nothing = 0 if name == "label_smoothing" else None
            raise ValueError(
                f"`{name}` must be {nothing} with `head` {head!r}, which does not "
                f'compute all logits, got {value}; take `head` "full".'
            )


def _batch_size(
    given: int | None,
    default: int,
    num_rows: int,
    max_iter: int | None,
    mesh: Mesh | None,
) -> int:
    """Returns rows a batch: without `max_iter` the same for few rows."""
    if given is not None:
        return checks.positive_integer("batch_size", given)
    size = default if max_iter is None else min(default, num_rows)
    devices = 1 if mesh is None else mesh.shape.get(DATA, 1)
    return -(-size // devices) * devices


def _start(
    rows: TrainingRows,
    num_classes: int,
    head: RegressionHead,
    by_rows: bool,
    fit_intercept: bool,
    reference: int | None,
    seed: int,
    start: Coefficients | Head | None,
    dtype: DTypeLike,
) -> tuple[nnx.GraphDef[Head] | None, Params, Tables]:
    """Returns structure, parameters and tables to start with."""
    if head == "full":
        graph, tables = None, ()
        assert start is None or isinstance(start, tuple)
        params = _full_parameters(rows, num_classes, reference, fit_intercept, start)
    else:
        counts = rows.counts(num_classes)
        assert not isinstance(start, tuple)
        graph, params, tables = _head_parameters(
            head, counts, rows.source.num_features, fit_intercept, seed, start
        )
        if by_rows:
            made = nnx.merge(graph, params, tables)
            tables = tables, jnp.asarray(_visits(made, counts), dtype)
    return graph, jax.tree.map(lambda leaf: jnp.array(leaf, dtype), params), tables


def _full_parameters(
    rows: TrainingRows,
    num_classes: int,
    reference: int | None,
    fit_intercept: bool,
    start: Coefficients | None,
) -> dict[str, np.ndarray]:
    """Returns the given start, or no weights and the classes' log-frequencies."""
    if start is not None:
        coef, intercept = start
        return {"kernel": coef, "bias": intercept}
    bias = np.zeros(num_classes)
    if fit_intercept and rows.labels is not None:
        bias = unigram_log_probs(np.bincount(rows.labels, rows.weights, num_classes))
        bias = bias - (bias.mean() if reference is None else bias[reference])
    return {"kernel": np.zeros((num_classes, rows.source.num_features)), "bias": bias}


def _head_parameters(
    head: RegressionHead,
    counts: np.ndarray,
    num_features: int,
    fit_intercept: bool,
    seed: int,
    start: Head | None,
) -> tuple[nnx.GraphDef[Head], Params, Tables]:
    """Returns structure, parameters and tables of a head."""
    if start is None:
        plan = HeadPlan(head, tuple(counts.tolist()))
        start = plan.build(num_features, rngs=nnx.Rngs(seed))
    graph, params, tables = nnx.split(start, nnx.Param, ...)
    if not fit_intercept:
        params = jax.tree.map(
            lambda leaf: leaf if leaf.ndim > 1 else jnp.zeros_like(leaf), params
        )
    return graph, params, tables


_paths = jax.jit(functools.partial(ClassTree.paths, axis=0))


def _visits(head: Head, counts: np.ndarray) -> np.ndarray:
    """Returns how often an epoch visits each row of a tree; 1 for one it does not."""
    assert isinstance(head, HierarchicalSoftmaxHead)
    tree = head.tree.get_value()
    every = jnp.arange(tree.num_classes, dtype=jnp.int32)
    paths = _paths(tree, every)
    visits = np.zeros(tree.num_rows)
    for first, number in zip(*map(np.asarray, paths[:2]), strict=True):
        inside = number > 0
        np.add.at(visits, first[inside], counts[inside])
    return np.maximum(visits, 1)


def _segment_steps(
    rows: TrainingRows, size: int, params: Params, by_rows: bool, dtype: DTypeLike
) -> int:
    """Returns how many steps to compile together."""
    item = np.dtype(dtype).itemsize
    width = rows.source.num_features + 2
    if rows.targets is not None:
        width += rows.targets.shape[1]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Row updates touch some tens of rows a token at most.
    touched = min(numbers, 64 * width) if by_rows else numbers
    seconds = 6.0 * size * touched / _FLOPS
    seconds += 8.0 * item * (size * touched if by_rows else numbers) / _BYTES
    least = 1e-4
    by_time = int(_SECONDS / max(seconds, least))
    by_memory = _BLOCK_BYTES // (size * width * item)
    return max(1, min(by_time, by_memory, _MOST_STEPS))
