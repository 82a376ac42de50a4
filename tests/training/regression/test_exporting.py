"""`SoftmaxRegression.to_sklearn`: the same probabilities by scikit-learn's class."""

import pickle

import numpy as np
import pandas
import pytest
import scipy.special
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from jaxsoft.training import SoftmaxRegression
from tests.training.regression.problems import problem

OPTIONS = [
    {},
    {"reference_class": None},
    {"reference_class": "c1"},
    {"calibrate": True, "validation_fraction": 0.3, "C": 100.0},
    {"fit_intercept": False, "class_weight": "balanced", "C": np.inf},
    {"solver": "minibatch", "max_iter": 5, "learning_rate": 0.1},
    {"l1_ratio": 0.5},
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [2, 4])
def test_probabilities_are_the_same(options, classes):
    given = problem(90, classes=classes)
    names = np.array([f"c{index}" for index in given.labels])
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-6)):
        features = given.features.astype(dtype)
        model = SoftmaxRegression(dtype=dtype, **options).fit(features, names)
        other = model.to_sklearn()
        assert type(other) is LogisticRegression
        if options.get("calibrate"):
            assert abs(model.temperature_ - 1) > 0.01
        assert other.coef_.shape == (1 if classes == 2 else classes, 5)
        assert other.coef_.dtype == model.coef_.dtype
        for method in ("predict_proba", "predict_log_proba"):
            np.testing.assert_allclose(
                getattr(other, method)(features),
                getattr(model, method)(features),
                rtol=100 * tolerance,
                atol=tolerance,
            )
        np.testing.assert_array_equal(other.predict(features), model.predict(features))
        assert other.score(features, names) == model.score(features, names)
        assert other.C == model.C and other.class_weight == model.class_weight
        assert other.fit_intercept == model.fit_intercept
        assert other.n_iter_ == model.n_iter_


# Of scikit-learn 1.6's own fit with a newer SciPy.
@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")
def test_it_is_a_copy_with_the_names_of_features():
    given = problem(60)
    frame = pandas.DataFrame(given.features, columns=list("abcde"))
    model = SoftmaxRegression().fit(frame, given.labels)
    other = pickle.loads(pickle.dumps(model.to_sklearn()))
    np.testing.assert_allclose(other.predict_proba(frame), model.predict_proba(frame))
    assert other.feature_names_in_.tolist() == list("abcde")
    assert other.n_features_in_ == 5
    with pytest.raises(ValueError, match="feature names should match"):
        other.predict(frame.rename(columns={"a": "z"}))
    before = model.predict_proba(frame)
    copied = model.to_sklearn()
    for name in ("coef_", "intercept_", "classes_"):
        getattr(copied, name)[:] = 7
    np.testing.assert_array_equal(model.predict_proba(frame), before)
    assert model.classes_.tolist() == [0, 1, 2, 3]
    # A fit of its own is scikit-learn's.
    assert (copied.fit(frame, given.labels).coef_ != 7).all()
    np.testing.assert_allclose(
        scipy.special.softmax(copied.decision_function(frame), 1),
        copied.predict_proba(frame),
    )


def test_what_has_no_coefficients_is_refused():
    with pytest.raises(NotFittedError):
        SoftmaxRegression().to_sklearn()
    given = problem(60)
    model = SoftmaxRegression(head="adaptive", learning_rate=0.1)
    model.fit(given.features, given.labels)
    with pytest.raises(
        TypeError, match='`head` must be "full" for to_sklearn, got \'a'
    ):
        model.to_sklearn()
