"""What a regression's run is: its configuration."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxsoft._core.options import one_of
from jaxsoft.training.memory import MemoryBudget

__all__ = ["FREE_FIELDS", "RegressConfig"]

SOLVERS = ("auto", "lbfgs", "newton", "fista", "minibatch")
HEADS = ("full", "hierarchical", "adaptive")
DTYPES = ("float32", "float64")

# A run resumed with other values of these is still the same run; the table itself is
# compared by its digest, wherever it lies now.
FREE_FIELDS = frozenset({"data", "out", "checkpoint_every", "memory"})


@dataclass(frozen=True, kw_only=True)
class RegressConfig:
    """What to fit, on what, and where to write it.

    Attributes:
      data: a table, see `read_table`; None is scikit-learn's digits.
      label: the column of the labels, by name or index; None is the last.
      drop: columns to leave out, likewise.
      weights: the column of the rows' weights, likewise, or None.
      id: the column of the rows' names, likewise, or None.
      sep: the character between cells of a text; None judges.
      encoding: of a text; None judges.
      header: whether a text's first line has names; None judges.
      out: folder of the run.
      test_fraction: share of the rows that is tested on, of each class alike.
      C: inverse strength of the penalty, as in scikit-learn.
      solver: "auto", "lbfgs", "newton", "fista" or "minibatch".
      head: "full", "hierarchical" or "adaptive".
      tol: tolerance of the stopping rule.
      max_iter: the largest number of iterations, or of epochs of minibatches; None
        is the solver's own.
      standardize: bring each column to mean 0 and standard deviation 1 for the fit.
        None does so for dense columns, divides images by their largest value, and
        leaves sparse features, and those of other heads, as they are. What is saved
        is a model of the features as they are in the file.
      calibrate: fit a temperature on held-out training rows.
      label_smoothing: share of each label that is spread over all classes.
      dtype: "float32" or "float64", of the fit.
      seed: seed of the split and of the solver.
      checkpoint_every: seconds between checkpoints.
      memory: the most that the table may take, such as "4G"; None is half of what is
        free.
    """

    data: str | None = None
    label: str | None = None
    drop: tuple[str, ...] = ()
    weights: str | None = None
    id: str | None = None
    sep: str | None = None
    encoding: str | None = None
    header: bool | None = None
    out: str = "jaxsoft-regression"
    test_fraction: float = 0.25
    C: float = 1.0
    solver: Literal["auto", "lbfgs", "newton", "fista", "minibatch"] = "auto"
    head: Literal["full", "hierarchical", "adaptive"] = "full"
    tol: float = 1e-8
    max_iter: int | None = None
    standardize: bool | None = None
    calibrate: bool = False
    label_smoothing: float = 0.0
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0
    checkpoint_every: float = 30.0
    memory: str | None = None

    def __post_init__(self) -> None:
        """Checks all values; raises `ValueError`."""
        for name, options in (("solver", SOLVERS), ("head", HEADS), ("dtype", DTYPES)):
            one_of(name, getattr(self, name), options)
        MemoryBudget.parse(self.memory)
        if not 0 < self.test_fraction < 1:
            raise ValueError(
                f"`test_fraction` must be between 0 and 1, got {self.test_fraction}."
            )
        for name in ("C", "tol", "max_iter"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}."
            )
        if not 0 <= self.checkpoint_every < math.inf:
            raise ValueError(
                f"`checkpoint_every` must not be negative, got {self.checkpoint_every}."
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"`seed` must be in [0, 2**31), got {self.seed}.")
        for name, only_full in (
            ("solver", self.solver not in ("auto", "minibatch")),
            ("standardize", self.standardize),
            ("calibrate", self.calibrate),
            ("label_smoothing", self.label_smoothing > 0),
        ):
            if self.head != "full" and only_full:
                raise ValueError(
                    f"`{name}` must be left out with `head` {self.head!r}, got "
                    f"{getattr(self, name)!r}."
                )
