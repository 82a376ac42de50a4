import chex
import jax
import jax.numpy as jnp
import pytest

from jaxsoft.training.checkpoints import Checkpoints, Progress
from jaxsoft.training.errors import CheckpointError


def make_state(scale):
    return {
        "matrix": jax.random.normal(jax.random.key(0), (5, 3)) * scale,
        "bits": jnp.array([jnp.nan, -0.0, 1e-45, jnp.inf], jnp.float32),
        "half": jnp.arange(4, dtype=jnp.bfloat16),
        "count": jnp.array(7, jnp.int32),
    }


def as_bits(tree):
    return jax.tree.map(lambda leaf: leaf.tobytes(), jax.device_get(tree))


def test_state_comes_back_bit_for_bit(tmp_path):
    state, progress = make_state(1.5), Progress(step=3, next_batch=3, seconds=0.1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, progress)
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, stood = checkpoints.restore(jax.eval_shape(lambda: state))
    assert as_bits(restored) == as_bits(state)
    chex.assert_trees_all_equal_dtypes(restored, state)
    assert stood == progress


def test_a_saved_state_does_not_change_with_its_donated_source(tmp_path):
    state = make_state(1.0)
    expected = as_bits(state)
    double = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree), donate_argnums=0
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress(1, 1, 0.0))
        for _ in range(3):
            state = double(state)
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert as_bits(restored) == expected


def test_newest_counts_and_old_ones_go(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 3):
            checkpoints.save(make_state(float(step)), Progress(step, step, 0.0))
        restored, progress = checkpoints.restore(jax.eval_shape(make_state, 1.0))
    chex.assert_trees_all_equal(restored["matrix"], make_state(3.0)["matrix"])
    assert progress.step == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "3"]


def test_saving_a_step_twice_is_no_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            checkpoints.save(make_state(1.0), Progress(1, 1, 0.0))
        assert checkpoints.latest_step() == 1


def test_unfinished_checkpoint_is_not_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1.0), Progress(1, 1, 0.0))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        _, progress = checkpoints.restore(jax.eval_shape(make_state, 1.0))
    assert progress.step == 1


def test_nothing_to_restore_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            checkpoints.restore(jax.eval_shape(make_state, 1.0))


def test_damaged_checkpoint_is_an_error_of_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1.0), Progress(1, 1, 0.0))
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoint 1 in .* cannot be read"):
            checkpoints.restore(jax.eval_shape(make_state, 1.0))
