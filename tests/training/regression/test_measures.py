"""Scaling, measuring and printing, held against scikit-learn and full matrices."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.sparse import coo_matrix, csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jaxsoft import expected_calibration_error
from jaxsoft.training.errors import TableError
from jaxsoft.training.regression import measures
from jaxsoft.training.regression.measures import (
    Measures,
    class_indices,
    measure,
    predict,
)
from jaxsoft.training.regression.report import RegressionReport
from jaxsoft.training.regression.run_files import RegressionDirectory
from jaxsoft.training.regression.scaling import choose_scaling, fold
from jaxsoft.training.regression.summary import summarise_regression
from jaxsoft.training.regression.tables import Table, check_range

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
FEATURES = RANDOM.normal(size=(60, 4)) * (1, 50, 0.1, 0) + (0, 1e3, 7, 2)


def table_of(features, image_shape=None):
    return Table(features, LABELS, None, image_shape, "here", "")


@pytest.mark.parametrize("classes", [2, 3])
def test_folded_model_of_scaled_features_is_that_of_features(classes):
    labels, rows = LABELS % classes, np.arange(40)
    scaling = choose_scaling(table_of(FEATURES), rows, None)
    truth: Any = StandardScaler().fit(FEATURES[rows]).transform(FEATURES)
    scaled = scaling.apply(FEATURES, np.float64)
    np.testing.assert_allclose(scaled, truth, rtol=0, atol=1e-12)
    estimator = LogisticRegression().fit(scaled[rows], labels[rows])
    wanted = estimator.predict_proba(scaled)
    fold(estimator, scaling)
    np.testing.assert_allclose(estimator.predict_proba(FEATURES), wanted, atol=1e-12)


def test_kinds_of_scaling():
    rows = np.arange(40)
    kinds = {
        (shape is not None, standardize): choose_scaling(
            table_of(FEATURES, shape), rows, standardize
        )
        for shape in (None, (2, 2))
        for standardize in (None, True, False)
    }
    assert {key: value.kind for key, value in kinds.items()} == {
        (False, None): "columns",
        (False, True): "columns",
        (False, False): "none",
        (True, None): "image",
        (True, True): "columns",
        (True, False): "none",
    }
    largest = np.abs(FEATURES[rows]).max()
    scaled = kinds[True, None].apply(FEATURES, np.float32)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, FEATURES / largest, rtol=1e-6)


def test_sparse_features_keep_their_zeros():
    features, rows = csr_matrix(np.where(FEATURES > 2, FEATURES, 0)), np.arange(60)
    assert choose_scaling(table_of(features), rows, None).kind == "none"
    scaling = choose_scaling(table_of(features), rows, True)
    scaled = scaling.apply(features, np.float64)
    assert scaled.nnz == features.nnz
    truth: Any = StandardScaler(with_mean=False).fit_transform(features)
    np.testing.assert_allclose(scaled.toarray(), truth.toarray())


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix])
def test_values_that_the_dtype_cannot_hold(kind):
    features, rows = FEATURES.copy(), np.arange(5, 10)
    features[7, 2] = 1e39
    table = table_of(kind(features))
    scaling = choose_scaling(table, rows, False)
    check_range(table, scaling.apply(table.features, np.float64))
    with pytest.raises(TableError) as error:
        check_range(table, scaling.apply(table.features[rows], np.float32), rows)
    assert str(error.value) == (
        "here: row 7, column 2 is 1e+39, too large for float32; use `dtype` float64."
    )


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_measures_equal_those_of_the_full_matrix(monkeypatch, chunk):
    monkeypatch.setattr(measures, "_CHUNK", chunk)
    features = StandardScaler().fit_transform(FEATURES)
    estimator = LogisticRegression().fit(features[:30], LABELS[:30])
    seen = []
    found = predict(estimator, features, LABELS, lambda *chunks: seen.append(chunks))
    probabilities = estimator.predict_proba(features)
    measured = measure(found)
    assert measured.accuracy == estimator.score(features, LABELS)
    truth = -np.log(probabilities[np.arange(60), LABELS]).mean()
    np.testing.assert_allclose(measured.log_loss, truth, rtol=1e-12)
    error = float(expected_calibration_error(probabilities.astype(np.float32), LABELS))
    np.testing.assert_allclose(measured.calibration_error, error, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([p for _, p in seen]), probabilities)
    predicted = np.concatenate([best for best, _ in seen])
    np.testing.assert_array_equal(predicted, probabilities.argmax(axis=1))
    unknown = predict(estimator, features, None)
    assert unknown.log_probs is None
    np.testing.assert_array_equal(unknown.predicted, predicted)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (np.array([-1, 3, 7]), np.array([7, -1])),
        (np.array(["a", "b", "c"]), np.array(["c", "a"])),
        (np.array(["a", "b", "c"], object), np.array(["c", "a"])),
        (np.array(["1", "2", "30"]), np.array([30, 1])),
    ],
)
def test_labels_are_found_among_classes(classes, labels):
    assert class_indices(labels, classes, "here").tolist() == [2, 0]
    with pytest.raises(TableError) as error:
        class_indices(np.array([*labels, labels[0] + labels[0]]), classes, "here")
    assert str(error.value).startswith("here: the label ")
    assert str(error.value).endswith(" of row 2 is none of the model's 3 classes.")


def report_of(classes, **changes):
    count = len(classes)
    confusion = np.diag(np.arange(1, count + 1))
    confusion[0, -1] = 3
    recall = (confusion.diagonal() / confusion.sum(axis=1)).tolist()
    one = Measures(40, 0.5, 0.25, 0.125)
    fields: dict[str, Any] = {
        "train": one,
        "test": one,
        "classes": tuple(classes),
        "features": 4,
        "recall": (*recall[:-1], None),
        "confusion": tuple(map(tuple, confusion.tolist())) if count <= 100 else None,
        "objective": 0.5,
        "iterations": 1234,
        "converged": True,
        "stopping_reason": "gradient",
        "solver": "lbfgs",
        "temperature": 1.5,
        "scaling": "none",
        "seconds": 61.0,
    }
    return RegressionReport(**(fields | changes))


def printed(report, width=80):
    stream = io.StringIO()
    summarise_regression(Console(file=stream, width=width), report, [])
    return stream.getvalue()


def test_summary_has_the_confusion_matrix():
    text = printed(report_of(["a\x1b", "[b]", 3]))
    for line in (
        "| true \\ predicted | a\\x1b | [b] | 3 | recall |",
        "| a\\x1b            |     1 |   . | 3 | 0.2500 |",
        "| 3                |     . |   . | 3 |      - |",
        "| test  |   40 |   0.5000 |   0.2500 | 0.1250 |",
        "solver: lbfgs, 1,234 iterations in 1:01, converged (gradient)",
        "objective: 0.5 nats a row",
        "temperature: 1.5",
    ):
        assert line in text, text


@pytest.mark.parametrize(
    ("classes", "width"), [(range(30), 80), (range(101), 80), (["a" * 20] * 4, 60)]
)
def test_summary_of_many_classes_has_the_worst(classes, width):
    text = printed(report_of(classes, converged=False), width)
    assert "true" not in text and "not converged (gradient)" in text
    shown = min(10, len(classes) - 1)
    assert text.count("1.0000 |\n") == shown - 1
    assert f"the {shown} classes of {len(classes)} that are recognised least" in text


def test_pictures_of_any_shape(tmp_path):
    directory = RegressionDirectory(tmp_path)
    names = np.array([rf"US$ \frac{index}$" for index in range(6)])
    counts = coo_matrix(np.eye(6, dtype=int)).tocsr()
    directory.plot_confusion(counts, names)
    many = coo_matrix((1001, 1001), dtype=int).tocsr()
    directory.plot_confusion(many, np.arange(1001))
    coef = RANDOM.normal(size=(6, 12))
    directory.plot_weights(coef, names, (2, 2, 3))
    directory.plot_weights(coef[:1], names[:2], (3, 4))
    directory.plot_weights(0 * coef[:1], names[:2], None)
    directory.metrics.touch()
    directory.plot_convergence()
    assert not (tmp_path / "convergence.png").exists()
    record = {"event": "train", "step": 1, "loss": -0.5, "gradient_norm": np.nan}
    directory.append({**record, "seconds": 1.0})
    directory.plot_convergence()
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "confusion.png",
        "weights.png",
        "convergence.png",
    }
