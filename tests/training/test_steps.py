from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.training.steps import OptimizerConfig, Programs
from jaxsoft.training.transformer import TransformerConfig

MODEL = TransformerConfig(num_classes=40, features=16, layers=1, heads=2)
OPTIMIZER = OptimizerConfig(steps=20, learning_rate=1e-2)


@pytest.fixture(scope="module")
def programs():
    return Programs(MODEL, OPTIMIZER, (3, 8), seed=0)


@pytest.fixture
def state(programs):
    return programs.init(np.full(40, -np.log(40)))


def counting(batch=3, length=8):
    start = np.arange(batch)[:, None]
    return ((start + np.arange(length + 1)) % 40).astype(np.int32)


def test_training_starts_at_the_unigram_loss_and_learns(programs, state):
    losses = []
    for _ in range(20):
        state, result = programs.step(state, counting())
        losses.append(float(result.loss))
    assert abs(losses[0] - np.log(40)) < 1e-5
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_is_deterministic(programs):
    ends = []
    for _ in range(2):
        state = programs.init(np.zeros(40))
        for _ in range(3):
            state, _ = programs.step(state, counting())
        ends.append(state)
    chex.assert_trees_all_equal(*ends)


def test_seed_decides_the_parameters(programs):
    other = Programs(MODEL, OPTIMIZER, (3, 8), seed=1)
    one, two = (p.init(np.zeros(40)).params for p in (programs, other))
    table_one = one["trunk"]["embedding"]["embedding"][...]
    assert (table_one != two["trunk"]["embedding"]["embedding"][...]).any()


def test_state_is_donated(programs, state):
    leaf = jax.tree.leaves(state.params)[0]
    programs.step(state, counting())
    assert leaf.is_deleted()


def test_evaluation_ignores_its_padding(programs, state):
    for _ in range(3):
        state, _ = programs.step(state, counting())
    windows = np.random.default_rng(0).integers(0, 40, (7, 9)).astype(np.int32)
    alone = [programs.evaluate(state.params, windows[i : i + 1]) for i in range(7)]
    assert np.isclose(programs.evaluate(state.params, windows), np.mean(alone))


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
    optimizer = OptimizerConfig(steps=5, learning_rate=1.0).build()
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (updates["matrix"] < 0).all()
    assert (updates["vector"] == 0).all()


def test_greedy_sample_repeats_what_was_learnt(programs, state):
    for _ in range(20):
        state, _ = programs.step(state, counting())
    greedy, warm = programs.sample(state.params, [2], [0.0, 1.0], 5)
    assert greedy == [3, 4, 5, 6, 7]
    assert len(warm) == 5 and all(0 <= token < 40 for token in warm)


def test_samples_equal_a_plain_loop(programs, state):
    """Past the window's end the context slides: the last T tokens count."""
    for _ in range(20):
        state, _ = programs.step(state, counting())
    prompt, length = [5, 6, 7], 8
    sampled = programs.sample(state.params, prompt, [0.0], 12)[0]
    context = list(prompt)

    @jax.jit
    def logits(tokens, last):
        model = programs.model(state.params)
        return model.head(model.trunk(tokens)[0, last])

    for token in sampled:
        window = context[-length:]
        padded = jnp.asarray([window + [39] * (length - len(window))])
        assert token == int(logits(padded, len(window) - 1).argmax())
        context.append(token)


def test_long_prompt_counts_by_its_end(programs, state):
    for _ in range(5):
        state, _ = programs.step(state, counting())
    long = list(range(20))
    assert programs.sample(state.params, long, [0.0, 0.7], 4) == programs.sample(
        state.params, long[-8:], [0.0, 0.7], 4
    )


def test_memory_counts_stored_logits(programs):
    memory = programs.memory()
    assert memory.stored_logits == 3 * 8 * 40 * 4
    assert memory.stored_logits_with_gradient == 2 * memory.stored_logits
    assert memory.step_temporaries is None or memory.step_temporaries > 0
