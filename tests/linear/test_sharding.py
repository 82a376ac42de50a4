"""Classes and tokens over a mesh of eight devices: every function equals one device."""

import functools
import inspect
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

import jaxsoft
from jaxsoft.linear import mesh as meshes
from tests.truth import DIVERGENCES as OPTIONS
from tests.truth import log_softmax

ROWS, FEATURES, OTHER, CLASSES, WIDTH = 24, 8, 6, 1208, 5
TILE = 4 * 8 * 256
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward")
LAYOUTS = {"2 × 4": ((2, 4), ("data", "vocab")), "8": ((8,), ("vocab",))}


@functools.cache
def arguments(rows=ROWS, classes=CLASSES):
    """Returns the arrays that the calls take, by their names."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    labels = rng.integers(0, classes, rows).astype("int32")
    mask = rng.uniform(size=classes) < 0.7
    mask[labels] = True
    return {
        "hidden": normal(rows, FEATURES),
        "kernel": normal(FEATURES, classes),
        "bias": normal(classes),
        "temperature": rng.uniform(0.5, 2, rows).astype("float32"),
        "values": normal(classes, WIDTH),
        "teacher_hidden": normal(rows, OTHER),
        "teacher_kernel": normal(OTHER, classes),
        "weights": rng.uniform(0, 2, rows).astype("float32"),
        "labels": labels,
        "class_mask": mask,
    }


def shardings(data, vocab):
    """Returns the specification of each argument."""
    tokens, classes = P(data), P(vocab)
    names = {"kernel": P(None, vocab), "teacher_kernel": P(None, vocab)}
    names |= dict.fromkeys(("bias", "values", "class_mask"), classes)
    return {name: names.get(name, tokens) for name in arguments()}


def shared(a, *names):
    """Returns the options of a call, all at once."""
    chosen = ("bias", "temperature", "class_mask", *names)
    return {name: a[name] for name in chosen} | {"workspace_bytes": TILE}


def plain(function):
    """Leaves a function as it is."""
    return function


def ce(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_cross_entropy)
    options = shared(a, "weights") | {"label_smoothing": 0.1, "z_loss": 0.01}
    return f(a["hidden"], a["kernel"], a["labels"], **options, **mesh)


def softcap(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_cross_entropy)
    options = {"logit_softcap": 0.7, "reduction": "none", "workspace_bytes": TILE}
    return f(a["hidden"], a["kernel"], a["labels"], **options, **mesh)


def log_prob(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_log_prob)
    return f(a["hidden"], a["kernel"], a["labels"], **shared(a, "weights"), **mesh)


def log_prob_at(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_log_prob_at)
    ids = jnp.stack([a["labels"], a["labels"], (7 * a["labels"] + 1) % 500], -1)
    options = shared(a, "weights")
    del options["class_mask"]
    return f(a["hidden"], a["kernel"], ids, **options, **mesh)


def kept_log_prob_at(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_log_prob_at)
    ids = jnp.stack([a["labels"], -jnp.ones_like(a["labels"]), a["labels"] // 2], -1)
    options = shared(a, "weights")
    del options["class_mask"]
    return f(a["hidden"], a["kernel"], ids, normalize=True, **options, **mesh)


def statistics(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_statistics)
    out = f(
        a["hidden"], a["kernel"], a["labels"], return_argmax=True, **shared(a), **mesh
    )
    return out.lse, out.log_prob, out.entropy, out.argmax


def ranked(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_statistics)
    options = shared(a) | {"return_rank": True, "return_top_k": 3}
    out = f(a["hidden"], a["kernel"], a["labels"], **options, **mesh)
    return out.entropy, out.top_log_probs, out.top_ids, out.rank


def sample(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_sample)
    return f(jax.random.key(3), a["hidden"], a["kernel"], **shared(a), **mesh)


def top_k(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_top_k)
    return f(a["hidden"], a["kernel"], 7, **shared(a), **mesh)


def expected(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_expected)
    return f(a["hidden"], a["kernel"], a["values"], **shared(a), **mesh)


def straight_through(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_expected)
    options = shared(a) | {"key": jax.random.key(1), "hard": True}
    return f(a["hidden"], a["kernel"], a["values"], **options, **mesh)


def distillation(a, divergence, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_distillation)
    return f(
        a["hidden"],
        a["kernel"],
        a["teacher_hidden"],
        a["teacher_kernel"],
        student_bias=a["bias"],
        temperature=a["temperature"],
        class_mask=a["class_mask"],
        weights=a["weights"],
        teacher_gradient=True,
        workspace_bytes=TILE and 2 * TILE,
        **OPTIONS[divergence][0],
        **mesh,
    )


def labelled(a, wrap=plain, **mesh):
    """Divergences with the cross-entropy of labels: of all classes, and of some."""
    f, g = map(wrap, (jaxsoft.linear_distillation, jaxsoft.linear_distillation_top_k))
    labels = a["labels"]
    layer = a["hidden"], a["kernel"]
    whole = f(
        *(*layer, a["teacher_hidden"], a["teacher_kernel"]),
        labels=labels,
        temperature=a["temperature"],
        weights=a["weights"],
        **mesh,
    )
    ids = jnp.stack([(labels + 2) % 500, (labels + 1) % 500], -1)
    log_probs = jnp.log(jnp.full(ids.shape, 0.4))
    options = shared(a, "weights", "labels")
    del options["class_mask"]
    return whole + g(*layer, ids, log_probs, divergence="reverse_kl", **options, **mesh)


def distillation_top_k(a, wrap=plain, **mesh):
    f = wrap(jaxsoft.linear_distillation_top_k)
    ids = jnp.stack([a["labels"], (a["labels"] + 1) % 500], -1)
    options = shared(a, "weights")
    del options["class_mask"]
    log_probs = jnp.log(jnp.full(ids.shape, 0.4))
    return f(a["hidden"], a["kernel"], ids, log_probs, **options, **mesh)


CALLS = {
    f.__name__: f
    for f in (
        ce,
        softcap,
        log_prob,
        log_prob_at,
        kept_log_prob_at,
        statistics,
        ranked,
        sample,
        top_k,
        expected,
        straight_through,
        labelled,
        distillation_top_k,
    )
} | {d: functools.partial(distillation, divergence=d) for d in DIVERGENCES}
SCALARS = ("ce", "labelled", "distillation_top_k", *DIVERGENCES)


def mesh_of(layout):
    shape, names = LAYOUTS[layout]
    return Mesh(np.array(jax.devices()).reshape(shape), names)


def close(value, truth, scale=1.0):
    for ours, theirs in zip(*map(jax.tree.leaves, (value, truth)), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        size = np.abs(theirs[np.isfinite(theirs)]).max(initial=0)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6 * scale * size)


def value_and_grad(call):
    """Returns a function of float arrays and others: outputs and a gradient."""

    def total(floats, others):
        out = call(floats | others)
        parts = [
            (jnp.cos(jnp.arange(float(a.size))).reshape(a.shape) * a).sum()
            for a in jax.tree.leaves(out)
            if jnp.issubdtype(a.dtype, jnp.floating)
        ]
        return sum(parts, jnp.float32(0)), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def split(a):
    others = ("labels", "class_mask")
    return (
        {name: v for name, v in a.items() if name not in others},
        {name: a[name] for name in others},
    )


@functools.cache
def on_one_device(name, *sizes):
    return value_and_grad(CALLS[name])(*split(arguments(*sizes)))


def results_of_collectives(text):
    """Returns the kind of each collective of a compiled program and its result."""
    pattern = r" = (.+?) (all-(?:reduce|gather|to-all))(?:-start)?\("
    return [(kind, result) for result, kind in re.findall(pattern, text)]


# Nothing is kept, or all of it and by chunks where the loss is reduced.
@pytest.mark.parametrize("workspace", [TILE, None])
@pytest.mark.parametrize(
    "name, layout",
    # The first and the last are of the default tier: one with all statistics, one with
    # noise and a choice of one class.
    [("statistics", "2 × 4")]
    + [(name, "2 × 4") for name in CALLS if name != "statistics"]
    + [(name, "8") for name in ("ce", "sample", "straight_through")],
)
@pytest.mark.many_cases
def test_inside_shard_map(name, layout, workspace, monkeypatch):
    monkeypatch.setitem(globals(), "TILE", workspace)
    mesh = mesh_of(layout)
    data = "data" if "data" in mesh.axis_names else None
    specs = shardings(data, "vocab")
    axes = {"vocab_axis": "vocab", "token_axes": (data,) if data else ()}

    def call(a):
        out = P() if name in SCALARS else P(data)
        function = functools.partial(CALLS[name], **axes)
        return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out)(a)

    (_, out), grad = value_and_grad(call)(*split(arguments()))
    (_, truth), true_grad = on_one_device(name)
    close(out, truth)
    close(grad, true_grad, scale=5)


@pytest.mark.parametrize("workspace", [TILE, None])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.many_cases
def test_plain_jit_gathers_neither_hidden_nor_kernel(name, workspace, monkeypatch):
    monkeypatch.setitem(globals(), "TILE", workspace)
    mesh = mesh_of("2 × 4")
    specs = shardings("data", "vocab")
    placed = {
        key: jax.device_put(v, NamedSharding(mesh, specs[key]))
        for key, v in arguments().items()
    }
    step = value_and_grad(CALLS[name]).lower(*split(placed)).compile()
    (_, out), grad = step(*split(placed))
    (_, truth), true_grad = on_one_device(name)
    close(out, truth)
    close(grad, true_grad, scale=5)
    moved = results_of_collectives(step.as_text() or "")
    assert any(kind == "all-reduce" for kind, _ in moved)
    for kind, result in moved:
        for whole in (f"[{ROWS},{FEATURES}]", f",{CLASSES}]", f"[{CLASSES}"):
            assert whole not in result, (kind, result)


@pytest.mark.parametrize(
    "name, rows, classes",
    [(name, 21, 1201) for name in CALLS] + [(n, 5, 509) for n in ("ce", "sample")],
)
@pytest.mark.many_cases
def test_over_mesh_pads_what_does_not_divide(name, rows, classes):
    a = arguments(rows, classes)
    over = functools.partial(
        jaxsoft.over_mesh,
        mesh=mesh_of("2 × 4"),
        vocab_axis="vocab",
        token_axes=("data",),
    )
    (_, out), grad = value_and_grad(functools.partial(CALLS[name], wrap=over))(
        *split(a)
    )
    (_, truth), true_grad = on_one_device(name, rows, classes)
    close(out, truth)
    close(grad, true_grad, scale=5)


def test_a_mean_without_weights_is_over_the_tokens_of_all_shards():
    hidden, kernel, labels = (arguments()[n] for n in ("hidden", "kernel", "labels"))
    loss = jaxsoft.over_mesh(
        jaxsoft.linear_cross_entropy,
        mesh_of("2 × 4"),
        vocab_axis="vocab",
        token_axes="data",
    )
    log_p = log_softmax(hidden.astype("float64") @ kernel)
    expected = -log_p[np.arange(ROWS), labels].mean()
    np.testing.assert_allclose(loss(hidden, kernel, labels), expected, rtol=1e-5)


def test_a_token_alone_is_not_added_up_over_the_shards():
    a = arguments()
    layer = a["hidden"][0], a["kernel"]
    over = functools.partial(
        jaxsoft.over_mesh,
        mesh=mesh_of("2 × 4"),
        vocab_axis="vocab",
        token_axes="data",
    )
    loss, plain_loss = (
        functools.partial(
            wrap(jaxsoft.linear_cross_entropy), labels=a["labels"][0], reduction="sum"
        )
        for wrap in (over, plain)
    )
    found, expected = (jax.value_and_grad(f, 1)(*layer) for f in (loss, plain_loss))
    close(found, expected, scale=5)
    key = jax.random.key(0)
    drawn = over(jaxsoft.linear_sample)(key, *layer, top_p=0.9, return_log_prob=True)
    one = jaxsoft.linear_sample(key, *layer, top_p=0.9, return_log_prob=True)
    assert drawn.class_id == one.class_id
    np.testing.assert_allclose(drawn[1:], one[1:], rtol=1e-5)


@pytest.mark.parametrize("student, teacher", [("hv", "vh"), ("vh", "hv")])
def test_over_mesh_takes_each_kernel_in_its_own_layout(student, teacher):
    a = arguments()
    names = ("hidden", "kernel", "teacher_hidden", "teacher_kernel")
    h, w, g, k = (a[name].astype("float64") for name in names)
    log_p, log_q = log_softmax(g @ k), log_softmax(h @ w)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    loss = jaxsoft.over_mesh(
        jaxsoft.linear_distillation, mesh_of("8"), vocab_axis="vocab"
    )
    found = loss(
        a["hidden"],
        a["kernel"] if student == "hv" else a["kernel"].T,
        a["teacher_hidden"],
        a["teacher_kernel"] if teacher == "hv" else a["teacher_kernel"].T,
        student_kernel_layout=student,
        teacher_kernel_layout=teacher,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("classes, workspace_bytes", [(160, None), (1000, 1)])
def test_samples_where_shards_begin_and_end_inside_a_block(classes, workspace_bytes):
    """A block has 128 classes: more than a shard of the first, and not the second."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.standard_normal((500, 4)), rng.standard_normal((4, classes))
    layer = hidden.astype("float32"), kernel.astype("float32")
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))
    over = jaxsoft.over_mesh(jaxsoft.linear_sample, mesh, vocab_axis="vocab")
    drawn, truth = (
        jax.jit(functools.partial(f, workspace_bytes=workspace_bytes))(
            jax.random.key(0), *layer
        )
        for f in (over, jaxsoft.linear_sample)
    )
    np.testing.assert_array_equal(drawn, truth)


def test_over_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("data", "vocab"))
    over = functools.partial(
        jaxsoft.over_mesh, mesh=mesh, vocab_axis="vocab", token_axes=("data",)
    )
    a = arguments()
    (_, out), grad = value_and_grad(functools.partial(ce, wrap=over))(*split(a))
    (_, truth), true_grad = on_one_device("ce")
    close(out, truth)
    close(grad, true_grad, scale=5)


def test_a_temperature_of_all_tokens_has_the_gradient_of_all_shards():
    hidden, kernel, labels = (arguments()[n] for n in ("hidden", "kernel", "labels"))

    def loss(tau, hidden, kernel, labels, **axes):
        return jaxsoft.linear_cross_entropy(
            hidden, kernel, labels, temperature=tau, **axes
        )

    mapped = jax.shard_map(
        functools.partial(loss, vocab_axis="vocab", token_axes="data"),
        mesh=mesh_of("2 × 4"),
        in_specs=(P(), P("data"), P(None, "vocab"), P("data")),
        out_specs=P(),
    )
    found, expected = (
        jax.grad(f)(jnp.float32(0.7), hidden, kernel, labels) for f in (mapped, loss)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_explicit_axes_that_divide_neither_tokens_nor_classes():
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)
    over = functools.partial(
        jaxsoft.over_mesh, mesh=mesh, vocab_axis="vocab", token_axes="data"
    )
    a = arguments(5, 509)
    layer = a["hidden"], a["kernel"], a["labels"]

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(wrap, hidden, kernel, labels):
        def total(hidden):
            log_prob, _ = wrap(jaxsoft.linear_log_prob)(hidden, kernel, labels)
            return jnp.sum(jnp.square(log_prob))

        return jax.value_and_grad(total)(hidden)

    with jax.set_mesh(mesh):
        found = gradient(over, *layer)
        drawn = over(jaxsoft.linear_sample)(jax.random.key(0), *layer[:2])
    close(found, gradient(plain, *layer), scale=5)
    one = jaxsoft.linear_sample(jax.random.key(0), *layer[:2])
    np.testing.assert_array_equal(drawn, one)


def test_without_the_varying_axes_check_it_is_an_error():
    """It would scale gradients silently."""
    mesh = mesh_of("8")
    a = arguments()
    call = jax.shard_map(
        lambda h, w: jaxsoft.linear_statistics(h, w, vocab_axis="vocab").lse,
        mesh=mesh,
        in_specs=(P(), P(None, "vocab")),
        out_specs=P(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="check_vma=True"):
        call(a["hidden"], a["kernel"])


def test_labels_of_padding_are_no_classes():
    mesh = mesh_of("8")
    hidden, kernel = np.ones((2, 3), "float32"), np.zeros((3, 13), "float32")
    loss = jaxsoft.over_mesh(jaxsoft.linear_cross_entropy, mesh, vocab_axis="vocab")
    out = loss(hidden, kernel, np.asarray([12, 13]), reduction="none")
    np.testing.assert_allclose(out, [np.log(13), np.nan], rtol=1e-6)


def test_messages():
    mesh = mesh_of("8")
    with pytest.raises(TypeError, match="`function` must be one of"):
        jaxsoft.over_mesh(jaxsoft.softmax, mesh)
    with pytest.raises(TypeError, match="`function` must be one of"):
        jaxsoft.over_mesh(jaxsoft.sample, mesh, vocab_axis="vocab")
    with pytest.raises(ValueError, match="`vocab_axis` must name axes of the mesh"):
        jaxsoft.over_mesh(jaxsoft.linear_sample, mesh, vocab_axis="rows")
    wrapped = jaxsoft.over_mesh(jaxsoft.linear_statistics, mesh)
    with pytest.raises(TypeError, match="`vocab_axis` must be given to over_mesh"):
        wrapped(np.ones((1, 1)), np.ones((1, 2)), vocab_axis="vocab")


def test_over_mesh_knows_what_the_axes_of_every_array_are():
    """An argument in none of its lists would be whole on every device, in silence."""
    functions = {
        name: inspect.signature(getattr(jaxsoft, name), eval_str=True).parameters
        for name in jaxsoft.__all__
        if inspect.isfunction(getattr(jaxsoft, name)) and name != "over_mesh"
    }
    streamed = {
        name: parameters
        for name, parameters in functions.items()
        if "vocab_axis" in parameters and "logits" not in parameters
    }
    assert len(streamed) >= 8
    arrays = meshes._TOKENS + meshes._CLASSES + meshes._KERNELS + meshes._SCALES
    known = {*arrays, *meshes._NUMBERS}
    for name, parameters in streamed.items():
        arrays = {p.name for p in parameters.values() if _takes_array(p)}
        assert "hidden" in "".join(arrays), name
        assert arrays <= known, (name, arrays - known)


def _takes_array(parameter):
    """Tells whether a parameter is annotated with ArrayLike, or with that or None."""
    return set(get_args(ArrayLike)) <= set(get_args(parameter.annotation))


@pytest.mark.parametrize("column", [10, 700, 1200])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_on_one_shard_alone(value, column):
    """Statistics and draws are those of one device, NaN and -1 where they are."""
    a = arguments()
    kernel = a["kernel"].copy()
    kernel[0, column] = value
    mesh = Mesh(np.array(jax.devices()), ("vocab",))
    over = functools.partial(jaxsoft.over_mesh, mesh=mesh, vocab_axis="vocab")

    @functools.partial(jax.jit, static_argnums=0)
    def both(wrap, hidden, kernel):
        key, labels = jax.random.key(0), a["labels"]
        statistics = wrap(jaxsoft.linear_statistics)(hidden, kernel, labels)
        return statistics, wrap(jaxsoft.linear_sample)(key, hidden, kernel)

    found, one = (both(f, a["hidden"], kernel) for f in (over, plain))
    np.testing.assert_array_equal(found[1], one[1])
    assert (found[1] == -1).any()
    for name in ("log_sum", "log_prob"):
        np.testing.assert_allclose(
            getattr(found[0], name), getattr(one[0], name), rtol=1e-5
        )
