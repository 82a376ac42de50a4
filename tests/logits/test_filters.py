"""What filters keep, class for class, and what is drawn from it."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsoft
from jaxsoft.logits import filters, groups, rejection
from jaxsoft.logits.rows import Rows
from tests import truth
from tests.statistics import chi_square

KEY = jax.random.key(0)
ROWS, CLASSES = 8, 64
MANY = settings(deadline=None, derandomize=True, max_examples=100)


def true_row(x, tau, top_k, top_p, min_p, top_n_sigma=np.inf, slack=0.0):
    """Returns which classes are kept, and whether rounding within slack decides it."""
    order = np.lexsort((np.arange(x.size), -x))
    order = order[x[order] > -np.inf]
    kept = np.zeros(x.size, bool)
    if not order.size:
        return kept, True
    far = False
    if top_n_sigma < np.inf:
        below = x[order[0]] - x[order]
        distance = top_n_sigma * np.std(below)
        gaps = below[below > 0] - distance
        far = (np.abs(gaps) <= slack * max(below[-1], distance)).any()
        order = order[below <= distance]
    order = order[:top_k]
    first = x[order[0]]
    tied = x[order] == first
    c = truth.centred(x[order], tau) if tau else np.where(tied, 0.0, -np.inf)
    weights = np.exp(c)
    before = np.cumsum(weights) - weights
    gaps = before[1:] - top_p * weights.sum()
    # No probability is zero but at τ = 0: all of them together are needed for 1.
    inside = np.concatenate([[True], (gaps < 0) | (top_p == 1)])
    with np.errstate(divide="ignore"):
        heavy = c >= np.log(min_p)
    kept[order[inside & heavy]] = True
    near = min_p > 0 and (np.abs(weights - min_p)[~tied] <= slack).any()
    near |= top_p < 1 and (np.abs(gaps) <= slack * weights.sum()).any()
    return kept, not (near or far) or slack == 0


def kept_of_few(x, tau, chosen):
    return filters.keep(x, tau, chosen) > 0


def kept_of_many(x, tau, chosen):
    """Judges each class of each row."""
    rows = rejection.prepare(x, tau, chosen)
    whole = rejection.start_bracket(rows, chosen)
    done = jnp.zeros_like(rows.top, bool)

    def judged(class_id):
        class_id = jnp.full_like(done, class_id, jnp.int32)
        logit = jnp.take_along_axis(x, class_id, axis=1)
        at = (logit, class_id, whole, done)
        kept = rejection.judge(rows, tau, chosen, *at)[0]
        heavy = rejection.heavy_weights(rows, tau, chosen)
        heavy = jnp.take_along_axis(heavy, class_id, axis=1)
        return (kept & (heavy > 0))[:, 0]

    return jax.vmap(judged, out_axes=1)(lax.iota(jnp.int32, x.shape[1]))


KEPT = {"few": jax.jit(kept_of_few), "many": jax.jit(kept_of_many)}


def check(x, tau, top_k, top_p, min_p, top_n_sigma, slack=0.0, dtype="float32"):
    """Compares the rows that rounding does not decide, if there are any."""
    padded = np.full((ROWS, CLASSES), -np.inf, dtype)
    padded[:, : x.shape[1]] = x
    column = [np.asarray(a, dtype)[:, None] for a in (tau, top_p, min_p, top_n_sigma)]
    tau, *others = column
    top_k = np.asarray(top_k, np.int32)[:, None]
    chosen = filters.Filters(*map(jnp.asarray, (top_k, *others)))
    both = [np.asarray(kept(padded, tau, chosen)) for kept in KEPT.values()]
    some = False
    for row in range(ROWS):
        one_tau, *rest = (float(a[row, 0]) for a in column)
        kept, clear = true_row(
            padded[row].astype(float), one_tau, top_k[row, 0], *rest, slack=slack
        )
        if clear:
            for found in both:
                np.testing.assert_array_equal(found[row], kept)
        some |= clear
    assume(some)


def each(values):
    """A value for each row."""
    return st.lists(values, min_size=ROWS, max_size=ROWS)


def tables(elements, dtype):
    width = st.integers(1, CLASSES)
    return width.flatmap(lambda n: arrays.arrays(dtype, (ROWS, n), elements=elements))


def with_both_zeros(grid):
    """Returns integers as floats: the lowest is -inf, every other 0 is -0.0."""
    x = np.where(grid == -4, -np.inf, grid.astype("float32"))
    odd = np.arange(x.shape[1]) % 2 == 1
    return np.where((x == 0) & odd, np.float32(-0.0), x)


GRID = tables(st.integers(-4, 3), np.int8).map(with_both_zeros)
BFLOAT16 = tables(st.floats(-9, 9, width=32), np.float32).map(
    lambda x: x.astype(jnp.bfloat16).astype(np.float32)
)
FLOATS = tables(st.floats(-20, 20), np.float64)
COUNTS = each(st.integers(1, CLASSES + 6) | st.just(2**31 - 1))
SHARES = each(st.floats(0, 1, width=32) | st.just(0.0) | st.just(1.0))
TEMPERATURES = each(st.sampled_from([0.5, 1.0, 3.0, np.inf]))
DEVIATIONS = each(st.floats(0, 4, width=32) | st.just(0.0) | st.just(np.inf))


@MANY
@given(
    GRID,
    each(st.sampled_from([0.0, np.inf])),
    COUNTS,
    each(st.integers(0, 63).map(lambda n: n / 64)),
    each(st.sampled_from([0.0, 0.5, 1.0])),
    each(st.sampled_from([0.0, np.inf])),
)
def test_exact_weights_decide_every_class(x, tau, top_k, top_p, min_p, top_n_sigma):
    check(x, tau, top_k, top_p, min_p, top_n_sigma)


@MANY
@given(GRID | BFLOAT16, TEMPERATURES, COUNTS, SHARES, SHARES, DEVIATIONS)
def test_ties_in_float32(x, tau, top_k, top_p, min_p, top_n_sigma):
    check(x, tau, top_k, top_p, min_p, top_n_sigma, slack=1e-5)


@MANY
@given(FLOATS, TEMPERATURES, COUNTS, SHARES, SHARES, DEVIATIONS)
def test_floats_in_float64(x, tau, top_k, top_p, min_p, top_n_sigma):
    with jax.enable_x64(True):
        given = (tau, top_k, top_p, min_p, top_n_sigma)
        check(x, *given, slack=1e-9, dtype="float64")


def spread(kind):
    """Rows whose deviations are as few as their logits make them."""
    x = np.random.default_rng(8).integers(-8, 9, (ROWS, CLASSES)) / 4
    x = {
        "zero": x * 0,
        "offset": x + 1e5,
        "below": x - 20,
        "peaked": np.where(np.arange(CLASSES) == 5, 300, x),
        "small": x * 2.0**-100,
        "large": x * 2.0**125,
    }.get(kind, x)
    return np.where(np.arange(CLASSES) % 9 == 0, -np.inf, x).astype("float32")


@pytest.mark.parametrize(
    "kind", ["unit", "zero", "offset", "below", "peaked", "small", "large"]
)
def test_deviations_at_any_scale_and_offset(kind):
    x = spread(kind)
    chosen = [np.full((ROWS, 1), a) for a in (CLASSES, 1, 0)]
    count, one, zero = (jnp.asarray(a, jnp.float32) for a in chosen)
    number = np.linspace(0, 3, ROWS, dtype="float32")[:, None]
    count = count.astype(jnp.int32)
    both = filters.Filters(count, one, zero, jnp.asarray(number))
    # All weigh the same at τ = ∞, so that none is too light to be seen.
    tau = np.full((ROWS, 1), np.inf, "float32")
    for kept in KEPT.values():
        found = np.asarray(kept(x, tau, both))
        for row in range(ROWS):
            expected, clear = true_row(
                x[row].astype(float), np.inf, CLASSES, 1, 0, number[row, 0], 1e-6
            )
            assert clear
            np.testing.assert_array_equal(found[row], expected)


def test_deviations_do_not_depend_on_the_temperature():
    x = truth.logits("unit", (2000, 300))
    for size in (50, 300):
        for tau in (0.3, 1.0, np.inf):
            drawn = np.asarray(jaxsoft.sample(KEY, x[:, :size], tau, top_n_sigma=1.5))
            rows = x[:, :size]
            least = rows.max(1) - 1.5 * rows.std(1)
            assert (rows[np.arange(2000), drawn] >= least).all()
            assert len(np.unique(drawn)) > 0.9 * size


NEUTRAL = {
    "top_k": np.int32(CLASSES),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "top_n_sigma": np.float32(np.inf),
}
ACTIVE = {
    "top_k": np.int32(20),
    "top_p": np.float32(0.8),
    "min_p": np.float32(0.3),
    "top_n_sigma": np.float32(1.2),
}


@pytest.mark.many_cases
@pytest.mark.parametrize("names", [*itertools.product([False, True], repeat=4)])
def test_a_filter_that_is_none_keeps_all(names):
    x = np.random.default_rng(1).integers(-3, 4, (ROWS, CLASSES)).astype("float32")
    tau = np.full((ROWS, 1), 1.5, "float32")
    given = {n: ACTIVE[n] for n, on in zip(ACTIVE, names, strict=True) if on}
    some = filters.Filters(*(given.get(n) for n in ACTIVE))
    some = jax.tree.map(lambda a: np.full((1, 1), a), some)
    full = [np.full((ROWS, 1), given.get(n, NEUTRAL[n])) for n in ACTIVE]
    expected = KEPT["few"](x, tau, filters.Filters(*map(jnp.asarray, full)))
    np.testing.assert_array_equal(KEPT["few"](x, tau, some), expected)
    np.testing.assert_array_equal(KEPT["many"](x, tau, some), expected)
    weights = np.asarray(jax.jit(filters.keep, static_argnums=1)(x, 1.5, some))
    truly = np.exp((x.astype(float) - x.max(1, keepdims=True)) / 1.5)
    np.testing.assert_allclose(weights, np.where(expected, truly, 0), rtol=1e-5)


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_full_share_drops_nothing(kept):
    x = np.full((ROWS, CLASSES), -20, "float32")
    x[:, 7] = 0
    tau, one, zero = (np.full((ROWS, 1), a, "float32") for a in (1, 1, 0))
    count = np.full((ROWS, 1), CLASSES, "int32")
    chosen = filters.Filters(*map(jnp.asarray, (count, one, zero)))
    assert np.asarray(kept(x, tau, chosen)).all()


OFF = {"top_k": 0, "top_p": 1, "min_p": 0, "top_n_sigma": np.inf}
FILTERS = [
    {"top_k": 25},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 60, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 60, "top_p": 0.9, "min_p": 0.02, "top_n_sigma": 1.7},
]


@pytest.mark.parametrize("given", FILTERS, ids=lambda given: "-".join(given))
def test_draws_are_kept_classes_at_their_rates(given):
    rng = np.random.default_rng(2)
    x = np.round(rng.standard_normal(200) * 8) / 4
    # Filters that drop nothing are given too: one program serves all.
    full = {"top_k": 200, "top_p": 1.0, "min_p": 0.0, "top_n_sigma": 1e9} | given
    logits = np.broadcast_to(x.astype("float32"), (10_000, 200))
    check_rates(x, np.asarray(jaxsoft.sample(KEY, logits, 1.3, **full)), full)


def check_rates(x, drawn, given):
    """Compares draws at temperature 1.3 with what a sort says of their row."""
    kept, _ = true_row(x, 1.3, **{"top_k": x.size, "top_p": 1, "min_p": 0} | given)
    assert kept[drawn].all()
    names = np.flatnonzero(kept)
    if names.size == 1:
        return
    rates = truth.softmax(x[names], 1.3)
    assert chi_square(np.searchsorted(names, drawn), rates) > 1e-4


OF_SIZES = [
    {"top_k": 2},
    {"top_k": 60},
    {"top_k": 5000},
    {"top_p": 0.8},
    {"min_p": 0.03},
    {"top_k": 300, "top_p": 0.6},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.2},
    {"top_p": 0.5, "min_p": 0.3},
    {"top_n_sigma": 1.9},
    {"top_n_sigma": 1.7, "top_k": 40, "top_p": 0.8},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    ("classes", "calls", "rows"), [(3, 1, 4000), (1000, 1, 1500), (100_003, 12, 16)]
)
@pytest.mark.many_cases
def test_rates_of_every_filter(classes, calls, rows, dtype, request):
    """Each of some rows of one program has other filters."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    x = (2 * np.random.default_rng(4).standard_normal(classes)).astype(dtype)
    columns = {
        name: np.repeat([given.get(name, OFF[name]) for given in OF_SIZES], rows)
        for name in OFF
    }
    columns = {
        name: jnp.asarray(a, jnp.int32 if name == "top_k" else jnp.float32)[:, None]
        for name, a in columns.items()
    }

    @jax.jit
    def draw(keys, x, columns):
        logits = jnp.broadcast_to(x, (len(OF_SIZES) * rows, classes))
        return lax.map(lambda k: jaxsoft.sample(k, logits, 1.3, **columns), keys)

    drawn = np.asarray(draw(jax.random.split(KEY, calls), x, columns))
    drawn = np.moveaxis(drawn.reshape(calls, len(OF_SIZES), rows), 1, 0)
    for options, ids in zip(OF_SIZES, drawn, strict=True):
        check_rates(np.asarray(x, float), ids.reshape(-1), options)


def test_filters_that_are_off_keep_all():
    x = truth.logits("unit", (9, 400))
    x[3, ::2], x[4] = -np.inf, -np.inf
    plain = jaxsoft.sample(KEY, x, 1.3)
    for name, value in OFF.items():
        np.testing.assert_array_equal(
            jaxsoft.sample(KEY, x, 1.3, **{name: value}), plain
        )
    np.testing.assert_array_equal(jaxsoft.sample(KEY, x, 1.3, **OFF), plain)
    # Off for some rows of an array.
    counts = np.where(np.arange(9) % 3 == 0, 0, 5)[:, None]
    some = x[:, :50]
    every = np.isfinite(some).sum(1)
    expected = np.where(counts[:, 0] == 0, every, np.minimum(every, 5))
    tau, chosen = np.float32(1.3), filters.Filters(jnp.asarray(counts), None, None)
    for kept in KEPT.values():
        found = np.asarray(kept(some, tau, chosen)).sum(1)
        np.testing.assert_array_equal(found[expected > 0], expected[expected > 0])
    drawn = np.asarray(jaxsoft.sample(KEY, x, 1.3, top_k=counts))
    np.testing.assert_array_equal(drawn[::3], plain[::3])


def test_what_is_known_to_be_off_adds_nothing_to_the_program():
    x = truth.logits("unit", (9, 400))
    texts = [
        str(jax.make_jaxpr(lambda x, o=options: jaxsoft.sample(KEY, x, 1.3, **o))(x))
        for options in ({}, OFF)
    ]
    assert texts[0] == texts[1]


def test_filters_of_each_row():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 50, 3)).astype("float32")
    top_k = rng.integers(1, 6, (4, 1, 3))
    top_p = rng.uniform(0.3, 1, (4, 1, 1)).astype("float32")
    min_p = np.float32(0.1)
    keys = jax.random.split(KEY, 300)
    draw = jax.vmap(
        lambda key: jaxsoft.sample(
            key, x, axis=1, top_k=top_k, top_p=top_p, min_p=min_p
        )
    )
    drawn = np.asarray(jax.jit(draw)(keys))
    for i, j in np.ndindex(4, 3):
        kept, _ = true_row(
            np.asarray(x[i, :, j], float), 1, top_k[i, 0, j], float(top_p[i, 0, 0]), 0.1
        )
        assert set(drawn[:, i, j]) == set(np.flatnonzero(kept))
    one = jaxsoft.sample(keys[5], x, axis=1, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_array_equal(one, drawn[5])


def test_vmap_over_filters():
    x = truth.logits("unit", (6, 40))
    mapped = jax.vmap(lambda k, p: jaxsoft.sample(KEY, x, top_k=k, min_p=p))
    shares = np.asarray([0.0, 0.1, 1.0], "float32")
    drawn = jax.jit(mapped)(np.asarray([1, 4, 40], "int32"), shares)
    for k, p, ids in zip((1, 4, 40), (0.0, 0.1, 1.0), drawn, strict=True):
        np.testing.assert_array_equal(jaxsoft.sample(KEY, x, top_k=k, min_p=p), ids)


def test_a_row_alone_whatever_its_tile():
    x = truth.logits("unit", (70, 5000))
    drawn = jaxsoft.sample(KEY, x, top_k=50, top_p=0.9)
    np.testing.assert_array_equal(
        jaxsoft.sample(KEY, x[:9], top_k=50, top_p=0.9), drawn[:9]
    )


SOME: list[dict[str, Any]] = [{"top_k": 4}, {"top_p": 0.8, "top_n_sigma": 2.0}]


def test_a_row_whatever_the_others_are():
    """Neither their logits nor their filters change what a row draws."""
    rng = np.random.default_rng(5)
    rows = np.arange(40)[:, None]
    odd = rows % 2 == 1
    top_k, top_p = rng.integers(0, 30, (40, 1)), rng.uniform(0, 1, (40, 1))
    far, few = np.float32(1.5), np.where(odd, 1, top_k)
    for classes in (90, 1200):
        x = truth.logits("unit", (40, classes))
        others = np.where(odd, 80 * rng.random(x.shape), x).astype("float32")
        others[1], others[3], others[5, 7] = -np.inf, np.nan, np.inf
        draw = jax.jit(
            lambda x, k, p, n: jaxsoft.sample(KEY, x, top_k=k, top_p=p, top_n_sigma=n)
        )
        share = top_p.astype("float32")
        drawn = draw(x, top_k, share, np.where(odd, far, 2 * far))
        changed = draw(others, few, np.where(odd, 1, share), np.where(odd, 0, 2 * far))
        np.testing.assert_array_equal(changed[::2], drawn[::2])
        for options in SOME:
            np.testing.assert_array_equal(
                jaxsoft.sample(KEY, others, 1.3, **options)[::2],
                jaxsoft.sample(KEY, x, 1.3, **options)[::2],
            )


def test_a_key_of_each_row():
    x = truth.logits("unit", (6, 700))
    keys = jax.random.split(KEY, 6)
    for options in SOME:
        draw = jax.jit(lambda key, x, o=options: jaxsoft.sample(key, x, 1.3, **o))
        drawn = jax.vmap(draw)(keys, x)
        alone = [draw(*pair) for pair in zip(keys, x, strict=True)]
        np.testing.assert_array_equal(drawn, alone)


@pytest.mark.parametrize("classes", [1000, 1003])
def test_the_first_groups_have_the_first_classes(classes):
    rng = np.random.default_rng(6)
    x = with_both_zeros(rng.integers(-4, 1, (40, classes)))
    x[:20] = rng.standard_normal((20, classes)).astype("float32")
    x[20:25, : classes - 5] = -np.inf
    where = rng.random((1, classes)) < 0.9
    find = jax.jit(groups.first_groups, static_argnums=(1, 2))
    rows = Rows(jnp.asarray(x), None, jnp.asarray(where))
    some, ids, least = (np.asarray(a) for a in find(rows, 8, 16))
    masked = np.where(where, x, -np.inf)
    found = np.take_along_axis(masked, np.minimum(ids, classes - 1), axis=1)
    np.testing.assert_array_equal(some, np.where(ids < classes, found, -np.inf))
    assert (np.diff(ids, axis=1) > 0).all()
    for row in range(40):
        first = np.argsort(-masked[row], kind="stable")[:8]
        assert np.isin(first[masked[row, first] > -np.inf], ids[row]).all()
        assert masked[row, first[-1]] >= least[row]
    best, which = jax.jit(groups.first_classes, static_argnums=(1, 2))(rows, 8, 16)
    order = np.argsort(-masked, axis=1, kind="stable")[:, :8]
    expected = np.take_along_axis(masked, order, axis=1)
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(
        np.where(expected > -np.inf, which, -1), np.where(expected > -np.inf, order, -1)
    )


OF_GROUPS = [
    {"top_k": 2},
    {"top_k": 7, "top_p": 0.7},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.3},
    {"top_k": 7, "top_n_sigma": 0.25},
]


@pytest.mark.parametrize("given", OF_GROUPS, ids=lambda given: "-".join(given))
def test_rates_of_a_known_count(given):
    x = (2 * np.random.default_rng(4).standard_normal(1003)).astype("float32")
    logits = np.broadcast_to(x, (4000, 1003)).copy()
    logits[0, 1000], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    # Numbers whose sum overflows.
    logits[3, :20], logits[3, 20] = 3e38, -np.inf
    drawn = np.asarray(jaxsoft.sample(KEY, logits, 1.3, **given))
    np.testing.assert_array_equal(drawn[:3], -1)
    assert drawn[3] in range(7)
    check_rates(np.asarray(x, float), drawn[4:], given)


def test_rows_of_shards():
    x = truth.logits("unit", (24, 1000))
    top_k = np.tile(np.array([0, 3, 200], "int32"), 8)[:, None]
    mesh = Mesh(np.array(jax.devices()[:8]), ("rows",))
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    draw = jax.jit(lambda x, k: jaxsoft.sample(KEY, x, top_k=k, top_p=0.7, min_p=0.01))
    expected = draw(x, top_k)
    found = draw(jax.device_put(x, rows), jax.device_put(top_k, rows))
    np.testing.assert_array_equal(found, expected)
    # Every shard has the places of its own rows.
    alone = jax.shard_map(
        draw, mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows")
    )
    first = [draw(x[i : i + 3], top_k[i : i + 3]) for i in range(0, 24, 3)]
    np.testing.assert_array_equal(jax.jit(alone)(x, top_k), np.concatenate(first))


def test_rows_without_a_class_or_with_what_is_no_number():
    x = np.zeros((6, 30), "float32")
    x[1], x[2, 4], x[3, 5] = -np.inf, np.nan, np.inf
    x[4, 1:] = -np.inf
    drawn = np.asarray(jaxsoft.sample(KEY, x, **FILTERS[3]))
    np.testing.assert_array_equal(drawn[1:5], [-1, -1, -1, 0])
    clean = np.asarray(jaxsoft.sample(KEY, np.zeros((6, 30), "float32"), **FILTERS[3]))
    np.testing.assert_array_equal(drawn[[0, 5]], clean[[0, 5]])


@pytest.mark.many_cases
@pytest.mark.parametrize("given", FILTERS, ids=lambda given: "-".join(given))
def test_many_classes_with_what_is_no_number(given):
    """Of known filters and of traced ones; no row with a sample has another one."""
    x = truth.logits("unit", (40, 1500))
    bad = x.copy()
    # Beside the row's largest logits and among those that filters drop.
    order = np.argsort(-x, axis=1)
    for row, place in enumerate((0, 3, 70, 700, 1499)):
        bad[row, order[row, place]] = np.nan
        bad[row + 5, order[row + 5, place]] = np.inf
    bad[10] = -np.inf
    bad[11, order[11, 0]] = -np.inf
    draw = jax.jit(lambda x, given: jaxsoft.sample(KEY, x, 1.3, **given))
    traced = {name: np.asarray(value) for name, value in given.items()}
    traced = {
        name: a.astype("int32" if name == "top_k" else "float32")
        for name, a in traced.items()
    }
    for plain, drawn in (
        (draw(x, traced), draw(bad, traced)),
        (jaxsoft.sample(KEY, x, 1.3, **given), jaxsoft.sample(KEY, bad, 1.3, **given)),
    ):
        np.testing.assert_array_equal(drawn[:11], -1)
        assert drawn[11] >= 0 and drawn[11] != order[11, 0]
        np.testing.assert_array_equal(drawn[12:], plain[12:])


KNOWN = [{"top_k": 200}, {"top_k": 200, "top_p": 0.7}]


@pytest.mark.parametrize("given", KNOWN, ids=lambda given: "-".join(given))
def test_rates_of_a_known_count_of_many(given):
    """Of more classes than are looked for in groups."""
    x = (2 * np.random.default_rng(4).standard_normal(9001)).astype("float32")
    logits = np.broadcast_to(np.round(x, 1), (500, 9001))
    draw = jax.jit(lambda key, x: jaxsoft.sample(key, x, 1.3, **given))
    keys = jax.random.split(KEY, 6)
    drawn = np.concatenate([draw(key, logits) for key in keys])
    check_rates(np.asarray(logits[0], float), drawn, given)


def test_traced_filters_out_of_their_range():
    x = np.zeros((7, 5), "float32")
    top_k = np.array([0, -1, 1, 2, 3, 4, 5])[:, None]
    top_p = np.array([1, 1, -0.5, np.nan, 0.5, 0.5, 0.5], "float32")[:, None]
    min_p = np.array([0, 0, 0.5, 0.5, 1.5, np.nan, 0.5], "float32")[:, None]

    @jax.jit
    def draw(k, p, m):
        return jaxsoft.sample(KEY, x, top_k=k, top_p=p, min_p=m)

    drawn = draw(top_k, top_p, min_p)
    # 0 classes are all of them; a filter out of its range leaves none.
    assert drawn[0] in range(5)
    np.testing.assert_array_equal(drawn[1:6], -1)
    assert drawn[6] in (0, 1, 2)
    deviations = np.array([0, -1, np.nan, 3, np.inf, -np.inf, 0], "float32")[:, None]
    for classes, options in ((5, {}), (700, {}), (700, {"top_k": 2})):
        logits = np.zeros((7, classes), "float32")
        logits[6, 3] = 1
        draw = jax.jit(
            lambda n, x=logits, o=options: jaxsoft.sample(KEY, x, top_n_sigma=n, **o)
        )
        drawn = np.asarray(draw(deviations))
        np.testing.assert_array_equal(drawn[[1, 2, 5]], -1)
        assert (drawn[[0, 3, 4]] >= 0).all() and drawn[6] == 3


def test_filters_without_the_class_axis():
    x = np.random.default_rng(3).standard_normal((4, 50, 3)).astype("float32")
    given = {
        "top_k": np.arange(12).reshape(4, 3) % 4,
        "top_p": np.linspace(0, 1, 12, dtype="float32").reshape(4, 3),
    }
    whole = {name: a[:, None] for name, a in given.items()}
    found, expected = (
        jaxsoft.sample(KEY, x, axis=1, return_log_prob=True, **options)
        for options in (given, whole)
    )
    np.testing.assert_array_equal(found, expected)


X = np.zeros((2, 3), "float32")
WRONG = [
    ({"top_k": True}, TypeError, "`top_k` must be a number, got True"),
    ({"top_p": False}, TypeError, "`top_p` must be a number, got False"),
    ({"top_k": 2.0}, TypeError, "`top_k` must be an int, got 2.0"),
    ({"top_k": np.ones(2, "f")}, TypeError, "`top_k` must have an integer dtype"),
    ({"top_p": np.ones(1, int)}, TypeError, "`top_p` must have a floating-point"),
    ({"top_k": -1}, ValueError, "`top_k` must be at least 0, got -1"),
    ({"top_k": np.array([[1], [-3]])}, ValueError, "`top_k` must be .* got -3"),
    ({"top_p": 1.5}, ValueError, r"`top_p` must lie in \[0, 1\], got 1.5"),
    ({"min_p": float("nan")}, ValueError, r"`min_p` must lie in \[0, 1\], got nan"),
    ({"min_p": np.full((2, 1), -1.0, "f")}, ValueError, "`min_p` must lie .* got -1"),
    ({"top_n_sigma": 1 + 1j}, TypeError, "`top_n_sigma` must have a floating-point"),
    ({"top_n_sigma": -0.5}, ValueError, "`top_n_sigma` must be at least 0, got -0.5"),
    ({"top_n_sigma": float("nan")}, ValueError, "`top_n_sigma` must be .* got nan"),
    ({"top_k": np.ones(3, int)}, ValueError, r"`top_k` must broadcast to \(2, 1\)"),
    ({"top_p": np.ones((2, 3), "f")}, ValueError, "`top_p` must broadcast to"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_messages(given, error, message):
    with pytest.raises(error, match=message):
        jaxsoft.sample(KEY, X, **given)
    # What is known is so while a function is traced, too.
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: jaxsoft.sample(KEY, x, **given), X)
