"""`SoftmaxRegression`: scikit-learn's conventions, Optax's solvers."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from jaxsoft.logits.softmax import log_softmax, softmax
from jaxsoft.training.regression import decisions, fitting
from jaxsoft.training.regression.saving import load_model, save_model
from jaxsoft.training.reporting import Listener

__all__ = ["SoftmaxRegression"]


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

    The first three stop where the largest absolute entry of the gradient is at most
    `tol` ("gradient"; of Newton's method, where its step also leads to the optimum
    within rounding or 1e-10 of the objective), or where the objective no longer falls
    beyond its rounding ("objective"); "minibatch" where the mean objective of an epoch
    has not fallen by `tol` for five epochs. They run in compiled segments, between
    which progress is shown, checkpoints are written and Ctrl-C is looked at.

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
      max_iter: most iterations; of "minibatch", epochs. None is 1000, and of epochs so
        many that there are about 5000 steps, 20 to 1000, in which the learning rate
        comes down to 0.
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
      batch_size: of minibatches; None is 256.
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
      stopping_reason_: "gradient", "objective", "max_iter", "non_finite" or
        "interrupted".
      objective_: the objective above, where it stopped.
      temperature_: that probabilities are computed with; 1 without `calibrate`.
      solver_: the solver that "auto" chose.

    Notes:
      Passes scikit-learn's `check_estimator`. `decision_function` gives logits before
      the temperature. Under a mesh results are the same within rounding.

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
    head_: Any
    n_features_in_: int
    feature_names_in_: np.ndarray
    n_iter_: np.ndarray
    converged_: bool
    stopping_reason_: str
    objective_: float
    temperature_: float
    solver_: str

    def __init__(
        self,
        *,
        C: float = 1.0,  # noqa: N803
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: Any = None,
        reference_class: Any = "auto",
        label_smoothing: float = 0.0,
        distillation_temperature: float = 1.0,
        distillation_weight: float = 1.0,
        calibrate: bool = False,
        validation_fraction: float = 0.1,
        solver: str = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        head: str = "full",
        optimizer: Any = None,
        learning_rate: Any = None,
        batch_size: int | None = None,
        mesh: Any = None,
        checkpoint_dir: Any = None,
        checkpoint_seconds: float = 30.0,
        dtype: Any = None,
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
        self, X: Any, y: Any = None, sample_weight: Any = None, *, targets: Any = None
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
          ConvergenceWarning: scikit-learn's, where `max_iter` stops the solver.
        """
        self.__dict__.pop("_state", None)
        with fitting.signals() as stop:
            fitting.fit(
                self,
                X,
                y,
                sample_weight,
                targets,
                listener=_listener(self.verbose),
                stop=stop,
            )
        return self

    def partial_fit(
        self,
        X: Any,
        y: Any = None,
        classes: Any = None,
        sample_weight: Any = None,
        *,
        targets: Any = None,
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
          TypeError, ValueError, NonFiniteLossError: as in `fit`; or a class is not one
            of the first call's, `class_weight` is "balanced", or there is an L1
            penalty.
        """
        fitting.partial_fit(self, X, y, classes, sample_weight, targets)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits.

        Args:
          X: [n, d] features.

        Returns:
          [n, V] logits, before the temperature; for two classes [n], the second's
          minus the first's. For a head other than the full one, log-probabilities.
        """
        check_is_fitted(self)
        return decisions.logits(self, X)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row.

        Args:
          X: [n, d] features.

        Returns:
          [n] classes. Logits of all rows are not stored.
        """
        check_is_fitted(self)
        return decisions.classes(self, X)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities at `temperature_`.

        Args:
          X: [n, d] features.

        Returns:
          [n, V], rows of sum 1.
        """
        check_is_fitted(self)
        return decisions.probabilities(self, X, softmax)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-probabilities at `temperature_`, exact where probabilities underflow.

        Args:
          X: [n, d] features.

        Returns:
          [n, V].
        """
        check_is_fitted(self)
        return decisions.probabilities(self, X, log_softmax)

    def save(self, path: Any) -> Path:
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
    def load(cls, path: Any) -> Self:
        """Reads an estimator that `save` wrote.

        Args:
          path: the file.

        Returns:
          An estimator that predicts the same, bit for bit.

        Raises:
          ModelFileError: the file is missing, damaged or something else.
        """
        return load_model(path, cls)

    def __sklearn_tags__(self) -> Any:
        """Returns scikit-learn's tags: sparse input is accepted."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _listener(verbose: int) -> Listener | None:
    """Returns what shows the progress of a fit."""
    if not verbose:
        return None
    from rich.console import Console

    from jaxsoft.training.console import ConsoleListener

    return ConsoleListener(
        Console(), "iteration", things="rows", measure="objective", digits=6
    )
