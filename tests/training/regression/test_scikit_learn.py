"""`SoftmaxRegression` within scikit-learn: tables, searches, pipelines, routing."""

from typing import Any

import numpy as np
import pandas
import pytest
import sklearn
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from jaxsoft.training import SoftmaxRegression
from tests.training.regression.problems import problem

polars = pytest.importorskip("polars")
pyarrow = pytest.importorskip("pyarrow")

GIVEN = problem(60)
COLUMNS = list("abcde")
NAMES = np.array(["ant", "bee", "cat", "dog"])[GIVEN.labels]

TABLES = {
    "pandas": lambda columns: pandas.DataFrame(GIVEN.features, columns=columns),
    "polars": lambda columns: polars.DataFrame(GIVEN.features, schema=columns),
    "pyarrow": lambda columns: pyarrow.table(
        dict(zip(columns, GIVEN.features.T, strict=True))
    ),
}
LABELS = {
    "list": list(NAMES),
    "objects": NAMES.astype(object),
    "pandas": pandas.Series(NAMES),
    "pandas_string": pandas.Series(NAMES, dtype="string"),
    "pandas_arrow": pandas.Series(NAMES, dtype=pandas.ArrowDtype(pyarrow.string())),
    "pandas_category": pandas.Series(NAMES, dtype="category"),
    "pandas_frame": pandas.DataFrame({"y": NAMES})["y"],
    "polars": polars.Series(NAMES.tolist()),
    "polars_category": polars.Series(NAMES.tolist(), dtype=polars.Categorical),
    "polars_enum": polars.Series(
        NAMES.tolist(), dtype=polars.Enum(["dog", "cat", "bee", "ant"])
    ),
    "pyarrow": pyarrow.array(NAMES.tolist()),
    "pyarrow_chunks": pyarrow.chunked_array([NAMES[:9].tolist(), NAMES[9:].tolist()]),
    "pyarrow_dictionary": pyarrow.array(NAMES.tolist()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_read_and_their_names_kept(kind):
    table = TABLES[kind](COLUMNS)
    base = SoftmaxRegression().fit(GIVEN.features, NAMES)
    model = SoftmaxRegression().fit(table, NAMES)
    assert model.feature_names_in_.tolist() == COLUMNS
    np.testing.assert_array_equal(model.coef_, base.coef_)
    for method in ("predict", "predict_proba", "predict_log_proba"):
        np.testing.assert_array_equal(
            getattr(model, method)(table), getattr(base, method)(GIVEN.features)
        )
    with pytest.raises(ValueError, match="feature names should match those that were"):
        model.predict(TABLES[kind](list("abcdz")))
    with pytest.raises(ValueError, match="must be in the same order"):
        model.predict(TABLES[kind](list("bacde")))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(GIVEN.features)
    with pytest.warns(UserWarning, match="was fitted without feature names"):
        base.predict(table)
    goes_on = SoftmaxRegression().partial_fit(table, NAMES, classes=np.unique(NAMES))
    assert goes_on.feature_names_in_.tolist() == COLUMNS
    with pytest.raises(ValueError, match="feature names should match those that were"):
        goes_on.partial_fit(TABLES[kind](list("abcdz")), NAMES)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_tables_are_their_texts(kind):
    base = SoftmaxRegression().fit(GIVEN.features, NAMES)
    model = SoftmaxRegression().fit(GIVEN.features, LABELS[kind])
    assert model.classes_.tolist() == ["ant", "bee", "cat", "dog"]
    assert all(type(name) is str for name in model.classes_.tolist())
    np.testing.assert_array_equal(model.coef_, base.coef_)
    predicted = model.predict(GIVEN.features)
    np.testing.assert_array_equal(predicted, base.predict(GIVEN.features))
    assert model.score(GIVEN.features, LABELS[kind]) == (predicted == NAMES).mean()


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_pipeline_of_columns_is_scikit_learns(kind):
    """A table with a text column, to its end with scikit-learn's own class."""
    columns = dict(zip(COLUMNS, GIVEN.features.T, strict=True)) | {"kind": NAMES[::-1]}
    make = {"pandas": pandas.DataFrame, "polars": polars.DataFrame}[kind]
    table, labels = make(columns), make({"y": NAMES})["y"]
    results = []
    for last in (SoftmaxRegression(), LogisticRegression(tol=1e-9, max_iter=1000)):
        columns = ColumnTransformer(
            [("scaled", StandardScaler(), COLUMNS), ("hot", OneHotEncoder(), ["kind"])]
        )
        pipeline = make_pipeline(columns, last)
        scores = cross_val_score(pipeline, table, labels, cv=3)
        results.append((pipeline.fit(table, labels).predict_proba(table), scores))
    (ours, our_scores), (theirs, their_scores) = results
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(our_scores, their_scores)


def test_probabilities_are_calibrated_by_scikit_learn():
    models = [
        CalibratedClassifierCV(each, method="sigmoid", cv=3).fit(GIVEN.features, NAMES)
        for each in (SoftmaxRegression(), LogisticRegression(tol=1e-9, max_iter=1000))
    ]
    ours, theirs = (model.predict_proba(GIVEN.features) for model in models)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.process
def test_a_search_over_processes_finds_what_one_process_does():
    """Workers are started anew: JAX runs in them, and fitted estimators come back."""
    searches = [
        GridSearchCV(
            SoftmaxRegression(max_iter=200), {"C": [0.01, 1.0]}, cv=2, n_jobs=jobs
        ).fit(GIVEN.features, NAMES)
        for jobs in (2, None)
    ]
    many, one = (search.cv_results_["mean_test_score"] for search in searches)
    np.testing.assert_array_equal(many, one)
    assert searches[0].best_params_ == searches[1].best_params_
    fitted = cross_validate(
        SoftmaxRegression(),
        GIVEN.features,
        NAMES,
        cv=2,
        n_jobs=2,
        return_estimator=True,
    )["estimator"]
    assert all(model.predict(GIVEN.features).shape == (60,) for model in fitted)


@pytest.fixture
def routing():
    """Metadata routing, for one test."""
    with sklearn.config_context(enable_metadata_routing=True):
        yield


@pytest.mark.usefixtures("routing")
def test_weights_are_routed_through_searches_and_pipelines():
    weights = np.where(GIVEN.labels == 1, 9.0, GIVEN.weights)
    asked: Any = SoftmaxRegression().set_fit_request(sample_weight=True)
    asked.set_score_request(sample_weight=True)
    expected = SoftmaxRegression(C=0.5).fit(GIVEN.features, NAMES, weights)
    search = GridSearchCV(Pipeline([("model", asked)]), {"model__C": [0.5]}, cv=2)
    search.fit(GIVEN.features, NAMES, sample_weight=weights)
    np.testing.assert_array_equal(
        search.best_estimator_.predict_proba(GIVEN.features),
        expected.predict_proba(GIVEN.features),
    )
    without = SoftmaxRegression(C=0.5).fit(GIVEN.features, NAMES)
    assert np.abs(without.coef_ - expected.coef_).max() > 0.01
    # What nobody asked for is an error, and not lost.
    unasked = make_pipeline(SoftmaxRegression())
    with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError):
        unasked.fit(GIVEN.features, NAMES, sample_weight=weights)


@pytest.mark.usefixtures("routing")
def test_targets_are_routed_to_a_fit():
    asked: Any = SoftmaxRegression(distillation_weight=0.5)
    asked.set_fit_request(targets=True)
    pipeline: Any = Pipeline([("scaled", StandardScaler()), ("model", asked)])
    pipeline.fit(GIVEN.features, GIVEN.labels, targets=GIVEN.targets)
    features = StandardScaler().fit_transform(GIVEN.features)
    expected = SoftmaxRegression(distillation_weight=0.5)
    expected.fit(features, GIVEN.labels, targets=GIVEN.targets)
    np.testing.assert_array_equal(pipeline["model"].coef_, expected.coef_)
    # A fold has its rows of them.
    scores = cross_val_score(
        asked,
        GIVEN.features,
        GIVEN.labels,
        cv=2,
        params={"targets": GIVEN.targets},
    )
    assert np.isfinite(scores).all()


@pytest.mark.usefixtures("routing")
def test_requests_name_all_that_the_methods_take():
    model = SoftmaxRegression()
    requests = model.get_metadata_routing()
    assert set(requests.fit.requests) == {"sample_weight", "targets"}
    assert set(requests.partial_fit.requests) == {"sample_weight", "targets", "classes"}
    model.set_partial_fit_request(sample_weight=True, targets=False, classes=True)
    assert requests.partial_fit.requests["classes"] is None
    assert model.get_metadata_routing().partial_fit.requests == {
        "sample_weight": True,
        "targets": False,
        "classes": True,
    }
    assert not requests.predict.requests and not requests.predict_proba.requests
