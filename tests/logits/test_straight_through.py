"""Gradient estimators against enumeration: four variables of three categories."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxsoft import gumbel_rao, gumbel_softmax, reinmax, sample, softmax
from tests import truth
from tests.statistics import chi_square

KEY = jax.random.key(11)
VARIABLES, CATEGORIES, DRAWS = 4, 3, 60_000
ESTIMATORS = {
    "reinmax": reinmax,
    "straight_through": lambda key, x, tau: gumbel_softmax(key, x, tau, hard=True),
    "rao": lambda key, x, tau: gumbel_rao(key, x, tau, num_samples=4),
}


def objective(kind):
    """Returns a function of one-hot values [..., 4, 3]."""
    rng = np.random.default_rng(3)
    size = VARIABLES * CATEGORIES
    first = jnp.asarray(rng.standard_normal((size, 8)), "float64")
    second = jnp.asarray(rng.standard_normal(8), "float64")
    square = jnp.asarray(rng.standard_normal((size, size)) / 3, "float64")
    weights = jnp.asarray(rng.standard_normal(size), "float64")

    def of(values):
        flat = values.reshape(*values.shape[:-2], size)
        if kind == "linear":
            return flat @ weights
        if kind == "quadratic":
            return flat @ weights + ((flat @ square) * flat).sum(-1)
        return jnp.tanh(flat @ first) @ second

    return of


def logits():
    return jnp.asarray(truth.logits("unit", (VARIABLES, CATEGORIES), 1), "float64")


def exact_gradient(kind):
    """The gradient of the mean over all 81 outcomes."""
    outcomes = np.array(list(itertools.product(range(CATEGORIES), repeat=VARIABLES)))
    values = objective(kind)(jax.nn.one_hot(outcomes, CATEGORIES, dtype="float64"))

    def mean(x):
        log_p = jax.nn.log_softmax(x)
        return jnp.exp(log_p[np.arange(VARIABLES), outcomes].sum(-1)) @ values

    return jax.grad(mean)(logits())


def gradients(function, kind, tau):
    """Returns the gradient of each of many draws, and of the temperature in all."""

    def total(x, tau):
        return objective(kind)(function(KEY, x, tau)).sum()

    many = jnp.broadcast_to(logits(), (DRAWS, VARIABLES, CATEGORIES))
    return jax.jit(jax.grad(total, (0, 1)))(many, jnp.asarray(tau, "float64"))


def assert_means_agree(draws, mean, others=0.0):
    """Requires a mean within five standard errors of another, or of the truth."""
    error = np.sqrt((draws.var(0) + others) / len(draws))
    assert (np.abs(draws.mean(0) - mean) < 5 * error + 1e-12).all()


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_reinmax_is_unbiased_to_second_order(kind, x64):
    draws, _ = gradients(reinmax, kind, 1.0)
    assert_means_agree(np.asarray(draws), exact_gradient(kind))


def test_straight_through_is_not_unbiased_beyond_first_order(x64):
    """D + softmax(x) - stop(softmax(x)): exact for linear functions and no others."""

    def plain(key, x, tau):
        del tau
        drawn = jax.nn.one_hot(sample(key, x), CATEGORIES, dtype=x.dtype)
        p = softmax(x)
        return drawn + p - jax.lax.stop_gradient(p)

    biases = {}
    for kind in ("linear", "quadratic", "mlp"):
        draws = np.asarray(gradients(plain, kind, 1.0)[0])
        error = 5 * draws.std(0) / np.sqrt(DRAWS) + 1e-12
        gap = np.abs(draws.mean(0) - exact_gradient(kind))
        biases[kind] = gap.max(), (gap > error).any()
    assert not biases["linear"][1] and biases["quadratic"][1] and biases["mlp"][1]
    better = np.asarray(gradients(reinmax, "mlp", 1.0)[0]).mean(0)
    assert np.abs(better - exact_gradient("mlp")).max() < biases["mlp"][0]


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["quadratic", "mlp"])
@pytest.mark.many_cases
def test_gumbel_rao_has_the_mean_of_straight_through_and_less_variance(kind, tau, x64):
    plain, plain_tau = gradients(ESTIMATORS["straight_through"], kind, tau)
    plain = np.asarray(plain)
    spread = []
    for count in (1, 16):
        draws, rao_tau = gradients(
            lambda key, x, tau, count=count: gumbel_rao(key, x, tau, num_samples=count),
            kind,
            tau,
        )
        draws = np.asarray(draws)
        assert_means_agree(draws, plain.mean(0), plain.var(0))
        spread.append(draws.var(0).sum())
        scale = np.abs(plain).mean() * 12 * np.sqrt(DRAWS) / tau
        assert abs(rao_tau - plain_tau) < 5 * scale
    assert spread[1] < 0.9 * spread[0]
    # One conditional draw is as good as one that is not.
    assert 0.95 < spread[0] / plain.var(0).sum() < 1.05


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.many_cases
def test_samples_are_one_hot_and_follow_the_logits(name, dtype):
    row = jnp.asarray([0.5, -1.0, 2.0, 0.0, -3.0], dtype)
    many = jnp.broadcast_to(row, (50_000, 5))
    out = jax.jit(lambda x: ESTIMATORS[name](KEY, x, 0.5))(many)
    assert out.dtype == row.dtype
    out = np.asarray(out, np.float32)
    assert set(np.unique(out)) == {0.0, 1.0} and (out.sum(-1) == 1).all()
    p = truth.softmax(np.asarray(row, np.float64))
    assert chi_square(out.argmax(-1), p) > 1e-4


@pytest.mark.parametrize("name", ["reinmax", "rao"])
def test_masks_limits_and_lost_rows(name):
    x = jnp.asarray(truth.logits("unit", (5, 6)))
    x = x.at[2].set(-jnp.inf).at[3, 0].set(jnp.nan)
    where = jnp.asarray([True, True, False, True, True, True])
    function = {"reinmax": reinmax, "rao": gumbel_rao}[name]
    for tau in (0.0, 1e-38, 0.5, jnp.inf):
        y, pull = jax.vjp(
            lambda x, t: function(KEY, x, t, where=where), x, jnp.float32(tau)
        )
        dx, dtau = pull(jnp.cos(jnp.nan_to_num(x)))
        np.testing.assert_array_equal(y.sum(-1), [1, 1, 0, 0, 1])
        assert not np.asarray(y)[:, 2].any() and np.isfinite(dtau)
        assert np.isfinite(dx).all() and not np.asarray(dx)[2:4].any()
        assert not np.asarray(dx)[:, 2].any()
        if name == "rao" and tau != 0.5:
            assert not np.asarray(dx).any() and dtau == 0
    moved = function(KEY, x.T, 0.5, axis=0, where=where[:, None])
    np.testing.assert_array_equal(moved.T, y)


@pytest.mark.usefixtures("optimized")
def test_memory_of_gumbel_rao_does_not_grow_with_its_samples():
    x = jnp.zeros((64, 2048))

    def temporaries(count):
        def loss(x):
            return (gumbel_rao(KEY, x, 0.5, num_samples=count) * jnp.cos(x)).sum()

        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    few, many = temporaries(2), temporaries(16)
    assert many < few + x.nbytes / 4


def test_export_and_vmap():
    x = jnp.asarray(truth.logits("unit", (2, 3, 6)))

    @jax.jit
    def both(key, x):
        def loss(x):
            return (gumbel_rao(key, x, 0.5) * reinmax(key, x) * jnp.cos(x)).sum()

        return jax.grad(loss)(x)

    text = export.export(both)(KEY, x[0]).serialize()
    found = export.deserialize(text).call(KEY, x[0])
    np.testing.assert_array_equal(found, both(KEY, x[0]))
    keys = jax.random.split(KEY, 2)
    mapped = jax.jit(jax.vmap(both))(keys, x)
    for key, each, found in zip(keys, x, mapped, strict=True):
        np.testing.assert_allclose(found, both(key, each), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "function, options, error, message",
    [
        (gumbel_rao, {"num_samples": 0}, ValueError, "`num_samples` must be at least"),
        (gumbel_rao, {"num_samples": 1.0}, TypeError, "`num_samples` must be an int"),
        (gumbel_rao, {"generator": "mt"}, ValueError, "`generator` must be one of"),
        (reinmax, {"temperature": -1.0}, ValueError, "`temperature` must not be neg"),
        (reinmax, {"where": jnp.ones(3)}, TypeError, "`where` must have dtype bool"),
    ],
)
def test_errors(function, options, error, message):
    with pytest.raises(error, match=message):
        function(KEY, jnp.zeros(3), **options)
