"""The fitted temperature against bisection in float64, and calibration error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.logits.calibration import calibration_bins
from tests import truth

BAD: Any = 3
ROWS, CLASSES = 5000, 100
RNG = np.random.default_rng(0)
# Exactly representable in float32, as are their multiples by 3 and 20.
LOGITS = np.round(1.5 * RNG.standard_normal((ROWS, CLASSES)) * 2**12) / 2**12
LABELS = (LOGITS + RNG.gumbel(size=LOGITS.shape)).argmax(1)


def pick(x, labels):
    return np.take_along_axis(x, labels[:, None], 1)[:, 0]


def slope(x, labels, tau, weights, where=None):
    """The derivative of the mean NLL by log τ."""
    c, p = truth.centred(x, tau, where), truth.softmax(x, tau, where)
    expected = (p * np.where(p == 0, 0, c)).sum(1)
    return np.average(pick(c, labels) - expected, weights=weights)


def bisection(x, labels, weights=None, where=None, low=0.01, high=100.0):
    low, high = np.log(low), np.log(high)
    for _ in range(44):
        middle = (low + high) / 2
        if slope(x, labels, np.exp(middle), weights, where) < 0:
            low = middle
        else:
            high = middle
    return np.exp(middle)


def nll(x, labels, tau, weights=None, where=None):
    each = -pick(truth.log_softmax(x, tau, where), labels)
    return np.average(each, weights=weights)


@pytest.fixture(scope="module")
def best():
    """The temperature of LOGITS, to the last digit of float64."""
    return bisection(LOGITS, LABELS)


@pytest.mark.parametrize("scale", [0.2, 3.0, 20.0])
def test_equals_bisection_in_float32(scale, best):
    """5,000 rows of 100 classes; the scale is the temperature, but for sampling."""
    logits = (LOGITS * scale).astype("float32")
    fit = jaxsoft.fit_temperature(logits, LABELS)
    assert fit.temperature.dtype == fit.nll.dtype == jnp.float32
    assert abs(float(fit.temperature) / (best * scale) - 1) < 1e-6
    assert abs(best - 1) < 0.05
    assert fit.at_bound == 0 and fit.at_bound.dtype == jnp.int32
    np.testing.assert_allclose(fit.nll, nll(LOGITS, LABELS, best), rtol=1e-6)
    assert fit.nll <= jaxsoft.softmax_cross_entropy(logits, LABELS).mean()


def test_float64_and_offsets(x64, best):
    """float64 to 1e-12; a common offset of 1e6 changes nothing at all."""
    fit = jaxsoft.fit_temperature(LOGITS * 3, LABELS)
    assert fit.temperature.dtype == jnp.float64
    assert abs(float(fit.temperature) / (best * 3) - 1) < 1e-12
    coarse = (np.round(LOGITS * 8) / 4).astype("float32")
    for offset in (1e6, -1e6):
        moved = (coarse + np.float32(offset)).astype("float32")
        assert (moved - np.float32(offset) == coarse).all()
        with_offset = jaxsoft.fit_temperature(moved, LABELS)
        without = jaxsoft.fit_temperature(coarse, LABELS)
        assert with_offset == without


def test_never_worse_than_one():
    """Whatever the rows say, also where the minimum is next to 1."""
    fit = jax.jit(jax.vmap(jaxsoft.fit_temperature))
    x = (LOGITS[:800] * 1.02).reshape(40, 20, CLASSES).astype("float32")
    labels = LABELS[:800].reshape(40, 20)
    fits = fit(x, labels)
    assert fits.temperature.shape == (40,) and np.ptp(fits.temperature) > 0.1
    for group in range(40):
        tau = float(fits.temperature[group])
        ours = nll(x[group], labels[group], tau)
        assert ours <= nll(x[group], labels[group], 1.0)
        np.testing.assert_allclose(fits.nll[group], ours, rtol=1e-6)
        true = bisection(x[group], labels[group])
        assert abs(tau / true - 1) < 3e-6


def test_weights_masks_and_leading_axes():
    """Rows of weight 0 count nothing, whatever they hold; booleans weigh too."""
    x, labels = (LOGITS[:60] * 2).astype("float32"), LABELS[:60].copy()
    where = RNG.uniform(size=x.shape) < 0.7
    where[np.arange(60), labels] = True
    weights = RNG.uniform(0.5, 2, 60).astype("float32")
    weights[:20] = 0
    true = bisection(x[20:], labels[20:], weights[20:], where[20:])
    labels[:10], x[10:20] = -100, np.nan
    shaped = (3, 20, -1)
    fit = jaxsoft.fit_temperature(
        x.reshape(shaped),
        labels.reshape(3, 20),
        where=where.reshape(shaped),
        weights=weights.reshape(3, 20),
    )
    assert abs(float(fit.temperature) / true - 1) < 3e-6
    expected = nll(x[20:], labels[20:], true, weights[20:], where[20:])
    np.testing.assert_allclose(fit.nll, expected, rtol=1e-6)
    kept = jaxsoft.fit_temperature(x[20:], labels[20:])
    boolean = jaxsoft.fit_temperature(x, labels, weights=weights > 0)
    np.testing.assert_allclose(boolean, kept, rtol=1e-6)


SMALL = LOGITS[:40, :5].astype("float32")
FIRST = np.zeros(40, int)
BOUNDS = [
    # The label is the largest logit of its row: the colder, the better.
    ("separable", SMALL, SMALL.argmax(1), -1, 0.0),
    ("certain", SMALL * np.float32(1e9), SMALL.argmax(1), -1, 0.0),
    # Each row once with every label: no temperature is as good as none.
    ("chance", np.repeat(SMALL[:8], 5, 0), np.tile(np.arange(5), 8), 1, np.log(5)),
    ("worst", SMALL, SMALL.argmin(1), 1, np.log(5)),
    ("worst, huge", np.float32(1e36) * SMALL, SMALL.argmin(1), 1, None),
]


@pytest.mark.parametrize(
    "name, x, labels, side, loss", BOUNDS, ids=lambda a: str(a)[:9]
)
@pytest.mark.parametrize("bounds", [(0.01, 100.0), (0.5, 2.0), (2.0, 3.0)])
def test_bounds(name, x, labels, side, loss, bounds):
    fit = jaxsoft.fit_temperature(x, labels, bounds=bounds)
    assert fit.at_bound == side
    assert fit.temperature == np.float32(bounds[0 if side < 0 else 1])
    if bounds[1] == 100 and loss is not None:
        assert abs(float(fit.nll) - loss) < 0.03
    with np.errstate(over="ignore"):
        expected = nll(x, labels, float(fit.temperature))
    np.testing.assert_allclose(fit.nll, expected, rtol=1e-5, atol=1e-7)


def test_a_minimum_outside_the_bounds(best):
    x = (LOGITS[:1000] * 3).astype("float32")
    for bounds, side in (((0.01, 2.0), 1), ((4.0, 100.0), -1), ((2.0, 4.0), 0)):
        fit = jaxsoft.fit_temperature(x, LABELS[:1000], bounds=bounds)
        assert fit.at_bound == side, bounds
    true = bisection(x, LABELS[:1000])
    assert abs(float(fit.temperature) / true - 1) < 1e-6


NAN, INF = float("nan"), float("inf")
EDGES = [
    ("no weight", SMALL, FIRST - 1, {"weights": np.zeros(40, bool)}, 1, 0),
    ("no weight outside 1", SMALL, FIRST, {"weights": FIRST * 0.0}, 1, 0),
    ("all alike", SMALL * 0, FIRST, {}, 1, np.log(5)),
    ("one class", SMALL[:, :1], FIRST, {}, 1, 0),
    ("no class", SMALL, FIRST, {"where": np.zeros((1, 5), bool)}, 1, 0),
    ("no rows", SMALL[:0], FIRST[:0], {}, 1, 0),
    ("label -1", SMALL, np.where(np.arange(40) == 7, -1, 0), {}, NAN, NAN),
    ("label V", SMALL, np.where(np.arange(40) == 7, 5, 0), {}, NAN, NAN),
    ("label dropped", SMALL, FIRST, {"where": np.arange(5)[None] > 0}, NAN, INF),
    ("NaN logit", np.where(SMALL == SMALL[3, 2], NAN, SMALL), FIRST, {}, NAN, NAN),
    ("negative weight", SMALL, FIRST, {"weights": np.arange(40.0) - 1}, NAN, NAN),
]


@pytest.mark.parametrize("name, x, labels, options, tau, loss", EDGES)
def test_edges(name, x, labels, options, tau, loss):
    if "weights" in options and options["weights"].dtype == np.float64:
        options = {"weights": options["weights"].astype("float32")}
    fit = jaxsoft.fit_temperature(x.astype("float32"), labels, **options)
    np.testing.assert_allclose(fit, (tau, loss, 0), rtol=1e-6)


def test_minus_infinity_in_the_logits_is_a_dropped_class():
    x, labels = np.array(SMALL * 2), LABELS[:40] % 5
    where = RNG.uniform(size=x.shape) < 0.6
    where[np.arange(40), labels] = True
    dropped = jaxsoft.fit_temperature(np.where(where, x, -np.inf), labels)
    masked = jaxsoft.fit_temperature(x, labels, where=where)
    assert dropped == masked and np.isfinite(dropped.temperature)


def test_no_gradient_and_a_round_trip():
    def loss(x):
        fit = jaxsoft.fit_temperature(x, FIRST)
        return fit.temperature + x.sum()

    x = jnp.asarray(SMALL)
    np.testing.assert_array_equal(jax.grad(loss)(x), jnp.ones_like(x))
    fit = jax.export.export(jax.jit(jaxsoft.fit_temperature))(x, FIRST)
    again = jax.export.deserialize(fit.serialize()).call(x, FIRST)
    assert again == jaxsoft.fit_temperature(x, FIRST)


def error(probabilities, labels, bins, weights=None):
    """Top-label calibration error by its definition, bin by bin, over float32 edges."""
    confidence, best = probabilities.max(-1), probabilities.argmax(-1)
    weights = np.ones(len(labels)) if weights is None else weights.astype("float64")
    edges = [np.float32(k) / np.float32(bins) for k in range(bins + 1)]
    result = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if weights[inside].sum() == 0:
            continue
        accuracy = np.average(best[inside] == labels[inside], weights=weights[inside])
        mean = np.average(confidence[inside].astype("float64"), weights=weights[inside])
        result += weights[inside].sum() / weights.sum() * abs(accuracy - mean)
    return result


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_is_its_definition(bins):
    p = truth.softmax(LOGITS[:700, :6] * 2).astype("float32")
    labels = LABELS[:700] % 6
    weights = RNG.uniform(size=700).astype("float32")
    assert error(p, labels, bins) > 0.05
    ours = jaxsoft.expected_calibration_error(p, labels, bins)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, error(p, labels, bins), rtol=1e-5)
    # A row of weight 0 counts nothing, whatever it holds.
    weights[:9], p[:3], labels[3:6] = 0, np.nan, -100
    ours = jaxsoft.expected_calibration_error(
        p.reshape(7, 100, 6),
        labels.reshape(7, 100),
        bins,
        weights=weights.reshape(7, 100),
    )
    expected = error(p[9:], labels[9:], bins, weights[9:])
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("bins", [1, 3, 15])
def test_confidences_on_the_edges_belong_to_the_lower_bin(bins):
    """Also 0, which no bin (low, high] holds and the first takes, and 1."""
    grid = (np.arange(bins + 1, dtype="float32") / np.float32(bins))[:, None]
    labels = np.arange(bins + 1) % 2
    sums = calibration_bins(np.concatenate([grid, grid * 0], 1), labels, bins)
    np.testing.assert_array_equal(sums.weight, [2] + [1] * (bins - 1))
    np.testing.assert_allclose(sums.confidence, grid[1:, 0], rtol=1e-6)
    above = np.nextafter(grid[:-1], np.float32(2))
    sums = calibration_bins(above, labels[:-1] * 0, bins)
    np.testing.assert_array_equal(sums.weight, [1] * bins)
    np.testing.assert_array_equal(sums.correct, [1] * bins)


def test_calibration_error_at_its_ends():
    ece = jaxsoft.expected_calibration_error
    certain = np.eye(4, dtype="float32")
    assert ece(certain, np.arange(4)) == 0
    assert ece(certain, np.array([1, 2, 3, 0])) == 1
    assert ece(certain, np.arange(4), weights=np.zeros(4, bool)) == 0
    assert ece(certain[:0], np.arange(0)) == 0
    assert np.isnan(ece(certain, np.array([0, 1, 2, 4])))
    assert np.isnan(ece(certain, np.array([0, -1, 2, 3])))
    assert np.isnan(ece(certain * np.float32(NAN), np.arange(4)))
    half = ece(jnp.asarray(certain * 0.5, "bfloat16"), np.arange(4))
    assert half == 0.5 and half.dtype == jnp.float32


X, Y = SMALL[:2], FIRST[:2]
FIT, ECE = jaxsoft.fit_temperature, jaxsoft.expected_calibration_error
CALLS = [
    (FIT, (Y, Y), {}, TypeError, "`logits` must have a floating"),
    (FIT, (X, X), {}, TypeError, "`labels` must have an integer"),
    (FIT, (X, Y[:1]), {}, ValueError, r"`labels` must have shape logits.shape\[:-1\]"),
    (FIT, (X, Y), {"weights": Y}, TypeError, "`weights` must have a floating"),
    (FIT, (X, Y), {"weights": X}, ValueError, r"`weights` must have shape logits.sh"),
    (FIT, (X, Y), {"where": Y}, TypeError, "`where` must have dtype bool"),
    (FIT, (X[:, :0], Y), {}, ValueError, "must have at least one class"),
    (FIT, (X, Y), {"bounds": BAD}, TypeError, "`bounds` must be a pair of numbers"),
    (FIT, (X, Y), {"bounds": (2, 1)}, ValueError, "`bounds` must increase, got"),
    (
        FIT,
        (X, Y),
        {"bounds": (0, 1)},
        ValueError,
        r"`bounds` must lie in \[1e-30, 1e\+",
    ),
    (FIT, (X, Y), {"bounds": (1, "2")}, TypeError, "`bounds` must be a Python number"),
    (ECE, (Y, Y), {}, TypeError, "`probabilities` must have a floating"),
    (ECE, (X, X), {}, TypeError, "`labels` must have an integer"),
    (ECE, (X, Y[:1]), {}, ValueError, "`labels` must have shape probabilities.shape"),
    (ECE, (X[:, :0], Y), {}, ValueError, "`probabilities` must have at least one"),
    (ECE, (X, Y, 0), {}, ValueError, "`num_bins` must be at least 1, got 0"),
    (ECE, (X, Y, 1.5), {}, TypeError, "`num_bins` must be an int, got 1.5"),
    (ECE, (X, Y), {"weights": X}, ValueError, "`weights` must have shape probabil"),
]


@pytest.mark.parametrize("function, args, options, kind, message", CALLS)
def test_messages(function, args, options, kind, message):
    with pytest.raises(kind, match=message):
        function(*args, **options)


@pytest.mark.parametrize(
    "row", [[2.0, -1.0], [1.5, 0.0], [0.6, 0.6]], ids=["negative", "above 1", "sum"]
)
def test_calibration_error_of_no_probabilities(row):
    """Logits are refused where they are known; a row without weight may hold any."""
    rows, labels = jnp.array([[0.5, 0.5], row]), jnp.array([0, 1])
    with pytest.raises(ValueError, match="`probabilities` must lie in"):
        jaxsoft.expected_calibration_error(rows, labels)
    found = jaxsoft.expected_calibration_error(
        rows, labels, weights=jnp.array([1.0, 0.0])
    )
    np.testing.assert_allclose(found, 0.5)
