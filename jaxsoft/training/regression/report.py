"""What a regression's run measured."""

import dataclasses
from dataclasses import dataclass

from jaxsoft.training.regression.measures import Measures
from jaxsoft.training.reporting import Record

__all__ = ["RegressionReport"]


@dataclass(frozen=True)
class RegressionReport:
    """What a finished run measured; also the contents of its `metrics.json`.

    Attributes:
      train: on the training rows.
      test: on the test rows.
      classes: K, as Python values.
      features: d.
      recall: of each class, the share of its test rows that are predicted; None
        where it has none.
      confusion: [K][K] test rows, true classes by predicted ones; None for more than
        100 classes.
      objective: of the fit, on scaled features.
      iterations: made by the solver.
      converged: whether the stopping rule was met.
      stopping_reason: which part of it.
      solver: which one.
      temperature: 1 unless calibrated.
      scaling: "columns", "image" or "none".
      seconds: time of the fit in the last process of the run, compilation included.
    """

    train: Measures
    test: Measures
    classes: tuple[bool | int | float | str, ...]
    features: int
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    objective: float
    iterations: int
    converged: bool
    stopping_reason: str
    solver: str
    temperature: float
    scaling: str
    seconds: float

    def __post_init__(self) -> None:
        """Raises `ValueError` unless all is there of each class."""
        lengths = [len(self.recall)]
        if self.confusion is not None:
            lengths += [len(self.confusion), *map(len, self.confusion)]
        if {len(self.classes)} != set(lengths) or set(self.recall) <= {None}:
            raise ValueError(
                f"`recall` and `confusion` must be of {len(self.classes)} classes, "
                f"got {sorted(set(lengths))}."
            )

    def record(self) -> Record:
        """The contents of `metrics.json`."""
        return dataclasses.asdict(self)
