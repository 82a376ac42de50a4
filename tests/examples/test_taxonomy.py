"""The taxonomy classifier: right at the top more often than at the bottom."""

import re

import jax
import numpy as np
import pytest

from jaxsoft.examples import taxonomy


def test_levels_are_learnt(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert taxonomy.main(["--steps", "150"]) == 0
    text = capsys.readouterr().out
    levels = [float(x) for x in re.findall(r"^ +\d +([\d.]+)%$", text, re.M)]
    assert len(levels) == 3 and levels == sorted(levels, reverse=True)
    # A guess is right at the top in 10 of 25 cases, at the bottom in one.
    assert levels[0] > 85 and levels[2] > 60
    best = re.findall(r"^ +([\d.]+)%  (.+ > .+)$", text, re.M)
    assert len(best) == 3 and all(path in taxonomy.PATHS for _, path in best)


def test_documents_have_the_words_of_their_branches():
    data = taxonomy.documents(2000, 40, seed=0)
    assert (data.counts.sum(axis=1) == 40).all()
    owls = data.counts[data.labels == taxonomy.PATHS.index("Animals > Birds > Owls")]
    others = data.counts[data.labels == taxonomy.PATHS.index("Tools > Garden > Rakes")]
    more = (owls.mean(axis=0) > others.mean(axis=0) + 0.5).nonzero()[0]
    np.testing.assert_array_equal(more, np.arange(3 * taxonomy.WORDS))
    assert taxonomy.branches("Plants > Mosses") == ["Plants", "Plants > Mosses"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seed", "-1"], "--seed must not be negative"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    with pytest.raises(SystemExit):
        taxonomy.main(options)
    assert message in capsys.readouterr().err
