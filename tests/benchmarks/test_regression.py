"""The suites of `SoftmaxRegression`: do they run, and measure the right thing?"""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from benchmarks import __main__ as command
from benchmarks import many_classes, peers, regression, workloads
from benchmarks.session import Session

TABLE = workloads.REGRESSION[0].quick()


@pytest.fixture(scope="module")
def table():
    return TABLE.table("float64")


def test_quick_run_times_every_contender(tmp_path):
    path = tmp_path / "results.json"
    name = TABLE.name
    arguments = ["regression", "--quick", "--rounds", "1", "--workload", name]
    assert command.main([*arguments, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert {r["shape"]["dtype"] for r in results} == {"float32", "float64"}
    ours = [r for r in results if r["name"] == peers.OURS]
    assert len(ours) == 2 and len(results) == 6
    for result in results:
        assert result["status"] == "timed" and result["errors"]["objective"] <= 1e-6
        assert result["ratio"] > 0 and result["shape"]["seed"] == TABLE.seed


def test_objective_is_scikit_learns(table):
    features, labels = table
    model = LogisticRegression(tol=1e-10, max_iter=10_000).fit(features, labels)
    value, norm = regression._objective_and_gradient(
        features, labels, model.coef_, model.intercept_
    )
    log_p = model.predict_log_proba(features)[np.arange(len(labels)), labels]
    penalty = 0.5 * (model.coef_**2).sum() / len(labels)
    np.testing.assert_allclose(value, penalty - log_p.mean(), rtol=1e-12)
    assert norm < 1e-6
    moved = regression._objective_and_gradient(
        features, labels, model.coef_ + 0.1, model.intercept_ - 0.1
    )
    assert moved[0] > value and moved[1] > 1e-3


def test_peers_stop_where_they_are_near_enough(table):
    best = regression._optimum(Session(quick=True), *table)
    reached = regression._lbfgs(best, *table)
    value = regression._objective_and_gradient(*table, *reached)[0]
    # Not further: its last iterate is the first that counts. At its own end it is
    # 1e-12 from the optimum.
    assert 1e-8 < value / best - 1 <= 1e-6
    asked = []

    def fit(features, labels, tol):
        asked.append(tol)
        return regression._newton_cg(features, labels, tol)

    loosest = regression._Loosest(fit, best)
    for _ in range(2):
        value = regression._objective_and_gradient(*table, *loosest(*table))[0]
        assert value <= best * (1 + 1e-6)
    assert asked[-1] == asked[-2] and len(set(asked)) == len(asked) - 1


def test_tables_of_many_classes_have_every_class_and_an_answer():
    workload = dataclasses.replace(workloads.MANY_CLASSES[0].quick(), features=64)
    features, labels, held, held_labels = workload.table()
    counts = np.bincount(labels)
    assert len(counts) == workload.classes and counts.min() >= 1 and len(held) == 64
    assert features.shape == (workload.rows, workload.features)
    centres = np.stack([features[labels == k].mean(0) for k in range(len(counts))])
    nearest = ((held[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == held_labels).mean() > 0.9


def test_heads_are_fitted_in_processes_of_their_own():
    workload = workloads.MANY_CLASSES[0].quick()
    session = Session(quick=True)
    many_classes.run_head(session, workload, "adaptive", 2)
    (result,) = session.results
    assert result.status == "timed" and result.figures["epochs"] == 2
    assert 2**27 < result.figures["peak bytes"] < 2**31
    assert 0 < result.figures["test log-loss"] < np.log(workload.classes) + 1
    session = Session(quick=True)
    many_classes.run_head(session, workload, "no such head", 1)
    assert session.results[0].status == "failed" and session.failed
    assert "`head` must be" in session.results[0].reason
