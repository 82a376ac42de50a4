"""Transformations of the logits room: jit, vmap, remat, scan, export, shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests import truth

X = truth.logits("range", (4, 6))
LABELS = np.array([0, 5, 2, 3])
CASES = {
    "softmax": lambda x, tau: jaxsoft.softmax(x, temperature=tau),
    "log_softmax": lambda x, tau: jaxsoft.log_softmax(x, temperature=tau),
    "logsumexp": lambda x, tau: jaxsoft.logsumexp(x, temperature=tau),
    "entropy": lambda x, tau: jaxsoft.entropy(x, temperature=tau),
    "cross_entropy": lambda x, tau: jaxsoft.softmax_cross_entropy(
        x, jnp.asarray(LABELS)[: x.shape[0]], tau, label_smoothing=0.1, z_loss=0.1
    ),
    "distillation": lambda x, tau: jaxsoft.distillation_loss(x, x[:, ::-1], tau),
}


def every(x, tau):
    """Returns what each function makes of its arguments, all in one program."""
    return {name: function(x, tau) for name, function in CASES.items()}


def assert_equal(found, expected, **tolerances):
    assert found.keys() == expected.keys() == CASES.keys()
    for name, result in found.items():
        np.testing.assert_allclose(result, expected[name], err_msg=name, **tolerances)


def total(function, x, tau):
    out = function(x, tau)
    weights = jnp.cos(jnp.arange(float(out.size))).reshape(out.shape)
    return (out * weights).sum()


COLUMN = np.full((4, 1), 0.9, "float32")


def test_eager_equals_jit():
    for tau in (1.0, 0.7, np.full((4, 1), 1.3, "float32")):
        eager = every(X, tau)
        known = jax.jit(lambda x, t=tau: every(x, t))(X)
        for compiled in (known, jax.jit(every)(X, tau)):
            assert_equal(eager, compiled, rtol=5e-7, atol=1e-30)


def test_vmap_over_logits_and_temperature():
    taus = np.asarray([0.0, 0.5, 3.0], "float32")
    alone = jax.jit(every)
    stacked = jax.tree.map(lambda *a: np.stack(a), *[alone(X, tau) for tau in taus])
    mapped = jax.jit(jax.vmap(lambda tau: every(X, tau)))(taus)
    assert_equal(mapped, stacked, rtol=1e-6)
    rows = jax.jit(jax.vmap(lambda x: CASES["entropy"](x[None], 0.5)[0]))(X)
    np.testing.assert_allclose(rows, jaxsoft.entropy(X, temperature=0.5), rtol=1e-6)


def test_remat_and_scan_of_gradients():
    @jax.jit
    def gradients(x):
        def of(function):
            def plain(x):
                return total(function, x, COLUMN)

            def scanned(x):
                return jax.lax.scan(lambda c, _: (c + plain(x), None), 0.0, length=3)[0]

            return [jax.grad(f)(x) for f in (plain, jax.checkpoint(plain), scanned)]

        return {name: of(function) for name, function in CASES.items()}

    for name, (grad, saved, scanned) in gradients(X).items():
        grad = np.asarray(grad)
        np.testing.assert_allclose(saved, grad, rtol=2e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(
            scanned, 3 * grad, rtol=2e-6, atol=1e-6, err_msg=name
        )


def test_export_round_trip():
    compiled = jax.jit(every)
    exported = jax.export.export(compiled)(X, COLUMN)
    restored = jax.export.deserialize(exported.serialize())
    assert_equal(restored.call(X, COLUMN), compiled(X, COLUMN), rtol=0)


def test_inside_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))

    def sharded(function):
        return jax.shard_map(
            function, mesh=mesh, in_specs=(P("rows"), P("rows")), out_specs=P("rows")
        )

    def gradient(function, x, tau):
        return jax.grad(lambda x, tau: function(x, tau).sum())(x, tau)

    @jax.jit
    def values_and_gradients(x, tau):
        mapped = {name: sharded(function) for name, function in CASES.items()}
        return [
            (
                {name: f(x, tau) for name, f in functions.items()},
                {name: gradient(f, x, tau) for name, f in functions.items()},
            )
            for functions in (mapped, CASES)
        ]

    (mapped, grads), (plain, plain_grads) = values_and_gradients(X, COLUMN)
    assert_equal(mapped, plain, rtol=1e-6)
    assert_equal(grads, plain_grads, rtol=2e-6, atol=1e-7)


def test_no_derivative_by_a_temperature_that_does_not_move():
    """A static temperature of 1 must leave no trace in the program."""
    text = jax.jit(jaxsoft.softmax).lower(X).as_text()
    assert text.count("stablehlo.divide") == 1
