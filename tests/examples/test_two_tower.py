"""The two-tower retriever: the logQ correction finds more of what users choose."""

import re

import jax
import numpy as np
import pytest

from jaxsoft.examples import two_tower


def test_the_correction_finds_more(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert two_tower.main(["--steps", "200"]) == 0
    rows = {
        line[:13].strip(): [float(x) for x in re.findall(r"\d+\.\d+", line)]
        for line in capsys.readouterr().out.splitlines()[1:]
    }
    plain, corrected = np.array(rows["no correction"]), np.array(rows["logQ"])
    assert (corrected > 2 * plain).all()
    assert corrected[0] > 20 and corrected[1] > corrected[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seed", "-1"], "--seed must not be negative"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    with pytest.raises(SystemExit):
        two_tower.main(options)
    assert message in capsys.readouterr().err
