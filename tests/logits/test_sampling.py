"""Samples of stored logits: rates, limits, and what a draw depends on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._core import block_sampling, noise
from tests import truth
from tests.hierarchical.test_export import check_round_trip
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
    x = jnp.asarray(2 * rng.standard_normal(classes), dtype)
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
    x = jnp.zeros(tail + 1).at[place].set(np.log(tail * 255.0))
    drawn = draws_of_one_row(x, 2**18)
    others = drawn[drawn != place]
    due = drawn.size / 256
    assert abs(others.size - due) < 5 * np.sqrt(due)
    assert len(np.unique(others)) > 0.97 * others.size
    assert chi_square(others * 32 // (tail + 1), np.full(32, 1 / 32)) > 1e-4


@pytest.mark.parametrize("classes", [1, 127, 128, 129, 4099])
@pytest.mark.many_cases
def test_the_classes_of_linear_sample(classes):
    x = jnp.asarray(truth.logits("unit", (30, classes)))
    tau = jnp.tile(jnp.asarray([0.0, 0.7, jnp.inf]), 10)
    drawn = jaxsoft.sample(KEY, x, tau[:, None])
    linear = jaxsoft.linear_sample(KEY, jnp.eye(30), x, temperature=tau)
    assert (drawn != linear).sum() <= 1


def test_a_row_that_overflows_changes_no_other():
    x = truth.logits("unit", (3000, 300))
    # The largest logit of a row's first block is what the quick path centres on.
    overflowing, dropped = x.copy(), x.copy()
    overflowing[0, 250] = 200
    dropped[0, :128] = -np.inf
    plain = np.asarray(jaxsoft.sample(KEY, x))
    for other, least in ((overflowing, 250), (dropped, 128)):
        drawn = np.asarray(jaxsoft.sample(KEY, other))
        assert drawn[0] == 250 if least == 250 else drawn[0] >= 128
        assert (plain[1:] != drawn[1:]).sum() <= 3
    words = noise.row_words(KEY, 3000)
    whole = block_sampling.draw(jnp.asarray(x), 1.0, words, 0, 128).class_id
    assert (plain != whole).sum() <= 3


def test_a_first_block_far_below_or_above_the_rest():
    x = truth.logits("unit", (200, 300))
    for shift in (-80, 80):
        moved = x.copy()
        moved[:, :128] += shift
        drawn = np.asarray(jaxsoft.sample(KEY, moved))
        assert ((drawn < 128) == (shift > 0)).all()
        assert len(np.unique(drawn)) > 30


def test_a_row_depends_on_its_place_alone():
    x = jnp.asarray(truth.logits("unit", (24, 700)))
    drawn = jaxsoft.sample(KEY, x)
    np.testing.assert_array_equal(jaxsoft.sample(KEY, x[:5]), drawn[:5])
    folded = jaxsoft.sample(KEY, x.reshape(2, 3, 4, 700))
    np.testing.assert_array_equal(folded, drawn.reshape(2, 3, 4))
    moved = jaxsoft.sample(KEY, jnp.moveaxis(x.reshape(4, 6, 700), -1, 1), axis=1)
    np.testing.assert_array_equal(moved, drawn.reshape(4, 6))
    np.testing.assert_array_equal(jaxsoft.sample(KEY, x[0]), drawn[0])
    same = jaxsoft.sample(KEY, jnp.broadcast_to(x[:1], x.shape))
    assert same[0] == drawn[0] and len(np.unique(same)) > 10
    changed = jaxsoft.sample(KEY, x.at[::2].multiply(-1.0))
    np.testing.assert_array_equal(changed[1::2], drawn[1::2])


def test_vmap_over_keys_and_rows():
    x = jnp.asarray(truth.logits("unit", (3, 5, 300)))
    keys = jax.random.split(KEY, 3)
    apart = jax.vmap(jaxsoft.sample)(keys, x)
    one = jax.vmap(jaxsoft.sample, (0, None))(keys, x[0])
    for i in range(3):
        np.testing.assert_array_equal(jaxsoft.sample(keys[i], x[i]), apart[i])
        np.testing.assert_array_equal(jaxsoft.sample(keys[i], x[0]), one[i])
    assert (np.asarray(one[0]) != one[1]).any()


def test_offsets_change_no_sample():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-6, 4, (60, 900)), "float32")
    plain = jaxsoft.sample(KEY, x, 1.5)
    for offset in (1e4, 1e5, -1e6, 1e7, -1e7):
        np.testing.assert_array_equal(jaxsoft.sample(KEY, x + offset, 1.5), plain)


def test_zero_temperature_gives_the_lowest_argmax():
    x = np.random.default_rng(0).integers(-3, 4, (40, 700)).astype("float32")
    x[:, 300] = x[:, 650] = 5
    x[7] = np.where(np.arange(700) == 4, -0.0, np.minimum(x[7], 0))
    best = x.argmax(1)
    sample = jax.jit(jaxsoft.sample)

    def draw(tau):
        return sample(KEY, x, jnp.full((40, 1), tau))

    for tau in (0.0, 1e-38):
        np.testing.assert_array_equal(draw(tau), best)
    np.testing.assert_array_equal(sample(KEY, x, jnp.float32(0)), best)
    np.testing.assert_array_equal(jaxsoft.sample(KEY, x, 0.0), best)
    rows = jnp.arange(40)[:, None]
    tau = jnp.where(rows < 20, 0.0, jnp.where(rows < 30, jnp.inf, 1.0))
    mixed = sample(KEY, x, tau)
    np.testing.assert_array_equal(mixed[:20], best[:20])
    np.testing.assert_array_equal(mixed[30:], draw(1.0)[30:])
    assert (np.asarray(mixed[20:30]) != best[20:30]).all()


@pytest.mark.parametrize("traced", [False, True])
def test_infinite_temperature_is_uniform_over_kept_classes(traced):
    x = np.random.default_rng(0).standard_normal(300).astype("float32") * 30
    x[::7] = -np.inf
    logits = jnp.broadcast_to(x, (9000, 300))
    tau = jnp.full((9000, 1), jnp.inf) if traced else np.inf
    drawn = np.asarray(jaxsoft.sample(KEY, logits, tau))
    kept = np.flatnonzero(x > -np.inf)
    assert np.isin(drawn, kept).all()
    rates = np.full(kept.size, 1 / kept.size)
    assert chi_square(np.searchsorted(kept, drawn), rates) > 1e-4


def test_dropped_classes():
    x = jnp.asarray(truth.logits("unit", (5, 40, 500)))
    mask = np.random.default_rng(1).random((40, 500)) < 0.1
    drawn = np.asarray(jaxsoft.sample(KEY, x, where=mask))
    assert mask[np.arange(40)[None], drawn].all()
    by_logits = jaxsoft.sample(KEY, jnp.where(mask, x, -jnp.inf))
    np.testing.assert_array_equal(by_logits, drawn)
    # Rows that keep one class, in the last block, and rows that keep none.
    last = np.arange(500) == 499
    np.testing.assert_array_equal(jaxsoft.sample(KEY, x, where=last), 499)
    none = jaxsoft.sample(KEY, x, where=np.zeros(500, bool))
    np.testing.assert_array_equal(none, -1)
    assert jaxsoft.sample(KEY, x[:, :0]).shape == (5, 0)


def test_rows_without_a_sample_disturb_no_other():
    x = truth.logits("unit", (12, 300))
    bad = x.copy()
    bad[1] = -np.inf
    bad[2, 5], bad[3, 299] = np.nan, np.nan
    bad[4, 5], bad[5, 299], bad[6] = np.inf, np.inf, np.inf
    # What is dropped is nothing.
    bad[7, 9], bad[8, 9] = np.nan, np.inf
    mask = np.ones((12, 300), bool)
    mask[7, 9] = mask[8, 9] = False
    known = [0.0, 1.0, np.inf]
    traced = [jnp.full((12, 1), tau, "float32") for tau in (0.0, 1.0, 2.5, np.inf)]
    for tau in known + traced:
        plain, drawn = (
            np.asarray(jaxsoft.sample(KEY, a, tau, where=mask)) for a in (x, bad)
        )
        np.testing.assert_array_equal(drawn[1:7], -1)
        np.testing.assert_array_equal(drawn[7:], plain[7:])
        assert drawn[0] == plain[0] >= 0


def test_traced_temperatures_out_of_their_range():
    x = jnp.asarray(truth.logits("unit", (4, 300)))
    draw = jax.jit(lambda tau: jaxsoft.sample(KEY, x, tau))
    for tau in (-1.0, np.nan, -np.inf):
        drawn = draw(jnp.asarray([[1.0], [tau], [0.0], [2.0]], "float32"))
        assert drawn[1] == -1 and (np.asarray(drawn)[[0, 2, 3]] >= 0).all()
    np.testing.assert_array_equal(draw(jnp.float32(-2)), -1)


def test_samples_have_no_derivative():
    x = jnp.asarray(truth.logits("unit", (4, 30)))

    def drawn(x, tau):
        ids = jaxsoft.sample(KEY, x, tau, top_p=tau / 2)
        return x[:, 0].sum() + ids.astype(jnp.float32).sum()

    by_x, by_tau = jax.grad(drawn, (0, 1))(x, jnp.float32(0.8))
    np.testing.assert_array_equal(by_x[:, 1:], 0)
    assert by_tau == 0


@pytest.mark.parametrize("dominant", [0, 64, 127])
def test_tiny_classes_beside_a_dominant_one_of_their_block(dominant):
    """Their sum is lost in the rounding of one that begins with the dominant class."""
    weights = jnp.full((1, 128), 2.0**-24).at[0, dominant].set(1.0)
    shares = jnp.asarray([[i + 0.5] for i in range(127)], "float32") * 2.0**-24
    found = []
    for reverse in (False, True):
        at = block_sampling.Place(shares[:, 0], jnp.full(127, reverse))
        ordered = at.order(jnp.broadcast_to(weights, (127, 128)))
        found.append(at.column(block_sampling.invert(ordered, at.share), 128))
    before, after = (np.asarray(ids) for ids in found)
    np.testing.assert_array_equal(before[:dominant], np.arange(dominant))
    assert (before[dominant:] == dominant).all()
    np.testing.assert_array_equal(after[: 127 - dominant], np.arange(127, dominant, -1))
    assert (after[127 - dominant :] == dominant).all()


def test_export():
    def draw(key, x, tau, where, top_k):
        plain = jaxsoft.sample(key, x, tau, where=where)
        some = jaxsoft.sample(key, x, tau, where=where, top_k=top_k, top_p=0.9)
        return plain, some

    x = jnp.asarray(truth.logits("unit", (6, 300)))
    keep = np.arange(300) % 3 > 0
    top_k = np.full((6, 1), 7, "int32")
    check_round_trip(draw, KEY, x, jnp.float32(0.7), keep, top_k)


X = np.zeros((2, 3), "float32")
WRONG = [
    ((X.astype(int),), {}, TypeError, "`logits` must have a floating-point dtype"),
    ((X, True), {}, TypeError, "`temperature` must be a real number"),
    ((X, jnp.int32(1)), {}, TypeError, "`temperature` must have a floating"),
    ((X, -1.0), {}, ValueError, "`temperature` must not be negative or NaN, got -1"),
    ((X, np.ones(3, "f")), {}, ValueError, "class axis must have size 1"),
    ((X,), {"axis": 2}, ValueError, "`axis` must name one of the 2 axes"),
    ((X,), {"axis": 1.0}, TypeError, "`axis` must be an int, got 1.0"),
    ((X[:, :0],), {}, ValueError, "`logits` must have at least one class"),
    ((X,), {"where": X}, TypeError, "`where` must have dtype bool"),
    ((X,), {"where": X[:, :2] > 0}, ValueError, r"`where` must broadcast to \(2, 3\)"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_messages(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jaxsoft.sample(KEY, *arguments, **options)
