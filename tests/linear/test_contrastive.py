"""Contrastive losses against stored similarities, and without any positive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import clip_loss, nt_xent, supervised_contrastive

COUNT, WIDTH = 33, 7
TILE = 4 * 8 * 128
LABELS = np.random.default_rng(2).integers(0, 9, COUNT)


def embeddings(dtype="float32"):
    rng = np.random.default_rng(0)
    pair = rng.standard_normal((2, COUNT, WIDTH))
    return tuple(z.astype(dtype) for z in pair)


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def plain_nt_xent(anchors, positives, tau):
    z = unit(jnp.concatenate([anchors, positives]))
    own = jnp.eye(2 * COUNT, dtype=bool)
    log_p = jax.nn.log_softmax(jnp.where(own, -jnp.inf, z @ z.T / tau))
    rows = jnp.arange(2 * COUNT)
    return -log_p[rows, jnp.roll(rows, COUNT)].mean()


def plain_clip(image, text, tau):
    u = unit(image) @ unit(text).T / tau
    rows = jnp.arange(COUNT)
    return -sum(jax.nn.log_softmax(a)[rows, rows].mean() for a in (u, u.T)) / 2


def plain_supervised(z, _, tau):
    z, labels = unit(z), jnp.asarray(LABELS)
    own = jnp.eye(COUNT, dtype=bool)
    log_p = jax.nn.log_softmax(jnp.where(own, -1e30, z @ z.T / tau))
    positive = (labels[:, None] == labels[None]) & ~own
    number = positive.sum(1).astype(z.dtype)
    loss = -jnp.where(positive, log_p, 0).sum(1) / jnp.maximum(number, 1)
    return jnp.where(number > 0, loss, 0).sum() / (number > 0).sum().astype(z.dtype)


PAIRS = {
    "nt_xent": (nt_xent, plain_nt_xent),
    "clip_loss": (clip_loss, plain_clip),
    "supervised_contrastive": (
        lambda z, _, tau, **o: supervised_contrastive(z, jnp.asarray(LABELS), tau, **o),
        plain_supervised,
    ),
}


@functools.cache
def gradients(loss):
    """Compiles the gradients of a loss of two kinds of embeddings."""
    return jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradients(name, x64):
    ours, plain = PAIRS[name]

    @jax.jit
    def step(*args):
        calls = [
            functools.partial(ours, workspace_bytes=TILE, implementation=implementation)
            for implementation in ("xla", "reference")
        ]
        return [jax.value_and_grad(f, range(3))(*args) for f in (plain, *calls)]

    exact, *found = step(*embeddings("float64"), np.float64(0.3))
    for result in found:
        for x, y in zip(*map(jax.tree.leaves, (result, exact)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.many_cases
def test_other_dtypes(name, dtype):
    ours, plain = PAIRS[name]
    pair = embeddings(dtype)
    loss, grad = jax.jit(jax.value_and_grad(lambda *pair: ours(*pair, 0.3)))(*pair)
    assert loss.dtype == jnp.float32 and grad.dtype == dtype
    with jax.enable_x64(True):
        wide = [z.astype("float64") for z in pair]
        true = jax.jit(plain)(*wide, 0.3)
    np.testing.assert_allclose(loss, true, rtol=1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("loss", [nt_xent, clip_loss])
def test_symmetry(loss):
    a, b = embeddings()
    first = gradients(loss)(a, b)
    second = gradients(loss)(b, a)[::-1]
    for x, y in zip(first, second, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_without_a_positive_there_is_no_loss():
    z = embeddings()[0]
    grad = jax.jit(jax.value_and_grad(supervised_contrastive))
    for rows in (1, COUNT):
        loss, gradient = grad(z[:rows], np.arange(rows))
        assert loss == 0 and (np.asarray(gradient) == 0).all()
    for loss in (nt_xent, clip_loss):
        assert loss(z[:0], z[:0]) == 0
    assert supervised_contrastive(z[:0], np.zeros(0, int)) == 0


def test_a_zero_embedding_has_finite_gradients():
    a, b = embeddings()
    zero = a.copy()
    zero[3] = 0
    for loss in (nt_xent, clip_loss):
        assert all(np.isfinite(g).all() for g in gradients(loss)(zero, b))
    huge, _ = gradients(clip_loss)(a * np.float32(1e30), b)
    assert np.isfinite(huge).all()


def clip_formula(image, text, tau):
    """Returns the loss of embeddings as they are, of any number."""
    u = jnp.matmul(image, text.T, preferred_element_type=tau.dtype) / tau
    rows = jnp.arange(len(image))
    return -sum(jax.nn.log_softmax(a)[rows, rows].mean() for a in (u, u.T)) / 2


@functools.cache
def clip_step(function, **options):
    """Compiles value and gradients, those of a learned temperature too."""
    return jax.jit(
        jax.value_and_grad(functools.partial(function, **options), (0, 1, 2))
    )


def assert_as_good(found, plain, exact, small):
    """Holds errors against those of the plain formula in the same dtype."""
    for ours, other, true in zip(
        *map(jax.tree.leaves, (found, plain, exact)), strict=True
    ):
        ours, other, true = (np.asarray(a, "float64") for a in (ours, other, true))
        error, allowed = (abs(a - true).max() for a in (ours, other))
        assert error <= allowed + small * abs(true).max(), (error, allowed)


@pytest.mark.parametrize("scale, tau", [(0.3, 0.07), (30, 3.0), (1000, 1.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("workspace", [4096, None, 2**26])
@pytest.mark.parametrize("count", [1, 2, 131, 1100])
@pytest.mark.many_cases
def test_clip_is_as_good_as_its_formula(count, workspace, dtype, scale, tau):
    rng = np.random.default_rng(count)
    pair = rng.standard_normal((2, count, WIDTH)) * scale / np.sqrt(WIDTH)
    pair = [jnp.asarray(z, dtype) for z in pair]
    tau = np.float32(tau)
    options = {"normalize": False, "workspace_bytes": workspace}
    found = clip_step(clip_loss, **options)(*pair, tau)
    plain = clip_step(clip_formula)(*pair, tau)
    with jax.enable_x64(True):
        wide = [np.asarray(a, "float64") for a in (*pair, tau)]
        exact = clip_step(clip_formula)(*wide)
    assert found[0].dtype == jnp.float32 and found[1][0].dtype == dtype
    assert_as_good(found, plain, exact, 1e-5 if dtype == "float32" else 1e-2)


def products(program):
    """Returns the flops of all matrix products of a traced function."""

    def of(jaxpr: Jaxpr) -> float:
        return sum(map(of_equation, jaxpr.eqns))

    def of_equation(equation) -> float:
        params = equation.params
        if equation.primitive.name == "dot_general":
            ((summed, _), _) = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = np.prod([shape[axis] for axis in summed])
            return 2.0 * summed * np.prod(equation.outvars[0].aval.shape)
        inner = [
            getattr(value, "jaxpr", value)
            for values in params.values()
            for value in (values if isinstance(values, tuple | list) else [values])
        ]
        flops = [of(value) for value in inner if isinstance(value, Jaxpr)]
        if equation.primitive.name == "cond":
            return max(flops)
        return sum(flops) * params.get("length", 1)

    return of(program.jaxpr)


@pytest.mark.parametrize(
    "loss, workspace, expected",
    [
        (clip_loss, 2**26, 3),
        (clip_loss, 4096, 4),
        (nt_xent, 2**26, 3),
        (nt_xent, 4096, 4),
    ],
)
def test_products_of_value_and_gradient(loss, workspace, expected):
    """Of N·N·D: one for the value, two for the gradient, one to compute it again.

    They are counted before XLA compiles them, whose costs take a loop's body once.
    """
    count, width = (2048 if loss is clip_loss else 1024), 256
    z = jax.ShapeDtypeStruct((count, width), jnp.float32)
    step = jax.value_and_grad(
        functools.partial(loss, workspace_bytes=workspace), (0, 1)
    )
    found = products(jax.jit(step).trace(z, z).jaxpr) / (2 * 2048**2 * width)
    assert abs(found / expected - 1) < 0.1


@pytest.mark.parametrize("workspace", [TILE, None])
@pytest.mark.parametrize("count", [48, 45])
@pytest.mark.many_cases
def test_clip_over_devices(workspace, count):
    """Devices share the texts, where those divide; images are gathered."""
    a, b = embeddings()
    a, b = (np.concatenate([z, 2 * z[::-1] + 1])[:count] for z in (a, b))
    step = clip_step(clip_loss, workspace_bytes=workspace)
    exact = step(a, b, np.float32(0.2))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spec = P("data") if count % 8 == 0 else P()
    a, b = (jax.device_put(z, NamedSharding(mesh, spec)) for z in (a, b))
    compiled = step.lower(a, b, jnp.float32(0.2)).compile()
    found = compiled(a, b, jnp.float32(0.2))
    for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    text = compiled.as_text() or ""
    assert ("all-gather" in text) == (count % 8 == 0)
    if count % 8 == 0:
        assert f"f32[{count},{count}]" not in text


@pytest.mark.parametrize("workspace", [TILE, None])
def test_transformations_of_clip(workspace, x64):
    """A batch of batches, and the derivative of the gradient along a direction."""
    pair = [np.stack([z, np.cos(z)]) for z in embeddings("float64")]
    ours = functools.partial(clip_loss, workspace_bytes=workspace)

    def everything(loss, a, b, tau):
        gradient = jax.grad(loss, (0, 1, 2))
        batch = jax.vmap(gradient, (0, 0, None))(a, b, tau)
        primals = (a[0], b[0], tau)
        return batch, jax.jvp(gradient, primals, jax.tree.map(jnp.sin, primals))

    found, exact = (
        jax.jit(functools.partial(everything, loss))(*pair, np.float64(0.2))
        for loss in (ours, plain_clip)
    )
    for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("static", [True, False])
def test_limits_of_clip(static):
    """At τ = 0 the pairs are the most similar or the loss is infinite."""
    a, b = embeddings()

    def both(tau, *pair):
        tau = float(tau) if static else jnp.float32(tau)
        step = jax.value_and_grad(lambda x, y: clip_loss(x, y, tau), (0, 1))
        return step(*pair)

    for tau, pair, expected in (
        (0, (a, b), np.inf),
        (0, (a, 2 * a), 0),
        (np.inf, (a, b), np.log(COUNT)),
    ):
        value, gradients = both(tau, *pair)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert all((g == 0).all() for g in gradients)
    a[3, 2] = np.nan
    assert np.isnan(clip_loss(a, b))


def test_messages():
    z = np.ones((3, 2), "float32")
    with pytest.raises(ValueError, match="`positives` must have shape"):
        nt_xent(z, z[:2])
    with pytest.raises(ValueError, match="`temperature` must be a scalar"):
        clip_loss(z, z, np.ones(3, "float32"))
    with pytest.raises(TypeError, match="`labels` must have an integer dtype"):
        supervised_contrastive(z, np.ones(3, "float32"))
    with pytest.raises(ValueError, match=r"`image` must have shape \[N, D\]"):
        clip_loss(z[0], z)
