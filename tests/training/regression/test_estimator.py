"""`SoftmaxRegression` against scikit-learn: conventions, optima, options."""

import copy
import doctest
import pickle
import signal
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
import scipy.optimize
import scipy.sparse
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from jaxsoft import fit_temperature
from jaxsoft.training import (
    CheckpointError,
    Listener,
    MeshError,
    SoftmaxRegression,
    StopRequest,
    TrainingInterrupted,
    parse_mesh,
    svmlight_to_memmap,
)
from jaxsoft.training.regression.fitting import watched
from jaxsoft.training.regression.full_batch import make_solver
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.inputs import Rows
from jaxsoft.training.regression.solving import solve
from tests.training.regression.problems import (
    LOADERS,
    losses,
    objective,
    problem,
    standardised,
)

# scikit-learn's optima per sample, of standardised features at C = 1.
OPTIMA = {
    "iris": 0.209191788405,
    "wine": 0.067923234685,
    "breast_cancer": 0.066360186225,
    "digits": 0.063149668770,
}


def reference(**options):
    """scikit-learn's estimator, run to its optimum."""
    return LogisticRegression(tol=1e-11, max_iter=100_000, **options)


@pytest.mark.parametrize("options", [{}, {"l1_ratio": 1.0}], ids=["l2", "l1"])
def test_scikit_learn_estimator_checks(options):
    model = SoftmaxRegression(**options)
    with warnings.catch_warnings():
        # Some checks stop solvers early, or look at a class without tags.
        warnings.simplefilter("ignore")
        results = check_estimator(model, on_fail=None, on_skip=None)
    failed = {
        each["check_name"]: repr(each["exception"])
        for each in results
        if each["status"] == "failed"
    }
    assert not failed
    assert sum(each["status"] == "passed" for each in results) > 50


@pytest.mark.parametrize("item", [SoftmaxRegression, svmlight_to_memmap])
def test_docstrings_run(item):
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(item):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


@pytest.mark.parametrize("name", OPTIMA)
def test_optimum_coefficients_and_folds_are_scikit_learns(name):
    features, labels = standardised(name)
    expected = reference().fit(features, labels)
    for dtype, tolerance in (("float64", 1e-8), ("float32", 1e-5)):
        model = SoftmaxRegression(dtype=dtype).fit(features, labels)
        assert model.coef_.dtype == dtype and model.converged_
        np.testing.assert_allclose(model.objective_, OPTIMA[name], rtol=tolerance)
        np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-4)
        np.testing.assert_allclose(model.intercept_, expected.intercept_, atol=1e-4)
        np.testing.assert_array_equal(
            model.predict(features), expected.predict(features)
        )
    raw, _ = LOADERS[name](return_X_y=True)
    scores = [
        cross_val_score(make_pipeline(StandardScaler(), each), raw, labels, cv=5)
        for each in (SoftmaxRegression(), expected)
    ]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("name", OPTIMA)
def test_other_solvers_reach_the_optimum(name):
    """Other than those that the test above takes."""
    features, labels = standardised(name)
    other = "newton" if name == "digits" else "lbfgs"
    model = SoftmaxRegression(solver=other).fit(features, labels)
    np.testing.assert_allclose(model.objective_, OPTIMA[name], rtol=1e-8)
    # In float32 throughout, as where there are more rows.
    rows = Rows(
        features.astype(np.float32),
        np.unique(labels),
        labels.astype(np.int32),
        None,
        np.ones(len(labels)),
    )
    parameters = Hyperparameters(**SoftmaxRegression().get_params())
    _, status = solve(make_solver(parameters, rows, "lbfgs", None))
    assert status.reason in ("gradient", "objective")
    np.testing.assert_allclose(status.objective, OPTIMA[name], rtol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_float32_goes_on_where_the_objective_no_longer_shows_progress():
    """Of 200 classes: after twenty such iterations it was 1.3e-6 from the optimum."""
    features, labels = make_classification(
        n_samples=3000,
        n_features=64,
        n_informative=64,
        n_redundant=0,
        n_classes=200,
        n_clusters_per_class=1,
        random_state=0,
    )
    narrow = np.asarray(features, np.float32)
    best = SoftmaxRegression(tol=1e-8).fit(narrow.astype(np.float64), labels)
    model = SoftmaxRegression(tol=1e-8).fit(narrow, labels)
    found = objective(model, problem()._replace(features=narrow), labels=labels)
    assert found / best.objective_ - 1 < 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {"C": 0.05, "class_weight": "balanced"},
        {"C": 30.0, "fit_intercept": False},
        {"class_weight": {0: 2.0, 1: 0.5, 2: 1.0, 3: 1.5}},
    ],
    ids=str,
)
def test_options_mean_what_scikit_learns_do(options):
    given = problem(60)
    model = SoftmaxRegression(tol=1e-10, **options)
    model.fit(*given[:2], given.weights)
    expected = reference(**options).fit(*given[:2], given.weights)
    np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-5)
    np.testing.assert_allclose(model.intercept_, expected.intercept_, atol=1e-5)
    for method in ("predict_proba", "predict_log_proba", "decision_function"):
        np.testing.assert_allclose(
            getattr(model, method)(given.features),
            getattr(expected, method)(given.features),
            atol=2e-5,
        )


def test_l1_penalties_are_scikit_learns():
    given = problem(60, features=8)
    for ratio in (1.0, 0.4):
        options: dict[str, Any] = {"C": 0.2, "l1_ratio": ratio}
        model = SoftmaxRegression(tol=1e-8, **options).fit(*given[:2])
        expected = reference(solver="saga", random_state=0, **options).fit(*given[:2])
        assert model.solver_ == "fista" and model.stopping_reason_ == "gradient"
        np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-4)
        np.testing.assert_array_equal(model.coef_ == 0, expected.coef_ == 0)
        assert (model.coef_ == 0).any()


def test_inputs_of_every_kind_give_the_same():
    given = problem(60)
    features = np.where(np.abs(given.features) > 0.5, given.features, 0)
    names = np.array(["ant", "bee", "cat", "dog"])[given.labels]
    base = SoftmaxRegression().fit(features, names)
    assert base.classes_.tolist() == ["ant", "bee", "cat", "dog"]
    frame = pandas.DataFrame(features, columns=list("abcde"))
    from_frame = SoftmaxRegression().fit(frame, pandas.Series(names))
    assert from_frame.feature_names_in_.tolist() == list("abcde")
    np.testing.assert_array_equal(base.coef_, from_frame.coef_)
    with pytest.raises(ValueError, match="feature names should match"):
        from_frame.predict(frame.rename(columns={"a": "z"}))
    sparse = scipy.sparse.csr_array(features)
    from_sparse = SoftmaxRegression().fit(sparse, names)
    np.testing.assert_allclose(from_sparse.coef_, base.coef_, atol=1e-9)
    np.testing.assert_allclose(
        from_sparse.predict_proba(sparse), base.predict_proba(features), rtol=1e-9
    )
    from_jax = SoftmaxRegression().fit(jnp.asarray(features, jnp.float32), names)
    assert from_jax.coef_.dtype == np.float32
    np.testing.assert_allclose(from_jax.coef_, base.coef_, atol=1e-4)
    assert (from_jax.predict(jnp.asarray(features, jnp.float32)) == names).mean() > 0.5


def test_large_sparse_features_are_not_made_dense(monkeypatch):
    given = problem(60)
    sparse = scipy.sparse.csr_array(given.features)
    dense = SoftmaxRegression(solver="lbfgs", tol=1e-9).fit(
        given.features, given.labels
    )
    monkeypatch.setattr("jaxsoft.training.regression.full_batch._DENSE_BYTES", 0)
    monkeypatch.setattr(type(sparse), "toarray", None)
    model = SoftmaxRegression(tol=1e-9).fit(sparse, given.labels)
    assert model.solver_ == "lbfgs"
    np.testing.assert_allclose(model.coef_, dense.coef_, atol=1e-6)


def test_two_classes_have_one_row_or_two():
    """One row at C is two rows at C/2: the penalty counts both."""
    given = problem(60, classes=2)
    one = SoftmaxRegression(C=0.8).fit(*given[:2])
    expected = reference(C=0.8).fit(*given[:2])
    assert one.coef_.shape == (1, 5)
    np.testing.assert_allclose(one.coef_, expected.coef_, atol=1e-6)
    for again in (0, 1):
        other = SoftmaxRegression(C=0.8, reference_class=again).fit(*given[:2])
        np.testing.assert_allclose(other.coef_, one.coef_, atol=1e-6)
        np.testing.assert_allclose(other.intercept_, one.intercept_, atol=1e-6)
    two = SoftmaxRegression(C=0.4, reference_class=None).fit(*given[:2])
    assert two.coef_.shape == (2, 5) and two.decision_function([[0.0] * 5]).shape == (
        1,
    )
    np.testing.assert_allclose(two.coef_[1:] - two.coef_[:1], one.coef_, atol=1e-6)
    np.testing.assert_allclose(two.coef_.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(
        two.predict_proba(given.features), one.predict_proba(given.features), atol=1e-6
    )
    same = SoftmaxRegression(C=0.8, reference_class=None).fit(*given[:2])
    assert np.abs(same.coef_[1] - same.coef_[0] - one.coef_[0]).max() > 1e-2
    for model, strength in ((one, 0.8), (two, 0.4)):
        np.testing.assert_allclose(
            model.objective_,
            objective(model, given, C=strength, labels=given.labels),
            rtol=1e-9,
        )


def test_a_reference_class_removes_the_redundant_parameters():
    given = problem(200)
    free = SoftmaxRegression(C=np.inf).fit(*given[:2])
    np.testing.assert_allclose(free.coef_.sum(0), 0, atol=1e-9)
    np.testing.assert_allclose(free.intercept_.sum(), 0, atol=1e-9)
    shifted: Any = clone(free)
    shifted.fit(*given[:2])
    shifted.coef_ = shifted.coef_ + np.arange(5.0)
    np.testing.assert_allclose(
        shifted.predict_proba(given.features),
        free.predict_proba(given.features),
        atol=1e-12,
    )
    for label in (0, 2):
        model = SoftmaxRegression(C=np.inf, reference_class=label).fit(*given[:2])
        assert (model.coef_[label] == 0).all() and model.intercept_[label] == 0
        np.testing.assert_allclose(
            model.coef_, free.coef_ - free.coef_[label], atol=2e-4
        )
    with_penalty = [
        SoftmaxRegression(reference_class=label).fit(*given[:2]) for label in (0, 2)
    ]
    first, second = (m.predict_proba(given.features) for m in with_penalty)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_soft_targets_and_label_smoothing(solver):
    given = problem(60)
    options: dict[str, Any] = {
        "distillation_temperature": 2.0,
        "distillation_weight": 0.3,
        "label_smoothing": 0.1,
    }

    def loss(flat):
        scores = given.features @ flat[:20].reshape(4, 5).T + flat[20:]
        hard = losses(scores, given.labels, smoothing=0.1)
        soft = losses(scores, targets=given.targets, smoothing=0.1, temperature=2.0)
        return (0.7 * hard + 0.3 * soft).mean() + 0.5 * (flat[:20] ** 2).sum() / 60

    best = scipy.optimize.minimize(loss, np.zeros(24), options={"gtol": 1e-7})
    model = SoftmaxRegression(solver=solver, tol=1e-8, **options)
    model.fit(given.features, given.labels, targets=given.targets)
    np.testing.assert_allclose(model.objective_, best.fun, rtol=1e-9)
    np.testing.assert_allclose(model.coef_.ravel(), best.x[:20], atol=1e-5)
    teacher = SoftmaxRegression(distillation_temperature=2.0, solver=solver)
    teacher.fit(given.features, targets=given.targets)
    assert teacher.classes_.tolist() == [0, 1, 2, 3]
    other: Any = clone(teacher)
    other.fit(given.features, given.labels, targets=given.targets)
    np.testing.assert_allclose(teacher.coef_, other.coef_, atol=1e-8)


def test_calibration_fits_one_temperature_on_rows_held_out():
    given = problem(120)
    model = SoftmaxRegression(C=1e4, calibrate=True, validation_fraction=0.25)
    model.fit(given.features, given.labels)
    train, held = train_test_split(
        np.arange(120), test_size=0.25, stratify=given.labels, random_state=0
    )
    plain = SoftmaxRegression(C=1e4).fit(given.features[train], given.labels[train])
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-4)
    scores = plain.decision_function(given.features[held])
    with jax.enable_x64(True):
        expected = fit_temperature(scores, given.labels[held])
    assert model.temperature_ > 1.05
    np.testing.assert_allclose(model.temperature_, expected.temperature, rtol=1e-4)
    scaled = scores / model.temperature_
    probabilities = np.exp(scaled - scaled.max(1, keepdims=True))
    np.testing.assert_allclose(
        model.predict_proba(given.features[held]),
        probabilities / probabilities.sum(1, keepdims=True),
        atol=1e-5,
    )


def test_minibatches_come_near_the_optimum_and_go_on():
    features, labels = standardised("iris")
    model = SoftmaxRegression(solver="minibatch", batch_size=32, random_state=1)
    model.fit(features, labels)
    value = objective(model, problem()._replace(features=features), labels=labels)
    assert value < OPTIMA["iris"] * 1.02
    near = model.coef_
    model.partial_fit(features, labels)
    assert 0 < np.abs(model.coef_ - near).max() < 0.3
    partial = SoftmaxRegression(batch_size=32, learning_rate=0.05)
    with pytest.raises(ValueError, match="`classes` must be given in the first call"):
        partial.partial_fit(features, labels)
    for _ in range(30):
        partial.partial_fit(features[:75], labels[:75], classes=[0, 1, 2])
        partial.partial_fit(features[75:], labels[75:])
    assert partial.score(features, labels) > 0.93
    with pytest.raises(ValueError, match="only the classes of the first fit, got 7"):
        partial.partial_fit(features, labels + 7 * (labels == 2) - 2 * (labels == 2))


def test_warm_start_saves_iterations():
    given = problem(60)
    model = SoftmaxRegression(solver="lbfgs", warm_start=True).fit(*given[:2])
    first = model.n_iter_[0]
    model.fit(*given[:2])
    assert model.n_iter_[0] <= 1 < first
    two = problem(60, classes=2)
    for label in (0, 1):
        model = SoftmaxRegression(
            solver="lbfgs", warm_start=True, reference_class=label
        )
        assert model.fit(*two[:2]).fit(*two[:2]).n_iter_[0] <= 1
    with pytest.raises(ValueError, match=r"`warm_start` must go on with \(4, 5\)"):
        model.fit(*given[:2])


def test_too_few_iterations_warn_as_scikit_learn_does():
    given = problem(60)
    with pytest.warns(
        ConvergenceWarning, match=r"lbfgs failed to converge after 2 iteration\(s\)"
    ) as record:
        model = SoftmaxRegression(solver="lbfgs", max_iter=2).fit(*given[:2])
    assert record[0].filename == __file__
    assert not model.converged_ and model.stopping_reason_ == "max_iter"
    assert model.n_iter_.tolist() == [2]


def test_ctrl_c_keeps_the_parameters(tmp_path):
    given = problem(60)
    stop = StopRequest()

    class Stop(Listener):
        def step(self, record):
            stop.received = signal.SIGINT

    model = SoftmaxRegression(solver="lbfgs", tol=1e-12, checkpoint_dir=tmp_path)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGINT"):
        with watched(Stop(), stop):
            model.fit(*given[:2])
    assert model.stopping_reason_ == "interrupted" and not model.converged_
    assert model.score(*given[:2]) > 0.4
    whole = SoftmaxRegression(solver="lbfgs", tol=1e-12).fit(*given[:2])
    resumed = model.fit(*given[:2])
    np.testing.assert_array_equal(resumed.coef_, whole.coef_)
    assert resumed.objective_ == whole.objective_ and resumed.n_iter_ == whole.n_iter_


def test_verbose_shows_progress(capsys):
    given = problem(60)
    SoftmaxRegression(solver="lbfgs", verbose=1).fit(*given[:2])
    assert "iteration" in capsys.readouterr().out


BAD = [
    ({"C": 0.0}, ValueError, "`C` must be positive, got 0.0"),
    ({"C": "1"}, TypeError, "`C` must be"),
    ({"l1_ratio": 1.5}, ValueError, r"`l1_ratio` must lie in \[0, 1\], got 1.5"),
    (
        {"l1_ratio": 0.5, "solver": "lbfgs"},
        ValueError,
        "`l1_ratio` must be 0 with `solver` 'lbfgs', got 0.5; take \"fista\"",
    ),
    ({"solver": "sag"}, ValueError, "`solver` must be one of 'auto', 'lbfgs'"),
    ({"head": "sampled"}, ValueError, "`head` must be one of"),
    ({"tol": -1.0}, ValueError, "`tol` must be"),
    ({"max_iter": 0}, ValueError, "`max_iter` must be at least 1, got 0"),
    ({"validation_fraction": 1.0}, ValueError, r"must be in \(0, 1\), got 1.0"),
    (
        {"distillation_temperature": 0.0},
        ValueError,
        "`distillation_temperature` must be positive and finite, got 0.0",
    ),
    ({"reference_class": 9}, ValueError, '`reference_class` must be "auto", None or'),
    ({"dtype": "float16"}, ValueError, "`dtype` must be float32 or float64, got"),
    (
        {"solver": "newton", "batch_size": 8},
        ValueError,
        "`optimizer`, `learning_rate` and `batch_size` must be None with `solver`",
    ),
    (
        {"head": "adaptive", "calibrate": True},
        ValueError,
        "`calibrate` must be left at its default with `head` 'adaptive', got True",
    ),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=lambda x: str(x)[:40])
def test_bad_parameters(options, error, words):
    given = problem(20)
    with pytest.raises(error, match=words):
        SoftmaxRegression(**options).fit(*given[:2])


def test_bad_arrays_and_meshes():
    given = problem(20)
    x, y, model = given.features, given.labels, SoftmaxRegression()
    arguments: tuple[Any, ...]
    for arguments, words in (
        ((x, np.zeros(20)), "at least 2 classes, got only one class: 0.0"),
        ((x, y, np.zeros(20)), "Sample weights must contain at least one non-zero"),
        ((x, None), "requires y to be passed"),
    ):
        with pytest.raises(ValueError, match=words):
            model.fit(*arguments)
    with pytest.raises(ValueError, match=r"`targets` must have a row.*got \(20, 3\)"):
        model.fit(x, y, targets=given.targets[:, :3])
    with pytest.raises(ValueError, match="`targets` must be probabilities: not neg"):
        model.fit(x, y, targets=2 * given.targets)
    with pytest.raises(ValueError, match="`calibrate` must be False where there is no"):
        SoftmaxRegression(calibrate=True).fit(x, targets=given.targets)
    mesh = jax.make_mesh((1,), ("rows",))
    with pytest.raises(MeshError, match="`mesh` must have all its devices along"):
        SoftmaxRegression(mesh=mesh).fit(x, y)


def test_weights_of_classes_and_rows_that_are_0():
    given = problem(60)
    weights = np.where(given.labels == 1, 0, given.weights)
    mass = np.bincount(given.labels, weights)
    by_class = {k: mass.sum() / (4 * mass[k]) for k in (0, 2, 3)}
    model = SoftmaxRegression(class_weight="balanced").fit(*given[:2], weights)
    expected = SoftmaxRegression(class_weight=by_class).fit(*given[:2], weights)
    np.testing.assert_allclose(
        model.predict_proba(given.features),
        expected.predict_proba(given.features),
        atol=1e-5,
    )
    # More rows than the coordinates are made from, of which every other counts.
    given = problem(9000, 4)
    order = np.random.default_rng(0).permutation(9000)
    features, labels = given.features[order], given.labels[order]
    model = SoftmaxRegression(solver="lbfgs")
    model.fit(features, labels, np.arange(9000) % 2)
    half = SoftmaxRegression(solver="lbfgs").fit(features[1::2], labels[1::2])
    np.testing.assert_allclose(model.coef_, half.coef_, atol=1e-5)
    with pytest.raises(ValueError, match="`class_weight` must be None where there is"):
        SoftmaxRegression(class_weight={0: 2.0}).fit(
            given.features, targets=given.targets
        )


def test_memory_maps_and_wide_indices_are_arrays(tmp_path):
    given = problem(60)
    np.save(tmp_path / "features.npy", given.features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    sparse = scipy.sparse.csr_array(given.features)
    sparse.indices = sparse.indices.astype(np.int64)
    sparse.indptr = sparse.indptr.astype(np.int64)
    expected = SoftmaxRegression().fit(*given[:2])
    for features in (mapped, sparse):
        model = SoftmaxRegression().fit(features, given.labels)
        assert model.solver_ == expected.solver_ and model.coef_.dtype == np.float64
        np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-7)
    batches = SoftmaxRegression(solver="minibatch").fit(mapped, given.labels)
    assert batches.coef_.dtype == np.float64


def test_checkpoints_are_of_one_fit_alone(tmp_path):
    given = problem(60)
    options: dict[str, Any] = {"solver": "lbfgs", "checkpoint_dir": tmp_path}
    first = SoftmaxRegression(**options).fit(*given[:2])
    again = SoftmaxRegression(**options, verbose=0).fit(*given[:2])
    np.testing.assert_array_equal(again.coef_, first.coef_)
    others: tuple[tuple[dict[str, Any], Any, Any], ...] = (
        ({}, given.features + 0.5, given.labels),
        ({}, given.features, given.labels[::-1]),
        ({"C": 0.1}, *given[:2]),
    )
    for other, rows, labels in others:
        with pytest.raises(CheckpointError, match="of a fit with other rows or other"):
            SoftmaxRegression(**options, **other).fit(rows, labels)


@pytest.mark.parametrize("head", ["full", "hierarchical", "adaptive"])
def test_partial_fit_goes_on_with_what_there_is(head):
    given = problem(200)
    model = SoftmaxRegression(head=head, solver="minibatch")
    model.fit(*given[:2])
    before = model.predict_log_proba(given.features)
    model.set_params(learning_rate=0.0)
    # Rows with other shares of the classes: another tree, were it made of them.
    some = given.labels != 0
    for times in (1, 2):
        model.partial_fit(given.features[some], given.labels[some])
        assert model.n_iter_ == times
        after = model.predict_log_proba(given.features)
        np.testing.assert_allclose(after, before, atol=1e-6)
    model.set_params(learning_rate=0.1)
    twins = copy.copy(model), model
    for each in twins:
        each.partial_fit(*given[:2])
    first, second = (each.predict_log_proba(given.features) for each in twins)
    np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="`class_weight` must be None or a dict for"):
        SoftmaxRegression(head=head, class_weight="balanced").partial_fit(
            *given[:2], classes=[0, 1, 2, 3]
        )
    if head == "full":
        assert not hasattr(SoftmaxRegression(l1_ratio=0.5), "partial_fit")
        with pytest.raises(AttributeError) as caught:
            SoftmaxRegression(l1_ratio=0.5).partial_fit(*given[:2], classes=range(4))
        assert "`l1_ratio` must be 0 for partial_fit" in str(caught.value.__cause__)


@pytest.mark.parametrize("head", ["full", "hierarchical", "adaptive"])
def test_pickles_and_copies_keep_the_bits_of_float64(head):
    given = problem(60)
    model = SoftmaxRegression(head=head, solver="minibatch", batch_size=30, max_iter=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*given[:2])
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    expected = model.predict_log_proba(given.features)
    for each in copies:
        found = each.predict_log_proba(given.features)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, expected)
    # The optimizer's state is kept too, as `partial_fit` goes on with it.
    model.partial_fit(*given[:2])
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    expected = model.partial_fit(*given[:2]).predict_log_proba(given.features)
    for each in copies:
        found = each.partial_fit(*given[:2]).predict_log_proba(given.features)
        np.testing.assert_array_equal(found, expected)


def test_minibatches_smooth_targets_and_take_optimizers_that_need_the_value():
    given = problem(60)
    options: dict[str, Any] = {
        "label_smoothing": 0.3,
        "distillation_temperature": 2.0,
        "distillation_weight": 0.5,
    }
    best = SoftmaxRegression(**options).fit(*given[:2], targets=given.targets)
    model = SoftmaxRegression(solver="minibatch", **options)
    model.fit(*given[:2], targets=given.targets)
    assert -1e-9 < model.objective_ / best.objective_ - 1 < 1e-3
    model = SoftmaxRegression(optimizer=optax.polyak_sgd(), batch_size=20)
    model.fit(*given[:2])
    assert model.score(*given[:2]) > 0.5


def test_a_second_fit_keeps_nothing_of_another_kind():
    given = problem(60)
    model = SoftmaxRegression().fit(*given[:2])
    model.set_params(warm_start=True, fit_intercept=False, reference_class=2)
    model.set_params(solver="minibatch").fit(*given[:2])
    assert (model.intercept_ == 0).all() and (model.coef_[2] == 0).all()
    model.set_params(warm_start=False, fit_intercept=True, reference_class=None)
    model.set_params(head="adaptive").fit(*given[:2])
    assert not hasattr(model, "coef_") and not hasattr(model, "intercept_")
    model.set_params(head="full").fit(*given[:2])
    assert not hasattr(model, "head_")


def test_a_mesh_may_have_other_axes_of_size_1():
    given = problem(60)
    model = SoftmaxRegression(mesh=parse_mesh("data=8"), solver="lbfgs")
    expected = SoftmaxRegression(solver="lbfgs").fit(*given[:2])
    np.testing.assert_allclose(model.fit(*given[:2]).coef_, expected.coef_, atol=1e-6)
    wrong: Any = "data=2"
    with pytest.raises(TypeError, match="`mesh` must be a jax.sharding.Mesh or None"):
        SoftmaxRegression(mesh=wrong).fit(*given[:2])


def test_messages_of_what_cannot_be_fitted(monkeypatch):
    given = problem(60)
    with pytest.raises(ValueError, match="got only one class: 'a'"):
        SoftmaxRegression().fit(given.features, pandas.Series(["a"] * 60))
    with pytest.raises(ValueError, match="`validation_fraction` must leave a row of"):
        SoftmaxRegression(calibrate=True).fit(given.features[:8], given.labels[:8])
    monkeypatch.setattr("jaxsoft.training.regression.full_batch._DENSE_BYTES", 0)
    with pytest.raises(ValueError, match='`solver` must not be "newton" for sparse'):
        SoftmaxRegression(solver="newton").fit(
            scipy.sparse.csr_array(given.features), given.labels
        )
