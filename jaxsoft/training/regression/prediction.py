"""The job behind `jaxsoft predict`: a saved model and a table in, predictions out."""

import csv
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsoft.training.errors import PredictionError
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.measures import (
    Measures,
    Predictions,
    class_indices,
    measure,
    predict,
)
from jaxsoft.training.regression.saving import load_table_model
from jaxsoft.training.regression.table_form import fill
from jaxsoft.training.regression.tables import Table, check_range, read_rows
from jaxsoft.training.run_directory import check_writable, replacing
from jaxsoft.training.running import require_train_extra

if TYPE_CHECKING:
    from jaxsoft.training.regression.estimator import SoftmaxRegression

__all__ = ["PredictionReport", "predict_table"]

_MODEL_NAME = "model.safetensors"


@dataclass(frozen=True)
class PredictionReport:
    """What was predicted.

    Attributes:
      rows: how many rows.
      labelled: how many of them have a label.
      classes: the model's, as Python values.
      counts: how often each was predicted.
      measures: how well, of the rows with labels; None where there are none.
      out: the file written, or None.
      notes: what a user should know of the table.
    """

    rows: int
    labelled: int
    classes: tuple[Any, ...]
    counts: tuple[int, ...]
    measures: Measures | None
    out: Path | None
    notes: tuple[str, ...] = ()


def predict_table(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    label: str | int | None = None,
    out: str | os.PathLike[str] | None = None,
    probabilities: bool = False,
    id: str | int | None = None,
    sep: str | None = None,
    encoding: str | None = None,
    header: bool | None = None,
    memory: str | None = None,
) -> PredictionReport:
    """Predicts the rows of a table.

    Args:
      model: the file of a `SoftmaxRegression`, or the folder of a run.
      data: a table, with labels or without; see `read_rows`.
      label: the column of the labels, if there is one; None is where the model's own
        table had them. See `read_rows`.
      out: a CSV file to write, which must not exist yet: the predicted class of each
        row, in the table's order, behind its name if it has one. None writes nothing.
      probabilities: also write the probability of each class.
      id: the column of the rows' names, if there is one; None is where the model's own
        table had them.
      sep: the character between cells of a text; None judges.
      encoding: of a text; None judges.
      header: whether a text's first line has names; None judges.
      memory: the most that the table may take, such as "4G"; None is half of what is
        free.

    Returns:
      What was predicted, and how well where labels are known.

    Raises:
      MissingExtraError: the extra `train` is not installed.
      ModelFileError: the model cannot be read.
      TableError: the table cannot be used, or is not one for this model.
      PredictionError: `out` exists already, or its folder does not.
    """
    require_train_extra()
    from jaxsoft.training.regression.estimator import SoftmaxRegression

    target = None if out is None else _vacant(Path(out))
    model = Path(model)
    path = model / _MODEL_NAME if model.is_dir() else model
    budget = MemoryBudget.parse(memory)
    estimator, form = load_table_model(path, SoftmaxRegression, memory=budget)
    # Without the names scikit-learn does not ask for them in an array.
    names = vars(estimator).pop("feature_names_in_", None)
    table = read_rows(
        data,
        label,
        num_features=int(estimator.n_features_in_),
        feature_names=None if names is None else tuple(names.tolist()),
        columns=form.columns,
        trained=form.names,
        id=None if id is None else str(id),
        separator=sep,
        encoding=encoding,
        header=header,
        memory=budget,
    )
    table = dataclasses.replace(table, features=fill(table.features, form.fills))
    _check_range(estimator, table)
    classes = estimator.classes_
    labels = None
    if table.labels is not None:
        labels = np.zeros(table.features.shape[0], np.int64)
        rows = np.arange(len(labels))
        rows = rows if table.labelled is None else rows[table.labelled]
        labels[rows] = class_indices(
            table.labels, classes, table.source, lambda row: table.place(int(rows[row]))
        )
    if target is None:
        predictions = predict(estimator, table.features, labels)
    else:
        predictions = _write(target, estimator, table, labels, probabilities)
    counts = np.bincount(predictions.predicted, minlength=len(classes))
    if table.labelled is not None:
        predictions = predictions.take(table.labelled)
    return PredictionReport(
        rows=int(counts.sum()),
        labelled=0 if table.labels is None else len(table.labels),
        classes=tuple(classes.tolist()),
        counts=tuple(counts.tolist()),
        measures=None if labels is None else measure(predictions),
        out=target,
        notes=table.notes,
    )


def _check_range(estimator: "SoftmaxRegression", table: Table) -> None:
    """Raises `TableError` at a value that the model's dtype cannot hold."""
    coef = getattr(estimator, "coef_", None)
    dtype = estimator.dtype or (np.float64 if coef is None else coef.dtype)
    with np.errstate(over="ignore"):
        check_range(table, table.features.astype(dtype, copy=False))


def _vacant(out: Path) -> Path:
    """Returns a path where a new file can be written."""
    try:
        if out.exists():
            raise PredictionError(f"`out` {out} exists already; name another file.")
        if not out.absolute().parent.is_dir():
            raise PredictionError(f"`out` {out} cannot be written (no such folder).")
        check_writable(out.parent)
    except OSError as error:
        raise PredictionError(
            f"`out` {out} cannot be written ({error.strerror})."
        ) from error
    return out


def _write(
    out: Path,
    estimator: "SoftmaxRegression",
    table: Table,
    labels: np.ndarray | None,
    probabilities: bool,
) -> Predictions:
    """Predicts, and writes the file whole or not at all."""
    classes = estimator.classes_.tolist()
    with replacing(out, "x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [f"probability_{name}" for name in classes] if probabilities else []
        ids = iter(table.ids or ())
        named = [] if table.id_column is None else [str(table.id_column)]
        writer.writerow([*named, "prediction", *columns])

        def write(best: np.ndarray, values: np.ndarray) -> None:
            for index, row in zip(best.tolist(), values, strict=True):
                name = [next(ids)] if named else []
                cells = row if probabilities else ()
                writer.writerow([*name, classes[index], *cells])

        predictions = predict(estimator, table.features, labels, write)
    return predictions
