"""`SoftmaxRegression`: scikit-learn's conventions, Optax's solvers."""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from numpy.typing import ArrayLike, DTypeLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import Tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from jaxsoft.logits.calibration import fit_temperature
from jaxsoft.logits.softmax import log_softmax, softmax
from jaxsoft.training.heads import Head
from jaxsoft.training.regression import fitting, full_batch, inputs, solving
from jaxsoft.training.regression.advice import advice
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.empty_columns import without_empty_columns
from jaxsoft.training.regression.exporting import logistic_regression
from jaxsoft.training.regression.full_batch_solver import FullBatchSolver
from jaxsoft.training.regression.head_files import pack_head, unpack_head
from jaxsoft.training.regression.head_predictions import log_probs, top_classes
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.identity import fingerprint
from jaxsoft.training.regression.inputs import ClassWeight, Csr, Features, Rows
from jaxsoft.training.regression.minibatch import Optimizer, RegressionHead
from jaxsoft.training.regression.minibatch_solver import MinibatchSolver
from jaxsoft.training.regression.minibatch_step import MinibatchState
from jaxsoft.training.regression.objective import Parameters
from jaxsoft.training.regression.padding import bucket, pad_rows
from jaxsoft.training.regression.saving import load_model, save_model
from jaxsoft.training.regression.sources import RowSource, as_source

__all__ = ["SoftmaxRegression"]

State = TypeVar("State")

# The folder in that of checkpoints where those of a second solver are.
_SECOND = "second"


def _goes_on(estimator: SoftmaxRegression) -> bool:
    """Says that there is `partial_fit`, or raises with the reason that there is not."""
    ratio = estimator.l1_ratio
    # What is no number is for `fit` to refuse.
    if isinstance(ratio, numbers.Real) and ratio > 0:
        raise AttributeError(f"`l1_ratio` must be 0 for partial_fit, got {ratio!r}.")
    return True


class SoftmaxRegression(ClassifierMixin, BaseEstimator):
    """Softmax regression (multinomial logistic regression), any number of classes.

    Minimises scikit-learn's objective, here per unit of sample weight,

        Σ_i w_i loss(x_i Wᵀ + b, y_i) / Σ_i w_i
          + (½ (1 - l1_ratio) ‖W‖² + l1_ratio ‖W‖₁) / (C Σ_i w_i)

    with cross-entropy as the loss and no penalty on b: a drop-in for
    `sklearn.linear_model.LogisticRegression` with the same optimum. Features as
    float64 are computed with in float64, as float32 in float32 (but where they are so
    few that float64 takes no time), whatever JAX's own setting is.

    Solvers:

    - "lbfgs": Optax's L-BFGS, in coordinates that whiten the features. 60,000 x 784
      with 10 classes takes a third of the iterations that it takes without.
    - "newton": Newton's method with the whole Hessian, for few classes x features; in
      float64, whatever the features are.
    - "fista": accelerated proximal gradients, for an L1 penalty.
    - "minibatch": any optimizer of Optax, for many classes, for heads other than the
      full one, and for features that stay on disk.
    - "auto": "fista" with an L1 penalty; "minibatch" if an option of it or another
      head is given, the features stay on disk, or there are more than 2²⁴
      coefficients; else "newton" where it is cheap, or "lbfgs".

    The first three bring features to one scale in float64, and undo it in the
    coefficients: neither a unit nor, with an intercept, the mean of dense features
    costs digits or iterations, and the penalty is that of the features as given. They
    stop where, of features of one scale, the largest absolute entry of the gradient is
    at most `tol` ("gradient"; of Newton's method, where its step also leads to the
    optimum within rounding or 1e-10 of the objective), or where the objective no longer
    falls beyond its rounding, and the gradient is of that size ("objective"). One that
    is larger ("stalled") is a failure, as is a value that is not finite: another of
    them takes over then, in float64. "minibatch" takes features as they are, and stops
    where the mean objective of an epoch has not fallen by `tol` for five epochs. All
    run in compiled segments, between which progress is shown, checkpoints are written
    and Ctrl-C is looked at.

    Without a penalty there is no optimum where a direction of the coefficients raises
    the label of some rows above other classes, and lowers that of none: the objective
    falls along it for ever. That is told ("unbounded", `converged_` False) of rows that
    are all classified right, and of others where Newton's method costs little enough to
    be asked, whichever solver was: up to 1024 coefficients whose square times the
    number of rows is 10¹⁰.

    Adding one vector to all rows of W, or one number to all of b, changes no
    probability. With `reference_class=None` there is a row a class, and of all equal
    classifiers the one of least norm is returned: rows and intercepts sum to 0 (but
    for an L1 penalty). With a reference class its row is 0 and the others are
    differences from it. The penalty tells the two apart: for two classes, one row at C
    is two rows at C/2.

    Args:
      C: inverse of the penalty's strength, positive; `numpy.inf` for none.
      l1_ratio: share of the L1 penalty, in [0, 1].
      fit_intercept: whether to fit b.
      class_weight: none, "balanced" or a dict from a class to its weight.
      reference_class: "auto", scikit-learn's form: the first class where there are
        two, else None. None: a row a class, always. Or a class.
      label_smoothing: ε in [0, 1], spread evenly over the classes.
      distillation_temperature: the temperature of `targets`; the logits are divided
        by it in their loss, which is multiplied by its square.
      distillation_weight: share in [0, 1] of the loss of `targets` where labels are
        given too.
      calibrate: hold out rows, and fit one temperature on them: `temperature_`; of a
        full head, on rows in memory.
      validation_fraction: share of the rows held out, by class.
      solver: see above.
      tol: where to stop. scikit-learn's is 1e-4, which leaves the sixth digit of the
        objective open; this one leaves the tenth.
      max_iter: most iterations of a solver; of "minibatch", epochs. None is 1000, and
        of epochs so many that there are about 5000 steps, 20 to 1000, in which the
        learning rate comes down to 0.
      warm_start: start at the coefficients of the last fit; of a full head. Others go
        on by `partial_fit`.
      random_state: seed of the held-out rows and of the order of minibatches; None
        is 0.
      verbose: above 0, show a progress bar.
      head: "full"; or "hierarchical" or "adaptive", of `jaxsoft.nn`, made from the
        classes' counts, whose cost a row is far below that of all classes.
      optimizer: of minibatches: a transformation of Optax, a function from a learning
        rate to one, or None for Adam.
      learning_rate: of minibatches: a number, a schedule, or None for one by the size
        of the features.
      batch_size: of minibatches; None is 256, or of wide features as many rows as are
        256 MiB where they are dense, at least 1.
      mesh: a `jax.sharding.Mesh` with the axis `data`, to divide rows over devices; an
        estimator that has one cannot be pickled.
      checkpoint_dir: folder of checkpoints. A fit with the same arguments goes on from
        the newest one there, bit for bit; one with other arguments is refused.
      checkpoint_seconds: least time between two checkpoints.
      dtype: float32 or float64 to convert features to; None keeps either.

    Attributes:
      classes_: [V] the classes, sorted.
      coef_: [V, d] W, or [1, d] for two classes with a reference class.
      intercept_: [V] or [1], b.
      head_: the `jaxsoft.nn` head, instead of the two, where `head` is not "full".
      n_features_in_, feature_names_in_: as scikit-learn's.
      n_iter_: [1] iterations or epochs made.
      converged_: whether the solver's rule was met.
      stopping_reason_: "gradient", "objective", "unbounded", "stalled", "max_iter",
        "non_finite" or "interrupted".
      objective_: the objective above, where it stopped.
      temperature_: that probabilities are computed with; 1 without `calibrate`.
      solver_: the solver that "auto" chose, or that took over.

    Notes:
      Passes scikit-learn's `check_estimator`. Sparse features of many columns, 10⁷ for
      example, are never dense as [n, d]: columns without an entry cost `coef_` alone,
      [V, d], and solvers see the others. `decision_function` gives logits before
      the temperature. Under a mesh results are the same within rounding. Coefficients
      of float32 features are float64 where a mean is so large beside its spread that
      float32 would move logits by more than 1e-3.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> from jaxsoft.training import SoftmaxRegression
      >>> X, y = load_iris(return_X_y=True)
      >>> model = SoftmaxRegression().fit(X, y)
      >>> print(model.solver_, f"{model.score(X, y):.3f}", model.coef_.shape)
      newton 0.973 (3, 4)

    References:
      Böhning, Multinomial logistic regression algorithm, Annals of the Institute of
      Statistical Mathematics 44, 1992 (the curvature that whitening uses); Liu and
      Nocedal, On the limited memory BFGS method, Mathematical Programming 45, 1989;
      Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599; Hinton
      et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """

    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    head_: Head
    n_features_in_: int
    feature_names_in_: np.ndarray
    n_iter_: np.ndarray
    converged_: bool
    stopping_reason_: str
    objective_: float
    temperature_: float
    solver_: str
    # Where `partial_fit` goes on.
    _state: MinibatchState

    def __init__(
        self,
        *,
        C: float = 1.0,  # noqa: N803
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: ClassWeight = None,
        reference_class: Hashable = "auto",
        label_smoothing: float = 0.0,
        distillation_temperature: float = 1.0,
        distillation_weight: float = 1.0,
        calibrate: bool = False,
        validation_fraction: float = 0.1,
        solver: str = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        head: RegressionHead = "full",
        optimizer: Optimizer | None = None,
        learning_rate: float | optax.Schedule | None = None,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 30.0,
        dtype: DTypeLike | None = None,
    ):
        """Keeps the parameters, which `fit` checks."""
        self.C = C
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.reference_class = reference_class
        self.label_smoothing = label_smoothing
        self.distillation_temperature = distillation_temperature
        self.distillation_weight = distillation_weight
        self.calibrate = calibrate
        self.validation_fraction = validation_fraction
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.head = head
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.mesh = mesh
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_seconds = checkpoint_seconds
        self.dtype = dtype

    def fit(
        self,
        X: Features,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        targets: ArrayLike | None = None,
    ) -> Self:
        """Fits the classifier.

        Args:
          X: [n, d] features: an array of NumPy, JAX or pandas, or SciPy's sparse
            matrix; or, read a minibatch at a time and never as a whole, what
            `load_svmlight_memmap` gives, or a `numpy.memmap` that is larger than 1 GiB
            or is given to the solver "minibatch".
          y: [n] class labels; may be None with `targets`, whose columns are then the
            classes 0 to V - 1.
          sample_weight: [n] weights >= 0, or None for 1.
          targets: [n, V] a teacher's probabilities at `distillation_temperature`, a
            column a class, or None.

        Returns:
          The estimator.

        Raises:
          TypeError: a parameter or an array has a wrong type.
          ValueError: a parameter is out of its range, or scikit-learn's checks refuse
            the arrays.
          NonFiniteLossError: the objective is no longer finite; the message names the
            step and the batch, and the attributes are of the last good parameters.
          TrainingInterrupted: Ctrl-C or SIGTERM; the attributes are of the last
            parameters, and a checkpoint is written where there is a folder for it.
          CheckpointError: a checkpoint cannot be written or read, or is of a fit with
            other rows or parameters.

        Warns:
          ConvergenceWarning: scikit-learn's, where `max_iter` stops the solver, where
            the objective has no minimum, and where solvers stalled. It names a column.
          UserWarning: a column's mean is so large beside its spread that float64 rounds
            the logits of the features as given by more than 1e-3.
        """
        self.__dict__.pop("_state", None)
        with fitting.watch(self.verbose) as watch:
            parameters = self._parameters()
            if fitting.stays_on_disk(X, parameters.solver):
                source = as_source(X)
                rows = inputs.rows_on_disk(
                    source,
                    y,
                    sample_weight,
                    targets,
                    class_weight=parameters.class_weight,
                    dtype=parameters.dtype,
                )
                self.n_features_in_ = source.num_features
            else:
                rows = self._rows(parameters, X, y, sample_weight, targets)
            if parameters.head == "full":
                start = getattr(self, "coef_", None) if parameters.warm_start else None
                rows = without_empty_columns(rows, start)
            self.solver_ = fitting.choose_solver(parameters, rows)
            training, held = fitting.hold_out(parameters, rows)
            if self.solver_ == "newton" or (
                self.solver_ != "minibatch" and full_batch.small(training)
            ):
                training = training.astype(np.dtype(np.float64))
            with jax.enable_x64(training.dtype == np.float64):
                status, told = self._solve(parameters, rows, training, watch)
                if held is not None:
                    self._calibrate(held)
        solving.check_finite(status)
        for warning in told:
            warnings.warn(warning, stacklevel=2)
        return self

    @available_if(_goes_on)
    def partial_fit(
        self,
        X: Features,
        y: ArrayLike | None = None,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        targets: ArrayLike | None = None,
    ) -> Self:
        """Goes on by one epoch of minibatches over some rows, after `fit` too.

        Args:
          X: [n, d] features.
          y: [n] class labels, or None with `targets`.
          classes: [V] all classes; needed in the first call, unless there are
            `targets`.
          sample_weight: [n], or None.
          targets: [n, V], or None.

        Returns:
          The estimator. The optimizer's state is kept for the next call; the learning
          rate does not decay. `n_iter_` counts calls, and `objective_` is the mean over
          the call's batches, each before its step.

        Notes:
          A call is an epoch of the objective of its rows alone: of a table in k parts
          the penalty weighs k times as much in each; give k times C.

        Raises:
          AttributeError: there is an L1 penalty, with which the method is not there.
          TypeError, ValueError, NonFiniteLossError: as in `fit`; or a class is not one
            of the first call's, or `class_weight` is "balanced".
        """
        parameters = self._parameters()
        if isinstance(self.class_weight, str):
            raise ValueError(
                "`class_weight` must be None or a dict for partial_fit, which does not "
                f"see all rows, got {self.class_weight!r}."
            )
        goes_on = hasattr(self, "classes_")
        known = self._known_classes(classes, targets)
        rows = self._rows(
            parameters, X, y, sample_weight, targets, classes=known, reset=not goes_on
        )
        before = getattr(self, "_state", None)
        if before is not None and before.last.dtype != rows.dtype:
            rows = rows.astype(before.last.dtype)
        with jax.enable_x64(rows.dtype == np.float64):
            self.classes_, self.solver_ = rows.classes, "minibatch"
            self.temperature_ = 1.0
            run = self._minibatches(parameters, rows, go_on=goes_on, passes=True)
            # A copy: what is interrupted in a pass starts it again.
            state = run.one_pass(jax.tree.map(jnp.copy, before))
            status = run.status(state)
            passes = 1 if before is None else int(self.n_iter_[0]) + 1
            self._set_fitted(parameters, rows, run, state, status)
            self.n_iter_ = np.array([passes], np.int32)
            self._state = state
        solving.check_finite(status)
        return self

    def decision_function(self, X: Features) -> np.ndarray:
        """Logits.

        Args:
          X: [n, d] features.

        Returns:
          [n, V] logits, before the temperature; for two classes [n], the second's
          minus the first's. For a head other than the full one, log-probabilities.
        """
        check_is_fitted(self)
        features = self._checked(X)
        if self.head == "full":
            return self._coefficients().logits(features)
        dtype = self._features_dtype(features)
        with jax.enable_x64(dtype == np.float64):
            scores = log_probs(self.head_, as_source(features), dtype=dtype)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Features) -> np.ndarray:
        """The most probable class of each row.

        Args:
          X: [n, d] features.

        Returns:
          [n] classes. Logits of all rows are not stored.
        """
        check_is_fitted(self)
        features = self._checked(X)
        if self.head == "full":
            return self.classes_[self._coefficients().best(features)]
        dtype = self._features_dtype(features)
        with jax.enable_x64(dtype == np.float64):
            best = top_classes(self.head_, as_source(features), dtype=dtype)
        return self.classes_[best]

    def predict_proba(self, X: Features) -> np.ndarray:
        """Probabilities at `temperature_`.

        Args:
          X: [n, d] features.

        Returns:
          [n, V], rows of sum 1.
        """
        return self._at_temperature(softmax, self.decision_function(X))

    def predict_log_proba(self, X: Features) -> np.ndarray:
        """Log-probabilities at `temperature_`, exact where probabilities underflow.

        Args:
          X: [n, d] features.

        Returns:
          [n, V].
        """
        return self._at_temperature(log_softmax, self.decision_function(X))

    def to_sklearn(self) -> LogisticRegression:
        """Returns a fitted `LogisticRegression` of scikit-learn that predicts alike.

        For what knows scikit-learn's class by name: converters to ONNX (skl2onnx) take
        it, as do SHAP's linear explainers.

        Returns:
          A new estimator, whose `coef_` and `intercept_` are divided by `temperature_`,
          and [1, d] and [1] for two classes: `predict_proba` is equal within rounding.
          It has this one's C, fit_intercept and class_weight; a fit of its own begins
          anew, without this one's other parameters.

        Raises:
          NotFittedError: there is nothing to copy; scikit-learn's class.
          TypeError: the head is not the full one.

        Example:
          >>> from sklearn.datasets import load_iris
          >>> from jaxsoft.training import SoftmaxRegression
          >>> X, y = load_iris(return_X_y=True)
          >>> model = SoftmaxRegression(calibrate=True).fit(X, y)
          >>> other = model.to_sklearn()
          >>> difference = other.predict_proba(X) - model.predict_proba(X)
          >>> print(other, abs(difference).max() < 1e-9)
          LogisticRegression() True
        """
        check_is_fitted(self)
        if self.head != "full":
            raise TypeError(
                f'`head` must be "full" for to_sklearn, got {self.head!r}, whose '
                "classes have no row of coefficients each."
            )
        names = "classes_", "n_features_in_", "feature_names_in_", "n_iter_"
        fitted = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return logistic_regression(
            self._coefficients(), self.temperature_, self.get_params(), fitted
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the fitted estimator to one safetensors file, without code.

        Args:
          path: the file; what is there is replaced, whole or not at all.

        Returns:
          The path of the file.

        Raises:
          ModelFileError: the file cannot be written.
          NotFittedError: there is nothing to write; scikit-learn's class.
          TypeError: an attribute is nothing that a file can hold.

        Notes:
          An optimizer, a schedule, a mesh and `checkpoint_dir` are not written.
        """
        return save_model(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads an estimator that `save` wrote.

        Args:
          path: the file.

        Returns:
          An estimator that predicts the same, bit for bit.

        Raises:
          ModelFileError: the file is missing, damaged or something else.
        """
        return load_model(path, cls)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle and copies keep: JAX's arrays as NumPy's.

        JAX's own come back as float32 where x64 is off.
        """
        kept: Any = super().__getstate__()
        state: dict[str, Any] = dict(kept)
        if "head_" in state:
            tensors: dict[str, np.ndarray] = {}
            state["head_"] = pack_head(state["head_"], tensors), tensors
        if "_state" in state:
            state["_state"] = jax.tree.map(np.asarray, state["_state"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what `__getstate__` returned."""
        head = state.get("head_")
        if isinstance(head, tuple):
            state = state | {"head_": unpack_head(*head)}
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Tags:
        """Returns scikit-learn's tags: sparse input is accepted."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _parameters(self) -> Hyperparameters:
        """Returns the parameters, checked."""
        return Hyperparameters(**self.get_params(deep=False))

    def _rows(
        self,
        parameters: Hyperparameters,
        X: Features,
        y: ArrayLike | None,
        sample_weight: ArrayLike | None,
        targets: ArrayLike | None,
        *,
        classes: np.ndarray | None = None,
        reset: bool = True,
    ) -> Rows:
        """Reads rows in memory; `reset` at the first look at their features."""
        if y is None and targets is None:
            raise ValueError(
                "`y` must be given where there are no `targets`: "
                f"{type(self).__name__} requires y to be passed, but the target y is "
                "None."
            )
        features, labels = inputs.checked(
            self, X, y, dtype=parameters.dtype, reset=reset
        )
        return inputs.rows_in_memory(
            features,
            labels,
            sample_weight,
            targets,
            class_weight=parameters.class_weight,
            classes=classes,
        )

    def _solve(
        self,
        parameters: Hyperparameters,
        rows: Rows,
        training: Rows,
        watch: fitting.Watch,
    ) -> tuple[solving.Status, list[Warning]]:
        """Runs a solver, and another where that fails; sets the fitted attributes.

        Returns:
          How it ended, and what there is to warn of.
        """
        # Asked for before any attribute of this fit is set.
        warm = parameters.warm_start and hasattr(self, "coef_")
        run = self._solver(parameters, training)
        self.classes_, self.temperature_ = rows.classes, 1.0
        folder = parameters.checkpoint_dir
        folder = None if folder is None else Path(folder)
        state, status = self._run(parameters, rows, training, run, folder, watch)
        if not isinstance(run, FullBatchSolver):
            return self._end(parameters, rows, run, state, status)
        name = full_batch.successor(
            parameters, training, self.solver_, run, state, status, warm=warm
        )
        if name is None:
            return self._end(parameters, rows, run, state, status)
        self.solver_, start = name, None
        # Newton's method needs no start, and far out no curvature is left to it.
        if name != "newton" and (
            status.reason != solving.NON_FINITE or status.iteration
        ):
            order = self._order(parameters, rows)
            start = Coefficients.of_parameters(run.fitted(state), order)
        training = training.astype(np.dtype(np.float64))
        folder = None if folder is None else folder / _SECOND
        with jax.enable_x64(True):
            run = full_batch.make_solver(
                parameters, training, name, start, status.iteration
            )
            state, status = self._run(parameters, rows, training, run, folder, watch)
            return self._end(parameters, rows, run, state, status)

    def _run(
        self,
        parameters: Hyperparameters,
        rows: Rows,
        training: Rows,
        run: solving.Solver[State],
        folder: Path | None,
        watch: fitting.Watch,
    ) -> tuple[State, solving.Status]:
        """Runs one solver to its end."""
        given = self.get_params(deep=False)
        try:
            return solving.solve(
                run,
                checkpoints=folder,
                fingerprint=lambda: fingerprint(given, self.solver_, training),
                checkpoint_seconds=parameters.checkpoint_seconds,
                listener=watch.listener,
                stop=watch.stop,
            )
        except solving.FitInterrupted as interruption:
            state: Any = interruption.state
            status = run.status(state)._replace(reason=solving.INTERRUPTED)
            self._set_fitted(parameters, rows, run, state, status)
            raise

    def _end(
        self,
        parameters: Hyperparameters,
        rows: Rows,
        run: solving.Solver[Any],
        state: Any,
        status: solving.Status,
    ) -> tuple[solving.Status, list[Warning]]:
        """Sets the fitted attributes, and returns what there is to warn of."""
        told: list[Warning] = []
        if status.reason != solving.NON_FINITE:
            status = status._replace(objective=run.objective(state))
            if isinstance(run, FullBatchSolver):
                status = full_batch.judged(run, state, status)
            told = advice(
                run,
                state,
                status,
                solver=self.solver_,
                limited=self.max_iter is not None,
                columns=rows.columns,
                names=getattr(self, "feature_names_in_", None),
            )
        self._set_fitted(parameters, rows, run, state, status)
        return status, told

    def _solver(self, parameters: Hyperparameters, rows: Rows) -> solving.Solver[Any]:
        """Makes the solver that was chosen."""
        if self.solver_ == "minibatch":
            return self._minibatches(parameters, rows)
        start = self._start(parameters, rows)
        return full_batch.make_solver(parameters, rows, self.solver_, start)

    def _minibatches(
        self,
        parameters: Hyperparameters,
        rows: Rows,
        *,
        go_on: bool = False,
        passes: bool = False,
    ) -> MinibatchSolver:
        """Makes the minibatch solver; see `fitting.make_minibatch_solver`."""
        start = self._start(parameters, rows, go_on=go_on)
        if start is not None:
            start = start.astype(rows.dtype)
        if parameters.head != "full":
            start = getattr(self, "head_", None) if go_on else None
        return fitting.make_minibatch_solver(parameters, rows, start, passes=passes)

    def _start(
        self, parameters: Hyperparameters, rows: Rows, *, go_on: bool = False
    ) -> Coefficients | None:
        """Returns a row a class to start at, or None."""
        if not ((parameters.warm_start or go_on) and hasattr(self, "coef_")):
            return None
        start = self._coefficients().by_class(None)
        shape = len(rows.classes), rows.width
        if start.coef.shape != shape:
            raise ValueError(
                f"`warm_start` must go on with {shape} coefficients, got "
                f"{start.coef.shape}: the first fit had other classes or features."
            )
        start = start.of_columns(rows.columns)
        start = start.by_class(parameters.reference(rows.classes))
        if not parameters.fit_intercept:
            start = start._replace(intercept=np.zeros_like(start.intercept))
        return start

    def _set_fitted(
        self,
        parameters: Hyperparameters,
        rows: Rows,
        run: solving.Solver[State],
        state: State,
        status: solving.Status,
    ) -> None:
        """Sets the fitted attributes of where a solver stands."""
        for name in ("head_", "coef_", "intercept_"):
            self.__dict__.pop(name, None)
        fitted = run.fitted(state)
        epochs = -(-status.iteration // run.steps_per_epoch)
        self.n_iter_ = np.array([epochs], np.int32)
        self.converged_ = status.reason in (solving.GRADIENT, solving.OBJECTIVE)
        self.stopping_reason_ = status.reason
        self.objective_ = status.objective
        if not isinstance(fitted, Parameters):
            self.head_ = fitted
            return
        order = self._order(parameters, rows)
        coefficients = Coefficients.of_parameters(fitted, order)
        reference = parameters.reference(rows.classes)
        if reference is None and self.solver_ == "minibatch":
            coefficients = coefficients.of_least_norm()
        elif reference is not None and len(order) == 2:
            coefficients = coefficients.of_second_class()
        dtype = run.coefficient_dtype(fitted, rows.dtype)
        coefficients = coefficients.astype(dtype).spread(rows.columns)
        self.coef_, self.intercept_ = coefficients

    def _order(self, parameters: Hyperparameters, rows: Rows) -> np.ndarray:
        """Returns the classes in the order of the rows of the solver's parameters."""
        if self.solver_ == "minibatch":
            return np.arange(len(rows.classes))
        reference = parameters.reference(rows.classes)
        return full_batch.order_of(reference, len(rows.classes))

    def _calibrate(self, held: Rows) -> None:
        """Fits the temperature on rows that the fit did not see."""
        assert held.labels is not None
        coefficients = self._coefficients().of_columns(held.columns)
        scores = _of_all_classes(coefficients.logits(held.features))
        fit = fit_temperature(scores, held.labels, weights=held.weights)
        self.temperature_ = float(fit.temperature)

    def _known_classes(
        self, classes: ArrayLike | None, targets: ArrayLike | None
    ) -> np.ndarray | None:
        """Returns the classes of a call of `partial_fit`; None are those of targets."""
        if hasattr(self, "classes_"):
            known = self.classes_
            given = known if classes is None else inputs.encode_labels(classes)[0]
            if not np.array_equal(given, known):
                raise ValueError(
                    f"`classes` must be those of the first call, {known.tolist()}, got "
                    f"{given.tolist()}."
                )
            return known
        if classes is None:
            if targets is None:
                raise ValueError(
                    "`classes` must be given in the first call of partial_fit, got "
                    "None."
                )
            return None
        known, _ = inputs.encode_labels(classes)
        if len(known) < 2:
            raise ValueError(f"`classes` must have 2 entries or more, got {classes!r}.")
        return known

    def _coefficients(self) -> Coefficients:
        """Returns `coef_` and `intercept_`."""
        return Coefficients(np.asarray(self.coef_), np.asarray(self.intercept_))

    def _checked(self, X: Features) -> np.ndarray | Csr | RowSource:
        """Returns features to predict, checked."""
        if not isinstance(X, RowSource):
            return inputs.checked(self, X, dtype=self.dtype, reset=False)[0]
        if X.num_features != self.n_features_in_:
            raise ValueError(
                f"`X` must have {self.n_features_in_} features, as in `fit`, got "
                f"{X.num_features}."
            )
        return X

    def _features_dtype(self, features: np.ndarray | Csr | RowSource) -> np.dtype:
        """Returns the dtype that a head's features are computed with."""
        return np.dtype(self.dtype or getattr(features, "dtype", np.float32))

    def _at_temperature(
        self, function: Callable[..., jax.Array], scores: np.ndarray
    ) -> np.ndarray:
        """Returns a function of logits at `temperature_`, of rows [n, V]."""
        scores = _of_all_classes(scores)
        with jax.enable_x64(scores.dtype == np.float64):
            # Few sizes, so that few programs are compiled.
            padded = pad_rows(scores, max(1, bucket(len(scores))))
            values = function(padded, temperature=self.temperature_)
            return np.array(values[: len(scores)])


def _of_all_classes(scores: np.ndarray) -> np.ndarray:
    """Returns [n, V] logits, of two classes 0 and the second's minus the first's."""
    return np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores
