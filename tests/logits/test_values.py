"""Values of the logits room against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft
from tests import truth

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "entropy")
PLAIN = {
    "softmax": lambda x, t: jax.nn.softmax(x / t),
    "log_softmax": lambda x, t: jax.nn.log_softmax(x / t),
    "logsumexp": lambda x, t: jax.nn.logsumexp(x / t, axis=-1),
    "entropy": lambda x, t: (
        -(jax.nn.softmax(x / t) * jax.nn.log_softmax(x / t)).sum(-1)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
@pytest.mark.parametrize("tau", [1.0, 0.07, 2.0, 1e4])
def test_matches_float64(name, kind, tau):
    x = truth.logits(kind, (5, 257))
    tau = np.float32(tau)
    value = getattr(jaxsoft, name)(x, temperature=float(tau))
    plain = PLAIN[name](jnp.asarray(x), tau)
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
    x = jnp.asarray([[1.0, 0.5, 1.0, -1.0], [0.0, 0.25, -1.0, 0.0]]) * size
    x = x.astype(jnp.float32)
    eager = jaxsoft.softmax(x, temperature=tau)
    compiled = jax.jit(jaxsoft.softmax)(x, temperature=jnp.float32(tau))
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
    for tau in (1e38, jnp.float32(1e38)):
        np.testing.assert_allclose(
            jaxsoft.softmax(x, temperature=tau), [0.99752738, 0.00247262], rtol=1e-5
        )


@pytest.mark.parametrize("tau", [0.0, 1e-40, np.float32(0), np.zeros((1, 1), "f")])
def test_zero_temperature_is_the_limit(tau):
    x = jnp.asarray([[1.0, 3.0, 3.0, -jnp.inf]], jnp.float32)
    np.testing.assert_array_equal(
        jaxsoft.softmax(x, temperature=tau), [[0, 0.5, 0.5, 0]]
    )
    log_p = jaxsoft.log_softmax(x, temperature=tau)
    np.testing.assert_allclose(log_p, [[-np.inf, -np.log(2), -np.log(2), -np.inf]])
    np.testing.assert_allclose(
        jaxsoft.entropy(x, temperature=tau), [np.log(2)], rtol=1e-6
    )
    np.testing.assert_array_equal(jaxsoft.logsumexp(x, temperature=tau), [np.inf])
    np.testing.assert_array_equal(
        jaxsoft.logsumexp(-x[:, :3], temperature=tau), [-np.inf]
    )
    np.testing.assert_allclose(
        jaxsoft.logsumexp(jnp.zeros((1, 4)), temperature=tau), [np.log(4)], rtol=1e-6
    )
    loss = jaxsoft.softmax_cross_entropy(x, jnp.asarray([1]), tau)
    np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("tau", [float("inf"), np.float32(np.inf)])
def test_infinite_temperature_is_uniform(tau):
    x = jnp.asarray([[1.0, 3e38, -3e38, -jnp.inf]], jnp.float32)
    third = np.float32(1 / 3)
    np.testing.assert_allclose(
        jaxsoft.softmax(x, temperature=tau), [[third, third, third, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(
        jaxsoft.entropy(x, temperature=tau), [np.log(3)], rtol=1e-6
    )
    np.testing.assert_allclose(
        jaxsoft.logsumexp(x, temperature=tau), [np.log(3)], rtol=1e-6
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_traced_temperature_is_nan(name):
    x = jnp.asarray(truth.logits("unit", (2, 5)))
    for tau in (-1.0, jnp.nan):
        out = jax.jit(getattr(jaxsoft, name))(x, temperature=jnp.float32(tau))
        assert np.isnan(out).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_logits_stay_visible(name):
    x = jnp.asarray([[1.0, jnp.nan, 2.0], [1.0, 2.0, 3.0]], jnp.float32)
    out = np.asarray(getattr(jaxsoft, name)(x, temperature=0.5))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_masked_classes_and_empty_rows():
    x = truth.logits("unit", (3, 6))
    where = np.array([[1, 0, 1, 1, 0, 1]] * 2 + [[0] * 6], bool)
    p = jaxsoft.softmax(x, temperature=0.5, where=where)
    log_p = jaxsoft.log_softmax(x, temperature=0.5, where=where)
    assert (np.asarray(p)[~where] == 0).all()
    assert (np.asarray(log_p)[~where] == -np.inf).all()
    assert truth.error(p[:2], truth.softmax(x[:2], 0.5, where[:2])) < 1e-6
    assert truth.error(log_p[:2], truth.log_softmax(x[:2], 0.5, where[:2])) < 1e-6
    h = jaxsoft.entropy(x, temperature=0.5, where=where)
    assert truth.error(h[:2], truth.entropy(x[:2], 0.5, where[:2])) < 1e-6
    assert h[2] == 0
    lse = jaxsoft.logsumexp(x, temperature=0.5, where=where)
    assert truth.error(lse[:2], truth.logsumexp(x[:2], 0.5, where[:2])) < 1e-6
    assert lse[2] == -np.inf
    loss = jaxsoft.softmax_cross_entropy(
        x, np.zeros(3, int), where=where, label_smoothing=0.1, z_loss=0.1
    )
    assert loss[2] == 0
    np.testing.assert_array_equal(
        p, jaxsoft.softmax(np.where(where, x, -np.inf), temperature=0.5)
    )


def test_temperature_per_row_and_any_axis():
    x = truth.logits("range", (4, 7, 3))
    tau = np.random.default_rng(1).uniform(0.2, 3, (4, 1, 3)).astype("f")
    moved = np.moveaxis(x, 1, -1)
    expected = truth.softmax(moved, np.moveaxis(tau, 1, -1))
    p = jaxsoft.softmax(x, temperature=tau, axis=1)
    assert truth.error(np.moveaxis(np.asarray(p), 1, -1), expected) < 1e-6
    for name in ("logsumexp", "entropy"):
        value = getattr(jaxsoft, name)(x, temperature=tau, axis=1)
        expected = getattr(truth, name)(moved, np.moveaxis(tau, 1, -1))
        assert truth.error(value, expected) < 1e-6
    labels = np.random.default_rng(2).integers(0, 7, (4, 3))
    loss = jaxsoft.softmax_cross_entropy(x, labels, tau, axis=1)
    log_p = truth.log_softmax(moved, np.moveaxis(tau, 1, -1))
    picked = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    assert truth.error(loss, -picked) < 1e-6


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


def test_cross_entropy_of_targets():
    x = truth.logits("unit", (3, 5))
    targets = np.abs(truth.logits("unit", (3, 5), seed=1))
    where = np.array([True, True, False, True, True])
    expected = -(targets * truth.log_softmax(x, 2.0)).sum(-1)
    loss = jaxsoft.softmax_cross_entropy(x, None, 2.0, targets=targets)
    assert truth.error(loss, expected) < 1e-6
    on_labels = jax.nn.one_hot(jnp.asarray([0, 1, 4]), 5)
    one_hot = jaxsoft.softmax_cross_entropy(
        x, targets=on_labels, where=where, label_smoothing=0.3, z_loss=0.1
    )
    labels = jaxsoft.softmax_cross_entropy(
        x, jnp.asarray([0, 1, 4]), where=where, label_smoothing=0.3, z_loss=0.1
    )
    np.testing.assert_allclose(one_hot, labels, rtol=1e-6)
    dropped = jaxsoft.softmax_cross_entropy(x, targets=targets, where=where)
    assert np.isinf(dropped).all()


def test_bad_labels_are_nan_and_can_be_masked():
    x = jnp.asarray(truth.logits("unit", (5, 4)))
    labels = jnp.asarray([-100, -1, 4, 2, 0])
    loss = jaxsoft.softmax_cross_entropy(x, labels)
    np.testing.assert_array_equal(np.isnan(loss), [1, 1, 1, 0, 0])

    def masked(x):
        loss = jaxsoft.softmax_cross_entropy(x, labels)
        return jnp.where((labels >= 0) & (labels < 4), loss, 0).sum()

    value, grad = jax.value_and_grad(masked)(x)
    np.testing.assert_allclose(
        value, jaxsoft.softmax_cross_entropy(x[3:], labels[3:]).sum(), rtol=1e-6
    )
    assert (np.asarray(grad)[:3] == 0).all()
    unsigned = jaxsoft.softmax_cross_entropy(x[:1], jnp.asarray([200], jnp.uint8))
    assert np.isnan(unsigned).all()


def test_label_of_a_dropped_class_is_infinite_with_finite_gradient():
    x = jnp.asarray(truth.logits("unit", (1, 4)))
    where = jnp.asarray([True, False, True, True])

    def loss(x):
        return jaxsoft.softmax_cross_entropy(x, jnp.asarray([1]), where=where)[0]

    value, grad = jax.value_and_grad(loss)(x)
    assert value == np.inf
    assert np.isfinite(grad).all() and grad[0, 1] == 0


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


def _divergence(name, student, teacher, tau, where=None):
    log_q = truth.log_softmax(student, tau, where)
    log_p = truth.log_softmax(teacher, tau, where)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_r = np.log((p + q) / 2)

        def kl(a, log_a, log_b):
            return np.where(a == 0, 0, a * (log_a - log_b)).sum(-1)

        value = {
            "forward_kl": kl(p, log_p, log_q),
            "reverse_kl": kl(q, log_q, log_p),
            "jensen_shannon": (kl(p, log_p, log_r) + kl(q, log_q, log_r)) / 2,
        }[name]
    return value * tau**2


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("kind", ["unit", "peaked", "range", "offset"])
def test_distillation_matches_float64(name, tau, kind):
    student = truth.logits(kind, (4, 9), seed=1)
    teacher = truth.logits(kind, (4, 9), seed=2)
    where = np.arange(9) != 3
    for mask in (None, where):
        value = jaxsoft.distillation_loss(
            student, teacher, tau, where=mask, divergence=name
        )
        exact = _divergence(name, student, teacher, tau, mask)
        # float64 loses digits itself where the divergence is tiny.
        assert truth.error(value, exact) < 1e-6 + 1e-11 * tau**2


@pytest.mark.parametrize("name", DIVERGENCES)
def test_distillation_of_close_and_hot_distributions_keeps_its_digits(name):
    teacher = truth.logits("unit", (4, 9))
    student = teacher + truth.logits("unit", (4, 9), seed=1) * np.float32(1e-3)
    gap = student.astype("float64") - teacher
    limit = gap.var(-1) / (8 if name == "jensen_shannon" else 2)
    for tau in (1e4, 1e18, 1e37, float("inf")):
        value = jaxsoft.distillation_loss(student, teacher, tau, divergence=name)
        np.testing.assert_allclose(value, limit, rtol=2e-3)
    zero = jaxsoft.distillation_loss(student, student, 3.0, divergence=name)
    np.testing.assert_array_equal(zero, np.zeros(4))
    cold = jaxsoft.distillation_loss(student, teacher, 0.0, divergence=name)
    np.testing.assert_array_equal(cold, np.zeros(4))


def test_distillation_of_disjoint_supports():
    inf = np.float32(np.inf)
    student = np.array([[0.0, 1.0, -inf]], "f")
    teacher = np.array([[-inf, 1.0, 0.0]], "f")
    assert jaxsoft.distillation_loss(student, teacher)[0] == np.inf
    reverse = jaxsoft.distillation_loss(student, teacher, divergence="reverse_kl")
    assert reverse[0] == np.inf
    value = jaxsoft.distillation_loss(student, teacher, divergence="jensen_shannon")
    exact = _divergence("jensen_shannon", student, teacher, 1.0)
    assert truth.error(value, exact) < 1e-6
    empty = jaxsoft.distillation_loss(student, teacher, where=np.zeros(3, bool))
    assert empty[0] == 0


def test_one_class_and_no_rows():
    x = jnp.zeros((3, 1))
    np.testing.assert_array_equal(jaxsoft.softmax(x, temperature=0.3), np.ones((3, 1)))
    np.testing.assert_array_equal(jaxsoft.entropy(x), np.zeros(3))
    loss = jaxsoft.softmax_cross_entropy(x, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(loss, np.zeros(3))
    assert jaxsoft.softmax(jnp.zeros((0, 5))).shape == (0, 5)
    assert jaxsoft.logsumexp(jnp.zeros((0, 5)), temperature=0.5).shape == (0,)
