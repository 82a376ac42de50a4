"""How well an estimator predicts, measured in chunks: [n, K] is never stored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxsoft.logits.calibration import expected_calibration_error
from jaxsoft.training.errors import TableError
from jaxsoft.training.reliability import reliability_diagram

if TYPE_CHECKING:
    from jaxsoft.training.regression.estimator import SoftmaxRegression
    from jaxsoft.training.regression.inputs import Csr

__all__ = ["Measures", "Predictions", "class_indices", "measure", "predict"]

# Probabilities that are in memory at a time.
_CHUNK = 2**24


@dataclass(frozen=True)
class Measures:
    """How well classes are predicted.

    Attributes:
      rows: number of rows measured.
      accuracy: share of rows whose most probable class is the label.
      log_loss: mean of −log p(label), in nats.
      calibration_error: expected calibration error, in 15 bins.
    """

    rows: int
    accuracy: float
    log_loss: float
    calibration_error: float


class Predictions(NamedTuple):
    """What is kept of the probabilities of n rows.

    Attributes:
      predicted: [n] index of the most probable class.
      confidence: [n] its probability.
      labels: [n] index of the label, or None.
      log_probs: [n] log-probability of the label, or None.
      correct: [n] whether prediction and label agree, or None.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    labels: np.ndarray | None = None
    log_probs: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Predictions":
        """Returns some rows."""
        parts = (None if part is None else part[rows] for part in self)
        return Predictions(*parts)  # type: ignore[arg-type]

    @property
    def correct(self) -> np.ndarray:
        """Where prediction and label agree."""
        return self.predicted == self.labels

    def binary(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities [n, 2] and labels with the same confidences and hits."""
        rest = np.zeros_like(self.confidence)
        return np.stack([self.confidence, rest], 1), (~self.correct).astype(np.int32)

    def draw(self, path: Path) -> None:
        """Draws the reliability diagram."""
        reliability_diagram(*self.binary(), path)


def predict(
    estimator: "SoftmaxRegression",
    features: "np.ndarray | Csr",
    labels: np.ndarray | None,
    tell: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Predictions:
    """Predicts rows.

    Args:
      estimator: a fitted classifier.
      features: [n, d] dense or CSR.
      labels: [n] index of each label among the estimator's classes, or None.
      tell: called for each chunk of rows in turn, with the [rows] indices predicted
        and the probabilities [rows, K].

    Returns:
      The predictions.
    """
    step = max(_CHUNK // len(estimator.classes_), 1)
    predicted, confidence, log_probs = [], [], []
    for start in range(0, features.shape[0], step):
        rows = slice(start, start + step)
        logs = np.asarray(estimator.predict_log_proba(features[rows]))
        best = logs.argmax(axis=1)
        predicted.append(best)
        confidence.append(np.exp(logs[np.arange(len(best)), best]))
        if tell is not None:
            tell(best, np.exp(logs))
        if labels is not None:
            log_probs.append(logs[np.arange(len(best)), labels[rows]])
    return Predictions(
        np.concatenate(predicted),
        np.concatenate(confidence),
        labels,
        None if labels is None else np.concatenate(log_probs),
    )


def measure(predictions: Predictions) -> Measures:
    """Measures predictions whose labels are known."""
    assert predictions.log_probs is not None
    probabilities, labels = predictions.binary()
    return Measures(
        rows=len(labels),
        accuracy=float(predictions.correct.mean()),
        log_loss=float(-predictions.log_probs.mean(dtype=np.float64)),
        calibration_error=float(
            expected_calibration_error(probabilities.astype(np.float32), labels)
        ),
    )


def class_indices(
    labels: np.ndarray,
    classes: np.ndarray,
    source: str,
    place: Callable[[int], str] = "row {}".format,
) -> np.ndarray:
    """Finds labels among the classes of a model.

    Args:
      labels: [n].
      classes: [K], sorted.
      source: where the labels come from.
      place: says where the row of a label is.

    Returns:
      [n] indices.

    Raises:
      TableError: a label is none of the classes.
    """
    found, codes = np.unique(labels, return_inverse=True)
    names = found.tolist()
    if classes.dtype.kind in "UO":
        names = [str(name) for name in names]
    elif classes.dtype.kind == "b":
        flags = {"true": True, "false": False}
        names = [flags.get(str(name).lower(), name) for name in names]
    indices = {name: index for index, name in enumerate(classes.tolist())}
    result = np.array([indices.get(name, -1) for name in names], np.int64)[codes]
    if len(result) and result.min() < 0:
        row = int(np.argmin(result))
        raise TableError(
            f"{source}: the label {names[codes[row]]!r} of {place(row)} is none of the "
            f"model's {len(classes)} classes."
        )
    return result
