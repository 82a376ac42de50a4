"""Temperature scaling of a digits classifier: `python -m jaxsoft.examples.calibration`.

A small network learns scikit-learn's handwritten digits until its training loss is next
to nothing. On digits that it has not seen it is then surer than it is right. One
temperature, fitted on a third part of the data, brings its confidence back to its
accuracy, and changes no prediction.

Needs the extra `train`: `pip install "jaxsoft[train]"`. Writes `reliability-before.png`
and `reliability-after.png` into a folder.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsoft
from jaxsoft.nn import TemperatureScaling

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Measures", "digits", "main", "measure", "train"]

_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


class Part(NamedTuple):
    """One part of the data: images [N, 64] in [0, 1], labels [N]."""

    images: jax.Array
    labels: jax.Array


class Measures(NamedTuple):
    """How good probabilities are: accuracy, mean NLL in nats, calibration error."""

    accuracy: float
    nll: float
    ece: float


class Classifier(nnx.Module):
    """A network of two hidden layers."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          width: of the hidden layers.
          rngs: source of the parameters' keys.
        """
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits [N, 10] of images [N, 64]."""
        hidden = nnx.relu(self.first(images))
        return self.last(nnx.relu(self.second(hidden)))


def digits(seed: int) -> tuple[Part, Part, Part]:
    """Returns 300 digits to train on, half of the others to calibrate, half to test.

    Args:
      seed: of the order in which they are dealt out.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = (data.data[order] / 16).astype(np.float32)
    labels = data.target[order].astype(np.int32)
    middle = 300 + (len(order) - 300) // 2
    return tuple(  # pyright: ignore[reportReturnType]
        Part(jnp.asarray(images[part]), jnp.asarray(labels[part]))
        for part in (slice(300), slice(300, middle), slice(middle, None))
    )


def train(part: Part, *, steps: int, seed: int, width: int = 256) -> Classifier:
    """Returns a classifier trained on all of `part` in every step.

    Args:
      part: the data.
      steps: how many.
      seed: of the parameters.
      width: of the hidden layers.
    """
    model = Classifier(width, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)
    optimizer = optax.adam(3e-3)

    def loss(params):
        logits = nnx.merge(graph, params)(part.images)
        return jaxsoft.softmax_cross_entropy(logits, part.labels).mean()

    @jax.jit
    def run(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]

    return nnx.merge(graph, run(params))


def measure(logits: jax.Array, labels: jax.Array, num_bins: int = 15) -> Measures:
    """Returns the measures of the softmax of logits [N, 10]."""
    probabilities = jaxsoft.softmax(logits)
    accuracy = (logits.argmax(axis=-1) == labels).mean()
    nll = jaxsoft.softmax_cross_entropy(logits, labels).mean()
    ece = jaxsoft.expected_calibration_error(probabilities, labels, num_bins)
    return Measures(float(accuracy), float(nll), float(ece))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example.

    Args:
      arguments: the words after the program's name; None reads them from `sys`.

    Returns:
      The exit code: 0, or 1 if a package is missing or a file cannot be written.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("steps", "seed"):
        least = int(name == "steps")
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    missing = [
        package
        for module, package in _PACKAGES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        print(
            f"this example needs {', '.join(missing)}, which the extra `train` "
            'installs: pip install "jaxsoft[train]"',
            file=sys.stderr,
        )
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        _run(options.seed, options.steps, options.out)
    except OSError as error:
        print(f"cannot write to {options.out}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.calibration",
        description="Calibrates an over-confident digits classifier by temperature "
        "scaling, prints accuracy, NLL and calibration error before and after, and "
        "draws both reliability diagrams.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("calibration"),
        help="folder for reliability-before.png and reliability-after.png; files of "
        "these names are replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of split and parameters (default: 0)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="training steps; too many on purpose (default: %(default)s)",
    )
    return parser


def _run(seed: int, steps: int, out: Path) -> None:
    """Trains, calibrates, prints and draws."""
    from rich.console import Console

    from jaxsoft.training import reliability_diagram

    training, calibration, test = digits(seed)
    model = train(training, steps=steps, seed=seed)
    scaling = TemperatureScaling()
    fit = scaling.fit(model(calibration.images), calibration.labels)
    logits = model(test.images)
    scaled = scaling(logits)
    console = Console()
    counts = [len(part.labels) for part in (training, calibration, test)]
    console.print(
        f"{counts[0]} digits to train on, {counts[1]} to calibrate, {counts[2]} to test"
    )
    console.print(
        f"temperature {fit.temperature:.3f}"
        + ("" if fit.at_bound == 0 else ", at a bound of the search")
    )
    console.print(_table(measure(logits, test.labels), measure(scaled, test.labels)))
    for name, values in (("before", logits), ("after", scaled)):
        path = reliability_diagram(
            jaxsoft.softmax(values),
            test.labels,
            out / f"reliability-{name}.png",
            title=f"Test digits, {name} calibration",
        )
        console.print(f"wrote {path}", soft_wrap=True)


def _table(before: Measures, after: Measures) -> "Table":
    """Returns a table of both, for the console."""
    from rich.table import Table

    table = Table(title="On the test digits")
    for heading in ("", "accuracy", "NLL (nats)", "calibration error"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in (("before", before), ("after", after)):
        values = (f"{row.accuracy:.2%}", f"{row.nll:.4f}", f"{row.ece:.4f}")
        table.add_row(name, *values)
    return table


if __name__ == "__main__":
    sys.exit(main())
