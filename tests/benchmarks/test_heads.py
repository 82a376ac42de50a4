"""The suite of heads finds what is wrong, and its truth agrees with differences."""

import functools

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
    pairs = head in heads_cases.CONTRASTIVE
    heads.run_workload(session, heads.as_pairs(QUICK) if pairs else QUICK, (head,))
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
    "distillation without τ²": (
        "linear_distillation",
        lambda found: found / 4,
        BY_TITLE["distillation at T = 2: value and gradient"],
        "loss is off",
    ),
    "top-k distillation": (
        "linear_distillation_top_k",
        lambda found: found.at[0].multiply(1.001),
        BY_TITLE["distillation_top_k, k = 50: value and gradient"],
        "loss is off",
    ),
    "value of CLIP": (
        "clip_loss",
        lambda found: found + jax.lax.stop_gradient(0.001 * found),
        heads_cases.CONTRASTIVE[0],
        "loss is off",
    ),
    "gradient of NT-Xent": (
        "nt_xent",
        lambda found: found + 0.01 * (found - jax.lax.stop_gradient(found)),
        heads_cases.CONTRASTIVE[1],
        "dimage is off",
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

    def wrong(hidden, kernel, *rest, **options):
        moved = hidden + (kernel[:, 0] - jax.lax.stop_gradient(kernel[:, 0]))[None]
        return right(moved, kernel, *rest, **options)

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
            "teacher_hidden": random.normal(size=(5, 2)),
            "teacher_kernel": random.normal(size=(2, 7)),
            "teacher_ids": np.array([[0, 6], [3, 1], [2, 4], [5, 6], [1, 0]]),
            "teacher_log_probs": np.log(random.dirichlet(np.ones(3), 5)[:, :2]),
            "image": random.normal(size=(5, 3)),
            "text": random.normal(size=(5, 3)),
        }

    def compute(self, block, inputs, cotangents, rows=5):
        per_token = ("hidden", "labels", "class_ids")
        per_token += ("teacher_hidden", "teacher_ids", "teacher_log_probs")
        subset = checks.Subset.of(rows, 7)
        return heads_truth.by_rows(block, inputs, per_token, subset, cotangents)

    def differences(self, total, array):
        """Central differences of a function of an array that is changed in place."""
        found = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            kept, sides = array[place], []
            for step in (1e-5, -1e-5):
                array[place] = kept + step
                sides.append(total())
            array[place] = kept
            found[place] = (sides[0] - sides[1]) / 2e-5
        return found

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
        teacher = np.exp(inputs["teacher_hidden"] @ inputs["teacher_kernel"])
        q = teacher / teacher.sum(axis=1, keepdims=True)
        found = self.compute(heads_truth.distillation(1.0), inputs, {})
        np.testing.assert_allclose(found["loss"], (q * np.log(q / p)).sum(axis=1))

    def test_values_of_listed_classes_and_of_pairs(self):
        inputs = self.problem() | {"kernel": np.zeros((3, 7))}
        inputs["teacher_log_probs"] = np.full((5, 2), np.log(1 / 7))
        found = self.compute(heads_truth.distillation_top_k, inputs, {})
        np.testing.assert_allclose(found["loss"], 0, atol=1e-12)
        pairs = {"image": 3 * np.eye(4), "text": np.eye(4)}
        subset, upstream = checks.Subset.of(4, 4), {"loss": 1.0}
        found = heads_truth.clip_loss(0.5)(pairs, upstream, subset)
        np.testing.assert_allclose(found["loss"], np.log(1 + 3 * np.exp(-2)))
        found = heads_truth.nt_xent(0.5)(pairs, upstream, subset)
        np.testing.assert_allclose(found["loss"], np.log(1 + 6 * np.exp(-2)))

    @pytest.mark.parametrize("name", ["clip_loss", "nt_xent"])
    def test_gradients_of_pairs_are_central_differences(self, name):
        inputs, subset = self.problem(), checks.Subset.of(5, 5)
        truth = functools.partial(
            getattr(heads_truth, name)(0.3), inputs, {"loss": 1.7}, subset
        )
        found = truth()
        for key in ("image", "text"):
            differences = self.differences(lambda: 1.7 * truth()["loss"], inputs[key])
            np.testing.assert_allclose(found["d" + key], differences, atol=1e-8)

    @pytest.mark.parametrize("block_bytes", [1, 2 * 8 * 7, 2**28])
    @pytest.mark.parametrize(
        "name",
        ["log_prob", "log_prob_at", "expected", "distillation", "distillation_top_k"],
    )
    def test_gradients_are_central_differences(self, monkeypatch, name, block_bytes):
        monkeypatch.setattr(heads_truth, "_BLOCK_BYTES", block_bytes)
        block, inputs = getattr(heads_truth, name), self.problem()
        if name == "distillation":
            block = block(1.7)
        random = np.random.default_rng(1)
        value = self.compute(block, inputs, {})
        cotangents = {k: random.normal(size=v.shape) for k, v in value.items()}
        found = self.compute(block, inputs, cotangents)

        def total():
            outputs = self.compute(block, inputs, {})
            return sum(np.sum(outputs[k] * g) for k, g in cotangents.items())

        moving = ["hidden", "kernel"] + ["values"] * (name == "expected")
        for key in moving:
            differences = self.differences(total, inputs[key])
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
