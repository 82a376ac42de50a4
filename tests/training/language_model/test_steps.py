import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsoft import ClassTree, RowGradient
from jaxsoft.training.heads import HEADS, HeadPlan, head_rows
from jaxsoft.training.language_model.config import TransformerConfig
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.steps import Programs

# One worker: its programs serve many tests.
MODEL = TransformerConfig(num_classes=40, features=16, layers=1, heads=2)
OPTIMIZER = OptimizerConfig(steps=20, learning_rate=1e-2)
COUNTS = tuple(range(40))


@functools.cache
def compiled(head, seed=0):
    return Programs(
        MODEL, OPTIMIZER, (3, 8), head=HeadPlan(head, COUNTS, 16), seed=seed
    )


@pytest.fixture(params=HEADS)
def programs(request):
    return compiled(request.param)


@pytest.fixture
def state(programs):
    return programs.init()


def train(programs, state, steps, first=1):
    """Makes some steps on one batch; returns the state and the losses."""
    losses = []
    for index in range(first, first + steps):
        state, result = programs.step(state, counting(), OPTIMIZER.rate(index), index)
        losses.append(float(result.loss))
    return state, losses


def counting(batch=3, length=8):
    start = np.arange(batch)[:, None]
    return ((start + np.arange(length + 1)) % 40).astype(np.int32)


@pytest.mark.many_cases
def test_training_starts_at_the_unigram_loss_and_learns(programs, state):
    expected = -programs.head.log_probs[counting()[:, 1:]].mean()
    start = programs.evaluate(state.params, counting())
    assert abs(start - expected) < 1e-5
    state, losses = train(programs, state, 20)
    if programs.head.kind != "sampled":
        assert abs(losses[0] - expected) < 1e-5
    end = programs.evaluate(state.params, counting())
    # The last tail is one feature wide; 16 samples of 40 classes are few.
    share = {"adaptive": 0.75, "sampled": 0.6}.get(programs.head.kind, 0.5)
    assert end < share * start


def test_a_step_is_deterministic(programs):
    ends = [train(programs, programs.init(), 3)[0] for _ in range(2)]
    chex.assert_trees_all_equal(*ends)


def test_samples_of_a_step_are_its_own():
    """What a sampled head draws is a function of the seed and of the step's number."""
    programs = compiled("sampled")
    (first,), (again,), (other,) = (
        train(programs, programs.init(), 1, index)[1] for index in (1, 1, 2)
    )
    assert first == again != other


def test_rows_off_the_batchs_paths_stay_as_they_are():
    programs = compiled("hierarchical")
    before = programs.init()
    kept = [np.array(a) for a in head_rows(before.params)]
    tree = programs.head.structure
    assert isinstance(tree, ClassTree)
    path = tree.paths(counting()[:, 1:].reshape(-1))
    visited = np.unique(np.asarray(path.first_rows)[np.asarray(path.num_rows) > 0])
    assert 5 < len(visited) < 30
    after, _ = train(programs, before, 1)
    for old, new in zip(kept, head_rows(after.params), strict=True):
        moved = (old != np.asarray(new)).reshape(len(old), -1).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(moved), visited)


def test_a_row_step_is_the_dense_one_where_rows_are_visited():
    """A step from the dense loss's gradients, in the trunk and in the visited rows."""
    programs = compiled("hierarchical")
    state, _ = train(programs, programs.init(), 2)
    tokens, rate = jnp.asarray(counting()), OPTIMIZER.rate(3)

    def mean_loss(params):
        return programs.model(params).loss(tokens[:, :-1], tokens[:, 1:])

    def trunk(tree):
        return nnx.split_state(tree, lambda path, _: path[0] != "head", ...)[0]

    gradient = jax.grad(mean_loss)(state.params)
    kernel, bias = head_rows(gradient)
    rows = jnp.flatnonzero(jnp.any(kernel != 0, axis=1) | (bias != 0))
    expected_rows, _ = OPTIMIZER.rows(rate).update(
        head_rows(state.params),
        RowGradient(rows, (kernel[rows], bias[rows])),
        state.rows,
    )
    expected, _ = OPTIMIZER.update(
        trunk(gradient), state.optimizer, trunk(state.params), rate
    )
    norm = float(optax.tree.norm(trunk(gradient)))
    after, result = programs.step(state, counting(), rate, 3)
    np.testing.assert_allclose(result.gradient_norm, norm, rtol=1e-4)
    chex.assert_trees_all_close(trunk(after.params), expected, rtol=1e-4, atol=1e-6)
    for new, other in zip(head_rows(after.params), expected_rows, strict=True):
        np.testing.assert_allclose(new, other, rtol=1e-4, atol=1e-6)


def test_seed_decides_the_parameters():
    one, two = (compiled("full", seed).init().params for seed in (0, 1))
    table_one = one["trunk"]["embedding"]["embedding"][...]
    assert (table_one != two["trunk"]["embedding"]["embedding"][...]).any()


def test_state_is_donated(programs, state):
    leaves = jax.tree.leaves(state)
    train(programs, state, 1)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_evaluation_ignores_its_padding(programs, state):
    state, _ = train(programs, state, 3)
    windows = np.random.default_rng(0).integers(0, 40, (7, 9)).astype(np.int32)
    alone = [programs.evaluate(state.params, windows[i : i + 1]) for i in range(7)]
    assert np.isclose(programs.evaluate(state.params, windows), np.mean(alone))


def test_evaluation_is_by_normalised_probabilities(programs, state):
    """The loss of each token is that of its head's logits, normalised over all."""
    state, _ = train(programs, state, 5)
    model = programs.model(state.params)
    tokens = counting()
    logits = model.head(model.trunk(tokens[:, :-1]))
    log_probs = jax.nn.log_softmax(logits)
    found = np.take_along_axis(
        np.asarray(log_probs), tokens[:, 1:, None].astype(np.int64), axis=-1
    )
    np.testing.assert_allclose(
        programs.evaluate(state.params, tokens), -found.mean(), rtol=1e-5
    )


def test_schedule_warms_up_and_decays():
    config = OptimizerConfig(steps=100, learning_rate=1.0)
    rates = np.array([config.rate(step) for step in range(1, 101)])
    assert 0 < rates[0] < 0.2
    assert rates.argmax() == 10 and np.isclose(rates.max(), 1.0)
    assert (np.diff(rates[10:]) < 0).all() and 0.05 <= rates[-1] < 0.06


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_schedules_stay_positive(steps):
    config = OptimizerConfig(steps=steps, learning_rate=1.0)
    assert all(config.rate(step) > 0 for step in range(1, steps + 1))


def test_weight_decay_leaves_vectors_alone():
    optimizer = OptimizerConfig(steps=5, learning_rate=1.0).build(1.0)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (updates["matrix"] < 0).all()
    assert (updates["vector"] == 0).all()


def test_memory_counts_stored_logits(programs):
    memory = programs.memory()
    assert memory.stored_logits == 3 * 8 * 40 * 4
    assert memory.stored_logits_with_gradient == 2 * memory.stored_logits
    assert memory.step_temporaries is None or memory.step_temporaries > 0
