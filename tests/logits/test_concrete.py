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


@pytest.mark.parametrize("log_space", [False, True])
def test_rows_with_dropped_classes_beside_rows_without_density(log_space, x64):
    """As many as several tiles; all derivatives are finite, and 0 there."""
    dropped, nowhere = -np.inf, -np.inf if log_space else 0
    kinds = [
        ([1, 2, -0.5, 0.3], [0.2, 0.3, 0.4, 0.1]),
        ([1, dropped, 0.2, 0.1], [0.5, nowhere, 0.3, 0.2]),
        ([0, 1, dropped, dropped], [0.4, 0.6, np.nan, -1]),
        ([1, 2, 3, 4], [nowhere, 0.5, 0.25, 0.25]),
        ([dropped] * 4, [0.1] * 4),
    ]
    x, y = (np.array(each) for each in zip(*kinds, strict=True))
    kept = np.isfinite(x)
    if log_space:
        y = np.log(y, where=kept & (y > 0), out=y)
    x, y = (np.tile(each, (10_000, 1)) for each in (x, y))
    tau = np.full((len(x), 1), 0.7)

    def ours(*arrays):
        return concrete_log_prob(*arrays, log_space=log_space)

    @jax.jit
    def results(*arrays):
        out, pull = jax.vjp(ours, *arrays)
        curved = jax.grad(
            lambda *arrays: sum(
                jnp.sum(slope)
                for slope in jax.vjp(ours, *arrays)[1](jnp.ones_like(out))
            ),
            (0, 1, 2),
        )
        return out, pull(jnp.ones_like(out)), curved(*arrays)

    out, slopes, curved = jax.device_get(results(y, x, tau))
    for each in (out, *slopes, *curved):
        tiles = each.reshape(-1, 5, *each.shape[1:])
        np.testing.assert_array_equal(tiles, np.broadcast_to(tiles[:1], tiles.shape))
    for row in (0, 1, 2):
        own = kept[row]
        alone = concrete_log_prob(y[row, own], x[row, own], 0.7, log_space=log_space)
        np.testing.assert_allclose(out[row], alone, rtol=1e-12)
    assert np.isnan(out[3]) and out[4] == 0
    for each in slopes:
        assert np.isfinite(each[:5]).all() and (each[3:5] == 0).all()
    for each in slopes[:2]:
        assert (each[:5][~kept] == 0).all()
    assert all(np.isfinite(each).all() for each in curved)


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
