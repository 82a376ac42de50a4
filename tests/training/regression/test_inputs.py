"""Labels by their codes, and features of which most columns are empty."""

import doctest
import tracemalloc

import numpy as np
import pandas
import pytest

from jaxsoft.training import SoftmaxRegression
from jaxsoft.training.regression import inputs

polars = pytest.importorskip("polars")

ROWS = 50_000
# As `<U999`, 200 MB; an array of pointers is 0.4 MB.
TEXTS = ["class " + "abcdefg"[row % 7] for row in range(ROWS - 1)] + ["x" * 999]


def peak_bytes(function):
    """The function's value, and the most that was allocated at a time."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda texts: np.array(texts, object),
        pandas.Series,
        lambda texts: pandas.Series(texts, dtype="category"),
        polars.Series,
        lambda texts: polars.Series(texts, dtype=polars.Categorical),
        lambda texts: np.array(texts, np.dtypes.StringDType()),
    ],
    ids="list tuple objects pandas categories polars polars_categories strings".split(),
)
def test_texts_are_not_widened_to_the_longest(make):
    labels = make(TEXTS)
    (classes, codes), peak = peak_bytes(lambda: inputs.encode_labels(labels))
    assert peak < 8e6
    assert codes.dtype == np.int32 and len(classes) == 8
    np.testing.assert_array_equal(classes[codes[-9:]], TEXTS[-9:])
    features = np.zeros((ROWS, 1), np.float32)
    model = SoftmaxRegression(solver="newton")
    _, peak = peak_bytes(lambda: model.fit(features, labels).predict(features))
    assert peak < 30e6
    assert model.classes_.tolist() == sorted(set(TEXTS))


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, 1, 3, 2]),
        np.array([2.0, -1.0, 2.0]),
        np.array([True, False, True]),
        np.array(["b", "a", "b", "ä"]),
        np.array([b"b", b"a", b"b"]),
        np.array([2, 1, 2], object),
    ],
    ids=lambda labels: labels.dtype.str,
)
def test_codes_are_those_of_numpy(labels):
    classes, codes = inputs.encode_labels(labels)
    expected, places = np.unique(labels, return_inverse=True)
    assert classes.dtype == labels.dtype
    np.testing.assert_array_equal(classes, expected)
    np.testing.assert_array_equal(codes, places)


def test_labels_that_cannot_be_sorted_are_refused():
    features = np.eye(3)
    mixed = np.array(["a", 1, "a"], object)
    with pytest.raises(TypeError, match="`y` must have labels of one type, got int an"):
        SoftmaxRegression().fit(features, mixed)
    with pytest.raises(ValueError, match="Unknown label type"):
        SoftmaxRegression().fit(features, [0.5, 1.5, 2.5])


def test_classes_of_partial_fit_are_texts_of_any_length():
    names = ["a", "b" * 40, "c"]
    model = SoftmaxRegression().partial_fit(np.eye(3)[:2], names[:2], classes=names)
    assert model.classes_.tolist() == names and model.classes_.dtype == object
    model.partial_fit(np.eye(3), names, classes=names[::-1])
    with pytest.raises(ValueError, match="`y` must have only the classes of the firs"):
        model.partial_fit(np.eye(3), ["a", "d", "a"])


def test_docstring_runs():
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(inputs.encode_labels, globs=vars(inputs)):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0
