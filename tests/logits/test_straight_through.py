"""Gradient estimators against enumeration: four variables of three categories."""

import functools
import itertools
from typing import Any, NamedTuple

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
KINDS = ("linear", "quadratic", "mlp")
LOGITS = np.asarray(truth.logits("unit", (VARIABLES, CATEGORIES), 1), "float64")


def objective(kind):
    """Returns a function of one-hot values [..., 4, 3]."""
    rng = np.random.default_rng(3)
    size = VARIABLES * CATEGORIES
    first = rng.standard_normal((size, 8))
    second = rng.standard_normal(8)
    square = rng.standard_normal((size, size)) / 3
    weights = rng.standard_normal(size)

    def of(values):
        flat = values.reshape(*values.shape[:-2], size)
        if kind == "linear":
            return flat @ weights
        if kind == "quadratic":
            return flat @ weights + ((flat @ square) * flat).sum(-1)
        return jnp.tanh(flat @ first) @ second

    return of


def exact_gradient(kind):
    """The gradient of the mean over all 81 outcomes."""
    outcomes = np.array(list(itertools.product(range(CATEGORIES), repeat=VARIABLES)))
    values = objective(kind)(np.eye(CATEGORIES)[outcomes])

    @jax.jit
    @jax.grad
    def gradient(x):
        log_p = jax.nn.log_softmax(x)
        return jnp.exp(log_p[np.arange(VARIABLES), outcomes].sum(-1)) @ values

    return gradient(LOGITS)


@functools.cache
def gradients_of(function, kinds):
    """Compiles the gradients of objectives, in many draws of one estimator."""

    @jax.jit
    def gradients(x, tau):
        many = jnp.broadcast_to(x, (DRAWS, VARIABLES, CATEGORIES))
        values, pull = jax.vjp(lambda x, tau: function(KEY, x, tau), many, tau)

        def by(kind):
            return pull(jax.grad(lambda values: objective(kind)(values).sum())(values))

        return {kind: by(kind) for kind in kinds}

    return gradients


class Gradients(NamedTuple):
    """What many draws of a gradient amount to.

    Attributes:
      mean: [4, 3].
      variance: [4, 3].
      size: the mean of the absolute values.
      by_tau: the gradient of the temperature in all draws together.
    """

    mean: np.ndarray
    variance: np.ndarray
    size: float
    by_tau: float


@functools.cache
def gradients(function, tau, kinds=KINDS):
    """Returns the gradients of objectives, by their kinds."""
    draws = gradients_of(function, kinds)(LOGITS, np.float64(tau))

    def summary(by_x, by_tau):
        by_x = np.asarray(by_x)
        return Gradients(by_x.mean(0), by_x.var(0), np.abs(by_x).mean(), float(by_tau))

    return {kind: summary(*of_kind) for kind, of_kind in draws.items()}


def assert_means_agree(draws, mean, others: Any = 0.0):
    """Requires a mean within five standard errors of another, or of the truth."""
    error = np.sqrt((draws.variance + others) / DRAWS)
    assert (np.abs(draws.mean - mean) < 5 * error + 1e-12).all()


def plain_straight_through(key, x, tau):
    """D + softmax(x) - stop(softmax(x)): exact for linear functions and no others."""
    del tau
    drawn = jax.nn.one_hot(sample(key, x), CATEGORIES, dtype=x.dtype)
    p = softmax(x)
    return drawn + p - jax.lax.stop_gradient(p)


@functools.cache
def rao(count):
    return functools.partial(gumbel_rao, num_samples=count)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_reinmax_is_unbiased_to_second_order(kind, x64):
    assert_means_agree(gradients(reinmax, 1.0)[kind], exact_gradient(kind))


def test_straight_through_is_not_unbiased_beyond_first_order(x64):
    biases = {}
    for kind, draws in gradients(plain_straight_through, 1.0).items():
        error = 5 * np.sqrt(draws.variance / DRAWS) + 1e-12
        gap = np.abs(draws.mean - exact_gradient(kind))
        biases[kind] = gap.max(), (gap > error).any()
    assert not biases["linear"][1] and biases["quadratic"][1] and biases["mlp"][1]
    better = gradients(reinmax, 1.0)["mlp"].mean
    assert np.abs(better - exact_gradient("mlp")).max() < biases["mlp"][0]


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["quadratic", "mlp"])
def test_gumbel_rao_has_the_mean_of_straight_through_and_less_variance(kind, tau, x64):
    curved = ("quadratic", "mlp")
    plain = gradients(ESTIMATORS["straight_through"], tau, curved)[kind]
    spread = []
    for count in (1, 4):
        draws = gradients(rao(count), tau, curved)[kind]
        assert_means_agree(draws, plain.mean, plain.variance)
        spread.append(draws.variance.sum())
        scale = plain.size * 12 * np.sqrt(DRAWS) / tau
        assert abs(draws.by_tau - plain.by_tau) < 5 * scale
    assert spread[1] < 0.9 * spread[0]
    # One conditional draw is as good as one that is not.
    assert 0.95 < spread[0] / plain.variance.sum() < 1.05


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.many_cases
def test_samples_are_one_hot_and_follow_the_logits(name, dtype):
    row = np.asarray([0.5, -1.0, 2.0, 0.0, -3.0], dtype)
    many = np.broadcast_to(row, (50_000, 5))
    out = jax.jit(lambda x: ESTIMATORS[name](KEY, x, 0.5))(many)
    assert out.dtype == row.dtype
    out = np.asarray(out, np.float32)
    assert set(np.unique(out)) == {0.0, 1.0} and (out.sum(-1) == 1).all()
    p = truth.softmax(np.asarray(row, np.float64))
    assert chi_square(out.argmax(-1), p) > 1e-4


@pytest.mark.parametrize("name", ["reinmax", "rao"])
def test_masks_limits_and_lost_rows(name):
    x = np.array(truth.logits("unit", (5, 6)))
    x[2], x[3, 0] = -np.inf, np.nan
    where = np.asarray([True, True, False, True, True, True])
    function = {"reinmax": reinmax, "rao": gumbel_rao}[name]

    @jax.jit
    def sample_and_gradients(x, tau):
        y, pull = jax.vjp(lambda x, t: function(KEY, x, t, where=where), x, tau)
        return y, *pull(jnp.cos(jnp.nan_to_num(x)))

    for tau in (0.0, 1e-38, 0.5, np.inf):
        y, dx, dtau = map(np.asarray, sample_and_gradients(x, np.float32(tau)))
        np.testing.assert_array_equal(y.sum(-1), [1, 1, 0, 0, 1])
        assert not y[:, 2].any() and np.isfinite(dtau)
        assert np.isfinite(dx).all() and not dx[2:4].any()
        assert not dx[:, 2].any()
        if name == "rao" and tau != 0.5:
            assert not dx.any() and dtau == 0
    moved = function(KEY, x.T, 0.5, axis=0, where=where[:, None])
    np.testing.assert_array_equal(moved.T, y)


@pytest.mark.usefixtures("optimized")
def test_memory_of_gumbel_rao_does_not_grow_with_its_samples():
    x = np.zeros((64, 2048), "float32")

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
    x = truth.logits("unit", (2, 3, 6))

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
        (reinmax, {"where": np.ones(3)}, TypeError, "`where` must have dtype bool"),
    ],
)
def test_errors(function, options, error, message):
    with pytest.raises(error, match=message):
        function(KEY, np.zeros(3, "float32"), **options)
