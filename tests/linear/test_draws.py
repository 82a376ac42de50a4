"""Samples of a layer: the same for every tile size, limits, and what they depend on.

One shape serves most tests, since a sampler of another is another program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

from jaxsoft import linear_sample
from tests.linear import cases
from tests.statistics import chi_square

TILE = 4 * 8 * 256
KEY = jax.random.key(2)
ROWS, CLASSES = 40, 700
HIDDEN, KERNEL = map(np.asarray, cases.layer(ROWS, 8, CLASSES)[:2])


def draw(hidden: ArrayLike = HIDDEN, kernel: ArrayLike = KERNEL, **options):
    return np.asarray(linear_sample(KEY, hidden, kernel, **options))


def with_logits(logits):
    """Returns a layer of the shape of the others, all rows of which have logits."""
    hidden, kernel = np.zeros_like(HIDDEN), np.zeros_like(KERNEL)
    hidden[:, 0], kernel[0] = 1, logits
    return hidden, kernel


@pytest.mark.parametrize("classes", [1, 128, 129, 1000, 4099])
@pytest.mark.many_cases
def test_the_same_for_every_tile_size(classes):
    hidden, kernel, _ = cases.layer(30, 8, classes)
    kernel = np.asarray(kernel)
    draws = [
        draw(hidden, kernel, workspace_bytes=budget)
        for budget in (1, TILE, 8 * TILE, 2**25)
    ]
    for drawn in draws[1:]:
        np.testing.assert_array_equal(drawn, draws[0])
    by_table = draw(hidden, kernel.T, kernel_layout="vh")
    np.testing.assert_array_equal(by_table, draws[0])
    assert draws[0].min() >= 0 and draws[0].max() < classes


def test_a_row_depends_on_its_place_alone():
    drawn = draw()
    folded = draw(HIDDEN.reshape(2, 5, 4, 8))
    np.testing.assert_array_equal(folded.reshape(ROWS), drawn)
    np.testing.assert_array_equal(draw(HIDDEN[:5]), drawn[:5])
    same = draw(np.broadcast_to(HIDDEN[:1], HIDDEN.shape))
    assert len(np.unique(same[:24])) > 5


def test_vmap_over_keys_and_rows():
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = HIDDEN[:15].reshape(3, 5, 8)
    mapped = jax.vmap(linear_sample, (0, 0, None))(keys, hidden, KERNEL)
    for key, rows, drawn in zip(keys, hidden, mapped, strict=True):
        np.testing.assert_array_equal(linear_sample(key, rows, KERNEL), drawn)


def test_offsets_change_no_sample():
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal(CLASSES) * 4) / 4
    plain = draw(*with_logits(logits))
    for offset in (1e4, 1e6, -1e6):
        np.testing.assert_array_equal(draw(*with_logits(logits + offset)), plain)


def test_temperatures():
    hidden, kernel, _ = map(np.asarray, cases.layer(ROWS, 8, CLASSES, kind="peaked"))
    u = hidden @ kernel
    for tau in (0.0, 1e-38, np.zeros(ROWS, "float32")):
        drawn = draw(hidden, kernel, temperature=tau)
        np.testing.assert_array_equal(drawn, u.argmax(1))
    tau = np.where(np.arange(ROWS) < 20, 0.0, 1.5).astype("float32")
    mixed = draw(hidden, kernel, temperature=tau)
    np.testing.assert_array_equal(mixed[:20], u[:20].argmax(1))
    hot = draw(np.ones((3000, 8), "float32"), kernel, temperature=np.inf)
    assert chi_square(hot, np.full(CLASSES, 1 / CLASSES)) > 1e-4
    ties = with_logits(np.isin(np.arange(CLASSES), [300, 650]))
    # In one tile, and in two.
    for budget in (None, 1):
        cold = draw(*ties, temperature=0.0, workspace_bytes=budget)
        np.testing.assert_array_equal(cold, 300)
    traced = jax.jit(lambda tau: linear_sample(KEY, hidden, kernel, temperature=tau))
    np.testing.assert_array_equal(traced(-1.0), -1)


def test_dropped_classes_and_empty_rows():
    mask = np.arange(CLASSES) % 7 == 3
    drawn = draw(class_mask=mask)
    assert (drawn % 7 == 3).all()
    bias = np.where(mask, 0.0, -np.inf).astype("float32")
    np.testing.assert_array_equal(draw(bias=bias), drawn)
    np.testing.assert_array_equal(draw(class_mask=np.zeros(CLASSES, bool)), -1)
    hidden = HIDDEN.copy()
    hidden[3] = np.nan
    lost = draw(hidden)
    assert lost[3] == -1 and (np.delete(lost, 3) >= 0).all()
    assert draw(HIDDEN[:0]).shape == (0,)


def test_samples_have_no_derivative():
    @jax.jit
    @jax.grad
    def gradient(hidden):
        ids = linear_sample(KEY, hidden, KERNEL)
        return hidden[:, 0].sum() + 0 * ids.astype(jnp.float32).sum()

    np.testing.assert_array_equal(gradient(HIDDEN)[:, 1:], 0)


def test_only_one_implementation():
    with pytest.raises(NotImplementedError, match="for linear_sample"):
        draw(implementation="reference")
