"""The generate loop: its log-probabilities are the model's at the words drawn."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsoft.examples import generate, words
from tests import truth


def test_prints_texts_and_their_log_probabilities(capsys):
    options = ["--steps", "60", "--length", "16", "--prompt", "class Parser", "--rows"]
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert generate.main([*options, "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("\nclass Parser") == 3
    found = re.findall(r"log-probability (\S+), (\S+) after the filters", text)
    assert len(found) == 3
    for log_prob, filtered in found:
        # A word at random would have the log-probability -7.6.
        assert -16 * 6 < float(log_prob) < float(filtered) < 0


def test_log_probabilities_are_those_of_the_words_drawn():
    model = words.WordModel(64, 16, rngs=nnx.Rngs(0))
    assert model.head.kernel is not None
    model.head.kernel[...] *= 10
    windows = jnp.arange(24, dtype=jnp.int32).reshape(3, words.WINDOW)
    drawn = generate.generate(
        model, jax.random.key(1), windows, 5, temperature=0.7, top_k=4, top_p=0.9
    )
    seen = np.asarray(windows)
    for ids, log_probs, filtered in zip(*map(np.asarray, drawn), strict=True):
        hidden = np.asarray(model(jnp.asarray(seen)), float)
        all_log_probs = truth.log_softmax(
            hidden @ np.asarray(model.head.kernel[...], float) / 0.7
        )
        best = -np.sort(-all_log_probs)[:, :4]
        share = np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)
        kept = np.where(share.cumsum(axis=1) - share < 0.9, np.exp(best), 0)
        exact = np.take_along_axis(all_log_probs, ids[:, None], axis=1)[:, 0]
        assert (exact >= best[:, 3] - 1e-4).all()
        np.testing.assert_allclose(log_probs, exact, atol=1e-4)
        np.testing.assert_allclose(
            filtered, exact - np.log(kept.sum(axis=1)), atol=1e-4
        )
        seen = np.concatenate([seen[:, 1:], ids[:, None]], axis=1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--length", "0"], "--length must be at least 1"),
        (["--temperature", "nan"], "--temperature must be in [0, inf]"),
        (["--top-k", "-1"], "--top-k must be at least 0"),
        (["--top-p", "1.5"], "--top-p must be in [0, 1]"),
        (["--min-p", "-1"], "--min-p must be in [0, 1]"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    with pytest.raises(SystemExit):
        generate.main(options)
    assert message in capsys.readouterr().err
