"""Samples of stored logits: their limits, and what a draw depends on.

One shape serves most tests, since a sampler of another is another program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

import jaxsoft
from jaxsoft._core import block_sampling, noise
from tests import truth
from tests.hierarchical.test_export import check_round_trip
from tests.statistics import chi_square

KEY = jax.random.key(3)
ROWS, CLASSES = 3000, 300
X = truth.logits("unit", (ROWS, CLASSES))


def draw(x: ArrayLike = X, temperature: ArrayLike = 1.0, **options):
    return np.asarray(jaxsoft.sample(KEY, x, temperature, **options))


def column(tau):
    """Returns a traced temperature of each row."""
    return np.full((ROWS, 1), tau, "float32")


@pytest.mark.parametrize("classes", [1, 127, 128, 129, 4099])
@pytest.mark.many_cases
def test_the_classes_of_linear_sample(classes):
    x = truth.logits("unit", (30, classes))
    tau = np.tile(np.asarray([0.0, 0.7, np.inf], "float32"), 10)
    drawn = jaxsoft.sample(KEY, x, tau[:, None])
    identity = np.eye(30, dtype="float32")
    linear = jaxsoft.linear_sample(KEY, identity, x, temperature=tau)
    assert (drawn != linear).sum() <= 1


def test_a_row_that_overflows_changes_no_other():
    # The largest logit of a row's first block is what the quick path centres on.
    overflowing, dropped = X.copy(), X.copy()
    overflowing[0, 250] = 200
    dropped[0, :128] = -np.inf
    plain = draw()
    for other, least in ((overflowing, 250), (dropped, 128)):
        drawn = draw(other)
        assert drawn[0] == 250 if least == 250 else drawn[0] >= 128
        assert (plain[1:] != drawn[1:]).sum() <= 3

    @jax.jit
    def draw_whole(key, x):
        words = noise.row_words(key, ROWS)
        return block_sampling.draw(x, 1.0, words, 0, 128).class_id

    assert (plain != draw_whole(KEY, X)).sum() <= 3


def test_a_first_block_far_below_or_above_the_rest():
    for shift in (-80, 80):
        moved = X.copy()
        moved[:, :128] += shift
        drawn = draw(moved)
        assert ((drawn < 128) == (shift > 0)).all()
        assert len(np.unique(drawn)) > 30


def test_a_row_depends_on_its_place_alone():
    drawn = draw()
    np.testing.assert_array_equal(draw(X[:5]), drawn[:5])
    folded = draw(X.reshape(50, 3, 20, CLASSES))
    np.testing.assert_array_equal(folded, drawn.reshape(50, 3, 20))
    moved = draw(np.moveaxis(X.reshape(60, 50, CLASSES), -1, 1), axis=1)
    np.testing.assert_array_equal(moved, drawn.reshape(60, 50))
    np.testing.assert_array_equal(draw(X[0]), drawn[0])
    same = draw(np.broadcast_to(X[:1], X.shape))
    assert same[0] == drawn[0] and len(np.unique(same[:24])) > 10
    signs = np.where(np.arange(ROWS) % 2 == 0, -1, 1).astype("float32")
    changed = draw(X * signs[:, None])
    np.testing.assert_array_equal(changed[1::2], drawn[1::2])


def test_vmap_over_keys_and_rows():
    x = X[:15].reshape(3, 5, CLASSES)
    keys = jax.random.split(KEY, 3)
    apart = jax.vmap(jaxsoft.sample)(keys, x)
    one = np.asarray(jax.vmap(jaxsoft.sample, (0, None))(keys, x[0]))
    for i in range(3):
        np.testing.assert_array_equal(jaxsoft.sample(keys[i], x[i]), apart[i])
        np.testing.assert_array_equal(jaxsoft.sample(keys[i], x[0]), one[i])
    assert (one[0] != one[1]).any()


def test_offsets_change_no_sample():
    rng = np.random.default_rng(0)
    x = rng.integers(-6, 4, X.shape).astype("float32")
    plain = draw(x, 1.5)
    for offset in (1e4, 1e5, -1e6, 1e7, -1e7):
        np.testing.assert_array_equal(draw(x + np.float32(offset), 1.5), plain)


def test_zero_temperature_gives_the_lowest_argmax():
    x = np.random.default_rng(0).integers(-3, 4, X.shape).astype("float32")
    x[:, 100] = x[:, 280] = 5
    x[7] = np.where(np.arange(CLASSES) == 4, -0.0, np.minimum(x[7], 0))
    best = x.argmax(1)
    for tau in (0.0, 1e-38):
        np.testing.assert_array_equal(draw(x, column(tau)), best)
    np.testing.assert_array_equal(draw(x, np.float32(0)), best)
    np.testing.assert_array_equal(draw(x, 0.0), best)
    rows = np.arange(ROWS)[:, None]
    tau = np.where(rows < 20, 0.0, np.where(rows < 30, np.inf, 1.0)).astype("float32")
    mixed = draw(x, tau)
    np.testing.assert_array_equal(mixed[:20], best[:20])
    np.testing.assert_array_equal(mixed[30:], draw(x, column(1.0))[30:])
    assert (mixed[20:30] != best[20:30]).all()


@pytest.mark.parametrize("tau", [np.inf, column(np.inf)], ids=["known", "traced"])
def test_infinite_temperature_is_uniform_over_kept_classes(tau):
    x = np.random.default_rng(0).standard_normal(CLASSES).astype("float32") * 30
    x[::7] = -np.inf
    logits = np.broadcast_to(x, X.shape)
    drawn = [jaxsoft.sample(key, logits, tau) for key in jax.random.split(KEY, 3)]
    drawn = np.concatenate(drawn)
    kept = np.flatnonzero(x > -np.inf)
    assert np.isin(drawn, kept).all()
    rates = np.full(kept.size, 1 / kept.size)
    assert chi_square(np.searchsorted(kept, drawn), rates) > 1e-4


def test_dropped_classes():
    mask = np.random.default_rng(1).random((40, CLASSES)) < 0.1
    folded = X.reshape(75, 40, CLASSES)
    drawn = draw(folded, where=mask)
    assert mask[np.arange(40)[None], drawn].all()
    by_logits = draw(np.where(mask, folded, -np.inf).astype("float32"))
    np.testing.assert_array_equal(by_logits, drawn)
    # Rows that keep one class, in the last block, and rows that keep none.
    last = np.arange(CLASSES) == CLASSES - 1
    np.testing.assert_array_equal(draw(where=last), CLASSES - 1)
    np.testing.assert_array_equal(draw(where=np.zeros(CLASSES, bool)), -1)
    assert draw(folded[:, :0]).shape == (75, 0)


def test_rows_without_a_sample_disturb_no_other():
    x = X[:12]
    bad = x.copy()
    bad[1] = -np.inf
    bad[2, 5], bad[3, 299] = np.nan, np.nan
    bad[4, 5], bad[5, 299], bad[6] = np.inf, np.inf, np.inf
    # What is dropped is nothing.
    bad[7, 9], bad[8, 9] = np.nan, np.inf
    mask = np.ones(x.shape, bool)
    mask[7, 9] = mask[8, 9] = False
    traced = [np.full((12, 1), tau, "float32") for tau in (0.0, 1.0, 2.5, np.inf)]
    for tau in (0.0, 1.0, np.inf, *traced):
        plain, drawn = (draw(a, tau, where=mask) for a in (x, bad))
        np.testing.assert_array_equal(drawn[1:7], -1)
        np.testing.assert_array_equal(drawn[7:], plain[7:])
        assert drawn[0] == plain[0] >= 0


def test_traced_temperatures_out_of_their_range():
    sample = jax.jit(jaxsoft.sample)
    for wrong in (-1.0, np.nan, -np.inf):
        tau = column(1.0)
        tau[1], tau[2], tau[3] = wrong, 0.0, 2.0
        drawn = np.asarray(sample(KEY, X, tau))
        assert drawn[1] == -1 and (np.delete(drawn, 1) >= 0).all()
    np.testing.assert_array_equal(sample(KEY, X, np.float32(-2)), -1)


def test_samples_have_no_derivative():
    x = truth.logits("unit", (4, 30))

    @jax.jit
    def gradients(x, tau):
        def drawn(x, tau):
            ids = jaxsoft.sample(KEY, x, tau, top_p=tau / 2)
            return x[:, 0].sum() + ids.astype(jnp.float32).sum()

        return jax.grad(drawn, (0, 1))(x, tau)

    by_x, by_tau = gradients(x, np.float32(0.8))
    np.testing.assert_array_equal(by_x[:, 1:], 0)
    assert by_tau == 0


@jax.jit
def class_from_an_end(weights, share, reverse):
    at = block_sampling.Place(share, reverse)
    return at.column(block_sampling.invert(at.order(weights), at.share), 128)


@pytest.mark.parametrize("dominant", [0, 64, 127])
def test_tiny_classes_beside_a_dominant_one_of_their_block(dominant):
    """Their sum is lost in the rounding of one that begins with the dominant class."""
    weights = np.full((127, 128), 2.0**-24, "float32")
    weights[:, dominant] = 1
    shares = (np.arange(127) + 0.5).astype("float32") * np.float32(2.0**-24)
    before, after = (
        np.asarray(class_from_an_end(weights, shares, np.full(127, reverse)))
        for reverse in (False, True)
    )
    np.testing.assert_array_equal(before[:dominant], np.arange(dominant))
    assert (before[dominant:] == dominant).all()
    np.testing.assert_array_equal(after[: 127 - dominant], np.arange(127, dominant, -1))
    assert (after[127 - dominant :] == dominant).all()


def test_export():
    """A filtered sample: its last step is the program of one without filters."""

    def drawn(key, x, tau, where, top_k):
        return jaxsoft.sample(key, x, tau, where=where, top_k=top_k, top_p=0.9)

    keep = np.arange(CLASSES) % 3 > 0
    top_k = np.full((6, 1), 7, "int32")
    check_round_trip(drawn, KEY, X[:6], np.float32(0.7), keep, top_k)


ZEROS = np.zeros((2, 3), "float32")
WRONG = [
    ((ZEROS.astype(int),), {}, TypeError, "`logits` must have a floating-point dtype"),
    ((ZEROS, True), {}, TypeError, "`temperature` must be a real number"),
    ((ZEROS, jnp.int32(1)), {}, TypeError, "`temperature` must have a floating"),
    (
        (ZEROS, -1.0),
        {},
        ValueError,
        "`temperature` must not be negative or NaN, got -1",
    ),
    ((ZEROS, np.ones(3, "f")), {}, ValueError, "class axis must have size 1"),
    ((ZEROS,), {"axis": 2}, ValueError, "`axis` must name one of the 2 axes"),
    ((ZEROS,), {"axis": 1.0}, TypeError, "`axis` must be an int, got 1.0"),
    ((ZEROS[:, :0],), {}, ValueError, "`logits` must have at least one class"),
    ((ZEROS,), {"where": ZEROS}, TypeError, "`where` must have dtype bool"),
    (
        (ZEROS,),
        {"where": ZEROS[:, :2] > 0},
        ValueError,
        r"`where` must broadcast to \(2, 3\)",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_messages(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jaxsoft.sample(KEY, *arguments, **options)
