"""Distillation: against float64, at every temperature, and against stored logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import (
    distillation_loss,
    linear_cross_entropy,
    linear_distillation,
    linear_distillation_top_k,
    linear_top_k,
)
from jaxsoft.linear import plans
from tests import truth
from tests.linear import cases

ROWS, WIDE, NARROW, CLASSES = 11, 8, 5, 301
TILE = 4 * 8 * 256
DIVERGENCES = tuple(truth.DIVERGENCES)


def layers(kind="unit"):
    """Returns hidden and kernel of a student and of a narrower teacher."""
    student = cases.layer(ROWS, WIDE, CLASSES, kind=kind)[:2]
    teacher = cases.layer(ROWS, NARROW, CLASSES, seed=1)[:2]
    return jax.tree.map(np.asarray, (student, teacher))


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.many_cases
def test_values(kind, tau):
    (h, w), (g, k) = layers()
    out = linear_distillation(
        h,
        w,
        g,
        k,
        temperature=tau,
        reduction="none",
        workspace_bytes=TILE,
        **truth.DIVERGENCES[kind][0],
    )
    q = truth.softmax(np.asarray(h, np.float64) @ np.asarray(w, np.float64), tau)
    p = truth.softmax(np.asarray(g, np.float64) @ np.asarray(k, np.float64), tau)
    exact = tau**2 * truth.divergence(p, q, kind)
    np.testing.assert_allclose(out, exact, rtol=2e-5)


def check_temperatures(kind, classes, size):
    """Checks values and all gradients at low to infinite temperatures, one a row."""
    options = truth.DIVERGENCES[kind][0]
    taus = np.asarray([1, 2, 1e3, 1e5, 1e8, 1e15, np.inf], "float32")
    kinds = ("unit", "peaked", "offset", "negative", "range")
    tau = np.tile(taus, len(kinds))
    rows = len(tau)
    # The logits are the kernels' own numbers, whose differences are exact.
    hidden = np.eye(rows, dtype="float32")
    w, k = (
        np.concatenate([truth.logits(x, (len(taus), classes), s) for x in kinds])
        for s in (1, 2)
    )
    w, k = np.round(w * 64) / 64, np.round(k * 64) / 64
    kept = np.ones((2, classes), bool)
    kept[1, ::3] = False

    def losses(h, w, g, k, tau, mask):
        return linear_distillation(
            *(h, w, g, k),
            temperature=tau,
            class_mask=mask,
            teacher_gradient=True,
            precision="highest",
            reduction="none",
            workspace_bytes=size,
            **options,
        )

    @jax.jit
    def step(mask, *args):
        value, pull = jax.vjp(functools.partial(losses, mask=mask), *args)
        return value, pull(jnp.ones_like(value))

    args = hidden, w, hidden, k, tau
    placed = args
    if classes % 8 == 0:
        mesh = Mesh(np.array(jax.devices()).reshape(8), ("vocab",))
        placed = [
            jax.device_put(
                a, NamedSharding(mesh, P(None, "vocab") if a is w or a is k else P())
            )
            for a in args
        ]
    for mask, given in ((kept[0], args), (kept[1], args), (kept[1], placed)):
        value, (dh, dw, dg, dk, dtau) = step(mask, *given)
        logits = w[:, mask].astype("float64"), k[:, mask].astype("float64")
        exact, *slopes = truth.scaled_divergence(*logits, tau[:, None], kind)
        np.testing.assert_allclose(value, exact, rtol=2e-6)
        below = [x - x.max(1, keepdims=True) for x in logits]
        # What float32 rounds of a logit below the largest one.
        rounding = 2e-7 * np.max([np.abs(x).max(1) for x in below], axis=0)
        by_tau = by_tau_most = 0
        for x, centred, slope, by_kernel, by_hidden in zip(
            logits, below, slopes, (dw, dk), (dh, dg), strict=True
        ):
            gap = np.abs(by_kernel[:, mask] - slope).max(1)
            assert (gap <= 1e-6 * np.abs(slope).max(1) + rounding).all()
            np.testing.assert_array_equal(by_kernel[:, ~mask], 0)
            gap = np.abs(np.diag(by_hidden) - (slope * x).sum(1))
            most = (np.abs(slope) * np.abs(x)).sum(1)
            assert (gap <= 1e-6 * most + rounding * np.abs(x).max(1)).all()
            by_tau = by_tau - (slope * centred).sum(1)
            by_tau_most += (np.abs(slope) * np.abs(centred)).sum(1)
        by_tau = np.where(tau < np.inf, 2 * exact + by_tau, 0)
        gap = np.abs(np.where(tau < np.inf, tau, 1) * dtau - by_tau)
        assert (gap <= 1e-6 * (exact + by_tau_most) + rounding * 100).all()


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.many_cases
def test_every_temperature_keeps_all_digits(kind, classes):
    check_temperatures(kind, classes, TILE)


@pytest.mark.parametrize("kind", ["skew_forward", "skew_reverse"])
def test_a_skew_close_to_1_keeps_the_digits_of_both_gradients(kind, monkeypatch):
    """The divergence is of (1 - α)², and so are its gradients by both layers."""
    alpha = 1 - 1e-6
    options = dict(truth.DIVERGENCES[kind][0], alpha=alpha)
    parts = (
        (1, 0, alpha, 1 - alpha) if kind == "skew_forward" else (0, 1, 1 - alpha, alpha)
    )
    monkeypatch.setitem(truth.DIVERGENCES, kind, (options, parts))
    kinds = ("unit", "zero", "peaked", "offset", "negative")
    logits = (
        np.concatenate([truth.logits(x, (2, CLASSES), seed) for x in kinds])
        for seed in (1, 2)
    )
    student, teacher = (np.round(x * 64) / 64 for x in logits)
    tau = np.tile(np.asarray([1, 1e5], "float32"), len(kinds))
    hidden = np.eye(len(tau), dtype="float32")

    def streamed(student, teacher):
        return linear_distillation(
            *(hidden, student, hidden, teacher),
            temperature=tau,
            teacher_gradient=True,
            reduction="none",
            workspace_bytes=TILE,
            **options,
        )

    def stored(student, teacher):
        return distillation_loss(student, teacher, tau, **options)

    exact = truth.scaled_divergence(student, teacher, tau[:, None], kind)
    for function in (streamed, stored):
        value, pull = jax.vjp(jax.jit(function), student, teacher)
        np.testing.assert_allclose(value, exact[0], rtol=3e-6)
        for found, slope in zip(pull(jnp.ones_like(value)), exact[1:], strict=True):
            most = np.abs(slope).max(1, keepdims=True)
            # Beside its size, that of probabilities at 1 is rounded.
            most = 3e-6 * most + 1e-7 * ((1 - alpha) ** 2 * (tau == 1))[:, None]
            assert (np.abs(found - slope) <= most).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tau", [1.0, np.float32(100)])
def test_gradients_of_close_layers_keep_their_digits(kind, tau):
    """An error of the ratio of the layers' sums is in no class's slope."""
    # Numbers whose differences are exact.
    teacher, noise = (truth.logits("unit", (4, 1000), seed) for seed in (1, 2))
    teacher = np.round(teacher * 64) / 64
    student = teacher + np.round(noise * 16) / 4096
    hidden = np.eye(4, dtype="float32")

    @jax.jit
    def slopes(student, teacher):
        def loss(student, teacher):
            return linear_distillation(
                *(hidden, student, hidden, teacher),
                temperature=tau,
                divergence=kind,
                teacher_gradient=True,
                reduction="sum",
                workspace_bytes=TILE,
            )

        return jax.grad(loss, (0, 1))(student, teacher)

    exact = truth.scaled_divergence(student, teacher, tau, kind)[1:]
    for slope, exact_slope in zip(slopes(student, teacher), exact, strict=True):
        assert truth.error(slope, exact_slope) < 2e-6


def test_a_hot_teacher_of_fewer_classes_has_the_gradient_of_stored_logits():
    student, teacher = (np.round(truth.logits("unit", (1, 35), s) * 64) for s in (1, 2))
    bias = np.where(np.arange(35) < 30, 0, -np.inf).astype("float32")
    hidden, tau = np.ones((1, 1), "float32"), np.float32(1e6)

    def streamed(teacher):
        return linear_distillation(
            *(hidden, student, hidden, teacher),
            teacher_bias=bias,
            temperature=tau,
            teacher_gradient=True,
        )

    def stored(teacher):
        return distillation_loss(student, teacher + bias[None], tau).sum()

    found, exact = (jax.grad(loss)(teacher) for loss in (streamed, stored))
    assert truth.error(found, exact) < 2e-6


@pytest.mark.parametrize("tau", [16.0, 17.0, 1e7, math.inf])
@pytest.mark.parametrize("kind", ["forward_kl", "skew_reverse"])
@pytest.mark.many_cases
def test_a_known_temperature_keeps_all_digits(kind, tau):
    student, teacher = (truth.logits("unit", (4, CLASSES), seed) for seed in (1, 2))
    hidden = np.eye(4, dtype="float32")
    out = linear_distillation(
        *(hidden, student, hidden, teacher),
        temperature=tau,
        reduction="none",
        **truth.DIVERGENCES[kind][0],
    )
    exact = truth.scaled_divergence(student, teacher, tau, kind)[0]
    np.testing.assert_allclose(out, exact, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_temperature_keeps_all_digits_of_many_classes(kind):
    check_temperatures(kind, 50257, None)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.many_cases
def test_gradients_equal_those_of_stored_logits(kind, per_row):
    (h, w), (g, k) = layers()
    b = np.linspace(-1, 1, CLASSES, dtype="float32")
    tau = np.linspace(0.5, 2, ROWS, dtype="float32") if per_row else np.float32(1.7)
    weights = np.cos(np.arange(ROWS, dtype="float32"))
    options = truth.DIVERGENCES[kind][0]

    def ours(h, w, b, g, k, tau):
        loss = linear_distillation(
            *(h, w, g, k),
            student_bias=b,
            temperature=tau,
            teacher_logit_softcap=2.0,
            teacher_kernel_layout="vh",
            teacher_gradient=True,
            reduction="none",
            workspace_bytes=TILE,
            **options,
        )
        return (loss * weights).sum()

    def stored(h, w, b, g, k, tau):
        teacher = 2 * jnp.tanh(g @ k.T / 2)
        tau = tau[:, None] if per_row else tau
        loss = distillation_loss(h @ w + b[None], teacher, tau, **options)
        return (loss * weights).sum()

    @jax.jit
    def both(*args):
        return [jax.grad(f, range(6))(*args) for f in (ours, stored)]

    for a, e in zip(*both(h, w, b, g, k.T, tau), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "classes", [3, 1000, pytest.param(50257, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.many_cases
def test_every_kind_of_logits(name, classes, kind, x64):
    """Streamed and stored, values and gradients by all that moves."""
    arrays = (
        *cases.layer(ROWS, WIDE, classes, kind)[:2],
        *cases.layer(ROWS, NARROW, classes, seed=1)[:2],
        np.linspace(0.7, 2, ROWS, dtype="float32"),
    )
    options, workspace = truth.DIVERGENCES[name][0], max(TILE, 4 * classes)
    of_p, of_q, share_p, share_q = truth.DIVERGENCES[name][1]

    def streamed(h, w, g, k, tau):
        return linear_distillation(
            *(h, w, g, k),
            temperature=tau,
            teacher_gradient=True,
            reduction="none",
            workspace_bytes=workspace,
            **options,
        )

    def stored(h, w, g, k, tau):
        student = jnp.matmul(h, w, precision="highest")
        teacher = jnp.matmul(g, k, precision="highest")
        return distillation_loss(student, teacher, tau[:, None], **options)

    def formula(h, w, g, k, tau):
        log_q, log_p = (jax.nn.log_softmax(x / tau[:, None]) for x in (h @ w, g @ k))
        log_a, log_b = (float(np.log(s)) if s else -np.inf for s in (share_p, share_q))
        log_m = jnp.logaddexp(log_a + log_p, log_b + log_q)
        each = of_p * jnp.exp(log_p) * (log_p - log_m)
        each += of_q * jnp.exp(log_q) * (log_q - log_m)
        return tau**2 * each.sum(1)

    def step(losses, *arrays):
        def total(*arrays):
            found = losses(*arrays)
            return found.sum(), found

        return jax.value_and_grad(total, range(5), has_aux=True)(*arrays)

    wide = [np.asarray(a, "float64") for a in arrays]
    (_, exact), slopes = jax.jit(functools.partial(step, formula))(*wide)
    ways = (formula, streamed, stored)
    plain, *ours = jax.jit(lambda *a: [step(f, *a) for f in ways])(*arrays)
    # The products of float32 round by some of the largest logit's digits.
    rounding = 2e-6 * max(np.abs(wide[0] @ wide[1]).max(), 8)
    # Slopes add up to 0 within theirs, times what they are multiplied by.
    slopes_round = 5e-7 * max(np.abs(a).max() for a in wide[:4])
    for (_, losses), found in ours:
        of_ours, of_plain = (losses, *found), (plain[0][1], *plain[1])
        sizes = [np.abs(e).max() for e in (exact, *slopes)]
        # The derivative by τ is what is left of some losses.
        sizes[-1] = max(sizes[-1], sizes[0])
        for a, b, e, size in zip(
            of_ours, of_plain, (exact, *slopes), sizes, strict=True
        ):
            bound = truth.gap(b, e) + rounding * size + slopes_round
            assert truth.gap(a, e) <= bound


@pytest.mark.many_cases
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_both_streams_read_the_logits_of_a_few_rows(kind, monkeypatch):
    monkeypatch.setattr(plans, "_ROWS_OF_A_SUM", 8)
    (h, w), (g, k) = layers()

    def losses(h, w, workspace):
        return linear_distillation(
            *(h, w, g, k),
            temperature=0.7,
            reduction="none",
            workspace_bytes=workspace,
            **truth.DIVERGENCES[kind][0],
        )

    def gradients(h, w, workspace):
        found, pull = jax.vjp(lambda h, w: losses(h, w, workspace), h, w)
        return found, pull(np.cos(np.arange(ROWS, dtype="float32")))

    # Room for 8 of 11 rows of both layers, and for tiles alone.
    few, none = 72_000, TILE
    layer = plans.Layer(ROWS, WIDE, CLASSES, layers=2)
    assert layer.rows_read_twice(none) is None
    assert layer.rows_read_twice(few) == (8, plans.Tiling(8, CLASSES, 8, 128))
    got, expected = (gradients(h, w, size) for size in (few, none))
    for a, e in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6 * np.abs(e).max())
    counts = [
        str(jax.make_jaxpr(functools.partial(losses, workspace=size))(h, w)).count(
            "dot_general["
        )
        for size in (few, none)
    ]
    assert counts == [2, 4]


@pytest.mark.many_cases
@pytest.mark.parametrize("workspace", [TILE, None])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_of_labels_in_the_same_stream(reduction, workspace):
    """It is at temperature 1, and takes no product of its own."""
    (h, w), (g, k) = layers()
    w, k = w[:, :296], k[:, :296]
    labels = np.arange(ROWS) * 27
    labels[5] = -100
    tau = np.linspace(0.5, 2, ROWS, dtype="float32")
    cotangent = np.cos(np.arange(ROWS, dtype="float32"))
    cotangent = cotangent if reduction == "none" else 1.0
    shared = {"ignore_label": -100, "reduction": reduction}
    mixed = {"labels": labels, "label_weight": 0.3, **shared}
    size = {"workspace_bytes": workspace}

    def ours(h, w, g, k, tau):
        loss = linear_distillation(
            *(h, w, g, k), temperature=tau, teacher_gradient=True, **mixed, **size
        )
        return (loss * cotangent).sum()

    def stored(h, w, g, k, tau):
        return (distillation_loss(h @ w, g @ k, tau, **mixed) * cotangent).sum()

    def parts(h, w, g, k, tau):
        soft = linear_distillation(
            *(h, w, g, k),
            temperature=tau,
            weights=labels != -100,
            teacher_gradient=True,
            reduction=reduction,
            **size,
        )
        hard = linear_cross_entropy(h, w, labels, **shared, **size)
        return ((0.7 * soft + 0.3 * hard) * cotangent).sum()

    def step(function):
        return jax.jit(jax.value_and_grad(function, range(5)))

    args = (h, w, g, k, tau)
    exact = step(parts)(*args)
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("vocab",))
    placed = [
        jax.device_put(
            a, NamedSharding(mesh, P(None, "vocab") if a is w or a is k else P())
        )
        for a in args
    ]
    for found in (step(ours)(*args), step(stored)(*args), step(ours)(*placed)):
        for a, e in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())
    one, two = (
        str(jax.make_jaxpr(step(f))(*args)).count("dot_general[") for f in (ours, parts)
    )
    # Those of a cross-entropy alone: logits, once more if not kept, and two gradients.
    assert one == two - (3 if workspace is None else 4)
    options = {"labels": np.full(ROWS, 296), "reduction": "none", **size}
    assert np.isnan(linear_distillation(h, w, g, k, **options)).all()


def test_the_teacher_has_a_gradient_only_on_request():
    (h, w), (g, k) = layers()

    def loss(g, k, **options):
        return linear_distillation(h, w, g, k, **options)

    taught = functools.partial(loss, teacher_gradient=True)
    none, both = jax.jit(
        lambda g, k: [jax.grad(f, (0, 1))(g, k) for f in (loss, taught)]
    )(g, k)
    for gradient in none:
        np.testing.assert_array_equal(gradient, 0)
    assert all(np.abs(gradient).max() > 0 for gradient in both)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_like_its_teacher_has_no_loss(kind):
    (h, w), _ = layers()
    options = truth.DIVERGENCES[kind][0]
    divergence = functools.partial(linear_distillation, **options)
    step = jax.jit(jax.value_and_grad(divergence, (0, 1)))
    # Without a temperature it is known to be 1; others are not known to the program.
    for options in ({}, *({"temperature": np.float32(t)} for t in (0.3, 1.0, 1e4))):
        loss, gradients = step(h, w, h, w, **options)
        assert loss == 0
        assert all(np.abs(g).max() == 0 for g in gradients)
    loss, gradients = step(h, w, -h, w, temperature=np.float32(0))
    assert loss == 0 and all(np.abs(g).max() == 0 for g in gradients)


@pytest.mark.parametrize("kind", ["beta", "skew_forward", "jensen_shannon"])
def test_classes_of_one_layer_alone(kind):
    """A bias of -inf drops a class of one layer: the other's mass on it counts."""
    (h, w), (g, k) = layers()
    inf = np.float32(np.inf)
    of_student, of_teacher = np.zeros((2, CLASSES), "float32")
    of_student[::7], of_teacher[1::5] = -inf, -inf
    options = truth.DIVERGENCES[kind][0]

    def ours(h, g):
        return linear_distillation(
            *(h, w, g, k),
            student_bias=of_student,
            teacher_bias=of_teacher,
            teacher_gradient=True,
            temperature=2.0,
            **options,
        )

    def stored(h, g):
        logits = h @ w + of_student[None], g @ k + of_teacher[None]
        return distillation_loss(*logits, 2.0, reduction="mean", **options)

    @jax.jit
    def both(h, g):
        return [jax.value_and_grad(f, (0, 1))(h, g) for f in (ours, stored)]

    for a, e in zip(*map(jax.tree.leaves, both(h, g)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.many_cases
def test_overflow_and_classes_of_one_layer_at_an_infinite_temperature(kind):
    options = truth.DIVERGENCES[kind][0]
    hidden = np.eye(4, dtype="float32")
    ones = np.ones(4, "float32")

    def streamed(student, teacher, tau):
        layers = hidden, student, hidden, teacher
        return linear_distillation(
            *layers,
            temperature=tau,
            teacher_gradient=True,
            precision="highest",
            reduction="none",
            **options,
        )

    def stored(student, teacher, tau):
        return distillation_loss(student, teacher, tau, **options)

    logits = [truth.logits("unit", (4, 9), seed) for seed in (1, 2)]
    bias = np.where(np.arange(9) == 3, -np.float32("inf"), 0)
    none = np.zeros(9, "float32")
    for own, other in ((bias, none), (none, bias)):
        found = distillation_loss(logits[0] + own, logits[1] + other, np.inf, **options)
        np.testing.assert_array_equal(found, np.inf)
        found = linear_distillation(
            *(hidden, logits[0], hidden, logits[1]),
            student_bias=own,
            teacher_bias=other,
            temperature=np.inf,
            reduction="none",
            **options,
        )
        np.testing.assert_array_equal(found, np.inf)
    for function in (streamed, stored):
        step = jax.jit(lambda *args, f=function: jax.vjp(f, *args)[1](ones))
        value = jax.jit(function)
        for tau in np.asarray([1e-3, 1, 1e10, 3e38, np.inf], "float32"):
            huge = [np.clip(x * 1e38, -3e38, 3e38).astype("float32") for x in logits]
            args = *huge, np.full(4, tau)
            assert not np.isnan(value(*args)).any()
            assert all(np.isfinite(slope).all() for slope in step(*args))


def test_masks_weights_and_reductions():
    (h, w), (g, k) = layers()
    mask = np.arange(CLASSES) % 3 > 0
    each = linear_distillation(h, w, g, k, class_mask=mask, reduction="none")
    kept = np.flatnonzero(mask)
    alone = linear_distillation(h, w[:, kept], g, k[:, kept], reduction="none")
    np.testing.assert_allclose(each, alone, rtol=1e-5)
    weights = np.asarray([0, 2] + [1] * (ROWS - 2), "float32")
    lost = h.copy()
    lost[0] = np.nan
    mean = linear_distillation(lost, w, g, k, class_mask=mask, weights=weights)
    np.testing.assert_allclose(mean, (each * weights).sum() / weights.sum(), rtol=1e-6)
    nobody = jax.jit(jax.value_and_grad(linear_distillation))(
        h, w, g, k, class_mask=np.zeros(CLASSES, bool)
    )
    assert nobody[0] == 0 and np.abs(nobody[1]).max() == 0


def test_vmap_folds_rows():
    (h, w), (g, k) = layers()
    h, g = np.stack([h, -h]), np.stack([g, 2 * g])

    def total(w):
        mapped = jax.vmap(lambda h, g: linear_distillation(h, w, g, k))
        return mapped(h, g).sum()

    alone = jax.jit(jax.grad(lambda w, h, g: linear_distillation(h, w, g, k)))
    looped = sum(np.asarray(alone(w, *pair)) for pair in zip(h, g, strict=True))
    mapped = jax.jit(jax.grad(total))
    np.testing.assert_allclose(mapped(w), looped, atol=1e-7)
    text = str(mapped.trace(w).jaxpr)
    assert f"[2,{WIDE},{CLASSES}]" not in text


@pytest.mark.parametrize("remaining", ["other", "renormalize", "ignore"])
def test_top_k_teacher(remaining):
    """One program serves both temperatures."""
    (h, w), (g, k) = layers()
    weights = np.cos(np.arange(ROWS, dtype="float32"))

    def ours(h, w, log_p, ids, tau):
        return linear_distillation_top_k(
            *(h, w, ids, log_p),
            remaining=remaining,
            temperature=tau,
            reduction="none",
            workspace_bytes=TILE,
        )

    def plain(h, w, log_p, ids, tau):
        log_q = jax.nn.log_softmax(h @ w / tau)
        log_q = jnp.take_along_axis(log_q, jnp.maximum(ids, 0), 1)
        p = jnp.exp(log_p)
        if remaining == "renormalize":
            p = p / p.sum(1, keepdims=True)
        some = p > 0
        safe = jnp.where(some, p, 1)
        loss = jnp.where(some, safe * (jnp.log(safe) - log_q), 0).sum(1)
        if remaining == "other":
            rest, other = 1 - p.sum(1), 1 - jnp.where(some, jnp.exp(log_q), 0).sum(1)
            loss += rest * jnp.log(rest / other)
        return loss * tau**2

    @jax.jit
    def both(*args):
        def total(function, *args):
            losses = function(*args)
            return (losses * weights).sum(), losses

        step = jax.grad(total, (1, 2, 3), has_aux=True)
        return list(zip(step(ours, *args), step(plain, *args), strict=True))

    for tau in np.asarray([1, 3], "float32"):
        log_p, ids = map(np.array, linear_top_k(g, k, 6, temperature=tau))
        log_p[0, 4:], ids[0, 5] = -np.inf, -1
        gradients, losses = both(h, w, log_p, ids, tau)
        np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-5)
        finite = np.isfinite(log_p)
        for index, (a, e) in enumerate(zip(*gradients, strict=True)):
            if index == 2:
                a, e = (np.where(finite, x, 0) for x in (a, e))
            np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4)


def test_top_k_of_a_student_like_its_teacher():
    (h, w), _ = layers()
    log_p, ids = linear_top_k(h, w, 6)
    step = jax.jit(jax.value_and_grad(linear_distillation_top_k))
    loss, grad = step(h, w, ids, log_p)
    assert 0 <= loss < 1e-12 and np.abs(grad).max() < 1e-6


@pytest.mark.parametrize("remaining", ["other", "renormalize", "ignore"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("workspace", [None, TILE])
@pytest.mark.many_cases
def test_reduced_top_k_is_the_sum_of_its_tokens(remaining, reduction, workspace):
    """On one device and, of the classes, on four; with weights that have a gradient."""
    (h, w), (g, k) = layers()
    w, k = w[:, :300], k[:, :300]
    weights = 1 + np.cos(np.arange(ROWS, dtype="float32"))
    weights[3] = 0
    tau = np.linspace(0.5, 2, ROWS, dtype="float32")
    log_p, ids = map(np.array, linear_top_k(g, k, 6))
    h, ids = np.array(h), np.array(ids)
    h[3], ids[3] = np.nan, -1

    def loss(h, w, log_p, tau, weights, reduction, **options):
        return linear_distillation_top_k(
            *(h, w, ids, log_p),
            remaining=remaining,
            temperature=tau,
            weights=weights,
            reduction=reduction,
            **options,
        )

    def alone(*args):
        total = loss(*args, reduction="none").sum()
        return total / args[-1].sum() if reduction == "mean" else total

    def ours(*args):
        return loss(*args, reduction=reduction, workspace_bytes=workspace)

    args = (h, w, log_p, tau, weights)
    exact = jax.jit(jax.value_and_grad(alone, range(5)))(*args)
    step = jax.jit(jax.value_and_grad(ours, range(5)))
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))
    placed = [
        jax.device_put(a, NamedSharding(mesh, P(None, "vocab") if a is w else P()))
        for a in args
    ]
    for found in (step(*args), step(*placed)):
        for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_messages():
    (h, w), (g, k) = layers()
    with pytest.raises(ValueError, match="`teacher_hidden` must have shape"):
        linear_distillation(h, w, g[:3], k)
    with pytest.raises(TypeError, match="`labels` must have an integer dtype"):
        linear_distillation(h, w, g, k, labels=h[:, 0], ignore_label=-100)
    with pytest.raises(ValueError, match=r"shape student_hidden.shape\[:-1\]"):
        linear_distillation(h, w, g, k, weights=np.ones(ROWS + 1, "f"))
    with pytest.raises(ValueError, match="`teacher_kernel` must have the student's V"):
        linear_distillation(h, w, g, k[:, :300])
    with pytest.raises(ValueError, match="`teacher_kernel` must have shape"):
        linear_distillation(h, w, g, k.T)
    with pytest.raises(ValueError, match="`divergence` must be one of"):
        linear_distillation(h, w, g, k, divergence="kl")  # pyright: ignore
    for shape in ((3, 2), (ROWS, 0)):
        with pytest.raises(ValueError, match="`teacher_ids` must have shape .* K >= 1"):
            linear_distillation_top_k(h, w, np.zeros(shape, int), np.zeros(shape))
    with pytest.raises(ValueError, match="`remaining` must be one of"):
        ids = np.zeros((ROWS, 2), int)
        linear_distillation_top_k(h, w, ids, np.zeros((ROWS, 2)), remaining="all")  # pyright: ignore
