"""The parameters of `SoftmaxRegression`: what they must be, and what they mean."""

import math
import numbers
import os
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import optax
from jax.sharding import Mesh
from numpy.typing import DTypeLike
from sklearn.utils import check_random_state

from jaxsoft._core import checks
from jaxsoft.training.errors import MeshError
from jaxsoft.training.mesh import DATA
from jaxsoft.training.regression.inputs import ClassWeight
from jaxsoft.training.regression.minibatch import Optimizer, RegressionHead
from jaxsoft.training.regression.settings import HEADS, SOLVERS

__all__ = ["Hyperparameters"]

_FULL_BATCH = ("lbfgs", "newton", "fista")
# What `max_iter=None` stands for: iterations over all rows; and about so many steps of
# minibatches, within so many epochs.
_ITERATIONS = 1000
_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 5000, 20, 1000


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The arguments of `SoftmaxRegression`, checked; see there what each means.

    Raises:
      TypeError: a parameter has a wrong type.
      ValueError: it is out of its range, or does not go with another.
    """

    C: float
    l1_ratio: float
    fit_intercept: bool
    class_weight: ClassWeight
    reference_class: Hashable
    label_smoothing: float
    distillation_temperature: float
    distillation_weight: float
    calibrate: bool
    validation_fraction: float
    solver: str
    tol: float
    max_iter: int | None
    warm_start: bool
    random_state: int | np.random.RandomState | None
    verbose: int
    head: RegressionHead
    optimizer: Optimizer | None
    learning_rate: float | optax.Schedule | None
    batch_size: int | None
    mesh: Mesh | None
    checkpoint_dir: str | os.PathLike[str] | None
    checkpoint_seconds: float
    dtype: DTypeLike | None

    def __post_init__(self) -> None:
        """Raises unless the parameters are what they must be."""
        checks.one_of("solver", self.solver, SOLVERS)
        checks.one_of("head", self.head, HEADS)
        for name, low, high in (
            ("l1_ratio", 0, 1),
            ("label_smoothing", 0, 1),
            ("distillation_weight", 0, 1),
            ("tol", 0, math.inf),
            ("checkpoint_seconds", 0, math.inf),
        ):
            checks.scalar_in(name, getattr(self, name), low, high)
        for name, high in (
            ("validation_fraction", 1),
            ("distillation_temperature", None),
        ):
            value = getattr(self, name)
            checks.scalar_in(name, value, 0, math.inf)
            if not 0 < value < (high or math.inf):
                upper = f"in (0, {high})" if high else "positive and finite"
                raise ValueError(f"`{name}` must be {upper}, got {value!r}.")
        if isinstance(self.C, bool) or not isinstance(self.C, numbers.Real):
            raise TypeError(f"`C` must be a Python number, got {self.C!r}.")
        if not float(self.C) > 0:
            raise ValueError(f"`C` must be positive, got {self.C!r}.")
        for name in ("max_iter", "batch_size"):
            if getattr(self, name) is not None:
                checks.positive_integer(name, getattr(self, name))
        if self.l1_ratio > 0 and self.solver not in ("auto", "fista"):
            raise ValueError(
                f"`l1_ratio` must be 0 with `solver` {self.solver!r}, got "
                f'{self.l1_ratio!r}; take "fista".'
            )
        if self.head != "full":
            self._check_other_head()
        if self.dtype is not None and np.dtype(self.dtype) not in (
            np.float32,
            np.float64,
        ):
            raise ValueError(f"`dtype` must be float32 or float64, got {self.dtype!r}.")
        if self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"`mesh` must be a jax.sharding.Mesh or None, got {self.mesh!r}."
            )
        if self.mesh is not None and self.mesh.shape.get(DATA) != self.mesh.size:
            raise MeshError(
                "`mesh` must have all its devices along the axis data, got "
                f"{dict(self.mesh.shape)}."
            )

    def _check_other_head(self) -> None:
        """Raises where a parameter is for the full head alone."""
        for name, wrong in (
            ("solver", self.solver in _FULL_BATCH),
            ("l1_ratio", self.l1_ratio > 0),
            ("calibrate", self.calibrate),
            ("warm_start", self.warm_start),
        ):
            if wrong:
                raise ValueError(
                    f"`{name}` must be left at its default with `head` {self.head!r}, "
                    f"got {getattr(self, name)!r}."
                )

    def seed(self) -> int:
        """Returns the seed of `random_state`, of which None is 0."""
        state = self.random_state
        if state is None:
            return 0
        if isinstance(state, int | np.integer):
            return int(state)
        return int(check_random_state(state).randint(2**31 - 1))

    def reference(self, classes: np.ndarray) -> int | None:
        """Returns the index of the class without parameters, or None."""
        reference = self.reference_class
        if isinstance(reference, str) and reference == "auto":
            return 0 if len(classes) == 2 else None
        if reference is None:
            return None
        places = np.flatnonzero(classes == reference)
        if not len(places):
            raise ValueError(
                f'`reference_class` must be "auto", None or one of the classes, got '
                f"{reference!r}."
            )
        return int(places[0])

    def epochs(self, count: int, batch_size: int) -> int:
        """Returns the epochs of minibatches.

        Args:
          count: number of rows.
          batch_size: of a batch, where no size is given.
        """
        if self.max_iter is not None:
            return int(self.max_iter)
        steps = -(-count // (self.batch_size or batch_size))
        return max(_FEWEST_EPOCHS, min(_MOST_EPOCHS, -(-_STEPS // steps)))

    def iterations(self) -> int:
        """Returns the most iterations over all rows."""
        return _ITERATIONS if self.max_iter is None else int(self.max_iter)
