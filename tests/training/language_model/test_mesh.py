"""Runs on meshes: the same losses wherever a run is, and wherever it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsoft.training import LanguageModelConfig, MeshError
from jaxsoft.training.heads import HEADS
from jaxsoft.training.language_model.preparation import check_vocabulary

# One worker: its runs serve many tests.
SCRIPT = Path(__file__).with_name("runs_on_meshes.py")


@pytest.fixture(scope="module")
def runs(corpus_dir, cache_dir, tmp_path_factory):
    """All that the script measures, on eight virtual devices."""
    fields = {
        "corpus": str(corpus_dir),
        "cache_dir": str(cache_dir),
        "out": str(tmp_path_factory.mktemp("meshes") / "run"),
        "vocab_size": 272,
        "steps": 12,
        "learning_rate": 0.01,
        "batch_size": 4,
        "sequence_length": 16,
        "features": 16,
        "layers": 1,
        "heads": 2,
        "evaluate_every": 5,
        "evaluation_tokens": 128,
        "checkpoint_every": 2,
        "sample_tokens": 8,
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[3]), *sys.path]),
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["whole", "moved", "grown"])
def test_losses_are_those_of_one_device(runs, name):
    alone, sharded = runs["none"], runs[name]
    assert sharded["steps"] == [*range(1, 13)]
    np.testing.assert_allclose(sharded["losses"], alone["losses"], rtol=1e-4)
    np.testing.assert_allclose(sharded["norms"], alone["norms"], rtol=1e-3)
    assert alone["losses"][-1] < alone["losses"][0] - 0.1


def test_samples_are_those_of_one_device(runs):
    assert runs["whole"]["texts"] == runs["none"]["texts"]


def test_another_mesh_is_noted(runs):
    for name in ("moved", "grown"):
        assert "mesh changed since the run started" in "\n".join(runs[name]["notes"])
        assert "resumed after step" in "\n".join(runs[name]["notes"])
    assert not any("changed" in note for note in runs["whole"]["notes"])


def test_memory_is_that_of_a_device(runs):
    for name, devices in (("none", 1), ("whole", 8)):
        memory = runs[name]["memory"]
        assert memory["devices"] == devices
        assert memory["stored_logits"] == 4 * 4 * 16 * 272 // devices


def test_head_and_its_moments_are_sharded_and_nothing_else(runs):
    cut = runs["placement"]["cut"]
    assert len(cut) == 6 and all("'head'" in path for path in cut)
    for path, spec in cut.items():
        kernel = "'kernel'" in path
        assert spec == ("P(None, 'vocab')" if kernel else "P('vocab',)"), path
    assert runs["placement"]["whole"] > 20


def test_step_gathers_no_kernel(runs):
    """[16, 272] is the whole kernel; hidden states of a device are [2 * 16, 16]."""
    collectives = runs["placement"]["collectives"]
    assert "all-reduce" in [kind for _, kind in collectives]
    for result, kind in collectives:
        assert kind != "all-gather" or "272" not in result, result


@pytest.mark.parametrize("head", HEADS)
def test_every_head_takes_batches_over_devices(runs, head):
    alone, sharded = runs["over_data"][head]
    np.testing.assert_allclose(sharded, alone, rtol=1e-4)
    assert alone[0] != alone[2]


def test_command(runs):
    code, output, errors = runs["command"]
    assert code == 0, errors
    assert "on each of 8 devices" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch", "--batch-size must be a multiple of the 2 devices along data, got 3"),
        ("batch", "give 4, or another --mesh."),
        ("vocabulary", "multiple of the 4 devices along vocab, got 270 tokens"),
        ("vocabulary", "give --vocab-size 268, or another --mesh."),
        ("tree", "--mesh must have one device along vocab with --head 'hierarchical'"),
        ("devices", "multiply to the number of devices, 8, got 'data=3,vocab=2'"),
    ],
)
def test_command_refuses_in_one_line(runs, name, message):
    code, _, errors = runs[name]
    assert code == 2
    assert message in errors and len(errors.splitlines()) == 1


def test_vocabulary_to_take_is_large_enough():
    """A smaller one would have no room for all bytes."""

    class FourByOne:
        shape = {"data": 1, "vocab": 4}

    mesh: Any = FourByOne()
    check_vocabulary(mesh, 260)
    with pytest.raises(MeshError, match="`vocab_size` 260"):
        check_vocabulary(mesh, 259)
    with pytest.raises(MeshError, match="`vocab_size` 260"):
        check_vocabulary(mesh, 263)


def test_mesh_is_no_part_of_the_configuration():
    assert "mesh" not in LanguageModelConfig.__dataclass_fields__
