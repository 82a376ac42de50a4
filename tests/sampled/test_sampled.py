"""Sampled softmax: its samplers' laws, its estimate, and what it becomes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxsoft import ClassSampler, linear_cross_entropy, sampled_softmax_loss

KEY = jax.random.key(3)


def layer(rows=6, features=4, classes=30, dtype="float64"):
    random = np.random.default_rng(0)
    arrays = [
        random.standard_normal(s) for s in ((rows, features), (features, classes))
    ]
    bias, labels = random.standard_normal(classes), random.integers(0, classes, rows)
    hidden, kernel, bias = (np.asarray(a, dtype) for a in (*arrays, bias))
    return hidden, kernel, bias, labels


def by_definition(hidden, kernel, bias, labels, ids, log_q, tau, hits=True):
    """Returns the loss of each token."""
    with np.errstate(invalid="ignore"):
        logits = (hidden @ kernel + bias) / tau
    found = []
    for row, label in zip(logits, labels, strict=True):
        total = np.exp(row[label])
        for class_id, q in zip(ids, log_q, strict=True):
            if class_id != label or not hits:
                total += np.exp(row[class_id]) / (len(ids) * np.exp(q))
        found.append(np.log(total) - row[label])
    return np.array(found)


SAMPLERS: dict[str, Any] = {
    "uniform": (ClassSampler.uniform, lambda v: np.ones(v)),
    "log_uniform": (
        ClassSampler.log_uniform,
        lambda v: np.log1p(1 / (1 + np.arange(v))),
    ),
    "unigram": (
        lambda v: ClassSampler.unigram(np.arange(v) ** 2, 0.75),
        lambda v: np.arange(v) ** 1.5,
    ),
}


@functools.partial(jax.jit, static_argnames="draws")
def law(sampler, draws):
    """Returns the log-probabilities of all classes, and draws."""
    classes = jnp.arange(sampler.num_classes)
    return sampler.log_prob(classes), sampler.sample(KEY, draws)


@pytest.mark.parametrize("classes", [3, 1000, 100_003])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_follow_their_law(name, classes):
    make, weights = SAMPLERS[name]
    sampler, weights = make(classes), weights(classes)
    expected = weights / weights.sum()
    assert sampler.num_classes == classes
    log_q, ids = law(sampler, 400_000)
    q = np.exp(np.asarray(log_q, "float64"))
    # One part in 2^30 is every class's.
    rounding = 2.0**-30 * classes
    np.testing.assert_allclose(q, expected, rtol=1e-5 + rounding, atol=2.0**-29)
    assert q.sum() == pytest.approx(1, abs=1e-6)
    ids = np.asarray(ids)
    assert ids.dtype == "int32" and ids.min() >= 0 and ids.max() < classes
    # Rare classes together, so that each cell is expected to hold a hundred.
    cells = np.minimum((np.cumsum(expected) * 500).astype(int), 499)
    counts = np.bincount(cells, np.bincount(ids, minlength=classes), 500)
    shares = np.bincount(cells, expected, 500) * len(ids)
    held = shares > 20
    chi = ((counts - shares)[held] ** 2 / shares[held]).sum()
    assert stats.chi2.sf(chi, held.sum() - 1) > 1e-4


def test_a_class_of_count_zero_is_never_drawn_and_a_rare_one_is_possible():
    counts = np.array([0, 1e-12, 5, 0, 0, 3, 0])
    sampler = ClassSampler.unigram(counts)
    assert sampler.starts[-1] == 2**30
    log_q, ids = map(np.asarray, law(sampler, 10_000))
    drawn = np.bincount(ids, minlength=7)
    assert ((drawn > 0) == (counts > 1e-6)).all()
    assert ((log_q == -np.inf) == (counts == 0)).all()
    assert log_q[1] == pytest.approx(-30 * np.log(2))
    assert ClassSampler.unigram([5]).sample(KEY, 3).tolist() == [0, 0, 0]


def test_random_bits_where_a_class_begins_and_ends(monkeypatch):
    """A class too low there would be -1 once in 2³⁰ draws."""
    sampler = ClassSampler.unigram([0, 3, 0, 0, 2, 1, 0])
    live = [1, 4, 5]
    starts = np.asarray(sampler.starts, "uint32")
    first, last = starts[live], starts[1:][live] - 1
    # The highest 30 of 32 bits choose.
    bits = np.concatenate([first << 2, (last << 2) + 3])
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(bits))
    assert sampler.sample(KEY, 6).tolist() == live + live


@pytest.mark.parametrize("layout", ["hv", "vh"])
@pytest.mark.parametrize("hits", [True, False])
def test_value_and_gradients_by_definition(hits, layout, x64):
    hidden, kernel, bias, labels = layer()
    sampler = ClassSampler.log_uniform(30)
    tau = np.random.default_rng(1).uniform(0.5, 2, 6)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=range(4), has_aux=True)
    def ours(hidden, kernel, bias, tau):
        losses = sampled_softmax_loss(
            KEY,
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            50,
            sampler=sampler,
            bias=bias,
            temperature=tau,
            remove_accidental_hits=hits,
            reduction="none",
            kernel_layout=layout,
        )

        ids = sampler.sample(KEY, 50)
        return losses.sum(), (losses, ids, sampler.log_prob(ids))

    arrays = (hidden, kernel, bias, tau)
    # Before the arrays change, which JAX may share.
    (_, sampled), gradients = jax.block_until_ready(ours(*arrays))
    losses, ids, q = map(np.asarray, sampled)
    # Some are labels.
    assert set(ids.tolist()) & set(labels.tolist())
    q = q.astype("float64")
    options = (labels, ids, q, tau[:, None], hits)
    expected = by_definition(hidden, kernel, bias, *options)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    for array, gradient in zip(arrays, gradients, strict=True):
        for place in list(np.ndindex(array.shape))[:: max(1, array.size // 7)]:
            kept, sides = array[place], []
            for step in (1e-6, -1e-6):
                array[place] = kept + step
                options = (labels, ids, q, tau[:, None], hits)
                sides.append(by_definition(hidden, kernel, bias, *options).sum())
            array[place] = kept
            slope = (sides[0] - sides[1]) / 2e-6
            assert gradient[place] == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_becomes_the_full_softmax(x64):
    hidden, kernel, bias, labels = layer()

    @jax.jit
    def losses(sampler):
        loss = functools.partial(
            sampled_softmax_loss,
            hidden=hidden,
            kernel=kernel,
            labels=labels,
            sampler=sampler,
            bias=bias,
            reduction="none",
        )
        keys = jax.random.split(KEY, 20_000)
        full = linear_cross_entropy(hidden, kernel, labels, bias=bias, reduction="none")
        few = jax.vmap(functools.partial(loss, num_samples=4))(keys)
        return full, loss(KEY, num_samples=1_000_000), few

    for name, (make, _) in SAMPLERS.items():
        # The law of "unigram" never draws class 0, so leave it to the others.
        if name == "unigram":
            continue
        full, many, few = losses(make(30))
        np.testing.assert_allclose(many, full, rtol=0.01)
        # The sum itself is unbiased at any number of samples.
        sums = np.exp(few)
        error = sums.std(0) / np.sqrt(len(sums))
        assert (np.abs(sums.mean(0) - np.exp(full)) < 4.5 * error).all()


def test_masked_tokens_and_labels_that_are_no_class():
    hidden, kernel, _, labels = layer(dtype="float32")
    labels[[1, 2, 3]] = [-1, 30, -100]
    sampler = ClassSampler.uniform(30)

    @jax.jit
    def results(hidden, kernel, weights, mask):
        def call(hidden, kernel, **options):
            return sampled_softmax_loss(
                KEY, hidden, kernel, labels, 9, sampler=sampler, **options
            )

        weighted = functools.partial(call, weights=weights, ignore_label=-100)
        return (
            call(hidden, kernel, reduction="none"),
            jax.value_and_grad(weighted, argnums=(0, 1))(hidden, kernel),
            call(hidden, kernel, weights=mask),
        )

    weights, nothing = np.array([2.0, 0, 0, 1, 0.5, 0], "float32"), np.zeros(6, bool)
    per_token = np.asarray(results(hidden, kernel, weights, nothing)[0])
    assert np.isnan(per_token).tolist() == [False, True, True, True, False, False]
    hidden[3] = np.nan
    _, (value, gradients), masked = results(hidden, kernel, weights, nothing)
    expected = (2 * per_token[0] + 0.5 * per_token[4]) / 2.5
    assert value == pytest.approx(expected, rel=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in gradients)
    assert (np.asarray(gradients[0])[[1, 2, 3, 5]] == 0).all()
    assert masked == 0


def test_limits_of_temperature_and_of_samples():
    hidden, kernel, _, labels = layer(dtype="float32")
    sampler = ClassSampler.uniform(30)

    def call(hidden, tau):
        return sampled_softmax_loss(
            KEY,
            hidden,
            kernel,
            labels,
            40,
            sampler=sampler,
            temperature=tau,
            reduction="none",
        )

    def total(hidden, tau):
        losses = call(hidden, tau)
        return losses.sum(), losses

    @jax.jit
    def results(hidden):
        value_and_grad = jax.value_and_grad(total, has_aux=True)
        # Each sample is the label: there is no other class.
        alone = sampled_softmax_loss(
            KEY, hidden, kernel[:, :1], 0 * labels, 3, sampler=ClassSampler.uniform(1)
        )
        cold, warm = (value_and_grad(hidden, tau) for tau in (0.0, 1.0))
        return cold, call(hidden, np.inf), warm, sampler.sample(KEY, 40), alone

    ((_, cold), slopes), hot, _, ids, alone = results(hidden)
    assert set(np.asarray(cold).tolist()) <= {0.0, np.inf}
    assert (np.asarray(slopes) == 0).all()
    others = (np.asarray(ids)[None] != labels[:, None]).sum(1)
    np.testing.assert_allclose(hot, np.log1p(others * 30 / 40), rtol=1e-5)
    assert alone == 0
    # Far apart: exact where all is said, and finite where nothing is.
    for scale in (np.float32(1e3), np.float32(-1e3)):
        warm = results(scale * hidden)[2]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(warm))


def test_a_sampler_of_ones_own_and_leading_axes():
    hidden, kernel, bias, labels = layer(dtype="float32")

    class First:
        """Draws the lower half."""

        def sample(self, key, num_samples):
            return jax.random.randint(key, (num_samples,), 0, 15)

        def log_prob(self, class_ids):
            return jnp.full(class_ids.shape, -np.log(15), "float32")

    @jax.jit
    def results(hidden, kernel, low):
        options: dict[str, Any] = {"sampler": First(), "reduction": "none"}
        loss = functools.partial(
            sampled_softmax_loss, KEY, num_samples=20, bias=bias, **options
        )
        return (
            First().sample(KEY, 20),
            loss(hidden, kernel, labels),
            loss(hidden.reshape(2, 3, -1), kernel, labels.reshape(2, 3)),
            loss(*low, labels),
        )

    low = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    ids, found, folded, rough = map(np.asarray, results(hidden, kernel, low))
    expected = by_definition(
        hidden, kernel, bias, labels, ids, np.full(20, -np.log(15)), 1.0
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(folded.reshape(-1), found, rtol=1e-6)
    assert rough.dtype == "float32"
    np.testing.assert_allclose(rough, found, rtol=0.05)


@pytest.mark.parametrize("layout", ["hv", "vh"])
def test_bfloat16_gradients_of_many_tokens_do_not_stall(layout):
    # A sum in bfloat16 would stop at 256 times its terms.
    hidden, kernel, bias, _ = layer(rows=2048, dtype="float32")
    labels = np.random.default_rng(1).integers(0, 3, 2048)
    kernel = kernel if layout == "hv" else kernel.T
    low = [a.astype(jnp.bfloat16) for a in (hidden + 1, kernel, bias)]
    sampler = ClassSampler.log_uniform(30)

    @jax.jit
    @jax.grad
    def gradients(layer):
        hidden, kernel, bias = layer
        options: dict[str, Any] = {"bias": bias, "kernel_layout": layout}
        return sampled_softmax_loss(
            KEY, hidden, kernel, labels, 2048, sampler=sampler, **options
        )

    found = gradients(low)
    with jax.enable_x64(True):
        exact = gradients([a.astype("float64") for a in low])
    for own, truth in zip(found, exact, strict=True):
        assert own.dtype == "bfloat16"
        own, truth = np.asarray(own, "float64"), np.asarray(truth)
        error = np.abs(own - truth).max()
        assert error < 0.01 * np.abs(truth).max()


class Floats:
    """Draws no classes."""

    def sample(self, key, num_samples):
        return jax.random.uniform(key, (num_samples,))

    def log_prob(self, class_ids):
        return jnp.zeros(class_ids.shape)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"kernel": np.zeros(4)}, "`kernel` must have two axes"),
        (ValueError, {"kernel": np.zeros((5, 9))}, "`kernel` must have shape"),
        (TypeError, {"labels": np.zeros(6)}, "`labels` must have an integer dtype"),
        (ValueError, {"labels": np.zeros(5, int)}, "`labels` must have shape"),
        (ValueError, {"bias": np.zeros(5)}, "`bias` must have shape"),
        (ValueError, {"num_samples": 0}, "`num_samples` must"),
        (ValueError, {"temperature": -1.0}, "`temperature` must not be negative"),
        (ValueError, {"sampler": ClassSampler.uniform(8)}, "`sampler` must be over 9"),
        (TypeError, {"sampler": Floats()}, r"`sampler.sample\(...\)` must have an int"),
        (ValueError, {"kernel_layout": "xy"}, "`kernel_layout` must"),
        (ValueError, {"reduction": "max"}, "`reduction` must"),
        (NotImplementedError, {"implementation": "mosaic_gpu"}, "for sampled_softmax"),
    ],
)
def test_errors(error, options, message):
    arguments: dict[str, Any] = {
        "key": KEY,
        "hidden": np.zeros((6, 4), "float32"),
        "kernel": np.zeros((4, 9), "float32"),
        "labels": np.zeros(6, int),
        "num_samples": 3,
        "sampler": ClassSampler.uniform(9),
    }
    with pytest.raises(error, match=message):
        sampled_softmax_loss(**(arguments | options))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("`counts` must have shape", lambda: ClassSampler.unigram(np.ones((2, 2)))),
        ("`counts` must be finite", lambda: ClassSampler.unigram([1, -1])),
        ("`counts` must be finite", lambda: ClassSampler.unigram([1, np.nan])),
        ("`counts` must not be all 0", lambda: ClassSampler.unigram([0, 0])),
        ("`counts` must have shape", lambda: ClassSampler.unigram([])),
        ("`power` must", lambda: ClassSampler.unigram([1], -1.0)),
        ("`num_classes` must", lambda: ClassSampler.uniform(0)),
        ("`num_classes` must be at most", lambda: ClassSampler.log_uniform(2**29)),
    ],
)
def test_errors_of_samplers(message, call):
    with pytest.raises(ValueError, match=message):
        call()
