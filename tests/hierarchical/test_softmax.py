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


@jax.jit
def all_and_own(hidden, kernel, bias, labels, tree, tau):
    """Returns the log-probabilities of all classes, and of labels [..., N]."""
    every = hierarchical_log_probs(
        hidden, kernel, tree, node_bias=bias, temperature=tau
    )
    states = jnp.broadcast_to(hidden, (*labels.shape, hidden.shape[-1]))
    tau = jnp.broadcast_to(tau, labels.shape)
    own = hierarchical_log_prob(
        states, kernel, labels, tree, node_bias=bias, temperature=tau
    )
    return every, own


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("num_classes", [17, 1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_every_class_by_definition(kind, num_classes, dtype, x64):
    tree = cases.tree(kind, num_classes)
    hidden, kernel, bias = cases.layer(tree, dtype=dtype)
    tau = np.random.default_rng(2).uniform(0.4, 2, len(hidden))
    wide = [a.astype("float64") for a in (hidden, kernel, bias)]
    exact = cases.log_probs(tree, *wide, temperature=tau)
    tolerance = 1e-12 if dtype == "float64" else 3e-6
    labels = np.random.default_rng(3).integers(0, num_classes, (3, len(hidden)))
    every, own = map(
        np.asarray, all_and_own(hidden, kernel, bias, labels, tree, tau.astype(dtype))
    )
    assert every.dtype == dtype
    np.testing.assert_allclose(every, exact, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.exp(every).sum(1), 1, atol=tolerance)
    assert own.dtype == dtype and (own <= 0).all()
    truth = exact[np.arange(len(hidden)), labels]
    np.testing.assert_allclose(own, truth, rtol=tolerance, atol=tolerance)


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
    found = jax.device_get(jax.jit(jax.grad(total))(layer))
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


@jax.jit
@jax.value_and_grad
def one_node(logit, label):
    """Returns the log-probability of a tree's only choice."""
    layer = jnp.ones((1, 1)), logit.reshape(1, 1)
    return hierarchical_log_prob(*layer, label[None], ClassTree.balanced(2))[0]


@pytest.mark.parametrize("logit", [50.0, -50.0, 1000.0, -1000.0])
def test_saturated_node_has_its_gradient(logit, x64):
    for label, sign in ((1, 1), (0, -1)):
        value, gradient = one_node(np.float64(logit), np.int32(label))
        odds = -sign * logit
        expected = -odds if odds > 40 else -np.exp(odds)
        slope = 1.0 if odds > 40 else np.exp(odds)
        assert value == pytest.approx(expected, rel=1e-12)
        assert gradient == pytest.approx(sign * slope, rel=1e-12)


def test_bfloat16_is_as_good_as_its_inputs():
    tree = cases.tree("balanced", 40)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    hidden, kernel = (np.asarray(a, jnp.bfloat16) for a in (hidden, kernel))
    exact = cases.log_probs(
        tree, *(np.asarray(a, "float64") for a in (hidden, kernel)), 0.0
    )

    @jax.jit
    def results(hidden, kernel):
        def total(hidden, kernel):
            own = hierarchical_log_prob(hidden, kernel, np.arange(6), tree)
            return own.sum(), own

        every = hierarchical_log_probs(hidden, kernel, tree)
        (_, own), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
            hidden, kernel
        )
        return every, own, gradients

    every, own, gradients = results(hidden, kernel)
    assert every.dtype == "float32"
    np.testing.assert_allclose(every, exact, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(own, exact[np.arange(6), np.arange(6)], rtol=2e-6)
    assert all(g.dtype == "bfloat16" for g in gradients)


def test_products_of_other_platforms():
    # On CPU these are computed in another way.
    random = np.random.default_rng(0)
    hidden = random.standard_normal((5, 8)).astype("float32")
    rounded = hidden.astype(jnp.bfloat16).astype("float32")
    kernel = random.standard_normal((5, 3, 2, 8)).astype(jnp.bfloat16)
    options: dict[str, Any] = {"dtype": jnp.dtype("float32")}
    ours = functools.partial(node_logits._products, precision=None, **options)
    sums = functools.partial(node_logits._products_by_sums, **options)
    cotangent = random.standard_normal((5, 3, 2)).astype("float32")

    @jax.jit
    def derivatives(hidden, rounded, kernel, cotangent):
        tangents = (rounded[::-1], kernel[::-1])
        return [
            (
                jax.jvp(products, (rounded, kernel), tangents),
                jax.vjp(products, hidden, kernel)[1](cotangent),
            )
            for products in (ours, sums)
        ]

    results = derivatives(hidden, rounded, kernel, cotangent)
    for own, other in zip(*map(jax.tree.leaves, results), strict=True):
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
        (ValueError, {"weights": np.ones(5, bool)}, "`weights` must have shape"),
        (TypeError, {"weights": np.ones(6, int)}, "`weights` must have a floating"),
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
