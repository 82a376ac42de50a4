"""Memory of the compiled programs: tiles, never [N, V]."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxsoft
from jaxsoft import linear_cross_entropy

MIB = 2**20


GRADIENT = jax.grad(linear_cross_entropy, (0, 1))


@functools.cache
def temporaries(function, rows, features, classes, layout="hv", dtype=jnp.float32):
    kernel = (features, classes) if layout == "hv" else (classes, features)
    args = (
        jax.ShapeDtypeStruct((rows, features), dtype),
        jax.ShapeDtypeStruct(kernel, dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    compiled = jax.jit(function).lower(*args).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("layout, reduction", [("hv", "mean"), ("vh", "none")])
def test_issue_bound_at_2048_512_65536(layout, reduction):
    """512 MiB of logits: ours takes at most 32 MiB, and 128 MiB with gradients."""

    def loss(hidden, kernel, labels):
        out = linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, kernel_layout=layout
        )
        return out.sum()

    assert temporaries(loss, 2048, 512, 65536, layout) <= 32 * MIB
    gradient = jax.value_and_grad(loss, (0, 1))
    assert temporaries(gradient, 2048, 512, 65536, layout) <= 128 * MIB


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["hv", "vh"])
def test_short_floats_are_not_copied(layout, dtype):
    """A kernel of 64 MiB, and tiles of it."""
    loss = functools.partial(linear_cross_entropy, kernel_layout=layout)
    assert temporaries(loss, 512, 512, 65536, layout, dtype) <= 16 * MIB


def test_short_values_are_not_copied():
    """Values of 32 MiB, as many as the kernel."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = (shape((512, 256)), shape((256, 65536)), shape((65536, 256)))
    expected = functools.partial(jaxsoft.linear_expected, workspace_bytes=4 * MIB)
    analysis = jax.jit(expected).lower(*args).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes <= 8 * MIB


@functools.cache
def by_workspace(workspace, reduction: Any = "mean"):
    def loss(hidden, kernel, labels):
        out = linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, workspace_bytes=workspace
        )
        return (out * out).sum()

    return jax.value_and_grad(loss, (0, 1))


def test_temporaries_do_not_grow_with_the_vocabulary():
    small = temporaries(by_workspace(16 * MIB), 512, 64, 2**15)
    large = temporaries(by_workspace(16 * MIB), 512, 64, 2**18)
    assert large <= small * 1.1 + MIB


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("workspace", [4, 16, 64, 256])
def test_a_call_takes_the_workspace_that_it_is_given(workspace, reduction):
    """Of 512 MiB of logits; beside it are the sum of dhidden, and scalars."""
    function = by_workspace(workspace * MIB, reduction)
    taken = temporaries(function, 2048, 512, 65536)
    states = 2048 * 512 * 4
    assert taken <= workspace * MIB + states + MIB
    # Where devices might share the classes, all of them are kept or none.
    if workspace >= 64 and reduction == "mean":
        assert taken >= workspace * MIB * 0.7


def test_no_copy_of_the_kernel_is_transposed_or_padded():
    """Of the size of the kernel there is only dkernel, which is an output."""
    for layout in ("hv", "vh"):
        grad = jax.grad(
            lambda *args, layout=layout: linear_cross_entropy(
                *args, kernel_layout=layout, workspace_bytes=MIB
            ),
            (0, 1),
        )
        kernel = 1024 * 50257 * 4
        assert temporaries(grad, 64, 1024, 50257, layout) < kernel / 8


def test_vmap_keeps_the_memory():
    def mapped(hidden, kernel, labels):
        return jax.vmap(linear_cross_entropy, (0, None, 0))(
            hidden.reshape(8, 64, 64), kernel, labels.reshape(8, 64)
        ).sum()

    alone = temporaries(GRADIENT, 512, 64, 2**15)
    batch = temporaries(jax.grad(mapped, (0, 1)), 512, 64, 2**15)
    assert batch <= alone * 1.1 + MIB


def _everything(key, hidden, kernel, labels, values, teacher):
    """Calls every function that streams a layer, each with its gradient."""
    size: dict[str, Any] = {"workspace_bytes": 16 * MIB}
    ids = labels[:, None] + jnp.arange(4, dtype=jnp.int32)[None]
    log_probs = jnp.full(ids.shape, -2.0)
    expected = jaxsoft.linear_expected
    yield lambda h, w: sum(
        a.sum() for a in jaxsoft.linear_log_prob(h, w, labels, **size)
    )
    yield lambda h, w: jaxsoft.linear_log_prob_at(h, w, ids, **size).sum()
    yield lambda h, w: jaxsoft.linear_top_k(h, w, 8, **size)[0].sum()
    yield lambda h, w: expected(h, w, values, **size).sum()
    yield lambda h, w: expected(h, w, values, key=key, hard=True, **size).sum()
    yield lambda h, w: jaxsoft.linear_distillation(h, w, hidden, teacher, **size)
    yield lambda h, w: jaxsoft.linear_distillation_top_k(h, w, ids, log_probs, **size)


@pytest.mark.parametrize("index", range(7))
@pytest.mark.many_cases
def test_every_function_is_free_of_rows_times_classes(index):
    """At V = 131072, 512 rows: 256 MiB of logits."""
    rows, features, classes = 512, 64, 131072

    def call(key, hidden, kernel, labels, values, teacher):
        calls = _everything(key, hidden, kernel, labels, values, teacher)
        loss = list(calls)[index]
        step = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
        # Samples are beside one of them, since they are a program of their own.
        return step, jaxsoft.linear_sample(key, hidden, kernel) if index == 0 else None

    shape = jax.ShapeDtypeStruct
    args = (
        jax.eval_shape(lambda: jax.random.key(0)),
        shape((rows, features), jnp.float32),
        shape((features, classes), jnp.float32),
        shape((rows,), jnp.int32),
        shape((classes, 8), jnp.float32),
        shape((features, classes), jnp.float32),
    )
    analysis = jax.jit(call).lower(*args).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes <= 24 * MIB
