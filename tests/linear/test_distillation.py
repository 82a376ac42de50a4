"""Distillation: against float64, at every temperature, and against stored logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import (
    distillation_loss,
    linear_distillation,
    linear_distillation_top_k,
    linear_top_k,
)
from tests import truth
from tests.linear import cases

ROWS, WIDE, NARROW, CLASSES = 11, 8, 5, 301
TILE = 4 * 8 * 256
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


def layers(kind="unit"):
    student = cases.layer(ROWS, WIDE, CLASSES, kind=kind)[:2]
    return student, cases.layer(ROWS, NARROW, CLASSES, seed=1)[:2]


def divergence_of(p, q, kind):
    """Returns a divergence of probabilities in float64."""

    def kl(p, q):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(p == 0, 0, p * (np.log(p) - np.log(q))).sum(-1)

    if kind == "forward_kl":
        return kl(p, q)
    return (
        kl(q, p)
        if kind == "reverse_kl"
        else (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    )


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.many_cases
def test_values(kind, tau):
    (h, w), (g, k) = layers()
    out = linear_distillation(
        h, w, g, k, temperature=tau, divergence=kind, reduction="none", tile_bytes=TILE
    )
    q = truth.softmax(np.asarray(h, np.float64) @ np.asarray(w, np.float64), tau)
    p = truth.softmax(np.asarray(g, np.float64) @ np.asarray(k, np.float64), tau)
    np.testing.assert_allclose(out, tau**2 * divergence_of(p, q, kind), rtol=2e-5)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.many_cases
def test_gradients_equal_those_of_stored_logits(kind, per_row):
    (h, w), (g, k) = layers()
    b = jnp.linspace(-1, 1, CLASSES)
    tau = jnp.linspace(0.5, 2, ROWS) if per_row else jnp.float32(1.7)
    weights = jnp.cos(jnp.arange(float(ROWS)))

    def ours(h, w, b, g, k, tau):
        loss = linear_distillation(
            *(h, w, g, k),
            student_bias=b,
            temperature=tau,
            divergence=kind,
            teacher_logit_softcap=2.0,
            teacher_kernel_layout="vh",
            teacher_gradient=True,
            reduction="none",
            tile_bytes=TILE,
        )
        return (loss * weights).sum()

    def stored(h, w, b, g, k, tau):
        teacher = 2 * jnp.tanh(g @ k.T / 2)
        tau = tau[:, None] if per_row else tau
        loss = distillation_loss(h @ w + b[None], teacher, tau, divergence=kind)
        return (loss * weights).sum()

    args = (h, w, b, g, k.T, tau)
    for a, e in zip(
        jax.grad(ours, range(6))(*args), jax.grad(stored, range(6))(*args), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())


def test_the_teacher_has_a_gradient_only_on_request():
    (h, w), (g, k) = layers()

    def loss(g, k, **options):
        return linear_distillation(h, w, g, k, **options)

    for gradient in jax.grad(loss, (0, 1))(g, k):
        np.testing.assert_array_equal(gradient, 0)
    both = jax.grad(functools.partial(loss, teacher_gradient=True), (0, 1))(g, k)
    assert all(np.abs(gradient).max() > 0 for gradient in both)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_like_its_teacher_has_no_loss(kind):
    (h, w), _ = layers()
    grad = jax.value_and_grad(linear_distillation, (0, 1))
    for tau in (0.3, 1.0, 1e4):
        loss, gradients = grad(h, w, h, w, temperature=tau, divergence=kind)
        assert loss == 0
        assert all(np.abs(g).max() == 0 for g in gradients)
    loss, gradients = grad(h, w, -h, w, temperature=0.0, divergence=kind)
    assert loss == 0 and all(np.abs(g).max() == 0 for g in gradients)


def test_masks_weights_and_reductions():
    (h, w), (g, k) = layers()
    mask = jnp.arange(CLASSES) % 3 > 0
    each = linear_distillation(h, w, g, k, class_mask=mask, reduction="none")
    kept = np.flatnonzero(mask)
    alone = linear_distillation(h, w[:, kept], g, k[:, kept], reduction="none")
    np.testing.assert_allclose(each, alone, rtol=1e-5)
    weights = jnp.asarray([0, 2] + [1] * (ROWS - 2), jnp.float32)
    mean = linear_distillation(
        h.at[0].set(jnp.nan), w, g, k, class_mask=mask, weights=weights
    )
    np.testing.assert_allclose(mean, (each * weights).sum() / weights.sum(), rtol=1e-6)
    nobody = jax.value_and_grad(linear_distillation)(
        h, w, g, k, class_mask=jnp.zeros(CLASSES, bool)
    )
    assert nobody[0] == 0 and np.abs(nobody[1]).max() == 0


def test_vmap_folds_rows():
    (h, w), (g, k) = layers()
    h, g = jnp.stack([h, -h]), jnp.stack([g, 2 * g])

    def total(w):
        mapped = jax.vmap(lambda h, g: linear_distillation(h, w, g, k))
        return mapped(h, g).sum()

    def looped(w):
        return sum(
            linear_distillation(*pair[:1], w, pair[1], k)
            for pair in zip(h, g, strict=True)
        )

    np.testing.assert_allclose(jax.grad(total)(w), jax.grad(looped)(w), atol=1e-7)
    text = str(jax.make_jaxpr(jax.grad(total))(w))
    assert f"[2,{WIDE},{CLASSES}]" not in text


@pytest.mark.parametrize("remaining", ["other", "renormalize", "ignore"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_top_k_teacher(remaining, tau):
    (h, w), (g, k) = layers()
    log_p, ids = linear_top_k(g, k, 6, temperature=tau)
    log_p, ids = log_p.at[0, 4:].set(-jnp.inf), ids.at[0, 5].set(-1)

    def ours(h, w, log_p):
        return linear_distillation_top_k(
            *(h, w, ids, log_p),
            remaining=remaining,
            temperature=tau,
            reduction="none",
            tile_bytes=TILE,
        )

    def plain(h, w, log_p):
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

    np.testing.assert_allclose(
        ours(h, w, log_p), plain(h, w, log_p), rtol=1e-4, atol=1e-5
    )
    weights = jnp.cos(jnp.arange(float(ROWS)))
    finite = np.isfinite(log_p)
    gradients = [
        jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1, 2))(h, w, log_p)
        for f in (ours, plain)
    ]
    for index, (a, e) in enumerate(zip(*gradients, strict=True)):
        a, e = (np.where(finite, x, 0) if index == 2 else np.asarray(x) for x in (a, e))
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4)


def test_top_k_of_a_student_like_its_teacher():
    (h, w), _ = layers()
    log_p, ids = linear_top_k(h, w, 6)
    loss, grad = jax.value_and_grad(linear_distillation_top_k)(h, w, ids, log_p)
    assert 0 <= loss < 1e-12 and np.abs(grad).max() < 1e-6


def test_messages():
    (h, w), (g, k) = layers()
    with pytest.raises(ValueError, match="`teacher_hidden` must have shape"):
        linear_distillation(h, w, g[:3], k)
    with pytest.raises(ValueError, match="`teacher_kernel` must have the student's V"):
        linear_distillation(h, w, g, k[:, :300])
    with pytest.raises(ValueError, match="`teacher_kernel` must have shape"):
        linear_distillation(h, w, g, k.T)
    infinite = (math.inf, np.float32("inf"), jnp.float32("inf"))
    for temperature in (*infinite, jnp.full(ROWS, jnp.inf).at[0].set(1.0)):
        with pytest.raises(ValueError, match="`temperature` must be finite"):
            linear_distillation(h, w, g, k, temperature=temperature)
    with pytest.raises(ValueError, match="`divergence` must be one of"):
        linear_distillation(h, w, g, k, divergence="kl")  # pyright: ignore
    with pytest.raises(ValueError, match="`class_ids` must have shape"):
        linear_distillation_top_k(h, w, jnp.zeros((3, 2), int), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="`remaining` must be one of"):
        ids = jnp.zeros((ROWS, 2), int)
        linear_distillation_top_k(h, w, ids, jnp.zeros((ROWS, 2)), remaining="all")  # pyright: ignore
