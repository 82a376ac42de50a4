"""Log-probabilities of given classes and entropies, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_log_prob, linear_log_prob_at
from tests import truth
from tests.linear import cases

ROWS, FEATURES, CLASSES = 12, 8, 1009
TILE = 4 * 8 * 128


def logits_of(hidden, kernel):
    return np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)


@jax.jit
def plain_values(hidden, kernel):
    """Returns log-probabilities and entropies by the plain formula at 0.7."""
    tempered = hidden.astype("float32") @ kernel.astype("float32") / 0.7
    log_p = jax.nn.log_softmax(tempered)
    return log_p, -(jnp.exp(log_p) * log_p).sum(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_values(kind, dtype):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, kind, dtype)
    u = logits_of(hidden, kernel)
    log_prob, entropy = linear_log_prob(
        hidden, kernel, labels, temperature=0.7, workspace_bytes=TILE
    )
    plain, plain_entropy = plain_values(hidden, kernel)
    true = truth.log_softmax(u, 0.7)
    rows = np.arange(ROWS)
    # At an offset the rounding of the products themselves is all there is.
    slack = 1e-4 if kind == "offset" else 2e-6
    plain = np.asarray(plain)
    truth.assert_as_good(log_prob, plain[rows, labels], true[rows, labels], slack=slack)
    truth.assert_as_good(entropy, plain_entropy, truth.entropy(u, 0.7), slack=slack)
    assert (np.asarray(log_prob) <= 0).all() and (np.asarray(entropy) >= 0).all()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_all_classes_sum_to_one_and_none_is_above_zero(kind):
    hidden, kernel, _ = cases.layer(4, FEATURES, 200, kind)
    ids = np.broadcast_to(np.arange(200), (4, 200))
    for tau in (0.0, 1e-3, 1.0, 30.0, float("inf")):
        out = linear_log_prob_at(
            hidden, kernel, ids, temperature=tau, workspace_bytes=TILE
        )
        assert (np.asarray(out) <= 0).all()
        np.testing.assert_allclose(np.exp(out).sum(1), 1, rtol=3e-6)


def same_derivatives(ours, plain, *arrays):
    """Compares values and gradients by all arrays, in float64."""

    @jax.jit
    def both(*arrays):
        moving = range(len(arrays))
        return [jax.value_and_grad(f, moving)(*arrays) for f in (ours, plain)]

    (value, grads), (exact, exact_grads) = both(*arrays)
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    for a, b in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["hv", "vh"])
def test_classes_and_gradients_against_autodiff(layout, x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    labels = np.asarray(labels)
    ids = np.stack([labels, (labels * 3 + 1) % CLASSES, labels], -1)
    bias = np.linspace(-1, 1, CLASSES)
    tau = np.linspace(0.4, 2, ROWS)
    weights = np.cos(np.arange(3.0 * ROWS)).reshape(ROWS, 3)

    def ours(hidden, kernel, bias, tau):
        out = linear_log_prob_at(
            hidden,
            kernel if layout == "hv" else kernel.T,
            ids,
            bias=bias,
            temperature=tau,
            logit_softcap=0.9,
            kernel_layout=layout,
            workspace_bytes=TILE,
        )
        return (out * weights).sum()

    def plain(hidden, kernel, bias, tau):
        u = 0.9 * jnp.tanh((hidden @ kernel + bias[None]) / 0.9)
        log_p = jax.nn.log_softmax(u / tau[:, None])
        return (jnp.take_along_axis(log_p, ids, 1) * weights).sum()

    same_derivatives(ours, plain, hidden, kernel, bias, tau)


def of_kept(u, ids, tau):
    """Returns log-probabilities among the listed classes, and the entropy, in float64.

    They are 0 where an id is -1.
    """
    picked = np.take_along_axis(np.asarray(u, np.float64), np.maximum(ids, 0), 1)
    log_probs = truth.log_softmax(picked, tau, ids >= 0)
    return np.where(ids < 0, 0, log_probs), truth.entropy(picked, tau, ids >= 0)


@jax.jit
def plain_kept(hidden, kernel, ids, tau):
    """Returns the same by the plain formula."""
    logits = hidden.astype("float32") @ kernel.astype("float32")
    picked = jnp.take_along_axis(logits, jnp.maximum(ids, 0), 1)
    log_p = jax.nn.log_softmax(jnp.where(ids < 0, -jnp.inf, picked) / tau)
    return jnp.where(ids < 0, 0, log_p)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.many_cases
def test_values_among_kept_classes(kind, dtype):
    """They are far below the best class of all, which is none of them."""
    hidden, kernel, _ = cases.layer(ROWS, FEATURES, CLASSES, kind, dtype)
    u = logits_of(hidden, kernel)
    ids = np.argsort(u, axis=1)[:, [0, 7, 3, 7, 11]].astype("int32")
    ids[0, 2:], ids[1, 0], ids[2, :4] = -1, -1, -1
    for tau in (0.0, 1e-3, 0.7, 30.0, float("inf")):
        log_probs, entropy = linear_log_prob_at(
            hidden, kernel, ids, temperature=tau, normalize=True, workspace_bytes=TILE
        )
        exact, exact_entropy = of_kept(u, ids, min(max(tau, 1e-30), 1e30))
        if 0 < tau < float("inf"):
            plain = plain_kept(hidden, kernel, ids, tau)
            # At an offset the rounding of the products themselves is all there is.
            slack = 1e-3 if kind == "offset" else 2e-6
            truth.assert_as_good(log_probs, plain, exact, slack=slack)
        np.testing.assert_array_equal(np.asarray(log_probs)[ids < 0], 0)
        assert (np.asarray(log_probs) <= 0).all() and (np.asarray(entropy) >= 0).all()
        sums = np.where(ids < 0, 0, np.exp(log_probs)).sum(1)
        np.testing.assert_allclose(sums, 1, rtol=3e-6)
        if tau in (0, float("inf")):
            np.testing.assert_allclose(np.exp(log_probs), np.exp(exact), rtol=1e-6)
            np.testing.assert_allclose(entropy, exact_entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_kept_classes_far_below_the_best_of_all(implementation):
    """What another class reaches takes no digits from them."""
    kernel = np.zeros((1, 300), "float32")
    kernel[0, 7], kernel[0, [1, 2, 3]] = 1e5, [0.1, 0.2, 0.35]
    log_probs, entropy = linear_log_prob_at(
        np.ones((1, 1), "float32"),
        kernel,
        np.array([[1, 2, 3]]),
        normalize=True,
        implementation=implementation,
    )
    exact, exact_entropy = of_kept(kernel, np.array([[1, 2, 3]]), 1.0)
    np.testing.assert_allclose(log_probs, exact, rtol=2e-7)
    np.testing.assert_allclose(entropy, exact_entropy, rtol=2e-7)


@pytest.mark.parametrize("layout", ["hv", "vh"])
def test_gradients_among_kept_classes(layout, x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    labels = np.asarray(labels)
    ids = np.stack([labels, (labels * 3 + 1) % CLASSES, labels // 2], -1)
    ids[:, 1] = np.where(np.arange(ROWS) % 3 == 0, -1, ids[:, 1])
    bias = np.linspace(-1, 1, CLASSES)
    tau = np.linspace(0.4, 2, ROWS)
    weights = 1 + np.cos(np.arange(1.0 * ROWS))
    factors = np.cos(np.arange(3.0 * ROWS)).reshape(ROWS, 3)

    def ours(hidden, kernel, bias, tau):
        log_probs, entropy = linear_log_prob_at(
            hidden,
            kernel if layout == "hv" else kernel.T,
            ids,
            bias=bias,
            temperature=tau,
            logit_softcap=0.9,
            weights=weights,
            normalize=True,
            kernel_layout=layout,
            workspace_bytes=TILE,
        )
        return (log_probs * factors).sum() + (entropy**2).sum()

    def plain(hidden, kernel, bias, tau):
        u = 0.9 * jnp.tanh((hidden @ kernel + bias[None]) / 0.9)
        picked = jnp.take_along_axis(u, np.maximum(ids, 0), 1) / tau[:, None]
        log_p = jax.nn.log_softmax(jnp.where(ids < 0, -1e30, picked))
        log_p = jnp.where(ids < 0, 0, log_p)
        entropy = -jnp.where(ids < 0, 0, jnp.exp(log_p) * log_p).sum(1)
        log_p, entropy = log_p * weights[:, None], entropy * weights
        return (log_p * factors).sum() + (entropy**2).sum()

    same_derivatives(ours, plain, hidden, kernel, bias, tau)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "classes", [3, 1000, pytest.param(50257, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.many_cases
def test_values_and_gradients_of_every_kind_of_logits(normalize, classes, kind, x64):
    hidden, kernel, labels = map(np.asarray, cases.layer(ROWS, FEATURES, classes, kind))
    ids = np.stack([labels, (labels + 1) % classes, -np.ones_like(labels)], 1)
    ids[::3, 1] = -1
    kept, factors = ids >= 0, np.cos(np.arange(3.0 * ROWS)).reshape(ROWS, 3)
    arrays = hidden, kernel, np.linspace(0.7, 2, ROWS, dtype="float32")

    def ours(hidden, kernel, tau):
        # Without `normalize` an id is a class.
        found = linear_log_prob_at(
            hidden,
            kernel,
            ids if normalize else np.maximum(ids, 0),
            temperature=tau,
            normalize=normalize,
            workspace_bytes=max(TILE, 4 * classes),
        )
        return found if normalize else (found, jnp.zeros_like(found[:, 0]))

    def formula(hidden, kernel, tau):
        logits = hidden @ kernel / tau[:, None]
        picked = jnp.take_along_axis(logits, np.maximum(ids, 0), 1)
        if not normalize:
            log_p = picked - jax.nn.logsumexp(logits, 1)[:, None]
            return log_p, jnp.zeros_like(log_p[:, 0])
        log_p = jax.nn.log_softmax(jnp.where(kept, picked, -1e30))
        entropy = -jnp.sum(jnp.where(kept, jnp.exp(log_p) * log_p, 0), 1)
        return jnp.where(kept, log_p, 0), entropy

    def step(function, *arrays):
        def total(*arrays):
            log_probs, entropy = found = function(*arrays)
            weighted = log_probs * factors.astype(log_probs.dtype)
            return weighted.sum() + entropy.sum(), found

        (_, found), slopes = jax.value_and_grad(total, range(3), has_aux=True)(*arrays)
        return *found, *slopes

    wide = [a.astype("float64") for a in arrays]
    exact = jax.jit(functools.partial(step, formula))(*wide)
    found, plain = jax.jit(lambda *a: [step(f, *a) for f in (ours, formula)])(*arrays)
    # The products of float32 round by some of the largest logit's digits.
    rounding = 2e-7 * max(np.abs(wide[0] @ wide[1]).max(), 8)
    # Slopes add up to 0 within theirs, times what they are multiplied by.
    slopes_round = 5e-7 * max(np.abs(a).max() for a in wide[:2])
    for a, b, e in zip(found, plain, exact, strict=True):
        slack = rounding * np.abs(e).max() + slopes_round
        assert truth.gap(a, e) <= truth.gap(b, e) + slack


def test_kept_classes_that_are_dropped_bad_or_none():
    hidden, kernel, _ = cases.layer(4, FEATURES, 300)
    hidden = np.array(hidden)
    hidden[3] = np.nan
    ids = np.asarray([[7, 8, -1], [5, 300, 6], [-1, -1, -1], [1, 2, 3]], "int32")
    options: Any = {"class_mask": np.arange(300) != 7, "weights": [1.0, 1.0, 1.0, 0.0]}

    @jax.jit
    def values_and_gradient(hidden):
        def total(hidden):
            out = linear_log_prob_at(hidden, kernel, ids, normalize=True, **options)
            return sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in out), out

        gradient, out = jax.grad(total, has_aux=True)(hidden)
        return *out, gradient

    log_probs, entropy, gradient = values_and_gradient(hidden)
    none = [0.0, 0.0, 0.0]
    np.testing.assert_array_equal(
        log_probs, [[-np.inf, 0, 0], [np.nan] * 3, none, none]
    )
    np.testing.assert_array_equal(entropy, [0, np.nan, 0, 0])
    np.testing.assert_array_equal(np.asarray(gradient)[2:], 0)
    as_given = linear_log_prob_at(
        hidden[:1],
        kernel,
        np.asarray([[7, 8, -100]]),
        normalize=True,
        ignore_label=-100,
    )
    np.testing.assert_array_equal(np.isnan(as_given[0]), False)


def test_per_token_temperature_of_log_prob_and_entropy(x64):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="float64")
    tau = np.linspace(0.4, 2, ROWS)

    def ours(hidden, kernel, tau):
        log_prob, entropy = linear_log_prob(
            hidden, kernel, labels, temperature=tau, workspace_bytes=TILE
        )
        return (log_prob * jnp.cos(tau) + entropy * jnp.sin(tau)).sum()

    def plain(hidden, kernel, tau):
        log_p = jax.nn.log_softmax(hidden @ kernel / tau[:, None])
        entropy = -(jnp.exp(log_p) * log_p).sum(1)
        log_prob = jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
        return (log_prob * jnp.cos(tau) + entropy * jnp.sin(tau)).sum()

    @jax.jit
    def both(*args):
        return [jax.grad(f, range(3))(*args) for f in (ours, plain)]

    for a, b in zip(*both(hidden, kernel, tau), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bad_and_dropped_classes():
    hidden, kernel, _ = cases.layer(2, FEATURES, 300)
    mask = np.arange(300) != 7
    ids = np.asarray([[7, -1, 300, 8], [0, 299, -100, 7]], "int32")

    @jax.jit
    def values_and_gradient(hidden):
        def kept(hidden):
            out = linear_log_prob_at(
                hidden, kernel, ids, class_mask=mask, workspace_bytes=TILE
            )
            return jnp.where(jnp.isfinite(out), out, 0).sum(), out

        grad, out = jax.grad(kept, has_aux=True)(hidden)
        return out, grad

    out, grad = values_and_gradient(hidden)
    np.testing.assert_array_equal(
        np.isnan(out), [[False, True, True, False], [False, False, True, False]]
    )
    assert out[0, 0] == -np.inf and out[1, 3] == -np.inf
    assert np.isfinite(grad).all()


def test_offsets_change_nothing():
    rng = np.random.default_rng(0)
    logits = (np.round(rng.standard_normal((1, 300)) * 8) / 8).astype("float32")
    ids, one = np.asarray([[0, 5, 299]]), np.ones((1, 1), "float32")
    plain = linear_log_prob_at(one, logits, ids)
    for offset in (1e4, 1e6, -1e6):
        moved = linear_log_prob_at(one, logits + np.float32(offset), ids)
        np.testing.assert_array_equal(moved, plain)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_tokens_without_weight_are_zero_and_reach_no_gradient(implementation):
    hidden, kernel, labels = cases.layer(6, FEATURES, 300)
    # What the tokens that do not count hold: NaN, inf, and labels that are no class.
    keep = np.array([True, False, True, False, False, True])
    weights = np.where(keep, [0.5, 0, 2, 0, 1, 1], 0).astype("float32")
    lost = np.where(keep, labels, [0, -1, 0, 300, -100, 0]).astype("int32")
    bad = np.where(
        keep[:, None], hidden, np.array([0, np.nan, 0, np.inf, 1, 0])[:, None]
    )
    bad = bad.astype("float32")
    # The class that stands in for a lost label is dropped.
    mask = np.arange(300) > 0
    labels = np.maximum(labels, 1)
    lost = np.where(keep, labels, lost)
    options = {
        "class_mask": mask,
        "workspace_bytes": TILE,
        "implementation": implementation,
    }

    def pair(hidden, kernel, labels, **more):
        found = linear_log_prob(hidden, kernel, labels, **options, **more)
        total = sum(jnp.where(keep, a, 0).sum() for a in found)
        return total, found

    def at(hidden, kernel, labels, **more):
        ids = jnp.stack([labels, jnp.full_like(labels, 7)], -1)
        found = linear_log_prob_at(hidden, kernel, ids, **options, **more)
        return jnp.where(keep[:, None], found, 0).sum(), (found,)

    for function in (pair, at):
        run = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))
        (_, expected), (of_hidden, of_kernel) = run(
            np.where(keep[:, None], hidden, 0), kernel, labels
        )
        weighted = jax.jit(
            jax.value_and_grad(
                lambda *a, f=function: f(*a, weights=keep, ignore_label=-100),
                (0, 1),
                has_aux=True,
            )
        )
        (_, found), gradients = weighted(bad, kernel, lost)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[keep], b[keep], rtol=1e-6)
            np.testing.assert_array_equal(a[~keep], 0)
        np.testing.assert_allclose(gradients[0], of_hidden, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradients[1], of_kernel, rtol=1e-5, atol=1e-7)
        assert (np.asarray(gradients[0])[~keep] == 0).all()
        real = jax.jit(lambda *a, f=function: f(*a, weights=weights)[1])
        for a, b in zip(real(bad, kernel, lost), expected, strict=True):
            scale = weights.reshape(6, *(1,) * (b.ndim - 1))
            np.testing.assert_allclose(a, np.where(scale == 0, 0, scale * b), rtol=1e-6)


def test_ignored_ids_of_a_token():
    hidden, kernel, _ = cases.layer(3, FEATURES, 300)
    ids = np.asarray([[7, -100, 8], [-100, -100, -100], [0, 299, -1]], "int32")
    bad = hidden.at[1].set(jnp.nan)

    @jax.jit
    def run(hidden, weights):
        def total(hidden):
            out = linear_log_prob_at(
                hidden, kernel, ids, weights=weights, ignore_label=-100
            )
            return jnp.where(jnp.isfinite(out), out, 0).sum(), out

        return jax.grad(total, has_aux=True)(hidden)

    gradient, out = run(bad, np.array([1, 1, 0.5], "float32"))
    expected = np.array(linear_log_prob_at(hidden, kernel, ids))
    expected[ids == -100] = 0
    expected[2] *= np.float32(0.5)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert np.isnan(out[2, 2]) and np.isfinite(gradient).all()
    assert (np.asarray(gradient[1]) == 0).all()
    _, out = run(bad, np.array([0, 1, 1], "float32"))
    assert (np.asarray(out[:2]) == 0).all()


def test_weights_of_the_classes_are_told_what_to_do():
    hidden, kernel, labels = cases.layer(3, FEATURES, 300)
    with pytest.raises(
        ValueError,
        match=r"`weights` must have shape .* = \(3,\), got \(300,\)\. Weights of the "
        r"classes are `weights\[labels\]` of the tokens\.",
    ):
        linear_log_prob(hidden, kernel, labels, weights=np.ones(300, "float32"))
    with pytest.raises(ValueError, match=r"got \(3, 1\)\.$"):
        linear_log_prob(hidden, kernel, labels, weights=np.ones((3, 1), "float32"))
    with pytest.raises(TypeError, match="`ignore_label` must be an int, got 1.5"):
        linear_log_prob_at(hidden, kernel, labels[:, None], ignore_label=1.5)  # type: ignore
