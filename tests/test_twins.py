"""Functions of stored logits and their streamed twins take the same, and agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests.truth import DIVERGENCES as OPTIONS

ROWS, FEATURES, CLASSES = (2, 3), 4, 9
RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((*ROWS, FEATURES)).astype("float32")
OTHER = RNG.standard_normal((*ROWS, FEATURES)).astype("float32")
KERNEL = RNG.standard_normal((FEATURES, CLASSES)).astype("float32")
LOGITS, OTHERS = HIDDEN @ KERNEL, OTHER @ KERNEL
LABELS = RNG.integers(0, CLASSES, ROWS)
KEY = jax.random.key(0)
TEMPERATURES = {
    "scalar": np.float32(0.7),
    "rows": np.linspace(0.5, 2, 6, dtype="float32").reshape(ROWS),
    "rows and one": np.linspace(0.5, 2, 6, dtype="float32").reshape(*ROWS, 1),
    "broadcast": np.array([[[0.5]], [[2.0]]], "float32"),
}
REDUCTIONS = ("none", "sum", "mean")
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_reverse")


@pytest.mark.parametrize("shape", TEMPERATURES)
def test_shapes_of_temperatures(shape):
    """A temperature has the rows' shape, with the class axis or without it."""
    tau = jnp.asarray(TEMPERATURES[shape])
    full = jnp.broadcast_to(tau if tau.ndim != 2 else tau[..., None], (*ROWS, 1))
    options: dict[str, Any] = {"temperature": tau}
    np.testing.assert_allclose(
        jaxsoft.softmax_cross_entropy(LOGITS, LABELS, full[..., 0]),
        jaxsoft.linear_cross_entropy(
            HIDDEN, KERNEL, LABELS, reduction="none", **options
        ),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(
        jaxsoft.softmax_cross_entropy(LOGITS, LABELS, tau),
        jaxsoft.softmax_cross_entropy(LOGITS, LABELS, full),
    )
    truth = jaxsoft.linear_sample(KEY, HIDDEN, KERNEL, temperature=full[..., 0])
    np.testing.assert_array_equal(jaxsoft.sample(KEY, LOGITS, tau), truth)
    np.testing.assert_array_equal(
        jaxsoft.linear_sample(KEY, HIDDEN, KERNEL, **options), truth
    )
    mesh = jax.make_mesh((2,), ("data",))
    over = jaxsoft.over_mesh(jaxsoft.linear_sample, mesh, token_axes="data")
    np.testing.assert_array_equal(over(KEY, HIDDEN, KERNEL, **options), truth)


def test_a_temperature_that_fits_no_rows():
    """The message names the shapes that do."""
    tau = jnp.ones(4)
    with pytest.raises(ValueError, match="`temperature` must broadcast"):
        jaxsoft.softmax(LOGITS, temperature=tau)
    with pytest.raises(ValueError, match="`temperature` must have shape"):
        jaxsoft.linear_log_prob(HIDDEN, KERNEL, LABELS, temperature=tau)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(reduction):
    """Weights, ignored labels and reductions mean the same in both."""
    weights = np.array([[1.0, 0.0, 0.5], [2.0, 1.0, 1.0]], "float32")
    labels = np.where(np.arange(6).reshape(ROWS) == 4, -100, LABELS)
    options: dict[str, Any] = {
        "weights": weights,
        "ignore_label": -100,
        "reduction": reduction,
    }

    def stored(logits):
        loss = jaxsoft.softmax_cross_entropy(logits, labels, 0.7, **options)
        return loss.sum(), loss

    def streamed(hidden):
        loss = jaxsoft.linear_cross_entropy(
            hidden, KERNEL, labels, temperature=0.7, **options
        )
        return loss.sum(), loss

    slope, loss = jax.grad(stored, has_aux=True)(LOGITS)
    other_slope, other = jax.grad(streamed, has_aux=True)(HIDDEN)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    np.testing.assert_allclose(slope @ KERNEL.T, other_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distillation(reduction):
    """Weights and reductions mean the same in both."""
    weights = np.array([[True, False, True], [True, True, True]])
    options: dict[str, Any] = {"weights": weights, "reduction": reduction}
    np.testing.assert_allclose(
        jaxsoft.distillation_loss(LOGITS, OTHERS, 2.0, **options),
        jaxsoft.linear_distillation(
            HIDDEN, KERNEL, OTHER, KERNEL, temperature=2.0, **options
        ),
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, np.float32(2)])
def test_a_teacher_without_classes_teaches_nothing(kind, tau):
    """A row of -inf alone has no distribution: loss and gradient are 0."""
    student = jnp.asarray(LOGITS.reshape(-1, CLASSES))
    states = jnp.ones((len(student), 1)).at[1].set(-jnp.inf)
    rows = jnp.linspace(0.5, 1.5, CLASSES)[None]
    kept = np.arange(len(student)) != 1
    options: dict[str, Any] = {**OPTIONS[kind][0], "reduction": "none"}

    def stored(student, tau):
        return jaxsoft.distillation_loss(student, states * rows, tau, **options)

    def streamed(student, tau):
        eye = jnp.eye(CLASSES)
        return jaxsoft.linear_distillation(
            student, eye, states, rows, temperature=tau, **options
        )

    for losses in (stored, streamed):
        found, pull = jax.vjp(jax.jit(losses), student, jnp.float32(tau))
        np.testing.assert_array_equal(found[1], 0)
        assert np.all(found[kept] > 0)
        np.testing.assert_array_equal(pull(jnp.asarray(~kept, jnp.float32))[0], 0)
        slope, of_tau = pull(jnp.ones_like(found))
        assert np.isfinite(slope).all() and np.isfinite(of_tau)
        assert np.all(np.any(np.asarray(slope) != 0, axis=1) == kept)


def test_rows_without_weight_may_hold_anything():
    """NaN in a row that does not count reaches neither the loss nor a gradient."""
    weights = np.arange(6).reshape(ROWS) > 0
    logits = LOGITS.copy()
    logits[0, 0] = np.nan
    options: dict[str, Any] = {"weights": weights, "reduction": "mean"}

    def losses(logits):
        return jaxsoft.softmax_cross_entropy(
            logits, LABELS, **options
        ) + jaxsoft.distillation_loss(logits, OTHERS, **options)

    value, slope = jax.value_and_grad(losses)(logits)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    assert not np.any(slope[0, 0])


def test_temperatures_and_targets_without_weight_may_be_nan():
    """Neither reaches a gradient, by a temperature of all rows or of each."""
    weights = np.array([1.0, 0.0, 2.0], "float32")
    options: dict[str, Any] = {"weights": weights, "reduction": "sum"}
    targets = np.full((3, CLASSES), 1 / CLASSES, "float32")
    targets[1] = np.nan
    hidden, logits, labels = HIDDEN[0], LOGITS[0], LABELS[0]

    @jax.jit
    def slopes(tau, taus):
        def soft(tau):
            return jaxsoft.softmax_cross_entropy(
                logits, targets=targets, temperature=tau, **options
            )

        def stored(logits, taus):
            return jaxsoft.softmax_cross_entropy(logits, labels, taus, **options)

        def streamed(kernel, taus):
            return jaxsoft.linear_cross_entropy(
                hidden, kernel, labels, temperature=taus, **options
            )

        return (
            jax.grad(soft)(tau),
            jax.grad(stored, (0, 1))(logits, taus),
            jax.grad(streamed, (0, 1))(KERNEL, taus),
        )

    taus = jnp.array([0.5, jnp.nan, 2.0])
    for slope in jax.tree.leaves(slopes(jnp.float32(0.7), taus)):
        assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match="`ignore_label` must be None"):
        jaxsoft.softmax_cross_entropy(LOGITS, targets=OTHERS, ignore_label=0)


def test_a_temperature_without_weight_reaches_nothing_anywhere():
    """NaN as the temperature of a token of weight 0 is in no loss and no slope."""
    weights = np.array([1.0, 0.0, 2.0], "float32")
    hidden, other, labels = HIDDEN[0], OTHER[0], LABELS[0]
    ids, log_probs = jax.lax.top_k(jax.nn.log_softmax(OTHERS[0]), 3)[::-1]
    tree = jaxsoft.ClassTree.balanced(CLASSES)
    bands = jaxsoft.ClassBands.from_counts(np.arange(CLASSES, 0, -1), cutoffs=[4])
    tails = [jaxsoft.AdaptiveTail(np.eye(FEATURES, dtype="float32"), KERNEL[:, 4:])]
    sampler = jaxsoft.ClassSampler.uniform(CLASSES)

    def losses(kernel, tau):
        options: dict[str, Any] = {"temperature": tau, "weights": weights}
        yield jaxsoft.linear_cross_entropy(hidden, kernel, labels, **options)
        yield jaxsoft.linear_log_prob(hidden, kernel, labels, **options)
        yield jaxsoft.linear_log_prob_at(hidden, kernel, ids, **options)
        yield jaxsoft.linear_distillation(hidden, kernel, other, kernel, **options)
        yield jaxsoft.linear_distillation_top_k(
            hidden, kernel, ids, log_probs, **options
        )
        yield jaxsoft.sampled_softmax_loss(
            KEY, hidden, kernel, labels, sampler=sampler, num_samples=4, **options
        )
        nodes = kernel.T[: tree.num_rows]
        yield jaxsoft.hierarchical_log_prob(hidden, nodes, labels, tree, **options)
        yield jaxsoft.hierarchical_value_and_row_grad(
            hidden, nodes, labels, tree, **options
        )[0]
        yield jaxsoft.adaptive_log_prob(
            hidden, kernel[:, :5], tails, labels, bands, **options
        )

    def total(kernel, tau):
        values = tuple(losses(kernel, tau))
        return sum(map(jnp.sum, jax.tree.leaves(values))), values

    tau = jnp.array([0.5, jnp.nan, 2.0])
    (_, values), slopes = jax.jit(
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    )(KERNEL, tau)
    for name, array in {**dict(enumerate(values)), "slopes": slopes}.items():
        for leaf in jax.tree.leaves(array):
            assert np.isfinite(leaf).all(), (name, array)
    assert not slopes[1][1]
