"""The hierarchical and adaptive heads under minibatch training, and predictions."""

import math
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsoft import ClassTree
from jaxsoft.nn import HierarchicalSoftmaxHead
from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression import head_predictions
from jaxsoft.training.regression.estimator import SoftmaxRegression
from jaxsoft.training.regression.minibatch import minibatch_solver
from jaxsoft.training.regression.solving import solve
from jaxsoft.training.regression.sources import BatchOrder, as_source

N, D, V, B, C = 60, 5, 5, 16, 2.0
STEPS = math.ceil(N / B)


def problem():
    """Rows near their class's centre, of uneven classes and weights, some 0."""
    random = np.random.default_rng(0)
    labels = random.integers(0, V, N) * random.integers(0, 2, N)
    centres = random.normal(size=(V, D))
    features = centres[labels] + random.normal(size=(N, D))
    return features.astype(np.float32), labels, random.integers(0, 4, N) / 2


ROWS, LABELS, WEIGHTS = problem()


def make(features: Any = ROWS, weights: Any = WEIGHTS, **options: Any):
    options = {
        "num_classes": V,
        "head": "hierarchical",
        "C": C,
        "batch_size": B,
        "max_iter": 4,
    } | options
    solver = minibatch_solver(as_source(features), LABELS, weights, **options)
    solver.segment_steps = 5
    return solver


def same_leaves(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def head_losses(head, features=ROWS, labels=LABELS):
    found = np.asarray(head(jnp.asarray(features)), float)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    return -found[np.arange(len(labels)), labels]


@pytest.mark.parametrize("head", ["hierarchical", "adaptive"])
def test_a_head_is_charged_what_the_formula_says(head):
    """At rate 0 nothing moves, and an epoch's mean is the objective."""
    module = make(head=head).head(make(head=head).init())
    random = np.random.default_rng(5)
    noisy = jax.tree.map(
        lambda leaf: leaf + random.normal(size=leaf.shape).astype(np.float32),
        nnx.state(module, nnx.Param),
    )
    nnx.update(module, noisy)
    # Each row's weight is 1: a visit is what the penalty is spread over.
    solver = make(weights=None, head=head, start=module, learning_rate=0.0)
    state, status = solve(solver)
    squares = sum((x**2).sum() for x in jax.tree.leaves(noisy) if x.ndim > 1)
    truth = head_losses(module).mean() + float(squares) / (2 * C * N)
    np.testing.assert_allclose(status.objective, truth, rtol=1e-5)
    if head == "hierarchical":
        np.testing.assert_allclose(solver.objective(state), truth, rtol=1e-5)


def test_row_updates_reach_the_optimum_of_dense_ones():
    options = {"max_iter": 150, "learning_rate": 0.1, "C": 0.2, "fit_intercept": False}
    rows, dense = make(**options), make(optimizer=optax.adam, **options)
    states = [solve(solver)[0] for solver in (rows, dense)]
    for state in states:
        assert not np.asarray(state.params["node_bias"][...]).any()
    ends = [rows.objective(state) for state in states]
    start = rows.objective(rows.init())
    assert ends[1] < 0.95 * start
    np.testing.assert_allclose(ends[0], ends[1], rtol=3e-3)


def test_a_value_that_is_not_finite_ends_the_run():
    rows = BatchOrder(N, B, seed=0).rows(2)
    row = next(row for row in rows if WEIGHTS[row] > 0)
    bad = ROWS.copy()
    bad[row] = np.nan
    options = {"learning_rate": 0.1}
    solver = make(bad, **options)
    state, status = solve(solver)
    assert (status.reason, status.iteration) == ("non_finite", 2)
    assert status.place == f"batch 3 (rows {row})"
    # The other batches of the segment are left out.
    clean = make(**options)
    clean.segment_steps = 2
    short = clean.advance(clean.init())
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(short.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_resuming_changes_no_bit(tmp_path):
    expected, status = solve(make())
    stop = StopRequest()
    stop.received = signal.SIGINT
    with pytest.raises(TrainingInterrupted):
        solve(make(), checkpoints=tmp_path, stop=stop)
    found, again = solve(make(), checkpoints=tmp_path)
    assert again == status
    same_leaves(found, expected)


def test_a_mesh_gives_the_losses_of_one_device():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    one, status = solve(make())
    other, again = solve(make(mesh=mesh))
    np.testing.assert_allclose(again.objective, status.objective, rtol=1e-5)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


def test_predictions_are_those_of_all_probabilities(monkeypatch):
    monkeypatch.setattr(head_predictions, "_BLOCK_BYTES", 4 * V * 7)
    monkeypatch.setattr(head_predictions, "_SEARCHED", 7)
    solver = make()
    head = solver.head(solve(solver)[0])
    truth = np.asarray(head(jnp.asarray(ROWS)))
    source = as_source(ROWS)
    found = head_predictions.log_probs(head, source)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        head_predictions.top_classes(head, source), truth.argmax(axis=1)
    )
    assert head_predictions.log_probs(head, as_source(ROWS[:0])).shape == (0, V)


def test_log_probabilities_of_a_float64_head_are_float64():
    with jax.enable_x64(True):
        head = HierarchicalSoftmaxHead(
            D, ClassTree.balanced(V), param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    estimator = SoftmaxRegression(head="hierarchical", dtype="float64")
    estimator.head_, estimator.n_features_in_ = head, D
    found = estimator.decision_function(as_source(ROWS))
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-13)
