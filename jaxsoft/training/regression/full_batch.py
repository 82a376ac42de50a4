"""Fits by solvers that read all rows in every iteration: L-BFGS, Newton, FISTA."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft.training.mesh import DATA
from jaxsoft.training.regression.fista import FISTA
from jaxsoft.training.regression.inputs import Rows, is_sparse
from jaxsoft.training.regression.lbfgs import LBFGS
from jaxsoft.training.regression.newton import Newton
from jaxsoft.training.regression.objective import Data, Parameters, Plan
from jaxsoft.training.regression.sparse_tiles import sparse_tiles, tile_rows
from jaxsoft.training.regression.whitening import whitening

# Newton's Hessian has the square of so many numbers at most where it is chosen.
_NEWTON_SIZE = 256
# Multiplications for which an iteration of Newton's method costs no more than the
# ten of L-BFGS that it saves.
_NEWTON_WORK = 1e7
# Problems of so many multiplications a pass are solved in float64, which takes no time
# there; rounding of float32 would leave the fourth digit of the coefficients open.
_DOUBLE_WORK = 2**24
# Bytes of the logits that exist at a time.
_TILE_BYTES = 2**23
# Up to so many bytes sparse features are made dense.
_DENSE_BYTES = 2**26
# Rows of small data are padded to one of eight sizes between powers of 2, so that
# the folds of a cross-validation share their programs.
_PADDED_BYTES = 2**26


@dataclass(frozen=True)
class Options:
    """How to fit.

    Attributes:
      solver: "auto", "lbfgs", "newton" or "fista".
      C: inverse strength of the penalty.
      l1_ratio: share of the L1 penalty.
      intercept: whether there is a bias.
      reference: index of the class without parameters, or None.
      label_smoothing: ε.
      temperature: at which targets are compared.
      target_weight: share of the targets' loss where there are labels too.
      tol: largest absolute entry of the gradient at which to stop.
      max_iter: iterations at most.
      mesh: devices with the axis `data`, or None.
    """

    solver: str
    C: float
    l1_ratio: float
    intercept: bool
    reference: int | None
    label_smoothing: float
    temperature: float
    target_weight: float
    tol: float
    max_iter: int
    mesh: Mesh | None


def choose(options: Options, rows: Rows) -> str:
    """Returns the solver that "auto" means for some rows."""
    if options.solver == "newton" and not dense(rows.features):
        raise ValueError(
            '`solver` must not be "newton" for sparse features that are too large to '
            'be made dense, got "newton"; take "lbfgs".'
        )
    if options.solver != "auto":
        return options.solver
    if options.l1_ratio > 0:
        return "fista"
    count, width = rows.features.shape
    kernel_rows = len(rows.classes) - (options.reference is not None)
    size = kernel_rows * (width + options.intercept)
    small = size <= _NEWTON_SIZE and float(count) * size * size <= _NEWTON_WORK
    return "newton" if small and dense(rows.features) else "lbfgs"


def dense(features: Any) -> bool:
    """Says whether features are computed with as a dense array."""
    count, width = features.shape
    return not is_sparse(features) or (
        count * width * features.dtype.itemsize <= _DENSE_BYTES
    )


def small(rows: Rows) -> bool:
    """Says whether rows are so few that float64 costs nothing."""
    count, width = rows.features.shape
    entries = rows.features.nnz if is_sparse(rows.features) else count * width
    return entries * len(rows.classes) <= _DOUBLE_WORK


def order_of(options: Options, num_classes: int) -> np.ndarray:
    """Returns the classes in the order of the kernel's rows, a reference class last."""
    classes = np.arange(num_classes)
    if options.reference is None:
        return classes
    return np.append(np.delete(classes, options.reference), options.reference)


def make_solver(
    options: Options, rows: Rows, start: Parameters | None
) -> LBFGS | Newton | FISTA:
    """Makes the solver of a problem.

    Args:
      options: how to fit; `solver` is not "auto".
      rows: what to fit to.
      start: the first classifier, in the order of `order_of`; None starts with zero
        weights and the intercepts of the classes' shares.

    Returns:
      The solver, its arrays on the devices.
    """
    order = order_of(options, len(rows.classes))
    kernel_rows = len(order) - (options.reference is not None)
    total = rows.weights.sum()
    strength = 0.0 if np.isinf(options.C) else 1.0 / (options.C * total)
    smooth, sparse = (1 - options.l1_ratio) * strength, options.l1_ratio * strength
    prior = rows.prior()[order]
    prior = (1 - options.label_smoothing) * prior + options.label_smoothing / len(prior)
    if start is None:
        start = _start(rows, prior, kernel_rows, intercept=options.intercept)
    plan, data = _place(options, rows, order, kernel_rows)
    problem = {"strength": smooth, "tol": options.tol, "max_iter": options.max_iter}
    if options.solver == "newton":
        return Newton(plan, data, start, **problem)
    coordinates = whitening(
        rows.features,
        rows.weights,
        prior[:kernel_rows],
        strength,
        intercept=options.intercept,
        diagonal=options.solver == "fista",
    )
    if options.solver == "fista":
        return FISTA(plan, data, coordinates, start, sparsity=sparse, **problem)
    return LBFGS(plan, data, coordinates, start, **problem)


def _start(
    rows: Rows, prior: np.ndarray, kernel_rows: int, *, intercept: bool
) -> Parameters:
    """Returns the best classifier that does not look at the features."""
    kernel = np.zeros((kernel_rows, rows.features.shape[1]), rows.dtype)
    if not intercept:
        return Parameters(kernel, None)
    # A class that is not there starts low, not at minus infinity.
    bias = np.log(np.maximum(prior, 1 / (4 * len(rows.weights))))
    offset = bias.mean() if kernel_rows == len(bias) else bias[-1]
    return Parameters(kernel, (bias - offset)[:kernel_rows].astype(rows.dtype))


def _place(
    options: Options, rows: Rows, order: np.ndarray, kernel_rows: int
) -> tuple[Plan, Data]:
    """Puts the rows on the devices."""
    mesh, dtype = options.mesh, rows.dtype
    devices = 1 if mesh is None else mesh.shape[DATA]
    features, count = rows.features, rows.features.shape[0]
    if dense(features):
        features = features.toarray() if is_sparse(features) else features
        padded = _padded(count, features.nbytes, devices)
        features = _pad(features, padded)
        # A row's logits; of Newton's Hessian, the features by each class.
        row = len(order) * dtype.itemsize
        if options.solver == "newton":
            row *= features.shape[1] + options.intercept
        tile = min(padded // devices, max(_TILE_BYTES // row, 256))
        if count * row <= 8 * _TILE_BYTES * devices:
            tile = padded // devices
    else:
        tile = tile_rows(features, kernel_rows, devices)
        features = sparse_tiles(features, tile, devices)
        padded = features.num_tiles * tile
    position = np.argsort(order).astype(np.int32)
    data = Data(
        features,
        None if rows.labels is None else _pad(position[rows.labels], padded),
        None if rows.targets is None else _pad(rows.targets[:, order], padded),
        _pad((rows.weights / rows.weights.sum()).astype(dtype), padded),
    )
    sharding = None if mesh is None else NamedSharding(mesh, P(DATA))
    plan = Plan(
        num_classes=len(order),
        reference=options.reference is not None,
        intercept=options.intercept,
        tile_rows=tile,
        label_smoothing=options.label_smoothing,
        temperature=options.temperature,
        target_weight=options.target_weight,
        mesh=mesh,
    )
    return plan, jax.device_put(data, sharding)


def _padded(count: int, num_bytes: int, devices: int) -> int:
    """Returns the number of rows that data of a size are padded to."""
    step = 1
    if num_bytes <= _PADDED_BYTES:
        step = 2 ** max(0, count.bit_length() - 4)
    count = -(-count // step) * step
    return -(-count // devices) * devices


def _pad(array: np.ndarray, count: int) -> np.ndarray:
    """Adds rows of zeros."""
    missing = count - len(array)
    if not missing:
        return array
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
