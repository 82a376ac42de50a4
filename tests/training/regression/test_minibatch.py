"""Minibatch training against NumPy, scikit-learn and itself after an interruption."""

import math
import re
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse as sp
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from jaxsoft.training import MeshError
from jaxsoft.training.errors import NonFiniteLossError, TrainingInterrupted
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression.coefficients import Coefficients
from jaxsoft.training.regression.minibatch import minibatch_solver
from jaxsoft.training.regression.solving import check_finite, solve
from jaxsoft.training.regression.sources import BatchOrder, as_source

N, D, V, B, C = 60, 5, 6, 16, 2.0
STEPS = math.ceil(N / B)


def problem():
    """Rows near their class's centre, of uneven classes and weights, some 0."""
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, V, N) * random.integers(0, 2, N))
    centres = random.normal(size=(V, D))
    features = centres[labels] + random.normal(size=(N, D))
    weights = random.integers(0, 4, N) / 2
    return features, labels, weights


FEATURES, LABELS, WEIGHTS = problem()
ROWS32 = FEATURES.astype(np.float32)


def make(
    features: Any = ROWS32,
    labels: Any = LABELS,
    weights: Any = WEIGHTS,
    *,
    segment: Any = 5,
    **options: Any,
):
    """A small solver; a segment ends in the middle of an epoch."""
    options = {"num_classes": V, "C": C, "batch_size": B, "max_iter": 4} | options
    solver = minibatch_solver(as_source(features), labels, weights, **options)
    solver.segment_steps = segment
    return solver


def losses_of(kernel, bias, features, labels, *, smoothing=0.0):
    found = log_softmax(features @ kernel.T + bias, axis=1)
    own = found[np.arange(len(labels)), labels]
    return -(1 - smoothing) * own - smoothing * found.mean(axis=1)


def objective_of(kernel, bias, weights=WEIGHTS):
    losses = losses_of(kernel, bias, FEATURES, LABELS)
    total = weights.sum()
    return weights @ losses / total + (kernel**2).sum() / (2 * C * total)


def sgd_by_hand(slopes, rate, steps, *, intercept=True, reference=None):
    """Plain gradient descent on batches of the objective; values come before steps."""
    kernel, bias, values = np.zeros((V, D)), np.zeros(V), []
    order, total = BatchOrder(N, B, seed=3), WEIGHTS.sum()
    for step in range(steps):
        rows = order.rows(step)
        rows = rows[rows >= 0]
        losses, dlogits = slopes(FEATURES[rows] @ kernel.T + bias, rows)
        share = WEIGHTS[rows] * STEPS / total
        penalty = (kernel**2).sum() / (2 * C * total)
        values.append(share @ losses + penalty)
        dlogits = share[:, None] * dlogits
        if reference is not None:
            dlogits[:, reference] = 0
        kernel = kernel - rate * (dlogits.T @ FEATURES[rows] + kernel / (C * total))
        bias = bias - rate * intercept * dlogits.sum(axis=0)
    return kernel, bias, np.array(values)


ZEROS = (np.zeros((V, D)), np.zeros(V))


def test_steps_are_those_of_the_formula(x64):
    def slopes(logits, rows):
        truth = 0.9 * np.eye(V)[LABELS[rows]] + 0.1 / V
        return -(truth * log_softmax(logits, axis=1)).sum(axis=1), (
            softmax(logits, axis=1) - truth
        )

    solver = make(
        FEATURES,
        optimizer=optax.sgd(0.3),
        label_smoothing=0.1,
        reference=2,
        seed=3,
        max_iter=2,
        start=ZEROS,
        dtype=np.float64,
    )
    state, status = solve(solver)
    kernel, bias, values = sgd_by_hand(slopes, 0.3, 2 * STEPS, reference=2)
    found = solver.parameters(state)
    assert found[0].dtype == np.float64
    np.testing.assert_allclose(found[0], kernel, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found[1], bias, rtol=1e-12, atol=1e-14)
    assert not found[0][2].any() and not found[1][2]
    assert (status.iteration, status.reason) == (2 * STEPS, "max_iter")
    np.testing.assert_allclose(status.objective, values[STEPS:].mean(), rtol=1e-12)
    exact = WEIGHTS @ slopes(FEATURES @ kernel.T + bias, np.arange(N))[0]
    exact = exact / WEIGHTS.sum() + (kernel**2).sum() / (2 * C * WEIGHTS.sum())
    np.testing.assert_allclose(solver.objective(state), exact, rtol=1e-12)


def test_targets_are_learnt_at_their_temperature(x64):
    targets = softmax(np.random.default_rng(1).normal(size=(N, V)), axis=1)
    temperature, share = 3.0, 0.7

    def slopes(logits, rows):
        soft, hard = targets[rows], np.eye(V)[LABELS[rows]]
        at, plain = logits / temperature, logits
        losses = -share * temperature**2 * (soft * log_softmax(at, axis=1)).sum(axis=1)
        losses -= (1 - share) * (hard * log_softmax(plain, axis=1)).sum(axis=1)
        dlogits = share * temperature * (softmax(at, axis=1) - soft)
        return losses, dlogits + (1 - share) * (softmax(plain, axis=1) - hard)

    solver = make(
        FEATURES,
        targets=targets,
        temperature=temperature,
        target_weight=share,
        fit_intercept=False,
        optimizer=optax.sgd,
        learning_rate=lambda step: 0.2,
        seed=3,
        max_iter=2,
        dtype=np.float64,
    )
    state, status = solve(solver)
    kernel, bias, values = sgd_by_hand(slopes, 0.2, 2 * STEPS, intercept=False)
    found = solver.parameters(state)
    np.testing.assert_allclose(found[0], kernel, rtol=1e-12, atol=1e-14)
    assert not found[1].any() and not bias.any()
    np.testing.assert_allclose(status.objective, values[STEPS:].mean(), rtol=1e-12)


def test_the_optimum_is_scikit_learns():
    solver = make(max_iter=200, tol=0.0)
    state, status = solve(solver)
    peer = LogisticRegression(C=C, tol=1e-10, max_iter=9999)
    peer.fit(FEATURES, LABELS, WEIGHTS)
    best = objective_of(peer.coef_, peer.intercept_)
    kernel, bias = (leaf.astype(float) for leaf in solver.parameters(state))
    assert best - 1e-6 < objective_of(kernel, bias) < 1.0001 * best
    np.testing.assert_allclose(
        solver.objective(state), objective_of(kernel, bias), 1e-5
    )
    assert math.isnan(status.gradient_norm)


def test_it_starts_at_the_classes_frequencies():
    solver = make()
    kernel, bias = solver.parameters(solver.init())
    counts = np.bincount(LABELS, WEIGHTS, V) + 0.5
    np.testing.assert_allclose(softmax(bias), counts / counts.sum(), rtol=1e-5)
    assert not kernel.any()
    assert math.isnan(solver.status(solver.init()).objective)
    given = make(start=Coefficients(np.ones((V, D)), np.arange(V)))
    kernel, bias = given.parameters(given.init())
    assert (kernel == 1).all() and (bias == np.arange(V)).all()


def test_rate_goes_down_after_a_plateau_and_then_the_run_ends():
    state, status = solve(make(max_iter=1000, tol=10.0))
    # The first epoch improves on nothing; then five do not improve by as much.
    assert int(state.plateau) == 6 * STEPS
    assert (status.reason, status.iteration) == ("objective", (6 + 20) * STEPS)
    state, status = solve(make(max_iter=12, tol=10.0))
    assert (status.reason, status.iteration) == ("max_iter", 12 * STEPS)


def test_a_plateau_ends_the_run_where_the_rate_is_the_callers():
    state, status = solve(make(optimizer=optax.sgd(0.0), max_iter=100))
    assert (status.reason, status.iteration) == ("objective", 6 * STEPS)


def test_rate_goes_up_and_down():
    solver = make(max_iter=30, learning_rate=0.3)
    rate = solver._numbers.rate
    steps = np.arange(30 * STEPS + 1)
    found = np.array([rate.at(jnp.int32(step)) for step in steps])
    peak = found.argmax()
    assert peak == 11 and math.isclose(found[peak], 0.3, rel_tol=1e-6)
    np.testing.assert_allclose(found[: peak + 1], 0.3 * np.arange(1, 13) / 12, 1e-6)
    assert math.isclose(found[12 + 54], 0.15, rel_tol=1e-5)
    assert found[-1] < 1e-6 and (np.diff(found[peak + 1 :]) <= 0).all()


@pytest.mark.parametrize("kind", ["csr", "memmap", "float64"])
def test_every_source_gives_the_same_bits(kind, tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, ROWS32)
    features = {
        "csr": sp.csr_matrix(ROWS32),
        "memmap": np.load(path, mmap_mode="r"),
        "float64": ROWS32.astype(float),
    }[kind]
    expected, _ = solve(make())
    found, _ = solve(make(features))
    for one, other in zip(
        jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_array_equal(one, other)


class StopsAfter(StopRequest):
    """Receives a signal after some segments."""

    def __init__(self, segments):
        super().__init__()
        self._left = segments

    @property
    def received(self):
        self._left -= 1
        return signal.SIGINT if self._left < 0 else None

    @received.setter
    def received(self, value):
        pass

    def check(self, step=None):
        raise TrainingInterrupted(signal.SIGINT, step)


def test_resuming_changes_no_bit(tmp_path):
    expected, status = solve(make())
    for segments in (1, 2, 3):
        folder = tmp_path / str(segments)
        with pytest.raises(TrainingInterrupted) as caught:
            solve(make(), checkpoints=folder, stop=StopsAfter(segments - 1))
        assert caught.value.step == 5 * segments
        found, again = solve(make(), checkpoints=folder)
        assert again == status
        for one, other in zip(
            jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_bits_do_not_depend_on_segments():
    expected, _ = solve(make())
    found, _ = solve(make(segment=3))
    for one, other in zip(
        jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_value_that_is_not_finite_ends_the_run():
    rows = BatchOrder(N, B, seed=0).rows(2)
    row = next(row for row in rows if WEIGHTS[row] > 0)
    bad = ROWS32.copy()
    bad[row] = np.nan
    options = {"learning_rate": 0.1}
    solver = make(bad, **options)
    state, status = solve(solver)
    assert (status.reason, status.iteration) == ("non_finite", 2)
    assert status.place == f"batch 3 (rows {row})"
    with pytest.raises(NonFiniteLossError, match=rf"iteration 3, batch 3 \(rows {row}"):
        check_finite(status)
    # The other batches of the segment are left out.
    clean = make(**options)
    clean.segment_steps = 2
    short = clean.advance(clean.init())
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(short.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_rows_of_a_bad_step_are_named_where_features_are_finite():
    state, status = solve(make(learning_rate=3e38))
    assert status.reason == "non_finite"
    numbers = re.fullmatch(r"batch (\d+) \(rows (.*), \.\.\.\)", status.place)
    assert numbers and int(numbers[1]) == status.iteration + 1
    rows = BatchOrder(N, B, seed=0).rows(status.iteration)
    assert numbers[2] == ", ".join(map(str, rows[:5]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_row_of_weight_0_may_hold_anything():
    wild = ROWS32.copy()
    wild[WEIGHTS == 0] = np.nan
    options = {"learning_rate": 0.1}
    for one, other in zip(
        make(**options).parameters(solve(make(**options))[0]),
        make(**options).parameters(solve(make(wild, **options))[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_one_pass_after_another():
    whole = make(max_iter=None, learning_rate=0.1, seed=1)
    state = whole.one_pass()
    assert int(state.step) == STEPS and int(state.place) == 0
    assert not whole.status(whole.init()).reason
    first = float(state.last)
    other = make(ROWS32[:20], LABELS[:20], None, max_iter=None, learning_rate=0.1)
    for _ in range(40):
        moments = float(optax.tree.norm(state.optimizer[0].nu))
        state = other.one_pass(state)
        assert moments > 0
    assert int(state.step) == STEPS + 40 * 2
    assert other.status(state).reason == "max_iter"
    assert float(state.last) < first / 2
    # The rate stays.
    assert float(other._numbers.rate.at(jnp.int32(10**6))) == np.float32(0.1)


def test_a_mesh_gives_the_losses_of_one_device():
    """From a start where no gradient is so near 0 that Adam takes rounding's sign."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    alone, shared = make(start=ZEROS), make(start=ZEROS, mesh=mesh)
    one, status = solve(alone)
    other, again = solve(shared)
    np.testing.assert_allclose(again.objective, status.objective, rtol=1e-5)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    assert len(other.step.sharding.device_set) == 4


def test_a_mesh_must_divide_the_batch():
    mesh = jax.make_mesh((8,), ("data",))
    with pytest.raises(MeshError, match="`batch_size` must be a multiple of the 8"):
        make(mesh=mesh, batch_size=12)
    assert make(mesh=mesh, batch_size=None).batch_size == 64


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"head": "sampled"}, ValueError, "`head` must be one of 'full', "),
        ({"labels": None}, ValueError, "`labels` must be given where there are no"),
        (
            {"head": "adaptive", "targets": np.ones((N, V))},
            ValueError,
            "`targets` must be None with `head` 'adaptive', which does not compute all",
        ),
        (
            {"head": "hierarchical", "label_smoothing": 0.1},
            ValueError,
            "`label_smoothing` must be 0 with `head` 'hierarchical'",
        ),
        (
            {"head": "hierarchical", "reference": 1},
            ValueError,
            "`reference` must be None with `head` 'hierarchical'",
        ),
        ({"weights": np.zeros(N)}, ValueError, "`weights` must have a positive sum"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0."),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be an int, got 2.0."),
        (
            {"optimizer": optax.adam(0.1), "learning_rate": 0.1},
            ValueError,
            "`learning_rate` must be None with a transformation",
        ),
        ({"optimizer": "adam"}, TypeError, "`optimizer` must be an Optax transform"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` must be finite, >= 0"),
    ],
)
def test_options_are_checked(options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make(**options)


def test_default_rate_follows_the_scale_of_the_features():
    rate = make()._numbers.rate.peak
    assert math.isclose(
        rate, min(2 / np.abs(ROWS32).sum(axis=1).mean(), 0.3), rel_tol=0.01
    )
    assert math.isclose(
        make(100 * ROWS32)._numbers.rate.peak,
        0.02 / np.abs(ROWS32).sum(axis=1).mean(),
        rel_tol=0.01,
    )
    assert make(0 * ROWS32)._numbers.rate.peak == np.float32(0.3)
