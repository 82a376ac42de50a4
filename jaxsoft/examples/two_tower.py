"""A two-tower retriever: `python -m jaxsoft.examples.two_tower`.

Users choose items, popular ones far more often. A retriever learns an embedding of
users and one of items from pairs of both, each user's item against those of the other
users in the batch. Popular items are in most batches, and so are pushed down too often:
the logQ correction subtracts from a logit how likely its item was to be there. What is
printed is how often a user's next choice is among the k best of all items, with the
correction and without.
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

from jaxsoft import in_batch_cross_entropy, linear_statistics

__all__ = ["Choices", "TwoTower", "choices", "main", "ranks", "train"]

ITEMS, FEATURES = 2000, 8
BEST = (10, 50)


class Choices(NamedTuple):
    """Who chose what.

    Attributes:
      users: [N, FEATURES] float32.
      items: [N] int32 in [0, ITEMS).
    """

    users: np.ndarray
    items: np.ndarray


def choices(count: int, seed: int) -> Choices:
    """Returns choices from a softmax of taste and of popularity by Zipf's law.

    Args:
      count: N.
      seed: of users, items and choices.
    """
    random = np.random.default_rng(seed)
    users = random.standard_normal((count, FEATURES), np.float32)
    tastes = random.standard_normal((ITEMS, FEATURES), np.float32)
    logits = users @ tastes.T / np.sqrt(FEATURES, dtype=np.float32)
    logits -= np.log(np.arange(1, ITEMS + 1, dtype=np.float32))
    items = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    return Choices(users, items.astype(np.int32))


class TwoTower(nnx.Module):
    """A network of users, and a table of items."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          width: H of both embeddings.
          rngs: source of the parameters' keys.
        """
        self.first = nnx.Linear(FEATURES, 4 * width, rngs=rngs)
        self.second = nnx.Linear(4 * width, width, rngs=rngs)
        self.items = nnx.Embed(ITEMS, width, rngs=rngs)

    def queries(self, users: jax.Array) -> jax.Array:
        """Returns embeddings [N, H] of users [N, FEATURES]."""
        return self.second(nnx.relu(self.first(users)))


def train(data: Choices, *, corrected: bool, steps: int, seed: int) -> TwoTower:
    """Returns a trained retriever.

    Args:
      data: to train on.
      corrected: whether by the logQ correction.
      steps: how many, of 512 pairs each.
      seed: of parameters and batches.
    """
    model = TwoTower(16, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
    counts = np.bincount(data.items, minlength=ITEMS)
    log_q = jnp.log(jnp.asarray(np.maximum(counts, 1) / len(data.items), jnp.float32))
    users, items = jnp.asarray(data.users), jnp.asarray(data.items)

    @nnx.jit
    def step(model, optimizer, key):
        pairs = jax.random.randint(key, (512,), 0, len(items))
        ids = items[pairs]

        def loss(model):
            return in_batch_cross_entropy(
                model.queries(users[pairs]),
                model.items(ids),
                log_q[ids] if corrected else None,
                ids,
            )

        optimizer.update(model, nnx.grad(loss)(model))

    for key in jax.random.split(jax.random.key(seed), steps):
        step(model, optimizer, key)
    return model


def ranks(model: TwoTower, data: Choices) -> np.ndarray:
    """Returns how many of all items come before each user's choice, [N]."""
    found = linear_statistics(
        model.queries(jnp.asarray(data.users)),
        model.items.embedding[...],
        jnp.asarray(data.items),
        kernel_layout="vh",
        return_rank=True,
    )
    return np.asarray(found.rank)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.two_tower",
        description="Trains a two-tower retriever, with the logQ correction and not.",
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="training steps (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    data = choices(20_000, options.seed)
    seen, unseen = (Choices(*(a[part] for a in data)) for part in _PARTS)
    names = "  ".join(f"recall at {k}" for k in BEST)
    print(f"{'':13}  {names}  mean reciprocal rank")
    for name, corrected in (("no correction", False), ("logQ", True)):
        model = train(seen, corrected=corrected, steps=options.steps, seed=options.seed)
        before = ranks(model, unseen)
        recalls = "  ".join(f"{(before < k).mean():12.1%}" for k in BEST)
        print(f"{name:13}  {recalls}  {(1 / (1 + before)).mean():20.3f}")
    return 0


_PARTS = (slice(2000, None), slice(2000))


if __name__ == "__main__":
    sys.exit(main())
