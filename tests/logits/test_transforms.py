"""Transformations of the logits room: jit, vmap, remat, scan, export, shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests import truth

X = truth.logits("range", (4, 6))
LABELS = np.array([0, 5, 2, 3])
CASES = {
    "softmax": lambda x, tau: jaxsoft.softmax(x, tau),
    "log_softmax": lambda x, tau: jaxsoft.log_softmax(x, tau),
    "logsumexp": lambda x, tau: jaxsoft.logsumexp(x, tau),
    "entropy": lambda x, tau: jaxsoft.entropy(x, tau),
    "cross_entropy": lambda x, tau: jaxsoft.softmax_cross_entropy(
        x, jnp.asarray(LABELS)[: x.shape[0]], tau, label_smoothing=0.1, z_loss=0.1
    ),
    "distillation": lambda x, tau: jaxsoft.distillation_loss(x, x[:, ::-1], tau),
}


@pytest.fixture(params=CASES)
def function(request):
    return CASES[request.param]


def test_eager_equals_jit(function):
    for tau in (1.0, 0.7, jnp.full((4, 1), 1.3)):
        eager = function(X, tau)
        for compiled in (
            jax.jit(lambda x, t=tau: function(x, t))(X),
            jax.jit(function)(X, tau),
        ):
            np.testing.assert_allclose(eager, compiled, rtol=5e-7, atol=1e-30)


def test_vmap_over_logits_and_temperature(function):
    taus = jnp.asarray([0.0, 0.5, 3.0])
    stacked = jnp.stack([function(X, tau) for tau in taus])
    mapped = jax.vmap(lambda tau: function(X, tau))(taus)
    np.testing.assert_allclose(mapped, stacked, rtol=1e-6)
    rows = jax.vmap(lambda x: CASES["entropy"](x[None], 0.5)[0])(X)
    np.testing.assert_allclose(rows, jaxsoft.entropy(X, 0.5), rtol=1e-6)


def test_remat_and_scan_of_gradients(function):
    def total(x):
        out = function(x, jnp.full((4, 1), 0.9))
        weights = jnp.cos(jnp.arange(float(out.size))).reshape(out.shape)
        return (out * weights).sum()

    grad = jax.grad(total)(jnp.asarray(X))
    np.testing.assert_allclose(
        jax.jit(jax.grad(jax.checkpoint(total)))(X), grad, rtol=2e-6, atol=1e-7
    )

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c + total(x), None), 0.0, length=3)[0]

    np.testing.assert_allclose(
        jax.grad(scanned)(jnp.asarray(X)), 3 * grad, rtol=2e-6, atol=1e-6
    )


def test_export_round_trip(function):
    args = (jnp.asarray(X), jnp.full((4, 1), 0.9))
    exported = jax.export.export(jax.jit(function))(*args)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(*args), jax.jit(function)(*args))


@pytest.mark.many_cases
def test_inside_shard_map(function):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(P("rows"), P("rows")), out_specs=P("rows")
    )
    args = (jnp.asarray(X), jnp.full((4, 1), 0.9))
    np.testing.assert_allclose(mapped(*args), function(*args), rtol=1e-6)
    grad = jax.grad(lambda x, tau: mapped(x, tau).sum())(*args)
    plain = jax.grad(lambda x, tau: function(x, tau).sum())(*args)
    np.testing.assert_allclose(grad, plain, rtol=2e-6, atol=1e-7)


def test_no_derivative_by_a_temperature_that_does_not_move():
    """A static temperature of 1 must leave no trace in the program."""
    text = jax.jit(jaxsoft.softmax).lower(jnp.asarray(X)).as_text()
    assert text.count("stablehlo.divide") == 1
