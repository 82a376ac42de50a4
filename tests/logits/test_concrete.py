"""The density of relaxed samples: the formula, its integral, and samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from jaxsoft import concrete_log_prob, gumbel_softmax
from tests import truth

ROWS, CLASSES = 4, 5


def relaxed(seed=1):
    return truth.softmax(truth.logits("unit", (ROWS, CLASSES), seed))


def formula(y, x, tau, where=None):
    """The log-density on the simplex, in float64."""
    kept = np.ones_like(y, bool) if where is None else np.broadcast_to(where, y.shape)
    count = kept.sum(-1)
    log_y = np.log(np.where(kept, y, 1))
    a = np.where(kept, x - tau * log_y, -np.inf)
    terms = np.where(kept, a - log_y, 0).sum(-1)
    total = special.logsumexp(a, axis=-1)
    tau = np.broadcast_to(tau, (ROWS, 1))[:, 0]
    return special.gammaln(count) + (count - 1) * np.log(tau) + terms - count * total


@pytest.mark.parametrize("where", [None, np.array([True, False, True, True, False])])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_formula(where, per_row):
    x, y = truth.logits("unit", (ROWS, CLASSES)), relaxed()
    tau = np.array([[0.3], [0.7], [1.0], [3.0]]) if per_row else 0.7
    given = jnp.asarray(tau, "float32") if per_row else tau
    out = concrete_log_prob(jnp.asarray(y, "float32"), x, given, where=where)
    np.testing.assert_allclose(out, formula(y, x, tau, where), rtol=2e-5, atol=2e-5)
    log_y = np.log(y)
    wide = concrete_log_prob(
        jnp.asarray(log_y, "float32"), x, given, where=where, log_space=True
    )
    kept = np.ones(CLASSES) if where is None else where
    jacobian = (log_y * kept).sum(-1)
    np.testing.assert_allclose(wide, out + jacobian, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tau", [0.4, 1.0, 2.5])
def test_densities_integrate_to_one(tau):
    x = np.array([0.3, -0.8, 1.1])
    density = jax.jit(lambda y, x: jnp.exp(concrete_log_prob(y, x, tau)))
    # By the logistic of a line: its slope widens the ends, where densities are large.
    t = np.linspace(-40, 40, 4001)
    first, rest = special.expit(t), special.expit(-t)
    values = density(
        np.stack([first, rest], 1).astype("float32"),
        np.tile(x[:2], (4001, 1)).astype("float32"),
    )
    assert integrate.trapezoid(values * first * rest, t) == pytest.approx(1, abs=1e-3)
    t = np.linspace(-20, 20, 401)
    a, b = (special.expit(g).ravel() for g in np.meshgrid(t, t, indexing="ij"))
    y = np.stack([a, (1 - a) * b, (1 - a) * (1 - b)], 1)
    jacobian = a * (1 - a) * (1 - a) * b * (1 - b)
    values = density(
        np.maximum(y, 1e-37).astype("float32"),
        np.tile(x, (len(y), 1)).astype("float32"),
    )
    total = integrate.trapezoid(
        integrate.trapezoid((np.asarray(values) * jacobian).reshape(401, 401), t), t
    )
    assert total == pytest.approx(1, abs=5e-3)


def test_gradients(x64):
    x = np.asarray(truth.logits("unit", (ROWS, CLASSES)), "float64")
    y, tau = np.asarray(relaxed(), "float64"), np.full((ROWS, 1), 0.6)

    def plain(y, x, tau):
        a = x - tau * jnp.log(y)
        total = CLASSES * jax.nn.logsumexp(a, axis=-1)
        terms = (a - jnp.log(y)).sum(-1) - total
        return (terms + (CLASSES - 1) * jnp.log(tau[:, 0])) @ jnp.arange(1.0, ROWS + 1)

    def ours(y, x, tau):
        return concrete_log_prob(y, x, tau) @ jnp.arange(1.0, ROWS + 1)

    @jax.jit
    def both(*args):
        return [jax.grad(f, (0, 1, 2))(*args) for f in (ours, plain)]

    for own, true in zip(*both(y, x, tau), strict=True):
        np.testing.assert_allclose(own, true, rtol=1e-9, atol=1e-11)


def test_samples_follow_the_density():
    x, tau = np.array([0.4, -0.3], np.float32), 0.7
    many = np.broadcast_to(x, (40_000, 2))
    drawn = np.asarray(gumbel_softmax(jax.random.key(0), many, tau))[:, 0]
    edges = special.expit(np.linspace(-6, 6, 41))
    fine = special.expit(np.linspace(-30, 30, 20_001)).astype("float32")
    y = np.stack([fine, special.expit(-np.linspace(-30, 30, 20_001))], 1)
    density = np.exp(
        concrete_log_prob(y.astype("float32"), np.tile(x, (20_001, 1)), tau)
    )
    below = integrate.cumulative_trapezoid(
        density * y[:, 0] * y[:, 1], dx=0.003, initial=0
    )
    law = np.diff(np.interp(edges, fine, below), prepend=0, append=below[-1])
    counts = np.histogram(drawn, np.concatenate([[0], edges, [1]]))[0]
    assert stats.chisquare(counts, law / law.sum() * 40_000).pvalue > 1e-4


def test_limits_offsets_and_single_classes():
    x = np.asarray([1.0, 2.0, -0.5], "float32")
    y = np.asarray([0.2, 0.3, 0.5], "float32")
    plain = np.asarray(concrete_log_prob(y, x, 0.7))
    offset = np.float32(2.0**20)
    np.testing.assert_array_equal(concrete_log_prob(y, x + offset, 0.7), plain)
    edge = np.asarray([0.0, 0.5, 0.5], "float32")
    assert np.isnan(concrete_log_prob(edge, x, 0.7))
    assert np.isnan(concrete_log_prob(y, x, 0.0))
    assert np.isnan(concrete_log_prob(y, x, jnp.inf))
    kept = np.asarray([False, True, True])
    halves = concrete_log_prob(edge[1:], x[1:], 0.7)
    np.testing.assert_allclose(
        concrete_log_prob(edge, x, 0.7, where=kept), halves, rtol=1e-6
    )
    assert concrete_log_prob(jnp.ones((2, 1)), jnp.zeros((2, 1)), 0.7).tolist() == [
        0,
        0,
    ]
    none = concrete_log_prob(y, np.full(3, -np.inf, "float32"), 0.7)
    assert none == 0
    dropped = np.where(kept, x, -np.inf).astype("float32")
    np.testing.assert_allclose(concrete_log_prob(edge, dropped, 0.7), halves, rtol=1e-6)
    turned = concrete_log_prob(y[:, None], x[:, None], 0.7, axis=0)
    np.testing.assert_array_equal(turned, plain[None])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((jnp.ones(3, int), jnp.zeros(3), 1.0), TypeError, "`relaxed` must have a fl"),
        ((jnp.ones(2), jnp.zeros(3), 1.0), ValueError, "`relaxed` must have shape"),
        ((jnp.ones(3), jnp.zeros(3), -1.0), ValueError, "`temperature` must not be"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        concrete_log_prob(*arguments)
