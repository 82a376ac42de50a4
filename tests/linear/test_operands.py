"""Kernels in few bits with scales, adapters of low rank, and masks of each token."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import (
    LoRA,
    distillation_loss,
    distillation_loss_top_k,
    fit_temperature,
    linear_cross_entropy,
    linear_distillation,
    linear_distillation_top_k,
    linear_expected,
    linear_fit_temperature,
    linear_log_prob,
    linear_log_prob_at,
    linear_sample,
    linear_statistics,
    linear_top_k,
    over_mesh,
    sample,
)
from tests.linear import cases

ROWS, FEATURES, CLASSES, RANK, ADAPTERS = 16, 16, 300, 3, 4
TILE = 4 * 8 * 128
MIB = 2**20
SCALES = {
    "scalar": (),
    "class": (CLASSES,),
    "features": (4, CLASSES),
    "blocks": (4, CLASSES // 3),
}


def packed(mask):
    """Returns booleans [..., V] as words of 32 bits."""
    mask = np.asarray(mask)
    rest = -mask.shape[-1] % 32
    wide = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, rest)])
    bits = wide.reshape(*mask.shape[:-1], -1, 32).astype(np.uint64)
    words = (bits << np.arange(32, dtype=np.uint64)).sum(-1)
    return jnp.asarray(words.astype(np.uint32))


@functools.cache
def arguments(scale: str | None = "class", adapters: int | None = ADAPTERS):
    """Returns hidden, kernel, labels, a mask of each token, and the options."""
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((ROWS, FEATURES))
    kernel = rng.integers(-127, 128, (FEATURES, CLASSES)).astype("int8")
    options: dict[str, Any] = {}
    if scale is None:
        kernel = kernel * 0.015
    else:
        options["kernel_scale"] = rng.uniform(0.01, 0.02, SCALES[scale])
    if adapters is not None:
        several = (adapters,) if adapters else ()
        options["a"] = rng.standard_normal((*several, FEATURES, RANK))
        options["b"] = rng.standard_normal((*several, RANK, CLASSES)) * 0.3
        if adapters:
            # Some tokens have no adapter.
            options["ids"] = rng.integers(-1, adapters + 1, ROWS).astype("int32")
    labels = rng.integers(0, CLASSES, ROWS).astype("int32")
    mask = rng.uniform(size=(ROWS, CLASSES)) < 0.6
    mask[np.arange(ROWS), labels] = True
    return hidden, kernel, labels, mask, options


def cast(tree, dtype):
    """Returns the floating arrays of a tree in a dtype, all as JAX's."""

    def of(a):
        a = np.asarray(a)
        a = a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a
        return jnp.asarray(a)

    return jax.tree.map(of, tree)


def plain(hidden, kernel, mask=None, *, kernel_scale=None, a=None, b=None, ids=None):
    """The logits in the dtype of the hidden states, from the definition."""
    features, classes = kernel.shape
    kernel = kernel.astype(hidden.dtype)
    if kernel_scale is not None:
        scale = kernel_scale
        if scale.ndim < 2:
            scale = jnp.broadcast_to(scale, (classes,))[None]
        scale = jnp.repeat(scale, features // scale.shape[0], axis=0)
        kernel = kernel * jnp.repeat(scale, classes // scale.shape[1], axis=1)
    u = hidden @ kernel
    if a is not None and ids is None:
        u = u + (hidden @ a) @ b
    elif a is not None and b is not None:
        for number in range(a.shape[0]):
            added = (hidden @ a[number]) @ b[number]
            u = u + jnp.where((ids == number)[:, None], added, 0)
    return u if mask is None else jnp.where(mask, u, -jnp.inf)


def ours(options, mask=None):
    """Returns the options as the functions take them."""
    options = dict(options)
    a, b, ids = (options.pop(name, None) for name in ("a", "b", "ids"))
    if a is not None:
        options["lora"] = LoRA(a, b, ids)
    if mask is not None:
        options["class_bits"] = packed(mask)
    return options


def in_layout(layout, kernel, options):
    """Returns kernel and scales as they lie in a layout."""
    if layout == "hv":
        return kernel, options
    options = dict(options)
    scale = options.get("kernel_scale")
    if scale is not None and scale.ndim == 2:
        options["kernel_scale"] = scale.T
    return kernel.T, options


CASES = list(itertools.product([*SCALES, None], [None, 0, ADAPTERS], [False, True]))[1:]


@pytest.mark.parametrize("scale, adapters, has_mask", CASES)
@pytest.mark.many_cases
def test_values_and_gradients(scale, adapters, has_mask, x64):
    given = arguments(scale, adapters)
    hidden, kernel, labels, mask, options = given
    number = CASES.index((scale, adapters, has_mask))
    layout: Any = ("hv", "vh")[number % 2]
    reduction: Any = ("none", "mean")[number // 2 % 2]
    workspace, softcap = (TILE, None)[number // 3 % 2], (None, 3.0)[number % 3 % 2]
    rng = np.random.default_rng(1)
    tau, share = rng.uniform(0.5, 2, ROWS), rng.uniform(0.1, 1, ROWS)
    ids = {name: options[name] for name in ("ids",) if name in options}
    moving = {k: v for k, v in options.items() if k != "ids"} | {"tau": tau}
    if scale is None:
        moving["kernel"] = kernel

    def loss(moving, hidden):
        moving = dict(moving)
        tau, fixed = moving.pop("tau"), moving.pop("kernel", jnp.asarray(kernel))
        laid, options = in_layout(layout, fixed, moving | ids)
        losses = linear_cross_entropy(
            hidden,
            laid,
            labels,
            temperature=tau,
            logit_softcap=softcap,
            kernel_layout=layout,
            workspace_bytes=workspace,
            weights=share,
            reduction=reduction,
            **ours(options, mask if has_mask else None),
        )
        return losses.sum()

    def truth(moving, hidden):
        moving = dict(moving)
        tau, fixed = moving.pop("tau"), moving.pop("kernel", jnp.asarray(kernel))
        u = plain(hidden, fixed, **(moving | ids))
        u = (u if softcap is None else softcap * jnp.tanh(u / softcap)) / tau[:, None]
        u = jnp.where(mask, u, -jnp.inf) if has_mask else u
        picked = jnp.take_along_axis(jax.nn.log_softmax(u), labels[:, None], 1)[:, 0]
        losses = -picked * share
        return losses.sum() / (share.sum() if reduction == "mean" else 1)

    wide, narrow = (cast((moving, hidden), d) for d in ("float64", "float32"))
    expected = jax.jit(jax.value_and_grad(truth, (0, 1)))(*wide)
    for found, atol in (
        (jax.jit(jax.value_and_grad(loss, (0, 1)))(*wide), 1e-13),
        (jax.jit(jax.value_and_grad(loss, (0, 1)))(*narrow), 2e-6),
    ):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            largest = float(np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=atol * largest)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "classes", [3, 1000, pytest.param(50257, marks=pytest.mark.slow)]
)
@pytest.mark.many_cases
def test_kinds_of_logits(kind, classes, x64):
    """A kernel of int8 and an adapter, with scales of classes and of features."""
    hidden, kernel, labels = cases.layer(6, 16, classes, kind)
    rng = np.random.default_rng(2)
    mask = rng.uniform(size=(6, classes)) < 0.5
    mask[np.arange(6), np.asarray(labels)] = True
    largest = np.abs(np.asarray(kernel)).max(axis=0)
    scale = np.where(largest == 0, 1, largest / 127).astype("float32")
    short = jnp.asarray(np.round(np.asarray(kernel) / scale).astype("int8"))
    blocks = np.broadcast_to(scale, (4, classes)) * np.array(
        [[1], [2], [1], [0.5]], "float32"
    )
    a, b = rng.standard_normal((16, 2)), rng.standard_normal((2, classes)) * 0.1
    a, b = a.astype("float32"), b.astype("float32")
    for chosen in (scale, blocks):
        options = {"kernel_scale": jnp.asarray(chosen), "a": a, "b": b}

        def loss(hidden, options):
            found = linear_log_prob(hidden, short, labels, **ours(options, mask))
            return jnp.sum(found[0])

        def truth(hidden, options):
            u = plain(hidden, short, mask, **options)
            picked = jnp.take_along_axis(jax.nn.log_softmax(u), labels[:, None], 1)
            return picked.sum()

        wide = cast((hidden, options), "float64")
        expected = jax.jit(jax.value_and_grad(truth, (0, 1)))(*wide)
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, options)
        # The offset's products alone are some 1e4, and float32 rounds their sum.
        size = float(jnp.abs(plain(wide[0], short, **wide[1])).max())
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            atol = 1e-6 * max(float(np.abs(y).max()), 1) * max(size, 8)
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_every_function_takes_them():
    hidden, kernel, labels, mask, options = cast(arguments("blocks"), "float32")
    given = ours(options, mask)
    u = plain(hidden, kernel, mask, **options)
    log_p = jax.nn.log_softmax(u)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    found = linear_statistics(hidden, kernel, labels, return_argmax=True, **given)
    close(found.lse, jax.nn.logsumexp(u, axis=1))
    np.testing.assert_array_equal(found.argmax, u.argmax(1))
    log_prob, entropy = linear_log_prob(hidden, kernel, labels, **given)
    close(log_prob, jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0])
    close(entropy, -jnp.sum(jnp.exp(log_p) * jnp.where(mask, log_p, 0), 1))
    ids = jnp.stack([labels, jnp.flip(labels)], 1)
    at = linear_log_prob_at(hidden, kernel, ids, **given)
    close(at, jnp.take_along_axis(log_p, ids, 1))
    best, classes = linear_top_k(hidden, kernel, 5, **given)
    close(best, jax.lax.top_k(log_p, 5)[0])
    np.testing.assert_array_equal(classes, jax.lax.top_k(u, 5)[1])
    values = jnp.asarray(np.random.default_rng(0).standard_normal((CLASSES, 2)))
    values = values.astype("float32")
    close(linear_expected(hidden, kernel, values, **given), jnp.exp(log_p) @ values)
    key = jax.random.key(0)
    drawn = linear_sample(key, hidden, kernel, **given)
    np.testing.assert_array_equal(drawn, sample(key, u))
    fit = linear_fit_temperature(hidden, kernel, labels, **given)
    close(fit.temperature, fit_temperature(u, labels).temperature, rtol=1e-3)
    reference = linear_cross_entropy(
        hidden, kernel, labels, implementation="reference", **given
    )
    close(linear_cross_entropy(hidden, kernel, labels, **given), reference)


@pytest.mark.many_cases
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("workspace", [None, TILE])
def test_distillation(divergence, workspace, x64):
    """From a teacher in few bits to an adapted student, by stored logits in float64."""
    given = cast(arguments("class"), "float64")
    hidden, kernel, labels, mask, options = given
    teacher = cast(arguments("blocks", 0), "float64")[-1]
    student_options = {"a": options["a"], "scale": options["kernel_scale"]}
    top, ids = jax.lax.top_k(plain(hidden, kernel, mask, **teacher), 5)
    log_p = top - jax.nn.logsumexp(top, axis=1, keepdims=True)

    def layer(moving):
        found = options | {"a": moving["a"], "kernel_scale": moving["scale"]}
        return ours(found)

    def streamed(moving):
        student, frozen = layer(moving), ours(teacher)
        loss = linear_distillation(
            hidden,
            kernel,
            hidden,
            kernel,
            divergence=divergence,
            class_bits=packed(mask),
            student_kernel_scale=student["kernel_scale"],
            student_lora=student["lora"],
            teacher_kernel_scale=frozen["kernel_scale"],
            teacher_lora=frozen["lora"],
            workspace_bytes=workspace,
        )
        return loss + linear_distillation_top_k(
            hidden,
            kernel,
            ids,
            log_p,
            divergence=divergence,
            class_bits=packed(mask),
            workspace_bytes=workspace,
            **student,
        )

    def stored(moving):
        found = options | {"a": moving["a"], "kernel_scale": moving["scale"]}
        student = plain(hidden, kernel, mask, **found)
        frozen = plain(hidden, kernel, mask, **teacher)
        losses = distillation_loss(student, frozen, divergence=divergence)
        losses += distillation_loss_top_k(student, ids, log_p, divergence=divergence)
        return losses.mean()

    found = jax.jit(jax.value_and_grad(streamed))(student_options)
    expected = jax.jit(jax.value_and_grad(stored))(student_options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(np.abs(b).max()))


def test_distillation_over_a_mesh():
    hidden, kernel, _, mask, options = cast(arguments("blocks"), "float32")
    student, teacher = ours(options), cast(arguments("class", None), "float32")[-1]
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    losses = [
        function(
            hidden,
            kernel,
            hidden,
            kernel,
            class_bits=packed(mask),
            student_kernel_scale=student["kernel_scale"],
            student_lora=student["lora"],
            teacher_kernel_scale=teacher["kernel_scale"],
            reduction="none",
        )
        for function in (
            over_mesh(linear_distillation, mesh, vocab_axis="y", token_axes="x"),
            linear_distillation,
        )
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


@pytest.mark.many_cases
@pytest.mark.parametrize("scale", ["class", "blocks"])
@pytest.mark.parametrize("shape, vocab, tokens", [((8,), "x", ()), ((2, 4), "y", "x")])
def test_over_a_mesh(scale, shape, vocab, tokens):
    """300 classes on eight devices have padding, of which a mask has no bits."""
    hidden, kernel, labels, mask, options = cast(arguments(scale), "float32")
    ids = options["ids"]
    moving = {k: v for k, v in options.items() if k != "ids"}

    def gradients(function):
        def loss(moving, hidden):
            given = ours(moving | {"ids": ids}, mask)
            losses = function(hidden, kernel, labels, reduction="none", **given)
            return jnp.sum(losses * jnp.arange(ROWS, dtype="float32"))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(moving, hidden)

    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)])
    mapped = over_mesh(linear_cross_entropy, mesh, vocab_axis=vocab, token_axes=tokens)
    found, expected = gradients(mapped), gradients(linear_cross_entropy)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * largest)
    drawn = over_mesh(linear_sample, mesh, vocab_axis=vocab, token_axes=tokens)
    key, given = jax.random.key(1), ours(options, mask)
    np.testing.assert_array_equal(
        drawn(key, hidden, kernel, **given), linear_sample(key, hidden, kernel, **given)
    )


@pytest.mark.parametrize("layout", ["hv", "vh"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_all_classes_over_a_mesh(shape, layout):
    hidden, kernel, labels, *_ = cast(arguments(None, None), "float32")
    kernel = kernel if layout == "hv" else kernel.T
    given = {"kernel_scale": jnp.full(shape, 0.5), "kernel_layout": layout}
    mapped = over_mesh(linear_log_prob, jax.make_mesh((8,), ("x",)), vocab_axis="x")
    np.testing.assert_allclose(
        mapped(hidden, kernel, labels, **given),
        linear_log_prob(hidden, 0.5 * kernel, labels, kernel_layout=layout),
        rtol=1e-5,
    )


def test_float16_holds_slopes_times_small_scales():
    rng = np.random.default_rng(5)
    kernel = jnp.asarray(rng.integers(-127, 128, (8, 4096)), jnp.int8)
    scale, hidden = jnp.full(4096, 1e-4), jnp.asarray(rng.normal(size=(4, 8)))
    labels = jnp.arange(4)

    def gradient(dtype):
        def loss(hidden):
            return linear_cross_entropy(
                hidden, kernel, labels, kernel_scale=scale.astype("float32")
            )

        return jax.grad(loss)(hidden.astype(dtype)).astype("float32")

    expected = gradient("float32")
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(gradient("float16"), expected, atol=2e-3 * largest)


def test_padding_beyond_the_last_word():
    """64 classes on three devices take 66 places, and have bits for 64."""
    hidden, kernel, labels, mask, _ = cast(arguments(None, None), "float32")
    kernel, labels = kernel[:, :64], labels % 64
    mask = mask[:, :64].at[jnp.arange(ROWS), labels].set(True)
    bits = packed(mask)
    mesh = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3])

    def both(function):
        return over_mesh(function, mesh, vocab_axis="x"), function

    found, expected = (
        f(hidden, kernel, labels, class_bits=bits, reduction="none")
        for f in both(linear_cross_entropy)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    key = jax.random.key(2)
    options: dict[str, Any]
    for options in ({}, {"top_k": 200}):
        drawn, expected = (
            f(key, hidden, kernel, class_bits=bits, **options)
            for f in both(linear_sample)
        )
        np.testing.assert_array_equal(drawn, expected)
    best, expected = (
        f(hidden, kernel, 3, class_bits=bits)[1] for f in both(linear_top_k)
    )
    np.testing.assert_array_equal(best, expected)


def test_sharded_arrays_under_plain_jit():
    hidden, kernel, labels, mask, options = cast(arguments("class"), "float32")
    more = ((0, 0), (0, 20))
    kernel, mask = jnp.pad(kernel, more), jnp.pad(mask, more)
    options["b"] = jnp.pad(options["b"], ((0, 0), *more))
    options["kernel_scale"] = jnp.pad(options["kernel_scale"], more[1:])
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    places = {"kernel_scale": P("y"), "b": P(None, None, "y")}

    def loss(hidden, kernel, options):
        given = ours(options, mask)
        return linear_cross_entropy(hidden, kernel, labels, **given)

    function = jax.jit(jax.value_and_grad(loss, 0))
    expected = function(hidden, kernel, options)
    put = {
        name: jax.device_put(array, NamedSharding(mesh, places.get(name, P())))
        for name, array in options.items()
    }
    rows = jax.device_put(hidden, NamedSharding(mesh, P("x")))
    columns = jax.device_put(kernel, NamedSharding(mesh, P(None, "y")))
    found = function(rows, columns, put)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_a_batch_becomes_rows():
    hidden, kernel, labels, mask, options = cast(arguments("features"), "float32")
    bits = packed(mask)

    def losses(hidden, labels, ids, bits):
        given = ours(options | {"ids": ids})
        return linear_cross_entropy(
            hidden, kernel, labels, class_bits=bits, reduction="none", **given
        )

    whole = losses(hidden, labels, options["ids"], bits)
    batch = (hidden, labels, options["ids"], bits)
    batch = [a.reshape(4, ROWS // 4, *a.shape[1:]) for a in batch]
    np.testing.assert_array_equal(losses(*batch).reshape(ROWS), whole)
    found = jax.vmap(losses)(*batch)
    np.testing.assert_array_equal(found.reshape(ROWS), whole)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_short_kernels_equal_widened_ones(dtype):
    """Every one of these numbers is a bfloat16 as well."""
    hidden, kernel, labels, _, options = arguments("class", None)
    hidden = jnp.asarray(hidden, "bfloat16")
    short = jnp.asarray(kernel // 16, dtype)
    scale = jnp.asarray(options["kernel_scale"], "float32")

    def loss(kernel):
        def of_hidden(hidden):
            return linear_cross_entropy(
                hidden, kernel, labels, kernel_scale=scale, workspace_bytes=TILE
            )

        return jax.jit(jax.value_and_grad(of_hidden))(hidden)

    for a, b in zip(loss(short), loss(short.astype("bfloat16")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", ["class", "features"])
def test_gradients_in_bfloat16(scale, x64):
    """Scales and adapters stay in float32 beside states of bfloat16."""
    hidden, kernel, labels, mask, options = arguments(scale, 0)
    hidden = jnp.asarray(hidden, "bfloat16")
    moving = cast(options, "float32")

    def loss(moving):
        given = ours(moving, mask)
        return linear_cross_entropy(hidden, jnp.asarray(kernel), labels, **given)

    def truth(moving):
        u = plain(hidden.astype("float64"), jnp.asarray(kernel), mask, **moving)
        picked = jnp.take_along_axis(jax.nn.log_softmax(u), labels[:, None], 1)
        return -picked.mean()

    found = jax.jit(jax.value_and_grad(loss))(moving)
    expected = jax.value_and_grad(truth)(cast(options, "float64"))
    assert all(a.dtype == "float32" for a in jax.tree.leaves(found))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.01 * float(np.abs(b).max()))


@pytest.mark.parametrize("scale", [(2**15,), (4, 2**15)])
def test_a_short_kernel_is_never_widened_whole(scale):
    """It takes 16 MiB, and 64 in float32; a mask takes 1 MiB, and 8 as booleans."""
    shapes = (
        jax.ShapeDtypeStruct((256, 512), "float32"),
        jax.ShapeDtypeStruct(scale, "float32"),
        jax.ShapeDtypeStruct((512, 2**15), "int8"),
        jax.ShapeDtypeStruct((256,), "int32"),
        jax.ShapeDtypeStruct((256, 2**10), "uint32"),
    )

    def loss(hidden, scale, kernel, labels, bits):
        return linear_cross_entropy(
            hidden,
            kernel,
            labels,
            kernel_scale=scale,
            class_bits=bits,
            workspace_bytes=4 * MIB,
        )

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 8 * MIB


def test_a_frozen_kernel_costs_no_product():
    """Where adapters alone move, no product is a gradient of the kernel's shape."""
    hidden, kernel, labels, _, options = cast(arguments(None, 0), "float32")
    hidden, labels = hidden[:8], labels[:8]

    def loss(a, b, kernel):
        return linear_cross_entropy(hidden, kernel, labels, lora=LoRA(a, b))

    def has_product(moving):
        gradient = jax.grad(loss, moving)
        jaxpr = str(jax.make_jaxpr(gradient)(options["a"], options["b"], kernel))
        return f"f32[{FEATURES},{CLASSES}] = dot_general" in jaxpr

    assert has_product((0, 1, 2))
    assert not has_product((0, 1))


def test_forward_over_reverse():
    hidden, kernel, labels, mask, options = cast(arguments("features"), "float32")

    def ours_of(hidden):
        given = ours(options, mask)
        return linear_cross_entropy(hidden, kernel, labels, **given)

    def plain_of(hidden):
        log_p = jax.nn.log_softmax(plain(hidden, kernel, mask, **options))
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    def second(loss):
        return jax.jvp(jax.grad(loss), (hidden,), (jnp.cos(hidden),))[1]

    found, expected = jax.jit(second, static_argnums=0)(ours_of), second(plain_of)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"kernel_scale": jnp.ones(7)}, ValueError, "broadcast"),
        ({"kernel_scale": jnp.ones((3, 8))}, ValueError, "divide"),
        ({"kernel_scale": jnp.ones((4, 0))}, ValueError, "divide"),
        ({"kernel_scale": jnp.ones(8, "int32")}, TypeError, "floating"),
        ({"class_bits": jnp.ones((2, 2), "uint32")}, ValueError, "class_bits"),
        ({"class_bits": jnp.ones((2, 1), "uint8")}, TypeError, "uint32"),
        ({"lora": (jnp.ones((4, 2)), jnp.ones((2, 8)))}, TypeError, "LoRA"),
        ({"lora": LoRA(jnp.ones((5, 2)), jnp.ones((2, 8)))}, ValueError, "lora.a"),
        ({"lora": LoRA(jnp.ones((4, 2)), jnp.ones((3, 8)))}, ValueError, "lora.b"),
        ({"lora": LoRA(jnp.ones((1, 4, 2)), jnp.ones((1, 2, 8)))}, ValueError, "ids"),
        (
            {"lora": LoRA(jnp.ones((4, 2)), jnp.ones((2, 8))), "implementation": "m"},
            ValueError,
            "implementation",
        ),
    ],
)
def test_errors(options, error, match):
    hidden, kernel = jnp.ones((2, 4)), jnp.ones((4, 8))
    with pytest.raises(error, match=match):
        linear_cross_entropy(hidden, kernel, jnp.zeros(2, "int32"), **options)


@pytest.mark.parametrize("name", ["kernel_scale", "lora", "class_bits"])
def test_kernels_have_no_such_operands(name):
    options = {
        "kernel_scale": jnp.ones(8),
        "lora": LoRA(jnp.ones((4, 2)), jnp.ones((2, 8))),
        "class_bits": jnp.ones((2, 1), "uint32"),
    }
    with pytest.raises(NotImplementedError, match=name):
        linear_cross_entropy(
            jnp.ones((2, 4)),
            jnp.ones((4, 8)),
            jnp.zeros(2, "int32"),
            implementation="mosaic_tpu",
            **{name: options[name]},
        )


def test_an_integer_kernel_needs_a_scale():
    kernel = jnp.ones((4, 8), "int8")
    with pytest.raises(TypeError, match="kernel"):
        linear_cross_entropy(jnp.ones((2, 4)), kernel, jnp.zeros(2, "int32"))
