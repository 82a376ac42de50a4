"""Kernels that are taken unasked: where there is evidence, and nowhere else."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._core import defaults, registry
from jaxsoft._core.defaults import Default, Pass
from jaxsoft._core.registry import TPUS, Gpu, compiling_for

FORWARD, BACKWARD = "jaxsoft_statistics_forward", "jaxsoft_statistics_backward"
# What is in the table: the tests' own kernels replace them.
TABLE = defaults.DEFAULTS


@pytest.fixture(autouse=True)
def scheduled(monkeypatch):
    """Takes the forward kernel for a default of every TPU that has a name."""
    table = [
        Default(
            "statistics", "mosaic_tpu", chip, "scheduled", 1024, (1024, 5120), 32768
        )
        for chip in TPUS
    ]
    monkeypatch.setattr(defaults, "DEFAULTS", tuple(table))


def shapes(tokens=2048, hidden=2048, classes=65536, dtype="bfloat16", layout="hv"):
    kernel = (hidden, classes) if layout == "hv" else (classes, hidden)
    return (
        jax.ShapeDtypeStruct((tokens, hidden), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct(kernel, jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def lowered(function, arrays, platform="tpu", chip="v6e"):
    with compiling_for(TPUS.get(chip)):
        traced = jax.jit(function).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def loss(**options):
    return functools.partial(jaxsoft.linear_cross_entropy, **options)


@pytest.mark.parametrize("chip", TPUS)
def test_a_value_is_the_kernels_on_chips_with_evidence(chip):
    assert FORWARD in lowered(loss(), shapes(), chip=chip)
    statistics = lambda h, k, y: jaxsoft.linear_statistics(h, k, y).entropy  # noqa: E731
    assert FORWARD in lowered(statistics, shapes(), chip=chip)
    assert FORWARD in lowered(jaxsoft.linear_log_prob, shapes(), chip=chip)


def test_nobody_else_takes_a_kernel_unasked(monkeypatch):
    covered = shapes()
    for other in (
        lowered(loss(implementation="xla"), covered),
        lowered(loss(), covered, chip="v5p"),
        lowered(loss(), covered, platform="cpu"),
        lowered(loss(), covered, platform="cuda"),
        lowered(loss(), shapes(dtype="float32")),
        lowered(loss(), shapes(tokens=64)),
        lowered(loss(), shapes(hidden=64)),
        lowered(loss(), shapes(classes=512)),
        lowered(jaxsoft.linear_log_prob_at, (*covered[:2], _ids(covered[2]))),
        lowered(_masked, (*covered, jax.ShapeDtypeStruct((2048, 2048), jnp.uint32))),
    ):
        assert "jaxsoft_statistics" not in other
    monkeypatch.setenv(defaults.VARIABLE, "0")
    assert "jaxsoft_statistics" not in lowered(loss(), covered)
    monkeypatch.setenv(defaults.VARIABLE, "1")
    assert FORWARD in lowered(loss(), covered)


def _ids(labels):
    return jax.ShapeDtypeStruct((*labels.shape, 4), jnp.int32)


def _masked(hidden, kernel, labels, bits):
    return jaxsoft.linear_cross_entropy(hidden, kernel, labels, class_bits=bits)


def test_a_gradient_has_kernels_in_passes_that_keep_nothing():
    arrays = shapes()

    def step(reduction, **options):
        def total(hidden, kernel, labels):
            each = loss(reduction=reduction, **options)(hidden, kernel, labels)
            return each.sum()

        return lowered(jax.value_and_grad(total, (0, 1)), arrays)

    # A workspace of a few tiles leaves nothing to keep.
    assert FORWARD in step("none", workspace_bytes=2**20)
    # Chunks of tokens keep what spares the second product.
    assert FORWARD not in step("mean")
    assert FORWARD not in step("none", workspace_bytes=2**31)


def test_devices_that_share_a_call_take_none_outside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    hidden, kernel, labels = shapes(tokens=8192)
    arrays = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        for a, s in ((hidden, rows), (kernel, whole), (labels, rows))
    ]
    assert "jaxsoft_statistics" not in lowered(loss(), arrays)
    over = jaxsoft.over_mesh(jaxsoft.linear_cross_entropy, mesh, token_axes=("data",))
    assert FORWARD in lowered(over, arrays)


@pytest.mark.parametrize(
    "change, is_covered",
    [
        ({}, True),
        ({"rows": 1023}, False),
        ({"features": 1023}, False),
        ({"features": 5121}, False),
        ({"features": 5120}, True),
        ({"classes": 32767}, False),
        ({"dtypes": ("bfloat16", "float32")}, False),
        ({"layout": "vh"}, False),
        ({"step": "draw"}, False),
    ],
)
def test_evidence_is_of_sizes(change, is_covered):
    default = Default(
        "statistics", "mosaic_tpu", "v6e", "scheduled", 1024, (1024, 5120), 32768
    )
    of = Pass("statistics", 1024, 1024, 32768, ("bfloat16", "bfloat16"), "hv")
    assert default.covers(of._replace(**change)) == is_covered


def test_without_evidence_nobody_takes_a_kernel(monkeypatch):
    monkeypatch.setattr(defaults, "DEFAULTS", ())
    assert "jaxsoft_statistics" not in lowered(loss(), shapes())


def test_no_kernel_of_a_gpu_is_a_default_before_it_was_timed():
    for default in TABLE:
        platform = registry.platform_of(default.implementation)
        assert platform == "tpu" or default.evidence == "timed", default
        assert registry.kernel(default.step, default.implementation) is not None


def test_the_tpu_of_a_process_is_known_by_its_kind(monkeypatch):
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    kinds = []
    monkeypatch.setattr(
        jax, "local_devices", lambda backend: [Device(kind) for kind in kinds]
    )
    for given, name in (
        (["TPU v5 lite"] * 4, "v5e"),
        (["TPU v6 lite"], "v6e"),
        (["TPU7x"], "7x"),
        (["TPU v4"], None),
        (["TPU v5 lite", "TPU v6 lite"], None),
        ([], None),
    ):
        kinds[:] = given
        found = registry.tpu()
        assert (found and found.name) == name
    kinds[:] = ["TPU v6 lite"]
    with compiling_for(Gpu("9.0", 132)):
        assert registry.tpu() is None
    with compiling_for(TPUS["7x"]):
        assert registry.tpu() == TPUS["7x"] and registry.gpus() == []


def test_no_kernel_is_imported_where_there_is_no_tpu():
    code = (
        "import sys, jax, jaxsoft, jax.numpy as jnp\n"
        "h, k = jnp.ones((4, 8), 'bfloat16'), jnp.ones((8, 16), 'bfloat16')\n"
        "print(jaxsoft.linear_cross_entropy(h, k, jnp.arange(4)))\n"
        "assert not any(name.startswith('jaxsoft.kernels') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(float(done.stdout), np.log(16), rtol=1e-5)
