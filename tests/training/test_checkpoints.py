import json
import shutil
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxsoft.training import checkpoints as checkpoints_module
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


def damage(folder, change):
    """Changes the contents of all files of a checkpoint."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(change(bytearray(file.read_bytes())))


def flipped(content):
    """A bit of each byte in the second half of a file."""
    half = len(content) // 2
    return content[:half] + bytes(byte ^ 4 for byte in content[half:])


def test_the_one_before_takes_the_place_of_a_damaged_checkpoint(tmp_path, capfd):
    """Its number can be saved again, and nothing is printed by anybody's threads."""
    with Checkpoints(tmp_path / "whole") as checkpoints:
        for step in (20, 40):
            checkpoints.save(make_state(float(step)), Progress(step, step, 0.0))
    for number, change in enumerate((lambda content: b"", lambda c: c[:9], flipped)):
        folder, notes = tmp_path / str(number), []
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "40" / "state", change)
        with Checkpoints(folder, note=notes.append) as checkpoints:
            assert checkpoints.latest_step() == 40
            restored, progress = checkpoints.restore(jax.eval_shape(make_state, 1.0))
            assert progress.step == checkpoints.latest_step() == 20
            assert as_bits(restored) == as_bits(make_state(20.0))
            (note,) = notes
            assert note.startswith("checkpoint 40 is damaged (") and "\n" not in note
            assert note.endswith("); going on from 20") and len(note) < 400
            for step in (30, 40):
                checkpoints.save(make_state(float(step)), Progress(step, step, 0.0))
        with Checkpoints(folder) as checkpoints:
            restored, progress = checkpoints.restore(jax.eval_shape(make_state, 1.0))
        assert progress.step == 40 and as_bits(restored) == as_bits(make_state(40.0))
        steps = sorted(path.name for path in folder.iterdir() if path.is_dir())
        assert steps == ["30", "40"]
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err + shown.out


def test_what_is_left_of_reading_a_damaged_checkpoint_is_not_told(monkeypatch):
    """TensorStore may keep a coroutine, which raises when it is thrown away."""
    source = """if True:
    async def read():
        try:
            await wait
        except GeneratorExit:
            raise OSError("too late")
    """
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: told.append(each.exc_value))
    for _ in range(2):
        with pytest.raises(CheckpointError), checkpoints_module._without_tracebacks():
            raise ValueError("damaged")
    for path in ("/lib/orbax/a.py", "/lib/mine/a.py"):
        scope: dict[str, Any] = {"wait": Endless()}
        exec(compile(source, path, "exec"), scope)
        coroutine = scope["read"]()
        coroutine.send(None)
        del coroutine
    assert list(map(str, told)) == ["too late"]


class Endless:
    def __await__(self):
        yield


def test_progress_is_held_against_its_schema(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "_AFTERMATH", 0.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1.0), Progress(3, 3, 0.0))
    (file,) = (tmp_path / "3" / "progress").glob("metadata")
    good = json.loads(file.read_text())
    bad = [
        good | changes
        for changes in (
            {"step": "3"},
            {"step": 2},
            {"next_batch": -1},
            {"next_batch": 1.5},
            {"seconds": float("nan")},
            {"seconds": None},
            {"more": 1},
        )
    ]
    with Checkpoints(tmp_path) as checkpoints:
        for content in (*bad, [], None):
            file.write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match="checkpoint 3 in .* cannot be"):
                checkpoints.restore(jax.eval_shape(make_state, 1.0))


def test_a_state_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "_AFTERMATH", 0.0)
    notes = []
    with Checkpoints(tmp_path, note=notes.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(1.0), Progress(step, step, 0.0))
        for change in ({"matrix": jnp.ones((5, 4))}, {"more": jnp.ones(3)}):
            with pytest.raises(CheckpointError, match="checkpoint 2 in .* cannot be"):
                checkpoints.restore(
                    jax.eval_shape(lambda change=change: make_state(1.0) | change)
                )
        assert not notes and checkpoints.latest_step() == 2


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="checkpoints in .* cannot be opened"):
        Checkpoints(tmp_path / "file" / "checkpoints")
