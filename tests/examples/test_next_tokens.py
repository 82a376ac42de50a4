"""Several next-token heads: every depth learns, and the nearest word is said best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.examples import next_tokens


def test_every_depth_learns(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert next_tokens.main(["--steps", "60", "--depths", "3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    before, after = (np.array([float(row[i]) for row in rows]) for i in (1, 2))
    accuracy = [float(row[3].removesuffix("%")) for row in rows]
    assert (after < before - 2).all()
    assert after[0] < after[1:].min() and accuracy[0] > max(accuracy[1:]) > 10


def test_labels_are_the_words_after_a_window():
    words = jnp.arange(24).reshape(2, 12)
    windows, labels = next_tokens.examples(words, 2)
    assert windows.shape == (2, 3, 8) and labels.shape == (2, 2, 3)
    np.testing.assert_array_equal(labels[0], windows[..., -1] + 1)
    np.testing.assert_array_equal(labels[1], windows[..., -1] + 2)


@pytest.mark.parametrize("name", ["steps", "depths"])
def test_bad_options_are_told(name, capsys):
    with pytest.raises(SystemExit):
        next_tokens.main([f"--{name}", "0"])
    assert f"--{name} must be at least 1" in capsys.readouterr().err
