"""Limits, masks and transformations of the log-probabilities of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import ClassTree, hierarchical_log_prob, hierarchical_log_probs
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


@pytest.mark.parametrize("arity", [2, 3])
def test_limits_of_the_temperature(arity):
    tree = ClassTree.balanced(9, arity)
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    kernel[0] = 0

    @jax.jit
    def limits(hidden, kernel):
        found = []
        for function in (of_every_class, of_all):

            def cold(hidden, function=function):
                log_probs = function(tree, hidden, kernel, temperature=0.0)
                return log_probs[:, 0].sum(), log_probs

            (_, log_probs), gradient = jax.value_and_grad(cold, has_aux=True)(hidden)
            hot = function(tree, hidden, kernel, temperature=np.inf)
            found.append((log_probs, gradient, hot))
        return found

    for cold, gradient, hot in jax.device_get(limits(hidden, kernel)):
        cold = np.exp(cold)
        np.testing.assert_allclose(cold.sum(1), 1, atol=1e-6)
        assert ((cold == 0) | (cold > 0.2)).all()
        even = -np.log1p(cases.paths(tree)[1]).sum(1)
        np.testing.assert_allclose(hot, np.tile(even, (6, 1)), rtol=1e-5)
        assert (gradient == 0).all()
    with pytest.raises(ValueError, match="`temperature` must not be negative"):
        hierarchical_log_probs(hidden, kernel, tree, temperature=-1.0)


def test_labels_that_are_no_class_and_masked_positions():
    tree = ClassTree.huffman([5, 4, 3, 2, 1])
    hidden, kernel, _ = cases.layer(tree, dtype="float32")

    def total(hidden, kernel, labels, keep=None):
        found = hierarchical_log_prob(hidden, kernel, labels, tree, weights=keep)
        return found.sum(), found

    compiled = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    def value_and_grad(*arguments):
        return jax.device_get(compiled(*arguments))

    labels = np.array([0, -1, 5, -100, 4, 2])
    (_, found), _ = value_and_grad(hidden, kernel, labels)
    assert np.isnan(found).tolist() == [False, True, True, True, False, False]
    keep = np.array([True, False, False, False, True, False])
    # A state of 0 adds nothing to the gradient of a kernel.
    others = np.where(keep[:, None], hidden, 0), kernel, np.where(keep, labels, 0)
    (_, found), alone = value_and_grad(*others)
    hidden[3], hidden[5] = np.inf, np.nan
    (value, _), gradients = value_and_grad(hidden, kernel, labels, keep)
    np.testing.assert_allclose(value, found[keep].sum(), rtol=1e-6)
    np.testing.assert_allclose(gradients[0][keep], alone[0][keep], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], alone[1], rtol=1e-6)
    assert (gradients[0][~keep] == 0).all()
    real = keep * np.float32(0.5)
    (_, of_halves), halved = value_and_grad(hidden, kernel, labels, real)
    np.testing.assert_allclose(of_halves[keep], 0.5 * found[keep], rtol=1e-6)
    np.testing.assert_allclose(halved[1], 0.5 * gradients[1], rtol=1e-6, atol=1e-7)
    none = value_and_grad(hidden, kernel, labels, keep & False)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none))
    ignored = jax.jit(
        lambda hidden, kernel, labels: hierarchical_log_prob(
            hidden, kernel, labels, tree, ignore_label=-100
        )
    )(hidden, kernel, np.where(keep, labels, -100))
    np.testing.assert_allclose(ignored, np.where(keep, found, 0), rtol=1e-6)


@pytest.mark.parametrize("name", ["alone", "all"])
def test_transforms_and_leading_axes(name):
    tree = cases.tree("huffman", 11)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    labels = np.array([0, 10, 3, 3, 7, 9])

    def call(hidden, labels, tree):
        if name == "all":
            return hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
        return hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)

    @jax.jit
    def results(hidden, labels, tree):
        return (
            call(hidden, labels, tree),
            call(hidden.reshape(2, 3, -1), labels.reshape(2, 3), tree),
            jax.vmap(call, (0, 0, None))(hidden, labels, tree),
            call(hidden[:0], labels[:0], tree),
            call(hidden[0], labels[0], tree),
        )

    plain, folded, mapped, empty, scalar = jax.device_get(results(hidden, labels, tree))
    for other in (folded.reshape(plain.shape), mapped):
        np.testing.assert_allclose(other, plain, rtol=1e-6, atol=1e-6)
    assert empty.shape[0] == 0
    assert scalar.shape == plain.shape[1:]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_second_derivatives_of_all_classes(scale, x64):
    # At 0 both children of a node are alike; at 30 nodes are saturated.
    tree = cases.tree("huffman", 6)
    hidden, kernel, _ = cases.layer(tree, rows=2, features=2, scale=scale)
    weights = np.random.default_rng(6).uniform(0.5, 1.5, (2, 6))

    def logistics(hidden, kernel):
        """Returns log-probabilities by the logistic function, path by path."""
        z = hidden @ kernel.T
        rows, numbers, choices = cases.paths(tree)
        z = jnp.where(choices[None] == 1, z[:, rows], -z[:, rows])
        return jnp.sum(jnp.where(numbers[None] > 0, jax.nn.log_sigmoid(z), 0), axis=2)

    @jax.jit
    def derivatives(*layer):
        found = []
        for function in (lambda *layer: of_all(tree, *layer), logistics):

            def total(*layer, function=function):
                return jnp.sum(jnp.square(function(*layer)) * weights)

            moved = jax.jvp(jax.grad(total), layer, layer)[1]
            found.append((jax.hessian(total, (0, 1))(*layer), moved))
        return found

    found, expected = map(jax.tree.leaves, jax.device_get(derivatives(hidden, kernel)))
    assert any(np.abs(truth).max() > 1e-3 for truth in expected)
    for own, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, truth, rtol=1e-9, atol=1e-11)
