"""Limits, masks and labels of the logits room.

None of it is of the machine code, so this is a file that is compiled quickly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests import truth
from tests.logits.test_values import FUNCTIONS, divergence


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
        out = jax.jit(getattr(jaxsoft, name))(x, temperature=np.float32(tau))
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
    x = truth.logits("unit", (5, 4))
    labels = np.asarray([-100, -1, 4, 2, 0], "int32")
    loss = jaxsoft.softmax_cross_entropy(x, labels)
    np.testing.assert_array_equal(np.isnan(loss), [1, 1, 1, 0, 0])

    @jax.jit
    @jax.value_and_grad
    def masked(x):
        loss = jaxsoft.softmax_cross_entropy(x, labels)
        return jnp.where((labels >= 0) & (labels < 4), loss, 0).sum()

    value, grad = masked(x)
    np.testing.assert_allclose(
        value, jaxsoft.softmax_cross_entropy(x[3:], labels[3:]).sum(), rtol=1e-6
    )
    assert (np.asarray(grad)[:3] == 0).all()
    unsigned = jaxsoft.softmax_cross_entropy(x[:1], jnp.asarray([200], jnp.uint8))
    assert np.isnan(unsigned).all()


def test_label_of_a_dropped_class_is_infinite_with_finite_gradient():
    x = truth.logits("unit", (1, 4))
    where = np.asarray([True, False, True, True])

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        return jaxsoft.softmax_cross_entropy(x, jnp.asarray([1]), where=where)[0]

    value, grad = loss(x)
    assert value == np.inf
    assert np.isfinite(grad).all() and grad[0, 1] == 0


def test_distillation_of_disjoint_supports():
    inf = np.float32(np.inf)
    student = np.array([[0.0, 1.0, -inf]], "f")
    teacher = np.array([[-inf, 1.0, 0.0]], "f")
    assert jaxsoft.distillation_loss(student, teacher)[0] == np.inf
    reverse = jaxsoft.distillation_loss(student, teacher, divergence="reverse_kl")
    assert reverse[0] == np.inf
    empty = jaxsoft.distillation_loss(student, teacher, where=np.zeros(3, bool))
    assert empty[0] == 0


@pytest.mark.parametrize(
    "name", ["beta", "skew_forward", "skew_reverse", "jensen_shannon"]
)
def test_divergences_from_a_mixture_of_disjoint_supports(name):
    """Of classes that one side alone has, and that one side all but lacks."""
    inf = np.float32(np.inf)
    student = np.array([[0.0, 1.0, -inf, -90], [9, -inf, -inf, 9]], "f")
    teacher = np.array([[-inf, 1.0, 0.0, 0.0], [-inf, 2.0, 0.0, -inf]], "f")
    options, parts = truth.DIVERGENCES[name]

    @jax.jit
    def step(student, teacher, tau):
        def losses(*logits):
            return jaxsoft.distillation_loss(logits[0], logits[1], tau, **options)

        value, pull = jax.vjp(losses, student, teacher)
        return value, pull(jnp.ones_like(value))

    for tau in (0.5, 3.0):
        value, slopes = step(student, teacher, np.float32(tau))
        assert truth.error(value, divergence(name, student, teacher, tau)) < 1e-6
        q, p = (truth.softmax(x, tau) for x in (student, teacher))
        for slope, exact in zip(slopes, _slopes(p, q, parts), strict=True):
            assert truth.error(slope, tau * exact) < 2e-6


@pytest.mark.parametrize("name", truth.DIVERGENCES)
def test_close_distributions_keep_the_digits_of_their_gradients(name):
    # Numbers whose differences are exact.
    teacher = np.round(truth.logits("unit", (4, 9)) * 2**18) / 2**18
    noise = truth.logits("unit", (4, 9), seed=1)
    student = teacher + np.round(noise * 200) / 2**18
    options, parts = truth.DIVERGENCES[name]

    @jax.jit
    def step(student, teacher):
        losses = functools.partial(jaxsoft.distillation_loss, **options)
        value, pull = jax.vjp(losses, student, teacher)
        return value, pull(jnp.ones_like(value))

    value, slopes = step(student, teacher)
    exact = divergence(name, student, teacher, 1.0)
    np.testing.assert_allclose(value, exact, rtol=3e-6)
    q, p = (truth.softmax(x) for x in (student, teacher))
    for slope, exact in zip(slopes, _slopes(p, q, parts), strict=True):
        assert truth.error(slope, exact) < 3e-6


def _slopes(p, q, parts):
    """Returns the derivatives of a divergence by untempered logits of q and of p."""
    of_p, of_q, share_p, share_q = parts
    m = share_p * p + share_q * q
    safe = np.where(m == 0, 1, m)

    def slope(p, own, share, other, other_weight):
        ratio = np.log(np.where(p == 0, 1, p) / safe)
        by_prob = own * (ratio - share * p / safe) - share * other_weight * other / safe
        return p * (by_prob - (p * by_prob).sum(-1, keepdims=True))

    return slope(q, of_q, share_q, p, of_p), slope(p, of_p, share_p, q, of_q)


def test_the_ends_of_a_mixture():
    student, teacher = (truth.logits("unit", (4, 9), seed=s) for s in (1, 2))
    loss = functools.partial(jaxsoft.distillation_loss, student, teacher, 2.0)
    mixed = functools.partial(loss, divergence="jensen_shannon")
    ends: Any = ("forward_kl", 0.0, 1e-6), ("reverse_kl", 1, 1 - 1e-6)
    for kind, end, near in ends:
        exact = loss(divergence=kind)
        np.testing.assert_array_equal(mixed(beta=end), exact)
        np.testing.assert_allclose(mixed(beta=near) / 1e-6, exact, rtol=2e-5)
        np.testing.assert_array_equal(loss(divergence=kind, alpha=0), exact)
        np.testing.assert_allclose(loss(divergence=kind, alpha=1e-9), exact, rtol=1e-6)
        # Near the other end it is half of χ², of each about the other.
        q, p = (truth.softmax(x, 2.0) for x in (student, teacher))
        base = p if kind == "forward_kl" else q
        square = 2 * ((p - q) ** 2 / base).sum(-1) * 1e-6
        skewed = loss(divergence=kind, alpha=1 - 1e-3)
        np.testing.assert_allclose(skewed, square, rtol=2e-3)
    np.testing.assert_array_equal(mixed(beta=0.5), mixed())


def test_gradients_near_the_ends_of_a_mixture():
    """A mixture that is nearly one of both is compared with it by their difference."""
    student, teacher = (truth.logits("unit", (4, 9), seed=s) for s in (1, 2))
    q, p = (truth.softmax(x, 2.0) for x in (student, teacher))
    cases: Any = [
        ({"beta": beta, "divergence": "jensen_shannon"}, (beta, 1 - beta) * 2)
        for beta in (1e-3, 1 - 1e-3)
    ]
    cases += [
        ({"alpha": 0.95}, (1, 0, 0.95, 0.05)),
        ({"alpha": 0.95, "divergence": "reverse_kl"}, (0, 1, 0.05, 0.95)),
    ]
    for options, parts in cases:

        @jax.jit
        def step(student, teacher, options=options):
            losses = functools.partial(jaxsoft.distillation_loss, **options)
            value, pull = jax.vjp(
                lambda *logits: losses(*logits, 2.0), student, teacher
            )
            return pull(jnp.ones_like(value))

        exacts = _slopes(p, q, parts)
        for slope, exact in zip(step(student, teacher), exacts, strict=True):
            assert truth.error(slope, 2 * exact) < 2e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("alpha", [1e-6, 1 - 1e-6, 1 - 1e-9])
def test_skews_near_their_ends_keep_all_digits(kind, alpha, monkeypatch):
    """Of close distributions, and of a peaked one that the other lacks."""
    shares = (alpha, 1 - alpha) if kind == "forward_kl" else (1 - alpha, alpha)
    parts = (float(kind == "forward_kl"), float(kind == "reverse_kl"), *shares)
    monkeypatch.setitem(truth.DIVERGENCES, "skew", ({}, parts))
    # Numbers whose differences are exact.
    one, other = (np.round(truth.logits("unit", (9,), s) * 64) / 64 for s in (1, 2))
    peaked = np.float32(30) * (np.arange(9) == 1)
    student = np.stack([one, one, peaked])
    teacher = np.stack([other / 64 + one, peaked, one]).astype("float32")

    @jax.jit
    def step(student, teacher):
        loss = functools.partial(
            jaxsoft.distillation_loss, divergence=kind, alpha=alpha
        )
        value, pull = jax.vjp(loss, student, teacher)
        return value, pull(jnp.ones_like(value))

    value, slopes = step(student, teacher)
    exact, *exacts = truth.scaled_divergence(student, teacher, 1.0, "skew")
    np.testing.assert_allclose(value, exact, rtol=3e-6)
    for slope, exact_slope in zip(slopes, exacts, strict=True):
        # Beside its size, that of probabilities at 1 is rounded.
        most = 1e-5 * np.abs(exact_slope).max(-1) + 3e-7 * exact
        assert (np.abs(slope - exact_slope).max(-1) <= most).all()


@pytest.mark.parametrize(
    ("options", "parts", "size"),
    [
        ({"divergence": "jensen_shannon"}, (0.5, 0.5, 0.5, 0.5), 0.5),
        ({"divergence": "jensen_shannon", "beta": 0.1}, (0.1, 0.9, 0.1, 0.9), 0.5),
        ({"alpha": 0.1}, (1, 0, 0.1, 0.9), 0.5),
        ({"alpha": 0.95}, (1, 0, 0.95, 0.05), 0.1),
    ],
)
def test_rounding_of_log_ratios_is_not_amplified(options, parts, size, monkeypatch):
    """What all classes err alike moves a divergence by less than its rounding."""
    monkeypatch.setitem(truth.DIVERGENCES, "mixture", ({}, parts))
    teacher = truth.logits("unit", (64, 50))
    student = teacher + truth.logits("unit", (64, 50), seed=9) * np.float32(size)
    value = jaxsoft.distillation_loss(student, teacher, **options)
    exact, *_ = truth.scaled_divergence(student, teacher, 1.0, "mixture")
    assert np.sqrt(np.mean((value / exact - 1) ** 2)) < 4e-7


def test_one_class_and_no_rows():
    x = jnp.zeros((3, 1))
    np.testing.assert_array_equal(jaxsoft.softmax(x, temperature=0.3), np.ones((3, 1)))
    np.testing.assert_array_equal(jaxsoft.entropy(x), np.zeros(3))
    loss = jaxsoft.softmax_cross_entropy(x, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(loss, np.zeros(3))
    assert jaxsoft.softmax(jnp.zeros((0, 5))).shape == (0, 5)
    assert jaxsoft.logsumexp(jnp.zeros((0, 5)), temperature=0.5).shape == (0,)


def test_full_smoothing_leaves_the_label_out():
    """With smoothing 1 the label weighs 0, whether or not its class is kept."""
    labels = jnp.array([0])
    options: dict[str, Any] = {"label_smoothing": 1.0}
    for where, value in (((False, True, True, True), np.log(3)), ((False,) * 4, 0)):
        where = jnp.array(where)
        loss, slope = jax.value_and_grad(
            lambda x, where=where: jaxsoft.softmax_cross_entropy(
                x, labels, where=where, **options
            ).sum()
        )(jnp.ones((1, 4)))
        np.testing.assert_allclose(loss, value, rtol=1e-6)
        np.testing.assert_allclose(slope, np.zeros((1, 4)), atol=1e-7)
        streamed = jaxsoft.linear_cross_entropy(
            jnp.ones((1, 2)), jnp.ones((2, 4)), labels, class_mask=where, **options
        )
        np.testing.assert_allclose(streamed, value, rtol=1e-6)
    wrong = jaxsoft.softmax_cross_entropy(jnp.ones((1, 4)), jnp.array([4]), **options)
    assert np.isnan(wrong).all()


@pytest.mark.parametrize("tau", [0.7, np.float32(0.7), np.full(3, 0.7, "f")])
@pytest.mark.parametrize("soft", [False, True])
def test_what_rows_without_weight_hold_reaches_no_derivative(tau, soft):
    """NaN there changes nothing, in both modes and twice, by any temperature."""
    x = np.random.default_rng(2).standard_normal((3, 5)).astype("f")
    targets = np.full((3, 5), 0.3, "f")
    labels = np.array([4, 0, 2])
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "weights": labels > 0}
    static = isinstance(tau, float)

    def total(args):
        x, targets, traced = args
        known = {"targets": targets} if soft else {"labels": labels}
        loss = jaxsoft.softmax_cross_entropy(
            x, temperature=tau if static else traced, **known, **options
        )
        return (loss**2).sum()

    @jax.jit
    def derivatives(args):
        def along(args):
            return jax.jvp(total, (args,), (jax.tree.map(jnp.ones_like, args),))[1]

        return jax.value_and_grad(total)(args), jax.value_and_grad(along)(args)

    arrays = [x, targets, np.asarray(tau, "f")]
    expected = derivatives(jax.tree.map(jnp.asarray, arrays))
    for array in arrays[: 2 if soft else 1] + [a for a in arrays[2:] if a.ndim]:
        array[1] = np.nan
    found = derivatives(jax.tree.map(jnp.asarray, arrays))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected
    )


def test_logsumexp_of_infinity():
    """A logit of +inf gives +inf, as in SciPy; NaN stays NaN."""
    x = jnp.array([[1.0, jnp.inf], [jnp.inf, jnp.inf], [jnp.nan, jnp.inf]])
    truth = [jnp.inf, jnp.inf, jnp.nan]
    for temperature in (1.0, 0.5, 0.0, jnp.array([[2.0], [2.0], [2.0]])):
        found = jaxsoft.logsumexp(x, temperature=temperature)
        np.testing.assert_array_equal(found, truth)
    kept = jaxsoft.logsumexp(x[:1], where=jnp.array([True, False]))
    np.testing.assert_allclose(kept, 1)


@pytest.mark.parametrize("tau", [1.0, 0.5, np.asarray([[2], [3]], "float32")])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}])
@pytest.mark.parametrize("by_mask", [False, True])
def test_a_row_without_classes_has_no_gradient(tau, options, by_mask):
    x = truth.logits("unit", (2, 3))
    where = np.asarray([[False], [True]])
    x, where = (x, where) if by_mask else (np.where(where, x, -np.float32("inf")), None)
    targets = np.asarray([[0.2, 0.3, 0.5]] * 2, "float32")
    for known in ({"targets": targets}, {"labels": np.asarray([1, 2])}):

        def losses(x, targets, tau, known=known):
            known = {"targets": targets} if "targets" in known else known
            return jaxsoft.softmax_cross_entropy(
                x, temperature=tau, where=where, **known, **options
            )

        arrays = x, targets, np.broadcast_to(np.asarray(tau, "float32"), (2, 1))
        traced = jax.jit(losses)
        static = jax.jit(functools.partial(losses, tau=tau))
        for function, args in ((traced, arrays), (static, arrays[:2])):
            value, pull = jax.vjp(function, *args)
            slopes = pull(jnp.ones(2, "float32"))
            assert value[0] == 0 and np.abs(slopes[0][1]).max() > 0
            for slope in slopes:
                np.testing.assert_array_equal(slope[0], 0)


@pytest.mark.parametrize("tau", [1.0, 0.5, np.float32(2), np.float32(np.inf)])
def test_the_only_class_of_a_row_may_be_dropped(tau):
    """XLA leaves out where a maximum of one number starts."""
    x, where = jnp.ones((3, 1)), jnp.array([False])
    options: Any = {"temperature": tau, "where": where}
    labels, teacher = jnp.zeros(3, jnp.int32), jnp.zeros((3, 1))
    np.testing.assert_array_equal(jaxsoft.softmax(x, **options), 0)
    np.testing.assert_array_equal(jaxsoft.log_softmax(x, **options), -np.inf)
    np.testing.assert_array_equal(jaxsoft.logsumexp(x, **options), -np.inf)
    np.testing.assert_array_equal(jaxsoft.entropy(x, **options), 0)

    def losses(x):
        yield jaxsoft.softmax_cross_entropy(x, labels, z_loss=0.1, **options)
        for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
            loss = functools.partial(jaxsoft.distillation_loss, divergence=kind)
            yield loss(x, teacher, tau, where=where)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(x):
        each = list(losses(x))
        return sum(jnp.sum(loss) for loss in each), each

    (_, each), slope = step(x)
    np.testing.assert_array_equal(np.stack(each), 0)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize(
    "name", ["labels", "smoothed", "z_loss", "logsumexp", "entropy"]
)
def test_a_temperature_of_0_has_no_gradient_whatever_it_is_multiplied_by(name, factor):
    """Each row's slope is as large as a number can be, and there are several."""
    x = truth.logits("unit", (9, 5)) + 50
    labels = np.zeros(9, "int32")
    options: Any = {"smoothed": {"label_smoothing": 0.1}, "z_loss": {"z_loss": 0.1}}

    @jax.jit
    @jax.grad
    def slope(tau):
        if name in ("logsumexp", "entropy"):
            return factor * getattr(jaxsoft, name)(x, temperature=tau).sum()
        given = options.get(name, {})
        losses = jaxsoft.softmax_cross_entropy(x, labels, tau, **given)
        return factor * losses.sum()

    for tau in (0.0, 1e-39):
        assert slope(np.float32(tau)) == 0
    # Colder than any other temperature the slope itself overflows.
    assert np.isinf(slope(np.float32(2e-38))) or name == "entropy"


def test_a_label_of_no_class_has_no_share_in_any_slope():
    """Nor has the class that is the nearest to it."""
    x = truth.logits("unit", (3, 5))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(x, tau, labels):
        losses = jaxsoft.softmax_cross_entropy(x, labels, tau, label_smoothing=0.5)
        return losses.sum()

    tau = np.float32(0.7)
    below, above = (slopes(x, tau, np.full(3, label)) for label in (-1, 5))
    for first, second in zip(below, above, strict=True):
        np.testing.assert_array_equal(first, second)
    exact = (truth.softmax(x, 0.7) - 0.5 / 5) / 0.7
    np.testing.assert_allclose(below[0], exact, rtol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_a_mean_is_finite_where_a_tempered_logit_is_not(masked, static):
    """Of ten classes one is so far below the others that it overflows over τ."""
    x = np.tile(np.asarray([0, -8] + [-1] * 8, "float32"), (3, 1))
    where = np.arange(10) != 9 if masked else None
    labels, cold = np.arange(0, 6, 2), np.float32(2e-38)

    @jax.jit
    def loss(tau):
        tau = float(cold) if static else tau
        return jaxsoft.softmax_cross_entropy(
            x, labels, tau, where=where, label_smoothing=0.5
        )

    kept = x if where is None else x[:, where]
    picked = np.take_along_axis(x, labels[:, None], 1)[:, 0]
    exact = -0.5 * (picked + kept.mean(1, dtype="float64")) / np.float64(cold)
    np.testing.assert_allclose(loss(cold), exact, rtol=1e-6)
