"""Laws of numerics that every tree, sampler and band must keep."""

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
    every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
    np.testing.assert_allclose(every, truth, rtol=2e-6, atol=2e-6)
    for label in (0, 13, 29):
        labels = np.full(6, label)
        found = hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)
        np.testing.assert_allclose(found, truth[:, label], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_common_offset_changes_nothing_of_bands(offset):
    bands = ClassBands.in_order(40, (5, 15))
    random = np.random.default_rng(0)

    def integers(*shape):
        return random.integers(-2, 3, shape).astype("float32")

    hidden, head = integers(8, 4), integers(4, 7)
    tails = [(integers(4, 2), integers(2, classes)) for classes in bands.tails]

    def call(offset):
        def loss(hidden):
            found = adaptive_log_probs(
                hidden,
                head,
                [
                    AdaptiveTail(*tail, jnp.full(tail[1].shape[1], offset))
                    for tail in tails
                ],
                bands,
                head_bias=jnp.full(7, offset),
            )
            return found[:, ::7].sum(), found

        drawn = adaptive_sample(
            KEY,
            hidden,
            head,
            [AdaptiveTail(*tail, jnp.full(tail[1].shape[1], offset)) for tail in tails],
            bands,
            head_bias=jnp.full(7, offset),
        )
        return jax.value_and_grad(loss, has_aux=True)(hidden), drawn

    plain, moved = call(jnp.float32(0)), call(jnp.float32(np.round(offset)))
    for one, other in zip(*map(jax.tree.leaves, (plain, moved)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(plain[1], moved[1])
    assert (np.asarray(moved[0][0][1]) <= 0).all()


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_common_offset_changes_nothing_of_sampled_losses(offset):
    random = np.random.default_rng(0)
    hidden = random.integers(-2, 3, (8, 4)).astype("float32")
    kernel = random.integers(-2, 3, (4, 30)).astype("float32")
    labels = random.integers(0, 30, 8)
    sampler = ClassSampler.log_uniform(30)

    def loss(hidden, offset):
        bias = jnp.full(30, np.float32(offset))
        return sampled_softmax_loss(
            KEY, hidden, kernel, labels, 20, sampler=sampler, bias=bias
        )

    plain = jax.value_and_grad(loss)(hidden, 0.0)
    moved = jax.value_and_grad(loss)(hidden, np.round(offset))
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scale", [1e9, 1e20, 1e30])
@pytest.mark.parametrize("tau", [0.07, 0.7, 1.3, 1e4])
def test_huge_logits_are_the_same_under_jit(tau, scale):
    for kind in ("balanced", "ternary", "wide"):
        tree = cases.tree(kind, 13)
        hidden, kernel, _ = cases.layer(tree, dtype="float32")
        options: dict[str, Any] = {"temperature": tau}
        arguments = (hidden, kernel * np.float32(scale), tree)
        eager = np.exp(hierarchical_log_probs(*arguments, **options))
        with jax.disable_jit():
            apart = np.exp(hierarchical_log_probs(*arguments, **options))
        np.testing.assert_allclose(eager.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(eager, apart, atol=1e-6)


def masked_values(name):
    """Returns a loss of hidden states, parameters and labels, the odd tokens masked."""
    tree = ClassTree.huffman([5, 4, 3, 2, 1])
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    keep = np.arange(6) % 2 == 0
    if name == "sampled":
        kernel = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")

    def call(hidden, labels, keep) -> Any:
        if name == "rows":
            value, dhidden, gradient = hierarchical_value_and_row_grad(
                hidden, kernel, labels, tree, weights=keep
            )
            return value, (dhidden, gradient.dense(tree.num_rows))

        def loss(hidden, kernel):
            if name == "alone":
                found = hierarchical_log_prob(hidden, kernel, labels, tree, where=keep)
                return found.sum()
            return sampled_softmax_loss(
                KEY,
                hidden,
                kernel,
                labels,
                9,
                sampler=ClassSampler.uniform(5),
                weights=keep,
            )

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    return call, hidden, keep


@pytest.mark.parametrize("name", ["alone", "rows", "sampled"])
def test_masked_tokens_change_no_bit(name):
    call, hidden, keep = masked_values(name)
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
    call, hidden, keep = masked_values(name)
    hidden[1] = np.nan
    labels = np.array([0, -1, -100, 5, 4, 1])
    for leaf in jax.tree.leaves(call(hidden, labels, keep & False)):
        assert (np.asarray(leaf) == 0).all()


@pytest.mark.parametrize("tau", [0.7, 0.0, np.inf])
@pytest.mark.parametrize("arity", [2, 3])
def test_a_choice_without_alternative_is_certain(arity, tau):
    tree = ClassTree.balanced(arity, arity)
    bias = np.full(arity - 1, -np.inf, "float32")
    hidden, kernel = np.ones((1, 2), "float32"), np.ones((arity - 1, 2), "float32")

    def value(hidden, tau, label):
        return hierarchical_log_prob(
            hidden, kernel, np.array([label]), tree, node_bias=bias, temperature=tau
        ).sum()

    found = jax.value_and_grad(value, (0, 1))(hidden, jnp.float32(tau), 0)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(found))
    assert value(hidden, jnp.float32(0.7), 1) == -np.inf


@pytest.mark.parametrize("name", ["alone", "all", "rows"])
def test_a_bias_of_minus_infinity_masks_what_is_below(name):
    tree = ClassTree.balanced(8)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    # The root's second child: classes 4 to 7.
    bias[0] = -np.inf
    labels = np.array([0, 1, 2, 3, 0, 1])

    def loss(layer) -> Any:
        hidden, kernel, bias = layer
        if name == "all":
            every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
            return -every[jnp.arange(6), labels].mean()
        found = hierarchical_log_prob(hidden, kernel, labels, tree, node_bias=bias)
        return -found.mean()

    every = hierarchical_log_probs(hidden, kernel, tree, node_bias=bias)
    assert (np.asarray(every)[:, 4:] == -np.inf).all()
    np.testing.assert_allclose(np.exp(every).sum(1), 1, atol=1e-6)
    if name == "rows":
        value, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree, node_bias=bias
        )
        found = (value, (dhidden, *gradient.dense(7)))
    else:
        found = jax.value_and_grad(loss)((hidden, kernel, bias))
    below = ClassTree.balanced(4)
    rows = np.array([1, 3, 4])

    def alone(layer):
        hidden, kernel, bias = layer
        found = hierarchical_log_prob(hidden, kernel, labels, below, node_bias=bias)
        return -found.mean()

    truth = jax.value_and_grad(alone)((hidden, kernel[rows], bias[rows]))
    np.testing.assert_allclose(found[0], truth[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][0], truth[1][0], atol=1e-6)
    for own, other in zip(found[1][1:], truth[1][1:], strict=True):
        assert (np.delete(np.asarray(own), rows, axis=0) == 0).all()
        np.testing.assert_allclose(own[rows], other, atol=1e-6)
