"""The job behind `jaxsoft regress`: a table in, a model and its measurements out.

The run is a function of its configuration, its table and its machine: killed at any
moment and resumed, it ends with the same coefficients, bit for bit. The split is a
function of the seed and the labels; the fit goes on from its checkpoint.
"""

import dataclasses
import importlib.metadata
import math
import time
import warnings
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxsoft.training.errors import TableError
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.column_roles import ColumnNames
from jaxsoft.training.regression.columns import Column
from jaxsoft.training.regression.measures import (
    Predictions,
    class_indices,
    measure,
    predict,
)
from jaxsoft.training.regression.report import RegressionReport
from jaxsoft.training.regression.run_files import RegressionDirectory
from jaxsoft.training.regression.saving import save_model
from jaxsoft.training.regression.scaling import Scaling, choose_scaling, fold
from jaxsoft.training.regression.settings import FREE_FIELDS, RegressConfig
from jaxsoft.training.regression.table_form import TableForm, fill, learn_fills
from jaxsoft.training.regression.tables import (
    Table,
    check_range,
    read_table,
)
from jaxsoft.training.reporting import Listener, Record
from jaxsoft.training.running import (
    check_same,
    check_same_surroundings,
    read_config,
    require_train_extra,
)

if TYPE_CHECKING:
    from jaxsoft.training.regression.estimator import SoftmaxRegression
    from jaxsoft.training.regression.inputs import Csr

__all__ = ["train_regression"]

# A report lists the confusion matrix of at most so many classes.
_LISTED_CLASSES = 100
# Share of the training rows that a temperature is fitted on.
_VALIDATION_FRACTION = 0.1


def train_regression(
    config: RegressConfig,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> RegressionReport:
    """Fits a softmax regression to a table, or goes on with one.

    Args:
      config: what to fit.
      resume: go on with the run in `config.out`, from its last checkpoint, bit for
        bit as if it had not been stopped; from the start if it has none. Of a
        finished run the report comes back.
      listener: told of progress.
      stop: asked between segments whether to stop; a stop saves first.

    Returns:
      The measurements.

    Raises:
      MissingExtraError: the extra `train` is not installed.
      TableError: the table cannot be used, or a class has too few rows to split.
      RunDirectoryError: `config.out` holds another run or, to resume, not this one.
      CheckpointError: a checkpoint cannot be written or read.
      NonFiniteLossError: the objective is no longer finite.
      TrainingInterrupted: `stop` received a signal; the run can be resumed.
    """
    require_train_extra()
    listener, stop = listener or Listener(), stop or StopRequest()
    directory = RegressionDirectory(config.out)
    if resume:
        check_same(config, read_config(config.out, RegressConfig), FREE_FIELDS)
        report = directory.read_report()
        if report is not None:
            listener.note(
                f"the run in {config.out} finished at iteration {report.iterations}"
            )
            return report
    else:
        directory.check_vacant()
    table = _read(config, listener)
    train, test = _split(table, config)
    table, form = _filled(table, config, train, listener)
    listener.note(
        f"data: {table.source}, {len(train):,} rows to train on and {len(test):,} to "
        f"test on, {table.features.shape[1]:,} features, "
        f"{len(np.unique(table.labels)):,} classes"
        + ("" if table.label_column is None else f" in {table.label_column!r}")
    )
    description = _description(config, table)
    if resume:
        check_same_surroundings(directory, description, listener, ("data",))
    scaling, features = _scaled(config, table, train, test)
    stop.check()
    if not resume:
        directory.start(description)
    started = time.monotonic()
    rows = features, table.labels[train], _part(table.weights, train)
    estimator = _fit(config, directory, rows, listener, stop)
    stop.check()
    fold(estimator, scaling)
    seconds = time.monotonic() - started
    return _finish(directory, estimator, scaling, table, form, (train, test), seconds)


class _Recorder(Listener):
    """Writes progress into the metrics file, and passes it on."""

    def __init__(self, directory: RegressionDirectory, listener: Listener):
        self.directory, self.listener = directory, listener

    def note(self, text: str) -> None:
        """Passes a line on."""
        self.listener.note(text)

    def start(self, step: int, steps: int) -> None:
        """Drops what a killed process wrote after its last checkpoint."""
        self.directory.truncate_metrics(step)
        self.listener.start(step, steps)

    def step(self, record: Record) -> None:
        """Writes a line."""
        self.directory.append(record)
        self.listener.step(record)

    def stop(self) -> None:
        """Passes the end on."""
        self.listener.stop()


def _read(config: RegressConfig, listener: Listener) -> Table:
    """Reads the table, and says what a user should know of it."""
    table = read_table(
        config.data,
        config.label,
        drop=config.drop,
        weights=config.weights,
        id=config.id,
        separator=config.sep,
        encoding=config.encoding,
        header=config.header,
        memory=MemoryBudget.parse(config.memory),
    )
    for text in table.notes:
        listener.note(text)
    return table


def _filled(
    table: Table, config: RegressConfig, train: np.ndarray, listener: Listener
) -> tuple[Table, TableForm]:
    """Fills in missing numbers, by the rows to train on; returns the table's form."""
    names = ColumnNames(
        None if table.label_column is None else str(table.label_column),
        tuple(config.drop),
        config.weights,
        config.id,
    )
    fills = learn_fills(table.features[train])
    if fills is not None:
        missing = int(np.isnan(table.features).sum())
        if missing:
            table = dataclasses.replace(table, features=fill(table.features, fills))
            listener.note(
                f"{missing:,} missing numbers are taken as their columns' means"
            )
    columns = table.columns
    if columns is None and table.feature_names is not None:
        columns = tuple(map(Column, table.feature_names))
    return table, TableForm(names, columns, fills)


def _part(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[rows]


def _split(table: Table, config: RegressConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of training and test rows, ascending."""
    from sklearn.model_selection import train_test_split

    classes, counts = np.unique(table.labels, return_counts=True)
    if counts.min() < 2:
        rare = classes.tolist()[counts.argmin()]
        raise TableError(
            f"{table.source} has one row only of the class {rare!r}; training and "
            "testing need one each."
        )
    rows = len(table.labels)
    tested = math.ceil(config.test_fraction * rows)
    if min(tested, rows - tested) < len(classes):
        raise TableError(
            f"`test_fraction` {config.test_fraction} of the {rows} rows of "
            f"{table.source} leaves fewer than its {len(classes)} classes to train or "
            "to test on; give another."
        )
    train, test = train_test_split(
        np.arange(rows),
        test_size=tested,
        stratify=table.labels,
        random_state=config.seed,
    )
    if config.calibrate:
        _, counts = np.unique(table.labels[train], return_counts=True)
        if counts.min() < 2 or _VALIDATION_FRACTION * len(train) < len(counts):
            raise TableError(
                f"`calibrate` needs more than the {len(train)} rows of "
                f"{table.source} to train on; leave it out."
            )
    return np.sort(train), np.sort(test)


def _scaled(
    config: RegressConfig, table: Table, train: np.ndarray, test: np.ndarray
) -> tuple[Scaling, "np.ndarray | Csr"]:
    """Returns the scaling, and the training rows by it; the test rows bear it, too."""
    standardize = False if config.head != "full" else config.standardize
    scaling = choose_scaling(table, train, standardize)
    check_range(table, scaling.apply(table.features[test], config.dtype), test)
    features = scaling.apply(table.features[train], config.dtype)
    check_range(table, features, train)
    return scaling, features


def _fit(
    config: RegressConfig,
    directory: RegressionDirectory,
    rows: tuple["np.ndarray | Csr", np.ndarray, np.ndarray | None],
    listener: Listener,
    stop: StopRequest,
) -> "SoftmaxRegression":
    """Fits the estimator to scaled features, labels, and weights if any."""
    from sklearn.exceptions import ConvergenceWarning

    from jaxsoft.training.regression.estimator import SoftmaxRegression
    from jaxsoft.training.regression.fitting import watched

    estimator = SoftmaxRegression(
        C=config.C,
        solver=config.solver,
        head=config.head,
        tol=config.tol,
        max_iter=config.max_iter,
        calibrate=config.calibrate,
        validation_fraction=_VALIDATION_FRACTION,
        label_smoothing=config.label_smoothing,
        random_state=config.seed,
        checkpoint_dir=str(directory.checkpoints),
        checkpoint_seconds=config.checkpoint_every,
    )
    with warnings.catch_warnings():
        # The report says it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        with watched(_Recorder(directory, listener), stop):
            return estimator.fit(*rows)


def _finish(
    directory: RegressionDirectory,
    estimator: "SoftmaxRegression",
    scaling: Scaling,
    table: Table,
    form: TableForm,
    split: tuple[np.ndarray, np.ndarray],
    seconds: float,
) -> RegressionReport:
    """Measures, and writes the model, the report, and the pictures."""
    from scipy.sparse import coo_matrix

    classes = estimator.classes_
    labels = class_indices(table.labels, classes, table.source)
    train, test = (predict(estimator, table.features[r], labels[r]) for r in split)
    ones = np.ones(len(split[1]), np.int64)
    size = (len(classes), len(classes))
    counts = coo_matrix((ones, (test.labels, test.predicted)), shape=size).tocsr()
    report = _report(estimator, scaling, table, train, test, counts, seconds)
    if table.feature_names is not None:
        estimator.feature_names_in_ = np.array(table.feature_names, object)
    save_model(estimator, directory.model, form)
    directory.write_report(report.record())
    directory.plot_confusion(counts, classes)
    test.draw(directory.reliability)
    if getattr(estimator, "coef_", None) is not None:
        directory.plot_weights(estimator.coef_, classes, table.image_shape)
    directory.plot_convergence()
    return report


def _report(
    estimator: "SoftmaxRegression",
    scaling: Scaling,
    table: Table,
    train: Predictions,
    test: Predictions,
    counts: "Csr",
    seconds: float,
) -> RegressionReport:
    """Puts the measurements together."""
    rows = np.asarray(counts.sum(axis=1)).ravel()
    recall = counts.diagonal() / np.maximum(rows, 1)
    listed = len(rows) <= _LISTED_CLASSES
    return RegressionReport(
        train=measure(train),
        test=measure(test),
        classes=tuple(estimator.classes_.tolist()),
        features=int(table.features.shape[1]),
        recall=tuple(
            value if count else None
            for value, count in zip(recall.tolist(), rows.tolist(), strict=True)
        ),
        confusion=tuple(map(tuple, counts.toarray().tolist())) if listed else None,
        objective=float(estimator.objective_),
        iterations=int(np.max(estimator.n_iter_)),
        converged=bool(estimator.converged_),
        stopping_reason=str(estimator.stopping_reason_),
        solver=str(estimator.solver_),
        temperature=float(estimator.temperature_),
        scaling=scaling.kind,
        seconds=seconds,
    )


def _description(config: RegressConfig, table: Table) -> Record:
    """Contents of `config.json`."""
    return {
        "config": dataclasses.asdict(config),
        "data": {
            "source": table.source,
            "digest": table.digest,
            "rows": int(table.features.shape[0]),
            "features": int(table.features.shape[1]),
        },
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "optax", "scikit-learn")
        },
        "device": jax.devices()[0].device_kind,
    }
