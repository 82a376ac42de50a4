"""SoftmaxHead: the same numbers as the functions, in NNX and in Linen."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft.nn import SoftmaxHead
from tests.linear import cases

HIDDEN, _, LABELS = cases.layer(6, 8, 50)


def _head(**options):
    return SoftmaxHead(8, 50, rngs=nnx.Rngs(0), **options)


@nnx.jit
def mean_loss(head):
    return head.loss(HIDDEN, LABELS)


@pytest.mark.parametrize("tied", [False, True])
def test_a_workspace_is_what_a_gradient_takes(tied, optimized):
    """Of 32 MiB of logits; a tied head is made anew for a call, and keeps it."""
    mebibyte, taken = 2**20, []
    embedding = nnx.Embed(4096, 16, rngs=nnx.Rngs(0))
    hidden, labels = jnp.ones((2048, 16)), jnp.zeros(2048, jnp.int32)
    for workspace in (4, 16, 64):
        size = workspace * mebibyte
        head = SoftmaxHead(16, 4096, tied=tied, workspace_bytes=size, rngs=nnx.Rngs(0))

        def loss(hidden, head=head):
            own = head.tied_to(embedding) if tied else head
            return own.loss(hidden, labels)

        compiled = jax.jit(jax.grad(loss)).lower(hidden).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        taken.append(memory.temp_size_in_bytes)
        assert taken[-1] <= size + 2 * mebibyte
    assert taken[0] < taken[1] < taken[2] and taken[2] > 32 * mebibyte


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_logits_loss_and_log_prob_agree(tied, softcap):
    rngs = nnx.Rngs(1)
    embedding = nnx.Embed(50, 8, rngs=rngs) if tied else None
    head = _head(embedding=embedding, use_bias=True, logit_softcap=softcap)
    assert head.bias is not None
    head.bias[...] = jnp.linspace(-1, 1, 50)
    taus = (None, 0.5, np.linspace(0.5, 2, 6, dtype=np.float32))

    @nnx.jit
    def results(head):
        logits = head(HIDDEN)
        at_taus = []
        for tau in taus:
            value = 1.0 if tau is None else tau
            column = value if np.ndim(value) == 0 else np.reshape(value, (6, 1))
            at_taus.append(
                (
                    head.loss(HIDDEN, LABELS, temperature=tau, reduction="none"),
                    head.log_prob(HIDDEN, LABELS, temperature=tau),
                    jaxsoft.softmax_cross_entropy(logits, LABELS, column),
                )
            )
        options: Any = {"label_smoothing": 0.1, "z_loss": 0.1}
        smoothed = (
            head.loss(HIDDEN, LABELS, **options),
            jaxsoft.softmax_cross_entropy(logits, LABELS, **options).mean(),
        )
        return logits, at_taus, smoothed

    logits, at_taus, smoothed = results(head)
    assert logits.shape == (6, 50) and logits.dtype == jnp.float32
    for per_token, log_prob, expected in at_taus:
        np.testing.assert_allclose(per_token, expected, rtol=1e-5)
        np.testing.assert_allclose(log_prob, -expected, rtol=1e-5)
    np.testing.assert_allclose(*smoothed, rtol=1e-5)


def test_temperature_of_the_module_and_of_the_call():
    cold, array = _head(temperature=0.5), _head(temperature=jnp.asarray(0.5))

    @nnx.jit
    def losses(cold, plain, array):
        return (
            cold.loss(HIDDEN, LABELS),
            plain.loss(HIDDEN, LABELS, temperature=0.5),
            array.loss(HIDDEN, LABELS),
        )

    of_module, of_call, of_array = losses(cold, _head(), array)
    np.testing.assert_allclose(of_module, of_call, rtol=1e-6)
    np.testing.assert_allclose(of_array, of_module, rtol=1e-6)
    assert "temperature" not in nnx.to_flat_state(nnx.state(array, nnx.Param)).paths


def test_tied_gradients_add_up():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embedding = nnx.Embed(50, 8, rngs=rngs)
            self.head = SoftmaxHead(8, 50, embedding=self.embedding, rngs=rngs)

        def __call__(self, tokens):
            return self.head.loss(self.embedding(tokens), tokens)

    model = Model(nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert [leaf.shape for leaf in leaves] == [(50, 8)]

    def plain(table):
        hidden = table[LABELS]
        logits = hidden @ table.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    @nnx.jit
    def gradients(model):
        own = nnx.grad(lambda model: model(LABELS))(model)
        return own, jax.grad(plain)(model.embedding.embedding[...])

    own, expected = gradients(model)
    (grad,) = jax.tree.leaves(own)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)


def test_dtype_and_param_dtype():
    head = _head(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert head.kernel is not None and head.kernel[...].dtype == jnp.float32

    @nnx.jit
    def results(head, exact):
        value_and_grad = nnx.value_and_grad(lambda head: head.loss(HIDDEN, LABELS))
        return head(HIDDEN), value_and_grad(head), exact.loss(HIDDEN, LABELS)

    logits, (loss, grads), exact = results(head, _head())
    assert logits.dtype == jnp.float32
    assert jax.tree.leaves(grads)[0].dtype == jnp.float32
    np.testing.assert_allclose(loss, exact, rtol=1e-2)
    assert loss != exact


def test_an_optax_step_lowers_the_loss():
    head = _head(use_bias=True)
    optimizer = nnx.Optimizer(head, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(head, optimizer):
        loss, grads = nnx.value_and_grad(lambda h: h.loss(HIDDEN, LABELS))(head)
        optimizer.update(head, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        losses = [float(step(head, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.1 * losses[0]


def test_linen_model_through_the_bridge():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            hidden = nn.Dense(8)(x)
            head = bridge.ToLinen(
                SoftmaxHead, args=(8, 50), kwargs={"use_bias": True}, name="head"
            )
            return head(hidden, labels, nnx_method="loss")

    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), HIDDEN, LABELS)

    @jax.jit
    def results(variables):
        def loss(variables):
            return model.apply(variables, HIDDEN, LABELS)

        params: Any = variables["params"]
        hidden = HIDDEN @ params["Dense_0"]["kernel"]
        hidden += params["Dense_0"]["bias"][None]
        kernel = jax.tree.leaves(params["head"]["kernel"])[0]
        expected = jaxsoft.linear_cross_entropy(hidden, kernel, LABELS)
        return jax.value_and_grad(loss)(variables), expected

    (value, grads), expected = results(variables)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    moved = jax.tree.map(lambda a, g: a - 0.1 * g, variables, grads)
    assert results(moved)[0][0] < value


@pytest.mark.parametrize("tied", [False, True])
def test_sample_and_top_k_are_those_of_the_functions(tied):
    embedding = nnx.Embed(50, 8, rngs=nnx.Rngs(1)) if tied else None
    head = _head(embedding=embedding, use_bias=True, logit_softcap=2.0, temperature=0.5)
    assert head.bias is not None
    head.bias[...] = jnp.linspace(-1, 1, 50)
    key, mask = jax.random.key(3), np.arange(50) % 3 > 0
    taus = (None, 0.0, np.linspace(0.5, 2, 6, dtype=np.float32))

    @nnx.jit
    def results(head, embedding):
        param = head.kernel if embedding is None else embedding.embedding
        options: Any = {
            "bias": head.bias[...],
            "logit_softcap": 2.0,
            "class_mask": mask,
            "kernel_layout": "vh" if tied else "hv",
        }
        # The best classes as leading axes.
        states = jnp.broadcast_to(HIDDEN, (4, *HIDDEN.shape))
        at_taus = []
        for tau in taus:
            value = 0.5 if tau is None else tau
            drawn = head.sample(key, HIDDEN, temperature=tau, class_mask=mask)
            expected = jaxsoft.linear_sample(
                key, HIDDEN, param[...], temperature=value, **options
            )
            best = head.top_k(HIDDEN, 4, temperature=tau, class_mask=mask)
            for_each = jnp.tile(tau, (4, 1)) if isinstance(tau, np.ndarray) else tau
            log_prob = head.log_prob(
                states, best[1].T, temperature=for_each, class_mask=mask
            )
            at_taus.append((drawn, expected, best, log_prob.T))
        return head(HIDDEN), at_taus

    logits, at_taus = results(head, embedding)
    logits = np.where(mask, logits, -np.inf)
    order = np.argsort(-logits, axis=1, kind="stable")
    for drawn, expected, (log_probs, ids), log_prob in at_taus:
        np.testing.assert_array_equal(drawn, expected)
        assert mask[np.asarray(drawn)].all()
        np.testing.assert_array_equal(ids, order[:, :4])
        np.testing.assert_allclose(log_probs, log_prob, rtol=1e-5, atol=1e-6)
    greedy = at_taus[1][0]
    np.testing.assert_array_equal(greedy, logits.argmax(axis=-1))


def test_partition_metadata_places_the_parameters():
    where = {"out_sharding": (None, "vocab"), "eager_sharding": False}
    head = _head(
        use_bias=True,
        kernel_metadata=where,
        bias_metadata={"out_sharding": ("vocab",), "eager_sharding": False},
    )
    state = nnx.state(head, nnx.Param)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
    assert specs == {"kernel": P(None, "vocab"), "bias": P("vocab")}
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("vocab",))
    shardings = nnx.get_named_sharding(state, mesh)
    placed = jax.device_put(state, shardings)
    assert placed["kernel"][...].sharding == NamedSharding(mesh, P(None, "vocab"))
    nnx.update(head, placed)
    np.testing.assert_allclose(
        jax.jit(
            lambda state: nnx.merge(nnx.graphdef(head), state).loss(HIDDEN, LABELS)
        )(nnx.state(head)),
        mean_loss(_head(use_bias=True)),
        rtol=1e-6,
    )


def test_partition_metadata_in_a_mesh_context():
    """As `nnx.Linear`: Flax places a new parameter on the mesh of the context."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("vocab",))
    with jax.set_mesh(mesh):
        head = _head(kernel_metadata={"out_sharding": (None, "vocab")})
    assert head.kernel is not None
    assert head.kernel[...].sharding == NamedSharding(mesh, P(None, "vocab"))


def test_inside_shard_map():
    """On one device; `tests/distributed` has a head on many."""
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "vocab"))
    head = _head(
        kernel_metadata={"out_sharding": (None, "vocab"), "eager_sharding": False},
        vocab_axis=["vocab"],
        token_axes=["data"],
    )
    graph, state = nnx.split(head)
    specs = nnx.get_partition_spec(state)

    def loss(state, hidden, labels):
        return nnx.merge(graph, state).loss(hidden, labels)

    mapped = jax.shard_map(
        loss, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=P()
    )
    np.testing.assert_allclose(
        jax.jit(mapped)(state, HIDDEN, LABELS), mean_loss(_head()), rtol=1e-6
    )
    with pytest.raises(ValueError, match="`vocab_axis` must name axes of an enclosing"):
        _head(vocab_axis="vocab").loss(HIDDEN, LABELS)


def test_decoding_in_linen_through_the_bridge():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            head = bridge.ToLinen(SoftmaxHead, args=(8, 50), name="head")
            drawn = head(jax.random.key(1), x, temperature=0.7, nnx_method="sample")
            return drawn, head(x, 3, nnx_method="top_k")

    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), HIDDEN)

    @jax.jit
    def results(variables):
        kernel = jax.tree.leaves(variables)[0]
        drawn = jaxsoft.linear_sample(
            jax.random.key(1), HIDDEN, kernel, temperature=0.7
        )
        best = jaxsoft.linear_top_k(HIDDEN, kernel, 3)
        return model.apply(variables, HIDDEN), (drawn, best)

    (drawn, (log_probs, ids)), expected = results(variables)
    np.testing.assert_array_equal(drawn, expected[0])
    np.testing.assert_array_equal(ids, expected[1][1])
    np.testing.assert_allclose(log_probs, expected[1][0], rtol=1e-6)


@pytest.mark.parametrize("in_context", [False, True])
def test_logical_partitioning_in_linen(in_context):
    partitioned = {
        "out_sharding": ("embed", "vocab"),
        "sharding_rules": None,
        "eager_sharding": False,
        "linen_meta_type": nn.LogicallyPartitioned,
    }

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            options = {"kernel_metadata": partitioned}
            head = bridge.ToLinen(
                SoftmaxHead, args=(8, 50), kwargs=options, name="head"
            )
            return head(x, labels, nnx_method="loss")

    model, key = Model(), jax.random.key(0)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        names = nn.get_partition_spec(jax.eval_shape(model.init, key, HIDDEN, LABELS))
        assert names["params"]["head"]["kernel"] == P("embed", "vocab")
        rules = (("embed", None), ("vocab", "model"))
        shardings = nn.logical_to_mesh_sharding(  # pyright: ignore[reportPrivateImportUsage]
            names, mesh, rules
        )
        init = jax.jit(model.init, out_shardings=shardings)
        variables: Any = init(key, HIDDEN, LABELS)
        loss = jax.jit(model.apply)(variables, HIDDEN, LABELS)
    boxed = variables["params"]["head"]["kernel"]
    assert isinstance(boxed, nn.LogicallyPartitioned)
    assert boxed.value.sharding == NamedSharding(mesh, P(None, "model"))
    expected = jaxsoft.linear_cross_entropy(HIDDEN, boxed.value, LABELS)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_messages():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="`kernel_metadata` must be empty with a tied"):
        SoftmaxHead(
            8,
            50,
            embedding=nnx.Embed(50, 8, rngs=rngs),
            kernel_metadata={"out_sharding": (None, "vocab")},
            rngs=rngs,
        )
    with pytest.raises(ValueError, match="`embedding` must have shape"):
        SoftmaxHead(8, 50, embedding=nnx.Embed(49, 8, rngs=rngs), rngs=rngs)
    with pytest.raises(ValueError, match="`num_classes` must be at least 1"):
        SoftmaxHead(8, 0, rngs=rngs)
    with pytest.raises(TypeError, match="`hidden` must have a floating"):
        _head().loss(jnp.zeros((6, 8), int), LABELS)
