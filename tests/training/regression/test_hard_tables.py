"""The default solver beside L-BFGS on tables that are hard: it never ends wrong."""

import warnings

import jax
import numpy as np
import pandas
import pytest
import scipy.sparse
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning

from jaxsoft.training import SoftmaxRegression
from jaxsoft.training.regression import solving
from jaxsoft.training.regression.full_batch import make_solver
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.inputs import Rows
from jaxsoft.training.regression.newton import Newton
from tests.training.regression.random_tables import (
    has_optimum,
    least_objective,
    objective_at,
    random_table,
)

X = np.random.default_rng(0).normal(size=(60, 2))
LABELS = (X[:, 0] + np.random.default_rng(1).normal(size=60) > 0).astype(int)


def fitted(features, labels, weights=None, **options):
    """An estimator, and the warnings of its fit."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = SoftmaxRegression(**options).fit(features, labels, weights)
    return model, [str(each.message) for each in seen]


def check(seed, **options):
    """Fits a random table, and compares with SciPy's L-BFGS."""
    table = random_table(seed)
    model, messages = fitted(
        table.features,
        table.labels,
        table.weights,
        C=table.C,
        fit_intercept=table.intercept,
        **options,
    )
    told = any("converge" in each or "minimum" in each for each in messages)
    assert told == (not model.converged_)
    if not has_optimum(table):
        assert not model.converged_ and model.stopping_reason_ == "unbounded"
        return model, None
    gap = objective_at(model, table) - least_objective(table)
    return model, gap <= 1e-6 * model.objective_ + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_random_tables(seed):
    """L-BFGS itself may need more iterations than it has, and says so then."""
    for each in range(seed, seed + 10):
        model, near = check(each)
        if near is not None:
            assert model.converged_ and near, each
        if each % 4 == 0:
            model, near = check(each, solver="lbfgs")
            assert near or not model.converged_, each


@pytest.mark.parametrize("seed", [3, 7, 19, 26, 29, 33])
def test_some_random_tables(seed):
    model, near = check(seed)
    assert near is None or (model.converged_ and near)


@pytest.mark.parametrize("solver", ["auto", "lbfgs"])
def test_offsets_and_scales_change_nothing(solver):
    """Offsets of 1e9 spreads gave an accuracy of .55 for .78, without a warning."""
    options = {"solver": solver, "C": np.inf}
    expected, _ = fitted(X, LABELS, **options)
    for scale, offset in ((1e12, 0.0), (1e-12, 0.0), (1e-3, 1e9)):
        features = (X + offset) * scale
        model, messages = fitted(features, LABELS, **options)
        assert model.converged_ and not messages
        np.testing.assert_allclose(model.objective_, expected.objective_, rtol=1e-7)
        np.testing.assert_array_equal(model.predict(features), expected.predict(X))


def test_iris_in_another_unit_is_iris():
    """In units of 1e-8 the default solver was no longer finite."""
    features, labels = load_iris(return_X_y=True)
    plain, _ = fitted(features, labels, C=1e8)
    scaled, _ = fitted(features * 1e8, labels, C=1e-8)
    assert scaled.converged_
    np.testing.assert_allclose(scaled.objective_, plain.objective_, rtol=1e-9)
    np.testing.assert_allclose(scaled.coef_ * 1e8, plain.coef_, rtol=1e-5)


def test_columns_of_every_kind_at_once_with_an_l1_penalty():
    features = np.column_stack([X[:, 0], 1e12 * X[:, 1], 1e9 + X[:, 0], np.ones(60)])
    model, messages = fitted(features, LABELS, l1_ratio=1.0)
    plain, _ = fitted(X[:, :1], LABELS, l1_ratio=1.0)
    assert model.solver_ == "fista" and model.converged_ and not messages
    # The column of scale 1e12 costs nothing, the one of scale 1 is there twice.
    assert model.objective_ < plain.objective_ and model.coef_[0, 3] == 0
    small, _ = fitted(X * [1, 1e-12], LABELS, l1_ratio=1.0)
    assert small.coef_[0, 1] == 0
    np.testing.assert_allclose(small.objective_, plain.objective_, rtol=1e-9)


@pytest.mark.parametrize(
    "options", [{"l1_ratio": 0.5}, {}, {"solver": "lbfgs"}], ids=str
)
def test_rows_without_weight_and_offsets_count_nothing(options):
    plain, _ = fitted(X, LABELS, **options)
    features = np.concatenate([X + [1e9, 0], [[1e300, -1e300]]])
    labels, weights = np.append(LABELS, 1), np.append(np.ones(60), 0)
    model, messages = fitted(features, labels, weights, **options)
    assert model.converged_ and not messages
    np.testing.assert_allclose(model.objective_, plain.objective_, rtol=1e-7)
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-6)


@pytest.mark.parametrize("solver", ["auto", "lbfgs"])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_without_a_minimum_no_solver_converges(solver, part):
    """Wholly separated classes, and classes of which one row of two is."""
    features = np.column_stack([X[:, 0], np.where(X[:, 1] > 0, 1.0, 0.0)])
    labels = (X[:, 1] > 0).astype(int)
    if part < 1:
        labels = np.where(features[:, 1] > 0, 2, LABELS)
    model, messages = fitted(features, labels, C=np.inf, solver=solver)
    assert not model.converged_ and model.stopping_reason_ == "unbounded"
    assert len(messages) == 1 and "most of all column 1" in messages[0]
    own = labels == labels.max()
    assert model.score(features[own], labels[own]) == 1
    # A penalty, however weak, has an optimum.
    penalised, messages = fitted(features, labels, C=1e20, solver=solver)
    assert penalised.converged_ and not messages
    assert penalised.objective_ < model.objective_ + 1e-8


def test_a_start_far_out_is_no_optimum():
    labels = np.where(X[:, 1] > 0, 2, LABELS)
    features = np.where(X > 0, X, 0)
    model = SoftmaxRegression(C=np.inf, warm_start=True)
    for _ in range(2):
        with pytest.warns(ConvergenceWarning, match="the objective has no minimum"):
            model.fit(features, labels)
        assert not model.converged_
        model.coef_ = 1e4 * model.coef_


def test_light_rows_decide_where_heavy_ones_are_apart():
    """The heavy rows alone are separable; a light one is on the wrong side."""
    features = np.array([[-2.0], [-1.0], [1.0], [2.0], [1.5]])
    labels, weights = np.array([0, 0, 1, 1, 0]), np.array([1, 1, 1, 1, 1e-9])
    model, messages = fitted(features, labels, weights, C=np.inf)
    assert model.converged_ and not messages
    z = features[:, 0] * model.coef_[0, 0] + model.intercept_[0]
    residual = weights * (1 / (1 + np.exp(-z)) - labels)
    assert abs(residual.sum()) < 1e-12 and abs(residual @ features[:, 0]) < 1e-12
    # Beside rows of which the objective is, their own share of it is rounding.
    features = np.concatenate([X * [1, 0], np.tile([0.0, 1.0], (11, 1))])
    labels = np.concatenate([LABELS, np.ones(10, int), [0]])
    weights = np.append(np.ones(70), 1e-11)
    model, messages = fitted(features, labels, weights, C=np.inf)
    assert model.converged_ and not messages
    z = model.decision_function([[0.0, 1.0]])
    np.testing.assert_allclose(z, np.log(1e12), atol=0.05)


def test_warnings_name_the_column():
    features = X + [0, 1e15]
    frame = pandas.DataFrame(features, columns=["age", "since"])
    _, messages = fitted(frame, LABELS, C=np.inf)
    assert len(messages) == 1 and "column 'since' has a mean that is" in messages[0]
    _, messages = fitted(X * [1, 3], LABELS, solver="lbfgs", max_iter=1)
    assert len(messages) == 1 and "the gradient is largest in column" in messages[0]


def test_float32_features_of_large_means_keep_coefficients_that_predict():
    features = (X + 1e5).astype(np.float32)
    model, _ = fitted(features, LABELS)
    expected, _ = fitted(features.astype(np.float64), LABELS)
    assert model.coef_.dtype == np.float64
    np.testing.assert_array_equal(model.predict(features), expected.predict(features))
    assert fitted(X.astype(np.float32), LABELS)[0].coef_.dtype == np.float32


def test_sparse_columns_of_any_scale_are_scaled_one_by_one(monkeypatch):
    monkeypatch.setattr("jaxsoft.training.regression.full_batch._DENSE_BYTES", 0)
    features = np.where(np.abs(X) > 0.5, X, 0)
    plain, _ = fitted(features, LABELS, C=np.inf)
    for kind in (scipy.sparse.csr_array, scipy.sparse.csr_matrix):
        sparse = kind(features * [1e-9, 1e9])
        model, messages = fitted(sparse, LABELS, C=np.inf)
        assert model.solver_ == "lbfgs" and model.converged_ and not messages
        np.testing.assert_allclose(model.objective_, plain.objective_, rtol=1e-10)


def test_another_solver_takes_over_and_the_fit_resumes(monkeypatch, tmp_path):
    """Newton's directions point uphill here, as where rounding spoils the Hessian."""

    class Uphill(Newton):
        """Of its own, as programs are kept by the class."""

    def direction(plan, problem, parameters, gradient):
        step = jax.tree.map(lambda leaf: 1e30 * leaf, gradient)
        return step, sum((leaf**2).sum() for leaf in gradient)

    expected, _ = fitted(X, LABELS)
    monkeypatch.setattr("jaxsoft.training.regression.newton._direction", direction)
    monkeypatch.setattr("jaxsoft.training.regression.full_batch.Newton", Uphill)
    parameters = Hyperparameters(**SoftmaxRegression().get_params())
    rows = Rows(X, np.unique(LABELS), LABELS.astype(np.int32), None, np.ones(60))
    with jax.enable_x64(True):
        _, status = solving.solve(make_solver(parameters, rows, "newton", None))
    assert status.reason == "stalled" and status.objective <= np.log(2)
    model, messages = fitted(X, LABELS, checkpoint_dir=tmp_path)
    assert expected.solver_ == "newton" and model.solver_ == "lbfgs"
    assert model.converged_ and not messages
    np.testing.assert_allclose(model.objective_, expected.objective_, rtol=1e-9)
    again, _ = fitted(X, LABELS, checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(again.coef_, model.coef_)
    assert again.n_iter_ == model.n_iter_ and again.solver_ == "lbfgs"


def test_fits_of_other_sizes_compile_nothing():
    given = np.random.default_rng(0).normal(size=(900, 3))
    labels = (given[:, 0] + np.random.default_rng(1).normal(size=900) > 0).astype(int)
    fitted(given[:100], labels[:100])
    compiled = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for size in (131, 250, 307, 444, 512, 640, 707, 800, 900):
            fitted(given[:size], labels[:size])
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled
