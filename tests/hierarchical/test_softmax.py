"""Probabilities of trees against their definition in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import ClassTree, hierarchical_log_prob, hierarchical_log_probs
from jaxsoft.hierarchical import layer as node_logits
from tests.hierarchical import cases


def of_every_class(tree, hidden, kernel, **options):
    """Returns [N, V] from the function of one class."""
    rows, classes = len(hidden), tree.num_classes
    labels = np.tile(np.arange(classes), (rows, 1))
    every = jnp.repeat(hidden[:, None], classes, axis=1)
    return hierarchical_log_prob(every, kernel, labels, tree, **options)


def of_all(tree, hidden, kernel, **options):
    """Returns [N, V] from the function of all classes."""
    return hierarchical_log_probs(hidden, kernel, tree, **options)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 5, 16, 17, 40])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_every_class_by_definition(kind, num_classes, dtype, x64):
    tree = cases.tree(kind, num_classes)
    hidden, kernel, bias = cases.layer(tree, dtype=dtype)
    tau = np.random.default_rng(2).uniform(0.4, 2, len(hidden))
    wide = [a.astype("float64") for a in (hidden, kernel, bias)]
    exact = cases.log_probs(tree, *wide, temperature=tau)
    options = {"node_bias": bias, "temperature": tau.astype(dtype)}
    tolerance = 1e-12 if dtype == "float64" else 3e-6
    every = hierarchical_log_probs(hidden, kernel, tree, **options)
    assert every.dtype == dtype
    np.testing.assert_allclose(every, exact, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.exp(every).sum(1), 1, atol=tolerance)
    labels = np.random.default_rng(3).integers(0, num_classes, (3, len(hidden)))
    for label in labels:
        found = hierarchical_log_prob(hidden, kernel, label, tree, **options)
        assert found.dtype == dtype and (found <= 0).all()
        truth = exact[np.arange(len(hidden)), label]
        np.testing.assert_allclose(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_probabilities_of_a_thousand_classes_add_up(kind):
    tree = cases.tree(kind, 1000)
    hidden, kernel, bias = cases.layer(tree, dtype="float32", scale=3.0)
    every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
    np.testing.assert_allclose(np.exp(every, dtype="float64").sum(1), 1, atol=1e-5)
    labels = np.arange(1000)
    alone = hierarchical_log_prob(
        np.repeat(hidden[:1], 1000, 0), kernel, labels, tree, node_bias=bias
    )
    np.testing.assert_allclose(np.exp(alone, dtype="float64").sum(), 1, atol=1e-5)
    np.testing.assert_allclose(alone, every[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["alone", "all"])
@pytest.mark.parametrize("kind", ["balanced", "ternary", "huffman", "wide"])
@pytest.mark.many_cases
def test_gradients(kind, name, x64):
    tree = cases.tree(kind, 13)
    layer = (*cases.layer(tree), np.random.default_rng(4).uniform(0.4, 2, 6))
    labels = np.array([0, 12, 3, 3, 7, 9])
    weights = np.random.default_rng(5).standard_normal((6, 13))

    def total(layer):
        hidden, kernel, bias, tau = layer
        options = {"node_bias": bias, "temperature": tau}
        if name == "alone":
            found = hierarchical_log_prob(hidden, kernel, labels, tree, **options)
            return jnp.sum(found * weights[:, 0])
        return jnp.sum(
            hierarchical_log_probs(hidden, kernel, tree, **options) * weights
        )

    def truth(layer):
        exact = cases.log_probs(tree, *layer)
        if name == "alone":
            return (exact[np.arange(6), labels] * weights[:, 0]).sum()
        return (exact * weights).sum()

    # Before the arrays change, which JAX may share.
    found = jax.block_until_ready(jax.jit(jax.grad(total))(layer))
    for array, gradient in zip(layer, found, strict=True):
        for place in list(np.ndindex(array.shape))[:: max(1, array.size // 9)]:
            kept, sides = array[place], []
            for step in (1e-6, -1e-6):
                array[place] = kept + step
                sides.append(truth(layer))
            array[place] = kept
            assert gradient[place] == pytest.approx(
                (sides[0] - sides[1]) / 2e-6, rel=1e-6, abs=1e-8
            )


@pytest.mark.parametrize("logit", [50.0, -50.0, 1000.0, -1000.0])
def test_saturated_node_has_its_gradient(logit, x64):
    tree = ClassTree.balanced(2)

    def value(z, label):
        return hierarchical_log_prob(
            jnp.ones((1, 1)), z.reshape(1, 1), jnp.array([label]), tree
        )[0]

    for label, sign in ((1, 1), (0, -1)):
        found, gradient = jax.value_and_grad(value)(jnp.asarray(logit), label)
        odds = -sign * logit
        expected = -odds if odds > 40 else -np.exp(odds)
        slope = 1.0 if odds > 40 else np.exp(odds)
        assert found == pytest.approx(expected, rel=1e-12)
        assert gradient == pytest.approx(sign * slope, rel=1e-12)


@pytest.mark.parametrize("arity", [2, 3])
def test_limits_of_the_temperature(arity):
    tree = ClassTree.balanced(9, arity)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    kernel[0] = 0
    for function in (of_every_class, of_all):
        cold = np.exp(function(tree, hidden, kernel, temperature=0.0))
        np.testing.assert_allclose(cold.sum(1), 1, atol=1e-6)
        assert ((cold == 0) | (cold > 0.2)).all()
        hot = function(tree, hidden, kernel, temperature=np.inf)
        path = tree.paths(jnp.arange(9))
        even = -np.log1p(np.asarray(path.num_rows)).sum(1)
        np.testing.assert_allclose(hot, np.tile(even, (6, 1)), rtol=1e-5)
        gradient = jax.grad(
            lambda h, f=function: f(tree, h, kernel, temperature=0.0)[:, 0].sum()
        )(hidden)
        assert (np.asarray(gradient) == 0).all()
    with pytest.raises(ValueError, match="`temperature` must not be negative"):
        hierarchical_log_probs(hidden, kernel, tree, temperature=-1.0)


def test_labels_that_are_no_class_and_masked_positions():
    tree = ClassTree.huffman([5, 4, 3, 2, 1])
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    labels = np.array([0, -1, 5, -100, 4, 2])
    found = np.asarray(hierarchical_log_prob(hidden, kernel, labels, tree))
    assert np.isnan(found).tolist() == [False, True, True, True, False, False]
    keep = np.array([True, False, False, False, True, False])
    hidden[3], hidden[5] = np.inf, np.nan

    def total(hidden, kernel, labels, keep=None):
        return hierarchical_log_prob(hidden, kernel, labels, tree, where=keep).sum()

    value, gradients = jax.value_and_grad(total, (0, 1))(hidden, kernel, labels, keep)
    kept = np.array([0, 4])
    alone = jax.value_and_grad(total, (0, 1))(hidden[kept], kernel, labels[kept])
    np.testing.assert_allclose(value, alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[0][kept], alone[1][0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], alone[1][1], rtol=1e-6)
    assert (np.asarray(gradients[0])[~keep] == 0).all()
    none = jax.value_and_grad(total, (0, 1))(hidden, kernel, labels, keep & False)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(none))


@pytest.mark.parametrize("name", ["alone", "all"])
def test_transforms_and_leading_axes(name):
    tree = cases.tree("huffman", 11)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    labels = np.array([0, 10, 3, 3, 7, 9])

    def call(hidden, labels, tree):
        if name == "all":
            return hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
        return hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)

    plain = call(hidden, labels, tree)
    folded = call(hidden.reshape(2, 3, -1), labels.reshape(2, 3), tree)
    mapped = jax.jit(jax.vmap(call, (0, 0, None)))(hidden, labels, tree)
    for other in (folded.reshape(plain.shape), mapped):
        np.testing.assert_allclose(other, plain, rtol=1e-6, atol=1e-6)
    assert call(hidden[:0], labels[:0], tree).shape[0] == 0
    assert call(hidden[0], labels[0], tree).shape == plain.shape[1:]


def test_bfloat16_is_as_good_as_its_inputs():
    tree = cases.tree("balanced", 300)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    hidden, kernel = (jnp.asarray(a, "bfloat16") for a in (hidden, kernel))
    exact = cases.log_probs(
        tree, *(np.asarray(a, "float64") for a in (hidden, kernel)), 0.0
    )
    every = hierarchical_log_probs(hidden, kernel, tree)
    assert every.dtype == "float32"
    np.testing.assert_allclose(every, exact, rtol=2e-6, atol=2e-6)
    found = hierarchical_log_prob(hidden, kernel, np.arange(6), tree)
    np.testing.assert_allclose(found, exact[np.arange(6), np.arange(6)], rtol=2e-6)
    gradients = jax.grad(
        lambda h, k: hierarchical_log_prob(h, k, np.arange(6), tree).sum(), (0, 1)
    )(hidden, kernel)
    assert all(g.dtype == "bfloat16" for g in gradients)


@pytest.mark.parametrize("kind", ["balanced", "huffman of 4", "wide"])
@pytest.mark.many_cases
def test_bfloat16_gradients_of_many_tokens_do_not_stall(kind):
    # A sum in bfloat16 would stop at 256 times its terms, of thousands at the root.
    tree = cases.tree(kind, 300)
    random = np.random.default_rng(0)
    hidden, kernel, bias = cases.layer(tree, rows=4096, dtype="float32", scale=0.3)
    layer = [jnp.asarray(a, "bfloat16") for a in (hidden + 1, kernel, bias)]
    labels = random.integers(0, 2, 4096) * 17
    weights = random.uniform(0.5, 1.5, 4096).astype("float32")

    @jax.jit
    @jax.grad
    def alone(layer, labels, weights):
        hidden, kernel, bias = layer
        found = hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)
        return jnp.sum(found * weights.astype(found.dtype))

    @jax.jit
    @jax.grad
    def plain(layer, labels, weights):
        hidden, kernel, bias = layer
        every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
        return jnp.sum(every[jnp.arange(4096), labels] * weights)

    found, whole = (f(layer, labels, weights) for f in (alone, plain))
    with jax.enable_x64(True):
        exact = alone([a.astype("float64") for a in layer], labels, weights)
    for own, other, truth in zip(found, whole, exact, strict=True):
        assert own.dtype == "bfloat16"
        own, other, truth = (np.asarray(a, "float64") for a in (own, other, truth))
        error = [np.abs(a - truth).max() for a in (own, other, 0 * truth)]
        assert error[0] <= error[1] + 2e-3 * error[2], error
        assert error[0] < 0.01 * error[2]


def test_products_of_other_platforms():
    # On CPU these are computed in another way.
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((5, 8)), "float32")
    kernel = jnp.asarray(random.standard_normal((5, 3, 2, 8)), "bfloat16")
    rounded = hidden.astype("bfloat16").astype("float32")
    options: dict[str, Any] = {"dtype": jnp.dtype("float32")}
    ours = functools.partial(node_logits._products, precision=None, **options)
    sums = functools.partial(node_logits._products_by_sums, **options)
    tangents = (rounded[::-1], kernel[::-1])
    for found, truth in zip(
        jax.jvp(ours, (rounded, kernel), tangents),
        jax.jvp(sums, (rounded, kernel), tangents),
        strict=True,
    ):
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)
    cotangent = jnp.asarray(random.standard_normal((5, 3, 2)), "float32")
    found = jax.vjp(ours, hidden, kernel)[1](cotangent)
    truth = jax.vjp(sums, hidden, kernel)[1](cotangent)
    for own, other in zip(found, truth, strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_allclose(
            own.astype("float32"), other.astype("float32"), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"node_kernel": np.zeros((5, 4))}, "`node_kernel` must have"),
        (TypeError, {"node_kernel": np.zeros((4, 4), int)}, "`node_kernel` must have"),
        (TypeError, {"labels": np.zeros(6)}, "`labels` must have an integer dtype"),
        (ValueError, {"labels": np.zeros(5, int)}, "`labels` must have shape"),
        (ValueError, {"node_bias": np.zeros(5)}, "`node_bias` must have shape"),
        (ValueError, {"where": np.ones(5, bool)}, "`where` must have shape"),
        (TypeError, {"where": np.ones(6)}, "`where` must have dtype bool"),
        (ValueError, {"temperature": np.ones(5)}, "`temperature` must have shape"),
        (TypeError, {"tree": 5}, "`tree` must be a ClassTree, got int"),
        (ValueError, {"hidden": np.float32(1)}, "`hidden` must have shape"),
        (
            NotImplementedError,
            {"implementation": "mosaic_gpu"},
            "`implementation` must be 'xla' for hierarchical_log_prob",
        ),
    ],
)
def test_errors(error, options, message):
    arguments = {
        "hidden": np.zeros((6, 4), "float32"),
        "node_kernel": np.zeros((4, 4), "float32"),
        "labels": np.zeros(6, int),
        "tree": ClassTree.balanced(5),
    }
    with pytest.raises(error, match=message):
        hierarchical_log_prob(**(arguments | options))
