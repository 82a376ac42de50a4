"""The suite of heads finds what is wrong, and its truth agrees with differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from benchmarks import (
    checks,
    heads,
    heads_cases,
    heads_options,
    heads_truth,
    report,
    workloads,
)
from benchmarks.session import Session

QUICK = workloads.HEADS[0].quick()
BY_TITLE = {head.title: head for head in heads.HEADS}
SAMPLE, TOP_K = BY_TITLE["sample"], BY_TITLE["top_k, k = 50"]
LOG_PROB_AT = BY_TITLE["log_prob_at, 16 classes: value"]


def run_head(head):
    session = Session(quick=True, rounds=1)
    pairs = head in heads.CONTRASTIVE
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
    "rank": (
        "linear_statistics",
        lambda found: dataclasses.replace(found, rank=found.rank + 100),
        BY_TITLE["rank of the label and the best 50"],
        "better is off",
    ),
    "samples beside the best": (
        "linear_sample",
        shift,
        BY_TITLE["sample, top_k = 50"],
        "is off",
    ),
    "only the best": (
        "linear_sample",
        lambda ids: jnp.where(ids % 2 == 0, ids, ids - 1),
        BY_TITLE["sample, top_p = 0.9"],
        "is off",
    ),
    "among kept classes": (
        "linear_log_prob_at",
        lambda found: (found[0], 1.01 * found[1]),
        BY_TITLE["log_prob_at, among 8 classes: value and gradient"],
        "entropy is off",
    ),
    **{
        title: (
            "linear_cross_entropy",
            lambda found: 1.001 * found,
            BY_TITLE[title + ": value and gradient"],
            "loss is off",
        )
        for title in (
            "cross-entropy, a kernel of int8",
            "cross-entropy, an adapter of rank 16",
            "cross-entropy, a mask of each token",
        )
    },
    "in-batch": (
        "in_batch_cross_entropy",
        lambda found: 1.001 * found,
        heads_options.IN_BATCH,
        "loss is off",
    ),
    "value of CLIP": (
        "clip_loss",
        lambda found: found + jax.lax.stop_gradient(0.001 * found),
        heads.CONTRASTIVE[0],
        "loss is off",
    ),
    "gradient of NT-Xent": (
        "nt_xent",
        lambda found: found + 0.01 * (found - jax.lax.stop_gradient(found)),
        heads.CONTRASTIVE[1],
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
            "bits": np.array([[0b1100001], [0b1111111], [0b0100], [0b0110], [0b1010]]),
            "log_q": random.normal(size=5),
            "teacher_hidden": random.normal(size=(5, 2)),
            "teacher_kernel": random.normal(size=(2, 7)),
            "teacher_ids": np.array([[0, 6], [3, 1], [2, 4], [5, 6], [1, 0]]),
            "teacher_log_probs": np.log(random.dirichlet(np.ones(3), 5)[:, :2]),
            "image": random.normal(size=(5, 3)),
            "text": random.normal(size=(5, 3)),
        }

    def compute(self, block, inputs, cotangents, rows=5):
        per_token = ("hidden", "labels", "class_ids", "bits")
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

    @pytest.mark.parametrize(
        "truth",
        [heads_truth.clip_loss(0.3), heads_truth.nt_xent(0.3), heads_truth.in_batch],
        ids=["clip_loss", "nt_xent", "in_batch"],
    )
    def test_gradients_of_pairs_are_central_differences(self, truth):
        inputs, subset = self.problem(), checks.Subset.of(5, 5)
        truth = functools.partial(truth, inputs, {"loss": 1.7}, subset)
        found = truth()
        for key in ("image", "text"):
            differences = self.differences(lambda: 1.7 * truth()["loss"], inputs[key])
            np.testing.assert_allclose(found["d" + key], differences, atol=1e-8)

    @pytest.mark.parametrize("block_bytes", [1, 2 * 8 * 7, 2**28])
    @pytest.mark.parametrize(
        "name",
        [
            "log_prob",
            "log_prob_at",
            "expected",
            "distillation",
            "distillation_top_k",
            "among",
            "cross_entropy",
            "masked_cross_entropy",
        ],
    )
    def test_gradients_are_central_differences(self, monkeypatch, name, block_bytes):
        monkeypatch.setattr(heads_truth, "_BLOCK_BYTES", block_bytes)
        block, inputs = getattr(heads_truth, name), self.problem()
        if name == "among":
            inputs["class_ids"] = inputs["teacher_ids"]
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

    def test_gradients_of_other_kernels_are_central_differences(self):
        random = np.random.default_rng(2)
        inputs = self.problem()
        inputs["a"], inputs["b"] = (
            random.normal(size=(3, 2)),
            random.normal(size=(2, 7)),
        )
        upstream, subset = {"loss": random.normal(size=5)}, checks.Subset.of(5, 7)
        truth = heads_truth.with_kernel(heads_truth.adapted_kernel)
        found = truth(inputs, upstream, subset)

        def total():
            return np.sum(upstream["loss"] * truth(inputs, {}, subset)["loss"])

        for key in ("hidden", "b"):
            differences = self.differences(total, inputs[key])
            np.testing.assert_allclose(found["d" + key], differences, atol=1e-8)

    def test_values_of_other_kernels_ranks_and_filters(self):
        inputs, subset = self.problem(), checks.Subset.of(5, 7)
        short, scale = np.arange(21).reshape(3, 7) - 9, np.linspace(0.1, 0.3, 7)
        inputs |= {"short_kernel": short, "scale": scale}
        truth = heads_truth.with_kernel(heads_truth.scaled_kernel)
        expected = self.compute(
            heads_truth.cross_entropy, inputs | {"kernel": short * scale}, {}
        )
        np.testing.assert_allclose(truth(inputs, {}, subset)["loss"], expected["loss"])
        log_p = np.log([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
        ranks = heads_truth.ranked(2)(log_p, {"labels": np.array([1, 1])}, {})
        np.testing.assert_allclose(ranks.outputs["better"], [0.25, 0.5])
        np.testing.assert_allclose(
            np.exp(heads_truth.best(2)(log_p)),
            [[4 / 7, 3 / 7, 0, 0], [0, 0, 3 / 7, 4 / 7]],
        )
        # The class that reaches the mass is kept, too.
        np.testing.assert_allclose(
            np.exp(heads_truth.most_probable(0.6)(log_p)),
            [[4 / 7, 3 / 7, 0, 0], [0, 0, 3 / 7, 4 / 7]],
        )

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
