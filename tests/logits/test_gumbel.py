"""Gumbel-softmax against the plain formula with the same noise; gumbel_top_k."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from scipy import stats

from jaxsoft import gumbel_softmax, gumbel_top_k
from jaxsoft._core import noise
from jaxsoft.logits import perturbation
from jaxsoft.logits.rows import Rows, to_rows
from tests import truth

KEY = jax.random.key(7)
ROWS, CLASSES = 6, 300


def gumbel(rows=ROWS, classes=CLASSES, dtype="float32"):
    words = noise.row_words(KEY, rows)
    ids = jnp.arange(classes)
    return noise.paired_gumbel(words, noise.CLASSES, ids, jnp.dtype(dtype))


def plain(x, tau, drawn):
    x = x - jnp.max(x, axis=-1, keepdims=True)
    return jax.nn.softmax((x + drawn) / tau, axis=-1)


@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_values_are_the_formula_s(kind, tau):
    x = truth.logits(kind, (ROWS, CLASSES))
    drawn = np.asarray(gumbel(), np.float64)
    exact = truth.softmax(
        np.asarray(x, np.float64) - x.max(-1, keepdims=True) + drawn, tau
    )
    out = gumbel_softmax(KEY, x, tau)
    truth.assert_as_good(out, plain(jnp.asarray(x), tau, gumbel()), exact)
    np.testing.assert_array_equal(jax.jit(gumbel_softmax)(KEY, x, tau), out)
    hard = np.asarray(gumbel_softmax(KEY, x, tau, hard=True))
    assert set(np.unique(hard)) == {0.0, 1.0} and (hard.sum(-1) == 1).all()
    np.testing.assert_array_equal(hard.argmax(-1), np.asarray(out).argmax(-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_share_noise_and_round_once(dtype):
    x = jnp.asarray(truth.logits("unit", (ROWS, CLASSES)), dtype)
    out = gumbel_softmax(KEY, x, 0.5)
    assert out.dtype == x.dtype
    wide = gumbel_softmax(KEY, x.astype("float32"), 0.5)
    np.testing.assert_array_equal(out, wide.astype(dtype))
    cotangent = jnp.cos(jnp.arange(CLASSES, dtype="float32"))[None]

    def total(x):
        y = gumbel_softmax(KEY, x, 0.5)
        return (y.astype("float32") * cotangent).sum()

    gradient = jax.grad(total)(x)
    assert gradient.dtype == x.dtype
    exact = jax.grad(total)(x.astype("float32"))
    # The sample that the derivative starts from was rounded once.
    bound = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-7}[dtype]
    assert truth.error(gradient.astype("float32"), exact) < bound


@pytest.mark.parametrize("hard", [False, True])
def test_derivatives_of_both_arguments(hard, x64):
    x = jnp.asarray(truth.logits("unit", (ROWS, CLASSES)), "float64")
    tau = jnp.linspace(0.4, 2.0, ROWS, dtype="float64")[:, None]
    drawn = gumbel(dtype="float64")
    cotangent = jnp.cos(jnp.arange(float(ROWS * CLASSES))).reshape(x.shape)

    def ours(x, tau):
        return (gumbel_softmax(KEY, x, tau, hard=hard) * cotangent).sum()

    def exact(x, tau):
        return (plain(x, tau, drawn) * cotangent).sum()

    for own, true in zip(
        jax.grad(ours, (0, 1))(x, tau), jax.grad(exact, (0, 1))(x, tau), strict=True
    ):
        np.testing.assert_allclose(own, true, rtol=1e-9, atol=1e-12)
    moved = (jnp.sin(x), jnp.ones_like(tau))
    along = [jax.jvp(f, (x, tau), moved)[1] for f in (ours, exact)]
    np.testing.assert_allclose(*along, rtol=1e-9)
    second = [
        jax.grad(lambda x, f=f: (jax.grad(f)(x, tau) * jnp.sin(x)).sum())(x)
        for f in (ours, exact)
    ]
    np.testing.assert_allclose(*second, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 1e-38, 1e-3, jnp.inf])
@pytest.mark.parametrize("hard", [False, True])
def test_limits_of_the_temperature(tau, hard):
    x = jnp.asarray(truth.logits("range", (ROWS, CLASSES)))
    for given in (tau, jnp.float32(tau), jnp.full((ROWS, 1), tau, "float32")):

        def both(x, tau):
            y, pull = jax.vjp(lambda x, t: gumbel_softmax(KEY, x, t, hard=hard), x, tau)
            return y, *pull(jnp.cos(x))

        y, dx, dtau = both(x, jnp.asarray(given))
        assert all(np.isfinite(a).all() for a in (y, dx, dtau))
        y = np.asarray(y)
        if hard or tau < 1e-37:
            assert set(np.unique(y)) == {0.0, 1.0} and (y.sum(-1) == 1).all()
        elif tau == jnp.inf:
            np.testing.assert_allclose(y, 1 / CLASSES, rtol=1e-6)
        if tau in (0.0, jnp.inf) or tau < 1e-37:
            assert not np.asarray(dx).any() and not np.asarray(dtau).any()


def test_masks_empty_rows_and_lost_rows():
    x = jnp.asarray(truth.logits("unit", (ROWS, CLASSES)))
    where = jnp.arange(CLASSES)[None] % 3 == 1
    where = where & (jnp.arange(ROWS)[:, None] != 2)
    x = x.at[4].set(jnp.nan).at[5, 7].set(jnp.inf).at[3].set(-jnp.inf)
    for hard in (False, True):
        y, pull = jax.vjp(
            lambda x, hard=hard: gumbel_softmax(KEY, x, 0.7, where=where, hard=hard), x
        )
        y, (dx,) = np.asarray(y), pull(jnp.cos(jnp.nan_to_num(x)))
        assert (y[:4][:, ~np.asarray(where[0])] == 0).all()
        np.testing.assert_allclose(y.sum(-1)[:4], [1, 1, 0, 0], rtol=1e-6)
        assert np.isfinite(np.asarray(dx)[:4]).all() and np.isnan(y[4:]).any(-1).all()
        assert not np.asarray(dx)[2:4].any()
    shared = gumbel_softmax(KEY, x[:2], 0.7, where=where[0])
    np.testing.assert_array_equal(shared, gumbel_softmax(KEY, x, 0.7, where=where)[:2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hard_samples_have_the_probabilities_of_the_logits(dtype):
    logits = jnp.asarray([0.0, -2.0, 1.5, -4.0, 0.25], dtype)
    drawn = gumbel_softmax(KEY, jnp.broadcast_to(logits, (100_000, 5)), 0.3, hard=True)
    counts = np.asarray(drawn, np.float64).sum(0)
    p = truth.softmax(np.asarray(logits, np.float64))
    assert stats.chisquare(counts, p * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("generator", noise.GENERATORS)
def test_rows_do_not_depend_on_tiles(generator):
    """On a CPU rows are computed in tiles, elsewhere all at once."""
    x = jnp.asarray(truth.logits("unit", (45, 8192)))
    words = noise.row_words(KEY, 45)
    tiled = jax.jit(gumbel_softmax, static_argnames="generator")(
        KEY, x, 0.7, generator=generator
    )
    rows = Rows(x[:3], None, None)
    noisy = perturbation._noisy(generator, True, words[:3], rows)
    np.testing.assert_allclose(
        tiled[:3], perturbation._softmax(noisy, 0.7), rtol=2e-6, atol=1e-9
    )
    few = gumbel_softmax(KEY, x[:20], 0.7, generator=generator)
    np.testing.assert_allclose(tiled[:20], few, rtol=2e-6, atol=1e-9)


def test_vmap_axes_and_leading_dimensions():
    x = jnp.asarray(truth.logits("unit", (4, 3, 50)))
    keys = jax.random.split(KEY, 4)
    mapped = jax.vmap(lambda key, x: gumbel_softmax(key, x, 0.7))(keys, x)
    for key, each, y in zip(keys, x, mapped, strict=True):
        np.testing.assert_allclose(y, gumbel_softmax(key, each, 0.7), rtol=1e-6)
    flat = gumbel_softmax(KEY, x.reshape(12, 50), 0.7).reshape(x.shape)
    np.testing.assert_allclose(gumbel_softmax(KEY, x, 0.7), flat, rtol=1e-6)
    moved = gumbel_softmax(KEY, jnp.moveaxis(x, -1, 1), 0.7, axis=1)
    np.testing.assert_allclose(jnp.moveaxis(moved, 1, -1), flat, rtol=1e-6)
    assert gumbel_softmax(KEY, x[:0], 0.7).shape == (0, 3, 50)


def test_offsets_change_nothing():
    x = jnp.round(jnp.asarray(truth.logits("unit", (ROWS, CLASSES))) * 4) / 4
    for offset in (1e4, 1e6, -1e6):
        np.testing.assert_array_equal(
            gumbel_softmax(KEY, x + offset, 0.7), gumbel_softmax(KEY, x, 0.7)
        )


@pytest.mark.usefixtures("optimized")
def test_neither_noise_nor_anything_else_of_its_size_is_kept():
    x = jnp.zeros((256, 4096))

    def both(x, cotangent):
        y, pull = jax.vjp(lambda x: gumbel_softmax(KEY, x, 0.7), x)
        return y, pull(cotangent)[0]

    memory = jax.jit(both).lower(x, x).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < x.nbytes / 2
    _, pull = jax.vjp(lambda x: gumbel_softmax(KEY, x, 0.7), x)
    kept = [a for a in jax.tree.leaves(pull) if getattr(a, "size", 0) >= x.size]
    assert len(kept) == 1


def test_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    x = jax.device_put(
        jnp.asarray(truth.logits("unit", (8, 50))), jax.NamedSharding(mesh, spec)
    )

    def gradient(key, x):
        return jax.grad(lambda x: (gumbel_softmax(key, x, 0.7) ** 2).sum())(x)

    def shard(x):
        return gradient(jax.random.fold_in(KEY, jax.lax.axis_index("data")), x)

    found = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    parts = np.asarray(x).reshape(4, 2, 50)
    expected = [
        gradient(jax.random.fold_in(KEY, i), part) for i, part in enumerate(parts)
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5, atol=1e-8)


def test_without_replacement():
    """Frequencies of ordered pairs, by the law of Plackett and Luce."""
    logits = jnp.asarray([0.5, -1.0, 0.0, 1.0])
    p = truth.softmax(np.asarray(logits))
    values, ids = gumbel_top_k(KEY, jnp.broadcast_to(logits, (50_000, 4)), 2)
    assert (np.diff(values, axis=-1) <= 0).all() and ids.dtype == jnp.int32
    pairs = list(itertools.permutations(range(4), 2))
    law = np.array([p[a] * p[b] / (1 - p[a]) for a, b in pairs])
    found = np.asarray(ids)
    counts = [((found == pair).all(-1)).sum() for pair in pairs]
    assert sum(counts) == 50_000
    assert stats.chisquare(counts, law * 50_000).pvalue > 1e-4


def test_top_k_of_few_classes_and_lost_rows():
    x = jnp.asarray(truth.logits("unit", (3, 5)))
    where = jnp.arange(5)[None] < jnp.asarray([[5], [2], [5]])
    x = x.at[2, 0].set(jnp.nan)
    values, ids = gumbel_top_k(KEY, x, 3, where=where)
    assert (np.asarray(ids)[1] == [*np.asarray(ids)[1, :2], -1]).all()
    assert set(np.asarray(ids)[1, :2]) == {0, 1} and values[1, 2] == -jnp.inf
    assert (np.asarray(ids)[2] == -1).all() and np.isnan(values[2]).all()
    across = gumbel_top_k(KEY, x.T, 3, axis=0, where=where.T)
    for one, other in zip(across, (values, ids), strict=True):
        np.testing.assert_array_equal(one.T, other)
    _, best = gumbel_top_k(KEY, x[:2], 1)
    hard = gumbel_softmax(KEY, x[:2], hard=True)
    np.testing.assert_array_equal(best[:, 0], jnp.argmax(hard, -1))


def test_export():
    x = jnp.asarray(truth.logits("unit", (4, 50)))

    def every(key, x, tau):
        loss = lambda x: (gumbel_softmax(key, x, tau) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss)(x), gumbel_top_k(key, x, 3)

    text = export.export(jax.jit(every))(KEY, x, jnp.float32(0.7)).serialize()
    found = export.deserialize(text).call(KEY, x, jnp.float32(0.7))
    expected = jax.jit(every)(KEY, x, jnp.float32(0.7))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((jnp.zeros(3, int),), {}, TypeError, "`logits` must have a floating-point"),
        ((jnp.zeros((3, 0)),), {}, ValueError, "`logits` must have at least one class"),
        ((jnp.zeros(3), -1.0), {}, ValueError, "`temperature` must not be negative"),
        ((jnp.zeros(3), jnp.ones(3)), {}, ValueError, "`temperature` must broadcast"),
        ((jnp.zeros(3),), {"axis": 1}, ValueError, "`axis` must name one of"),
        ((jnp.zeros(3),), {"where": jnp.ones(3)}, TypeError, "`where` must have dtype"),
        ((jnp.zeros(3),), {"generator": "xorshift"}, ValueError, "`generator` must be"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gumbel_softmax(KEY, *arguments, **options)


@pytest.mark.parametrize(
    "k, error, message",
    [
        (0, ValueError, "`k` must be at least 1"),
        (4, ValueError, "`k` must be at most V = 3, got 4"),
        (1.0, TypeError, "`k` must be an int"),
    ],
)
def test_errors_of_k(k, error, message):
    with pytest.raises(error, match=message):
        gumbel_top_k(KEY, jnp.zeros(3), k)


def test_a_traced_negative_temperature_gives_no_number():
    out = jax.jit(gumbel_softmax)(KEY, jnp.zeros((2, 3)), jnp.float32(-1))
    assert np.isnan(out).all()


def test_rows_keep_what_all_share():
    _, rows, back = to_rows(
        jnp.zeros((2, 3, 4)), jnp.ones((1, 1, 1)), 1, jnp.ones(4, bool)
    )
    assert rows.logits.shape == (8, 3) and rows.tau is not None
    assert rows.tau.shape == (1, 1)
    assert back(jnp.zeros((8, 3))).shape == (2, 3, 4) and back(jnp.zeros(8)).shape == (
        2,
        4,
    )
