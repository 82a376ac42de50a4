"""Log-softmax and statistics of rows in the interpreter of GPUs' kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._core.registry import Gpu
from jaxsoft.kernels import chips
from jaxsoft.kernels.rows.mosaic_gpu import call as mosaic_gpu
from jaxsoft.kernels.rows.mosaic_gpu.logarithms import logarithm
from jaxsoft.kernels.rows.mosaic_gpu.ring import Ring
from tests import truth
from tests.kernels.interpreters import gpu_interpreter
from tests.kernels.rows import both, close, logits

FUNCTIONS = ("log_softmax", "logsumexp", "entropy")

# What is folded alone leaves its slots in turn; of the second, five chunks pass through
# two slots, row after row; the third has two blocks with two and three chunks.
RINGS = {
    "float32": (600, Ring(lines=5, chunk=2, slots=2, blocks=1)),
    "in turn": (600, Ring(lines=5, chunk=1, slots=2, blocks=1)),
    "two blocks": (600, Ring(5, chunk=1, slots=2, blocks=1, cluster=2)),
    "bfloat16": (300, Ring(lines=3, chunk=3, slots=1, blocks=1)),
}


@pytest.fixture
def take(monkeypatch):
    """Has all rows in one block of threads, or one cluster, with a given ring."""

    def take(ring):
        monkeypatch.setattr(mosaic_gpu, "choose_ring", lambda *_: ring)
        monkeypatch.setattr(mosaic_gpu, "choose_fold_ring", lambda *_: ring)

    monkeypatch.setattr(chips, "gpus", lambda: [Gpu("9.0", 1)])
    jax.clear_caches()
    yield take
    jax.clear_caches()


def values(implementation, x, labels, tau):
    """Returns what every function gives."""
    of_rows = [
        getattr(jaxsoft, name)(x, temperature=tau, implementation=implementation)
        for name in FUNCTIONS
    ]
    loss = functools.partial(
        jaxsoft.softmax_cross_entropy, x, labels, tau, implementation=implementation
    )
    return *of_rows, loss(), loss(label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("case", RINGS)
def test_values_are_those_of_xla(case, take):
    """Dropped classes, a row without any, NaN, infinite, an offset, ties."""
    classes, ring = RINGS[case]
    dtype = "bfloat16" if case == "bfloat16" else "float32"
    x = logits("float32", classes=classes)[:8].astype(dtype)
    labels = jnp.asarray([0, 1, 5, 7, 9, classes - 1, 3, 2])
    tau = jnp.asarray([[0.3], [2.0], [1.0], [5.0], [1.0], [0.7], [np.inf], [0.0]])
    if case == "bfloat16":
        tau = 0.7
    take(ring)
    theirs, mine = both(values, x, labels, tau, kernel="mosaic_gpu")
    for a, b in zip(theirs, mine, strict=True):
        np.testing.assert_array_equal(jnp.isinf(b), jnp.isinf(a))
        close(jnp.where(jnp.isinf(a), 0, a), jnp.where(jnp.isinf(b), 0, b), dtype)


@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
def test_values_are_as_close_to_the_truth_as_those_of_xla(kind, take):
    take(Ring(lines=2, chunk=1, slots=1, blocks=1, cluster=2))
    x = truth.logits(kind, (1, 251))
    tau = np.float32(1.7)
    known = (
        truth.log_softmax(x, tau),
        truth.logsumexp(x, tau),
        truth.entropy(x, tau),
        -truth.log_softmax(x, tau)[:, 3],
    )
    found = both(values, x, jnp.asarray([3]), float(tau), kernel="mosaic_gpu")
    for true, xla, kernel in zip(known, *(of[:4] for of in found), strict=True):
        scale = np.abs(true).max()
        theirs = np.abs(np.asarray(xla, "float64") - true).max()
        assert np.abs(np.asarray(kernel, "float64") - true).max() <= (
            1.5 * theirs + 3e-7 * scale
        )


def test_a_common_offset_changes_no_bit(take):
    take(Ring(lines=2, chunk=1, slots=2, blocks=1))
    x = np.round(np.random.default_rng(3).standard_normal((2, 200)) * 8) / 8
    labels, run = jnp.asarray([3, 4]), jax.jit(values, static_argnums=0)
    with gpu_interpreter():
        near, far = (
            run("mosaic_gpu", jnp.asarray(x + offset, "float32"), labels, 0.7)
            for offset in (0.0, 2.0**20)
        )
    for name, a, b in zip(("log", "lse", "entropy", "nll"), near, far, strict=False):
        if name != "lse":
            np.testing.assert_array_equal(a, b)


def test_gradients_are_those_of_xla(take):
    """By logits and temperatures, through `jax.vmap` and a mask."""
    take(Ring(lines=2, chunk=1, slots=2, blocks=1))
    x = logits(rows=9, classes=130)[5:].reshape(2, 2, 130)
    mask = np.random.default_rng(2).uniform(size=x.shape) < 0.7
    mask[0, 1] = False
    tau = jnp.asarray([0.8, 3.0])
    labels = jnp.asarray([[3, 5], [7, -1]])

    def function(implementation, x, tau):
        def loss(x, tau):
            def of_example(x, where, labels):
                options = {"where": where, "implementation": implementation}
                log_p = jaxsoft.log_softmax(x, temperature=tau, **options)
                entropy = jaxsoft.entropy(x, temperature=tau, **options)
                nll = jaxsoft.softmax_cross_entropy(
                    x, labels, tau, ignore_label=-1, label_smoothing=0.1, **options
                )
                log_p = jnp.where(jnp.isinf(log_p), 0, log_p)
                return (jnp.sin(log_p).sum(-1) + entropy).sum() + nll.sum()

            return jax.vmap(of_example)(x, jnp.asarray(mask), labels).sum()

        x = jnp.where(jnp.abs(x) > 1e30, 0, x)
        return jax.value_and_grad(loss, (0, 1))(x, tau)

    theirs, mine = both(function, x, tau, kernel="mosaic_gpu")
    for a, b in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-6 * np.abs(a).max())
    assert (np.asarray(mine[1][0])[~mask] == 0).all()


def test_logarithms_of_sums():
    """Of what a row can come to: close to 1, where a coarse one would lose digits."""
    tiny = 1 + 2.0 ** -np.arange(23)
    totals = np.concatenate([tiny, np.geomspace(1, 1e8, 10**5), [2.0**24]])
    totals = totals.astype("float32")
    found = np.asarray(jax.jit(logarithm)(totals), "float64")
    known = np.log(totals.astype("float64"))
    assert (np.abs(found - known) <= 2.5e-7 * known).all() and found[23] == 0
    assert np.isnan(logarithm(jnp.float32(np.nan)))


def test_rings_of_what_is_not_written():
    """Few rows are shared by clusters, but not so that a row waits for another."""
    for itemsize in (2, 4):
        for rows in (1, 7, 64, 131, 400, 16384):
            for classes in (1, 128, 1000, 32768, 50257, 262144, 10**7):
                ring = mosaic_gpu.choose_fold_ring(rows, classes, itemsize, 132)
                held = ring.slots * ring.chunk * 128 * itemsize
                assert ring.blocks * (held + 2**10) <= 227 * 2**10
                assert (ring.chunks - 1) * ring.chunk < ring.lines
                assert ring.cluster == 1 or ring.groups(132) >= rows
    for rows, cluster in ((4, 8), (64, 4), (150, 2), (300, 1), (16384, 1)):
        assert mosaic_gpu.choose_fold_ring(rows, 10**6, 4, 132).cluster == cluster


@pytest.mark.parametrize("name", [*FUNCTIONS, "softmax_cross_entropy"])
def test_errors_and_empty_arrays(name):
    labels = (jnp.zeros(3, int),) if name == "softmax_cross_entropy" else ()
    function = functools.partial(getattr(jaxsoft, name), implementation="mosaic_gpu")
    x = jnp.zeros((3, 128))
    with pytest.raises(NotImplementedError, match='must be None or "xla" on cpu'):
        function(x, *labels)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        function(jnp.zeros((3, 128), "float64"), *labels)
    empty = function(x[:0], *(ids[:0] for ids in labels))
    assert (
        empty.shape
        == jax.eval_shape(
            getattr(jaxsoft, name), x[:0], *(ids[:0] for ids in labels)
        ).shape
    )
    lowered = jax.jit(getattr(jaxsoft, name)).trace(x, *labels)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text


def test_targets_have_no_kernel():
    x = jnp.zeros((3, 128))
    with pytest.raises(NotImplementedError, match="`targets` must be None with"):
        jaxsoft.softmax_cross_entropy(x, targets=x, implementation="mosaic_gpu")
