"""`SoftmaxRegressionCV`: the strength of the penalty, chosen by cross-validation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.metrics import get_scorer
from sklearn.model_selection import check_cv
from sklearn.utils import Bunch, Tags
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    _raise_for_params,
    _routing_enabled,
    process_routing,
)
from sklearn.utils.validation import (
    _check_method_params,
    check_is_fitted,
)

from jaxsoft.training.regression import inputs
from jaxsoft.training.regression.estimator import SoftmaxRegression
from jaxsoft.training.regression.inputs import Features
from jaxsoft.training.regression.sources import RowSource

__all__ = ["SoftmaxRegressionCV"]

# A scorer's name or itself; a number of folds, a splitter or the splits themselves:
# scikit-learn types neither.
Scoring: TypeAlias = Any
Splits: TypeAlias = Any

# Exponents of 10 between which a number of values of C lies, as scikit-learn's.
_EXPONENTS = -4, 4


class _Fold(NamedTuple):
    """What a fold's path of C leaves.

    Attributes:
      scores: [C] of the rows left out.
      coefs: [C, V, d], or [C, V, d + 1] with the intercept last; V is 1 for two classes
        with a reference class.
      n_iter: [C] iterations.
      model: fitted with the last C.
    """

    scores: np.ndarray
    coefs: np.ndarray
    n_iter: np.ndarray
    model: SoftmaxRegression


class SoftmaxRegressionCV(ClassifierMixin, BaseEstimator):
    """Softmax regression whose penalty cross-validation chooses.

    After `sklearn.linear_model.LogisticRegressionCV`. In each fold the values of C are
    gone through from the strongest penalty to the weakest, each fit beginning at the
    one before (`warm_start`), by the same compiled programs: a longer path compiles
    nothing. The C of the best mean score is taken.

    Args:
      estimator: a `SoftmaxRegression` with the other parameters, such as `l1_ratio`,
        `class_weight` or `solver`; None is one with its defaults. It is copied, and its
        C is not used. Of a full head.
      Cs: a number of values of C, evenly spread by ratio from 1e-4 to 1e4; or the
        values, positive.
      cv: a number of folds, by class; a splitter of scikit-learn; or pairs of indices.
        None is 5.
      scoring: a name or a scorer of scikit-learn; None is the accuracy.
      refit: fit all rows with the best C. Without, the coefficients are the mean of the
        folds' own best ones, and `C_` is the mean of theirs.

    Attributes:
      Cs_: [C] the values of C, ascending.
      C_: the best one; of equal ones the least.
      scores_: [F, C] the score of each fold's rows left out.
      coefs_paths_: [F, C, V, d + 1] coefficients, V and d as of `coef_`, the intercept
        last; [F, C, V, d] without an intercept.
      n_iter_: [F, C] iterations.
      estimator_: the fitted `SoftmaxRegression`, which `save` and `to_sklearn` are
        methods of. With `refit` it is, bit for bit, that of a fit with `C_`.
      classes_, coef_, intercept_: of `estimator_`.
      n_features_in_, feature_names_in_: as scikit-learn's.

    Notes:
      `class_weight="balanced"` counts the classes of all rows, in the folds too, and a
      class that a fold's rows do not have is one of its classes all the same, as in
      `LogisticRegressionCV`. Folds run one after another, each on all of JAX's cores.
      With scikit-learn's metadata routing, `sample_weight`, and what the splitter or
      the scorer ask for, `groups` for example, are arguments of `fit`.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> from jaxsoft.training import SoftmaxRegressionCV
      >>> X, y = load_iris(return_X_y=True)
      >>> model = SoftmaxRegressionCV(Cs=[0.01, 1, 100], scoring="neg_log_loss")
      >>> print(model.fit(X, y).C_, model.scores_.mean(0).round(3))
      100.0 [-0.639 -0.14  -0.055]

    References:
      Friedman, Hastie, Tibshirani, Regularization Paths for Generalized Linear Models
      via Coordinate Descent, Journal of Statistical Software 33, 2010 (warm starts
      along the path).
    """

    estimator_: SoftmaxRegression
    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    Cs_: np.ndarray
    C_: float
    scores_: np.ndarray
    coefs_paths_: np.ndarray
    n_iter_: np.ndarray
    n_features_in_: int
    feature_names_in_: np.ndarray

    def __init__(
        self,
        estimator: SoftmaxRegression | None = None,
        *,
        Cs: int | ArrayLike = 10,  # noqa: N803
        cv: Splits = None,
        scoring: Scoring = None,
        refit: bool = True,
    ):
        """Keeps the parameters, which `fit` checks."""
        self.estimator = estimator
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit

    def fit(
        self,
        X: Features,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        **params: Any,
    ) -> Self:
        """Chooses C, and fits the classifier.

        Args:
          X: [n, d] features in memory, as of `SoftmaxRegression.fit`.
          y: [n] class labels.
          sample_weight: [n] weights >= 0 of fits and scores, or None for 1; with
            metadata routing, of the scores if the scorer asks for them.
          **params: with metadata routing, what splitter and scorer ask for.

        Returns:
          The estimator.

        Raises:
          TypeError: a parameter or an array has a wrong type, or X stays on disk.
          ValueError: a parameter is out of its range, or scikit-learn's checks refuse
            the arrays.
          NonFiniteLossError, TrainingInterrupted: as of `SoftmaxRegression.fit`.

        Warns:
          ConvergenceWarning, UserWarning: as of `SoftmaxRegression.fit`.
        """
        _raise_for_params(params, self, "fit")
        template = self._template()
        if isinstance(X, RowSource):
            raise TypeError(
                f"`X` must be in memory for {type(self).__name__}, got a "
                f"{type(X).__name__}."
            )
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is "
                "None."
            )
        features, labels = inputs.checked(self, X, y, dtype=template.dtype, reset=True)
        assert labels is not None
        rows = inputs.rows_in_memory(
            features,
            labels,
            sample_weight,
            None,
            class_weight=template.class_weight,
        )
        self.Cs_ = self._path()
        routed = self._routed("fit", sample_weight, params)
        splits: Any = check_cv(self.cv, labels, classifier=True)
        folds = [
            self._fold(template, rows, labels, train, test, routed.scorer.score)
            for train, test in splits.split(features, labels, **routed.splitter.split)
        ]
        self.scores_ = np.stack([fold.scores for fold in folds])
        self.coefs_paths_ = np.stack([fold.coefs for fold in folds])
        self.n_iter_ = np.stack([fold.n_iter for fold in folds])
        if self.refit:
            self.C_ = float(self.Cs_[self.scores_.mean(0).argmax()])
            self.estimator_ = template.set_params(C=self.C_)
            self.estimator_.fit(features, labels, sample_weight)
        else:
            self._average(template, folds[-1].model)
        fitted = self.estimator_
        if hasattr(self, "feature_names_in_"):
            fitted.feature_names_in_ = self.feature_names_in_
        self.classes_ = fitted.classes_
        self.coef_, self.intercept_ = fitted.coef_, fitted.intercept_
        return self

    def predict(self, X: Features) -> np.ndarray:
        """The most probable class of each row, [n]; see `SoftmaxRegression.predict`.

        Args:
          X: [n, d] features.
        """
        return self._fitted().predict(X)

    def predict_proba(self, X: Features) -> np.ndarray:
        """Probabilities, [n, V].

        Args:
          X: [n, d] features.
        """
        return self._fitted().predict_proba(X)

    def predict_log_proba(self, X: Features) -> np.ndarray:
        """Log-probabilities, [n, V], exact where probabilities underflow.

        Args:
          X: [n, d] features.
        """
        return self._fitted().predict_log_proba(X)

    def decision_function(self, X: Features) -> np.ndarray:
        """Logits, [n, V], or [n] for two classes.

        Args:
          X: [n, d] features.
        """
        return self._fitted().decision_function(X)

    def score(
        self,
        X: Features,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        **params: Any,
    ) -> float:
        """Score of rows by `scoring`.

        Args:
          X: [n, d] features.
          y: [n] class labels.
          sample_weight: [n] weights, or None for 1.
          **params: with metadata routing, what the scorer asks for.
        """
        _raise_for_params(params, self, "score")
        routed = self._routed("score", sample_weight, params)
        return float(self._scorer()(self, X, y, **routed.scorer.score))

    def get_metadata_routing(self) -> MetadataRouter:
        """Returns who takes which argument of `fit` and `score`."""
        scored = MethodMapping().add(caller="fit", callee="score")
        scored.add(caller="score", callee="score")
        split = MethodMapping().add(caller="fit", callee="split")
        router = MetadataRouter(owner=self).add_self_request(self)
        router.add(splitter=self.cv, method_mapping=split)
        return router.add(scorer=self._scorer(), method_mapping=scored)

    def __sklearn_tags__(self) -> Tags:
        """Returns scikit-learn's tags: sparse input is accepted."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _template(self) -> SoftmaxRegression:
        """Returns an estimator of its own that has not been fitted."""
        given = SoftmaxRegression() if self.estimator is None else self.estimator
        if not isinstance(given, SoftmaxRegression):
            raise TypeError(
                f"`estimator` must be a SoftmaxRegression or None, got {given!r}."
            )
        if given.head != "full":
            raise ValueError(
                "`estimator` must have the full head, whose fits go on from each "
                f"other, got {given.head!r}."
            )
        if given.calibrate and not self.refit:
            raise ValueError(
                "`refit` must be True with an estimator that calibrates: coefficients "
                "have a mean, temperatures none; got False."
            )
        made: Any = clone(given)
        return made

    def _path(self) -> np.ndarray:
        """Returns the values of C, ascending."""
        given = self.Cs
        if isinstance(given, int | np.integer):
            if given < 1:
                raise ValueError(f"`Cs` must be at least 1, got {given!r}.")
            return np.logspace(*_EXPONENTS, int(given))
        values = np.asarray(given, np.float64)
        if values.ndim != 1 or not values.size or not (values > 0).all():
            raise ValueError(
                f"`Cs` must be a number of values or [C] positive ones, got {given!r}."
            )
        return np.sort(values)

    def _scorer(self) -> Any:
        """Returns scikit-learn's scorer."""
        return get_scorer("accuracy" if self.scoring is None else self.scoring)

    def _routed(
        self, method: str, sample_weight: ArrayLike | None, params: Mapping[str, Any]
    ) -> Any:
        """Returns what splitter and scorer receive."""
        given = dict(params)
        if sample_weight is not None:
            given["sample_weight"] = sample_weight
        if _routing_enabled():
            return process_routing(self, method, **given)
        return Bunch(splitter=Bunch(split={}), scorer=Bunch(score=given))

    def _fold(
        self,
        template: SoftmaxRegression,
        rows: inputs.Rows,
        labels: np.ndarray,
        train: np.ndarray,
        test: np.ndarray,
        score_params: Mapping[str, Any],
    ) -> _Fold:
        """Goes through the values of C with some rows, and scores the others."""
        features: Any = rows.features
        scorer, codes = self._scorer(), rows.labels
        assert codes is not None
        train = np.arange(len(codes))[train]
        # A row without weight, of a class that is not there, makes it a class.
        missing = np.setdiff1d(np.arange(len(rows.classes)), codes[train])
        lent = [np.flatnonzero(codes == code)[0] for code in missing]
        weights = np.append(rows.weights[train], np.zeros(len(lent)))
        train = np.append(train, np.asarray(lent, train.dtype))
        model: Any = clone(template)
        # Weights of classes are in those of the rows.
        model.set_params(warm_start=True, class_weight=None, checkpoint_dir=None)
        scores, coefs, n_iter = [], [], []
        params = _check_method_params(features, score_params, indices=test)
        for strength in self.Cs_:
            model.set_params(C=float(strength))
            model.fit(features[train], labels[train], weights)
            scores.append(scorer(model, features[test], labels[test], **params))
            parts = [model.coef_]
            if template.fit_intercept:
                parts.append(model.intercept_[:, None])
            coefs.append(np.concatenate(parts, 1))
            n_iter.append(model.n_iter_[0])
        return _Fold(np.array(scores), np.stack(coefs), np.array(n_iter), model)

    def _average(self, template: SoftmaxRegression, fitted: SoftmaxRegression) -> None:
        """Sets the mean of the folds' best classifiers."""
        best = self.scores_.argmax(1)
        self.C_ = float(self.Cs_[best].mean())
        mean = self.coefs_paths_[np.arange(len(best)), best].mean(0)
        self.estimator_ = copy.copy(fitted)
        self.estimator_.set_params(**template.get_params(deep=False))
        self.estimator_.set_params(C=self.C_)
        width = self.n_features_in_
        self.estimator_.coef_ = mean[:, :width]
        self.estimator_.intercept_ = (
            mean[:, width] if template.fit_intercept else np.zeros_like(mean[:, 0])
        )

    def _fitted(self) -> SoftmaxRegression:
        """Returns the fitted estimator, or raises where there is none."""
        check_is_fitted(self)
        return self.estimator_
