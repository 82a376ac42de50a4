"""Words of text that every machine has, and a small model of them, for the recipes.

The text is some of the standard library's sources. The model sees the last few words
alone, so that a step of generation needs no cache.
"""

import argparse
import collections
import inspect
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsoft.nn import SoftmaxHead

__all__ = [
    "WINDOW",
    "WordModel",
    "continued",
    "draw_windows",
    "pretrain",
    "read_words",
    "split_words",
]

WINDOW = 8


def split_words(text: str) -> list[str]:
    """Returns a text's words, signs, spaces and line ends with what indents a line."""
    return re.findall(r"\w+|\n *| +|[^\w\s]", text)


def read_words(num_classes: int) -> tuple[list[str], np.ndarray]:
    """Returns the most frequent words, and the text as their ids.

    Args:
      num_classes: how many words; all others are the last one, "…".

    Returns:
      Words, the most frequent first, and [N] int32.
    """
    text = "".join(
        Path(str(module.__file__)).read_text(encoding="utf-8")
        for module in (argparse, inspect, typing)
    )
    found = split_words(text)
    common = collections.Counter(found).most_common(num_classes - 1)
    words = [word for word, _ in common] + ["…"]
    ids = {word: index for index, word in enumerate(words)}
    return words, np.array([ids.get(word, len(words) - 1) for word in found], np.int32)


class WordModel(nnx.Module):
    """Hidden states of windows of words, and a softmax over the next word."""

    def __init__(self, num_classes: int, features: int, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          num_classes: how many words.
          features: width.
          rngs: source of the parameters' keys.
        """
        self.embed = nnx.Embed(num_classes, features, rngs=rngs)
        self.mix = nnx.Linear(WINDOW * features, features, rngs=rngs)
        self.expand = nnx.Linear(features, 2 * features, rngs=rngs)
        self.contract = nnx.Linear(2 * features, features, rngs=rngs)
        self.head = SoftmaxHead(features, num_classes, rngs=rngs)

    def __call__(self, windows: jax.Array) -> jax.Array:
        """Returns hidden states [..., H] of windows [..., WINDOW]."""
        embedded = self.embed(windows).reshape(*windows.shape[:-1], -1)
        hidden = self.mix(embedded)
        return hidden + self.contract(nnx.relu(self.expand(hidden)))


def draw_windows(
    key: jax.Array, ids: jax.Array, count: int, length: int = WINDOW
) -> jax.Array:
    """Returns places of a text, [count, length].

    Args:
      key: of the places.
      ids: [N], the text.
      count: how many places.
      length: words of each.
    """
    starts = jax.random.randint(key, (count, 1), 0, len(ids) - length)
    return ids[starts + jnp.arange(length)[None]]


def continued(
    model: WordModel, key: jax.Array, windows: jax.Array, steps: int
) -> jax.Array:
    """Returns windows and those that the model's own words make of them.

    Args:
      model: draws the words.
      key: of the draws.
      windows: [B, WINDOW].
      steps: how many windows of each.

    Returns:
      [steps, B, WINDOW], the given ones first.
    """

    def step(windows, key):
        drawn = model.head.sample(key, model(windows))
        return jnp.concatenate([windows[:, 1:], drawn[:, None]], axis=1), windows

    return jax.lax.scan(step, windows, jax.random.split(key, steps))[1]


def pretrain(model: WordModel, ids: np.ndarray, *, steps: int, seed: int) -> float:
    """Trains a model on text.

    Args:
      model: is changed.
      ids: [N], the text.
      steps: how many, of 256 windows each.
      seed: of the windows.

    Returns:
      The mean loss of the last tenth of the steps, in nats.
    """
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    text = jnp.asarray(ids)

    @nnx.jit
    def step(model, optimizer, key):
        chosen = draw_windows(key, text, 256, WINDOW + 1)
        windows, labels = chosen[:, :-1], chosen[:, -1]
        loss, gradients = nnx.value_and_grad(
            lambda model: model.head.loss(model(windows), labels)
        )(model)
        optimizer.update(model, gradients)
        return loss

    keys = jax.random.split(jax.random.key(seed), steps)
    losses = [step(model, optimizer, key) for key in keys]
    return float(np.mean(losses[-max(steps // 10, 1) :]))
