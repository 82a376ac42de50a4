"""A generate loop: `python -m jaxsoft.examples.generate`.

A small model learns some of the standard library's sources word by word, and continues
a prompt. The loop is one program, a scan over the words: each step draws a word for
every row, with a temperature and the usual filters, and shifts it in. Beside the text
stands its log-probability, under the temperature alone and after the filters.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsoft.examples.words import WINDOW, WordModel, pretrain, read_words, split_words

__all__ = ["Continuation", "generate", "main"]

CLASSES = 2048


class Continuation(NamedTuple):
    """Words drawn, and how likely they were.

    Attributes:
      class_ids: [steps, B] int32.
      log_probs: [steps, B] under the temperature alone.
      filtered_log_probs: [steps, B] among the words that the filters left.
    """

    class_ids: jax.Array
    log_probs: jax.Array
    filtered_log_probs: jax.Array


@functools.partial(nnx.jit, static_argnames=("steps", "top_k"))
def generate(
    model: WordModel,
    key: jax.Array,
    windows: jax.Array,
    steps: int,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: int = 0,
    top_p: jax.Array | float = 1.0,
    min_p: jax.Array | float = 0.0,
) -> Continuation:
    """Draws the words after those that are given.

    Args:
      model: draws them.
      key: of the draws.
      windows: [B, WINDOW], the last words of each prompt.
      steps: how many words.
      temperature: 0 takes the likeliest word.
      top_k: so many words may be drawn, the likeliest; 0 for all. It is static, which
        is faster.
      top_p: of these, those that have this probability together.
      min_p: of these, those that have this share of the largest probability.
    """

    def step(windows, key):
        drawn = model.head.sample(
            key,
            model(windows),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            return_log_prob=True,
        )
        words = drawn.class_id[:, None]
        return jnp.concatenate([windows[:, 1:], words], axis=1), Continuation(*drawn)

    return jax.lax.scan(step, windows, jax.random.split(key, steps))[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.generate",
        description="Trains a model of words, and continues a prompt.",
    )
    parser.add_argument("--prompt", default="\n    def ", help="(default a function)")
    parser.add_argument("--rows", type=int, default=2, help="texts (default 2)")
    parser.add_argument(
        "--length", type=int, default=64, help="words of each (default 64)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="(default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="(default 50)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default 0.95)")
    parser.add_argument("--min-p", type=float, default=0.0, help="(default 0)")
    parser.add_argument(
        "--steps", type=int, default=600, help="of training (default 600)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    for name in ("rows", "length", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not options.temperature >= 0:
        parser.error("--temperature must be in [0, inf]")
    if options.top_k < 0:
        parser.error("--top-k must be at least 0")
    for name in ("top_p", "min_p"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be in [0, 1]")
    _run(options)
    return 0


def _run(options: argparse.Namespace) -> None:
    words, ids = read_words(CLASSES)
    model = WordModel(CLASSES, 64, rngs=nnx.Rngs(options.seed))
    loss = pretrain(model, ids, steps=options.steps, seed=options.seed)
    print(f"loss {loss:.2f} nats a word after {options.steps} steps")
    places = {word: index for index, word in enumerate(words)}
    prompt = [places.get(word, CLASSES - 1) for word in split_words(options.prompt)]
    padded = [0] * WINDOW + prompt
    windows = jnp.tile(
        jnp.asarray(padded[-WINDOW:], jnp.int32)[None], (options.rows, 1)
    )
    drawn = generate(
        model,
        jax.random.key(options.seed),
        windows,
        options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )
    ids, log_probs, filtered = map(np.asarray, drawn)
    for row in range(options.rows):
        print(
            f"--- log-probability {log_probs[:, row].sum():.1f}, "
            f"{filtered[:, row].sum():.1f} after the filters"
        )
        print(options.prompt + "".join(words[index] for index in ids[:, row]))


if __name__ == "__main__":
    sys.exit(main())
