"""L-BFGS, Newton's method and FISTA: optima, stopping rules, exact resumption."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from jaxsoft.training import (
    Listener,
    NonFiniteLossError,
    SoftmaxRegression,
    StopRequest,
)
from jaxsoft.training.regression import solving
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.full_batch import choose, make_solver
from jaxsoft.training.regression.hyperparameters import Hyperparameters
from jaxsoft.training.regression.inputs import Rows
from jaxsoft.training.regression.objective import Parameters
from jaxsoft.training.regression.whitening import whitening
from tests.training.regression.problems import problem
from tests.truth import softmax

OPTIONS = Hyperparameters(
    **SoftmaxRegression(
        C=0.7, tol=1e-9, max_iter=200, reference_class=None
    ).get_params()
)
SOLVERS = ("lbfgs", "newton", "fista")


def rows_of(given, dtype=np.float64):
    return Rows(
        given.features.astype(dtype),
        np.unique(given.labels),
        given.labels.astype(np.int32),
        None,
        given.weights,
    )


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def solver_of(name, rows=None, start=None, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return make_solver(options, rows or rows_of(problem()), name, start)


@pytest.mark.parametrize("name", SOLVERS)
def test_checkpoints_go_on_bit_for_bit(name, tmp_path):
    solver = solver_of(name, tol=0.0, max_iter=18)
    whole, status = solving.solve(solver)
    stop = StopRequest()

    class Stop(Listener):
        def step(self, record):
            stop.received = signal.SIGINT

    with pytest.raises(solving.FitInterrupted) as interruption:
        solving.solve(
            solver_of(name, tol=0.0, max_iter=18),
            checkpoints=tmp_path,
            listener=Stop(),
            stop=stop,
        )
    assert 0 < (interruption.value.step or 0) < status.iteration
    resumed, after = solving.solve(
        solver_of(name, tol=0.0, max_iter=18), checkpoints=tmp_path
    )
    assert after == status
    for leaf, other in zip(
        jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True
    ):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("name", SOLVERS)
def test_reasons_to_stop(name):
    def reason(**changes):
        return solving.solve(solver_of(name, **changes))[1]

    gradient = reason(tol=1e-6)
    assert gradient.reason == "gradient" and gradient.gradient_norm <= 1e-6
    settled = reason(tol=0.0, max_iter=10_000)
    assert settled.reason == "objective" and settled.gradient_norm < 1e-6
    assert settled.objective <= gradient.objective * (1 + 1e-15)
    limited = reason(tol=0.0, max_iter=3)
    assert (limited.reason, limited.iteration) == ("max_iter", 3)


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_fista_stops_where_the_penalty_balances_the_gradient(ratio):
    """Where a coefficient is 0, the L1 penalty is at least the slope of the loss."""
    given = problem()
    solver = solver_of("fista", C=0.2, l1_ratio=ratio, tol=1e-8)
    state, status = solving.solve(solver)
    assert status.reason == "gradient"
    coef, intercept = solver.fitted(state)
    scores = given.features @ coef.T + intercept
    wrong = given.weights[:, None] * (softmax(scores) - np.eye(4)[given.labels])
    strength = 1 / (0.2 * given.weights.sum())
    slope = wrong.T @ given.features / given.weights.sum()
    slope += (1 - ratio) * strength * coef
    zero, most = coef == 0, ratio * strength
    np.testing.assert_allclose(slope[~zero], -most * np.sign(coef[~zero]), atol=1e-7)
    assert (np.abs(slope[zero]) <= most + 1e-7).all() and 0 < zero.sum() < zero.size
    np.testing.assert_allclose(wrong.sum(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_not_finite_stops_with_the_last_good_parameters(name):
    rows = rows_of(problem())
    assert isinstance(rows.features, np.ndarray)
    rows.features[3, 1] = 1e305
    start = Coefficients(np.full((4, 5), 1e10), np.zeros(4))
    solver = solver_of(name, rows, start)
    state, status = solving.solve(solver)
    assert status.reason == "non_finite"
    assert np.isfinite(solver.fitted(state).kernel).all()
    with pytest.raises(NonFiniteLossError, match="iteration 1: the objective or its"):
        solving.check_finite(status)


def test_whitened_curvature_is_the_identity_at_zero_weights():
    """The Hessian of softmax regression there is (diag π - π πᵀ) ⊗ A."""
    given = problem(400, 6, 3)
    features = given.features @ np.diag([1, 10, 100, 1, 0.1, 1]) + 5
    weights, strength = given.weights, 0.01
    prior = np.array([0.2, 0.3, 0.5])
    found = whitening(features, weights, prior, strength, intercept=True)
    x = np.column_stack([features, np.ones(400)])
    moment = (x * (weights / weights.sum())[:, None]).T @ x
    spread = prior * (1 - prior)
    damped = moment + strength / spread.mean() * np.diag([1] * 6 + [0])
    whitened = found.factor @ damped @ found.factor.T
    np.testing.assert_allclose(whitened, np.eye(7), atol=1e-6)
    np.testing.assert_allclose(found.classes**2 * spread, 1)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_coordinates_go_back_and_forth(diagonal, intercept):
    given = problem(50, 6, 3)
    found = whitening(
        given.features + 3,
        given.weights,
        np.full(3, 1 / 3),
        0.1,
        intercept=intercept,
        diagonal=diagonal,
    )
    random = np.random.default_rng(0)
    bias = random.normal(size=3) if intercept else None
    parameters = Parameters(random.normal(size=(3, 6)), bias)
    v = found.coordinates(parameters)
    assert v.shape == (3, 6 + intercept)
    back = found.parameters(v, intercept=intercept)
    for leaf, expected in zip(
        jax.tree.leaves(back), jax.tree.leaves(parameters), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-9)


def test_whitening_saves_iterations():
    """Features that correlate and differ in scale cost L-BFGS nothing."""
    given = problem(300, 8, 3)
    random = np.random.default_rng(2)
    mixed = given.features @ random.normal(size=(8, 8)) * 10.0 ** np.arange(-3, 5)
    changes = {"tol": 0.0, "max_iter": 1000, "C": np.inf}
    plain, mixed = (
        solving.solve(
            solver_of("lbfgs", rows_of(given._replace(features=x)), **changes)
        )
        for x in (given.features, mixed)
    )
    np.testing.assert_allclose(plain[1].objective, mixed[1].objective, rtol=1e-9)
    assert mixed[1].iteration <= 2 * plain[1].iteration


def test_auto_chooses_by_size_and_penalty():
    given = rows_of(problem())
    auto = dataclasses.replace(OPTIONS, solver="auto")
    assert choose(auto, given) == "newton"
    assert choose(dataclasses.replace(auto, l1_ratio=0.5), given) == "fista"
    wide = dataclasses.replace(given, features=np.zeros((37, 400)))
    assert choose(auto, wide) == "lbfgs"
    assert choose(dataclasses.replace(OPTIONS, solver="fista"), given) == "fista"
