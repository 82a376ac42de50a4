"""Distillation at K listed classes, streamed and of stored logits, against float64."""

import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import (
    distillation_loss,
    distillation_loss_top_k,
    linear_cross_entropy,
    linear_distillation_top_k,
    linear_log_prob_at,
    linear_top_k,
)
from jaxsoft._core.listed import FEW
from jaxsoft.linear.tiles import Tile
from tests import truth
from tests.linear import cases

ROWS, FEATURES, LISTED = 5, 8, 4
TILE = 4 * 8 * 256
REMAINING = ("other", "drop", "renormalize", "ignore")
# Reverse KL to a teacher that is 0 elsewhere is infinite.
CHOICES = [
    (remaining, name)
    for remaining in REMAINING
    for name in truth.DIVERGENCES
    if (remaining, name) != ("renormalize", "reverse_kl")
]


def options_of(choice):
    """Returns the options of a choice."""
    remaining, name = choice
    return {"remaining": remaining, **truth.DIVERGENCES[name][0]}


def plain(choice, u, ids, log_p, tau, xp: Any = np):
    """Returns the losses of rows by their formula, [N]."""
    remaining, name = choice
    u = u / xp.asarray(tau)[..., None]
    e = xp.exp(u - u.max(-1, keepdims=True))
    q = e / e.sum(-1, keepdims=True)
    some = (ids >= 0) & (log_p > -np.inf)
    classes = np.arange(u.shape[-1], dtype=ids.dtype)[None, None]
    is_listed = (classes == xp.where(some, ids, -1)[..., None]).any(-2)
    p_k = xp.where(some, xp.exp(xp.where(some, log_p, 0)), 0)
    q_k = xp.where(some, xp.take_along_axis(q, np.maximum(ids, 0), -1), 0)
    if remaining in ("drop", "renormalize"):
        p_k = p_k / p_k.sum(-1, keepdims=True)
    if remaining == "drop":
        q_k = q_k / q_k.sum(-1, keepdims=True)
    if remaining in ("other", "renormalize"):
        rest_q = xp.where(is_listed, 0, q).sum(-1, keepdims=True)
        rest_p = 1 - p_k.sum(-1, keepdims=True)
        rest_p = rest_p if remaining == "other" else 0 * rest_q
        p_k, q_k = (xp.concatenate(both, -1) for both in ((p_k, rest_p), (q_k, rest_q)))
    of_p, of_q, share_p, share_q = truth.DIVERGENCES[name][1]
    m = share_p * p_k + share_q * q_k
    m = xp.where(m == 0, 1, m)

    def from_mixture(p):
        return (p * xp.log(xp.where(p == 0, 1, p) / m)).sum(-1)

    return tau**2 * (of_p * from_mixture(p_k) + of_q * from_mixture(q_k))


def example(kind, classes, rows=ROWS):
    """Returns hidden, kernel, and what a teacher says of LISTED classes."""
    h, w = map(np.asarray, cases.layer(rows, FEATURES, classes, kind=kind)[:2])
    g, k = cases.layer(rows, FEATURES, classes, seed=1)[:2]
    log_p, ids = map(np.array, linear_top_k(g, k, min(LISTED, classes - 1)))
    # A row has fewer classes, padded in either way.
    log_p[0, -1], ids[1, -1] = -np.inf, -1
    return h, w, ids, log_p


def check_values(choice, classes):
    @jax.jit
    def both(h, w, ids, log_p, tau):
        options = options_of(choice)
        streamed = linear_distillation_top_k(
            *(h, w, ids, log_p),
            temperature=tau,
            reduction="none",
            workspace_bytes=TILE,
            **options,
        )
        u = jnp.matmul(h, w, precision="highest")
        return streamed, distillation_loss_top_k(u, ids, log_p, tau, **options), u

    for kind in cases.KINDS:
        h, w, ids, log_p = example(kind, classes)
        for tau in np.asarray([[0.7] * ROWS, [1, 2, 3, 4, 5]], "float32"):
            *found, u = both(h, w, ids, log_p, tau)
            wide = [np.asarray(a, "float64") for a in (u, log_p, tau)]
            exact = plain(choice, wide[0], ids, *wide[1:])
            for value in found:
                size = np.abs(exact).max() + 1e-2
                assert np.abs(value - exact).max() < 1e-5 * size, kind


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
@pytest.mark.many_cases
def test_values(choice):
    for classes in (3, 1000):
        check_values(choice, classes)


@pytest.mark.slow
def test_values_of_many_classes():
    check_values(("other", "skew_reverse"), 50257)


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
@pytest.mark.many_cases
def test_gradients(choice, x64):
    """By all that moves, of both; in float64 against the formula's own."""
    h, w, ids, log_p = example("unit", 301)
    tau = np.linspace(0.5, 2, ROWS)
    weights = np.cos(np.arange(ROWS))
    some = (log_p > -np.inf) & (ids >= 0)

    def streamed(h, w, log_p, tau):
        return linear_distillation_top_k(
            *(h, w, ids, log_p),
            temperature=tau,
            reduction="none",
            workspace_bytes=TILE,
            **options_of(choice),
        )

    def stored(h, w, log_p, tau):
        return distillation_loss_top_k(h @ w, ids, log_p, tau, **options_of(choice))

    def formula(h, w, log_p, tau):
        return plain(choice, h @ w, ids, log_p, tau, jnp)

    def slopes(function, *args):
        def total(*args):
            losses = function(*args)
            return (losses * weights.astype(losses.dtype)).sum()

        return jax.grad(total, range(4))(*args)

    arrays = [np.asarray(a, "float64") for a in (h, w, log_p, tau)]
    exact = jax.jit(functools.partial(slopes, formula))(*arrays)
    both = jax.jit(lambda *a: [slopes(f, *a) for f in (streamed, stored)])
    for dtype, bound in (("float64", 1e-9), ("float32", 1e-4)):
        for found in both(*(np.asarray(a, dtype) for a in arrays)):
            for index, (a, e) in enumerate(zip(found, exact, strict=True)):
                assert a.dtype == dtype
                a = np.asarray(a, "float64")
                e = np.where(some, e, 0) if index == 2 else np.asarray(e)
                assert np.abs(a - e).max() < bound * np.abs(e).max()


def test_gradients_of_a_long_list(monkeypatch, x64):
    """Of classes that are too many to compare each with all."""
    monkeypatch.setattr(sys.modules[__name__], "LISTED", FEW + 2)
    test_gradients(("other", "beta"), x64)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["_scattered", "_compared"])
def test_slopes_are_added_at_listed_classes(way, masked):
    """CPUs add them one after another, accelerators in a pass over all classes."""
    slopes, values = np.arange(10.0).reshape(2, 5), np.array([[1.0, 2, 4], [8, 16, 32]])
    labels = np.array([[3, -1, 0], [2, 2, 4]])
    expected = slopes.copy()
    for row, column, value in ((0, 3, 1), (0, 0, 4), (1, 2, 24), (1, 4, 32)):
        expected[row, column] += value
    logits = np.zeros((2, 5))
    if masked:
        logits[0, 0] = logits[1, 4] = -np.inf
        expected[0, 0], expected[1, 4] = slopes[0, 0], slopes[1, 4]
    arrays = [jnp.asarray(a, "float32") for a in (logits, slopes, values)]
    kernel, labels = jnp.zeros((1, 5)), jnp.asarray(labels, "int32")
    tile = Tile(jnp.int32(0), kernel, arrays[0], masked, labels, None)
    np.testing.assert_array_equal(getattr(tile, way)(*arrays[1:]), expected)


@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "classes", [3, 1000, pytest.param(50257, marks=pytest.mark.slow)]
)
@pytest.mark.many_cases
def test_gradients_of_every_kind_of_logits(classes, kind, remaining, x64):
    h, w, ids, log_p = example(kind, classes)
    tau = np.linspace(0.7, 2, ROWS, dtype="float32")
    names = ("beta", "skew_forward", "skew_reverse")

    def slopes(losses, *arrays):
        """Returns what a sum of all three losses depends on, by all that moves."""
        choices = [(remaining, name) for name in names]
        return jax.grad(lambda *a: sum(losses(c, *a).sum() for c in choices), range(4))(
            *arrays
        )

    def streamed(choice, h, w, log_p, tau):
        return linear_distillation_top_k(
            *(h, w, ids, log_p),
            temperature=tau,
            reduction="none",
            workspace_bytes=max(TILE, 4 * classes),
            **options_of(choice),
        )

    def stored(choice, h, w, log_p, tau):
        u = jnp.matmul(h, w, precision="highest")
        return distillation_loss_top_k(u, ids, log_p, tau, **options_of(choice))

    def formula(choice, h, w, log_p, tau):
        return plain(choice, h @ w, ids, log_p, tau, jnp)

    arrays = h, w, log_p, tau
    wide = [np.asarray(a, "float64") for a in arrays]
    exact = jax.jit(functools.partial(slopes, formula))(*wide)
    some = (log_p > -np.inf) & (ids >= 0)
    ways = (formula, streamed, stored)
    theirs, *ours = jax.jit(lambda *a: [slopes(f, *a) for f in ways])(*arrays)
    # The products of float32 round by some of the largest logit's digits.
    rounding = 2e-6 * max(np.abs(wide[0] @ wide[1]).max(), 8)
    # Slopes add up to 0 within theirs, times what they are multiplied by.
    slopes_round = 5e-7 * max(np.abs(a).max() for a in wide[:2])
    for found in ours:
        for index, (a, b, e) in enumerate(zip(found, theirs, exact, strict=True)):
            if index == 2:
                b, e = (np.where(some, x, 0) for x in (b, e))
            of_plain = truth.gap(b, e)
            bound = of_plain if np.isfinite(of_plain) else 0
            bound += rounding * np.abs(e).max() + slopes_round
            assert truth.gap(a, e) <= bound


@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.many_cases
def test_cross_entropy_of_labels_in_the_same_stream(remaining, reduction):
    """It is at temperature 1; a label may be listed, or not, or of no weight."""
    h, w, ids, log_p = example("unit", 304, rows=6)
    labels = np.asarray([3, ids[1, 0], ids[2, 1], 303, -100, 7])
    tau = np.linspace(0.5, 2, 6, dtype="float32")
    weights = np.linspace(1, 2, 6, dtype="float32")
    cotangent = np.cos(np.arange(6, dtype="float32")) if reduction == "none" else 1.0
    options = {"remaining": remaining, "divergence": "jensen_shannon", "beta": 0.3}
    shared = {"weights": weights, "ignore_label": -100, "reduction": reduction}
    mixed = {"labels": labels, "label_weight": 0.3, **options, **shared}

    def streamed(h, w, log_p, tau, **more):
        args = (h, w, ids, log_p)
        return linear_distillation_top_k(*args, temperature=tau, **mixed, **more)

    def stored(h, w, log_p, tau):
        return distillation_loss_top_k(h @ w, ids, log_p, tau, **mixed)

    def parts(h, w, log_p, tau):
        weight = np.where(labels == -100, 0, weights)
        soft = linear_distillation_top_k(
            *(h, w, ids, log_p),
            temperature=tau,
            weights=weight,
            reduction=reduction,
            **options,
        )
        return 0.7 * soft + 0.3 * linear_cross_entropy(h, w, labels, **shared)

    reference = functools.partial(streamed, implementation="reference")
    functions = (parts, streamed, stored, reference)

    def slopes(function):
        def total(*args):
            losses = function(*args)
            return (losses * cotangent).sum(), losses

        return jax.jit(jax.grad(total, range(4), has_aux=True))

    exact, *found = (slopes(function)(h, w, log_p, tau) for function in functions)
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("vocab",))
    shards = jax.device_put(w, NamedSharding(mesh, P(None, "vocab")))
    found.append(slopes(streamed)(h, shards, log_p, tau))
    for result in found:
        for a, e in zip(*map(jax.tree.leaves, (result, exact)), strict=True):
            size = np.abs(np.asarray(e)[np.isfinite(e)]).max()
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=3e-6 * size)
    one, two = (
        str(jax.make_jaxpr(slopes(function))(h, w, log_p, tau)).count("dot_general[")
        for function in (streamed, parts)
    )
    assert one == two // 2


@pytest.mark.parametrize("remaining", ["other", "drop"])
def test_a_label_that_is_no_class_is_nan(remaining):
    h, w, ids, log_p = example("unit", 301)
    loss = functools.partial(
        linear_distillation_top_k,
        *(h, w, ids, log_p),
        remaining=remaining,
        labels=np.asarray([0, 301, -1, 2, 3]),
        reduction="none",
    )
    np.testing.assert_array_equal(np.isnan(loss()), [0, 1, 1, 0, 0])
    np.testing.assert_allclose(
        loss(label_weight=0.0)[3:],
        linear_distillation_top_k(
            h, w, ids, log_p, remaining=remaining, reduction="none"
        )[3:],
        rtol=1e-6,
    )


@pytest.mark.parametrize("remaining", ["other", "drop"])
def test_all_classes_listed_are_the_whole_divergence(remaining):
    x, y = (truth.logits("unit", (4, 9), seed=s) for s in (1, 2))
    log_p = np.asarray(jax.nn.log_softmax(y / 2))
    ids = np.broadcast_to(np.arange(9), (4, 9))
    for options, _ in truth.DIVERGENCES.values():
        loss = distillation_loss_top_k(
            x, ids, log_p, 2.0, remaining=remaining, **options
        )
        exact = distillation_loss(x, y, 2.0, **options)
        np.testing.assert_allclose(loss, exact, rtol=1e-5, atol=1e-6)
        # Classes and lists on another axis.
        turned = distillation_loss_top_k(
            x.T, ids.T, log_p.T, 2.0, axis=0, remaining=remaining, **options
        )
        np.testing.assert_allclose(turned, loss, rtol=1e-5)


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
@pytest.mark.many_cases
def test_a_student_like_its_teacher(choice):
    """No loss, no gradient; and second derivatives that are those of the formula."""
    h, w, ids, _ = example("unit", 301)
    log_p = np.array(linear_log_prob_at(h, w, np.maximum(ids, 0)))
    log_p[0, -1] = -np.inf
    remaining, _ = choice

    def loss(u):
        return distillation_loss_top_k(u, ids, log_p, **options_of(choice)).sum()

    def streamed(h):
        return linear_distillation_top_k(h, w, ids, log_p, **options_of(choice))

    value, slope = jax.jit(jax.value_and_grad(streamed))(h)
    if remaining in ("other", "drop"):
        assert np.abs(value) < 1e-11 and np.abs(slope).max() < 1e-6
    along = np.cos(np.arange(301, dtype="float32"))[None] * np.ones((ROWS, 1), "f")
    step = jax.jit(lambda u: jax.jvp(jax.grad(loss), (u,), (along,))[1])
    curvature = np.asarray(step(h @ w))
    near = (h @ w).astype("float32")
    change = (jax.grad(loss)(near + 0.01 * along) - jax.grad(loss)(near)) / 0.01
    size = np.abs(change).max()
    assert size > 0 and np.abs(curvature - change).max() < 0.05 * size


@pytest.mark.parametrize("choice", [CHOICES[0], ("drop", "beta")], ids="-".join)
def test_limits(choice):
    """Padding alone, temperature 0, rows without classes, and rows without weight."""
    h, w, ids, log_p = example("unit", 301)
    log_p[2], ids[3] = -np.inf, -1
    tau = np.asarray([1, 0, 1, 1, 1], "float32")
    weights = np.asarray([1, 1, 1, 1, 0], "float32")
    lost = h.copy()
    lost[4] = np.nan

    def streamed(h, log_p, tau):
        options = {"temperature": tau, "weights": weights, **options_of(choice)}
        return linear_distillation_top_k(h, w, ids, log_p, reduction="none", **options)

    def stored(h, log_p, tau):
        options = {"weights": weights, **options_of(choice)}
        return distillation_loss_top_k(h @ w, ids, log_p, tau, **options)

    for function in (streamed, stored):
        values, pull = jax.vjp(jax.jit(function), lost, log_p, tau)
        assert values[0] > 0
        np.testing.assert_array_equal(values[1:], 0)
        for slope in pull(jnp.ones_like(values)):
            assert np.isfinite(slope).all()
            np.testing.assert_array_equal(slope[1:], 0)
    none = distillation_loss_top_k(
        h @ w, ids, log_p, where=np.zeros((1, 301), bool), **options_of(choice)
    )
    np.testing.assert_array_equal(none, 0)
    bad = np.where(ids == ids[0, 0], 301, ids)
    bad = linear_distillation_top_k(
        h, w, bad, log_p, reduction="none", **options_of(choice)
    )
    assert np.isnan(bad[0])


@pytest.mark.parametrize("choice", [CHOICES[0], ("drop", "beta")], ids="-".join)
def test_no_list_has_a_loss_at_an_infinite_temperature(choice):
    """The limit is that of logits, which log-probabilities there do not hold."""
    h, w, ids, log_p = example("unit", 301)
    options = options_of(choice)

    def streamed(tau):
        return linear_distillation_top_k(
            h, w, ids, log_p, temperature=tau, reduction="none", **options
        )

    def stored(tau):
        return distillation_loss_top_k(h @ w, ids, log_p, tau, **options)

    one = np.where(np.arange(ROWS) == 1, np.inf, 1).astype("float32")
    for function in (streamed, stored):
        for tau in (math.inf, np.float32("inf"), jnp.float32("inf"), one):
            with pytest.raises(ValueError, match="`temperature` must be finite"):
                function(tau)
        found = jax.jit(function)(one)
        np.testing.assert_array_equal(np.isnan(found), one == np.inf)


def test_reverse_kl_is_finite_where_the_teacher_lists_all_it_has():
    """What it lists may sum to 1 by rounding alone."""
    x = np.zeros((1, 9), "float32")
    ids, log_p = np.asarray([[3, 5]]), np.asarray([[0, -20]], "float32")
    loss = functools.partial(distillation_loss_top_k, divergence="reverse_kl")
    value, slope = jax.value_and_grad(lambda x: loss(x, ids, log_p).sum())(x)
    assert np.isfinite(value) and np.isfinite(slope).all() and value > 7
    np.testing.assert_array_equal(slope[0, :3], slope[0, 0])


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.many_cases
def test_sharded_classes(choice, reduction):
    h, w, ids, log_p = example("unit", 1208, rows=8)
    weights = np.linspace(0, 1, 8, dtype="float32")

    def loss(h, w, log_p):
        losses = linear_distillation_top_k(
            *(h, w, ids, log_p),
            temperature=2.0,
            weights=weights,
            reduction=reduction,
            **options_of(choice),
        )
        return losses.sum()

    step = jax.jit(jax.value_and_grad(loss, range(3)))
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("vocab",))
    placed = [
        jax.device_put(a, NamedSharding(mesh, P(None, "vocab") if a is w else P()))
        for a in (h, w, log_p)
    ]
    found, alone = step(*placed), step(h, w, log_p)
    for a, e in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype):
    h, w, ids, log_p = example("unit", 301)
    h, w = (jnp.asarray(a, dtype) for a in (h, w))
    choice = ("other", "skew_forward")

    def loss(h, w):
        return linear_distillation_top_k(h, w, ids, log_p, **options_of(choice))

    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, w)
    assert value.dtype == jnp.float32
    assert all(s.dtype == dtype for s in slopes)
    u = np.asarray(h, "float64") @ np.asarray(w, "float64")
    exact = plain(choice, u, ids, log_p, np.ones(ROWS)).mean()
    np.testing.assert_allclose(value, exact, rtol=1e-4)


def test_messages():
    h, w, ids, log_p = example("unit", 30)
    for loss in (
        functools.partial(linear_distillation_top_k, h, w),
        functools.partial(distillation_loss_top_k, h @ w),
    ):
        with pytest.raises(ValueError, match="`remaining` must be one of"):
            loss(ids, log_p, remaining="all")  # pyright: ignore
        with pytest.raises(ValueError, match="`remaining` must not be 'renormalize'"):
            loss(ids, log_p, remaining="renormalize", divergence="reverse_kl")
        with pytest.raises(ValueError, match="`divergence` must be one of"):
            loss(ids, log_p, divergence="kl")  # pyright: ignore
        with pytest.raises(ValueError, match="`teacher_log_probs` must have shape"):
            loss(ids, log_p[:, :2])
    with pytest.raises(ValueError, match="`teacher_ids` must have the shape of"):
        distillation_loss_top_k(h @ w, ids[:2], log_p[:2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_list_of_all_classes_leaves_no_rest_but_rounding(dtype):
    rng = np.random.default_rng(7)
    student, teacher = rng.normal(size=(2, 64, 6)).astype("float32")
    log_probs = jax.nn.log_softmax(teacher)
    ids = np.tile(np.arange(6), (64, 1))
    expected = distillation_loss(student, teacher)
    given = log_probs.astype(dtype)
    streamed = linear_distillation_top_k(
        student, np.eye(6, dtype="float32"), ids, given, reduction="none"
    )
    rtol = 1e-4 if dtype == "float32" else 0.02
    for found in (streamed, distillation_loss_top_k(student, ids, given)):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)


def test_the_gradient_where_the_teacher_has_no_rest():
    """The student's rest still takes mass from the listed classes."""
    x = truth.logits("unit", (3, 5))
    ids = np.broadcast_to(np.array([1, 3]), (3, 2))
    log_p = np.full((3, 2), np.log(np.float32(0.5)))

    def total(x):
        return distillation_loss_top_k(x, ids, log_p).sum()

    exact = truth.softmax(x) - np.array([0, 0.5, 0, 0.5, 0])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), exact, atol=1e-6)
