"""Memory of the compiled programs: tiles, never [N, V]."""

import jax
import jax.numpy as jnp
import pytest

from jaxsoft import linear_cross_entropy

MIB = 2**20


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


@pytest.mark.parametrize("layout", ["hv", "vh"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_issue_bound_at_2048_512_65536(layout, reduction):
    """512 MiB of logits; ours takes at most 32 MiB, with gradients or without."""

    def loss(hidden, kernel, labels):
        out = linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, kernel_layout=layout
        )
        return out.sum()

    for function in (loss, jax.value_and_grad(loss, (0, 1))):
        assert temporaries(function, 2048, 512, 65536, layout) <= 32 * MIB


def test_temporaries_do_not_grow_with_the_vocabulary():
    grad = jax.grad(linear_cross_entropy, (0, 1))
    small = temporaries(grad, 512, 64, 2**15)
    large = temporaries(grad, 512, 64, 2**18)
    assert large <= small * 1.1 + MIB


def test_a_caller_sets_the_budget():
    def with_budget(budget):
        return jax.grad(
            lambda *args: linear_cross_entropy(*args, tile_bytes=budget), (0, 1)
        )

    small = temporaries(with_budget(MIB), 2048, 64, 65536)
    large = temporaries(with_budget(16 * MIB), 2048, 64, 65536)
    assert small < 8 * MIB < large


def test_no_copy_of_the_kernel_is_transposed_or_padded():
    """Of the size of the kernel there is only dkernel, which is an output."""
    for layout in ("hv", "vh"):
        grad = jax.grad(
            lambda *args, layout=layout: linear_cross_entropy(
                *args, kernel_layout=layout, tile_bytes=MIB
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

    alone = temporaries(jax.grad(linear_cross_entropy, (0, 1)), 512, 64, 2**16)
    batch = temporaries(jax.grad(mapped, (0, 1)), 512, 64, 2**16)
    assert batch <= alone * 1.1 + MIB
