"""A categorical VAE on digits: `python -m jaxsoft.examples.categorical_vae`.

The latents are 20 variables of 10 classes each, the data scikit-learn's 8×8 digits,
scaled to [0, 1] and binarised at 1/2, so that the Bernoulli likelihood is one of the
data. The same model is trained with each estimator of the gradient through a
categorical sample. What is reported is not what was trained on: the ELBO of the test
digits takes one-hot samples of the true posterior, and the exact divergence of each
latent from the uniform prior.
"""

import argparse
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsoft import entropy, gumbel_rao, gumbel_softmax, reinmax, softmax

__all__ = [
    "ESTIMATORS",
    "CategoricalVAE",
    "Estimator",
    "Fit",
    "elbo",
    "fit",
    "load_digits",
    "main",
]

VARIABLES, CLASSES = 20, 10
PIXELS = 64
_SHOWN = 8


class Estimator(NamedTuple):
    """A way to differentiate through a categorical sample.

    Attributes:
      sample: from a key, logits and a temperature to latents of the logits' shape.
      start: the temperature of the first step.
      end: the temperature of the last step.
    """

    sample: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    start: float
    end: float


ESTIMATORS = {
    "gumbel-softmax": Estimator(gumbel_softmax, 1.0, 0.3),
    "straight-through": Estimator(
        functools.partial(gumbel_softmax, hard=True), 1.0, 0.3
    ),
    "reinmax": Estimator(reinmax, 1.5, 1.0),
    "gumbel-rao": Estimator(gumbel_rao, 1.0, 0.3),
}


class CategoricalVAE(nnx.Module):
    """An encoder to the logits of the latents, and a decoder to those of the pixels."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        """Creates both networks, each with one hidden layer.

        Args:
          features: width of the hidden layers.
          rngs: for the weights.
        """
        latents = VARIABLES * CLASSES
        self.read = nnx.Linear(PIXELS, features, rngs=rngs)
        self.to_latents = nnx.Linear(features, latents, rngs=rngs)
        self.from_latents = nnx.Linear(latents, features, rngs=rngs)
        self.write = nnx.Linear(features, PIXELS, rngs=rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Returns posterior logits [N, VARIABLES, CLASSES] of images [N, PIXELS]."""
        logits = self.to_latents(nnx.relu(self.read(2 * images - 1)))
        return logits.reshape(len(images), VARIABLES, CLASSES)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Returns pixel logits [N, PIXELS] of latents [N, VARIABLES, CLASSES]."""
        return self.write(
            nnx.relu(self.from_latents(latents.reshape(len(latents), -1)))
        )


def elbo(
    model: CategoricalVAE,
    images: jax.Array,
    sample: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Returns the ELBO of each image in nats, and the divergence within it.

    Args:
      model: the networks.
      images: [N, PIXELS] of 0 and 1.
      sample: from posterior logits to latents of their shape.
    """
    logits = model.encode(images)
    pixels = model.decode(sample(logits))
    likelihood = -optax.sigmoid_binary_cross_entropy(pixels, images).sum(-1)
    divergence = VARIABLES * math.log(CLASSES) - entropy(logits).sum(-1)
    return likelihood - divergence, divergence


def load_digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns binarised digits to train on and to test on, a fifth, [N, PIXELS]."""
    from sklearn import datasets

    images, _ = datasets.load_digits(return_X_y=True)
    images = (images / 16 >= 0.5).astype(np.float32)
    images = np.random.default_rng(seed).permutation(images)
    held_out = len(images) // 5
    return images[held_out:], images[:held_out]


class Fit(NamedTuple):
    """A trained model and its measurements.

    Attributes:
      model: the networks.
      elbo: mean ELBO of the test digits, in nats, with one-hot latents.
      divergence: the mean divergence from the prior within it.
      step_seconds: time of a training step, compilation apart.
    """

    model: CategoricalVAE
    elbo: float
    divergence: float
    step_seconds: float


def fit(
    estimator: Estimator,
    train: np.ndarray,
    test: np.ndarray,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    features: int = 256,
) -> Fit:
    """Trains a model with one estimator and measures it.

    Args:
      estimator: how to differentiate through samples.
      train: images to train on.
      test: images to measure on.
      epochs: passes over `train`.
      seed: of weights, batches and samples.
      batch_size: images a step.
      features: width of the hidden layers.

    Returns:
      The model and its measurements.
    """
    steps = len(train) // batch_size
    model = CategoricalVAE(features, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    temperatures = np.geomspace(
        estimator.start, estimator.end, epochs * steps, dtype=np.float32
    ).reshape(epochs, steps)
    shuffled = np.random.default_rng(seed)
    run = None
    seconds = 0.0
    for epoch, key in enumerate(jax.random.split(jax.random.key(seed), epochs)):
        batches = shuffled.permutation(train)[: steps * batch_size]
        batches = jnp.asarray(batches.reshape(steps, batch_size, PIXELS))
        inputs = (state, batches, jax.random.split(key, steps), temperatures[epoch])
        if run is None:
            body = functools.partial(_train_epoch, graph, estimator.sample)
            run = jax.jit(body).lower(*inputs).compile()
        started = time.perf_counter()
        state = jax.block_until_ready(run(*inputs))
        seconds += time.perf_counter() - started
    model, _ = nnx.merge(graph, state)
    value, divergence = _test_elbo(model, test, jax.random.key(seed + 1))
    return Fit(model, value, divergence, seconds / (epochs * steps))


def _train_epoch(graph, sample, state, batches, keys, temperatures):
    """Returns the state of model and optimizer after a step on each batch."""

    def step(state, inputs):
        images, key, temperature = inputs
        model, optimizer = nnx.merge(graph, state)

        def loss(model):
            draw = functools.partial(sample, key, temperature=temperature)
            return -elbo(model, images, draw)[0].mean()

        optimizer.update(model, nnx.grad(loss)(model))
        return nnx.state((model, optimizer)), None

    return jax.lax.scan(step, state, (batches, keys, temperatures))[0]


def _test_elbo(
    model: CategoricalVAE, images: np.ndarray, key: jax.Array, draws: int = 20
) -> tuple[float, float]:
    """Returns the mean ELBO under `draws` one-hot samples, and the divergence."""
    shown = jnp.asarray(images)
    values = [_measure(model, shown, key) for key in jax.random.split(key, draws)]
    return float(np.mean([value for value, _ in values])), float(values[0][1])


@nnx.jit
def _measure(
    model: CategoricalVAE, images: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    value, divergence = elbo(model, images, functools.partial(_one_hot_sample, key))
    return value.mean(), divergence.mean()


def _one_hot_sample(key: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.nn.one_hot(jax.random.categorical(key, logits), CLASSES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.categorical_vae",
        description="Trains a categorical VAE on digits with each estimator.",
    )
    parser.add_argument(
        "--epochs", type=int, default=200, help="passes over the digits (default 200)"
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=ESTIMATORS,
        default=list(ESTIMATORS),
        help="which to train with (default all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("categorical-vae"),
        help="folder for a plot of each model (default categorical-vae)",
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    try:
        _run(options)
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing: pip install 'jaxsoft[train]'")
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return 0


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = load_digits(options.seed)
    table = Table(title=f"{len(test)} test digits, after {options.epochs} epochs")
    table.add_column("estimator", no_wrap=True)
    for name in ("test ELBO, nats", "reconstruction", "KL", "ms a step"):
        table.add_column(name, justify="right")
    for name in options.estimators:
        with console.status(f"training with {name}"):
            result = fit(
                ESTIMATORS[name], train, test, epochs=options.epochs, seed=options.seed
            )
            _draw(result.model, test, name, options.out / f"{name}.png", options.seed)
        table.add_row(
            name,
            f"{result.elbo:.2f}",
            f"{result.elbo + result.divergence:.2f}",
            f"{result.divergence:.2f}",
            f"{1e3 * result.step_seconds:.2f}",
        )
    console.print(table)
    files = ", ".join(str(options.out / f"{name}.png") for name in options.estimators)
    console.print(f"plots: {files}", markup=False, highlight=False, soft_wrap=True)


def _draw(
    model: CategoricalVAE, test: np.ndarray, name: str, path: pathlib.Path, seed: int
) -> None:
    """Draws prior samples, test digits, reconstructions and their latents."""
    from matplotlib.figure import Figure

    prior_key, posterior_key = jax.random.split(jax.random.key(seed + 2))
    images = jnp.asarray(test[:_SHOWN])
    logits = model.encode(images)
    flat = jnp.zeros_like(logits)
    rows: list[tuple[str, jax.Array]] = [
        ("prior", model.decode(_one_hot_sample(prior_key, flat))),
        ("digit", images),
        ("again", model.decode(_one_hot_sample(posterior_key, logits))),
        ("latents", softmax(logits)),
    ]
    figure = Figure(figsize=(_SHOWN, 5.6), layout="constrained")
    grid = figure.subplots(len(rows), _SHOWN, height_ratios=(1, 1, 1, 2))
    for row, (title, values) in enumerate(rows):
        shown = values if title in ("digit", "latents") else jax.nn.sigmoid(values)
        for column, axes in enumerate(grid[row]):
            picture = np.asarray(shown[column])
            picture = picture if title == "latents" else picture.reshape(8, 8)
            axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(title)
    figure.suptitle(f"{name}: latents are {VARIABLES} variables of {CLASSES} classes")
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main())
