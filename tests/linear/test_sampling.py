"""Samples: right frequencies, and the same draws for every tile size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_sample
from tests import truth
from tests.linear import cases
from tests.statistics import chi_square

TILE = 4 * 8 * 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("classes", [1000, 100_003])
@pytest.mark.many_cases
def test_frequencies(classes, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    rng = np.random.default_rng(1)
    logits = jnp.asarray(2 * rng.standard_normal((1, classes)), dtype)
    p = truth.softmax(np.asarray(logits, np.float64), 0.8)[0]
    rows = 20_000 if classes == 1000 else 4_000
    sample = jax.jit(functools.partial(linear_sample, temperature=0.8))
    drawn = [
        sample(jax.random.key(seed), jnp.ones((rows, 1), dtype), logits)
        for seed in range(3)
    ]
    drawn = np.concatenate(drawn)
    assert drawn.min() >= 0 and drawn.max() < classes
    assert chi_square(drawn, p) > 1e-4
    # Every kind of class appears at its rate, the rarest half of the mass included.
    rare = np.argsort(p)[: np.searchsorted(np.cumsum(np.sort(p)), 0.05)]
    share = np.isin(drawn, rare).mean()
    assert abs(share - p[rare].sum()) < 4 * np.sqrt(0.05 / drawn.size)


@pytest.mark.parametrize("classes", [1, 128, 129, 1000, 4099])
@pytest.mark.many_cases
def test_the_same_for_every_tile_size(classes):
    hidden, kernel, _ = cases.layer(30, 8, classes)
    key = jax.random.key(2)
    draws = [
        linear_sample(key, hidden, kernel, tile_bytes=budget)
        for budget in (1, TILE, 8 * TILE, 2**25)
    ]
    for drawn in draws[1:]:
        np.testing.assert_array_equal(drawn, draws[0])
    by_table = linear_sample(key, hidden, kernel.T, kernel_layout="vh")
    np.testing.assert_array_equal(by_table, draws[0])
    assert draws[0].min() >= 0 and draws[0].max() < classes


def test_a_row_depends_on_its_place_alone():
    hidden, kernel, _ = cases.layer(24, 8, 700)
    key = jax.random.key(0)
    drawn = linear_sample(key, hidden, kernel)
    folded = linear_sample(key, hidden.reshape(2, 3, 4, 8), kernel)
    np.testing.assert_array_equal(folded.reshape(24), drawn)
    np.testing.assert_array_equal(linear_sample(key, hidden[:5], kernel), drawn[:5])
    same = linear_sample(key, jnp.broadcast_to(hidden[:1], hidden.shape), kernel)
    assert len(np.unique(same)) > 5


def test_vmap_over_keys_and_rows():
    hidden, kernel, _ = cases.layer(12, 8, 300)
    keys = jax.random.split(jax.random.key(1), 3)
    mapped = jax.vmap(linear_sample, (0, 0, None))(
        keys, hidden.reshape(3, 4, 8), kernel
    )
    for key, rows, drawn in zip(keys, hidden.reshape(3, 4, 8), mapped, strict=True):
        np.testing.assert_array_equal(linear_sample(key, rows, kernel), drawn)


def test_offsets_change_no_sample():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(np.round(rng.standard_normal((1, 900)) * 4) / 4, jnp.float32)
    ones, key = jnp.ones((50, 1)), jax.random.key(4)
    plain = linear_sample(key, ones, logits)
    for offset in (1e4, 1e6, -1e6):
        moved = linear_sample(key, ones, logits + offset)
        np.testing.assert_array_equal(plain, moved)


def test_temperatures():
    hidden, kernel, _ = cases.layer(40, 8, 700, kind="peaked")
    key = jax.random.key(0)
    u = np.asarray(hidden @ kernel)
    for tau in (0.0, 1e-38, jnp.zeros(40)):
        drawn = linear_sample(key, hidden, kernel, temperature=tau)
        np.testing.assert_array_equal(drawn, u.argmax(1))
    tau = jnp.where(jnp.arange(40) < 20, 0.0, 1.5)
    mixed = linear_sample(key, hidden, kernel, temperature=tau)
    np.testing.assert_array_equal(mixed[:20], u[:20].argmax(1))
    hot = linear_sample(key, jnp.ones((3000, 8)), kernel, temperature=jnp.inf)
    assert chi_square(np.asarray(hot), np.full(700, 1 / 700)) > 1e-4
    ties = jnp.zeros((1, 700)).at[0, jnp.asarray([300, 650])].set(1.0)
    cold = linear_sample(key, jnp.ones((9, 1)), ties, temperature=0.0)
    np.testing.assert_array_equal(cold, 300)
    traced = jax.jit(lambda tau: linear_sample(key, hidden, kernel, temperature=tau))
    np.testing.assert_array_equal(traced(-1.0), -1)


def test_dropped_classes_and_empty_rows():
    hidden, kernel, _ = cases.layer(50, 8, 500)
    mask = jnp.arange(500) % 7 == 3
    key = jax.random.key(0)
    drawn = linear_sample(key, hidden, kernel, class_mask=mask)
    assert (np.asarray(drawn) % 7 == 3).all()
    bias = jnp.where(mask, 0.0, -jnp.inf)
    np.testing.assert_array_equal(linear_sample(key, hidden, kernel, bias=bias), drawn)
    none = linear_sample(key, hidden, kernel, class_mask=jnp.zeros(500, bool))
    np.testing.assert_array_equal(none, -1)
    lost = linear_sample(key, hidden.at[3].set(jnp.nan), kernel)
    assert lost[3] == -1 and (np.asarray(lost)[[0, 1, 2, 4]] >= 0).all()
    assert linear_sample(key, hidden[:0], kernel).shape == (0,)


def test_samples_have_no_derivative():
    hidden, kernel, _ = cases.layer(4, 8, 30)

    def drawn(hidden):
        ids = linear_sample(jax.random.key(0), hidden, kernel)
        return hidden[:, 0].sum() + 0 * ids.astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(drawn)(hidden)[:, 1:], 0)


def test_only_one_implementation():
    hidden, kernel, _ = cases.layer(6, 8, 30)
    with pytest.raises(NotImplementedError, match="for linear_sample"):
        linear_sample(jax.random.key(0), hidden, kernel, implementation="reference")
