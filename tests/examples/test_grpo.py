"""The GRPO recipe: rewards rise, and replay alone starts at ratios of 1."""

import re

import jax
import pytest

from jaxsoft.examples import grpo


def test_rewards_rise_and_most_with_replay(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert grpo.main(["--steps", "50"]) == 0
    text = capsys.readouterr().out
    rows = {
        line.split("  ")[0].strip(): [float(x) for x in re.findall(r"\d\.\d+", line)]
        for line in text.splitlines()[1:]
    }
    *replay, exact = rows["replay"]
    *without, away = rows["no replay"]
    assert len(replay) == len(without) == 5
    assert exact < 1e-3 and away > 0.3
    assert replay[-1] > replay[0] + 0.3
    assert without[0] < without[-1]
    assert sum(replay) > sum(without) + 0.2


def test_a_bad_option_is_told(capsys):
    with pytest.raises(SystemExit):
        grpo.main(["--steps", "4"])
    assert "--steps must be at least 5" in capsys.readouterr().err
