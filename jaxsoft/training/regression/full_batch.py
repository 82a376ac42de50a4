"""Fits by solvers that read all rows in every iteration: L-BFGS, Newton, FISTA."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft.training.mesh import DATA
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.fista import FISTA
from jaxsoft.training.regression.full_batch_solver import FullBatchSolver
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.inputs import Matrix, Rows, SourceFeatures, is_sparse
from jaxsoft.training.regression.lbfgs import LBFGS
from jaxsoft.training.regression.newton import Newton
from jaxsoft.training.regression.objective import Data, Parameters, Plan
from jaxsoft.training.regression.padding import bucket, pad_rows
from jaxsoft.training.regression.sparse_tiles import sparse_tiles, tile_rows
from jaxsoft.training.regression.whitening import whitening

__all__ = ["choose", "dense", "make_solver", "order_of", "small"]

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


def choose(parameters: Hyperparameters, rows: Rows) -> str:
    """Returns the solver that "auto" means for some rows."""
    p = parameters
    if p.solver == "newton" and not dense(rows.features):
        raise ValueError(
            '`solver` must not be "newton" for sparse features that are too large to '
            'be made dense, got "newton"; take "lbfgs".'
        )
    if p.solver != "auto":
        return p.solver
    if p.l1_ratio > 0:
        return "fista"
    count, width = rows.features.shape
    kernel_rows = len(rows.classes) - (p.reference(rows.classes) is not None)
    size = kernel_rows * (width + bool(p.fit_intercept))
    small = size <= _NEWTON_SIZE and float(count) * size * size <= _NEWTON_WORK
    return "newton" if small and dense(rows.features) else "lbfgs"


def dense(features: Matrix) -> bool:
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


def order_of(reference: int | None, num_classes: int) -> np.ndarray:
    """Returns the classes in the order of the kernel's rows, a reference class last."""
    classes = np.arange(num_classes)
    if reference is None:
        return classes
    return np.append(np.delete(classes, reference), reference)


def make_solver(
    parameters: Hyperparameters, rows: Rows, solver: str, start: Coefficients | None
) -> FullBatchSolver:
    """Makes the solver of a problem.

    Args:
      parameters: of the estimator.
      rows: what to fit to.
      solver: "lbfgs", "newton" or "fista".
      start: the first classifier, a row a class, of which a reference class's is 0;
        None starts with zero weights and the intercepts of the classes' shares.

    Returns:
      The solver, its arrays on the devices.
    """
    p, intercept = parameters, bool(parameters.fit_intercept)
    reference = p.reference(rows.classes)
    order = order_of(reference, len(rows.classes))
    kernel_rows = len(order) - (reference is not None)
    total = rows.weights.sum()
    strength = 0.0 if np.isinf(p.C) else 1.0 / (float(p.C) * total)
    sparse = float(p.l1_ratio) * strength
    prior = rows.prior()[order]
    prior = (1 - p.label_smoothing) * prior + p.label_smoothing / len(prior)
    if start is None:
        first = _start(rows, prior, kernel_rows, intercept=intercept)
    else:
        first = start.parameters(order[:kernel_rows], bias=intercept)
    plan, data = _place(p, rows, solver, order, kernel_rows)
    make = {"lbfgs": LBFGS, "newton": Newton, "fista": FISTA}[solver]
    coordinates = None
    if solver != "newton":
        coordinates = whitening(
            rows.features,
            rows.weights,
            prior[:kernel_rows],
            strength,
            intercept=intercept,
            diagonal=solver == "fista",
        )
    return make(
        plan,
        data,
        first,
        coordinates=coordinates,
        strength=(1 - float(p.l1_ratio)) * strength,
        sparsity=sparse,
        tol=float(p.tol),
        max_iter=p.iterations(),
        rows=rows.features.shape[0],
    )


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
    parameters: Hyperparameters,
    rows: Rows,
    solver: str,
    order: np.ndarray,
    kernel_rows: int,
) -> tuple[Plan, Data]:
    """Puts the rows on the devices."""
    mesh, dtype = parameters.mesh, rows.dtype
    intercept = bool(parameters.fit_intercept)
    devices = 1 if mesh is None else mesh.shape[DATA]
    features, count = rows.features, rows.features.shape[0]
    assert not isinstance(features, SourceFeatures)
    if isinstance(features, np.ndarray) or dense(features):
        features = features if isinstance(features, np.ndarray) else features.toarray()
        padded = bucket(count) if features.nbytes <= _PADDED_BYTES else count
        padded = -(-padded // devices) * devices
        features = pad_rows(features, padded)
        # A row's logits; of Newton's Hessian, the features by each class.
        row = len(order) * dtype.itemsize
        if solver == "newton":
            row *= features.shape[1] + intercept
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
        None if rows.labels is None else pad_rows(position[rows.labels], padded),
        None if rows.targets is None else pad_rows(rows.targets[:, order], padded),
        pad_rows((rows.weights / rows.weights.sum()).astype(dtype), padded),
    )
    sharding = None if mesh is None else NamedSharding(mesh, P(DATA))
    plan = Plan(
        num_classes=len(order),
        reference=kernel_rows < len(order),
        intercept=intercept,
        tile_rows=tile,
        label_smoothing=float(parameters.label_smoothing),
        temperature=float(parameters.distillation_temperature),
        target_weight=float(parameters.distillation_weight),
        mesh=mesh,
    )
    return plan, jax.device_put(data, sharding)
