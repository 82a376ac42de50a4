"""Drafts that are kept or replaced: whether what comes out follows the target.

One shape serves most tests, since a sampler of another is another program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsoft
from tests import truth
from tests.hierarchical.test_export import check_round_trip
from tests.statistics import chi_square

KEY, OTHER = jax.random.split(jax.random.key(4))
ROWS, CLASSES = 10_000, 300
ONE = np.float32(1)
RNG = np.random.default_rng(0)
TARGET = (2 * RNG.standard_normal(CLASSES)).astype("float32")
DRAFT = (TARGET + 1.5 * RNG.standard_normal(CLASSES)).astype("float32")
# Classes that only one of the two can draw.
TARGET[:20], DRAFT[15:50] = -np.inf, -np.inf


@jax.jit
def decide(target, draft, ids, tau=ONE, of_draft=ONE):
    target, draft = (
        jnp.broadcast_to(x, (*ids.shape, x.shape[-1])) for x in (target, draft)
    )
    return jaxsoft.speculative_sample(
        KEY, target, draft, ids, temperature=tau, draft_temperature=of_draft
    )


def draft_of(draft, tau=1.0, rows=ROWS):
    """Draws drafts."""
    logits = np.broadcast_to(draft, (rows, draft.size))
    return np.asarray(jaxsoft.sample(OTHER, logits, np.float32(tau)))


def probabilities(x, tau):
    """Returns a softmax in float64, with its limits."""
    if tau == 0:
        return np.eye(x.size)[x.argmax()]
    kept = x > -np.inf
    return kept / kept.sum() if tau == np.inf else truth.softmax(x, tau)


def check_rates(drawn, p):
    """Compares what was drawn with probabilities, some of which are 0."""
    names = np.flatnonzero(p)
    assert np.isin(drawn, names).all()
    if names.size > 1:
        assert chi_square(np.searchsorted(names, drawn), p[names]) > 1e-4


def check_share(number, rows, share):
    """Compares how many rows there are with the share that there should be."""
    deviation = np.sqrt(rows * share * max(1 - share, 0))
    assert abs(number - rows * share) <= 5 * deviation + 1e-3


TEMPERATURES = [
    (1.0, 1.0),
    (0.7, 1.4),
    (2.0, 0.5),
    (np.inf, 1.0),
    (1.0, np.inf),
    (1.0, 0.0),
    (0.0, 1.0),
    (0.0, 0.0),
]


@pytest.mark.parametrize(("tau", "of_draft"), TEMPERATURES)
def test_rates(tau, of_draft):
    ids = draft_of(DRAFT, of_draft)
    taus = np.float32(tau), np.float32(of_draft)
    drawn, accepted = map(np.asarray, decide(TARGET, DRAFT, ids, *taus))
    p, q = probabilities(TARGET, tau), probabilities(DRAFT, of_draft)
    check_rates(drawn, p)
    np.testing.assert_array_equal(accepted, drawn == ids)
    check_share(accepted.sum(), ROWS, np.minimum(p, q).sum())


@pytest.mark.parametrize("kind", [*truth.DISTRIBUTIONS, "minus 20"])
def test_rates_of_logits_of_every_kind(kind):
    rest = kind == "minus 20"
    target = truth.logits("unit" if rest else kind, (CLASSES,), 1)
    draft = truth.logits("unit" if rest else kind, (CLASSES,), 2)
    if rest:
        target, draft = np.full_like(target, -20), draft - 20
    p, q = truth.softmax(target), truth.softmax(draft)
    ids = draft_of(draft)
    drawn, accepted = map(np.asarray, decide(target, draft, ids))
    check_rates(drawn, p)
    check_share(accepted.sum(), ROWS, np.minimum(p, q).sum())
    # All rows have one draft: what is in its place is what p has more than q.
    ids = np.full_like(ids, np.argmax(q - p))
    drawn, accepted = map(np.asarray, decide(target, draft, ids))
    ratio = min(1, p[ids[0]] / q[ids[0]])
    check_share(accepted.sum(), ROWS, ratio)
    excess = np.maximum(p - q, 0)
    if excess.sum() > 0 and not accepted.all():
        check_rates(drawn[~accepted], excess / excess.sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "classes", [3, 1000, pytest.param(50_257, marks=pytest.mark.slow)]
)
@pytest.mark.many_cases
def test_rates_of_every_dtype(classes, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    rng = np.random.default_rng(1)
    target, draft = (2 * rng.standard_normal((2, classes))).astype(dtype)
    rows = 4000 if classes < 5000 else 400

    @jax.jit
    def draw(keys):
        def one(key):
            key, other = jax.random.split(key)
            x, y = (jnp.broadcast_to(x, (rows, classes)) for x in (target, draft))
            ids = jaxsoft.sample(other, y, 1.3)
            return jaxsoft.speculative_sample(
                key, x, y, ids, temperature=0.9, draft_temperature=1.3
            )

        return jax.lax.map(one, keys)

    drawn, accepted = (
        np.asarray(a).reshape(-1) for a in draw(jax.random.split(KEY, 5))
    )
    p = truth.softmax(target.astype(float), 0.9)
    q = truth.softmax(draft.astype(float), 1.3)
    check_rates(drawn, p)
    check_share(accepted.sum(), drawn.size, np.minimum(p, q).sum())


def test_rows_without_a_draft_draw_from_the_target():
    logits = np.broadcast_to(TARGET, (ROWS, CLASSES))
    expected = np.asarray(jaxsoft.sample(KEY, logits, np.float32(0.8)))
    tau = np.float32(0.8)
    # None, no class, and one that only the target can draw; NaN is then no matter.
    missing = np.full(CLASSES, np.nan, "float32")
    for ids, draft in (
        (-1, missing),
        (CLASSES, missing),
        (2**31 - 1, DRAFT),
        (30, DRAFT),
    ):
        ids = np.full(ROWS, ids, "int32")
        drawn, accepted = map(np.asarray, decide(TARGET, draft, ids, tau))
        assert (drawn != expected).sum() <= 2
        np.testing.assert_array_equal(accepted, drawn == ids)
    # Of what is drafted without chance the logits are no matter.
    ids = np.full(ROWS, TARGET.argmax(), "int32")
    drawn, accepted = map(np.asarray, decide(TARGET, missing, ids, tau, np.float32(0)))
    assert (drawn != expected).sum() <= 2 and accepted.any()


def test_zero_temperature_gives_the_lowest_argmax():
    target = np.random.default_rng(0).integers(-3, 4, CLASSES).astype("float32")
    target[100] = target[280] = 5
    ids = np.where(np.arange(ROWS) % 2 == 0, 100, 280)
    for of_draft in (0.0, 1.0):
        taus = np.float32(0), np.float32(of_draft)
        drawn, accepted = decide(target, DRAFT, ids, *taus)
        np.testing.assert_array_equal(drawn, 100)
        np.testing.assert_array_equal(accepted, ids == 100)


def test_equal_probabilities_keep_every_draft():
    for x in (
        TARGET,
        truth.logits("offset", (CLASSES,)),
        truth.logits("range", (CLASSES,)),
    ):
        ids = draft_of(x)
        assert decide(x, x, ids).accepted.all()
        # Here rounding may tell p from q, and leave next to nothing of p - q.
        taus = np.float32(0.7), np.float32(2.1)
        drawn, accepted = decide(x, 3 * x, draft_of(x, 0.7), *taus)
        assert accepted.sum() > ROWS - 5
        assert (x[drawn] > -np.inf).all()


def test_nothing_is_left_by_rounding_and_the_draft_is_dropped():
    """The target drops one class, whose probability is lost in that of the others."""
    draft = np.zeros(CLASSES, "float32")
    draft[7] = -20
    target = draft.copy()
    target[7] = -np.inf
    drawn, accepted = map(np.asarray, decide(target, draft, np.full(ROWS, 7)))
    assert not accepted.any()
    check_rates(drawn, truth.softmax(target))


def test_a_row_depends_on_its_place_alone():
    target = truth.logits("unit", (24, 130), 1)
    draft = truth.logits("unit", (24, 130), 2)
    ids = np.where(np.arange(24) % 5 == 0, -1, jaxsoft.sample(OTHER, draft))
    drawn, accepted = jaxsoft.speculative_sample(KEY, target, draft, ids)
    assert 0 < accepted.sum() < 20
    part = jaxsoft.speculative_sample(KEY, target[:5], draft[:5], ids[:5])
    np.testing.assert_array_equal(part.class_id, drawn[:5])
    np.testing.assert_array_equal(part.accepted, accepted[:5])
    x, y = (np.moveaxis(x.reshape(4, 6, 130), -1, 1) for x in (target, draft))
    folded = jaxsoft.speculative_sample(KEY, x, y, ids.reshape(4, 6), axis=1)
    np.testing.assert_array_equal(folded.class_id, np.reshape(drawn, (4, 6)))
    np.testing.assert_array_equal(folded.accepted, np.reshape(accepted, (4, 6)))
    keys = jax.random.split(KEY, 4)
    arrays = [a.reshape(4, 6, *a.shape[1:]) for a in (target, draft, ids)]
    mapped = jax.vmap(jaxsoft.speculative_sample)(keys, *arrays)
    for i, key in enumerate(keys):
        one = jaxsoft.speculative_sample(key, *(a[i] for a in arrays))
        np.testing.assert_array_equal(one.class_id, mapped.class_id[i])
    empty = jaxsoft.speculative_sample(KEY, target[:0], draft[:0], ids[:0])
    assert empty.class_id.shape == empty.accepted.shape == (0,)


def test_rows_of_shards_and_of_tiles():
    target = truth.logits("unit", (72, 5000), 1)
    draft = truth.logits("unit", (72, 5000), 2)
    ids = np.asarray(jaxsoft.sample(OTHER, draft))
    draw = jax.jit(lambda *a: jaxsoft.speculative_sample(KEY, *a, temperature=0.5))
    expected = draw(target, draft, ids)
    few = draw(target[:9], draft[:9], ids[:9])
    np.testing.assert_array_equal(few.class_id, expected.class_id[:9])
    mesh = Mesh(np.array(jax.devices()[:8]), ("rows",))
    spec = PartitionSpec("rows")
    arrays = jax.device_put((target, draft, ids), NamedSharding(mesh, spec))
    found = draw(*arrays)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    np.testing.assert_array_equal(found.accepted, expected.accepted)
    # Every shard has the places of its own rows.
    alone = jax.shard_map(draw, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    found = jax.jit(alone)(target, draft, ids)
    np.testing.assert_array_equal(found.class_id[:9], expected.class_id[:9])
    # Or those that the rows have among all, if the axes are named.
    named = functools.partial(jaxsoft.speculative_sample, KEY, temperature=0.5)
    alone = jax.shard_map(
        functools.partial(named, token_axes="rows"),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    found = jax.jit(alone)(target, draft, ids)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    np.testing.assert_array_equal(found.accepted, expected.accepted)


def test_dropped_classes():
    target = truth.logits("unit", (40, CLASSES), 1)
    draft = truth.logits("unit", (40, CLASSES), 2)
    where = np.random.default_rng(1).random(CLASSES) < 0.2
    ids = np.asarray(jaxsoft.sample(OTHER, draft))
    drawn, accepted = jaxsoft.speculative_sample(KEY, target, draft, ids, where=where)
    assert where[drawn].all() and 0 < accepted.sum() < 40
    x, y = (np.where(where, x, -np.inf).astype("float32") for x in (target, draft))
    again = jaxsoft.speculative_sample(KEY, x, y, ids)
    np.testing.assert_array_equal(again.class_id, drawn)
    none = jaxsoft.speculative_sample(
        KEY, target, draft, ids, where=np.zeros(CLASSES, bool)
    )
    np.testing.assert_array_equal(none.class_id, -1)
    assert not none.accepted.any()


def test_rows_without_a_sample_disturb_no_other():
    target = truth.logits("unit", (12, CLASSES), 1)
    draft = truth.logits("unit", (12, CLASSES), 2)
    ids = np.arange(12)
    ids[9] = -1
    bad, worse = target.copy(), draft.copy()
    bad[1], bad[2, 5], bad[3, 299], bad[4, 4] = -np.inf, np.nan, np.inf, np.inf
    worse[5, 5], worse[6, 200], worse[7, 3] = np.nan, np.nan, np.inf
    # Without a draft its logits are nothing; without a class it has drafted none.
    worse[9, 5], worse[10] = np.nan, -np.inf
    tau = np.ones((12, 1), "float32")
    plain = decide(target, draft, ids, tau, tau).class_id
    drawn, accepted = decide(bad, worse, ids, tau, tau)
    np.testing.assert_array_equal(drawn[1:8], -1)
    assert not accepted[1:8].any()
    np.testing.assert_array_equal(
        drawn[jnp.array([0, 8, 9, 11])], plain[jnp.array([0, 8, 9, 11])]
    )
    assert drawn[10] >= 0
    for place in range(2):
        for wrong in (-1.0, np.nan):
            taus = [tau.copy(), tau.copy()]
            taus[place][3] = wrong
            drawn = decide(target, draft, ids, *taus).class_id
            assert drawn[3] == -1
            np.testing.assert_array_equal(np.delete(drawn, 3), np.delete(plain, 3))


def test_samples_have_no_derivative():
    x = truth.logits("unit", (4, 30))

    @jax.jit
    @jax.grad
    def gradient(x):
        drawn = jaxsoft.speculative_sample(KEY, x, 2 * x, jnp.arange(4))
        return x[:, 0].sum() + drawn.class_id.astype(jnp.float32).sum()

    np.testing.assert_array_equal(gradient(x)[:, 1:], 0)


def test_export():
    def drawn(key, target, draft, ids, tau):
        return jaxsoft.speculative_sample(
            key, target, draft, ids, temperature=tau, where=np.arange(CLASSES) > 3
        )

    logits = [np.tile(x, (4, 1)) for x in (TARGET, DRAFT)]
    check_round_trip(drawn, KEY, *logits, np.arange(4), np.float32(0.7))


ZEROS, IDS = np.zeros((2, 3), "float32"), np.zeros(2, int)
WRONG = [
    ((ZEROS.astype(int), ZEROS, IDS), {}, TypeError, "`target_logits` must have a fl"),
    ((ZEROS, ZEROS.astype(int), IDS), {}, TypeError, "`draft_logits` must have a fl"),
    ((ZEROS, ZEROS[:1], IDS), {}, ValueError, r"`draft_logits` .* target_logits.shape"),
    ((ZEROS, ZEROS, ZEROS[:, 0]), {}, TypeError, "`draft_ids` must have an integer"),
    (
        (ZEROS, ZEROS, IDS[:1]),
        {},
        ValueError,
        r"`draft_ids` must have shape .* = \(2,\)",
    ),
    ((ZEROS, ZEROS, IDS), {"axis": 2}, ValueError, "`axis` must name one of"),
    (
        (ZEROS, ZEROS, IDS),
        {"temperature": -1.0},
        ValueError,
        "`temperature` must not be negative or NaN, got -1",
    ),
    (
        (ZEROS, ZEROS, IDS),
        {"draft_temperature": float("nan")},
        ValueError,
        "`draft_temperature` must not be negative or NaN, got nan",
    ),
    (
        (ZEROS, ZEROS, IDS),
        {"draft_temperature": np.ones(3, "f")},
        ValueError,
        "`draft_temperature` .* class axis must have size 1",
    ),
    ((ZEROS, ZEROS, IDS), {"where": ZEROS}, TypeError, "`where` must have dtype bool"),
    (
        (ZEROS, ZEROS, IDS),
        {"token_axes": "rows"},
        ValueError,
        "`token_axes` must name axes of an enclosing",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_messages(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jaxsoft.speculative_sample(KEY, *arguments, **options)
