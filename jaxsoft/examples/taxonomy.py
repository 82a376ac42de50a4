"""A taxonomy classifier of text paths: `python -m jaxsoft.examples.taxonomy`.

The classes are lines such as `Animals > Birds > Owls`, and the softmax goes down their
tree: a choice among the kinds of things, one among the groups of a kind, one among the
members of a group. So mistakes stay near, and what is known of a kind is learnt from
all of its members. Documents are bags of words that are drawn here: some of each branch
of a path, most of no meaning. What is printed is the accuracy at each level.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsoft import ClassTree
from jaxsoft.nn import HierarchicalSoftmaxHead

__all__ = [
    "Classifier",
    "Documents",
    "accuracies",
    "branches",
    "documents",
    "main",
    "train",
]

PATHS = """
Animals > Birds > Owls
Animals > Birds > Ducks
Animals > Birds > Gulls
Animals > Birds > Crows
Animals > Mammals > Bats
Animals > Mammals > Cats
Animals > Mammals > Dogs
Animals > Fish > Carp
Animals > Fish > Eels
Plants > Trees > Oaks
Plants > Trees > Limes
Plants > Trees > Pines
Plants > Herbs > Mint
Plants > Herbs > Sage
Plants > Mosses
Tools > Kitchen > Pans
Tools > Kitchen > Knives
Tools > Kitchen > Ladles
Tools > Garden > Spades
Tools > Garden > Rakes
Tools > Garden > Hoses
Tools > Workshop > Saws
Tools > Workshop > Planes
Tools > Workshop > Clamps
Tools > Workshop > Drills
""".strip().splitlines()
WORDS, NOISE = 4, 400


class Documents(NamedTuple):
    """Documents and their classes.

    Attributes:
      counts: [N, W] float32, how often each has each word.
      labels: [N] int32 in [0, len(PATHS)).
    """

    counts: np.ndarray
    labels: np.ndarray


def branches(path: str) -> list[str]:
    """Returns a path and those above it, from the top."""
    names = path.split(" > ")
    return [" > ".join(names[: end + 1]) for end in range(len(names))]


def documents(count: int, length: int, seed: int) -> Documents:
    """Returns documents of which each branch of their path has a tenth of the words.

    Args:
      count: N.
      length: words of each.
      seed: of labels and words.
    """
    random = np.random.default_rng(seed)
    names = list(dict.fromkeys(name for path in PATHS for name in branches(path)))
    size = WORDS * len(names) + NOISE
    probs = np.empty((len(PATHS), size))
    for class_id, path in enumerate(PATHS):
        probs[class_id] = (1 - 0.1 * len(branches(path))) / size
        for name in branches(path):
            first = WORDS * names.index(name)
            probs[class_id, first : first + WORDS] += 0.1 / WORDS
    labels = random.integers(0, len(PATHS), count, np.int32)
    return Documents(random.multinomial(length, probs[labels]).astype("f4"), labels)


class Classifier(nnx.Module):
    """A layer of word counts, and a softmax down the tree of the paths."""

    def __init__(self, num_words: int, features: int, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          num_words: W.
          features: width.
          rngs: source of the parameters' keys.
        """
        tree = ClassTree.from_paths(PATHS)
        self.embed = nnx.Linear(num_words, features, rngs=rngs)
        self.head = HierarchicalSoftmaxHead(features, tree, use_bias=True, rngs=rngs)

    def __call__(self, counts: jax.Array) -> jax.Array:
        """Returns hidden states [N, H] of word counts [N, W]."""
        return nnx.tanh(self.embed(counts))


def train(data: Documents, *, steps: int, seed: int) -> Classifier:
    """Returns a trained classifier.

    Args:
      data: to train on.
      steps: how many, of 256 documents each.
      seed: of parameters and batches.
    """
    model = Classifier(data.counts.shape[1], 64, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    counts, labels = jnp.asarray(data.counts), jnp.asarray(data.labels)

    @nnx.jit
    def step(model, optimizer, key):
        chosen = jax.random.randint(key, (256,), 0, len(labels))
        gradients = nnx.grad(
            lambda model: model.head.loss(model(counts[chosen]), labels[chosen])
        )(model)
        optimizer.update(model, gradients)

    for key in jax.random.split(jax.random.key(seed), steps):
        step(model, optimizer, key)
    return model


def accuracies(model: Classifier, data: Documents) -> list[float]:
    """Returns how often the likeliest class is right, at each level from the top.

    Args:
      model: the classifier.
      data: to measure on.
    """
    _, best = model.head.top_k(model(jnp.asarray(data.counts)), 1)
    # A class is its own branch below the last.
    depth = max(len(branches(path)) for path in PATHS)
    above = [(branches(path) + depth * [path])[:depth] for path in PATHS]
    found, right = (
        np.array(above)[np.asarray(ids)] for ids in (best[:, 0], data.labels)
    )
    return [float(level) for level in (found == right).mean(axis=0)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.taxonomy",
        description="Trains a classifier of documents down a tree of classes.",
    )
    parser.add_argument(
        "--steps", type=int, default=400, help="training steps (default 400)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    seen, unseen = (documents(5000, 20, 2 * options.seed + which) for which in range(2))
    model = train(seen, steps=options.steps, seed=options.seed)
    print("level  accuracy")
    for level, accuracy in enumerate(accuracies(model, unseen), start=1):
        print(f"{level:5}  {accuracy:8.1%}")
    hidden = model(jnp.asarray(unseen.counts[:1]))
    log_probs, class_ids = model.head.top_k(hidden, 3)
    print(f"a document of {PATHS[unseen.labels[0]]}:")
    for log_prob, class_id in zip(log_probs[0], class_ids[0], strict=True):
        print(f"  {np.exp(log_prob):6.1%}  {PATHS[class_id]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
