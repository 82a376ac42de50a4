"""Labels of every integer dtype, and NumPy's integers where an int is taken."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

FEATURES = 4


@functools.cache
def calls(classes):
    """Returns the functions of labels alone, at a number of classes."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    hidden, kernel = normal(3, FEATURES), normal(FEATURES, classes)
    logits, nodes = normal(3, classes), normal(classes - 1, FEATURES)
    tree = jaxsoft.ClassTree.balanced(classes)
    bands = jaxsoft.ClassBands.in_order(classes, (20,))
    head = normal(FEATURES, 21)
    tails = [jaxsoft.AdaptiveTail(normal(FEATURES, 2), normal(2, classes - 20))]
    sampler = jaxsoft.ClassSampler.log_uniform(classes)
    key = jax.random.key(0)
    return {
        "softmax_cross_entropy": lambda y: jaxsoft.softmax_cross_entropy(logits, y),
        "fit_temperature": lambda y: jaxsoft.fit_temperature(logits, y).nll,
        "expected_calibration_error": lambda y: jaxsoft.expected_calibration_error(
            jaxsoft.softmax(logits), y
        ),
        "linear_cross_entropy": lambda y: jaxsoft.linear_cross_entropy(
            hidden, kernel, y, reduction="none"
        ),
        "linear_log_prob": lambda y: jaxsoft.linear_log_prob(hidden, kernel, y)[0],
        "linear_log_prob_at": lambda y: jaxsoft.linear_log_prob_at(
            hidden, kernel, y[:, None]
        ),
        "linear_statistics": lambda y: (
            jaxsoft.linear_statistics(hidden, kernel, y).log_prob
        ),
        "linear_fit_temperature": lambda y: (
            jaxsoft.linear_fit_temperature(hidden, kernel, y).nll
        ),
        "hierarchical_log_prob": lambda y: jaxsoft.hierarchical_log_prob(
            hidden, nodes, y, tree
        ),
        "adaptive_log_prob": lambda y: jaxsoft.adaptive_log_prob(
            hidden, head, tails, y, bands
        ),
        "sampled_softmax_loss": lambda y: jaxsoft.sampled_softmax_loss(
            key, hidden, kernel, y, 8, sampler=sampler, reduction="none"
        ),
        "sampler": lambda y: sampler.log_prob(y),
        "supervised_contrastive": lambda y: jaxsoft.supervised_contrastive(hidden, y),
        "in_batch_cross_entropy": lambda y: jaxsoft.in_batch_cross_entropy(
            hidden, hidden, None, y
        ),
    }


@pytest.mark.parametrize("name", calls(256))
def test_narrow_labels(name):
    """V = 256 is 0 in uint8 and 0 in int8; the labels are classes all the same."""
    call = calls(256)[name]
    for dtype, labels in (("uint8", (0, 128, 255)), ("int8", (0, 5, 127))):
        wide = np.asarray(call(jnp.asarray(labels, "int32")))
        assert np.isfinite(wide).all()
        np.testing.assert_array_equal(call(jnp.asarray(labels, dtype)), wide)
        np.testing.assert_array_equal(call(np.asarray(labels, dtype)), wide)


def test_sixteen_bits():
    """V = 65,536 is 0 in uint16: what a file of tokens has."""
    logits = np.random.default_rng(0).standard_normal((3, 65536)).astype("float32")
    labels = np.array([0, 32768, 65535])
    wide = jaxsoft.softmax_cross_entropy(logits, labels)
    assert np.isfinite(wide).all()
    narrow = jaxsoft.softmax_cross_entropy(logits, labels.astype("uint16"))
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2**32, -(2**40)]),
        np.array([2**32 - 1, 2**31], "uint32"),
        jnp.array([2**32 - 1, 2**31], "uint32"),
        np.array([2**64 - 1, 2**32], "uint64"),
    ],
    ids=["int64", "uint32", "traced uint32", "uint64"],
)
def test_labels_beyond_int32_are_no_classes(labels):
    """The low 32 bits of some are a class; none of them is one."""
    logits = jnp.zeros((2, 8))
    assert np.isnan(jaxsoft.softmax_cross_entropy(logits, labels)).all()
    if not isinstance(labels, np.ndarray):
        found = jax.jit(jaxsoft.softmax_cross_entropy)(logits, labels)
        assert np.isnan(found).all()


def test_integers_of_numpy():
    """A NumPy integer is an int wherever one is taken."""
    one: Any = np.int64(1)
    ignored: Any = np.int64(-100)
    last: Any = np.int64(-1)
    three: Any = np.int64(3)
    hidden, kernel, labels = jnp.ones((2, 4)), jnp.ones((4, 8)), jnp.array([1, -100])
    loss = jaxsoft.linear_cross_entropy(hidden, kernel, labels, ignore_label=ignored)
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
    assert jaxsoft.linear_top_k(hidden, kernel, one)[1].shape == (2, 1)
    key, logits = jax.random.key(0), jnp.zeros((2, 8))
    assert jaxsoft.gumbel_top_k(key, logits, one)[1].shape == (2, 1)
    jaxsoft.sample(key, logits, top_k=one, axis=last)
    jaxsoft.expected_calibration_error(jaxsoft.softmax(logits), labels, three)
    with pytest.raises(TypeError, match="`ignore_label` must be an int"):
        jaxsoft.linear_cross_entropy(hidden, kernel, labels, ignore_label=True)


def test_groups_of_large_labels():
    """Labels that are no class ids, such as hashes, stay apart."""
    embeddings = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
    labels = np.array([0, 1, 2, 0, 1, 2])
    small = jaxsoft.supervised_contrastive(embeddings, labels)
    for large in (labels + 2**40, (labels + 2**31).astype("uint32")):
        found = jaxsoft.supervised_contrastive(embeddings, large)
        np.testing.assert_allclose(found, small, rtol=1e-6)
    found = jaxsoft.supervised_contrastive(embeddings, jnp.asarray(large))
    np.testing.assert_allclose(found, small, rtol=1e-6)


def test_ignored_labels_beyond_int32():
    """A label is ignored that only its own dtype holds; no other is."""
    logits = jnp.zeros((3, 4))
    for labels, ignored in (
        (jnp.array([1, 2**32 - 1, 2**32 - 2], "uint32"), 2**32 - 1),
        (np.array([1, -(2**40), -(2**41)]), -(2**40)),
    ):
        found = jaxsoft.softmax_cross_entropy(logits, labels, ignore_label=ignored)
        np.testing.assert_allclose(found, [np.log(4), 0, np.nan], rtol=1e-6)
        found = jaxsoft.linear_cross_entropy(
            jnp.zeros((3, 2)),
            jnp.zeros((2, 4)),
            labels,
            ignore_label=ignored,
            reduction="none",
        )
        np.testing.assert_allclose(found, [np.log(4), 0, np.nan], rtol=1e-6)
