"""Samples of stored logits: whether they follow the probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests import truth
from tests.statistics import chi_square

KEY = jax.random.key(3)


def draws_of_one_row(x, number, rows=1, temperature=1.0):
    """Draws of one row of logits in many places, under many keys."""

    @jax.jit
    def draw(keys, x):
        logits = jnp.broadcast_to(x, (rows, x.shape[0]))
        one = functools.partial(jaxsoft.sample, logits=logits, temperature=temperature)
        return jax.vmap(one)(keys)

    return np.asarray(draw(jax.random.split(KEY, number // rows), x)).reshape(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    ("classes", "number", "rows"),
    [(3, 40_000, 40_000), (1000, 20_000, 10_000), (100_003, 8000, 16)],
)
@pytest.mark.many_cases
def test_frequencies(classes, number, rows, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    rng = np.random.default_rng(1)
    x = (2 * rng.standard_normal(classes)).astype(dtype)
    p = truth.softmax(np.asarray(x, np.float64), 0.8)
    drawn = draws_of_one_row(x, number, rows, temperature=0.8)
    assert drawn.dtype == np.int32
    assert drawn.min() >= 0 and drawn.max() < classes
    assert chi_square(drawn, p) > 1e-4
    # The rarest classes appear at their rate, all of them together.
    rare = np.argsort(p)[: max(1, np.searchsorted(np.cumsum(np.sort(p)), 0.05))]
    share, due = np.isin(drawn, rare).mean(), p[rare].sum()
    assert abs(share - due) < 4 * np.sqrt(due / drawn.size)


def test_classes_of_tiny_probability_appear_at_their_rate():
    tail, place = 2**16, 40_000
    # The others have 2^-24 each and 2^-8 together.
    x = np.zeros(tail + 1, "float32")
    x[place] = np.log(tail * 255.0)
    drawn = draws_of_one_row(x, 2**18)
    others = drawn[drawn != place]
    due = drawn.size / 256
    assert abs(others.size - due) < 5 * np.sqrt(due)
    assert len(np.unique(others)) > 0.97 * others.size
    assert chi_square(others * 32 // (tail + 1), np.full(32, 1 / 32)) > 1e-4


def test_rows_without_classes_or_with_nan_give_no_class():
    """Draws are -1 at every temperature, given once or for each row."""
    rows, classes = 40, 1000
    hidden = np.random.default_rng(0).standard_normal((rows, 4)).astype("float32")
    kernel = np.random.default_rng(1).standard_normal((4, classes)).astype("float32")
    nan = kernel.copy()
    nan[0, 500] = np.nan
    nothing = jnp.zeros(classes, bool)
    key = jax.random.key(0)
    of_rows = np.tile(np.array([0, 0.5, 1, np.inf], "float32"), rows // 4)
    for found in (
        jaxsoft.sample(key, hidden @ kernel, of_rows, where=nothing),
        jaxsoft.sample(key, hidden @ nan, of_rows),
        jaxsoft.sample(key, hidden @ nan, 0.0),
        jaxsoft.linear_sample(
            key, hidden, kernel, temperature=of_rows, class_mask=nothing
        ),
        jaxsoft.linear_sample(key, hidden, nan, temperature=of_rows),
    ):
        np.testing.assert_array_equal(found, -1)
