"""Values of the linear room against float64, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft
from jaxsoft import linear_cross_entropy, linear_statistics
from tests import truth
from tests.linear import cases

IMPLEMENTATIONS = ("xla", "reference")
TILE = 4 * 8 * 128  # the smallest tile: 8 rows × 128 classes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["unit", "zero", "peaked", "offset", "negative"])
@pytest.mark.parametrize("classes", [1, 129, 1009])
def test_statistics_match_float64(implementation, kind, classes):
    hidden, kernel, labels = cases.layer(13, 16, classes, kind)
    u = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    plain = np.asarray(hidden @ kernel)
    tau = 0.7
    got = linear_statistics(
        hidden,
        kernel,
        labels,
        temperature=tau,
        tile_bytes=TILE,
        return_argmax=True,
        implementation=implementation,
    )
    rows = np.arange(13)
    log_p = truth.log_softmax(u, tau)
    same = truth.log_softmax(plain, np.float32(tau)).astype("f")
    slack = 1e-6
    truth.assert_as_good(
        got.log_prob, same[rows, labels], log_p[rows, labels], slack
    ) if classes > 1 else np.testing.assert_array_equal(got.log_prob, np.zeros(13))
    lse, entropy = truth.logsumexp(u, tau), truth.entropy(u, tau)
    assert (
        truth.error(got.lse, lse) < truth.error(truth.logsumexp(plain, tau), lse) + 1e-6
    )
    assert (
        truth.error(got.entropy, entropy)
        < truth.error(truth.entropy(plain, tau), entropy) + 2e-6
    )
    assert (np.asarray(got.log_prob) <= 0).all()
    np.testing.assert_allclose(got.label_logit - got.lse, got.log_prob, atol=0.1)
    best = u[rows, np.asarray(got.argmax)]
    np.testing.assert_allclose(best, u.max(1), rtol=1e-5)
    if kind == "zero":
        np.testing.assert_array_equal(got.argmax, np.zeros(13))
        np.testing.assert_allclose(got.lse, np.full(13, np.log(classes)), rtol=1e-6)


@pytest.mark.parametrize("layout, tile", [("hv", TILE), ("vh", TILE), ("hv", None)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", cases.OPTIONS)
def test_losses_match_float64_for_every_option(layout, tile, implementation, name, x64):
    if implementation == "reference" and tile is None:
        pytest.skip("the reference implementation has no tiles")
    rows, classes = 13, 1009
    hidden, kernel, labels = cases.layer(rows, 16, classes)
    options = cases.arrays(cases.OPTIONS[name], rows, classes, labels)
    wide = (
        jax.tree.map(
            lambda a: a.astype("float64") if a.dtype == "float32" else a, options
        )
        if any(hasattr(v, "dtype") for v in options.values())
        else options
    )
    exact = cases.plain_loss(
        hidden.astype("float64"), kernel.astype("float64"), labels, **wide
    )
    plain = cases.plain_loss(hidden, kernel, labels, **options)
    loss = linear_cross_entropy(
        hidden,
        kernel if layout == "hv" else kernel.T,
        labels,
        reduction="none",
        kernel_layout=layout,
        tile_bytes=tile,
        implementation=implementation,
        **options,
    )
    assert loss.dtype == jnp.float32
    truth.assert_as_good(loss, plain, exact, slack=6e-7)


@pytest.mark.parametrize("classes", [2049, 131])
def test_padding_never_enters_the_sum(classes):
    """Zero-padded columns would add exp(0) to sums of exp(-20)."""
    hidden, kernel = jnp.ones((3, 1)), jnp.full((1, classes), -20.0)
    for tile in (TILE, None):
        loss = linear_cross_entropy(
            hidden, kernel, jnp.zeros(3, jnp.int32), tile_bytes=tile
        )
        np.testing.assert_allclose(loss, np.log(classes), rtol=1e-6)


@pytest.mark.parametrize("offset", [1e4, 1e6, 1e7])
def test_common_offset_changes_nothing(offset):
    rng = np.random.default_rng(0)
    kernel = np.zeros((2, 300), "f")
    kernel[0] = rng.integers(-20, 20, 300)
    hidden = np.ones((4, 2), "f")
    labels = rng.integers(0, 300, 4)

    def run(kernel):
        def loss(hidden):
            return linear_cross_entropy(
                hidden, kernel, labels, label_smoothing=0.1, tile_bytes=TILE
            )

        statistics = linear_statistics(hidden, kernel, labels, tile_bytes=TILE)
        grad = jax.grad(loss)(hidden * np.array([[1, 0]], "f"))
        return loss(hidden), statistics.log_prob, statistics.entropy, grad[:, :1]

    plain = run(kernel)
    kernel[1] = offset
    for moved, still in zip(run(kernel), plain, strict=True):
        np.testing.assert_allclose(moved, still, rtol=2e-6, atol=1e-7)
    assert abs(run(kernel)[1] - plain[1]).max() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.many_cases
def test_large_odd_shape_in_every_dtype(dtype, scale):
    """N and V prime: errors of value and gradients at most the plain formula's."""
    rows, features, classes = 211, 64, 5021
    hidden, kernel, labels = cases.layer(rows, features, classes, dtype=dtype)
    hidden = hidden * jnp.asarray(scale, hidden.dtype)
    with jax.enable_x64(True):
        wide = (hidden.astype("float64"), kernel.astype("float64"))
        value, grads = jax.value_and_grad(
            lambda h, w: cases.plain_loss(h, w, labels).mean(), (0, 1)
        )(*wide)
        exact = [np.asarray(a) for a in (value, *grads)]

    largest = float(jnp.abs((hidden @ kernel).astype("float32")).max())

    def optax_loss(hidden, kernel):
        logits = (hidden @ kernel).astype("float32")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def ours(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, tile_bytes=100 * 1024)

    plain = jax.value_and_grad(optax_loss, (0, 1))(hidden, kernel)
    got = jax.value_and_grad(ours, (0, 1))(hidden, kernel)
    for mine, theirs, truly in zip(
        (got[0], *got[1]), (plain[0], *plain[1]), exact, strict=True
    ):
        slack = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 8e-3}[dtype]
        slack = slack if mine.ndim else 1e-6
        # A product of another shape rounds differently: by 1/3 ulp of the logits.
        slack += 2e-8 * largest
        truth.assert_as_good(
            np.asarray(mine, "float64"), np.asarray(theirs, "float64"), truly, slack
        )
    assert got[1][0].dtype == hidden.dtype and got[1][1].dtype == kernel.dtype


def test_weights_and_mean_are_exact_at_20011_bfloat16_tokens():
    rows = 20011
    hidden, kernel, labels = cases.layer(rows, 4, 61, dtype="bfloat16")
    weights = jnp.ones(rows, jnp.bfloat16)
    loss = linear_cross_entropy(hidden, kernel, labels, weights=weights)
    per_token = linear_cross_entropy(hidden, kernel, labels, reduction="none")
    np.testing.assert_allclose(loss, np.asarray(per_token, "float64").mean(), rtol=1e-5)
    total = linear_cross_entropy(
        hidden * 0, kernel, labels, weights=weights, reduction="sum"
    )
    np.testing.assert_allclose(total, rows * np.log(61), rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reductions_weights_and_ignored_labels(implementation):
    hidden, kernel, labels = cases.layer(6, 8, 50)
    weights = jnp.asarray([0.5, 0.0, 2.0, 1.0, 1.0, 0.0])
    labels = labels.at[3].set(-100).at[1].set(999)

    def run(**options):
        return linear_cross_entropy(
            hidden, kernel, labels, implementation=implementation, **options
        )

    per_token = run(reduction="none", weights=weights, ignore_label=-100)
    assert (np.asarray(per_token)[[1, 3, 5]] == 0).all()
    plain = linear_cross_entropy(
        hidden[jnp.asarray([0, 2, 4])],
        kernel,
        labels[jnp.asarray([0, 2, 4])],
        reduction="none",
    )
    expected = np.asarray(plain) * [0.5, 2, 1]
    np.testing.assert_allclose(per_token[jnp.asarray([0, 2, 4])], expected, rtol=1e-6)
    total = run(reduction="sum", weights=weights, ignore_label=-100)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    mean = run(weights=weights, ignore_label=-100)
    np.testing.assert_allclose(mean, expected.sum() / 3.5, rtol=1e-6)
    kept = run(weights=weights != 0, ignore_label=-100)
    np.testing.assert_allclose(kept, plain.mean(), rtol=1e-6)
    assert np.isnan(run())
    assert np.isnan(run(reduction="none")[3]) and np.isnan(run(reduction="none")[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_positions_contribute_exactly_nothing(implementation):
    hidden, kernel, labels = cases.layer(6, 8, 50)
    weights = jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])

    def run(hidden, kernel, labels):
        return jax.value_and_grad(
            lambda h, w: linear_cross_entropy(
                h,
                w,
                labels,
                weights=weights,
                z_loss=0.1,
                label_smoothing=0.1,
                implementation=implementation,
            ),
            (0, 1),
        )(hidden, kernel)

    value, grads = run(hidden, kernel, labels)
    for bad in (-100, -1, 50):
        other = hidden.at[4].set(jnp.nan).at[5].set(jnp.inf)
        again, others = run(other, kernel, labels.at[4:].set(bad))
        np.testing.assert_array_equal(again, value)
        for a, b in zip(others, grads, strict=True):
            np.testing.assert_array_equal(a, b)
    assert (np.asarray(grads[0])[4:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked_is_zero_with_zero_gradient(reduction):
    hidden, kernel, labels = cases.layer(4, 8, 50)

    def loss(hidden, kernel, **options):
        out = linear_cross_entropy(
            hidden, kernel, labels * 0 - 100, reduction=reduction, **options
        )
        return out.sum()

    for options in ({"ignore_label": -100}, {"weights": jnp.zeros(4)}):
        value, grads = jax.value_and_grad(loss, (0, 1))(hidden, kernel, **options)
        assert value == 0
        assert all((np.asarray(g) == 0).all() for g in grads)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.many_cases
def test_classes_masked_by_mask_and_by_bias(implementation, cap):
    hidden, kernel, labels = cases.layer(5, 8, 300)
    labels = labels * 0 + 7
    mask = jnp.arange(300) % 3 != 0
    bias = jnp.where(mask, 0.0, -jnp.inf)
    rest = np.flatnonzero(np.asarray(mask))
    small = kernel[:, rest]
    at = jnp.full(5, int(np.searchsorted(rest, 7)))
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "tile_bytes": TILE}
    options |= {"implementation": implementation, "logit_softcap": cap}

    def run(kernel, labels, **more):
        def loss(hidden, kernel):
            return linear_cross_entropy(hidden, kernel, labels, **more, **options)

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    value, (dhidden, dkernel) = run(small, at)
    for more in ({"class_mask": mask}, {"bias": bias}):
        got, (gh, gk) = run(kernel, labels, **more)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        np.testing.assert_allclose(gh, dhidden, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gk[:, rest], dkernel, rtol=1e-4, atol=1e-6)
        assert (np.asarray(gk)[:, ~np.asarray(mask)] == 0).all()
    none, grads = run(kernel, labels, class_mask=jnp.zeros(300, bool))
    assert none == 0 and all((np.asarray(g) == 0).all() for g in grads)
    lost, grads = run(kernel, labels * 0, class_mask=mask)
    assert lost == np.inf and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_limits(implementation):
    hidden, kernel = jnp.eye(3), jnp.asarray([[1.0, 2, 2], [3, 1, 0], [0, 0, 0]]).T
    labels = jnp.asarray([1, 1, 0])

    def run(tau):
        return linear_statistics(
            hidden.T,
            kernel.T,
            labels,
            temperature=tau,
            implementation=implementation,
        )

    u = np.asarray(hidden.T @ kernel.T)
    for tau in (0.0, jnp.zeros(3), jnp.float32(1e-40)):
        got = run(tau)
        ties = (u == u.max(1, keepdims=True)).sum(1)
        np.testing.assert_allclose(got.entropy, np.log(ties), atol=1e-6)
        hit = u[np.arange(3), labels] == u.max(1)
        np.testing.assert_allclose(
            got.log_prob, np.where(hit, -np.log(ties), -np.inf), atol=1e-6
        )
    hot = run(float("inf"))
    np.testing.assert_allclose(hot.entropy, np.full(3, np.log(3)), rtol=1e-6)
    np.testing.assert_allclose(hot.log_prob, np.full(3, -np.log(3)), rtol=1e-6)
    assert np.isnan(jax.jit(run)(jnp.float32(-1)).log_prob).all()


def test_tile_sizes_change_nothing_beyond_rounding():
    hidden, kernel, labels = cases.layer(37, 8, 1009)

    def run(tile):
        return jax.value_and_grad(
            lambda h, w: linear_cross_entropy(
                h, w, labels, label_smoothing=0.1, tile_bytes=tile
            ),
            (0, 1),
        )(hidden, kernel)

    value, grads = run(2**30)
    for tile in (1, TILE, 3 * TILE, 50_000):
        got, others = run(tile)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        for a, b in zip(others, grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_mixed_dtypes_take_the_wider_product():
    hidden, kernel, labels = cases.layer(9, 8, 200)
    narrow = kernel.astype(jnp.bfloat16)
    wide = linear_cross_entropy(hidden, narrow.astype("float32"), labels)
    mixed, grads = jax.value_and_grad(linear_cross_entropy, (0, 1))(
        hidden, narrow, labels
    )
    np.testing.assert_allclose(mixed, wide, rtol=1e-6)
    assert grads[0].dtype == jnp.float32 and grads[1].dtype == jnp.bfloat16


def test_leading_axes_rows_without_tokens_and_statistics():
    hidden, kernel, labels = cases.layer(6, 8, 50)
    loss, statistics = linear_cross_entropy(
        hidden.reshape(2, 3, 8),
        kernel,
        labels.reshape(2, 3),
        reduction="none",
        return_statistics=True,
    )
    assert loss.shape == statistics.entropy.shape == (2, 3)
    np.testing.assert_allclose(loss, -statistics.log_prob, rtol=1e-6)
    one = linear_statistics(hidden[0], kernel, labels[0])
    assert one.log_prob.shape == ()
    np.testing.assert_allclose(one.log_prob, statistics.log_prob[0, 0], rtol=1e-6)
    none = linear_cross_entropy(hidden[:0], kernel, labels[:0])
    assert none == 0
    assert jaxsoft.linear_statistics(hidden[:0], kernel).lse.shape == (0,)
    with pytest.raises(ValueError, match="`label` must have been computed"):
        _ = linear_statistics(hidden, kernel).log_prob
