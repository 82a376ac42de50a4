"""The suite of heads finds what is wrong, and its truth agrees with differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from benchmarks import checks, heads, heads_cases, heads_truth, report, workloads
from benchmarks.session import Session

QUICK = workloads.HEADS[0].quick()
BY_TITLE = {head.title: head for head in heads.HEADS}
SAMPLE, TOP_K = BY_TITLE["sample"], BY_TITLE["top_k, k = 50"]
LOG_PROB_AT = BY_TITLE["log_prob_at, 16 classes: value"]


def run_head(head):
    session = Session(quick=True, rounds=1)
    heads.run_workload(session, QUICK, (head,))
    return session, {result.name: result for result in session.results}


def shift(ids):
    return (ids + 1) % QUICK.classes


# Function of jaxsoft, what spoils what it returns, the head that must notice, and how.
WRONG = {
    "log_prob": (
        "linear_log_prob",
        lambda found: (found[0] * 1.001, found[1]),
        heads_cases.LOG_PROB,
        "log_prob is off",
    ),
    "entropy": (
        "linear_log_prob",
        lambda found: (found[0], found[1] * 0),
        heads_cases.LOG_PROB,
        "entropy is off",
    ),
    "one candidate": (
        "linear_log_prob_at",
        lambda found: found.at[-1, -1].add(0.01),
        LOG_PROB_AT,
        "log_prob is off",
    ),
    "samples beside": ("linear_sample", shift, SAMPLE, "surprise is off"),
    "samples of few": ("linear_sample", lambda ids: ids // 4, SAMPLE, "place is off"),
    "argmax": ("linear_sample", lambda ids: ids * 0, SAMPLE, "place is off"),
    "no class": ("linear_sample", lambda ids: ids.at[-1].set(-1), SAMPLE, "is off"),
    "top-k ids": (
        "linear_top_k",
        lambda found: (found[0], shift(found[1])),
        TOP_K,
        "at_ids is off",
    ),
    "one class twice": (
        "linear_top_k",
        lambda found: (found[0], found[1].at[:, 1].set(found[1][:, 0])),
        TOP_K,
        "distinct is off",
    ),
    "unnormalised": (
        "linear_top_k",
        lambda found: (found[0] - found[0][:, :1], found[1]),
        TOP_K,
        "log_prob is off",
    ),
    "expected": (
        "linear_expected",
        lambda found: found.at[:, 0].multiply(1.1),
        heads_cases.EXPECTED,
        "expected is off",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_result_is_found_and_not_timed(monkeypatch, case):
    function, spoil, head, reason = WRONG[case]
    right = getattr(jaxsoft, function)
    monkeypatch.setattr(jaxsoft, function, lambda *a, **k: spoil(right(*a, **k)))
    session, results = run_head(head)
    assert session.failed
    assert results["jaxsoft"].status == "wrong"
    assert reason in results["jaxsoft"].reason
    assert results["jaxsoft"].timing is None
    assert results[head.plain_name].status == "timed"


@pytest.mark.parametrize(
    ("function", "head"),
    [("linear_log_prob", heads.TRAINING[1]), ("linear_expected", heads.TRAINING[3])],
)
def test_wrong_gradient_under_a_right_value(monkeypatch, function, head):
    right = getattr(jaxsoft, function)

    def wrong(hidden, kernel, *rest):
        moved = hidden + (kernel[:, 0] - jax.lax.stop_gradient(kernel[:, 0]))[None]
        return right(moved, kernel, *rest)

    monkeypatch.setattr(jaxsoft, function, wrong)
    _, results = run_head(head)
    assert results["jaxsoft"].status == "wrong"
    assert "dkernel is off" in results["jaxsoft"].reason


def test_sampler_is_held_against_the_matmul_alone():
    session, results = run_head(SAMPLE)
    assert not session.failed
    ours = results["jaxsoft"]
    assert ours.baseline == "jax.random" and ours.part == "matmul"
    assert ours.part_ratio is not None and ours.part_ratio > 0
    assert results["matmul"].part_ratio == 1
    (table,) = report.tables(session.finish())
    ratio = table.rows[0][report.COLUMNS.index("ratio")]
    assert ratio.endswith(f"({ours.part_ratio:.2f} of matmul)")


def test_another_head_is_a_few_lines():
    def truth(inputs, cotangents, subset):
        hidden = np.asarray(inputs["hidden"], np.float64)
        gradient = 2 * hidden[subset.rows] * float(cotangents["norm"])
        return {"norm": np.sum(hidden**2), "dhidden": gradient}

    head = heads_cases.Head(
        "norm: value",
        lambda x: {"norm": jnp.sum(x["hidden"] ** 2)},
        lambda x: {"norm": jnp.vdot(x["hidden"], x["hidden"])},
        truth,
    )
    session, results = run_head(head.with_gradient("hidden", passes={}))
    assert not session.failed
    assert results["jaxsoft"].errors.keys() == {"norm", "dhidden"}


def test_fewer_tokens_are_checked_where_the_truth_costs_too_much(monkeypatch):
    monkeypatch.setattr(heads, "_TRUTH_FLOPS", QUICK.matmul_flops // 2)
    session, results = run_head(heads.TRAINING[3])
    assert not session.failed and results["jaxsoft"].status == "timed"


class TestTruth:
    """Outputs by definition, gradients by central differences."""

    def problem(self):
        random = np.random.default_rng(0)
        return {
            "hidden": random.normal(size=(5, 3)),
            "kernel": random.normal(size=(3, 7)),
            "labels": np.array([0, 6, 2, 2, 1]),
            "class_ids": random.integers(0, 7, size=(5, 4)),
            "values": random.normal(size=(7, 3)),
        }

    def compute(self, block, inputs, cotangents, rows=5):
        per_token = ("hidden", "labels", "class_ids")
        subset = checks.Subset.of(rows, 7)
        return heads_truth.by_rows(block, inputs, per_token, subset, cotangents)

    def test_values(self):
        inputs = self.problem()
        weights = np.exp(inputs["hidden"] @ inputs["kernel"])
        p = weights / weights.sum(axis=1, keepdims=True)
        found = self.compute(heads_truth.log_prob, inputs, {})
        rows = np.arange(5)
        np.testing.assert_allclose(found["log_prob"], np.log(p[rows, inputs["labels"]]))
        np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(axis=1))
        found = self.compute(heads_truth.expected, inputs, {})
        np.testing.assert_allclose(found["expected"], p @ inputs["values"])
        found = self.compute(heads_truth.top_k(2), inputs, {})
        np.testing.assert_allclose(found["log_prob"], np.sort(np.log(p))[:, :4:-1])

    @pytest.mark.parametrize("block_bytes", [1, 2 * 8 * 7, 2**28])
    @pytest.mark.parametrize("name", ["log_prob", "log_prob_at", "expected"])
    def test_gradients_are_central_differences(self, monkeypatch, name, block_bytes):
        monkeypatch.setattr(heads_truth, "_BLOCK_BYTES", block_bytes)
        block, inputs = getattr(heads_truth, name), self.problem()
        random = np.random.default_rng(1)
        value = self.compute(block, inputs, {})
        cotangents = {k: random.normal(size=v.shape) for k, v in value.items()}
        found = self.compute(block, inputs, cotangents)

        def total():
            outputs = self.compute(block, inputs, {})
            return sum(np.sum(outputs[k] * g) for k, g in cotangents.items())

        moving = ["hidden", "kernel"] + ["values"] * (name == "expected")
        for key in moving:
            array, differences = inputs[key], np.zeros(inputs[key].shape)
            for place in np.ndindex(array.shape):
                kept, sides = array[place], []
                for step in (1e-5, -1e-5):
                    array[place] = kept + step
                    sides.append(total())
                array[place] = kept
                differences[place] = (sides[0] - sides[1]) / 2e-5
            np.testing.assert_allclose(found["d" + key], differences, atol=1e-8)

    def test_right_samples_have_the_figures_that_they_must(self):
        random = np.random.default_rng(0)
        logits = random.normal(size=(4000, 50))
        every = heads_truth.log_probs(logits.copy())
        ids = np.argmax(logits + random.gumbel(size=logits.shape), axis=1)
        found = heads_truth.sample_statistics(every, ids)
        grid = heads_truth.uniform_grid(4000)
        limit = 3 * 4000**-0.5
        assert checks.judge(found, grid, absolute=limit).correct
        warm = np.argmax(logits / 2 + random.gumbel(size=logits.shape), axis=1)
        found = heads_truth.sample_statistics(every, warm)
        assert not checks.judge(found, grid, absolute=3 * limit).correct
