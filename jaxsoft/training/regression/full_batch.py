"""Fits by solvers that read all rows in every iteration: L-BFGS, Newton, FISTA."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft.training.mesh import DATA
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.fista import FISTA
from jaxsoft.training.regression.full_batch_solver import FullBatchSolver, State
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.inputs import (
    Csr,
    Matrix,
    Rows,
    SourceFeatures,
    is_sparse,
)
from jaxsoft.training.regression.lbfgs import LBFGS
from jaxsoft.training.regression.newton import Newton
from jaxsoft.training.regression.objective import Data, Parameters, Plan
from jaxsoft.training.regression.padding import bucket_for, pad_rows
from jaxsoft.training.regression.solving import (
    GRADIENT,
    NON_FINITE,
    OBJECTIVE,
    STALLED,
    UNBOUNDED,
    Status,
)
from jaxsoft.training.regression.sparse_tiles import sparse_tiles, tile_rows
from jaxsoft.training.regression.standardisation import (
    Standardisation,
    standardisation,
)
from jaxsoft.training.regression.whitening import whitening

__all__ = [
    "choose",
    "dense",
    "judged",
    "make_solver",
    "order_of",
    "small",
    "successor",
]

# Newton's Hessian has the square of so many numbers at most where it is chosen.
_NEWTON_SIZE = 256
# Multiplications for which an iteration of Newton's method costs no more than the
# ten of L-BFGS that it saves.
_NEWTON_WORK = 1e7
# Sizes and multiplications of an iteration up to which Newton's method takes over where
# another solver fails.
_LARGEST_SIZE, _LARGEST_WORK = 1024, 1e10
# Problems of so many multiplications a pass are solved in float64, which takes no time
# there; rounding of float32 would leave the fourth digit of the coefficients open.
_DOUBLE_WORK = 2**24
# Bytes of the logits that exist at a time.
_TILE_BYTES = 2**23
# Up to so many bytes sparse features are made dense.
_DENSE_BYTES = 2**26
# Rows of data up to so many bytes are padded to one of few sizes.
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
    # Without a penalty there is nothing that L1 would have a share of.
    if p.l1_ratio > 0 and not np.isinf(p.C):
        return "fista"
    return "newton" if _newton(p, rows, _NEWTON_SIZE, _NEWTON_WORK) else "lbfgs"


def _newton(parameters: Hyperparameters, rows: Rows, most: int, work: float) -> bool:
    """Says whether Newton's method has a size and a cost up to some."""
    count, width = rows.features.shape
    kernel_rows = len(rows.classes) - (parameters.reference(rows.classes) is not None)
    size = kernel_rows * (width + bool(parameters.fit_intercept))
    small = size <= most and float(count) * size * size <= work
    return small and dense(rows.features)


def successor(
    parameters: Hyperparameters,
    rows: Rows,
    solver: str,
    run: FullBatchSolver,
    state: State,
    status: Status,
    *,
    warm: bool,
) -> str | None:
    """Returns the solver that takes over where another one failed, or None.

    Args:
      parameters: of the estimator.
      rows: what is fitted to.
      solver: the name of the one that ended.
      run: itself.
      state: where it ended.
      status: how.
      warm: whether it began where another fit ended.
    """
    if status.reason not in (GRADIENT, OBJECTIVE, STALLED, NON_FINITE):
        return None
    if judged(run, state, status).reason == UNBOUNDED:
        return None
    newton = _newton(parameters, rows, _LARGEST_SIZE, _LARGEST_WORK)
    # That there is no minimum along a direction that leaves some rows as they are, the
    # steps of Newton's method alone show, and not if they begin far out.
    if newton and not run.penalised() and (solver != "newton" or warm):
        return "newton"
    if status.reason in (GRADIENT, OBJECTIVE):
        return None
    if solver == "fista":
        return solver
    return "newton" if newton and solver != "newton" else "lbfgs"


def judged(run: FullBatchSolver, state: State, status: Status) -> Status:
    """Returns how a solver ended, unbounded where its classifier shows it.

    Args:
      run: the solver.
      state: where it ended.
      status: how it says it did.
    """
    if status.reason in (GRADIENT, OBJECTIVE, STALLED) and not run.penalised():
        if run.separates(state):
            return status._replace(reason=UNBOUNDED)
    return status


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
    parameters: Hyperparameters,
    rows: Rows,
    solver: str,
    start: Coefficients | None,
    before: int = 0,
) -> FullBatchSolver:
    """Makes the solver of a problem.

    Args:
      parameters: of the estimator.
      rows: what to fit to.
      solver: "lbfgs", "newton" or "fista".
      start: the first classifier, a row a class, of which a reference class's is 0;
        None starts with zero weights and the intercepts of the classes' shares.
      before: iterations of a solver that this one goes on from.

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
    strength = strength - sparse
    prior = rows.prior()[order]
    prior = (1 - p.label_smoothing) * prior + p.label_smoothing / len(prior)
    if start is None:
        first = _start(rows, prior, kernel_rows, intercept=intercept)
    else:
        first = start.parameters(order[:kernel_rows], bias=intercept)
    features = rows.features
    assert not isinstance(features, SourceFeatures)
    if dense(features) and not isinstance(features, np.ndarray):
        features = features.toarray()
    # What curvature a class has on average, as in `whitening`.
    spread = np.mean(prior[:kernel_rows] * (1 - prior[:kernel_rows]))
    spread = max(spread, 1 / (4 * len(rows.weights)))
    standard = standardisation(
        features, rows.weights, float(strength / spread), centre=intercept
    )
    strengths = standard.strengths(strength)
    plan, data, features = _place(p, rows, features, standard, solver, order)
    make = {"lbfgs": LBFGS, "newton": Newton, "fista": FISTA}[solver]
    coordinates = None
    if solver != "newton":
        coordinates = whitening(
            features,
            rows.weights,
            prior[:kernel_rows],
            strengths,
            intercept=intercept,
            diagonal=solver == "fista",
        )
    return make(
        plan,
        data,
        first,
        coordinates=coordinates,
        standard=standard,
        strength=strengths,
        sparsity=standard.thresholds(sparse),
        tol=float(p.tol),
        max_iter=before + p.iterations(),
        before=before,
        rows=rows.features.shape[0],
    )


def _start(
    rows: Rows, prior: np.ndarray, kernel_rows: int, *, intercept: bool
) -> Parameters:
    """Returns the best classifier that does not look at the features."""
    kernel = np.zeros((kernel_rows, rows.features.shape[1]))
    if not intercept:
        return Parameters(kernel, None)
    # A class that is not there starts low, not at minus infinity.
    bias = np.log(np.maximum(prior, 1 / (4 * len(rows.weights))))
    offset = bias.mean() if kernel_rows == len(bias) else bias[-1]
    return Parameters(kernel, (bias - offset)[:kernel_rows])


def _place(
    parameters: Hyperparameters,
    rows: Rows,
    features: np.ndarray | Csr,
    standard: Standardisation,
    solver: str,
    order: np.ndarray,
) -> tuple[Plan, Data, np.ndarray | Csr]:
    """Puts the rows on the devices, and returns their features of one scale, too."""
    mesh, dtype = parameters.mesh, rows.dtype
    intercept = bool(parameters.fit_intercept)
    reference = parameters.reference(rows.classes) is not None
    devices = 1 if mesh is None else mesh.shape[DATA]
    count, kernel_rows = features.shape[0], len(order) - reference
    if isinstance(features, np.ndarray):
        # A row's logits; of Newton's Hessian, the features by each class.
        row, size = len(order), kernel_rows * (features.shape[1] + intercept)
        if solver == "newton":
            row, size = row * (features.shape[1] + intercept), size * size
        row *= dtype.itemsize
        padded = count
        if features.nbytes <= _PADDED_BYTES:
            padded = bucket_for(count, size)
        padded = -(-padded // devices) * devices
        scaled = standard.apply(features, rows.weights > 0, dtype, padded)
        placed, scaled = scaled, scaled[:count]
        tile = min(padded // devices, max(_TILE_BYTES // row, 256))
        if count * row <= 8 * _TILE_BYTES * devices:
            tile = padded // devices
    else:
        scaled = standard.apply_sparse(features, dtype)
        tile = tile_rows(scaled, kernel_rows, devices)
        placed = sparse_tiles(scaled, tile, devices)
        padded = placed.num_tiles * tile
    position = np.argsort(order).astype(np.int32)
    data = Data(
        placed,
        None if rows.labels is None else pad_rows(position[rows.labels], padded),
        None if rows.targets is None else pad_rows(rows.targets[:, order], padded),
        pad_rows((rows.weights / rows.weights.sum()).astype(dtype), padded),
    )
    sharding = None if mesh is None else NamedSharding(mesh, P(DATA))
    plan = Plan(
        num_classes=len(order),
        reference=reference,
        intercept=intercept,
        tile_rows=tile,
        label_smoothing=float(parameters.label_smoothing),
        temperature=float(parameters.distillation_temperature),
        target_weight=float(parameters.distillation_weight),
        mesh=mesh,
    )
    return plan, jax.device_put(data, sharding), scaled
