"""Every public function on meshes whose axes are Auto, Explicit, or some of each."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft.nn import (
    AdaptiveSoftmaxHead,
    GumbelSoftmax,
    HierarchicalSoftmaxHead,
    SampledSoftmaxHead,
    SoftmaxHead,
)

ROWS, FEATURES, CLASSES = 16, 8, 32
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MODES = {
    "explicit": (EXPLICIT, EXPLICIT),
    "explicit tokens": (EXPLICIT, AUTO),
    "explicit classes": (AUTO, EXPLICIT),
    "auto": (AUTO, AUTO),
}
SPECS = {
    "hidden": P("data"),
    "logits": P("data"),
    "labels": P("data"),
    "class_ids": P("data"),
    "log_probs": P("data"),
    "temperature": P("data"),
    "kernel": P(None, "vocab"),
}


@functools.cache
def arguments():
    """Returns the arrays that the calls take, by their names."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    logits = normal(ROWS, CLASSES)
    log_probs, class_ids = jax.lax.top_k(jax.nn.log_softmax(logits), 4)
    return {
        "hidden": normal(ROWS, FEATURES),
        "kernel": normal(FEATURES, CLASSES),
        "node_kernel": normal(CLASSES - 1, FEATURES),
        "head_kernel": normal(FEATURES, 9),
        "projection": normal(FEATURES, 4),
        "tail_kernel": normal(4, CLASSES - 8),
        "logits": logits,
        "labels": rng.integers(0, CLASSES, ROWS).astype("int32"),
        "class_ids": np.asarray(class_ids),
        "log_probs": np.asarray(log_probs),
        "temperature": rng.uniform(0.5, 2, ROWS).astype("float32"),
        "key": np.asarray(jax.random.key_data(jax.random.key(0))),
    }


TREE = jaxsoft.ClassTree.balanced(CLASSES)
BANDS = jaxsoft.ClassBands.in_order(CLASSES, (8,))
SAMPLER = jaxsoft.ClassSampler.uniform(CLASSES)


def logits_of(name, *others, **options):
    """Returns the call of a function of stored logits, its other arrays by name."""

    def call(a):
        function = getattr(jaxsoft, name)
        return function(a["logits"], *(a[other] for other in others), **options)

    return call


def layer_of(name, *others, **options):
    """Returns the call of a function of hidden states and a kernel."""

    def call(a, wrap=lambda function: function):
        function = wrap(getattr(jaxsoft, name))
        arrays = (a[other] for other in others)
        return function(a["hidden"], a["kernel"], *arrays, **options)

    return call


def tails(a):
    """Returns the tails of an adaptive layer."""
    return [jaxsoft.AdaptiveTail(a["projection"], a["tail_kernel"])]


def every_option(a, wrap=lambda function: function):
    """Returns losses and statistics, with a temperature for each row."""
    return wrap(jaxsoft.linear_cross_entropy)(
        a["hidden"],
        a["kernel"],
        a["labels"],
        temperature=a["temperature"],
        label_smoothing=0.1,
        z_loss=0.01,
        reduction="none",
        return_statistics=True,
    )


def drawn(a, wrap=lambda function: function):
    """Returns draws from a layer."""
    return wrap(jaxsoft.linear_sample)(a["key"], a["hidden"], a["kernel"])


LOGITS = {
    name: logits_of(name) for name in ("softmax", "log_softmax", "logsumexp", "entropy")
} | {
    "softmax_cross_entropy": logits_of("softmax_cross_entropy", "labels"),
    "fit_temperature": logits_of("fit_temperature", "labels"),
    "boltzmann_policy": logits_of("boltzmann_policy", temperature=0.7),
    "boltzmann_operator": logits_of("boltzmann_operator", temperature=0.7),
    "soft_argmax": logits_of("soft_argmax", temperature=0.7),
    "expected_calibration_error": lambda a: jaxsoft.expected_calibration_error(
        jaxsoft.softmax(a["logits"]), a["labels"]
    ),
    "distillation_loss": lambda a: jaxsoft.distillation_loss(
        a["logits"], 2 * a["logits"], 2.0
    ),
    "distillation_loss_top_k": logits_of(
        "distillation_loss_top_k", "class_ids", "log_probs"
    ),
    "codistillation_loss": lambda a: jaxsoft.codistillation_loss(
        jnp.stack([a["logits"], 2 * a["logits"]])
    ),
    "concrete_log_prob": lambda a: jaxsoft.concrete_log_prob(
        jaxsoft.softmax(a["logits"]), a["logits"], 1.0
    ),
    "sample": lambda a: jaxsoft.sample(a["key"], a["logits"]),
    "sample top-p": lambda a: jaxsoft.sample(a["key"], a["logits"], top_p=0.9),
    "speculative_sample": lambda a: jaxsoft.speculative_sample(
        a["key"], a["logits"], 2 * a["logits"], a["labels"]
    ),
    "sample log-prob": lambda a: jaxsoft.sample(
        a["key"], a["logits"], top_n_sigma=1.5, top_k=5, return_log_prob=True
    ),
    "gumbel_softmax": lambda a: jaxsoft.gumbel_softmax(a["key"], a["logits"]),
    "gumbel_top_k": lambda a: jaxsoft.gumbel_top_k(a["key"], a["logits"], 3),
    "reinmax": lambda a: jaxsoft.reinmax(a["key"], a["logits"]),
    "gumbel_rao": lambda a: jaxsoft.gumbel_rao(a["key"], a["logits"]),
}
LAYERS = {
    "linear_cross_entropy": layer_of("linear_cross_entropy", "labels"),
    "every option": every_option,
    "linear_log_prob": layer_of("linear_log_prob", "labels"),
    "linear_log_prob_at": layer_of("linear_log_prob_at", "class_ids"),
    "linear_statistics": layer_of("linear_statistics", "labels"),
    "ranks": layer_of("linear_statistics", "labels", return_rank=True, return_top_k=3),
    "linear_top_k": layer_of("linear_top_k", k=3),
    "linear_sample": drawn,
    "linear_expected": lambda a, wrap=lambda function: function: wrap(
        jaxsoft.linear_expected
    )(a["hidden"], a["kernel"], a["kernel"].T),
    "linear_fit_temperature": layer_of("linear_fit_temperature", "labels"),
    "linear_distillation": lambda a, wrap=lambda function: function: wrap(
        jaxsoft.linear_distillation
    )(a["hidden"], a["kernel"], a["hidden"], 2 * a["kernel"]),
    "linear_distillation_top_k": layer_of(
        "linear_distillation_top_k", "class_ids", "log_probs"
    ),
    "linear_distillation_top_k drop": layer_of(
        "linear_distillation_top_k",
        "class_ids",
        "log_probs",
        remaining="drop",
        divergence="reverse_kl",
    ),
}
OTHERS = {
    "stored logits": layer_of(
        "linear_cross_entropy", "labels", implementation="reference"
    ),
    "nt_xent": lambda a: jaxsoft.nt_xent(a["hidden"], 2 * a["hidden"]),
    "clip_loss": lambda a: jaxsoft.clip_loss(a["hidden"], 2 * a["hidden"]),
    "supervised_contrastive": lambda a: jaxsoft.supervised_contrastive(
        a["hidden"], a["labels"] % 4
    ),
    "in_batch_cross_entropy": lambda a: jaxsoft.in_batch_cross_entropy(
        a["hidden"],
        2 * a["hidden"],
        a["temperature"],
        a["labels"] % 4,
        (a["kernel"].T, None, jnp.arange(CLASSES) % 5),
        return_statistics=True,
        reduction="none",
    ),
    "hierarchical_log_prob": lambda a: jaxsoft.hierarchical_log_prob(
        a["hidden"], a["node_kernel"], a["labels"], TREE
    ),
    "hierarchical_log_probs": lambda a: jaxsoft.hierarchical_log_probs(
        a["hidden"], a["node_kernel"], TREE
    ),
    "hierarchical_sample": lambda a: jaxsoft.hierarchical_sample(
        a["key"], a["hidden"], a["node_kernel"], TREE
    ),
    "hierarchical_top_k": lambda a: jaxsoft.hierarchical_top_k(
        a["hidden"], a["node_kernel"], 3, TREE
    ),
    "hierarchical_value_and_row_grad": (
        lambda a: jaxsoft.hierarchical_value_and_row_grad(
            a["hidden"], a["node_kernel"], a["labels"], TREE
        )[:2]
    ),
    "adaptive_log_prob": lambda a: jaxsoft.adaptive_log_prob(
        a["hidden"], a["head_kernel"], tails(a), a["labels"], BANDS
    ),
    "adaptive_log_probs": lambda a: jaxsoft.adaptive_log_probs(
        a["hidden"], a["head_kernel"], tails(a), BANDS
    ),
    "adaptive_sample": lambda a: jaxsoft.adaptive_sample(
        a["key"], a["hidden"], a["head_kernel"], tails(a), BANDS
    ),
    "adaptive_top_k": lambda a: jaxsoft.adaptive_top_k(
        a["hidden"], a["head_kernel"], tails(a), 3, BANDS
    ),
    "sampled_softmax_loss": lambda a: jaxsoft.sampled_softmax_loss(
        a["key"], a["hidden"], a["kernel"], a["labels"], 16, sampler=SAMPLER
    ),
}
CALLS = LOGITS | LAYERS | OTHERS


def value_and_gradients(call):
    """Returns a function of the arrays: the results, and the gradients of their sum."""

    def total(floats, a):
        leaves = jax.tree.leaves(call({**a, **floats}))
        kept = [jnp.where(jnp.isfinite(x), x, 0) for x in leaves if is_floating(x)]
        return sum(jnp.sum(x) for x in kept)

    def both(a):
        floats = {name: x for name, x in a.items() if is_floating(x)}
        results = call(a)
        if not any(map(is_floating, jax.tree.leaves(results))):
            return results, {}
        return results, jax.grad(total)(floats, a)

    return jax.jit(both)


def is_floating(array):
    """Whether an array has a slope; keys and class ids have none."""
    return jnp.issubdtype(array.dtype, jnp.floating)


@functools.cache
def on_one_device(name):
    """Returns the results and the gradients of one device."""
    a = {name: jax.device_put(x, jax.devices()[0]) for name, x in arguments().items()}
    return jax.tree.map(np.asarray, value_and_gradients(CALLS[name])(a))


def assert_equal(found, name):
    """Holds results and gradients against those of one device."""
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(on_one_device(name)), strict=True
    ):
        np.testing.assert_allclose(np.asarray(a), b, rtol=3e-5, atol=3e-5)


def mesh_of(mode):
    """Returns four shards of the tokens times two of the classes."""
    return jax.make_mesh((4, 2), ("data", "vocab"), axis_types=MODES[mode])


def on(mesh, specs=SPECS):
    """Returns the arrays on a mesh."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
        for name, x in arguments().items()
    }


@contextlib.contextmanager
def context_of(mesh, is_set):
    """Enters `jax.set_mesh`, or nothing."""
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        yield


# Of the default tier, on a mesh that is Explicit and set: one function of each way in
# which functions compute.
DEFAULT = (
    "softmax",
    "softmax_cross_entropy",
    "sample",
    "gumbel_softmax",
    "linear_cross_entropy",
    "linear_top_k",
    "linear_expected",
    "linear_fit_temperature",
    "clip_loss",
    "hierarchical_log_prob",
    "hierarchical_top_k",
    "adaptive_log_prob",
    "sampled_softmax_loss",
    "stored logits",
)


def cases(names, default=DEFAULT):
    """Returns functions in all modes, on a mesh that is set or not."""
    found = []
    for mode, is_set in [(mode, True) for mode in MODES] + [("explicit", False)]:
        how = "set_mesh" if is_set else "arguments"
        for name in names:
            is_default = name in default and mode == "explicit" and is_set
            marks = () if is_default else pytest.mark.slow
            case = (mode, is_set, name)
            found.append(pytest.param(*case, id=f"{mode}-{how}-{name}", marks=marks))
    return found


@pytest.mark.parametrize("mode, is_set, name", cases(CALLS))
def test_sharded_arguments_are_enough(mode, is_set, name):
    """Values and gradients are those of one device, by plain jit."""
    mesh = mesh_of(mode)
    with context_of(mesh, is_set):
        found = value_and_gradients(CALLS[name])(on(mesh))
    assert_equal(found, name)
    if MODES[mode][0] == EXPLICIT:
        for leaf in jax.tree.leaves(found[0]):
            if ROWS in leaf.shape:
                rows = leaf.shape.index(ROWS)
                assert jax.typeof(leaf).sharding.spec[rows] == "data"
    for argument, gradient in found[1].items():
        assert gradient.sharding.is_equivalent_to(
            NamedSharding(mesh, SPECS.get(argument, P())), gradient.ndim
        ) or MODES[mode] != (EXPLICIT, EXPLICIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["explicit", "auto"])
def test_arguments_that_are_not_sharded(mode, name):
    """Under `jax.set_mesh` arrays of one device, or NumPy's, are taken too."""
    with jax.set_mesh(mesh_of(mode)):
        found = value_and_gradients(CALLS[name])(arguments())
    assert_equal(found, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("mode", ["explicit", "explicit tokens"])
def test_classes_of_stored_logits_are_sharded(mode, name):
    """Stored logits may be sharded over their classes as well."""
    mesh = mesh_of(mode)
    with jax.set_mesh(mesh):
        a = on(mesh, SPECS | {"logits": P("data", "vocab")})
        found = value_and_gradients(CALLS[name])(a)
    assert_equal(found, name)


@pytest.mark.parametrize("mode, is_set, name", cases(LAYERS, ["linear_sample"]))
def test_over_mesh(mode, is_set, name):
    """`over_mesh` takes arrays of every type."""
    mesh = mesh_of(mode)
    over = functools.partial(
        jaxsoft.over_mesh, mesh=mesh, vocab_axis="vocab", token_axes=("data",)
    )
    with context_of(mesh, is_set):
        call = functools.partial(CALLS[name], wrap=over)
        found = value_and_gradients(call)(on(mesh))
    assert_equal(found, name)


@pytest.mark.parametrize(
    "mode, is_set, name",
    cases(["linear_cross_entropy", "linear_sample"], ["linear_cross_entropy"]),
)
def test_inside_ones_own_shard_map(mode, is_set, name):
    """A function that is called inside `jax.shard_map` names the axes itself."""
    mesh = mesh_of(mode)

    def inside(function):
        return functools.partial(function, vocab_axis="vocab", token_axes=("data",))

    a = on(mesh)
    names = ("key", "hidden", "kernel", "labels")
    out_specs = P("data") if name == "linear_sample" else P()

    def mapped(*arrays):
        given = dict(zip(names, arrays, strict=True))
        return LAYERS[name](given, wrap=inside)

    with context_of(mesh, is_set):
        call = jax.shard_map(
            mapped,
            mesh=mesh,
            in_specs=tuple(SPECS.get(n, P()) for n in names),
            out_specs=out_specs,
        )
        found = jax.jit(call)(*(a[n] for n in names))
    np.testing.assert_allclose(found, on_one_device(name)[0], rtol=3e-5)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "softmax", "linear_sample"])
@pytest.mark.parametrize("is_set", [True, False])
def test_without_jit(is_set, name):
    """Functions are called one by one, without jit around them."""
    mesh = mesh_of("explicit")
    with context_of(mesh, is_set):
        found = CALLS[name](on(mesh))
    np.testing.assert_allclose(found, on_one_device(name)[0], rtol=3e-5)


def test_gradients_of_short_floats_over_one_axis_of_two():
    """XLA for CPUs ended the process where it rewrote their sum over the classes."""
    names = ("hidden", "kernel")
    a = {name: arguments()[name].astype("bfloat16") for name in names}
    labels = arguments()["labels"]

    def step(hidden, kernel):
        loss = functools.partial(
            jaxsoft.linear_cross_entropy, labels=labels, workspace_bytes=2**9
        )
        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    one = jax.tree.map(np.asarray, jax.jit(step)(a["hidden"], a["kernel"]))
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        hidden, kernel = (
            jax.device_put(a[name], NamedSharding(mesh, spec))
            for name, spec in zip(names, (P(), P(None, "vocab")), strict=True)
        )
        found = jax.jit(step)(hidden, kernel)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, "float32"), np.asarray(y, "float32"), rtol=2e-2, atol=1e-3
        )


def test_nothing_is_gathered():
    """Neither hidden states nor the kernel leave their devices."""
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        call = value_and_gradients(CALLS["linear_cross_entropy"])
        names = ("hidden", "kernel", "labels")
        a = {name: x for name, x in on(mesh).items() if name in names}
        text = call.lower(a).compile().as_text()
    assert text is not None
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_two_axes_of_tokens():
    """Batch and length may both be sharded, and the results are so as well."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "length", "vocab"))
    a = arguments()
    hidden = a["hidden"].reshape(4, 4, FEATURES)
    labels = a["labels"].reshape(4, 4)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        log_prob, entropy = jax.jit(jaxsoft.linear_log_prob)(
            put(hidden, "data", "length"),
            put(a["kernel"], None, "vocab"),
            put(labels, "data", "length"),
        )
    assert jax.typeof(log_prob).sharding.spec == P("data", "length")
    one = on_one_device("linear_log_prob")[0]
    np.testing.assert_allclose(np.ravel(log_prob), one[0], rtol=3e-5)
    np.testing.assert_allclose(np.ravel(entropy), one[1], rtol=3e-5)


def test_features_that_are_sharded():
    """Of the two contracted axes one may be sharded, not both."""
    mesh = mesh_of("explicit")
    both = SPECS | {"hidden": P(None, "vocab"), "kernel": P("data")}
    one = SPECS | {"kernel": P("data", "vocab"), "hidden": P()}
    call = value_and_gradients(CALLS["linear_cross_entropy"])
    with jax.set_mesh(mesh):
        found = call(on(mesh, one))
        with pytest.raises(ValueError, match="over_mesh"):
            call(on(mesh, both))
    assert_equal(found, "linear_cross_entropy")


@pytest.mark.parametrize("vocab_axis", ["data", ("data", "vocab")])
def test_an_axis_of_tokens_and_of_classes(vocab_axis):
    """`over_mesh` gathers the classes over it; elsewhere it is an error."""
    mesh = mesh_of("auto")
    axes = {"vocab_axis": vocab_axis, "token_axes": ("data",)}
    for name in ("linear_cross_entropy", "linear_sample"):
        call = functools.partial(
            CALLS[name], wrap=lambda f: jaxsoft.over_mesh(f, mesh, **axes)
        )
        assert_equal(value_and_gradients(call)(on(mesh)), name)
    a = arguments()
    with pytest.raises(ValueError, match="`token_axes` must not share a mesh axis"):
        jaxsoft.linear_cross_entropy(a["hidden"], a["kernel"], a["labels"], **axes)


HEADS = {
    "softmax": functools.partial(
        SoftmaxHead,
        FEATURES,
        CLASSES,
        use_bias=True,
        logit_softcap=5.0,
        kernel_metadata={"out_sharding": (None, "vocab")},
        bias_metadata={"out_sharding": ("vocab",)},
    ),
    "hierarchical": functools.partial(HierarchicalSoftmaxHead, FEATURES, TREE),
    "adaptive": functools.partial(AdaptiveSoftmaxHead, FEATURES, BANDS),
    "sampled": functools.partial(SampledSoftmaxHead, FEATURES, CLASSES, 16, SAMPLER),
}


@pytest.mark.parametrize(
    "name",
    [
        "softmax",
        *(pytest.param(n, marks=pytest.mark.slow) for n in HEADS if n != "softmax"),
    ],
)
def test_heads(name):
    """Heads whose parameters and tokens are sharded by types do as on one device."""

    def use(head, hidden, labels):
        def loss(head):
            return head.loss(hidden, labels, ignore_label=0)

        value, gradients = nnx.value_and_grad(loss)(head)
        key, parameters = jax.random.key(1), nnx.state(gradients, nnx.Param)
        results = head.log_prob(hidden, labels), head.top_k(hidden, 3)[:2]
        return value, parameters, results, head.sample(key, hidden), head(hidden)

    a = arguments()
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "vocab"))):
        one = nnx.jit(use)(HEADS[name](rngs=nnx.Rngs(0)), a["hidden"], a["labels"])
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        head = HEADS[name](rngs=nnx.Rngs(0))
        if name == "softmax":
            spec = jax.typeof(head.kernel[...]).sharding.spec
            assert spec == SPECS["kernel"]
        sharded = on(mesh)
        found = nnx.jit(use)(head, sharded["hidden"], sharded["labels"])
    assert jax.typeof(found[3]).sharding.spec == P("data")
    for x, y in zip(*(jax.tree.leaves(tree) for tree in (found, one)), strict=True):
        np.testing.assert_allclose(
            np.asarray(x), np.asarray(y), rtol=3e-5, atol=3e-5, err_msg=name
        )


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_inside_a_shard_map_over_some_axes(kind):
    """Another axis of the mesh, whatever its type, changes no gradient."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "vocab", "x"), axis_types=(AUTO,) * 2 + (kind,)
    )
    a = arguments()
    specs = tuple(SPECS[name] for name in ("hidden", "kernel", "labels"))

    def gradient(hidden, kernel, labels):
        axes = {"vocab_axis": "vocab", "token_axes": ("data",)}
        loss = functools.partial(jaxsoft.linear_cross_entropy, **axes)
        return jax.grad(loss, 1)(hidden, kernel, labels)

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            gradient,
            in_specs=specs,
            out_specs=SPECS["kernel"],
            axis_names={"data", "vocab"},
        )
        found = jax.jit(mapped)(a["hidden"], a["kernel"], a["labels"])
    one = on_one_device("linear_cross_entropy")[1]["kernel"]
    np.testing.assert_allclose(found, one, rtol=3e-5, atol=1e-6)


def test_what_is_made_of_results():
    """Statistics have properties, and rows of gradients are what optimizers take."""
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        a = on(mesh)
        statistics = jaxsoft.linear_statistics(a["hidden"], a["kernel"], a["labels"])
        lse = statistics.lse
        assert jax.typeof(lse).sharding.spec == P("data")
        _, _, gradient = jaxsoft.hierarchical_value_and_row_grad(
            a["hidden"], a["node_kernel"], a["labels"], TREE
        )
        optimizer = jaxsoft.row_sgd(1.0)
        state = optimizer.init(a["node_kernel"])
        moved, _ = optimizer.update(a["node_kernel"], gradient, state)
        paths = TREE.paths(a["labels"])
        assert jax.typeof(paths.choices).sharding.spec[0] == "data"
        assert jax.typeof(SAMPLER.log_prob(a["labels"])).sharding.spec == P("data")
    b = arguments()
    np.testing.assert_allclose(
        lse, jaxsoft.logsumexp(b["hidden"] @ b["kernel"]), rtol=1e-5
    )
    slope = jax.grad(
        lambda w: (
            -jaxsoft.hierarchical_log_prob(b["hidden"], w, b["labels"], TREE).mean()
        )
    )(b["node_kernel"])
    np.testing.assert_allclose(moved, b["node_kernel"] - slope, rtol=1e-4, atol=1e-5)


def test_gradients_without_jit():
    """Tokens over one axis of two, and nothing over the other."""
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        a = on(mesh, SPECS | {"kernel": P()})
        found = jax.grad(jaxsoft.linear_cross_entropy, 1)(
            a["hidden"], a["kernel"], a["labels"]
        )
    one = on_one_device("linear_cross_entropy")[1]["kernel"]
    np.testing.assert_allclose(found, one, rtol=3e-5, atol=1e-6)


def test_a_layer_after_training():
    """`GumbelSoftmax` gives the argmax of logits whose classes are sharded."""
    mesh, layer = mesh_of("explicit"), GumbelSoftmax(rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        a = on(mesh, SPECS | {"logits": P("data", "vocab")})
        found = layer(a["logits"], deterministic=True)
    assert jax.typeof(found).sharding.spec == P("data", "vocab")
    truth = arguments()["logits"].argmax(1)
    np.testing.assert_array_equal(np.asarray(found).argmax(1), truth)
    np.testing.assert_array_equal(np.asarray(found).sum(1), 1)
