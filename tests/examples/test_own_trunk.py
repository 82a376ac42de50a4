"""A Flax module of one's own in the trainer's loop: trained, resumed, loaded."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsoft.examples import own_trunk
from jaxsoft.training import (
    LanguageModelConfig,
    RunDirectoryError,
    evaluate_language_model,
    load_language_model,
    train_language_model,
)
from jaxsoft.training.language_model.config import TransformerConfig
from jaxsoft.training.running import trunk_name

TEXT = "".join(f"line {index} of a little text\n" for index in range(2000))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return LanguageModelConfig(
        corpus=str(tmp_path / "text.txt"),
        cache_dir=str(tmp_path / "cache"),
        out=str(tmp_path / "run"),
        vocab_size=270,
        steps=8,
        batch_size=4,
        sequence_length=16,
        features=16,
        layers=1,
        evaluation_tokens=64,
        checkpoint_every=4,
        sample_tokens=8,
        prompt="line 1",
    )


def test_the_loop_trains_resumes_and_loads_it(config, tmp_path):
    losses = own_trunk.Losses()
    trunk = own_trunk.Convolutions
    report = train_language_model(config, trunk=trunk, listener=losses)
    assert len(losses.values) == 8 and losses.values[-1] < losses.values[0]
    trained = load_language_model(config.out, trunk=trunk)
    (greedy,) = trained.generate("line 1", temperature=0, max_tokens=8)
    assert greedy.text == report.samples[0].text
    assert evaluate_language_model(config.out, config.corpus, trunk=trunk).step == 8

    class Dies(own_trunk.Losses):
        def step(self, record):
            if record["step"] == 6:
                raise MemoryError

    config = dataclasses.replace(config, out=str(tmp_path / "other"))
    with pytest.raises(MemoryError):
        train_language_model(config, trunk=trunk, listener=Dies())
    for other in (None, nnx.Linear):
        with pytest.raises(
            RunDirectoryError, match="has the `trunk` Convolutions, got"
        ):
            train_language_model(config, trunk=other, resume=True)
    again = train_language_model(config, trunk=trunk, resume=True)
    assert (again.loss, again.samples) == (report.loss, report.samples)
    with pytest.raises(RunDirectoryError, match="has the `trunk` Convolutions, got No"):
        load_language_model(config.out)


def test_the_name_of_a_trunk_has_no_address():
    """Another process loads the run."""

    def made(width, config, *, rngs):
        return own_trunk.Convolutions(config, rngs=rngs)

    class Maker:
        def __call__(self, config, *, rngs):
            return own_trunk.Convolutions(config, rngs=rngs)

    assert trunk_name(functools.partial(made, 3)) == made.__qualname__
    assert trunk_name(Maker()) == Maker.__qualname__


def test_hidden_states_see_the_past_alone():
    sizes = TransformerConfig(num_classes=20, features=8, layers=2, heads=1)
    trunk = own_trunk.Convolutions(sizes, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 20)
    hidden, changed = trunk(tokens), trunk(tokens.at[:, 5].set(tokens[:, 5] - 1))
    np.testing.assert_array_equal(hidden[:, :5], changed[:, :5])
    assert (np.abs(hidden - changed).max(axis=(0, 2))[5:] > 0).all()


@pytest.mark.slow
def test_the_command_trains_and_writes(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--corpus", config.corpus, "--vocab-size", "270", "--steps", "2"]
    options += ["--out", str(tmp_path / "run"), "--prompt", "line 5"]
    assert own_trunk.main(options) == 0
    said = capsys.readouterr().out
    assert "before training" in said and "\nline 5" in said
