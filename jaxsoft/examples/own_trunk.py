"""A trunk of your own in jaxsoft's loop: `python -m jaxsoft.examples.own_trunk`.

The trunk is a Flax module: here gated causal convolutions, in the place of attention.
The head, the data, the optimizer, checkpoints, validation and samples are those of
`jaxsoft train`; a listener is told of each step. What is trained is loaded again, and
continues a prompt.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
from flax import nnx

from jaxsoft.training import (
    LanguageModelConfig,
    Listener,
    load_language_model,
    train_language_model,
)
from jaxsoft.training.language_model.config import TransformerConfig

__all__ = ["Convolutions", "Losses", "main"]

WIDTH = 4


class Convolutions(nnx.Module):
    """Residual blocks of gated causal convolutions: tokens in, hidden states out."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Builds the embedding table and the blocks.

        Args:
          config: sizes: `num_classes`, `features` and `layers` are heeded.
          rngs: source of the initial parameters.
        """
        features = config.features
        self.embedding = nnx.Embed(config.num_classes, features, rngs=rngs)
        self.norms = nnx.List(
            [nnx.RMSNorm(features, rngs=rngs) for _ in range(config.layers + 1)]
        )
        self.blocks = nnx.List(
            [
                nnx.Conv(features, 2 * features, WIDTH, padding="CAUSAL", rngs=rngs)
                for _ in range(config.layers)
            ]
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Computes hidden states `[B, T, H]` after tokens `[B, T]`."""
        hidden = self.embedding(tokens)
        *norms, last = self.norms
        for norm, block in zip(norms, self.blocks, strict=True):
            gate, value = jax.numpy.split(block(norm(hidden)), 2, axis=-1)
            hidden = hidden + nnx.silu(gate) * value
        return last(hidden)


class Losses(Listener):
    """Keeps the losses, and prints a line for each validation."""

    def __init__(self):
        """Starts without any."""
        self.values: list[float] = []

    def step(self, record):
        """Keeps the loss of a step."""
        self.values.append(record["loss"])

    def validation(self, record):
        """Prints a validation."""
        print(f"step {record['step']}: validation loss {record['loss']:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.own_trunk",
        description="Trains convolutions as a language model.",
    )
    parser.add_argument("--corpus", help="(default the standard library's sources)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="(default 4096)")
    parser.add_argument("--steps", type=int, default=200, help="(default 200)")
    parser.add_argument("--out", default="own-trunk-run", help="folder of the run")
    parser.add_argument("--prompt", default="def ", help="(default a function)")
    options = parser.parse_args(arguments)
    config = LanguageModelConfig(
        corpus=options.corpus,
        vocab_size=options.vocab_size,
        steps=options.steps,
        out=options.out,
        features=64,
        layers=3,
    )
    losses = Losses()
    report = train_language_model(config, trunk=Convolutions, listener=losses)
    print(f"loss {losses.values[0]:.3f} before training, {report.loss:.3f} after")
    trained = load_language_model(options.out, trunk=Convolutions)
    (drawn,) = trained.generate(options.prompt, temperature=0.7, max_tokens=40)
    print(options.prompt + drawn.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
