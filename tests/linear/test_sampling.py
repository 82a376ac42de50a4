"""Samples of a layer: whether they follow the probabilities."""

import functools

import jax
import numpy as np
import pytest

from jaxsoft import linear_sample
from tests import truth
from tests.statistics import chi_square


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("classes", [1000, 20_011])
@pytest.mark.many_cases
def test_frequencies(classes, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    rng = np.random.default_rng(1)
    logits = (2 * rng.standard_normal((1, classes))).astype(dtype)
    p = truth.softmax(np.asarray(logits, np.float64), 0.8)[0]
    rows = 20_000 if classes == 1000 else 4_000
    sample = jax.jit(functools.partial(linear_sample, temperature=0.8))
    drawn = [
        sample(jax.random.key(seed), np.ones((rows, 1), dtype), logits)
        for seed in range(3)
    ]
    drawn = np.concatenate(drawn)
    assert drawn.min() >= 0 and drawn.max() < classes
    assert chi_square(drawn, p) > 1e-4
    # Every kind of class appears at its rate, the rarest half of the mass included.
    rare = np.argsort(p)[: np.searchsorted(np.cumsum(np.sort(p)), 0.05)]
    share = np.isin(drawn, rare).mean()
    assert abs(share - p[rare].sum()) < 4 * np.sqrt(0.05 / drawn.size)
