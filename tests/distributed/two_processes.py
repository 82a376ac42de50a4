"""One of two processes that share a mesh; started by `test_two_processes.py`.

Arguments: the coordinator's port and this process's number. Each process has two
virtual CPU devices, computes the expected values alone on one of them, and compares
the shards that it holds of what all four compute together.
"""

import functools
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft.nn import SoftmaxHead

ROWS, FEATURES, CLASSES = 12, 8, 1000
IN_SPECS = (P("data"), P(None, "vocab"), P("vocab"))
OPTIONS = {"ignore_label": -100, "z_loss": 1e-2, "label_smoothing": 0.1}


def layer():
    """Hidden states, kernel, bias and labels, the same in both processes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, ROWS)
    labels[:4] = [0, CLASSES - 1, -100, CLASSES // 2]
    return (
        rng.standard_normal((ROWS, FEATURES)).astype(np.float32),
        rng.standard_normal((FEATURES, CLASSES)).astype(np.float32),
        rng.standard_normal(CLASSES).astype(np.float32),
        labels.astype(np.int32),
    )


def meshes():
    """One whose vocabulary lies within a process, two whose crosses both."""
    devices = np.asarray(jax.devices()).reshape(2, 2)
    for name, array, kind in (
        ("within", devices, AxisType.Auto),
        ("across", devices.T, AxisType.Auto),
        ("explicit", devices.T, AxisType.Explicit),
    ):
        yield name, Mesh(array, ("data", "vocab"), axis_types=(kind, kind))


def place(mesh, array, spec):
    """A global array, of which each process makes the shards that it holds."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def loss(hidden, kernel, bias, labels, **axes):
    """The mean cross-entropy of all tokens."""
    return jaxsoft.linear_cross_entropy(
        hidden, kernel, labels, bias=bias, **OPTIONS, **axes
    )


def sample(key, hidden, kernel, bias, **axes):
    """A class for each token."""
    return jaxsoft.linear_sample(key, hidden, kernel, bias=bias, **axes)


def compare(name, actual, expected):
    """Compares what this process holds of global arrays with whole local ones."""

    def check(global_array, whole):
        assert not global_array.is_fully_addressable
        whole = np.asarray(whole)
        for shard in global_array.addressable_shards:
            np.testing.assert_allclose(
                shard.data, whole[shard.index], rtol=1e-5, atol=1e-6, err_msg=name
            )

    jax.tree.map(check, actual, expected)
    print("right:", name, flush=True)


def check_mesh(name, mesh, expected, classes):
    """Compares gradients and samples on one mesh, in shard_map and under plain jit."""
    arrays = layer()
    specs = (*IN_SPECS, P("data"))
    placed = [place(mesh, a, s) for a, s in zip(arrays, specs, strict=True)]
    axes = {"vocab_axis": "vocab", "token_axes": "data"}
    sharded = functools.partial(loss, **axes)
    value_and_grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs)
    programs = {
        "plain jit": value_and_grad(loss),
        "gradient of shard_map": value_and_grad(shard(sharded, out_specs=P())),
        "gradient in shard_map": shard(
            value_and_grad(sharded), out_specs=(P(), IN_SPECS)
        ),
    }
    for program, function in programs.items():
        value, gradients = jax.jit(function)(*placed)
        compare(f"{name}, {program}", (value, gradients), expected)
        for array, gradient in zip(placed, gradients, strict=False):
            assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)
    key = jax.random.key(7)
    drawn = jax.jit(functools.partial(sample, key))(*placed[:3])
    compare(f"{name}, sample under plain jit", drawn, classes)
    mapped = jax.shard_map(
        functools.partial(sample, key, **axes),
        mesh=mesh,
        in_specs=IN_SPECS,
        out_specs=P("data"),
    )
    compare(f"{name}, sample in shard_map", jax.jit(mapped)(*placed[:3]), classes)


def build_head(**axes):
    """A head whose metadata puts its classes on `vocab`."""
    return SoftmaxHead(
        FEATURES,
        CLASSES,
        use_bias=True,
        kernel_metadata={"out_sharding": (None, "vocab"), "eager_sharding": False},
        bias_metadata={"out_sharding": ("vocab",), "eager_sharding": False},
        rngs=nnx.Rngs(0),
        **axes,
    )


def use_head(graph, state, hidden, labels):
    """Calls all methods of a head."""
    head = nnx.merge(graph, state)
    drawn = head.sample(jax.random.key(7), hidden)
    best = head.top_k(hidden, 3)
    loss = head.loss(hidden, labels, ignore_label=-100)
    return head(hidden), head.log_prob(hidden, drawn), loss, drawn, best


def check_head(name, mesh):
    """Compares a head on a mesh, in shard_map and under plain jit, with one alone."""
    hidden, _, _, labels = layer()
    graph, state = nnx.split(build_head())
    expected = use_head(graph, state, hidden, labels)
    shardings = nnx.get_named_sharding(state, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: place(mesh, np.asarray(leaf), sharding.spec),
        state,
        shardings,
    )
    arguments = state, place(mesh, hidden, P("data")), place(mesh, labels, P("data"))
    plain = jax.jit(functools.partial(use_head, graph))
    compare(f"{name}, head under plain jit", plain(*arguments), expected)
    graph = nnx.graphdef(build_head(vocab_axis="vocab", token_axes=("data",)))
    rows = P("data")
    mapped = jax.shard_map(
        functools.partial(use_head, graph),
        mesh=mesh,
        in_specs=(nnx.get_partition_spec(state), rows, rows),
        out_specs=(P("data", "vocab"), rows, P(), rows, (rows, rows)),
    )
    compare(f"{name}, head in shard_map", jax.jit(mapped)(*arguments), expected)


def run(port, process):
    """Joins the other process, then checks everything."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    assert jax.process_count() == 2 and jax.device_count() == 4
    hidden, kernel, bias, labels = layer()
    expected = jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, kernel, bias, labels)
    classes = sample(jax.random.key(7), hidden, kernel, bias)
    for name, mesh in meshes():
        check_mesh(name, mesh, expected, classes)
        if name != "within":
            check_head(name, mesh)
    jax.distributed.shutdown()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
