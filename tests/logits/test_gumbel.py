"""Gumbel-softmax against the plain formula with the same noise; gumbel_top_k."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from scipy import stats

from jaxsoft import gumbel_softmax, gumbel_top_k, softmax
from jaxsoft._core import noise
from jaxsoft.logits.rows import to_rows
from tests import truth

KEY = jax.random.key(7)
ROWS, CLASSES = 6, 300


@functools.partial(jax.jit, static_argnames="dtype")
def gumbel(dtype="float32"):
    words = noise.row_words(KEY, ROWS)
    ids = jnp.arange(CLASSES)
    return noise.paired_gumbel(words, noise.CLASSES, ids, jnp.dtype(dtype))


@jax.jit
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
    truth.assert_as_good(out, plain(x, tau, gumbel()), exact)
    np.testing.assert_array_equal(jax.jit(gumbel_softmax)(KEY, x, tau), out)
    hard = np.asarray(gumbel_softmax(KEY, x, tau, hard=True))
    assert set(np.unique(hard)) == {0.0, 1.0} and (hard.sum(-1) == 1).all()
    np.testing.assert_array_equal(hard.argmax(-1), np.asarray(out).argmax(-1))


@jax.jit
def sample_and_gradient(x):
    cotangent = np.cos(np.arange(CLASSES, dtype="float32"))[None]

    def total(x):
        y = gumbel_softmax(KEY, x, 0.5)
        return (y.astype("float32") * cotangent).sum(), y

    gradient, y = jax.grad(total, has_aux=True)(x)
    return y, gradient


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_share_noise_and_round_once(dtype):
    x = truth.logits("unit", (ROWS, CLASSES)).astype(dtype)
    out, gradient = sample_and_gradient(x)
    assert out.dtype == x.dtype
    wide, exact = sample_and_gradient(x.astype("float32"))
    np.testing.assert_array_equal(out, wide.astype(dtype))
    assert gradient.dtype == x.dtype
    # The sample that the derivative starts from was rounded once.
    bound = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-7}[dtype]
    assert truth.error(gradient.astype("float32"), exact) < bound


@pytest.mark.parametrize("hard", [False, True])
def test_derivatives_of_both_arguments(hard, x64):
    x = np.asarray(truth.logits("unit", (ROWS, CLASSES)), "float64")
    tau = np.linspace(0.4, 2.0, ROWS)[:, None]
    cotangent = np.cos(np.arange(ROWS * CLASSES)).reshape(x.shape)

    @jax.jit
    def derivatives(x, tau):
        drawn = gumbel(dtype="float64")

        def ours(x, tau):
            return (gumbel_softmax(KEY, x, tau, hard=hard) * cotangent).sum()

        def exact(x, tau):
            return (plain(x, tau, drawn) * cotangent).sum()

        moved = (jnp.sin(x), jnp.ones_like(tau))
        return [
            (
                jax.grad(f, (0, 1))(x, tau),
                jax.jvp(f, (x, tau), moved)[1],
                jax.grad(lambda x, f=f: (jax.grad(f)(x, tau) * jnp.sin(x)).sum())(x),
            )
            for f in (ours, exact)
        ]

    first, along, second = zip(*derivatives(x, tau), strict=True)
    for own, true in zip(*first, strict=True):
        np.testing.assert_allclose(own, true, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(*along, rtol=1e-9)
    np.testing.assert_allclose(*second, rtol=1e-8, atol=1e-12)


@functools.partial(jax.jit, static_argnames="hard")
def sample_and_gradients(x, tau, hard):
    y, pull = jax.vjp(lambda x, t: gumbel_softmax(KEY, x, t, hard=hard), x, tau)
    return y, *pull(jnp.cos(x))


@pytest.mark.parametrize("tau", [0.0, 1e-38, 1e-3, jnp.inf])
@pytest.mark.parametrize("hard", [False, True])
def test_limits_of_the_temperature(tau, hard):
    x = truth.logits("range", (ROWS, CLASSES))
    for given in (np.float32(tau), np.full((ROWS, 1), tau, "float32")):
        y, dx, dtau = map(np.asarray, sample_and_gradients(x, given, hard=hard))
        assert all(np.isfinite(a).all() for a in (y, dx, dtau))
        if hard or tau < 1e-37:
            assert set(np.unique(y)) == {0.0, 1.0} and (y.sum(-1) == 1).all()
        elif tau == jnp.inf:
            np.testing.assert_allclose(y, 1 / CLASSES, rtol=1e-6)
        if tau in (0.0, jnp.inf) or tau < 1e-37:
            assert not dx.any() and not dtau.any()


def test_masks_empty_rows_and_lost_rows():
    x = truth.logits("unit", (ROWS, CLASSES))
    where = np.arange(CLASSES)[None] % 3 == 1
    where = where & (np.arange(ROWS)[:, None] != 2)
    x[4], x[5, 7], x[3] = np.nan, np.inf, -np.inf
    for hard in (False, True):

        @jax.jit
        def masked(x, hard=hard):
            y, pull = jax.vjp(
                lambda x: gumbel_softmax(KEY, x, 0.7, where=where, hard=hard), x
            )
            return y, *pull(jnp.cos(jnp.nan_to_num(x)))

        y, dx = map(np.asarray, masked(x))
        assert (y[:4][:, ~where[0]] == 0).all()
        np.testing.assert_allclose(y.sum(-1)[:4], [1, 1, 0, 0], rtol=1e-6)
        assert np.isfinite(dx[:4]).all() and np.isnan(y[4:]).any(-1).all()
        assert not dx[2:4].any()
    shared = gumbel_softmax(KEY, x[:2], 0.7, where=where[0])
    np.testing.assert_array_equal(shared, gumbel_softmax(KEY, x, 0.7, where=where)[:2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hard_samples_have_the_probabilities_of_the_logits(dtype):
    logits = np.asarray([0.0, -2.0, 1.5, -4.0, 0.25], dtype)
    drawn = gumbel_softmax(KEY, np.broadcast_to(logits, (100_000, 5)), 0.3, hard=True)
    counts = np.asarray(drawn, np.float64).sum(0)
    p = truth.softmax(np.asarray(logits, np.float64))
    assert stats.chisquare(counts, p * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("generator", noise.GENERATORS)
def test_rows_do_not_depend_on_tiles(generator):
    """On a CPU rows are computed in tiles, elsewhere all at once."""
    x = truth.logits("unit", (45, 8192))

    @jax.jit
    def at_once(key, x):
        words = noise.row_words(key, 3)
        drawn = noise.first_gumbel(
            *(words, noise.CLASSES, x.shape[1], x.dtype), generator, fused=True
        )
        noisy = x - x.max(1, keepdims=True) + drawn
        return softmax(noisy, temperature=0.7)

    tiled = gumbel_softmax(KEY, x, 0.7, generator=generator)
    np.testing.assert_allclose(tiled[:3], at_once(KEY, x[:3]), rtol=2e-6, atol=1e-9)
    few = gumbel_softmax(KEY, x[:20], 0.7, generator=generator)
    np.testing.assert_allclose(tiled[:20], few, rtol=2e-6, atol=1e-9)


def test_vmap_axes_and_leading_dimensions():
    x = truth.logits("unit", (4, 3, 50))
    keys = jax.random.split(KEY, 4)
    mapped = jax.vmap(lambda key, x: gumbel_softmax(key, x, 0.7))(keys, x)
    for key, each, y in zip(keys, x, mapped, strict=True):
        np.testing.assert_allclose(y, gumbel_softmax(key, each, 0.7), rtol=1e-6)
    flat = gumbel_softmax(KEY, x.reshape(12, 50), 0.7).reshape(x.shape)
    np.testing.assert_allclose(gumbel_softmax(KEY, x, 0.7), flat, rtol=1e-6)
    moved = gumbel_softmax(KEY, np.moveaxis(x, -1, 1), 0.7, axis=1)
    np.testing.assert_allclose(np.moveaxis(np.asarray(moved), 1, -1), flat, rtol=1e-6)
    assert gumbel_softmax(KEY, x[:0], 0.7).shape == (0, 3, 50)


def test_offsets_change_nothing():
    x = np.round(truth.logits("unit", (ROWS, CLASSES)) * 4) / 4
    for offset in (1e4, 1e6, -1e6):
        np.testing.assert_array_equal(
            gumbel_softmax(KEY, x + np.float32(offset), 0.7),
            gumbel_softmax(KEY, x, 0.7),
        )


@pytest.mark.usefixtures("optimized")
def test_neither_noise_nor_anything_else_of_its_size_is_kept():
    x = np.zeros((256, 4096), "float32")

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
    x = jax.device_put(truth.logits("unit", (8, 50)), jax.NamedSharding(mesh, spec))

    @jax.jit
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
    logits = np.asarray([0.5, -1.0, 0.0, 1.0], "float32")
    p = truth.softmax(logits)
    values, ids = gumbel_top_k(KEY, np.broadcast_to(logits, (50_000, 4)), 2)
    assert (np.diff(values, axis=-1) <= 0).all() and ids.dtype == jnp.int32
    pairs = list(itertools.permutations(range(4), 2))
    law = np.array([p[a] * p[b] / (1 - p[a]) for a, b in pairs])
    found = np.asarray(ids)
    counts = [((found == pair).all(-1)).sum() for pair in pairs]
    assert sum(counts) == 50_000
    assert stats.chisquare(counts, law * 50_000).pvalue > 1e-4


def test_top_k_of_few_classes_and_lost_rows():
    x = truth.logits("unit", (3, 5))
    where = np.arange(5)[None] < np.asarray([[5], [2], [5]])
    x[2, 0] = np.nan
    values, ids = map(np.asarray, gumbel_top_k(KEY, x, 3, where=where))
    assert (ids[1] == [*ids[1, :2], -1]).all()
    assert set(ids[1, :2]) == {0, 1} and values[1, 2] == -np.inf
    assert (ids[2] == -1).all() and np.isnan(values[2]).all()
    across = gumbel_top_k(KEY, x.T, 3, axis=0, where=where.T)
    for one, other in zip(across, (values, ids), strict=True):
        np.testing.assert_array_equal(one.T, other)
    _, best = gumbel_top_k(KEY, x[:2], 1)
    hard = gumbel_softmax(KEY, x[:2], hard=True)
    np.testing.assert_array_equal(best[:, 0], np.argmax(hard, -1))


def test_export():
    x = truth.logits("unit", (4, 50))

    @jax.jit
    def every(key, x, tau):
        loss = lambda x: (gumbel_softmax(key, x, tau) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss)(x), gumbel_top_k(key, x, 3)

    text = export.export(every)(KEY, x, np.float32(0.7)).serialize()
    found = export.deserialize(text).call(KEY, x, np.float32(0.7))
    expected = every(KEY, x, np.float32(0.7))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


ZEROS = np.zeros((2, 3), "float32")


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((np.zeros(3, int),), {}, TypeError, "`logits` must have a floating-point"),
        ((ZEROS[:, :0],), {}, ValueError, "`logits` must have at least one class"),
        ((ZEROS[0], -1.0), {}, ValueError, "`temperature` must not be negative"),
        ((ZEROS[0], np.ones(3, "f")), {}, ValueError, "`temperature` must broadcast"),
        ((ZEROS[0],), {"axis": 1}, ValueError, "`axis` must name one of"),
        ((ZEROS[0],), {"where": np.ones(3)}, TypeError, "`where` must have dtype"),
        ((ZEROS[0],), {"generator": "xorshift"}, ValueError, "`generator` must be"),
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
        gumbel_top_k(KEY, ZEROS[0], k)


def test_a_traced_negative_temperature_gives_no_number():
    out = jax.jit(gumbel_softmax)(KEY, ZEROS, np.float32(-1))
    assert np.isnan(out).all()


def test_rows_keep_what_all_share():
    tau = np.ones((1, 1, 1), "float32")
    logits = np.zeros((2, 3, 4), "float32")
    _, rows, back = to_rows(logits, tau, 1, np.ones(4, bool))
    assert rows.logits.shape == (8, 3) and rows.tau is not None
    assert rows.tau.shape == (1, 1)
    shapes = [back(jnp.zeros(shape)).shape for shape in ((8, 3), (8,))]
    assert shapes == [(2, 3, 4), (2, 4)]
