"""`SoftmaxRegressionCV` against scikit-learn's `LogisticRegressionCV`."""

import doctest
import pickle
import warnings
from typing import Any

import jax
import numpy as np
import pandas
import pytest
import scipy.sparse
import sklearn
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import get_scorer
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.utils.estimator_checks import check_estimator

from jaxsoft.training import SoftmaxRegression, SoftmaxRegressionCV
from jaxsoft.training.regression.sources import SparseRows
from tests.training.regression.problems import problem, standardised

GIVEN = problem(120)
PATH = [0.01, 1.0, 100.0]


# Older ones have other attributes, and fail where a fold has not all classes.
NEWER = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)


def reference(**options):
    """scikit-learn's estimator, run to its optima, in the form that newer ones have."""
    if NEWER:
        options |= {"use_legacy_attributes": False, "l1_ratios": (0.0,)}
    options = {"scoring": "accuracy"} | options
    given: Any = options
    return LogisticRegressionCV(tol=1e-10, max_iter=10_000, **given)


def scores_of(model):
    """[F, C] scores of scikit-learn's, whatever their form."""
    scores = model.scores_
    if isinstance(scores, dict):
        return next(iter(scores.values()))
    return scores[:, 0]


@pytest.mark.slow
def test_scikit_learn_estimator_checks():
    with warnings.catch_warnings():
        # Some checks look at a class without tags, or at solvers that stop early.
        warnings.simplefilter("ignore")
        results = check_estimator(
            SoftmaxRegressionCV(Cs=2, cv=3), on_fail=None, on_skip=None
        )
    failed = {
        each["check_name"]: repr(each["exception"])
        for each in results
        if each["status"] == "failed"
    }
    # A row twice may be in two folds, a row of weight 2 in one: scikit-learn expects
    # these of its own class, too.
    assert set(failed) <= {
        "check_sample_weight_equivalence_on_dense_data",
        "check_sample_weight_equivalence_on_sparse_data",
    }, failed
    assert sum(each["status"] == "passed" for each in results) > 50


def test_docstring_runs():
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(SoftmaxRegressionCV):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


@pytest.mark.many_cases
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    ("classes", "options", "inner"),
    [
        (4, {}, {}),
        (4, {"scoring": "neg_log_loss", "cv": 3}, {"fit_intercept": False}),
        (4, {"scoring": "neg_log_loss", "Cs": 4}, {"class_weight": "balanced"}),
        (2, {"scoring": "neg_log_loss"}, {"class_weight": {0: 3.0, 1: 1.0}}),
    ],
    ids=str,
)
def test_choice_scores_and_paths_are_scikit_learns(classes, options, inner, refit):
    given = problem(120, classes=classes)
    options = {"Cs": PATH, "refit": refit} | options
    model = SoftmaxRegressionCV(SoftmaxRegression(**inner), **options)
    model.fit(*given[:2], given.weights)
    expected = reference(**options, **inner).fit(
        *given[:2], sample_weight=given.weights
    )
    np.testing.assert_allclose(model.Cs_, expected.Cs_)
    np.testing.assert_allclose(model.C_, np.ravel(expected.C_)[0])
    np.testing.assert_allclose(model.scores_, scores_of(expected), atol=5e-4)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        model.intercept_, expected.intercept_, rtol=1e-3, atol=1e-3
    )
    folds, rows = options.get("cv", 5), 1 if classes == 2 else classes
    shape = folds, len(model.Cs_), rows, 5 + inner.get("fit_intercept", True)
    assert model.coefs_paths_.shape == shape
    assert model.n_iter_.shape == model.scores_.shape == shape[:2]
    if NEWER:
        np.testing.assert_allclose(
            model.coefs_paths_, expected.coefs_paths_[:, 0], rtol=2e-2, atol=2e-2
        )


def test_digits_choose_scikit_learns_penalty():
    features, labels = standardised("digits")
    features, labels = features[:500], labels[:500]
    options: dict[str, Any] = {"Cs": PATH, "cv": 2, "scoring": "neg_log_loss"}
    model = SoftmaxRegressionCV(**options).fit(features, labels)
    expected = reference(**options).fit(features, labels)
    assert model.C_ == np.ravel(expected.C_)[0] and model.C_ in PATH
    np.testing.assert_allclose(model.scores_, scores_of(expected), atol=1e-4)


def test_refitted_it_is_the_estimator_with_the_best_penalty():
    template = SoftmaxRegression(C=7.0, solver="lbfgs", class_weight="balanced")
    model = SoftmaxRegressionCV(template, Cs=PATH, scoring="neg_log_loss")
    model.fit(*GIVEN[:2], GIVEN.weights)
    assert template.C == 7.0 and not hasattr(template, "coef_")
    assert model.C_ == PATH[model.scores_.mean(0).argmax()] != 0.01
    alone = SoftmaxRegression(C=model.C_, solver="lbfgs", class_weight="balanced")
    alone.fit(*GIVEN[:2], GIVEN.weights)
    again = pickle.loads(pickle.dumps(model))
    for method in (
        "predict",
        "predict_proba",
        "predict_log_proba",
        "decision_function",
    ):
        expected = getattr(alone, method)(GIVEN.features)
        for each in (model, again):
            np.testing.assert_array_equal(
                getattr(each, method)(GIVEN.features), expected
            )
    assert model.estimator_.class_weight == "balanced"
    np.testing.assert_allclose(
        model.estimator_.to_sklearn().predict_proba(GIVEN.features),
        model.predict_proba(GIVEN.features),
    )
    log_p = model.predict_log_proba(GIVEN.features)[np.arange(120), GIVEN.labels]
    np.testing.assert_allclose(model.score(*GIVEN[:2]), log_p.mean())


def test_fits_of_a_path_go_on_and_compile_nothing():
    events = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(duration_secs)

    template = SoftmaxRegression(solver="lbfgs")
    short = SoftmaxRegressionCV(template, Cs=[1.0], cv=3, scoring="neg_log_loss")
    short.fit(*GIVEN[:2])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        long = SoftmaxRegressionCV(template, Cs=12, cv=3, scoring="neg_log_loss")
        long.fit(*GIVEN[:2])
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not events
    # Half a step further the optimum is near.
    near = SoftmaxRegressionCV(template, Cs=[1.0, 1.01], cv=3).fit(*GIVEN[:2])
    assert (near.n_iter_[:, 1] < near.n_iter_[:, 0]).all()


def test_classes_that_a_fold_does_not_have_are_classes_all_the_same():
    order = np.argsort(GIVEN.labels, kind="stable")
    features, labels = GIVEN.features[order], GIVEN.labels[order]
    options: dict[str, Any] = {"Cs": [0.1, 1.0], "cv": KFold(4)}
    model = SoftmaxRegressionCV(**options).fit(features, labels)
    assert model.coefs_paths_.shape == (4, 2, 4, 6)
    np.testing.assert_array_equal(model.scores_, 0)
    if NEWER:
        expected = reference(**options).fit(features, labels)
        np.testing.assert_array_equal(model.scores_, scores_of(expected))
        found, theirs = model.coefs_paths_, expected.coefs_paths_[:, 0]
        np.testing.assert_allclose(found[..., :5], theirs[..., :5], atol=2e-3)


def test_tables_and_sparse_features():
    frame = pandas.DataFrame(GIVEN.features, columns=list("abcde"))
    names = pandas.Series(np.array(["ant", "bee", "cat", "dog"])[GIVEN.labels])
    model = SoftmaxRegressionCV(Cs=PATH, cv=3)
    base = SoftmaxRegressionCV(Cs=PATH, cv=3).fit(GIVEN.features, names.to_numpy())
    model.fit(frame, names)
    assert model.feature_names_in_.tolist() == list("abcde")
    assert model.estimator_.feature_names_in_.tolist() == list("abcde")
    assert model.classes_.tolist() == ["ant", "bee", "cat", "dog"]
    np.testing.assert_array_equal(
        model.predict_proba(frame), base.predict_proba(frame.to_numpy())
    )
    np.testing.assert_array_equal(model.scores_, base.scores_)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame.rename(columns={"a": "z"}))
    sparse = scipy.sparse.csr_array(GIVEN.features)
    from_sparse = SoftmaxRegressionCV(Cs=PATH, cv=3).fit(sparse, names)
    np.testing.assert_array_equal(from_sparse.scores_, base.scores_)
    np.testing.assert_allclose(from_sparse.coef_, base.coef_, atol=1e-6)


def test_groups_and_weights_are_routed():
    groups = np.arange(120) % 6
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = get_scorer("accuracy").set_score_request(sample_weight=False)
        options: dict[str, Any] = {"cv": GroupKFold(3), "scoring": scorer}
        model: Any = SoftmaxRegressionCV(Cs=[0.1, 1.0], **options)
        model.set_fit_request(sample_weight=True)
        model.fit(*GIVEN[:2], sample_weight=GIVEN.weights, groups=groups)
        folds = list(GroupKFold(3).split(GIVEN.features, groups=groups))
        search = GridSearchCV(model, {"Cs": [[0.5]]}, cv=2, scoring=scorer)
        search.fit(*GIVEN[:2], sample_weight=GIVEN.weights, groups=groups)
        assert search.best_estimator_.C_ == 0.5
    expected = SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=folds)
    expected.fit(*GIVEN[:2], GIVEN.weights)
    np.testing.assert_array_equal(model.coefs_paths_, expected.coefs_paths_)
    # No scorer asked for the weights.
    assert (model.scores_ * 40 % 1 < 1e-9).all()
    assert not (expected.scores_ * 40 % 1 < 1e-9).all()
    with pytest.raises(ValueError, match="groups"):
        SoftmaxRegressionCV(cv=GroupKFold(3)).fit(*GIVEN[:2], groups=groups)


BAD = [
    ({"Cs": 0}, ValueError, "`Cs` must be at least 1, got 0"),
    ({"Cs": [1.0, -1.0]}, ValueError, "`Cs` must be a number of values or"),
    ({"Cs": []}, ValueError, "`Cs` must be a number of values or"),
    ({"estimator": "full"}, TypeError, "`estimator` must be a SoftmaxRegression or"),
    (
        {"estimator": SoftmaxRegression(head="adaptive")},
        ValueError,
        "`estimator` must have the full head.*got 'adaptive'",
    ),
    (
        {"estimator": SoftmaxRegression(calibrate=True), "refit": False},
        ValueError,
        "`refit` must be True with an estimator that calibrates",
    ),
    ({"scoring": "best"}, ValueError, "best"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=lambda x: str(x)[:40])
def test_bad_parameters(options, error, words):
    with pytest.raises(error, match=words):
        SoftmaxRegressionCV(**options).fit(*GIVEN[:2])


def test_rows_that_stay_on_disk_are_refused():
    sparse = scipy.sparse.csr_array(GIVEN.features)
    rows = SparseRows(sparse.data, sparse.indices, sparse.indptr, 5)
    with pytest.raises(
        TypeError, match="`X` must be in memory for SoftmaxRegressionCV"
    ):
        SoftmaxRegressionCV().fit(rows, GIVEN.labels)
