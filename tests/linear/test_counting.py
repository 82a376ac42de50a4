"""What counts in a loss of a layer: tokens, classes, layouts, tiles, limits.

None of it is of the machine code, so this is a file that is compiled quickly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft import linear_cross_entropy, linear_statistics
from tests.linear import cases
from tests.linear.test_values import (
    IMPLEMENTATIONS,
    TILE,
    assert_loss_matches_float64,
)


@pytest.mark.parametrize(
    "layout, tile, implementation",
    [
        ("vh", TILE, "xla"),
        ("vh", TILE, "reference"),
        # The reference implementation has no tiles.
        ("hv", None, "xla"),
    ],
)
@pytest.mark.parametrize("name", cases.OPTIONS)
def test_every_option_by_another_layout_or_tile(
    layout, tile, implementation, name, x64
):
    assert_loss_matches_float64(name, layout, tile, implementation)


@pytest.mark.parametrize("classes", [2049, 131])
def test_padding_never_enters_the_sum(classes):
    """Zero-padded columns would add exp(0) to sums of exp(-20)."""
    hidden = np.ones((3, 1), "float32")
    kernel = np.full((1, classes), -20, "float32")
    for tile in (TILE, None):
        loss = linear_cross_entropy(
            hidden, kernel, np.zeros(3, "int32"), workspace_bytes=tile
        )
        np.testing.assert_allclose(loss, np.log(classes), rtol=1e-6)


@jax.jit
def _loss_statistics_and_gradient(hidden, kernel, labels):
    def loss(hidden):
        return linear_cross_entropy(
            hidden, kernel, labels, label_smoothing=0.1, workspace_bytes=TILE
        )

    statistics = linear_statistics(hidden, kernel, labels, workspace_bytes=TILE)
    grad = jax.grad(loss)(hidden * np.array([[1, 0]], "f"))
    return loss(hidden), statistics.log_prob, statistics.entropy, grad[:, :1]


@pytest.mark.parametrize("offset", [1e4, 1e6, 1e7])
def test_common_offset_changes_nothing(offset):
    rng = np.random.default_rng(0)
    kernel = np.zeros((2, 300), "f")
    kernel[0] = rng.integers(-20, 20, 300)
    hidden = np.ones((4, 2), "f")
    labels = rng.integers(0, 300, 4)
    plain = _loss_statistics_and_gradient(hidden, kernel, labels)
    # A copy: the first call may still be reading the other one.
    kernel = kernel.copy()
    kernel[1] = offset
    moved = _loss_statistics_and_gradient(hidden, kernel, labels)
    for after, before in zip(moved, plain, strict=True):
        np.testing.assert_allclose(after, before, rtol=2e-6, atol=1e-7)
    assert abs(moved[1] - plain[1]).max() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reductions_weights_and_ignored_labels(implementation):
    hidden, kernel, labels = map(np.array, cases.layer(6, 8, 50))
    weights = np.asarray([0.5, 0.0, 2.0, 1.0, 1.0, 0.0], "float32")
    labels[3], labels[1] = -100, 999

    def run(**options):
        return linear_cross_entropy(
            hidden, kernel, labels, implementation=implementation, **options
        )

    per_token = run(reduction="none", weights=weights, ignore_label=-100)
    assert (np.asarray(per_token)[[1, 3, 5]] == 0).all()
    live = [0, 2, 4]
    plain = linear_cross_entropy(hidden[live], kernel, labels[live], reduction="none")
    expected = np.asarray(plain) * [0.5, 2, 1]
    np.testing.assert_allclose(np.asarray(per_token)[live], expected, rtol=1e-6)
    total = run(reduction="sum", weights=weights, ignore_label=-100)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    mean = run(weights=weights, ignore_label=-100)
    np.testing.assert_allclose(mean, expected.sum() / 3.5, rtol=1e-6)
    kept = run(weights=weights != 0, ignore_label=-100)
    np.testing.assert_allclose(kept, plain.mean(), rtol=1e-6)
    assert np.isnan(run())
    lost = run(reduction="none")
    assert np.isnan(lost[3]) and np.isnan(lost[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_positions_contribute_exactly_nothing(implementation):
    hidden, kernel, labels = map(np.array, cases.layer(6, 8, 50))
    weights = np.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], "float32")

    @jax.jit
    def run(hidden, kernel, labels, weights):
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

    value, grads = run(hidden, kernel, labels, weights)
    for bad in (-100, -1, 50):
        other, lost = hidden.copy(), labels.copy()
        other[4], other[5], lost[4:] = np.nan, np.inf, bad
        again, others = run(other, kernel, lost, weights)
        np.testing.assert_array_equal(again, value)
        for a, b in zip(others, grads, strict=True):
            np.testing.assert_array_equal(a, b)
    assert (np.asarray(grads[0])[4:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked_is_zero_with_zero_gradient(reduction):
    hidden, kernel, _ = map(np.array, cases.layer(4, 8, 50))
    labels = np.full(4, -100)

    def loss(hidden, kernel, **options):
        out = linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, **options
        )
        return out.sum()

    for options in ({"ignore_label": -100}, {"weights": np.zeros(4, "float32")}):
        total = functools.partial(loss, **options)
        value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, kernel)
        assert value == 0
        assert all((np.asarray(g) == 0).all() for g in grads)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.many_cases
def test_classes_masked_by_mask_and_by_bias(implementation, cap):
    hidden, kernel, _ = map(np.array, cases.layer(5, 8, 300))
    labels = np.full(5, 7)
    mask = np.arange(300) % 3 != 0
    bias = np.where(mask, 0.0, -np.inf).astype("float32")
    rest = np.flatnonzero(mask)
    at = np.searchsorted(rest, labels)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "workspace_bytes": TILE}
    options |= {"implementation": implementation, "logit_softcap": cap}

    @jax.jit
    def run(kernel, labels, more):
        def loss(hidden, kernel):
            return linear_cross_entropy(hidden, kernel, labels, **more, **options)

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    value, (dhidden, dkernel) = run(kernel[:, rest], at, {})
    for more in ({"class_mask": mask}, {"bias": bias}):
        got, (gh, gk) = run(kernel, labels, more)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        np.testing.assert_allclose(gh, dhidden, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gk[:, rest], dkernel, rtol=1e-4, atol=1e-6)
        assert (np.asarray(gk)[:, ~mask] == 0).all()
    none, grads = run(kernel, labels, {"class_mask": np.zeros(300, bool)})
    assert none == 0 and all((np.asarray(g) == 0).all() for g in grads)
    lost, grads = run(kernel, labels * 0, {"class_mask": mask})
    assert lost == np.inf and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_limits(implementation):
    hidden = np.eye(3, dtype="float32")
    kernel = np.asarray([[1.0, 2, 2], [3, 1, 0], [0, 0, 0]], "float32")
    labels = np.asarray([1, 1, 0])

    def run(tau):
        return linear_statistics(
            hidden,
            kernel,
            labels,
            temperature=tau,
            implementation=implementation,
        )

    u = hidden @ kernel
    for tau in (0.0, np.zeros(3, "float32"), np.float32(1e-40)):
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
        loss = functools.partial(
            linear_cross_entropy, label_smoothing=0.1, workspace_bytes=tile
        )
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel, labels)

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
    step = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))
    mixed, grads = step(hidden, narrow, labels)
    np.testing.assert_allclose(mixed, wide, rtol=1e-6)
    assert grads[0].dtype == jnp.float32 and grads[1].dtype == jnp.bfloat16


def test_leading_axes_rows_without_tokens_and_statistics():
    hidden, kernel, labels = map(np.asarray, cases.layer(6, 8, 50))
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
