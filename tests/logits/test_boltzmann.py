"""Boltzmann policies, their operator and the soft argmax, against float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsoft
from tests import truth

WHERE = np.array([True, False, True, True, True, True, False])
TAUS = np.array([[0.3], [1.0], [40.0]], "float32")


def _operator(x, temperature, where=None):
    p = truth.softmax(x, temperature, where)
    x = np.asarray(x, np.float64)
    return (p * np.where(p == 0, 0, x)).sum(-1)


def _position(x, temperature, positions, where=None):
    return truth.softmax(x, temperature, where) @ np.asarray(positions, np.float64)


@pytest.mark.parametrize("where", [None, WHERE])
@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
def test_values_match_float64(kind, where):
    x = truth.logits(kind, (3, 7))
    positions = np.random.default_rng(1).standard_normal((7, 2)).astype("float32")
    policy = jaxsoft.boltzmann_policy(x, TAUS, where=where)
    operator = jaxsoft.boltzmann_operator(x, TAUS, where=where)
    assert truth.error(policy, truth.softmax(x, TAUS, where)) < 3e-6
    assert truth.error(operator, _operator(x, TAUS, where)) < 1e-6
    assert operator.dtype == np.float32
    index = jaxsoft.soft_argmax(x, TAUS, where=where)
    assert truth.error(index, _position(x, TAUS, np.arange(7), where)) < 1e-6
    place = jaxsoft.soft_argmax(x, TAUS, where=where, positions=positions)
    assert truth.error(place, _position(x, TAUS, positions, where)) < 3e-6
    assert place.shape == (3, 2)


def test_common_offsets_cost_nothing():
    # Multiples of 1/2 stay exact at this offset.
    x = np.round(truth.logits("unit", (4, 33)) * 4) / 2
    offset = np.float32(2**22)
    moved = jaxsoft.boltzmann_operator(x + offset, 0.7)
    plain = jaxsoft.boltzmann_operator(x, 0.7)
    assert np.abs(np.asarray(moved - offset) - plain).max() <= 0.25
    grad = jax.jit(jax.grad(lambda x: jaxsoft.boltzmann_operator(x, 0.7).sum()))
    np.testing.assert_array_equal(grad(x), grad(x + offset))
    positions = np.arange(33, dtype="float32")
    moved = jaxsoft.soft_argmax(x, 0.7, positions=positions + offset)
    assert np.abs(np.asarray(moved - offset) - jaxsoft.soft_argmax(x, 0.7)).max() < 0.3


@pytest.mark.parametrize("traced", [False, True])
def test_limits_of_the_temperature(traced):
    x = np.array([[3.0, 3.0, -2.0, -np.inf], [1.0, 5.0, 0.0, 2.0]], "float32")
    run = jax.jit if traced else lambda function: function
    for tau, mean, place in (
        (0.0, [3, 5], [0.5, 1]),
        (1e-40, [3, 5], [0.5, 1]),
        (np.inf, [4 / 3, 2], [1, 1.5]),
    ):
        tau = np.float32(tau)
        np.testing.assert_allclose(
            run(jaxsoft.boltzmann_operator)(x, tau), mean, rtol=1e-6
        )
        np.testing.assert_allclose(run(jaxsoft.soft_argmax)(x, tau), place, rtol=1e-6)
    greedy = run(jaxsoft.boltzmann_policy)(x, np.float32(0))
    np.testing.assert_array_equal(greedy, [[0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    uniform = run(jaxsoft.boltzmann_policy)(x, np.float32(np.inf))
    np.testing.assert_allclose(uniform, [[1 / 3, 1 / 3, 1 / 3, 0], [0.25] * 4])
    if traced:
        bad = [
            run(function)(x, np.float32(-1))
            for function in (jaxsoft.boltzmann_operator, jaxsoft.soft_argmax)
        ]
        assert np.isnan(bad).all()


def test_policies_keep_the_order_of_values():
    x = np.sort(truth.logits("range", (1, 1000)), axis=-1)
    taus = np.asarray([[1e-3], [0.3], [1.0], [7.0], [1e4], [1e8]], "float32")
    policies = jaxsoft.boltzmann_policy(np.broadcast_to(x, (6, 1000)), taus)
    assert (np.diff(policies) >= 0).all()
    np.testing.assert_allclose(np.sum(policies, -1), 1, rtol=1e-5)


def test_rows_without_actions_are_zero_and_have_no_gradient():
    x = np.asarray([[-np.inf, -np.inf], [np.nan, 7.0], [1.0, 2.0]], "float32")
    where = np.array([[True, True], [False, False], [True, True]])

    def total(x, tau):
        policy = jaxsoft.boltzmann_policy(x, tau, where=where)
        operator = jaxsoft.boltzmann_operator(x, tau, where=where)
        positions = jnp.asarray([5.0, 6.0])
        place = jaxsoft.soft_argmax(x, tau, where=where, positions=positions)
        return (policy[:, 0] + operator + place).sum(), (policy, operator, place)

    step = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    grads, parts = step(x, np.full((3, 1), 0.5, "float32"))
    for part in parts:
        assert (np.asarray(part)[:2] == 0).all() and (np.asarray(part)[2] > 0).all()
    for grad in grads:
        assert (np.asarray(grad)[:2] == 0).all() and (np.asarray(grad)[2] != 0).all()


def test_operator_of_extreme_values():
    sizes, taus = (1.0, 1e20, 3e38), (0.0, 1.2e-38, 1e-3, 1.0, 1e10, 3e38, np.inf)
    base = np.array([1.0, 0.9, -1.0, 0.0, -1.0], "float32")
    pairs = list(itertools.product(sizes, taus))
    x = np.stack([base * np.float32(size) for size, _ in pairs])
    tau = np.array([[tau] for _, tau in pairs], "float32")
    exact = np.stack(
        [
            _operator(row, t) if t else row.max()
            for row, t in zip(x, tau[:, 0].astype(float), strict=True)
        ]
    )
    out = np.asarray(jax.jit(jaxsoft.boltzmann_operator)(x, tau))
    size = np.abs(x).max(-1)
    assert (np.abs(out.astype(float) / size - exact / size) < 1e-6).all()
    assert (out <= x.max(-1)).all()
    grad = jax.grad(lambda x, t: jaxsoft.boltzmann_operator(x, t).sum(), (0, 1))
    assert all(np.isfinite(g).all() for g in jax.jit(grad)(x, tau))


def test_gradients_match_the_formulas():
    x, tau = truth.logits("peaked", (3, 7)), TAUS

    def operator(x, tau):
        return jaxsoft.boltzmann_operator(x, tau, where=WHERE).sum()

    gradients = jax.jit(jax.grad(operator, (0, 1)))
    by_x, by_tau = gradients(x, tau)
    p, c = truth.softmax(x, tau, WHERE), truth.centred(x, tau)
    mean = (p * c).sum(-1, keepdims=True)
    assert truth.error(by_x, p * (1 + c - mean)) < 1e-6
    assert truth.error(by_tau, -(p * (c - mean) ** 2).sum(-1, keepdims=True)) < 2e-6
    assert (np.asarray(by_x)[:, ~WHERE] == 0).all()
    at_zero = gradients(np.array([[2.0, 9, 2, 1, 1, 1, 9]], "f"), 0.0)
    np.testing.assert_array_equal(at_zero[0], [[0.5, 0, 0.5, 0, 0, 0, 0]])
    assert at_zero[1] == 0


def test_both_modes_and_second_order(x64):
    x = np.asarray(truth.logits("unit", (3, 5)), "float64")
    tau = np.asarray([[0.6], [1.0], [2.5]])
    positions = np.asarray(truth.logits("unit", (5, 2), seed=3), "float64")
    where = np.array([True, True, False, True, True])

    @jax.jit
    def both(x, tau, positions):
        operator = jaxsoft.boltzmann_operator(x, tau, where=where)
        place = jaxsoft.soft_argmax(x, tau, where=where, positions=positions)
        return operator, place

    def total(x, tau, positions):
        return sum(jnp.sum(out**2) for out in both(x, tau, positions))

    args = (x, tau, positions)
    check_grads(both, args, 1, modes=["fwd", "rev"])
    check_grads(jax.jit(jax.grad(total, (0, 1))), args, 1, modes=["fwd"])


def test_axes_batches_and_dtypes():
    x = jnp.asarray(truth.logits("unit", (2, 7, 3)), jnp.bfloat16)
    positions = jnp.asarray(truth.logits("unit", (7, 4), seed=2))
    tau = jnp.asarray([[[0.5]], [[2.0]]])
    last = jnp.moveaxis(x, 1, -1)
    policy = jaxsoft.boltzmann_policy(x, tau, axis=1)
    assert policy.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        policy, jnp.moveaxis(jaxsoft.boltzmann_policy(last, tau), -1, 1)
    )
    operator = jaxsoft.boltzmann_operator(x, tau, axis=1)
    place = jaxsoft.soft_argmax(x, tau, axis=1, positions=positions)
    assert operator.dtype == place.dtype == jnp.float32
    assert place.shape == (2, 3, 4)
    mapped = jax.vmap(lambda x, t: jaxsoft.boltzmann_operator(x, t, axis=0))(x, tau)
    np.testing.assert_allclose(operator, mapped, rtol=1e-6)
    values = np.asarray(last.astype("float32"))
    assert truth.error(place, _position(values, tau, positions)) < 1e-6


X = np.zeros((2, 3), "float32")
CALLS = [
    ("boltzmann_policy", (X.astype(int), 1.0), {}, TypeError, "`values` must have a f"),
    ("boltzmann_policy", (X, -1.0), {}, ValueError, "not be negative or NaN, got -1"),
    ("boltzmann_policy", (X, 1.0), {"axis": 2}, ValueError, "2 axes of `values`, got"),
    ("boltzmann_policy", (X, np.ones(3, "f")), {}, ValueError, "class axis must have"),
    ("boltzmann_operator", (X.astype(int), 1.0), {}, TypeError, "`values` must have"),
    ("boltzmann_operator", (X[:, :0], 1.0), {}, ValueError, "`values` must have at l"),
    ("boltzmann_operator", (X, 1.0), {"where": X}, TypeError, "`where` must have dty"),
    ("boltzmann_operator", (X, "a"), {}, TypeError, "`temperature` must be a real n"),
    ("soft_argmax", (X.astype(int), 1.0), {}, TypeError, "`logits` must have a float"),
    (
        "soft_argmax",
        (X, 1.0),
        {"positions": np.arange(3)},
        TypeError,
        "`positions` must have a floating",
    ),
    (
        "soft_argmax",
        (X, 1.0),
        {"positions": X},
        ValueError,
        r"`positions` must have shape \(V,\) or \(V, D\) with V = 3, got \(2, 3\)",
    ),
]


@pytest.mark.parametrize("name, args, options, kind, message", CALLS)
def test_messages(name, args, options, kind, message):
    with pytest.raises(kind, match=message):
        getattr(jaxsoft, name)(*args, **options)
