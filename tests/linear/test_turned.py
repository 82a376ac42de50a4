"""Hidden states that lie feature by feature, as a TPU's values read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import linear_cross_entropy, linear_statistics
from tests import truth
from tests.linear import cases
from tests.linear.test_values import TILE

BARRIER = "optimization_barrier"


@pytest.fixture
def as_on_tpus(monkeypatch):
    """Has this machine run what TPUs run."""

    def choose(*operands, default, tpu=None, **others):
        del others
        return (tpu or default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)


@pytest.mark.parametrize("layout", ["hv", "vh"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_statistics_of_turned_states(kind, layout, as_on_tpus):
    # Of sizes that no other test has: nothing of them was traced for a CPU.
    rows, classes = 21, 1013
    hidden, kernel, labels = cases.layer(rows, 16, classes, kind)
    statistics = functools.partial(
        linear_statistics, kernel_layout=layout, workspace_bytes=TILE
    )
    arrays = (hidden, kernel if layout == "hv" else kernel.T, labels)
    assert BARRIER in str(jax.make_jaxpr(statistics)(*arrays))
    found = statistics(*arrays)
    u = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    plain = np.asarray(hidden) @ np.asarray(kernel)
    for value, of_logits in (
        (found.log_prob, lambda u: truth.log_softmax(u)[np.arange(rows), labels]),
        (found.lse, truth.logsumexp),
        (found.entropy, truth.entropy),
    ):
        truth.assert_as_good(value, of_logits(plain), of_logits(u), slack=2e-6)


def shapes(rows=512, features=128, classes=65536, dtype="bfloat16", mesh=None):
    """Returns states, kernel and labels that are not there; rows on a mesh's axis."""

    def array(shape, dtype, *axes):
        place = None if mesh is None else NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    return (
        array((rows, features), dtype, "data"),
        array((features, classes), dtype),
        array((rows,), "int32", "data"),
    )


def turns(function, arrays, platform="tpu"):
    """Returns how often a lowered program turns states."""
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text().count(BARRIER)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "function", [linear_cross_entropy, jaxsoft.linear_log_prob, linear_statistics]
)
def test_values_for_tpus_turn_the_states(function, dtype):
    assert turns(function, shapes(dtype=dtype)) == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_nobody_else_turns_states(platform):
    assert turns(linear_cross_entropy, shapes(dtype="float32"), platform) == 0


def test_the_copy_is_a_part_of_the_workspace():
    # States that are wider than a tile.
    arrays = shapes(rows=64, features=4096, classes=8192)
    copy = 64 * 4096 * 2
    for workspace, expected in ((6 * copy, 1), (6 * copy - 6, 0)):
        loss = functools.partial(linear_cross_entropy, workspace_bytes=workspace)
        assert turns(loss, arrays) == expected


def test_one_tile_is_no_reason_for_a_copy():
    assert turns(linear_cross_entropy, shapes(classes=1024)) == 0


def test_devices_that_share_rows_turn_theirs():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert turns(linear_cross_entropy, shapes(mesh=mesh)) == 1


def test_shards_of_rows_and_classes_turn_theirs():
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)
    loss = functools.partial(
        linear_cross_entropy, vocab_axis="vocab", token_axes=("data",)
    )
    specs = (P("data"), P(None, "vocab"), P("data"))
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    assert turns(mapped, shapes()) == 1


def test_batches_turn_their_states_as_rows():
    hidden, kernel, labels = shapes()
    batch = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in (hidden, labels)]
    batched = jax.vmap(jaxsoft.linear_log_prob, (0, None, 0))
    assert turns(batched, (batch[0], kernel, batch[1])) == 1


def test_a_program_for_several_platforms_turns_states_on_one():
    export = jax.export.export(jax.jit(linear_cross_entropy), platforms=("cpu", "tpu"))
    text = export(*shapes(dtype="float32")).mlir_module()
    assert text.count(f"stablehlo.{BARRIER}") == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_keeps_tiles_or_reads_them_has_states_as_they_lie(reduction):
    def total(*arrays):
        return linear_cross_entropy(*arrays, reduction=reduction).sum()

    assert turns(jax.grad(total, (0, 1)), shapes()) == 0


def test_derivatives_of_a_gradient_have_states_as_they_lie():
    def slope(hidden, kernel, labels):
        gradient = jax.grad(linear_cross_entropy)(hidden, kernel, labels)
        return (gradient**2).sum(dtype="float32")

    assert turns(jax.grad(slope), shapes()) == 0
