"""The categorical VAE: its ELBO, a few steps with each estimator, the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsoft.examples import categorical_vae as vae
from tests import truth


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        yield


def _images(number):
    """The left or the right half of each image is set: one bit."""
    left = np.random.default_rng(0).integers(0, 2, (number, 1, 1))
    half = np.arange(8) < 4
    return (
        np.where(half == left, 1.0, 0.0)
        .repeat(8, 1)
        .reshape(number, 64)
        .astype(np.float32)
    )


def test_elbo_is_likelihood_less_divergence():
    model, images = vae.CategoricalVAE(16, rngs=nnx.Rngs(1)), _images(3)
    model.to_latents.kernel[...] *= 10
    log_q = truth.log_softmax(model.encode(jnp.asarray(images)))
    latents = jax.random.normal(jax.random.key(0), (3, 20, 10))
    value, divergence = nnx.jit(
        lambda model: vae.elbo(model, jnp.asarray(images), lambda logits: latents)
    )(model)
    exact = (np.exp(log_q) * (log_q - np.log(0.1))).sum((1, 2))
    assert truth.error(divergence, exact) < 1e-4
    pixels = np.asarray(model.decode(latents), float)
    likelihood = -np.log1p(np.exp(np.where(images == 1, -pixels, pixels))).sum(-1)
    assert truth.error(value, likelihood - exact) < 1e-5


@pytest.mark.parametrize("name", vae.ESTIMATORS)
def test_every_estimator_trains_both_networks(name):
    images = _images(64)
    result = vae.fit(
        vae.ESTIMATORS[name],
        images,
        images[:8],
        epochs=100,
        seed=0,
        batch_size=32,
        features=16,
    )
    # A coin for each pixel.
    assert -64 * np.log(2) < result.elbo < 0
    assert 0 <= result.divergence and 0 < result.step_seconds
    untrained = vae.CategoricalVAE(16, rngs=nnx.Rngs(0))
    start = untrained.encode(jnp.asarray(images[:8]))
    moved = np.abs(result.model.encode(jnp.asarray(images[:8])) - start).max()
    assert moved > 1e-2


def test_the_command_measures_and_draws(monkeypatch, capsys, tmp_path):
    model = vae.CategoricalVAE(16, rngs=nnx.Rngs(0))
    done = vae.Fit(model, -20.0, 5.0, 0.002)
    monkeypatch.setattr(vae, "load_digits", lambda seed: (_images(64), _images(9)))
    monkeypatch.setattr(vae, "fit", lambda *args, **options: done)
    out = tmp_path / "plots"
    options = ["--epochs", "1", "--estimators", "reinmax", "--out", str(out)]
    assert vae.main(options) == 0
    text = capsys.readouterr().out
    assert "9 test digits" in text
    row = next(line for line in text.splitlines() if line.startswith("│ reinmax"))
    numbers = [float(cell) for cell in row.split("│")[2:6]]
    assert numbers == [-20, -15, 5, 2]
    assert [file.name for file in out.iterdir()] == ["reinmax.png"]
    assert (out / "reinmax.png").read_bytes()[:4] == b"\x89PNG"


def test_digits_are_binary_and_split():
    pytest.importorskip("sklearn")
    train, test = vae.load_digits(0)
    assert train.shape == (1438, 64) and test.shape == (359, 64)
    both = np.concatenate([train, test])
    assert set(np.unique(both)) == {0, 1} and 0.2 < both.mean() < 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--estimators", "reinforce"], "invalid choice: 'reinforce'"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    with pytest.raises(SystemExit):
        vae.main(options)
    assert message in capsys.readouterr().err
