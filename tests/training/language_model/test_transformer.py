import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsoft.nn import SoftmaxHead
from jaxsoft.training.heads import HEADS, HeadPlan
from jaxsoft.training.language_model.config import TransformerConfig
from jaxsoft.training.language_model.transformer import LanguageModel, rotate_positions

CONFIG = TransformerConfig(num_classes=50, features=16, layers=2, heads=2)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 12), 0, 50)


def test_a_workspace_is_of_the_full_head():
    plan = HeadPlan("full", (1,) * 50, workspace_bytes=4096)
    head = LanguageModel(CONFIG, plan=plan, rngs=nnx.Rngs(0)).head
    assert isinstance(head, SoftmaxHead) and head.workspace_bytes == 4096
    for kind in HEADS[1:]:
        with pytest.raises(ValueError, match="`workspace_bytes` must be None"):
            HeadPlan(kind, (1,) * 50, workspace_bytes=4096)


def test_hidden_states_see_the_past_alone(model, tokens):
    hidden = model.trunk(tokens)
    chex.assert_shape(hidden, (3, 12, 16))
    changed = model.trunk(tokens.at[:, 7].set((tokens[:, 7] + 1) % 50))
    np.testing.assert_array_equal(hidden[:, :7], changed[:, :7])
    difference = jnp.abs(hidden - changed).max(axis=(0, 2))
    assert (difference[7:] > 1e-4).all()


def test_order_of_the_past_matters(model):
    one = model.trunk(jnp.array([[1, 2, 3, 4]]))[0, -1]
    two = model.trunk(jnp.array([[2, 1, 3, 4]]))[0, -1]
    assert jnp.abs(one - two).max() > 1e-4


def test_rotation_keeps_norms_and_depends_on_distance():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    repeated = jnp.stack([query, key])[:, None, None, :] * jnp.ones((2, 6, 1, 1))
    rotated = rotate_positions(repeated)[:, :, 0]
    norms = jnp.linalg.norm(rotated[0], axis=-1)
    np.testing.assert_allclose(norms, jnp.linalg.norm(query), rtol=1e-5)
    products = rotated[0] @ rotated[1].T
    for distance in (-2, 0, 3):
        diagonal = jnp.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(products[0, 0] - products[0, 3]) > 1e-3


def test_loss_is_the_cross_entropy_of_the_logits(model, tokens):
    kernel = model.head.kernel
    model.head.kernel = nnx.Param(jax.random.normal(jax.random.key(2), (16, 50)))
    labels = jnp.roll(tokens, -1, axis=1)
    logits = model.head(model.trunk(tokens))
    log_probs = jax.nn.log_softmax(logits)
    expected = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    losses = model.loss(tokens, labels, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(model.loss(tokens, labels), expected.mean(), rtol=1e-5)
    model.head.kernel = kernel


@pytest.mark.parametrize("features", [8, 32])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.many_cases
def test_a_new_model_predicts_the_unigram_distribution(head, features, tokens):
    plan = HeadPlan(head, tuple(range(50)), 8)
    config = dataclasses.replace(CONFIG, features=features)
    model = LanguageModel(config, plan=plan, rngs=nnx.Rngs(0))
    model.eval()
    losses = model.loss(tokens, tokens, reduction="none")
    frequencies = (np.arange(50) + 0.5) / (np.arange(50) + 0.5).sum()
    expected = -np.log(frequencies)[np.asarray(tokens)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_every_parameter_is_trained(model, tokens):
    graph, params = nnx.split(model)
    params["head"]["kernel"][...] = jnp.ones((16, 50)) * jnp.linspace(-1, 1, 50)[None]
    gradient = jax.grad(lambda p: nnx.merge(graph, p).loss(tokens, tokens))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["num_classes", "features", "layers", "heads"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0."):
        TransformerConfig(**{"num_classes": 50, name: 0})


def test_features_must_split_into_even_heads():
    with pytest.raises(ValueError, match="`features` must be a multiple"):
        TransformerConfig(num_classes=50, features=10, heads=2)
