"""The kernels for rows in JAX's interpreters, which have races and garbage."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._core.registry import Gpu
from jaxsoft.kernels import chips
from jaxsoft.kernels.rows.mosaic_gpu import call as mosaic_gpu
from jaxsoft.kernels.rows.mosaic_tpu import call as mosaic_tpu
from tests import truth
from tests.kernels.rows import CLASSES, KERNELS, ROWS, both, close, interpreted, logits


@pytest.fixture
def short_blocks(monkeypatch):
    """Makes TPUs read a row twice, in pieces of which the last is not full."""

    def blocks(rows, classes, itemsizes, vmem, noisy):
        del rows, classes, vmem, noisy
        least = 16 if 2 in itemsizes else 8
        return mosaic_tpu.RowBlocks(least, 128, least, 2**20, chunk=128)

    monkeypatch.setattr(mosaic_tpu, "choose_row_blocks", blocks)
    jax.clear_caches()
    yield
    jax.clear_caches()


def value_and_gradients(implementation, x, cotangent, tau, **options):
    """Returns probabilities, and the gradients by logits and temperature."""
    function = functools.partial(
        jaxsoft.softmax, implementation=implementation, **options
    )
    y, back = jax.vjp(lambda x, tau: function(x, temperature=tau), x, tau)
    return y, back(cotangent)


@pytest.mark.parametrize("blocks", ["whole", "short"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_xla(dtype, blocks, request):
    if blocks == "short":
        request.getfixturevalue("short_blocks")
    tau = np.resize([0.3, 1, 2, 5, 0, np.inf, 3e38, 1e-40, 1.2e-38, 0.7], (ROWS, 1))
    cotangent = np.random.default_rng(1).standard_normal((ROWS, CLASSES))
    args = logits(dtype), jnp.asarray(cotangent, dtype), jnp.asarray(tau, "float32")
    theirs, mine = both(value_and_gradients, *args)
    close(theirs, mine, dtype)
    assert np.isnan(np.asarray(mine[0][3:5], "f")).all() and (mine[0][2] == 0).all()


@pytest.mark.parametrize("tau", [1.0, 0.7, 3.0, 0.0])
def test_static_temperatures_masks_axes_and_batches(tau):
    """A mask of each row, classes in the middle, and a batch that becomes rows."""
    x = logits(rows=9, classes=130)[3:].reshape(3, 2, 130).swapaxes(1, 2)
    x = jnp.where(jnp.isnan(x), 0, x)
    mask = np.random.default_rng(2).uniform(size=x.shape) < 0.7
    mask[0, :, 1] = False

    def function(implementation, x, mask):
        each = functools.partial(
            jaxsoft.softmax, temperature=tau, axis=0, implementation=implementation
        )
        y, back = jax.vjp(lambda x: jax.vmap(each)(x, where=mask), x)
        return y, back(jnp.sin(jnp.clip(x, -9, 9)))

    theirs, mine = both(function, x.at[1, :, 1].set(0), jnp.asarray(mask))
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-6)
    assert (np.asarray(mine[0])[0, :, 1] == 0).all()


def test_both_modes_and_second_derivatives():
    x = logits(rows=9, classes=130)[7:]
    tau = jnp.full((2, 1), 0.8)
    directions = jnp.sin(x), jnp.full_like(tau, 0.3)

    def function(implementation, x, tau):
        def loss(x, tau):
            y = jaxsoft.softmax(x, temperature=tau, implementation=implementation)
            return (y * jnp.cos(x)).sum()

        gradient = jax.grad(loss, (0, 1))
        return jax.jvp(loss, (x, tau), directions), jax.jvp(
            gradient, (x, tau), directions
        )

    theirs, mine = both(function, x, tau)
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


def test_rows_over_a_mesh():
    x = logits()[:8]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def function(implementation, x):
        run = functools.partial(
            jaxsoft.softmax, temperature=0.5, implementation=implementation
        )

        def gradient(x):
            y, back = jax.vjp(run, x)
            return y, back(jnp.sin(x))

        spec = P("data")
        return jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    x = jnp.where(jnp.isfinite(x), x, 0)
    close(*both(function, x), "float32")


def test_values_against_float64():
    """A single row of one class, and classes that a block does not divide."""
    for shape in ((1, 1), (3, 139)):
        x = truth.logits("range", shape)
        with interpreted("mosaic_tpu"):
            y = jaxsoft.softmax(x, temperature=0.7, implementation="mosaic_tpu")
        np.testing.assert_allclose(y, truth.softmax(x, np.float32(0.7)), 4e-6, 1e-9)


# The first reads again what its two slots do not hold; 5 lines end in half a chunk. The
# second keeps rows, padded to whole lines. Of the third, two blocks have two and three
# chunks, of which two stay; of the fourth, four have whole chunks and the last half.
RINGS = {
    "float32": (600, mosaic_gpu.Ring(lines=5, chunk=2, slots=2, blocks=1)),
    "float16": (300, mosaic_gpu.Ring(lines=3, chunk=3, slots=1, blocks=1)),
    "two blocks": (600, mosaic_gpu.Ring(5, chunk=1, slots=2, blocks=1, cluster=2)),
    "four blocks": (900, mosaic_gpu.Ring(8, chunk=2, slots=1, blocks=1, cluster=4)),
}


@pytest.mark.parametrize("case", RINGS)
def test_gpus_take_row_after_row(case, monkeypatch):
    """Three rows in one block of threads: what is interpreted takes its time."""
    classes, ring = RINGS[case]
    dtype = case if case.startswith("float") else "float32"
    monkeypatch.setattr(chips, "gpus", lambda: [Gpu("9.0", 1)])
    monkeypatch.setattr(mosaic_gpu, "choose_ring", lambda *_: ring)
    x = logits("float32", classes=classes)[jnp.array([0, 1, 7])].astype(dtype)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), dtype)
    tau = jnp.asarray([[0.3], [2.0], [0.0]], "float32")
    if dtype == "float16":
        x, tau = x.at[1].set(-jnp.inf), 0.7
    args = x, cotangent, tau
    close(*both(value_and_gradients, *args, kernel="mosaic_gpu"), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_arrays_and_errors(kernel):
    for shape in ((0, 5), (3, 0)):
        if shape[1]:
            y = jaxsoft.softmax(jnp.zeros(shape), implementation=kernel)
            assert y.shape == shape
    with pytest.raises(NotImplementedError, match='must be None or "xla" on cpu'):
        jaxsoft.softmax(jnp.zeros((2, 128)), implementation=kernel)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        jaxsoft.softmax(jnp.zeros((2, 128), "float64"), implementation=kernel)


def test_none_never_picks_a_kernel():
    """Not before one was measured: neither here nor compiled for where it could run."""
    x = jax.ShapeDtypeStruct((16, 1024), "float32")
    for platform in ("cpu", "tpu", "cuda"):
        text = _lowered(platform, jaxsoft.softmax, x)
        assert "custom_call" not in text and "jaxsoft_softmax" not in text
    forced = functools.partial(jaxsoft.softmax, implementation="mosaic_tpu")
    assert "tpu_custom_call" in _lowered("tpu", forced, x)


def _lowered(platform: str, function: Any, *args: Any) -> str:
    return (
        jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    )


def test_rows_that_fit_are_read_once():
    """At each chip's smallest VMEM; longer ones take blocks that are read twice."""
    for vmem in (64 * 2**20, 128 * 2**20):
        for classes in (1, 1000, 32768, 131072, 151936, 262144):
            for sizes in ((4, 4), (2, 2), (4, 4, 4), (2, 2, 2)):
                blocks = mosaic_tpu.choose_row_blocks(16384, classes, sizes, vmem)
                width = -(-classes // 128) * 128
                held = 2 * sum(sizes) * blocks.rows * min(width, blocks.classes + 127)
                assert held < blocks.vmem_bytes < vmem
                assert blocks.rows % blocks.strip == 0
                if classes <= 151936:
                    assert blocks.classes == classes
    long = mosaic_tpu.choose_row_blocks(100, 2**20 + 1, (4, 4), 64 * 2**20)
    assert long.classes % 2048 == 0 and 0 < long.classes < 2**20


def test_rows_that_fit_shared_memory_are_read_once():
    for itemsize in (2, 4):
        for arrays in (1, 2):
            for classes in (1, 128, 1000, 32768, 50257, 131072, 262144, 10**7):
                ring = mosaic_gpu.choose_ring(classes, itemsize, arrays)
                held = ring.slots * ring.chunk * 128 * itemsize * arrays
                assert ring.blocks >= 1 and ring.chunk <= 256
                assert ring.blocks * (held + 2**10) <= 227 * 2**10
                blocks = classes * itemsize * arrays / (208 * 2**10)
                assert (ring.reads == 1) == (blocks <= 8)
                assert ring.cluster == 1 or blocks > 1
                assert (ring.chunks - 1) * ring.chunk < ring.lines
    assert mosaic_gpu.choose_ring(48 * 1024, 4, 1).cluster == 1
    for slots, chunk, cluster, message in (
        (1, 8, 1, "`slots` must be 2 or more"),
        (2, 9, 1, "`chunk` must be"),
        (2, 64, 4, "`cluster` must be at most 2"),
    ):
        with pytest.raises(ValueError, match=message):
            mosaic_gpu.Ring(100, chunk, slots, blocks=1, cluster=cluster)
