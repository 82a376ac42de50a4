"""A draft head of few classes: `python -m jaxsoft.examples.draft_head`.

Speculative decoding has a cheap draft propose words, which the target keeps or
replaces. As in EAGLE the draft takes the target's hidden state and the word that was
drawn from it, and says the word after that; its softmax has the most frequent words
alone, the target's kernel sliced. It learns by the divergence from the target's softmax
over these words, on text that the target draws. What is printed is how often the
target accepts a draft, before and after; what comes out is drawn by the target's
softmax over all words, whatever the draft.

References:
  Li et al., EAGLE, arXiv:2401.15077; EAGLE-3, arXiv:2503.01840; Zhao et al., FR-Spec,
  arXiv:2502.14856 (frequent classes).
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsoft import linear_distillation, sample, speculative_sample
from jaxsoft.examples.words import (
    WordModel,
    continued,
    draw_windows,
    pretrain,
    read_words,
)

__all__ = ["Draft", "acceptance", "draft_loss", "main", "train"]

CLASSES = 1024


class Draft(nnx.Module):
    """A layer from the target's hidden state and a word to a softmax over few words.

    Attributes:
      class_ids: [V'] int32, the words that it has.
      kernel: [H, V'] that it starts from the target's.
    """

    def __init__(self, target: WordModel, class_ids: jax.Array, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          target: whose words are drafted.
          class_ids: [V'] int32, which words.
          rngs: source of the parameters' keys.
        """
        features = target.head.in_features
        self.class_ids = nnx.Variable(class_ids)
        self.join = nnx.Linear(2 * features, 2 * features, rngs=rngs)
        self.contract = nnx.Linear(2 * features, features, rngs=rngs)
        self.kernel = nnx.Param(_kernel(target)[:, class_ids])

    def __call__(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        """Returns the next hidden states [..., H].

        Args:
          hidden: [..., H] of the target.
          embedded: [..., H], the words drawn from them.
        """
        joined = self.join(jnp.concatenate([hidden, embedded], axis=-1))
        return hidden + self.contract(nnx.relu(joined))


def _kernel(target: WordModel) -> jax.Array:
    assert target.head.kernel is not None
    return target.head.kernel[...]


def draft_loss(draft: Draft, target: WordModel, windows: jax.Array) -> jax.Array:
    """Returns the mean forward KL from the target's softmax over the draft's words.

    Args:
      draft: what learns.
      target: what it learns from.
      windows: [S, B, WINDOW] of consecutive words.
    """
    hidden = target(windows)
    drafted = draft(hidden[:-1], target.embed(windows[1:, :, -1]))
    return linear_distillation(
        drafted,
        draft.kernel[...],
        hidden[1:],
        _kernel(target)[:, draft.class_ids[...]],
    )


@nnx.jit
def acceptance(
    draft: Draft, target: WordModel, key: jax.Array, windows: jax.Array
) -> jax.Array:
    """Returns the share of drafts that the target accepts.

    Args:
      draft: proposes a word after each window but the first.
      target: accepts it or draws another.
      key: of the draws.
      windows: [S, B, WINDOW] of consecutive words.
    """
    draft_key, key = jax.random.split(key)
    hidden = target(windows)
    drafted = draft(hidden[:-1], target.embed(windows[1:, :, -1]))
    logits = drafted @ draft.kernel[...]
    ids = draft.class_ids[...][sample(draft_key, logits)]
    # The draft gives no probability to words that it does not have.
    of_all = jnp.full((*logits.shape[:-1], CLASSES), -jnp.inf)
    of_all = of_all.at[..., draft.class_ids[...]].set(logits)
    drawn = speculative_sample(key, target.head(hidden[1:]), of_all, ids)
    return drawn.accepted.mean()


def train(
    draft: Draft, target: WordModel, ids: np.ndarray, *, steps: int, seed: int
) -> None:
    """Trains a draft on text that the target draws.

    Args:
      draft: is changed.
      target: what it learns from.
      ids: [N], text that gives the prompts.
      steps: how many, of 64 prompts each.
      seed: of prompts and draws.
    """
    optimizer = nnx.Optimizer(draft, optax.adam(3e-3), wrt=nnx.Param)
    text = jnp.asarray(ids)

    @nnx.jit
    def step(draft, optimizer, target, key):
        prompt_key, key = jax.random.split(key)
        windows = continued(target, key, draw_windows(prompt_key, text, 64), 8)
        gradients = nnx.grad(draft_loss)(draft, target, windows)
        optimizer.update(draft, gradients)

    for key in jax.random.split(jax.random.key(seed), steps):
        step(draft, optimizer, target, key)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.draft_head",
        description="Trains a draft head of few words for speculative decoding.",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="training steps (default 200)"
    )
    parser.add_argument(
        "--classes", type=int, default=128, help="words of the draft (default 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if not 1 <= options.classes <= CLASSES:
        parser.error(f"--classes must be in [1, {CLASSES}]")
    words, ids = read_words(CLASSES)
    target = WordModel(CLASSES, 64, rngs=nnx.Rngs(options.seed))
    pretrain(target, ids, steps=2 * options.steps, seed=options.seed)
    frequent = jnp.arange(options.classes)  # words come by their frequency
    draft = Draft(target, frequent, rngs=nnx.Rngs(options.seed + 1))
    prompt_key, draw_key, key = jax.random.split(jax.random.key(options.seed + 1), 3)
    prompts = draw_windows(prompt_key, jnp.asarray(ids), 256)
    windows = nnx.jit(continued, static_argnums=3)(target, draw_key, prompts, 8)
    has_word = float((windows[1:, :, -1] < options.classes).mean())
    print(
        f"{options.classes} of {len(words)} words, {has_word:.0%} of the target's text"
    )
    before = float(acceptance(draft, target, key, windows))
    train(draft, target, ids, steps=options.steps, seed=options.seed)
    after = float(acceptance(draft, target, key, windows))
    print(f"drafts accepted: {before:.3f} -> {after:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
