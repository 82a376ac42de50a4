"""Laws of numerics that every tree, sampler and band must keep."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import (
    AdaptiveTail,
    ClassBands,
    ClassSampler,
    ClassTree,
    adaptive_log_probs,
    adaptive_sample,
    hierarchical_log_prob,
    hierarchical_log_probs,
    hierarchical_value_and_row_grad,
    sampled_softmax_loss,
)
from tests.hierarchical import cases

KEY = jax.random.key(5)
OFFSETS = (2.0**14, 1e6, 1e7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_probabilities_add_up_whatever_the_number_of_classes(kind, dtype, x64):
    trees = [
        cases.tree(kind, number)
        for number in [*range(1, 14), 15, 16, 17, 31, 32, 33, 40, 1000]
    ]
    layers = [cases.layer(tree, rows=3, dtype=dtype, scale=2.0) for tree in trees]

    @jax.jit
    def every(layers, trees):
        return [
            hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
            for (hidden, kernel, bias), tree in zip(layers, trees, strict=True)
        ]

    for found, tree in zip(every(layers, trees), trees, strict=True):
        assert found.dtype == dtype and found.shape == (3, tree.num_classes)
        assert (np.asarray(found) <= 0).all()
        total = np.exp(np.asarray(found, "float64")).sum(1)
        np.testing.assert_allclose(total, 1, atol=1e-13 if dtype == "float64" else 1e-6)


@jax.jit
def all_and_some(hidden, kernel, bias, labels, tree):
    """Returns the log-probabilities of all classes, and of labels [K, N]."""
    states = jnp.broadcast_to(hidden, (*labels.shape, hidden.shape[1]))
    return (
        hierarchical_log_probs(hidden, kernel, tree, node_bias=bias),
        hierarchical_log_prob(states, kernel, labels, tree, node_bias=bias),
    )


@pytest.mark.parametrize("offset", [0.0, *OFFSETS])
@pytest.mark.parametrize("kind", ["balanced", "ternary", "huffman of 4", "wide"])
def test_far_logits_do_not_cancel(kind, offset):
    # The first child's logit is 0: among the others an offset is a common one.
    tree = cases.tree(kind, 30)
    random = np.random.default_rng(0)
    hidden = random.integers(-2, 3, (6, 4)).astype("float32")
    kernel = random.integers(-2, 3, (tree.num_rows, 4)).astype("float32")
    bias = np.full(tree.num_rows, np.round(offset), "float32")
    wide = [a.astype("float64") for a in (hidden, kernel, bias)]
    truth = cases.log_probs(tree, *wide)
    labels = np.tile(np.array([[0], [13], [29]]), 6)
    every, own = all_and_some(hidden, kernel, bias, labels, tree)
    np.testing.assert_allclose(every, truth, rtol=2e-6, atol=2e-6)
    expected = truth[np.arange(6), labels]
    np.testing.assert_allclose(own, expected, rtol=2e-6, atol=2e-6)


@jax.jit
def of_bands(layer, bands, offset):
    """Returns value, gradient and log-probabilities of a layer, and draws from it."""
    hidden, head, tails = layer
    tails = [
        AdaptiveTail(projection, kernel, jnp.full(kernel.shape[1], offset))
        for projection, kernel in tails
    ]
    head_bias = jnp.full(head.shape[1], offset)

    def loss(hidden):
        found = adaptive_log_probs(hidden, head, tails, bands, head_bias=head_bias)
        return found[:, ::7].sum(), found

    drawn = adaptive_sample(KEY, hidden, head, tails, bands, head_bias=head_bias)
    return jax.value_and_grad(loss, has_aux=True)(hidden), drawn


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_common_offset_changes_nothing_of_bands(offset):
    bands = ClassBands.in_order(40, (5, 15))
    random = np.random.default_rng(0)

    def integers(*shape):
        return random.integers(-2, 3, shape).astype("float32")

    hidden, head = integers(8, 4), integers(4, 7)
    tails = [(integers(4, 2), integers(2, classes)) for classes in bands.tails]
    plain, moved = (
        of_bands((hidden, head, tails), bands, np.float32(np.round(common)))
        for common in (0.0, offset)
    )
    for one, other in zip(*map(jax.tree.leaves, (plain, moved)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(plain[1], moved[1])
    assert (np.asarray(moved[0][0][1]) <= 0).all()


@jax.jit
@jax.value_and_grad
def sampled_loss(hidden, kernel, labels, offset):
    """Returns the loss of a layer over 30 classes whose biases are equal."""
    return sampled_softmax_loss(
        KEY,
        hidden,
        kernel,
        labels,
        20,
        sampler=ClassSampler.log_uniform(30),
        bias=jnp.full(30, offset),
    )


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_common_offset_changes_nothing_of_sampled_losses(offset):
    random = np.random.default_rng(0)
    hidden = random.integers(-2, 3, (8, 4)).astype("float32")
    kernel = random.integers(-2, 3, (4, 30)).astype("float32")
    labels = random.integers(0, 30, 8)
    plain, moved = (
        sampled_loss(hidden, kernel, labels, np.float32(np.round(common)))
        for common in (0.0, offset)
    )
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(one, other)


@functools.partial(jax.jit, static_argnames="tau")
def tempered(layers, trees, tau):
    """Returns the log-probabilities of layers, at a temperature that is known."""
    return [
        hierarchical_log_probs(hidden, kernel, tree, temperature=tau)
        for (hidden, kernel), tree in zip(layers, trees, strict=True)
    ]


@pytest.mark.parametrize("tau", [0.07, 0.7, 1.3, 1e4])
def test_huge_logits_are_the_same_under_jit(tau):
    trees = [cases.tree(kind, 5) for kind in ("balanced", "ternary", "wide")]
    plain = [cases.layer(tree, dtype="float32")[:2] for tree in trees]
    for scale in (1e9, 1e20, 1e30):
        layers = [(hidden, kernel * np.float32(scale)) for hidden, kernel in plain]
        compiled = tempered(layers, trees, tau)
        with jax.disable_jit():
            apart = tempered(layers, trees, tau)
        for own, other in zip(*jax.device_get((compiled, apart)), strict=True):
            own, other = np.exp(own), np.exp(other)
            np.testing.assert_allclose(own.sum(1), 1, atol=1e-6)
            np.testing.assert_allclose(own, other, atol=1e-6)


@functools.partial(jax.jit, static_argnames="name")
def masked_values(name, hidden, kernel, labels, keep) -> Any:
    """Returns a loss of hidden states, parameters and labels, and its gradients."""
    tree = ClassTree.huffman([5, 4, 3, 2, 1])
    if name == "rows":
        value, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree, weights=keep
        )
        return value, (dhidden, gradient.dense(tree.num_rows))

    def loss(hidden, kernel):
        if name == "alone":
            found = hierarchical_log_prob(hidden, kernel, labels, tree, weights=keep)
            return found.sum()
        sampler = ClassSampler.uniform(5)
        return sampled_softmax_loss(
            KEY, hidden, kernel, labels, 9, sampler=sampler, weights=keep
        )

    return jax.value_and_grad(loss, (0, 1))(hidden, kernel)


def masked_layer(name):
    """Returns a call with the odd tokens masked, and the arrays that it takes."""
    hidden, kernel, _ = cases.layer(ClassTree.balanced(5), dtype="float32")
    if name == "sampled":
        kernel = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")

    def call(hidden, labels, keep) -> Any:
        return jax.device_get(masked_values(name, hidden, kernel, labels, keep))

    return call, hidden, np.arange(6) % 2 == 0


@pytest.mark.parametrize("name", ["alone", "rows", "sampled"])
def test_masked_tokens_change_no_bit(name):
    call, hidden, keep = masked_layer(name)
    labels = np.array([0, 1, 2, 3, 4, 1])
    plain = call(hidden, labels, keep)
    for bad, label in ((np.nan, -100), (np.inf, -1), (1e30, 5)):
        other, ids = hidden.copy(), labels.copy()
        other[~keep], ids[~keep] = bad, label
        found = call(other, ids, keep)
        for one, leaf in zip(*map(jax.tree.leaves, (plain, found)), strict=True):
            assert np.isfinite(leaf).all()
            np.testing.assert_array_equal(one, leaf)
    # Not masked, such a label is a NaN: nothing is clamped or wrapped.
    for label in (-100, -1, 5, 2**31 - 1):
        ids = labels.copy()
        ids[0] = label
        assert np.isnan(call(hidden, ids, keep)[0])


@pytest.mark.parametrize("name", ["alone", "rows", "sampled"])
def test_all_tokens_masked(name):
    call, hidden, keep = masked_layer(name)
    hidden[1] = np.nan
    labels = np.array([0, -1, -100, 5, 4, 1])
    for leaf in jax.tree.leaves(call(hidden, labels, keep & False)):
        assert (np.asarray(leaf) == 0).all()


@functools.partial(jax.jit, static_argnames="arity")
def certain_choice(hidden, kernel, bias, tau, label, arity):
    """Returns the log-probability of a label beside others, with its gradients."""

    def value(hidden, tau):
        return hierarchical_log_prob(
            hidden,
            kernel,
            label[None],
            ClassTree.balanced(arity, arity),
            node_bias=bias,
            temperature=tau,
        ).sum()

    return jax.value_and_grad(value, (0, 1))(hidden, tau)


@pytest.mark.parametrize("tau", [0.7, 0.0, np.inf])
@pytest.mark.parametrize("arity", [2, 3])
def test_a_choice_without_alternative_is_certain(arity, tau):
    bias = np.full(arity - 1, -np.inf, "float32")
    layer = np.ones((1, 2), "float32"), np.ones((arity - 1, 2), "float32"), bias
    found = jax.device_get(certain_choice(*layer, np.float32(tau), np.int32(0), arity))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))
    other, _ = certain_choice(*layer, np.float32(0.7), np.int32(1), arity)
    assert other == -np.inf


def test_a_bias_of_minus_infinity_masks_what_is_below():
    tree, below = ClassTree.balanced(8), ClassTree.balanced(4)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    # The root's second child: classes 4 to 7.
    bias[0] = -np.inf
    labels = np.array([0, 1, 2, 3, 0, 1])

    def alone(layer, tree):
        hidden, kernel, bias = layer
        found = hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)
        return -found.mean()

    def of_all(layer):
        hidden, kernel, bias = layer
        every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
        return -every[jnp.arange(6), labels].mean(), every

    @jax.jit
    def results(layer, part):
        (value, every), gradients = jax.value_and_grad(of_all, has_aux=True)(layer)
        hidden, kernel, bias = layer
        loss, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree, node_bias=bias
        )
        found = {
            "alone": jax.value_and_grad(alone)(layer, tree),
            "all": (value, gradients),
            "rows": (loss, (dhidden, *gradient.dense(7))),
        }
        return every, found, jax.value_and_grad(alone)(part, below)

    rows = np.array([1, 3, 4])
    part = hidden, kernel[rows], bias[rows]
    every, results_by_name, truth = jax.device_get(
        results((hidden, kernel, bias), part)
    )
    assert (every[:, 4:] == -np.inf).all()
    np.testing.assert_allclose(np.exp(every).sum(1), 1, atol=1e-6)
    for value, gradients in results_by_name.values():
        np.testing.assert_allclose(value, truth[0], rtol=1e-6)
        np.testing.assert_allclose(gradients[0], truth[1][0], atol=1e-6)
        for own, other in zip(gradients[1:], truth[1][1:], strict=True):
            assert (np.delete(own, rows, axis=0) == 0).all()
            np.testing.assert_allclose(own[rows], other, atol=1e-6)


@jax.jit
def all_and_each(hidden, kernel, bias, tree):
    """Returns the log-probabilities of all classes, and of each for the first state."""
    every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
    labels = jnp.arange(tree.num_classes)
    states = jnp.broadcast_to(hidden[0], (len(labels), hidden.shape[1]))
    each = hierarchical_log_prob(states, kernel, labels, tree, node_bias=bias)
    return every, each


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_probabilities_of_a_thousand_classes_add_up(kind):
    tree = cases.tree(kind, 1000)
    layer = cases.layer(tree, dtype="float32", scale=3.0)
    every, each = map(np.asarray, all_and_each(*layer, tree))
    np.testing.assert_allclose(np.exp(every, dtype="float64").sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.exp(each, dtype="float64").sum(), 1, atol=1e-5)
    np.testing.assert_allclose(each, every[0], rtol=1e-5, atol=1e-5)
