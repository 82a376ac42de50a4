"""Transformations of the linear room: what they give, and what they cost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsoft import linear_cross_entropy, linear_statistics
from tests.linear import cases

TILE = 4 * 8 * 128
BATCH, ROWS, FEATURES, CLASSES = 3, 10, 8, 300


@pytest.fixture
def batch():
    layer = cases.layer(BATCH * ROWS, FEATURES, CLASSES)
    hidden, kernel, labels = map(np.asarray, layer)
    return (
        hidden.reshape(BATCH, ROWS, FEATURES),
        kernel,
        labels.reshape(BATCH, ROWS),
    )


def loss(hidden, kernel, labels, **options):
    return linear_cross_entropy(hidden, kernel, labels, workspace_bytes=TILE, **options)


STEP = jax.jit(jax.value_and_grad(loss, (0, 1)))


def values_and_grads(hidden, kernel, labels):
    """Returns the loss and the gradients of each example, one after the other."""
    steps = [STEP(h, kernel, y) for h, y in zip(hidden, labels, strict=True)]
    return jax.tree.map(lambda *a: np.stack(a), *steps)


def close(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)


def test_vmap_folds_the_batch_into_rows(batch):
    hidden, kernel, labels = batch

    def total(hidden, kernel):
        losses = jax.vmap(loss, (0, None, 0))(hidden, kernel, labels)
        return losses.sum(), losses

    losses, grads = values_and_grads(*batch)
    step = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, mapped), by_both = step(hidden, kernel)
    close(mapped, losses)
    close(by_both, (grads[0], grads[1].sum(0)))
    text = str(step.trace(hidden, kernel).jaxpr)
    assert f"[{BATCH},{FEATURES},{CLASSES}]" not in text
    assert f"[{BATCH * ROWS},{FEATURES}]" in text


def test_per_example_gradients(batch):
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0)))(*batch)
    close(mapped, values_and_grads(*batch)[1])


def test_vmap_over_kernels_temperatures_and_twice(batch):
    hidden, kernel, labels = batch
    kernels = np.stack([kernel, 2 * kernel, -kernel])
    close(
        jax.jit(jax.vmap(loss))(hidden, kernels, labels),
        np.stack([loss(*args) for args in zip(hidden, kernels, labels, strict=True)]),
    )

    @jax.jit
    def tempered(tau):
        return loss(hidden, kernel, labels, temperature=tau)

    taus = np.asarray([0.5, 1.0, 2.0], "float32")
    close(jax.vmap(tempered)(taus), np.stack([tempered(t) for t in taus]))
    twice = jax.jit(jax.vmap(jax.vmap(lambda h, y: loss(h, kernel, y))))(hidden, labels)
    close(twice, loss(hidden, kernel, labels, reduction="none"))


def test_eager_jit_remat_scan(batch):
    hidden, kernel, labels = batch
    grad = jax.grad(loss, (0, 1))
    expected = grad(hidden, kernel, labels)
    close(jax.jit(grad)(hidden, kernel, labels), expected)
    close(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(*batch), expected)

    def scanned(hidden, kernel):
        def step(total, example):
            return total + loss(example[0], kernel, example[1]), None

        return jax.lax.scan(step, 0.0, (hidden, labels))[0] / BATCH

    # A gradient by hidden alone is traced first: what it caches must not leak.
    jax.jit(jax.grad(loss)).trace(hidden[0], kernel, labels[0])
    close(jax.jit(jax.grad(scanned, (0, 1)))(hidden, kernel), expected)


def test_forward_over_reverse(batch):
    hidden, kernel, labels = batch

    @jax.jit
    def products(*layer):
        def product(implementation):
            grad = jax.grad(
                lambda h, w: loss(h, w, labels, implementation=implementation), (0, 1)
            )
            return jax.jvp(grad, layer, layer)[1]

        return product("xla"), product("reference")

    close(*products(hidden, kernel))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda h: loss(h, kernel, labels), (hidden,), (hidden,))


def test_a_gradient_that_is_not_wanted_is_not_computed(batch):
    hidden, kernel, labels = batch

    def products(argnums):
        grad = jax.grad(loss, argnums)
        text = jax.jit(grad).lower(hidden, kernel, labels).as_text()
        return text.count("dot_general")

    # Two products make logits, forward and backward; each gradient is one more.
    assert products(0) == 3 and products(1) == 3 and products((0, 1)) == 4


def test_export_round_trip(batch):
    def step(hidden, kernel, labels):
        return jax.value_and_grad(loss, (0, 1))(hidden, kernel, labels)

    exported = jax.export.export(jax.jit(step))(*batch)
    restored = jax.export.deserialize(exported.serialize())
    close(restored.call(*batch), jax.jit(step)(*batch))


def test_statistics_are_exported(batch):
    exported = jax.export.export(jax.jit(linear_statistics))(*batch)
    found: Any = jax.export.deserialize(exported.serialize()).call(*batch)
    close(found.log_prob, linear_statistics(*batch).log_prob)


def test_inside_shard_map_with_tokens_sharded(batch):
    hidden, kernel, labels = batch
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def total(hidden, kernel, labels):
        mapped = jax.shard_map(
            lambda h, w, y: jax.lax.psum(loss(h, w, y, reduction="sum"), "data"),
            mesh=mesh,
            in_specs=(P("data"), P(), P("data")),
            out_specs=P(),
        )
        return mapped(hidden, kernel, labels)

    def whole(*args):
        return loss(*args, reduction="sum")

    sharded, alone = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(*batch) for f in (total, whole)
    )
    close(sharded, alone)


def test_statistics_are_a_pytree(batch):
    hidden, kernel, labels = batch
    out = jax.jit(linear_statistics)(hidden, kernel, labels)
    close(
        jax.tree.leaves(out), jax.tree.leaves(linear_statistics(hidden, kernel, labels))
    )
    assert out.argmax is None


@pytest.mark.usefixtures("optimized")
def test_no_index_overflows_past_two_to_the_31():
    """131072 × 151936 logits compile, and no index type is too narrow."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((131072, 64), jnp.bfloat16),
            ((64, 151936), jnp.bfloat16),
            ((131072,), jnp.int32),
        )
    ]
    compiled = jax.jit(jax.grad(linear_cross_entropy, (0, 1))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 704 * 2**20
