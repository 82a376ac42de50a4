"""`SoftmaxRegression` beyond one array in memory: heads, files, several devices."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import dump_svmlight_file
from sklearn.exceptions import ConvergenceWarning

from jaxsoft.training import (
    NonFiniteLossError,
    SoftmaxRegression,
    load_svmlight_memmap,
    svmlight_to_memmap,
)
from tests.training.regression.problems import problem

CLASSES = 12
GIVEN = problem(rows=240, features=6, classes=CLASSES)


@pytest.mark.parametrize("head", ["hierarchical", "adaptive"])
def test_heads_fit_predict_and_come_back_from_a_file(head, tmp_path):
    model = SoftmaxRegression(head=head, batch_size=40, max_iter=40, dtype="float32")
    with pytest.warns(ConvergenceWarning, match="minibatch failed to converge after"):
        model.fit(GIVEN.features, GIVEN.labels)
    assert not hasattr(model, "coef_") and model.head_.num_classes == CLASSES
    assert model.solver_ == "minibatch" and model.score(*GIVEN[:2]) > 0.3
    log_p = model.predict_log_proba(GIVEN.features)
    assert log_p.shape == (240, CLASSES)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        model.predict_proba(GIVEN.features), np.exp(log_p), rtol=1e-5
    )
    np.testing.assert_array_equal(
        model.predict(GIVEN.features), model.classes_[log_p.argmax(1)]
    )
    mean = -log_p[np.arange(240), GIVEN.labels].mean()
    assert mean < model.objective_ < mean + 0.2
    model.save(tmp_path / "model.safetensors")
    loaded = SoftmaxRegression.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.predict_log_proba(GIVEN.features), log_p)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_on_disk_give_what_rows_in_memory_do(tmp_path):
    options: dict[str, Any] = {"batch_size": 32, "max_iter": 3, "learning_rate": 0.05}
    features = np.round(GIVEN.features, 2).astype(np.float32)
    inside = SoftmaxRegression(**options).fit(features, GIVEN.labels)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    dump_svmlight_file(
        features, GIVEN.labels, str(tmp_path / "data.svm"), zero_based=True
    )
    svmlight_to_memmap(tmp_path / "data.svm", tmp_path / "rows", zero_based=True)
    rows, labels = load_svmlight_memmap(tmp_path / "rows")
    for source, names in ((mapped, GIVEN.labels), (rows, labels)):
        model = SoftmaxRegression(**options).fit(source, names)
        assert model.solver_ == "minibatch" and model.n_features_in_ == 6
        np.testing.assert_allclose(model.coef_, inside.coef_, atol=1e-6)
        np.testing.assert_array_equal(model.predict(source), inside.predict(features))
        np.testing.assert_allclose(
            model.decision_function(source),
            inside.decision_function(features),
            atol=1e-4,
        )
    with pytest.raises(ValueError, match='`solver` must be "minibatch" or "auto" for'):
        SoftmaxRegression(solver="lbfgs").fit(rows, labels)
    with pytest.raises(ValueError, match="`calibrate` must be False for rows that"):
        SoftmaxRegression(calibrate=True).fit(rows, labels)
    with pytest.raises(ValueError, match="`y` must have 240 labels, got 3"):
        SoftmaxRegression().fit(rows, labels[:3])
    with pytest.raises(ValueError, match="`y` must be given where there are no"):
        SoftmaxRegression().fit(rows)
    with pytest.raises(ValueError, match="`sample_weight` must be finite and not neg"):
        SoftmaxRegression().fit(rows, labels, -np.ones(240))
    narrow = SoftmaxRegression(**options).fit(features[:, :4], GIVEN.labels)
    with pytest.raises(ValueError, match="`X` must have 4 features, as in `fit`, got"):
        narrow.predict(rows)


def test_a_bad_row_on_disk_is_named_and_the_parameters_before_it_kept(tmp_path):
    features = GIVEN.features.astype(np.float32)
    features[100, 2] = np.nan
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    model = SoftmaxRegression(solver="minibatch", batch_size=16, max_iter=2)
    with pytest.raises(NonFiniteLossError, match=r"iteration \d+, batch \d+.*100"):
        model.fit(mapped, GIVEN.labels)
    assert model.stopping_reason_ == "non_finite" and np.isfinite(model.coef_).all()


@pytest.mark.parametrize("solver", ["lbfgs", "newton", "fista"])
def test_rows_divided_over_devices_give_the_same(solver, monkeypatch):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    options: dict[str, Any] = {
        "solver": solver,
        "tol": 1e-9,
        "l1_ratio": 0.5 * (solver == "fista"),
    }
    one = SoftmaxRegression(**options).fit(*GIVEN[:2], GIVEN.weights)
    # In tiles, the last of which is not whole.
    monkeypatch.setattr("jaxsoft.training.regression.full_batch._TILE_BYTES", 300)
    many = SoftmaxRegression(mesh=mesh, **options).fit(*GIVEN[:2], GIVEN.weights)
    np.testing.assert_allclose(many.coef_, one.coef_, atol=1e-6)
    np.testing.assert_allclose(many.objective_, one.objective_, rtol=1e-10)


def test_sparse_rows_divided_over_devices_give_the_same(monkeypatch):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    features = np.where(np.abs(GIVEN.features) > 0.7, GIVEN.features, 0)
    options: dict[str, Any] = {"solver": "lbfgs", "tol": 1e-9}
    one = SoftmaxRegression(**options).fit(features, GIVEN.labels)
    monkeypatch.setattr("jaxsoft.training.regression.full_batch._DENSE_BYTES", 0)
    monkeypatch.setattr("jaxsoft.training.regression.sparse_tiles._TILE_BYTES", 4000)
    sparse = scipy.sparse.csr_array(features)
    many = SoftmaxRegression(mesh=mesh, **options).fit(sparse, GIVEN.labels)
    np.testing.assert_allclose(many.coef_, one.coef_, atol=1e-6)
