"""What is made of the numbers that kernels find of rows, with those of plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._core import registry
from jaxsoft._core.numerics import divide_by_temperature
from jaxsoft.kernels.rows.binding import RowPlan
from jaxsoft.logits.arguments import pick_temperature
from tests.kernels.rows import close, logits

LABELS = np.arange(8) * 3
TAUS = np.array([0.3, 2, 1, 5, 1, 0.7, np.inf, 0], "float32")


def found(plan: RowPlan, x, tau):
    """Returns what the kernel for statistics does."""
    x = x.astype("float32")
    peak = jnp.max(x, 1, keepdims=True, initial=jnp.finfo("float32").min)
    tau = pick_temperature(plan.static_tau, tau)
    c = divide_by_temperature(x, peak, tau)
    e = jnp.exp(c)
    columns = [peak[:, 0], e.sum(1)]
    if plan.expected:
        columns.append((e * jnp.maximum(c, -1e3)).sum(1))
    if plan.mean:
        kept = x != -jnp.inf
        columns += [jnp.where(kept, c, 0).sum(1), kept.sum(1).astype("float32")]
    return jnp.stack(columns, 1)


def log_found(plan: RowPlan, x, tau):
    """Returns what the kernel for log-softmax does."""
    numbers = found(plan, x, tau)
    tau = pick_temperature(plan.static_tau, tau)
    c = divide_by_temperature(x.astype("float32"), numbers[:, :1], tau)
    total = numbers[:, 1:]
    return (c - jnp.log(jnp.where(total == 0, 1, total))).astype(x.dtype), numbers


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Has plain JAX in place of the kernels, on any platform."""
    kernel = registry.kernel
    plain = {"rows_statistics": found, "rows_log": log_found}

    def chosen(step, implementation):
        return plain.get(step) or kernel(step, implementation)

    monkeypatch.setattr(registry, "kernel", chosen)
    monkeypatch.setattr(registry, "check_platforms", lambda *_: None)
    jax.clear_caches()
    yield
    jax.clear_caches()


def log_softmax(implementation, x, tau):
    y = jaxsoft.log_softmax(x, temperature=tau, implementation=implementation)
    return jnp.where(jnp.isinf(y), 0, y)


def logsumexp(implementation, x, tau):
    y = jaxsoft.logsumexp(x, temperature=tau, implementation=implementation)
    return jnp.where(jnp.isinf(y), 0, y)


def entropy(implementation, x, tau):
    return jaxsoft.entropy(x, temperature=tau, implementation=implementation)


def loss(implementation, x, tau, **options):
    y = jaxsoft.softmax_cross_entropy(
        x, LABELS[: x.shape[0]], tau, implementation=implementation, **options
    )
    return jnp.where(jnp.isinf(y), 0, y)


smoothed = functools.partial(loss, label_smoothing=0.1, z_loss=1e-3)
weighted = functools.partial(loss, weights=jnp.arange(8.0) % 3, ignore_label=6)
FUNCTIONS = {
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "entropy": entropy,
    "loss": loss,
    "smoothed": smoothed,
    "weighted": weighted,
}


def value_and_gradients(function, implementation, x, tau):
    """Returns values and, by cotangents of any size, gradients."""
    y, back = jax.vjp(functools.partial(function, implementation), x, tau)
    cotangent = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)
    return y, back(cotangent)


@pytest.mark.many_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_xla(name, dtype):
    """Dropped classes, a row without any, an offset, ties, each at its temperature."""
    x = logits(dtype, classes=70)[jnp.array([0, 1, 2, 0, 6, 5, 7, 7])]
    run = jax.jit(value_and_gradients, static_argnums=(0, 1))
    if name == "weighted":
        # A row of weight 0 may hold anything.
        x = x.at[0].set(jnp.nan)
    theirs, mine = (
        run(FUNCTIONS[name], implementation, x, jnp.asarray(TAUS[:, None]))
        for implementation in ("xla", "mosaic_gpu")
    )
    close(theirs, mine, dtype)
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))


@pytest.mark.many_cases
@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 1e5, np.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_static_temperatures(name, tau):
    """Hot rows too, of which entropies' slopes are differences of close numbers."""
    x = logits(classes=70)[jnp.array([0, 1, 2, 0, 6, 5, 7, 7])].at[4].set(1)

    def function(implementation, x):
        y, back = jax.vjp(lambda x: FUNCTIONS[name](implementation, x, tau), x)
        return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    run = jax.jit(function, static_argnums=0)
    theirs, mine = (run(implementation, x) for implementation in ("xla", "mosaic_gpu"))
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=5e-6 * np.abs(a).max())


def test_slopes_at_a_temperature_of_zero_are_zero():
    """Whatever the cotangent, which times a slope not yet over τ may be infinite."""
    x = logits(classes=70)[jnp.array([0, 1, 7])]

    @jax.jit
    def slope(tau):
        def values(tau):
            lse = jaxsoft.logsumexp(x, temperature=tau, implementation="mosaic_gpu")
            loss = jaxsoft.softmax_cross_entropy(
                x, LABELS[:3], tau, label_smoothing=0.1, implementation="mosaic_gpu"
            )
            return jnp.stack([lse, loss])

        y, back = jax.vjp(values, tau)
        return back(jnp.full_like(y, 1e3))[0]

    assert slope(jnp.float32(0)) == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_modes_and_second_derivatives(name):
    x = logits(classes=30)[jnp.array([0, 1, 7])]
    if name == "weighted":
        x = jnp.concatenate([x, x, x])[:8]
    tau = jnp.linspace(0.8, 3, x.shape[0])[:, None]
    directions = jnp.sin(jnp.where(jnp.isinf(x), 0, x)), jnp.cos(tau)

    def function(implementation, x, tau):
        def total(x, tau):
            return jnp.sin(FUNCTIONS[name](implementation, x, tau)).sum()

        gradient = jax.grad(total, (0, 1))
        return (
            jax.jvp(total, (x, tau), directions),
            jax.jvp(gradient, (x, tau), directions),
            jax.grad(lambda x, tau: jnp.sin(gradient(x, tau)[0]).sum(), 1)(x, tau),
        )

    run = jax.jit(function, static_argnums=0)
    theirs, mine = (
        run(implementation, x, tau) for implementation in ("xla", "mosaic_gpu")
    )
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_allclose(b, a, rtol=3e-4, atol=3e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "weighted"])
def test_rows_over_a_mesh(name):
    """One temperature of all rows, whose gradient is the sum of the devices'."""
    x = logits(classes=70)[jnp.array([0, 1, 7, 8, 0, 1, 7, 8])]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def function(implementation, x, tau):
        def total(x, tau):
            return jnp.sin(FUNCTIONS[name](implementation, x, tau)).sum()

        return jax.grad(total, (0, 1))(x, tau)

    spec = P("data"), P()

    def over_mesh(implementation):
        run = functools.partial(function, implementation)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))

    theirs, mine = (
        over_mesh(implementation)(x, jnp.full((1, 1), 0.7))
        for implementation in ("xla", "mosaic_gpu")
    )
    for a, b in zip(theirs, mine, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_axes_batches_and_labels():
    """Classes in the middle; labels that name no class, or a dropped one."""
    x = logits(classes=20)[jnp.array([0, 1, 7, 0, 5, 7])].reshape(3, 2, 20)
    x = x.swapaxes(1, 2)
    labels = jnp.asarray([[3, -1], [20, 5], [0, 19]])
    where = jnp.asarray(np.random.default_rng(1).uniform(size=x.shape) < 0.8)

    def function(implementation, x):
        def losses(x):
            return jaxsoft.softmax_cross_entropy(
                x, labels, axis=1, where=where, implementation=implementation
            )

        y, back = jax.vjp(losses, x)
        entropies = jax.vmap(
            functools.partial(jaxsoft.entropy, axis=0, implementation=implementation)
        )(x)
        return y, back(jnp.ones_like(y)), entropies

    run = jax.jit(function, static_argnums=0)
    theirs, mine = (run(implementation, x) for implementation in ("xla", "mosaic_gpu"))
    assert np.isnan(mine[0][0, 1]) and np.isnan(mine[0][1, 0])
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_allclose(b, a, rtol=5e-6, atol=1e-6)
