"""The temperature of a layer equals that of its stored logits, without storing them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests.linear import cases

ROWS, FEATURES, CLASSES = 60, 8, 301
RNG = np.random.default_rng(1)
HIDDEN, KERNEL = map(np.asarray, cases.layer(ROWS, FEATURES, CLASSES)[:2])
KERNEL = 2 * KERNEL
LOGITS = HIDDEN @ KERNEL
LABELS = (LOGITS / 3 + RNG.gumbel(size=LOGITS.shape)).argmax(1)
BIAS = RNG.standard_normal(CLASSES).astype("float32")
MASK = (RNG.uniform(size=CLASSES) < 0.6) | np.isin(range(CLASSES), LABELS)
WEIGHTS = np.where(np.arange(ROWS) < 9, 0, RNG.uniform(0.5, 2, ROWS)).astype("float32")


def close(fit, expected):
    np.testing.assert_allclose(fit.temperature, expected.temperature, rtol=1e-5)
    np.testing.assert_allclose(fit.nll, expected.nll, rtol=1e-5)
    assert fit.at_bound == expected.at_bound


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_equals_stored_logits(implementation):
    """In tiles of few classes, with all options, tokens of weight 0 holding NaN."""
    fit = functools.partial(
        jaxsoft.linear_fit_temperature, implementation=implementation
    )
    plain = jaxsoft.fit_temperature(LOGITS, LABELS)
    assert 2 < plain.temperature < 4
    close(fit(HIDDEN, KERNEL, LABELS, workspace_bytes=ROWS * 4 * 64), plain)
    capped = 4 * np.tanh((LOGITS + BIAS[None]) / 4)
    expected = jaxsoft.fit_temperature(
        capped, LABELS, where=MASK[None], weights=WEIGHTS, bounds=(0.1, 50.0)
    )
    dead = np.arange(ROWS) < 9
    ours = fit(
        np.where(dead[:, None], np.float32(np.nan), HIDDEN).reshape(3, 20, FEATURES),
        KERNEL.T,
        np.where(dead, -100, LABELS).reshape(3, 20),
        bias=BIAS,
        logit_softcap=4.0,
        class_mask=MASK,
        weights=WEIGHTS.reshape(3, 20),
        bounds=(0.1, 50.0),
        kernel_layout="vh",
    )
    close(ours, expected)
    assert expected.at_bound == 0 and expected.temperature != plain.temperature


def loops_of(jaxpr):
    """Yields the bodies of a program's loops, outermost ones that are no fold's."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation.params["body_jaxpr"]
        elif equation.primitive.name != "jaxsoft_fold":
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(inner, "eqns"):
                    yield from loops_of(inner)


# Room for tiles, for the products of all of them, and for a fit of stored logits.
@pytest.mark.parametrize(
    "logits, products", [(0.2, 1), (2.5, 0), (4.5, 0)], ids=["tiles", "kept", "stored"]
)
def test_logits_that_have_room_are_computed_once(logits, products):
    size = int(logits * ROWS * CLASSES * 4)
    fit = functools.partial(jaxsoft.linear_fit_temperature, workspace_bytes=size)
    options: Any = {"class_mask": MASK, "bias": BIAS, "logit_softcap": 4.0}
    capped = 4 * np.tanh((LOGITS + BIAS[None]) / 4)
    expected = jaxsoft.fit_temperature(capped, LABELS, where=MASK[None])
    close(fit(HIDDEN, KERNEL, LABELS, **options), expected)
    (search,) = loops_of(jax.make_jaxpr(fit)(HIDDEN, KERNEL, LABELS))
    assert str(search).count("dot_general[") == products
    stacked = np.stack([HIDDEN, -HIDDEN]), np.stack([LABELS, LABELS[::-1]])
    mapped = jax.vmap(lambda h, y: fit(h, KERNEL, y))(*stacked)
    for index, (h, y) in enumerate(zip(*stacked, strict=True)):
        alone = fit(h, KERNEL, y)
        close(jax.tree.map(lambda a, i=index: a[i], mapped), alone)


def test_bfloat16_and_float64(x64):
    hidden, kernel = (a.astype("bfloat16") for a in (HIDDEN, KERNEL))
    ours = jaxsoft.linear_fit_temperature(hidden, kernel, LABELS)
    hidden, kernel = hidden.astype("float64"), kernel.astype("float64")
    logits = hidden @ kernel
    expected = jaxsoft.fit_temperature(logits, LABELS)
    assert ours.temperature.dtype == jnp.float32
    close(ours, expected)
    wide = jaxsoft.linear_fit_temperature(hidden, kernel, LABELS)
    np.testing.assert_allclose(wide.temperature, expected.temperature, rtol=1e-12)


def test_bounds_and_bad_labels():
    fit: Any = jax.jit(jaxsoft.linear_fit_temperature)
    best, worst = LOGITS.argmax(axis=1), LOGITS.argmin(axis=1)
    cold, hot = fit(HIDDEN, KERNEL, best), fit(HIDDEN, KERNEL, worst)
    assert (cold.at_bound, cold.temperature) == (-1, np.float32(0.01))
    assert (hot.at_bound, hot.temperature) == (1, 100)
    assert fit(HIDDEN, KERNEL * np.float32(1e9), best).at_bound == -1
    alike = fit(HIDDEN, KERNEL * 0, LABELS)
    assert (alike.at_bound, alike.temperature) == (0, 1)
    np.testing.assert_allclose(alike.nll, np.log(CLASSES), rtol=1e-6)
    for bad in (-1, CLASSES):
        wrong = fit(HIDDEN, KERNEL, np.where(np.arange(ROWS) == 5, bad, LABELS))
        assert np.isnan(wrong.temperature) and np.isnan(wrong.nll)
    none = fit(HIDDEN, KERNEL, LABELS - CLASSES, weights=np.zeros(ROWS, "float32"))
    assert none == (1, 0, 0)
    empty = fit(HIDDEN, KERNEL, LABELS, class_mask=np.zeros(CLASSES, bool))
    assert empty == (1, 0, 0)


def test_over_a_mesh():
    """Rows and classes that the mesh does not divide are padded, and count nothing."""
    fit = jaxsoft.over_mesh(
        jaxsoft.linear_fit_temperature,
        jax.make_mesh((2, 2), ("d", "v")),
        vocab_axis="v",
        token_axes=("d",),
    )
    rows = ROWS - 1
    ours = jax.jit(fit)(HIDDEN[:rows], KERNEL, LABELS[:rows])
    close(ours, jaxsoft.fit_temperature(LOGITS[:rows], LABELS[:rows]))


def test_inside_shard_map_without_weights():
    fit = jax.shard_map(
        functools.partial(jaxsoft.linear_fit_temperature, token_axes="d"),
        mesh=Mesh(np.asarray(jax.devices()[:2]), ("d",)),
        in_specs=(P("d"), P(), P("d")),
        out_specs=P(),
    )
    close(fit(HIDDEN, KERNEL, LABELS), jaxsoft.fit_temperature(LOGITS, LABELS))


@pytest.mark.usefixtures("optimized")
def test_memory_is_a_tile():
    """At V = 262144, 512 tokens: 512 MiB of logits."""
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    args = (shape((512, 64), f32), shape((64, 2**18), f32), shape((512,), jnp.int32))
    compiled = jax.jit(jaxsoft.linear_fit_temperature).lower(*args).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 512 * 2**18 * 4 / 32


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"labels": HIDDEN}, TypeError, "`labels` must have an integer"),
        ({"labels": LABELS[1:]}, ValueError, "`labels` must have shape hidden"),
        ({"hidden": LABELS}, TypeError, "`hidden` must have a floating"),
        ({"kernel": KERNEL.T}, ValueError, r"`kernel` must have shape \[H, V\]"),
        ({"weights": LABELS}, TypeError, "`weights` must have a floating"),
        ({"bounds": (1, 1)}, ValueError, "`bounds` must increase"),
        ({"logit_softcap": 0}, ValueError, "`logit_softcap` must be positive"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "linear_fit_temperat"),
    ],
)
def test_messages(change, kind, message):
    args: Any = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS}
    with pytest.raises(kind, match=message):
        jaxsoft.linear_fit_temperature(**(args | change))
