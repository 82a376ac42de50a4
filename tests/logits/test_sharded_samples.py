"""Samples of logits whose classes are sharded: those of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests import truth

KEY = jax.random.key(0)
ROWS = 16
MESHES = {
    "8": Mesh(np.array(jax.devices()[:8]), ("vocab",)),
    "2 × 4": Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "vocab")),
    "2 × 2 × 2": Mesh(
        np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "outer", "inner")
    ),
}
# Names of options that have a number a row, so that they are sharded with the rows.
OF_ROWS = {
    "top_k": np.resize([0, 1, 3, 60, 7], (ROWS, 1)),
    "top_p": np.resize(np.asarray([1.0, 0.0, 0.5, 0.9], "float32"), (ROWS, 1)),
    "min_p": np.resize(np.asarray([0.0, 0.1, 0.01], "float32"), (ROWS, 1)),
    "top_n_sigma": np.resize(np.asarray([np.inf, 1.0, 2.0], "float32"), (ROWS, 1)),
}
GIVEN = [
    {},
    {"top_k": 5},
    {"top_k": 150},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_n_sigma": 1.5},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.02, "top_n_sigma": 2.0},
    {"top_k": 200, "top_p": 0.5, "min_p": 0.02},
    OF_ROWS,
]


def axes_of(mesh):
    tokens = tuple(name for name in mesh.axis_names if name == "data")
    return tokens, tuple(name for name in mesh.axis_names if name not in tokens)


def over(mesh, **options):
    """Returns a sampler of whole arrays that a mesh shares."""
    tokens, classes = axes_of(mesh)
    static = {name: a for name, a in options.items() if np.ndim(a) < 2}

    def draw(key, x, tau, where, columns):
        return jaxsoft.sample(
            key,
            x,
            tau,
            where=where,
            vocab_axis=classes,
            token_axes=tokens,
            **static,
            **columns,
        )

    columns = {name: jnp.asarray(a) for name, a in options.items() if np.ndim(a) == 2}
    sharded = jax.shard_map(
        draw,
        mesh=mesh,
        in_specs=(P(), P(tokens, classes), P(tokens), P(None, classes), P(tokens)),
        out_specs=P(tokens),
    )
    return jax.jit(lambda key, x, tau, where: sharded(key, x, tau, where, columns))


def check(mesh, x, tau, where, options):
    """Compares classes and log-probabilities with those of one device."""
    found = over(mesh, return_log_prob=True, **options)(KEY, x, tau, where)
    one = functools.partial(jaxsoft.sample, return_log_prob=True, **options)
    expected = jax.jit(one)(KEY, x, tau, where=where)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    for name in ("log_prob", "filtered_log_prob"):
        value, plain = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(value, plain, rtol=2e-6, atol=2e-6)
    return found.class_id


@pytest.mark.many_cases
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given) or "none")
@pytest.mark.parametrize("classes", [24, 1000, 8192])
def test_the_classes_of_one_device(classes, given):
    """Blocks and groups of classes begin on one shard and end on another, or not."""
    x = truth.logits("unit", (ROWS, classes))
    x[3] = np.round(x[3])
    x[4, ::2] = -np.inf
    tau = np.resize(np.asarray([0.7, 0.0, np.inf, 1.3], "float32"), (ROWS, 1))
    where = np.arange(classes)[None] % 10 != 3
    check(MESHES["2 × 4"], x, tau, where, given)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
@pytest.mark.many_cases
def test_meshes_and_kinds_of_logits(mesh, kind):
    x = truth.logits(kind, (ROWS, 1000))
    tau, where = np.full((ROWS, 1), 0.7, "float32"), np.ones((1, 1000), bool)
    check(mesh, x, tau, where, OF_ROWS)


def test_shards_of_fewer_classes_than_there_are_groups():
    x = truth.logits("unit", (ROWS, 2048))
    tau, where = np.full((ROWS, 1), 0.7, "float32"), np.ones((1, 2048), bool)
    check(MESHES["8"], x, tau, where, OF_ROWS)


@pytest.mark.parametrize("given", [GIVEN[0], *GIVEN[6:]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.many_cases
def test_dtypes(dtype, given, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    x = truth.logits("range", (ROWS, 1304)).astype(dtype)
    tau, where = np.full((ROWS, 1), 1.5, "float32"), np.ones((1, 1304), bool)
    check(MESHES["8"], x, tau, where, given)


@pytest.mark.parametrize("given", GIVEN[1:7:5], ids=lambda given: "-".join(given))
@pytest.mark.slow
def test_a_padded_vocabulary(given):
    x = np.full((ROWS, 50264), 5, "float32")
    x[:, :50257] = truth.logits("unit", (ROWS, 50257))
    where = np.arange(50264)[None] < 50257
    tau = np.full((ROWS, 1), 1, "float32")
    drawn = check(MESHES["8"], x, tau, where, given)
    assert (np.asarray(drawn) < 50257).all()


@pytest.mark.parametrize("given", GIVEN[:8:3], ids=lambda given: "-".join(given))
@pytest.mark.parametrize("classes", [24, 8192])
def test_rows_without_a_class(classes, given):
    x = truth.logits("unit", (ROWS, classes))
    clean = x.copy()
    x[1], x[2, 4], x[3, -5] = -np.inf, np.nan, np.inf
    x[4, :-1] = -np.inf
    tau, where = np.full((ROWS, 1), 1.5, "float32"), np.ones((1, classes), bool)
    draw = over(MESHES["2 × 4"], **given)
    drawn = np.asarray(draw(KEY, x, tau, where))
    np.testing.assert_array_equal(drawn[1:5], [-1, -1, -1, classes - 1])
    plain = np.asarray(draw(KEY, clean, tau, where))
    np.testing.assert_array_equal(drawn[5:], plain[5:])


@pytest.mark.parametrize("given", [GIVEN[0], GIVEN[6], GIVEN[7]])
def test_every_shard_sees_a_few_numbers_a_row(given):
    """Sums of blocks, largest logits of groups, or classes of some of these."""
    classes = 2**17
    draw = over(MESHES["8"], return_log_prob=True, **given)
    shapes = [
        jax.ShapeDtypeStruct((ROWS, classes), jnp.float32),
        jax.ShapeDtypeStruct((ROWS, 1), jnp.float32),
        jax.ShapeDtypeStruct((1, classes), jnp.bool_),
    ]
    text = draw.lower(KEY, *shapes).compile().as_text() or ""
    results = re.findall(r" = (.*?) all-(?:reduce|gather)(?:-start)?\(", text)
    assert results
    for result in results:
        for sizes in re.findall(r"\[([\d,]+)\]", result):
            count = np.prod([int(size) for size in sizes.split(",")])
            assert count <= ROWS * classes / 64, result


WRONG = [
    ({"vocab_axis": "vocab"}, "`vocab_axis` must name axes of an enclosing"),
    ({"token_axes": "data"}, "`token_axes` must name axes of an enclosing"),
    (
        {"vocab_axis": "vocab", "token_axes": "vocab"},
        "`token_axes` must not share a mesh axis with `vocab_axis`",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_messages(given, message):
    with pytest.raises(ValueError, match=message):
        jaxsoft.sample(KEY, np.zeros((2, 3), "float32"), **given)
