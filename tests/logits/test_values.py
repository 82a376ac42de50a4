"""Values of the logits room against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft
from jaxsoft.logits import centre
from jaxsoft.logits import divergence as logits_divergence
from tests import truth

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "entropy")
PLAIN = {
    name: jax.jit(function)
    for name, function in {
        "softmax": lambda x, t: jax.nn.softmax(x / t),
        "log_softmax": lambda x, t: jax.nn.log_softmax(x / t),
        "logsumexp": lambda x, t: jax.nn.logsumexp(x / t, axis=-1),
        "entropy": lambda x, t: (
            -(jax.nn.softmax(x / t) * jax.nn.log_softmax(x / t)).sum(-1)
        ),
    }.items()
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
@pytest.mark.parametrize("tau", [1.0, 0.07, 2.0, 1e4])
def test_matches_float64(name, kind, tau):
    x = truth.logits(kind, (5, 257))
    tau = np.float32(tau)
    value = getattr(jaxsoft, name)(x, temperature=float(tau))
    plain = PLAIN[name](x, tau)
    truth.assert_as_good(value, plain, getattr(truth, name)(x, float(tau)))
    traced = jax.jit(getattr(jaxsoft, name))(x, temperature=tau)
    truth.assert_as_good(traced, plain, getattr(truth, name)(x, float(tau)))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_computes_in_float32_and_rounds_once(name, dtype, x64):
    x = jnp.asarray(truth.logits("unit", (4, 33))).astype(dtype)
    value = getattr(jaxsoft, name)(x, temperature=0.7)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    expected = getattr(jaxsoft, name)(x.astype(wide), temperature=0.7)
    reduces = name in ("logsumexp", "entropy")
    assert value.dtype == (wide if reduces else x.dtype)
    np.testing.assert_array_equal(value, expected.astype(value.dtype))
    exact = getattr(truth, name)(np.asarray(x, np.float64), 0.7)
    assert truth.error(expected, exact) < (1e-14 if dtype == "float64" else 1e-6)


@pytest.mark.parametrize("size", [1e9, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("tau", [0.07, 0.7, 1.0, 1.3, 1e4, 1e30])
def test_huge_logits_are_finite_and_equal_under_jit(size, tau):
    x = np.asarray([[1.0, 0.5, 1.0, -1.0], [0.0, 0.25, -1.0, 0.0]]) * size
    x = x.astype("float32")
    eager = jaxsoft.softmax(x, temperature=tau)
    compiled = jax.jit(jaxsoft.softmax)(x, temperature=np.float32(tau))
    exact = truth.softmax(x, float(np.float32(tau)))
    for value in (eager, compiled, jax.jit(jaxsoft.softmax)(x, temperature=tau)):
        assert np.isfinite(value).all()
        assert truth.error(value, exact) < 1e-6
        np.testing.assert_allclose(np.sum(value, -1), 1, rtol=1e-6)
    assert not np.isnan(jaxsoft.log_softmax(x, temperature=tau)).any()
    assert not np.isnan(jaxsoft.logsumexp(x, temperature=tau)).any()
    assert np.isfinite(jaxsoft.entropy(x, temperature=tau)).all()


def test_the_widest_range_at_a_huge_temperature():
    x = jnp.asarray([3e38, -3e38], jnp.float32)
    p = np.asarray([0.9975273768, 0.0024726232])
    for tau in (1e38, jnp.float32(1e38)):
        np.testing.assert_allclose(jaxsoft.softmax(x, temperature=tau), p, rtol=1e-5)
        np.testing.assert_allclose(
            jaxsoft.entropy(x, temperature=tau), -np.sum(p * np.log(p)), rtol=1e-5
        )
        np.testing.assert_allclose(
            jaxsoft.logsumexp(x, temperature=tau), 3 - np.log(p[0]), rtol=1e-5
        )
        np.testing.assert_allclose(
            jaxsoft.boltzmann_operator(x, tau), 3e38 * (p[0] - p[1]), rtol=1e-5
        )


def test_probabilities_keep_the_order_of_logits():
    x = np.sort(np.random.default_rng(3).standard_normal((2, 4096)) * 20, -1)
    p = np.asarray(jaxsoft.softmax(x.astype("f"), temperature=0.9))
    assert (np.diff(p, axis=-1) >= 0).all()
    close = np.float32(1) + np.arange(64, dtype="f") * np.float32(2**-23)
    assert (np.diff(np.asarray(jaxsoft.softmax(close[None]))) >= 0).all()


@pytest.mark.parametrize("offset", [1e4, 1e6, 1e7])
def test_common_offset_changes_nothing(offset):
    x = np.round(truth.logits("unit", (4, 50)) * 4).astype("f")
    labels = np.array([0, 49, 7, 3])
    for function in (
        jaxsoft.softmax,
        jaxsoft.log_softmax,
        jaxsoft.entropy,
        lambda x, temperature: jaxsoft.softmax_cross_entropy(x, labels, temperature),
        lambda x, temperature: jaxsoft.distillation_loss(x, x[::-1], temperature),
    ):
        for tau in (1.0, 2.0):
            moved = function(x + np.float32(offset), temperature=tau)
            np.testing.assert_array_equal(moved, function(x, temperature=tau))


def test_cross_entropy_of_labels_smoothing_and_z_loss():
    x = truth.logits("range", (6, 11))
    labels = np.array([0, 10, 3, 4, 5, 6])
    log_p = truth.log_softmax(x, 0.7)
    lse = truth.logsumexp(x, 0.7)
    nll = -log_p[np.arange(6), labels]
    loss = jaxsoft.softmax_cross_entropy(x, labels, 0.7)
    assert truth.error(loss, nll) < 1e-6
    loss = jaxsoft.softmax_cross_entropy(
        x, labels, 0.7, label_smoothing=0.1, z_loss=1e-2
    )
    expected = 0.9 * nll - 0.1 * log_p.mean(-1) + 1e-2 * lse**2
    assert truth.error(loss, expected) < 1e-6
    plain = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    truth.assert_as_good(
        jaxsoft.softmax_cross_entropy(x, labels),
        plain,
        -truth.log_softmax(x)[np.arange(6), labels],
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_what_accelerators_select_is_what_cpus_gather(axis, dtype, monkeypatch):
    logits = np.array(truth.logits("unit", (8, 37)))
    kept = np.ones(logits.shape, bool)
    labels = np.array([0, 36, 5, 5, 5, 5, 37, 7])
    logits[2, 5], logits[3, 5], logits[4, 6] = -np.inf, np.nan, np.nan
    kept[5, 5], kept[7, 6] = False, False
    logits, kept = (jnp.asarray(np.moveaxis(a, 1, axis)) for a in (logits, kept))

    def with_gradient(where):
        value, pull = jax.vjp(
            lambda x: jaxsoft.softmax_cross_entropy(
                x, labels.astype(dtype), axis=axis, where=where
            ),
            logits,
        )
        return value, pull(jnp.ones_like(value))[0]

    def on(platform):
        def chosen(*arrays, default, **others):
            return others.get(platform, default)(*arrays)

        jax.clear_caches()
        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
        return [*with_gradient(None), *with_gradient(kept)]

    found = on("tpu")
    for selected, gathered in zip(found, on("cpu"), strict=True):
        np.testing.assert_array_equal(selected, gathered)
    jax.clear_caches()
    assert np.isnan(found[0][jnp.array([3, 4, 6])]).all()
    assert found[0][2] == jnp.inf and found[2][5] == jnp.inf


def test_smoothed_labels_of_no_rows():
    x, labels = np.zeros((0, 5), "float32"), np.zeros(0, "int32")
    assert jaxsoft.softmax_cross_entropy(x, labels, label_smoothing=0.1).shape == (0,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("held", [np.nan, -np.inf, np.inf])
def test_what_a_row_without_weight_holds_changes_no_bit(smoothing, held):
    x, labels = truth.logits("unit", (64, 1000)), np.zeros(64, int)
    weights = np.arange(64) != 5

    @jax.jit
    def loss(x):
        options = {"label_smoothing": smoothing, "weights": weights}
        return jaxsoft.softmax_cross_entropy(x, labels, **options)

    holds = np.where(weights[:, None], x, held).astype(x.dtype)
    np.testing.assert_array_equal(loss(holds), loss(x))


@pytest.mark.parametrize("name", ["entropy", "boltzmann_operator", "smoothed"])
def test_rows_that_devices_share_are_not_gathered(name, monkeypatch):
    monkeypatch.setattr(centre, "_MANY", 1000)
    monkeypatch.setattr(centre, "_PART", 1000)
    call = {
        "entropy": lambda x: jaxsoft.entropy(x, temperature=0.7),
        "boltzmann_operator": lambda x: jaxsoft.boltzmann_operator(x, 0.7),
        "smoothed": lambda x: jaxsoft.softmax_cross_entropy(
            x, jnp.zeros(64, int), label_smoothing=0.1
        ),
    }[name]
    mesh = jax.make_mesh((4,), ("rows",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("rows"))
    x = jax.ShapeDtypeStruct((64, 311), jnp.float32, sharding=rows)
    assert "all-gather" not in str(jax.jit(call).lower(x).compile().as_text())


def test_the_mean_over_many_rows_counts_the_kept_classes_of_each(monkeypatch):
    """More rows than a CPU sums up at once; some lack a class, one has but one."""
    # Rows that several devices may share are not sliced.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = truth.logits("offset", (37, 32768))
    x[5, 7:9] = x[11] = x[36, 1:] = -np.inf
    x[11, 3] = 2.0
    kept, labels = x != -np.inf, np.zeros(37, int)

    @jax.jit
    def smoothed(x, tau):
        def total(x, tau):
            loss = jaxsoft.softmax_cross_entropy(x, labels, tau, label_smoothing=1.0)
            return loss.sum(), loss

        return jax.grad(total, (0, 1), has_aux=True)(x, tau)

    (dx, dtau), loss = smoothed(jnp.asarray(x), jnp.float32(0.7))
    log_p = truth.log_softmax(x, 0.7)
    finite = np.where(kept, log_p, 0)
    expected = -finite.sum(-1) / kept.sum(-1)
    assert truth.error(loss, expected) < 1e-6
    p, uniform = np.exp(log_p), kept / kept.sum(-1, keepdims=True)
    assert truth.error(dx, (p - uniform) / 0.7) < 1e-5
    assert truth.error(dtau, ((uniform - p) * finite).sum() / 0.7) < 1e-5


def test_expectations_of_very_many_logits_are_those_of_their_halves(monkeypatch):
    """A CPU takes them in parts; some rows lack a class, one has none."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = truth.logits("offset", (2, 65, 65536))
    x[0, 5, 7:9] = x[0, 11] = x[1, 64, 1:] = -np.inf
    assert x.size > 2**23 > x[0].size
    tau = jnp.linspace(0.5, 2, 65)[:, None]

    @jax.jit
    def both(x):
        return (
            jaxsoft.entropy(x, temperature=tau),
            jaxsoft.boltzmann_operator(x, 0.7) - 1e6,
        )

    halves = [both(x[0]), both(x[1])]
    for found, *parts in zip(both(x), *halves, strict=True):
        np.testing.assert_allclose(found, np.stack(parts), rtol=1e-5)


def divergence(name, student, teacher, tau, where=None):
    q, p = (truth.softmax(x, tau, where) for x in (student, teacher))
    return truth.divergence(p, q, name) * tau**2


@pytest.mark.many_cases
@pytest.mark.parametrize("name", truth.DIVERGENCES)
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("kind", ["unit", "peaked", "range", "offset"])
def test_distillation_matches_float64(name, tau, kind):
    student = truth.logits(kind, (4, 9), seed=1)
    teacher = truth.logits(kind, (4, 9), seed=2)
    where = np.arange(9) != 3
    for mask, given in ((None, tau), (where, np.float32(tau))):
        options = truth.DIVERGENCES[name][0]
        value = jaxsoft.distillation_loss(
            student, teacher, given, where=mask, **options
        )
        exact = divergence(name, student, teacher, float(given), mask)
        # float64 loses digits itself where the divergence is tiny.
        assert truth.error(value, exact) < 1e-6 + 1e-11 * tau**2


@pytest.mark.parametrize("name", truth.DIVERGENCES)
def test_distillation_of_close_and_hot_distributions_keeps_its_digits(name):
    teacher = truth.logits("unit", (4, 9))
    student = teacher + truth.logits("unit", (4, 9), seed=1) * np.float32(1e-3)
    gap = student.astype("float64") - teacher
    options, (of_p, of_q, share_p, share_q) = truth.DIVERGENCES[name]
    limit = gap.var(-1) / 2 * (of_p * share_q**2 + of_q * share_p**2)
    # An array is a value of one program, a Python number is a program of its own.
    for tau in (*np.asarray([1e4, 1e18, 1e37, np.inf], "float32"), float("inf")):
        value = jaxsoft.distillation_loss(student, teacher, tau, **options)
        np.testing.assert_allclose(value, limit, rtol=2e-3)
    zero = jaxsoft.distillation_loss(student, student, 3.0, **options)
    np.testing.assert_array_equal(zero, np.zeros(4))
    cold = jaxsoft.distillation_loss(student, teacher, 0.0, **options)
    np.testing.assert_array_equal(cold, np.zeros(4))


@pytest.mark.parametrize("name", ["forward_kl", "beta"])
def test_distillation_by_tiles_is_that_of_all_rows(name, monkeypatch):
    """Of many logits a CPU compares a few rows at a time."""
    # Rows that several devices may share are not sliced.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    student, teacher = (truth.logits("unit", (2, 7, 5), seed=s) for s in (1, 2))
    tau = np.linspace(0.5, 3, 14, dtype="float32").reshape(2, 7, 1)
    where = np.arange(5) != 3
    options = truth.DIVERGENCES[name][0]

    def step():
        def loss(student, tau):
            return jaxsoft.distillation_loss(
                student, teacher, tau, where=where, **options
            )

        def total(student, tau):
            return (loss(student, tau) ** 2).sum()

        by_both = jax.grad(total, (0, 1))
        return jax.jit(lambda *arrays: (loss(*arrays), by_both(*arrays)))(student, tau)

    at_once = step()
    monkeypatch.setattr(logits_divergence, "_MANY", 0)
    monkeypatch.setattr(logits_divergence, "tile_rows", lambda classes: 4)
    jax.clear_caches()
    by_tiles = step()
    jax.clear_caches()
    for found, exact in zip(*map(jax.tree.leaves, (by_tiles, at_once)), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7)
