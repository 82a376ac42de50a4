"""The parameters of `SoftmaxRegression`: what they must be, and what they mean."""

import math
import numbers
from typing import Any

import numpy as np
from jax.sharding import Mesh
from sklearn.utils import check_random_state

from jaxsoft._core import checks
from jaxsoft.training.errors import MeshError
from jaxsoft.training.mesh import DATA
from jaxsoft.training.regression.full_batch import Options
from jaxsoft.training.regression.inputs import Rows
from jaxsoft.training.regression.minibatch import BATCH_SIZE
from jaxsoft.training.regression.settings import HEADS, SOLVERS

_FULL_BATCH = ("lbfgs", "newton", "fista")
# What `max_iter=None` stands for: iterations over all rows; and about so many steps of
# minibatches, within so many epochs.
ITERATIONS = 1000
_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 5000, 20, 1000


def check(estimator: Any) -> None:
    """Raises unless the estimator's parameters are what they must be.

    Args:
      estimator: the estimator.

    Raises:
      TypeError: a parameter has a wrong type.
      ValueError: it is out of its range, or does not go with another.
    """
    e, infinity = estimator, math.inf
    checks.one_of("solver", e.solver, SOLVERS)
    checks.one_of("head", e.head, HEADS)
    for name, low, high in (
        ("l1_ratio", 0, 1),
        ("label_smoothing", 0, 1),
        ("distillation_weight", 0, 1),
        ("tol", 0, infinity),
        ("checkpoint_seconds", 0, infinity),
    ):
        checks.scalar_in(name, getattr(e, name), low, high)
    for name, high in (("validation_fraction", 1), ("distillation_temperature", None)):
        value = getattr(e, name)
        checks.scalar_in(name, value, 0, infinity)
        if not 0 < value < (high or infinity):
            upper = f"in (0, {high})" if high else "positive and finite"
            raise ValueError(f"`{name}` must be {upper}, got {value!r}.")
    if isinstance(e.C, bool) or not isinstance(e.C, numbers.Real):
        raise TypeError(f"`C` must be a Python number, got {e.C!r}.")
    if not float(e.C) > 0:
        raise ValueError(f"`C` must be positive, got {e.C!r}.")
    for name in ("max_iter", "batch_size"):
        if getattr(e, name) is not None:
            checks.positive_integer(name, getattr(e, name))
    if e.l1_ratio > 0 and e.solver not in ("auto", "fista"):
        raise ValueError(
            f"`l1_ratio` must be 0 with `solver` {e.solver!r}, got {e.l1_ratio!r}; "
            'take "fista".'
        )
    if e.head != "full":
        for name, wrong in (
            ("solver", e.solver in _FULL_BATCH),
            ("l1_ratio", e.l1_ratio > 0),
            ("calibrate", e.calibrate),
            ("warm_start", e.warm_start),
        ):
            if wrong:
                raise ValueError(
                    f"`{name}` must be left at its default with `head` {e.head!r}, got "
                    f"{getattr(e, name)!r}."
                )
    if e.dtype is not None and np.dtype(e.dtype) not in (np.float32, np.float64):
        raise ValueError(f"`dtype` must be float32 or float64, got {e.dtype!r}.")
    if e.mesh is not None and not isinstance(e.mesh, Mesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh or None, got {e.mesh!r}.")
    if e.mesh is not None and e.mesh.shape.get(DATA) != e.mesh.size:
        raise MeshError(
            "`mesh` must have all its devices along the axis data, got "
            f"{dict(e.mesh.shape)}."
        )


def seed_of(estimator: Any) -> int:
    """Returns the seed of an estimator's `random_state`, of which None is 0."""
    state = estimator.random_state
    if state is None:
        return 0
    if isinstance(state, int | np.integer):
        return int(state)
    return int(check_random_state(state).randint(2**31 - 1))


def reference_of(estimator: Any, classes: np.ndarray) -> int | None:
    """Returns the index of the class without parameters, or None."""
    reference = estimator.reference_class
    if isinstance(reference, str) and reference == "auto":
        return 0 if len(classes) == 2 else None
    if reference is None:
        return None
    found = np.flatnonzero(classes == reference)
    if not len(found):
        raise ValueError(
            f'`reference_class` must be "auto", None or one of the classes, got '
            f"{reference!r}."
        )
    return int(found[0])


def epochs_of(estimator: Any, count: int) -> int:
    """Returns the epochs of minibatches.

    Args:
      estimator: the estimator.
      count: number of rows.
    """
    if estimator.max_iter is not None:
        return int(estimator.max_iter)
    steps = -(-count // (estimator.batch_size or BATCH_SIZE))
    return max(_FEWEST_EPOCHS, min(_MOST_EPOCHS, -(-_STEPS // steps)))


def full_batch_options(estimator: Any, rows: Rows, solver: str) -> Options:
    """Returns how an estimator fits by a solver that reads all rows.

    Args:
      estimator: the estimator.
      rows: what to fit to.
      solver: its name, or "auto".
    """
    e = estimator
    return Options(
        solver=solver,
        C=float(e.C),
        l1_ratio=float(e.l1_ratio),
        intercept=bool(e.fit_intercept),
        reference=reference_of(e, rows.classes),
        label_smoothing=float(e.label_smoothing),
        temperature=float(e.distillation_temperature),
        target_weight=float(e.distillation_weight),
        tol=float(e.tol),
        max_iter=ITERATIONS if e.max_iter is None else int(e.max_iter),
        mesh=e.mesh,
    )
