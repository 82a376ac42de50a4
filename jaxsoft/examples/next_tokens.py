"""Several next-token heads on one kernel: `python -m jaxsoft.examples.next_tokens`.

A model says the next word and those after it, from one hidden state: a layer for each
depth, and one softmax kernel for all. The depths are a leading axis of one call of the
head, so that the kernel is read once for all of them. What is printed is the loss and
the accuracy at each depth, on text that the model has not seen.

References:
  Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction,
  arXiv:2404.19737; Cai et al., Medusa, arXiv:2401.10774; DeepSeek-V3,
  arXiv:2412.19437, section 2.2 (the weight of later depths).
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsoft.examples.words import WINDOW, WordModel, draw_windows, read_words

__all__ = ["DepthModel", "examples", "main", "measure", "multi_token_loss", "train"]

CLASSES, POSITIONS = 1024, 8


class DepthModel(nnx.Module):
    """A model of words with a layer for each further depth."""

    def __init__(self, depths: int, features: int, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          depths: K, how many next words.
          features: width.
          rngs: source of the parameters' keys.
        """
        self.depths = depths
        self.words = WordModel(CLASSES, features, rngs=rngs)
        self.ahead = nnx.Linear(features, depths * features, rngs=rngs)

    def __call__(self, windows: jax.Array) -> jax.Array:
        """Returns hidden states [K, B, S, H] of windows [B, S, WINDOW]."""
        hidden = self.words(windows)
        ahead = nnx.silu(self.ahead(hidden))
        ahead = ahead.reshape(*hidden.shape[:-1], self.depths, hidden.shape[-1])
        return jnp.moveaxis(hidden[..., None, :] + ahead, -2, 0)


def examples(words: jax.Array, depths: int) -> tuple[jax.Array, jax.Array]:
    """Returns windows [B, S, WINDOW] and the words after them, [K, B, S].

    Args:
      words: [B, WINDOW - 1 + S + K].
      depths: K.
    """
    positions = words.shape[1] - depths - WINDOW + 1
    windows = [words[:, s : s + WINDOW] for s in range(positions)]
    labels = [words[:, k + WINDOW :][:, :positions] for k in range(depths)]
    return jnp.stack(windows, axis=1), jnp.stack(labels)


def multi_token_loss(
    model: DepthModel, windows: jax.Array, labels: jax.Array, decay: float = 0.8
) -> jax.Array:
    """Returns the mean loss, depth k weighing `decay`^k.

    Args:
      model: what learns.
      windows: [B, S, WINDOW].
      labels: [K, B, S].
      decay: weight of a depth by that of the one before it.
    """
    weights = decay ** jnp.arange(model.depths, dtype=jnp.float32)
    weights = jnp.broadcast_to(weights[:, None, None], labels.shape)
    return model.words.head.loss(model(windows), labels, weights=weights)


@nnx.jit
def measure(
    model: DepthModel, windows: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss and the accuracy of each depth, [K], from one pass."""
    found = model.words.head.statistics(model(windows), labels, return_argmax=True)
    assert found.argmax is not None
    return -found.log_prob.mean((1, 2)), (found.argmax == labels).mean((1, 2))


def train(model: DepthModel, ids: np.ndarray, *, steps: int, seed: int) -> None:
    """Trains a model on text.

    Args:
      model: is changed.
      ids: [N], the text.
      steps: how many, of 32 pieces each.
      seed: of the pieces.
    """
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    text, length = jnp.asarray(ids), WINDOW - 1 + POSITIONS + model.depths

    @nnx.jit
    def step(model, optimizer, key):
        windows, labels = examples(draw_windows(key, text, 32, length), model.depths)
        gradients = nnx.grad(multi_token_loss)(model, windows, labels)
        optimizer.update(model, gradients)

    for key in jax.random.split(jax.random.key(seed), steps):
        step(model, optimizer, key)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.next_tokens",
        description="Trains a model of several next words on one softmax kernel.",
    )
    parser.add_argument(
        "--steps", type=int, default=400, help="training steps (default 400)"
    )
    parser.add_argument("--depths", type=int, default=4, help="words (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    for name in ("steps", "depths"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    _, ids = read_words(CLASSES)
    seen, unseen = np.split(ids, [len(ids) * 9 // 10])
    model = DepthModel(options.depths, 64, rngs=nnx.Rngs(options.seed))
    length = WINDOW - 1 + POSITIONS + options.depths
    key = jax.random.key(options.seed + 1)
    test = examples(draw_windows(key, jnp.asarray(unseen), 256, length), options.depths)
    before, _ = measure(model, *test)
    train(model, seen, steps=options.steps, seed=options.seed)
    after, accuracy = measure(model, *test)
    print("words ahead  loss before  after  accuracy")
    for depth in range(options.depths):
        row = f"{before[depth]:11.3f}  {after[depth]:5.3f}  {accuracy[depth]:8.1%}"
        print(f"{depth + 1:11}  {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
