"""Log-probabilities of drawn classes: under the temperature, and among kept classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests import truth
from tests.logits.test_filters import true_row

KEY = jax.random.key(0)
ROWS = 12
KINDS = ("unit", "zero", "peaked", "offset", "negative")
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "top_n_sigma": np.inf}
# Each row of one program has other filters.
GIVEN = [
    {},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 60},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"top_n_sigma": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.1},
    {"top_k": 30, "min_p": 0.1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "top_n_sigma": 2.0},
]


def logits_of(kind, classes):
    if kind == "negative":
        return truth.logits("unit", (ROWS, classes)) - np.float32(20)
    if kind == "offset":
        return truth.logits(kind, (ROWS, classes)) - np.float32(9e5)
    return truth.logits(kind, (ROWS, classes))


def check(x, tau, given, drawn, tolerance):
    """Compares the log-probabilities of draws with those of sorted rows."""
    x = np.asarray(x, np.float64)
    log_p = truth.log_softmax(x, tau)
    for row, options in enumerate(given):
        one = drawn.class_id[row]
        kept, _ = true_row(x[row], tau, **OFF | {"top_k": x.shape[1]} | options)
        assert kept[one]
        np.testing.assert_allclose(
            drawn.log_prob[row], log_p[row, one], rtol=tolerance, atol=tolerance
        )
        among = truth.log_softmax(np.where(kept, x[row], -np.inf), tau)
        np.testing.assert_allclose(
            drawn.filtered_log_prob[row], among[one], rtol=tolerance, atol=tolerance
        )
    assert (drawn.log_prob <= drawn.filtered_log_prob).all()
    assert (drawn.filtered_log_prob <= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("classes", [3, 1000, 50257])
@pytest.mark.many_cases
def test_values_of_every_filter(classes, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    wide = "float64" if dtype == "float64" else "float32"
    columns = {
        name: np.asarray([options.get(name, off) for options in GIVEN])[:, None]
        for name, off in OFF.items()
    }
    columns = {
        name: jnp.asarray(a, jnp.int32 if name == "top_k" else wide)
        for name, a in columns.items()
    }

    @jax.jit
    def draw(x, columns):
        return jaxsoft.sample(KEY, x, 0.7, return_log_prob=True, **columns)

    for kind in KINDS:
        x = logits_of(kind, classes)
        if dtype == "float16":
            x = np.clip(x, -6e4, 6e4)
        x = x.astype(dtype)
        drawn = jax.tree.map(np.asarray, draw(x, columns))
        assert drawn.class_id.dtype == np.int32
        assert drawn.log_prob.dtype == drawn.filtered_log_prob.dtype == wide
        check(x, 0.7, GIVEN, drawn, 1e-12 if dtype == "float64" else 4e-6)
        plain = jax.jit(lambda x, columns: jaxsoft.sample(KEY, x, 0.7, **columns))
        np.testing.assert_array_equal(plain(x, columns), drawn.class_id)


KNOWN = [
    {},
    {"top_k": 5},
    {"top_k": 200},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_n_sigma": 1.5},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.02, "top_n_sigma": 2.5},
    {"top_k": 200, "top_p": 0.5, "min_p": 0.02},
]


@pytest.mark.parametrize("given", KNOWN, ids=lambda given: "-".join(given) or "none")
@pytest.mark.parametrize("classes", [60, 3000])
def test_known_filters(classes, given):
    x = truth.logits("unit", (ROWS, 2, classes))
    x[3, 0, ::2] = -np.inf
    where = np.arange(classes) % 10 != 3
    drawn = jaxsoft.sample(KEY, x, 1.3, where=where, return_log_prob=True, **given)
    plain = jaxsoft.sample(KEY, x, 1.3, where=where, **given)
    np.testing.assert_array_equal(plain, drawn.class_id)
    flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1), drawn)
    masked = np.where(where, x, -np.inf).reshape(-1, classes)
    check(masked, 1.3, [given] * len(masked), flat, 2e-6)
    if not given:
        np.testing.assert_array_equal(drawn.log_prob, drawn.filtered_log_prob)


@pytest.mark.parametrize("classes", [50, 700])
def test_limits_of_the_temperature(classes):
    x = np.random.default_rng(0).integers(-3, 3, (ROWS, classes)).astype("float32")
    tau = np.where(np.arange(ROWS) % 2, 0, np.inf).astype("float32")[:, None]
    given: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.5}]
    for options in [*given, {"top_k": np.full((ROWS, 1), 3)}]:
        for one in (tau, 0.0, np.inf):
            drawn = jaxsoft.sample(KEY, x, one, return_log_prob=True, **options)
            log_p = jaxsoft.log_softmax(x, temperature=one)
            expected = np.take_along_axis(
                np.asarray(log_p), np.asarray(drawn.class_id)[:, None], axis=1
            )
            np.testing.assert_allclose(drawn.log_prob, expected[:, 0], rtol=1e-6)
            share = -np.log(np.sum(x == x.max(1, keepdims=True), axis=1))
            all_of = np.where(np.broadcast_to(one, (ROWS, 1)) == 0, share[:, None], 1)
            all_of = np.where(all_of == 1, -np.log(classes), all_of)[:, 0]
            if "top_k" in options:
                all_of = np.maximum(all_of, -np.log(3))
            if "top_p" in options:
                all_of = -np.log(np.ceil(np.exp(-all_of) / 2 - 1e-3))
            np.testing.assert_allclose(drawn.filtered_log_prob, all_of, atol=2e-6)


@pytest.mark.parametrize("classes", [30, 1500])
@pytest.mark.parametrize("given", KNOWN[:3] + KNOWN[-2:])
def test_rows_without_a_class(classes, given):
    x = truth.logits("unit", (7, classes))
    clean = jaxsoft.sample(KEY, x, 1.3, return_log_prob=True, **given)
    x[1], x[2, 4], x[3, 5], x[4, 1:] = -np.inf, np.nan, np.inf, -np.inf
    drawn = jax.jit(
        lambda x: jaxsoft.sample(KEY, x, 1.3, return_log_prob=True, **given)
    )(x)
    np.testing.assert_array_equal(drawn.class_id[1:5], [-1, -1, -1, 0])
    for found, plain in zip(drawn[1:], clean[1:], strict=True):
        np.testing.assert_array_equal(found[1:5], [-np.inf, -np.inf, -np.inf, 0])
        np.testing.assert_allclose(found[5:], plain[5:], rtol=1e-6)
    empty = jaxsoft.sample(KEY, x[:0], return_log_prob=True, **given)
    assert [a.shape for a in empty] == [(0,)] * 3


def test_out_of_range_and_axes_and_vmap():
    x = np.moveaxis(truth.logits("unit", (4, 5, 300)), -1, 1)
    share = np.asarray([0.5, -1.0, np.nan, 1.0], "float32")[:, None, None]
    draw = jax.jit(
        lambda key, x, p: jaxsoft.sample(
            key, x, axis=1, top_p=p, top_k=20, return_log_prob=True
        )
    )
    drawn = draw(KEY, x, share)
    assert [a.shape for a in drawn] == [(4, 5)] * 3
    for found in drawn[1:]:
        assert np.isneginf(found[1:3]).all() and np.isfinite(found[::3]).all()
    keys = jax.random.split(KEY, 4)
    rows = np.moveaxis(x, 1, -1)[:, :1]
    mapped = jax.vmap(
        lambda key, x, p: jaxsoft.sample(key, x, top_p=p, return_log_prob=True)
    )(keys, rows, share[:, 0, 0])
    for i in range(4):
        one = jax.jit(
            lambda key, x, p: jaxsoft.sample(key, x, top_p=p, return_log_prob=True)
        )(keys[i], rows[i], share[i, 0, 0])
        for found, expected in zip(mapped, one, strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-6)


def test_no_gradient():
    x = truth.logits("unit", (4, 300))

    def total(x, tau):
        drawn = jaxsoft.sample(KEY, x, tau, top_p=0.9, return_log_prob=True)
        return jnp.sum(drawn.log_prob + drawn.filtered_log_prob)

    gradients = jax.jit(jax.grad(total, (0, 1)))(x, np.float32(0.8))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
