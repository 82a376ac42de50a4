"""The Mosaic GPU kernels, interpreted, and what surrounds them."""

import builtins
import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_cross_entropy, linear_log_prob, linear_statistics
from jaxsoft.kernels import chips
from jaxsoft.kernels.layer.mosaic_gpu import plan as planning
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.folds.statistics import Statistics
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import compute_tile
from tests.kernels.interpreters import gpu_interpreter
from tests.kernels.layers import TAUS, layer
from tests.linear import cases

WANTED = frozenset({"label", "mean", "expected", "argmax"})
FIELDS = ("max", "log_sum", "label", "mean", "expected")


def close(mine, theirs, name, tau: Any = 1.0):
    """Compares [N], up to what rounding logits near 4 does at each temperature."""
    tau = np.broadcast_to(np.asarray(tau, np.float64), (len(mine),))
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    slack = 1e-6 + 3e-7 * 4 / np.where(tau < 1e-38, 1, np.abs(tau))
    mine, theirs = mine.reshape(len(tau)), theirs.reshape(len(tau))
    np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(theirs), name)
    known = np.isfinite(theirs)
    np.testing.assert_array_equal(mine[~known], theirs[~known], name)
    mine, theirs = (np.where(known, a, 0) for a in (mine, theirs))
    assert (np.abs(mine - theirs) <= slack + 2e-6 * np.abs(theirs)).all(), name


def check(hidden, kernel, labels, options):
    """Compares every statistic with XLA's, jitted as users do."""

    def run(implementation, hidden, kernel, labels, arrays):
        return linear_statistics(
            hidden,
            kernel,
            labels,
            return_argmax=True,
            implementation=implementation,
            **arrays,
            **{k: v for k, v in options.items() if k not in arrays},
        )

    arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    args = (hidden, kernel, labels, arrays)
    run = jax.jit(run, static_argnums=0)
    expected = run("xla", *args)
    got = run("mosaic_gpu", *args)
    np.testing.assert_array_equal(got.argmax, expected.argmax)
    for name in FIELDS:
        mine, theirs = (getattr(s, name) for s in (got, expected))
        close(mine, theirs, name, options.get("temperature", 1.0))
    return got


def test_unaligned_classes_and_features_in_the_layout_vh(small_tiles, chip):
    """V = 211: 208 in four tiles of which the last is cut, 3 in the tail.

    H = 144: three steps, of which the last is mostly zeros, and the narrowest swizzle.
    """
    small_tiles()
    hidden, kernel, labels = layer(5, 144, 211, "vh")
    # The first row's best class is of the tail.
    kernel = kernel.at[209].set(hidden[0])
    labels = labels.at[2].set(-1).at[3].set(211).at[4].set(210)
    with gpu_interpreter():
        got = check(hidden, kernel, labels, {"kernel_layout": "vh"})
    assert got.argmax[0] == 209
    assert np.isnan(np.asarray(got.log_prob)[[2, 3]]).all()
    assert (np.asarray(got.log_prob)[[0, 1, 4]] <= 0).all()


def test_every_option_at_every_temperature(small_tiles, chip):
    """V = 176 needs the narrowest swizzle; N = 13 is padded to 16."""
    small_tiles(splits=1)
    hidden, kernel, labels = layer(13, 64, 176, "hv")
    rng = np.random.default_rng(1)
    mask = rng.uniform(size=176) < 0.7
    mask[np.asarray(labels)[:9]] = True
    options = {
        "bias": jnp.asarray(rng.standard_normal(176), jnp.bfloat16),
        "class_mask": jnp.asarray(mask),
        "logit_softcap": 1.5,
        "temperature": jnp.asarray(TAUS, jnp.float32),
    }
    with gpu_interpreter():
        got = check(hidden * 3, kernel, labels, options)
    assert np.isnan(np.asarray(got.entropy)).sum() == 1


def test_blocks_share_the_kernel_by_multicast(small_tiles):
    """N = 140 takes two blocks of rows, V = 224 a swizzle of 64 bytes, float16.

    H = 96: of the second step one half is zeros.
    """
    small_tiles(cluster=2, splits=1, stages=3)
    hidden, kernel, labels = layer(140, 96, 224, "hv", "float16")
    with gpu_interpreter():
        check(hidden, kernel, labels, {"temperature": 3.0})


def test_rows_without_classes_and_temperature_zero(small_tiles, chip):
    small_tiles(splits=1)
    hidden, kernel, labels = layer(3, 64, 128, "hv")
    options = {"class_mask": jnp.zeros(128, bool), "temperature": 0.0}
    with gpu_interpreter():
        got = check(hidden, kernel, labels, options)
        loss = linear_cross_entropy(
            hidden, kernel, labels, implementation="mosaic_gpu", **options
        )
    assert (np.asarray(got.max) == -np.inf).all() and loss == 0


def test_gradients_batches_and_forward_over_reverse(small_tiles):
    """The backward pass is XLA's, from the kernel's statistics."""
    small_tiles(splits=1)
    hidden, kernel, labels = layer(8, 64, 128, "hv")
    weights = jnp.asarray([1, 0, 2, 1, 1, 1, 0, 0.5], jnp.float32)

    def loss(implementation, hidden, kernel):
        def one(hidden, labels, weights):
            return linear_cross_entropy(
                hidden,
                kernel,
                labels,
                weights=weights,
                label_smoothing=0.1,
                z_loss=0.01,
                implementation=implementation,
            )

        parts = (hidden.reshape(2, 4, -1), labels.reshape(2, 4), weights.reshape(2, 4))
        return jax.vmap(one)(*parts).sum()

    def both(implementation):
        def grad(hidden):
            return jax.value_and_grad(loss, (1, 2))(implementation, hidden, kernel)

        return jax.jvp(grad, (hidden,), (hidden,))

    theirs = both("xla")
    with gpu_interpreter():
        ours = both("mosaic_gpu")
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Gradients are rounded to bfloat16 once.
        np.testing.assert_allclose(
            np.asarray(mine, "f"), np.asarray(other, "f"), rtol=1e-2, atol=1e-5
        )
    np.testing.assert_allclose(ours[0][0], theirs[0][0], rtol=1e-6)


def check_forward(layout, classes, taus):
    """Compares the statistics with XLA's, at the blocks that the shape chooses."""
    hidden, kernel, labels = layer(len(TAUS), 64, classes, layout)
    tau = jnp.asarray(taus, jnp.float32) if isinstance(taus, list) else None
    config = Config(
        kernel_layout=layout,
        static_tau=None if isinstance(taus, list) else taus,
        softcap=4.0,
        precision=None,
        workspace_bytes=2**20,
        implementation="mosaic_gpu",
    )
    mask = (jnp.arange(classes) % 5 != 3) if classes > 16 else None
    bias = jnp.linspace(-1, 1, classes, dtype=jnp.bfloat16)
    operands = Operands(hidden, kernel, bias, tau, labels[:, None], mask)
    fold = Statistics(config, WANTED)
    got, _ = jax.jit(fold.forward)(operands)
    expected, _ = jax.jit(fold.by("xla").forward)(operands)
    np.testing.assert_array_equal(got.fields.argmax, expected.fields.argmax)
    np.testing.assert_array_equal(got.number, expected.number)
    for name in FIELDS:
        mine, theirs = (getattr(s.fields, name) for s in (got, expected))
        close(mine, theirs, name, taus)


@pytest.mark.parametrize("classes, taus", [(1, 0.0), (7, TAUS)])
def test_classes_that_no_kernel_reads(classes, taus):
    """Fewer than 8 classes of a kernel [V, H] are the tail: no kernel runs."""
    check_forward("vh", classes, taus)


@pytest.mark.parametrize(
    "layout, classes, taus",
    [("vh", 1009, TAUS), ("vh", 1009, 0.25), ("hv", 16, np.inf), ("hv", 752, 3e38)],
)
def test_what_surrounds_the_kernel(layout, classes, taus):
    """Padding, the tail, the splits and the temperatures, around the kernel."""
    with gpu_interpreter():
        check_forward(layout, classes, taus)


def test_parts_join_as_tiles_merge():
    """A part without classes, and one whose maximum ties with another's."""
    hidden, kernel, labels = cases.layer(7, 8, 48)
    kernel = kernel.at[:, 32:].set(kernel[:, :16])
    fold = Statistics(Config("hv", 0.7, None, None, 2**20, "xla"), WANTED)
    mask = jnp.arange(48) // 16 != 1
    whole = Operands(hidden, kernel, None, None, labels[:, None], mask)
    parts = []
    for first in (0, 16, 32):
        inside = (labels >= first) & (labels < first + 16)
        part = whole._replace(
            kernel=kernel[:, first : first + 16],
            class_mask=mask[first : first + 16],
            labels=jnp.where(inside, labels - first, -1)[:, None],
        )
        tile = compute_tile(fold.config, part, Tiling(7, 16, 7, 16), 0)
        columns = fold.merge(fold.start(7, part), tile, 0.7)
        parts.append(columns | {"argmax": columns["argmax"] + first})
    joined = fold.join(jax.tree.map(lambda *a: jnp.stack(a), *parts), 0.7)
    got = fold.finish(joined, whole)
    expected, _ = fold.forward(whole)
    for mine, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


def test_blocks_and_splits_are_chosen_from_the_shape_alone():
    for rows in (1, 8, 128, 129, 256, 4096, 131072):
        for classes in (16, 4096, 128256, 151936, 262144):
            blocks, splits = planning.choose_gpu_blocks(rows, classes, 128)
            tiles = -(-classes // blocks.classes)
            row_tiles = -(-rows // blocks.block_rows)
            assert 1 <= splits <= tiles and row_tiles % blocks.cluster == 0
            # Large heads lose at most an eighth of the multiprocessors' time.
            busiest = -(-row_tiles * splits // 132) * -(-tiles // splits)
            if classes > 1e5:
                assert row_tiles * tiles >= 0.875 * busiest * 132, (rows, classes)
    assert planning.choose_gpu_blocks(4096, 128256, 128)[0].cluster == 2
    assert planning.choose_gpu_blocks(8, 128256, 128, multiprocessors=16)[1] <= 16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": 32}, "`rows` must be a multiple of 64"),
        ({"classes": 320}, "`classes` one up to 256"),
        ({"rows": 128}, "must be at most 64 · 256 registers"),
        ({"swizzle": 16}, "`swizzle` must be 32, 64 or 128 bytes"),
        ({"features": 32}, "`swizzle` must be 32, 64 or 128 bytes"),
        ({"cluster": 4}, "`cluster` must be 1 or 2"),
        ({"stages": 5}, "bytes of shared memory"),
        ({"tensor_memory": True}, "`rows` must be 128 and `cluster` 1"),
    ],
)
def test_blocks_validate_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        planning.GpuBlocks(**options)
    assert dataclasses.replace(planning.GpuBlocks(), classes=64).ring_bytes == 98304


B = jnp.bfloat16
MESSAGES = [
    (((8, 64), "f"), ((64, 32), "f"), "hv", "must both be bfloat16 or both float16"),
    (((8, 64), B), ((64, 32), "float16"), "hv", "got bfloat16 and float16"),
    (((8, 72), B), ((72, 32), B), "hv", "must be a multiple of 16 .* got 72"),
    (((8, 64), B), ((64, 50257), B), "hv", 'got 50257. .* kernel_layout="vh"'),
    (((8, 64), B), ((64, 32), B), "hv", 'be None or "xla" on cpu, got .mosaic_gpu.'),
]


@pytest.mark.parametrize("hidden, kernel, layout, message", MESSAGES)
def test_messages(hidden, kernel, layout, message):
    hidden, kernel = (jnp.zeros(*a) for a in (hidden, kernel))
    for function in (linear_log_prob, linear_cross_entropy, linear_statistics):
        with pytest.raises(NotImplementedError, match=message):
            function(
                hidden,
                kernel,
                jnp.zeros(8, int),
                kernel_layout=layout,
                implementation="mosaic_gpu",
            )


def test_other_devices_and_a_missing_package(monkeypatch):
    local = jax.local_devices
    found = ["8.0"]

    def devices(*, backend=None):
        if backend != "cuda":
            return local(backend=backend)
        return [
            types.SimpleNamespace(compute_capability=c, core_count=140 + i)
            for i, c in enumerate(found)
        ]

    def run():
        hidden = jnp.zeros((16, 64), B)
        return linear_statistics(hidden, hidden.T, implementation="mosaic_gpu")

    monkeypatch.setattr(jax, "local_devices", devices)
    with pytest.raises(NotImplementedError, match="compute capability 9.0 .* got 8.0"):
        run()
    found[:] = ["9.0", "10.0"]
    with pytest.raises(NotImplementedError, match="got 10.0 and 9.0. Take"):
        run()
    for capability in ("9.0", "10.0"):
        found[:] = [capability] * 2
        assert chips.supported_gpu(("9.0", "10.0")) == (capability, 140)
    plain = builtins.__import__

    def without_absl(name, *args, **options):
        if name == "jax.experimental.pallas.mosaic_gpu":
            raise ModuleNotFoundError("No module named 'absl'", name="absl")
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_absl)
    with pytest.raises(ModuleNotFoundError, match="pip install absl-py"):
        run()
