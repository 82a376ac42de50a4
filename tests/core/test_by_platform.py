"""Functions of platforms: one is traced, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsoft
from jaxsoft._core.by_platform import by_platform
from jaxsoft.logits import divergence


def ours(x, w, n):
    return {"y": jnp.sin(x * w) * n.astype(x.dtype), "n": n + 1}, jnp.sum(x, 1)


def others(x, w, n):
    return {"y": 3 * jnp.cos(x * w), "n": n + 2}, jnp.sum(w * x * x, 1)


def chosen(x, w, n):
    return by_platform(x, w, n, cpu=ours, default=others)


def arrays():
    x = jnp.linspace(-1, 2, 12, dtype=jnp.float32).reshape(4, 3)
    return x, x[:1] + 0.5, jnp.arange(3)[None]


def total(function):
    def loss(x, w, n):
        found, sums = function(x, w, n)
        return jnp.sum(found["y"] ** 2) + jnp.sum(sums**3)

    return loss


def hessian(f):
    return jax.jacfwd(jax.grad(total(f), (0, 1)), (0, 1))


def by_rows(f):
    def row(x, w, n):
        return f(x[None], w, n)

    return jax.vmap(row, (0, None, None))


def in_scan(f):
    def loss(x, w, n):
        def step(carry, row):
            return carry + total(f)(row[None], w, n), None

        return lax.scan(step, jnp.zeros(()), x)[0]

    return jax.grad(loss, (0, 1))


TRANSFORMED = {
    "value": lambda f: f,
    "gradient": lambda f: jax.grad(total(f), (0, 1)),
    "one gradient": lambda f: jax.grad(total(f), 1),
    "jvp": lambda f: lambda x, w, n: jax.jvp(lambda w: total(f)(x, w, n), (w,), (w,)),
    "hessian": hessian,
    "third order": lambda f: jax.grad(
        lambda *a: sum(map(jnp.sum, jax.tree.leaves(hessian(f)(*a)))), (0, 1)
    ),
    "reverse twice": lambda f: jax.grad(
        lambda *a: jnp.sum(jax.grad(total(f))(*a) ** 2), (0, 1)
    ),
    "vmap": by_rows,
    "gradient of vmap": lambda f: jax.grad(
        lambda *a: jnp.sum(by_rows(f)(*a)[0]["y"] ** 2), (0, 1)
    ),
    "vmap of gradient": lambda f: jax.vmap(
        lambda x, w, n: jax.grad(total(f), (0, 1))(x[None], w, n), (0, None, None)
    ),
    "scan": in_scan,
    "remat": lambda f: jax.grad(jax.checkpoint(total(f)), (0, 1)),
    "linearize": lambda f: (
        lambda x, w, n: jax.linearize(lambda x: total(f)(x, w, n), x)[1](x)
    ),
}


def assert_close(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("compile_", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_are_those_of_the_function(name, compile_):
    transform = TRANSFORMED[name]
    assert_close(
        compile_(transform(chosen))(*arrays()), jax.jit(transform(ours))(*arrays())
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", ["value", "gradient", "vmap of gradient"])
def test_a_platform_gets_its_function(name, platform):
    transform = TRANSFORMED[name]

    def lowered(function):
        traced = jax.jit(transform(function)).trace(*arrays())
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def count(text):
        return [text.count(f"stablehlo.{op}") for op in ("sine", "cosine", "case")]

    found = count(lowered(chosen))
    expected = count(lowered(ours if platform == "cpu" else others))
    # A derivative computes again what XLA then merges.
    assert [f > 0 for f in found] == [e > 0 for e in expected]


@pytest.mark.parametrize("name", ["value", "gradient", "vmap of gradient"])
def test_a_program_of_several_platforms_chooses_as_it_runs(name):
    function = jax.jit(TRANSFORMED[name](chosen))
    platforms = ("cpu", "tpu", "cuda")
    exported = jax.export.export(function, platforms=platforms)(*arrays())
    exported = jax.export.deserialize(exported.serialize())
    assert "stablehlo.case" in exported.mlir_module()
    assert_close(
        jax.jit(exported.call)(*arrays()), jax.jit(TRANSFORMED[name](ours))(*arrays())
    )


def test_one_function_is_traced():
    traced = []

    def recorded(name, function):
        def call(*args):
            traced.append(name)
            return function(*args)

        return call

    def both(*args):
        return by_platform(
            *args, cpu=recorded("cpu", ours), default=recorded("other", others)
        )

    jax.jit(jax.grad(total(both), (0, 1))).lower(*arrays())
    assert traced == ["cpu"]


@pytest.mark.parametrize("mode", ["varying", "unchecked", "compiler"])
def test_devices_share_a_function(mode):
    mesh = jax.make_mesh((4,), ("rows",), (jax.sharding.AxisType.Auto,))
    x, w, n = arrays()

    def loss(function):
        def local(x, w, n):
            return lax.psum(total(function)(x, w, n), "rows")

        if mode == "compiler":
            return total(function)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(jax.P("rows"), jax.P(), jax.P()),
            out_specs=jax.P(),
            check_vma=mode == "varying",
        )

    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows")))
    gradient = jax.jit(jax.value_and_grad(loss(chosen), (0, 1)))(placed, w, n)
    plain = jax.jit(jax.value_and_grad(loss(ours), (0, 1)))(placed, w, n)
    assert_close(gradient, plain)


def test_arrays_must_be_arguments():
    x, w, n = arrays()

    @jax.jit
    def captured(x):
        function = functools.partial(ours, x)
        return by_platform(w, n, default=function)

    with pytest.raises(TypeError, match="must take all arrays as arguments"):
        captured(x)


def test_a_program_holds_no_array_of_its_tracing(monkeypatch):
    tree = jaxsoft.ClassTree.balanced(5)
    hidden, kernel = jnp.ones((3, 2)), jnp.ones((tree.num_rows, 2))
    monkeypatch.setattr(divergence, "_MANY", 0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with jax.checking_leaks():
        jax.jit(lambda h, k: jaxsoft.hierarchical_log_probs(h, k, tree))(hidden, kernel)
        jax.jit(lambda s, t: jaxsoft.distillation_loss(s, t))(hidden, 2 * hidden)
