"""The bandit: schedules learn, and the command prints and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.examples import bandit
from tests.truth import softmax


def test_annealing_beats_greed_and_chance(capsys, tmp_path):
    path = tmp_path / "regret.png"
    options = ["--arms", "5", "--steps", "300", "--seeds", "64", "--out", str(path)]
    assert bandit.main(options) == 0
    text = capsys.readouterr().out
    totals = {
        line.split("│")[1].strip(): float(line.split("│")[2])
        for line in text.splitlines()
        if line.startswith("│")
    }
    annealed = min(total for name, total in totals.items() if " to " in name)
    assert len(totals) == 7 and path.read_bytes()[:4] == b"\x89PNG"
    assert annealed < totals["greedy (τ = 0)"] < totals["uniform (τ = ∞)"]


def test_regrets_are_those_of_softmax_over_the_mean_rewards():
    """First at temperature ∞, then at 1 by the average rewards of so many pulls."""
    keys = jax.random.split(jax.random.key(3), 500)
    temperatures = jnp.repeat(np.array([np.inf, 1], "float32"), 400)
    regret = jax.jit(jax.vmap(lambda key: bandit.play(key, temperatures, 4)))(keys)
    regret = np.asarray(regret)
    means = np.random.default_rng(0).standard_normal((100_000, 4))
    gaps = means.max(axis=1, keepdims=True) - means
    np.testing.assert_allclose(regret[:, :400].mean(), gaps.mean(), atol=0.1)
    expected = (softmax(means) * gaps).sum(axis=1).mean()
    np.testing.assert_allclose(regret[:, 400:].mean(), expected, atol=0.05)
    assert (regret >= 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arms", "0"], "--arms must be at least 1"),
        (["--out", "missing/a.png"], "there is no folder missing"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    with pytest.raises(SystemExit):
        bandit.main(options)
    assert message in capsys.readouterr().err
