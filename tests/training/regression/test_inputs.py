"""Labels by their codes, and features of which most columns are empty."""

import doctest
import tracemalloc
import warnings

import numpy as np
import pandas
import pytest
import scipy.sparse
from sklearn.exceptions import ConvergenceWarning

from jaxsoft.training import SoftmaxRegression
from jaxsoft.training.regression import empty_columns, inputs, minibatch
from jaxsoft.training.regression.sources import SparseRows
from tests.training.regression.problems import problem

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


@pytest.mark.parametrize(
    "function", [inputs.encode_labels, empty_columns.without_empty_columns]
)
def test_docstrings_run(function):
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(function):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


WIDTH = 10**7
# Columns of the narrow table, which has all entries of the wide one.
PLACES = np.array([3, 70, 4_000_000, 9_000_001, 9_999_998])


def wide_and_narrow(source):
    """The same rows over many columns, and over those in use; and labels."""
    given = problem(60)
    entries = np.where(np.abs(given.features) > 0.5, given.features, 0)
    narrow = scipy.sparse.csr_array(entries)
    parts = narrow.data, PLACES[narrow.indices], narrow.indptr
    wide = scipy.sparse.csr_array(parts, shape=(60, WIDTH))
    if source == "rows":
        wide = SparseRows(wide.data, wide.indices, wide.indptr, WIDTH)
        narrow = SparseRows(narrow.data, narrow.indices, narrow.indptr, 5)
    return wide, narrow, given.labels


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("csr", {}),
        ("csr", {"solver": "lbfgs", "fit_intercept": False}),
        ("csr", {"l1_ratio": 0.5}),
        ("csr", {"calibrate": True, "validation_fraction": 0.3}),
        ("csr", {"solver": "minibatch", "learning_rate": 0.1}),
        ("rows", {"learning_rate": 0.1}),
    ],
    ids=str,
)
def test_empty_columns_of_sparse_features_cost_their_coefficients_alone(
    source, options
):
    """A row of 10⁷ features is 80 MB where it is dense; the coefficients are 320 MB."""
    wide, narrow, labels = wide_and_narrow(source)
    expected = SoftmaxRegression(**options).fit(narrow, labels)
    model = SoftmaxRegression(**options)
    _, peak = peak_bytes(lambda: model.fit(wide, labels))
    assert model.solver_ == expected.solver_ and model.n_iter_ == expected.n_iter_
    assert model.coef_.shape == (4, WIDTH) and model.n_features_in_ == WIDTH
    size = model.coef_.nbytes
    assert peak < size + 60e6
    np.testing.assert_array_equal(model.coef_[:, PLACES], expected.coef_)
    assert np.count_nonzero(model.coef_) == np.count_nonzero(expected.coef_)
    assert model.temperature_ == expected.temperature_
    predicted, peak = peak_bytes(lambda: model.predict(wide))
    np.testing.assert_array_equal(predicted, expected.predict(narrow))
    # SciPy's product copies the transpose once.
    assert peak < size + 60e6


def test_fits_of_some_columns_go_on_and_name_those_of_the_table():
    wide, _, labels = wide_and_narrow("csr")
    assert isinstance(wide, scipy.sparse.csr_array)
    wide = wide[:, :100_000]
    model = SoftmaxRegression(solver="lbfgs", warm_start=True).fit(wide, labels)
    first, coef = model.n_iter_[0], model.coef_
    model.fit(wide, labels)
    assert model.n_iter_[0] <= 1 < first
    np.testing.assert_allclose(model.coef_, coef, atol=1e-6)
    # A column that is empty now, whose coefficients go back to 0.
    wide = wide.tolil()
    wide[:, 70] = 0
    wide = scipy.sparse.csr_array(wide)
    wide.eliminate_zeros()
    np.testing.assert_allclose(model.fit(wide, labels).coef_[:, 70], 0, atol=1e-6)
    with pytest.warns(ConvergenceWarning, match=r"gradient is largest in column 3\."):
        model.set_params(max_iter=1, warm_start=False).fit(wide, labels)


@pytest.mark.parametrize("options", [{"solver": "minibatch"}, {"solver": "fista"}])
def test_a_warm_start_keeps_coefficients_of_columns_that_are_empty_now(options):
    """A few steps from them are those of dense features."""
    source = np.random.default_rng(0)
    labels = np.arange(60) % 3
    first, second = np.zeros((2, 60, 40))
    first[:, :4] = source.normal(size=(60, 4)) + labels[:, None]
    second[:, 5:9] = source.normal(size=(60, 4)) + labels[:, None]
    options = {"max_iter": 2, "warm_start": True, "random_state": 0, **options}
    models = []
    for kind in (np.asarray, scipy.sparse.csr_array):
        model = SoftmaxRegression(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(kind(first), labels).fit(kind(second), labels)
        models.append(model)
    dense, sparse = models
    assert np.abs(dense.coef_[:, :4]).max() > 1e-3
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-5)


def test_batches_of_wide_rows_fit_in_memory(monkeypatch):
    """Where all columns are in use, a batch is as many rows as its budget holds."""
    assert minibatch.default_batch_size(784, np.float32) == 256
    assert minibatch.default_batch_size(WIDTH, np.float32) == 6
    assert minibatch.default_batch_size(10**9, np.float64) == 1
    given = problem(60)
    features = scipy.sparse.csr_array(given.features)
    monkeypatch.setattr(minibatch, "_BATCH_BYTES", 7 * 5 * 8)
    read, rows_of = [], SparseRows.read

    def watched(self, rows, dtype):
        read.append(len(rows))
        return rows_of(self, rows, dtype)

    monkeypatch.setattr(SparseRows, "read", watched)
    model = SoftmaxRegression(solver="minibatch", tol=0.0)
    model.fit(features, given.labels)
    assert max(read) == 7 and model.score(features, given.labels) > 0.5
    # Of 9 steps each, and so about 5000.
    assert model.n_iter_[0] == 556
