"""GRPO with sampling replay: `python -m jaxsoft.examples.grpo`.

A small policy learns to write strings of tokens backwards: from a few examples, and
then from nothing but a reward, the share of tokens that are right. Its sampler keeps
the K likeliest tokens, and of these the likeliest that have most of the probability. So
the tokens were not drawn by the policy's softmax over all classes, but by that over the
kept ones. With replay the policy's log-probabilities are taken over the recorded sets
as well, and the importance ratio of the first step is 1; without, it is not, and the
clipped loss drops what it should learn from.
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

from jaxsoft import sample, softmax
from jaxsoft.nn import SoftmaxHead

__all__ = ["Policy", "Rollout", "Run", "grpo_loss", "main", "roll_out", "train"]

CLASSES, LENGTH = 32, 6
TOP_K, TOP_P = 8, 0.9
WARM_UP = 30  # steps of supervised training


class Policy(nnx.Module):
    """A softmax for each token of the answer, given the prompt."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          features: width.
          rngs: source of the parameters' keys.
        """
        self.embed = nnx.Embed(CLASSES, features, rngs=rngs)
        self.mix = nnx.Linear(LENGTH, LENGTH, rngs=rngs)
        self.head = SoftmaxHead(features, CLASSES, rngs=rngs)

    def __call__(self, prompts: jax.Array) -> jax.Array:
        """Returns hidden states [N, LENGTH, H] of prompts [N, LENGTH]."""
        return self.mix(self.embed(prompts).mT).mT


class Rollout(NamedTuple):
    """Answers, N = prompts x group, and what the sampler knows of them.

    Attributes:
      prompts: [N, LENGTH] tokens.
      kept: [N, LENGTH, TOP_K] the classes that the filters left, -1 for none.
      place: [N, LENGTH] where in `kept` the drawn class is.
      log_prob: [N, LENGTH] its log-probability among the kept.
      rewards: [N].
      advantages: [N] rewards, standardised within each group.
    """

    prompts: jax.Array
    kept: jax.Array
    place: jax.Array
    log_prob: jax.Array
    rewards: jax.Array
    advantages: jax.Array


def roll_out(policy: Policy, key: jax.Array, prompts: jax.Array, group: int) -> Rollout:
    """Draws a group of answers to each prompt.

    Args:
      policy: draws them.
      key: of the draws.
      prompts: [P, LENGTH].
      group: answers a prompt.
    """
    prompts = jnp.repeat(prompts, group, axis=0)
    log_probs, best = policy.head.top_k(policy(prompts), TOP_K)
    drawn = sample(key, log_probs, top_p=TOP_P, return_log_prob=True)
    probs = softmax(log_probs)
    keeps = jnp.cumsum(probs, axis=-1) - probs < TOP_P
    # The drawn class is kept, whichever way a sum at the bound was rounded.
    keeps |= jnp.arange(TOP_K)[None, None] == drawn.class_id[..., None]
    tokens = jnp.take_along_axis(best, drawn.class_id[..., None], axis=-1)[..., 0]
    rewards = (tokens == prompts[:, ::-1]).mean(axis=-1)
    groups = rewards.reshape(-1, group)
    centred = groups - groups.mean(axis=1, keepdims=True)
    advantages = centred / (groups.std(axis=1, keepdims=True) + 1e-4)
    return Rollout(
        prompts,
        jnp.where(keeps, best, -1),
        drawn.class_id,
        drawn.filtered_log_prob,
        rewards,
        advantages.reshape(-1),
    )


def grpo_loss(
    policy: Policy, rollout: Rollout, replay: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the clipped loss, and how far ratios are from 1 in the mean.

    Args:
      policy: what learns.
      rollout: answers of it, or of an older one.
      replay: whether the softmax is that over the recorded classes, as the sampler's
        was, or that over all.
    """
    hidden, place = policy(rollout.prompts), rollout.place[..., None]
    if replay:
        kept, _ = policy.head.log_prob_at(hidden, rollout.kept, normalize=True)
        log_prob = jnp.take_along_axis(kept, place, axis=-1)[..., 0]
    else:
        tokens = jnp.take_along_axis(rollout.kept, place, axis=-1)[..., 0]
        log_prob = policy.head.log_prob(hidden, tokens)
    ratio = jnp.exp(log_prob - rollout.log_prob)
    advantages = rollout.advantages[:, None]
    clipped = jnp.clip(ratio, 0.8, 1.2) * advantages
    loss = -jnp.minimum(ratio * advantages, clipped).mean()
    return loss, jnp.abs(ratio - 1).mean()


class Run(NamedTuple):
    """A run.

    Attributes:
      rewards: [steps], the mean of each step's answers.
      deviation: how far the first step's ratios are from 1 in the mean.
    """

    rewards: np.ndarray
    deviation: float


def train(replay: bool, *, steps: int, seed: int) -> Run:
    """Trains a policy, by a few examples first.

    Args:
      replay: see `grpo_loss`.
      steps: rollouts, each of which is learnt from twice.
      seed: of parameters, prompts and draws.
    """
    policy = Policy(32, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(policy, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def warm_up(policy, optimizer, key):
        prompts = jax.random.randint(key, (32, LENGTH), 0, CLASSES)
        gradients = nnx.grad(
            lambda policy: policy.head.loss(policy(prompts), prompts[:, ::-1])
        )(policy)
        optimizer.update(policy, gradients)

    @nnx.jit
    def step(policy, optimizer, key):
        prompt_key, key = jax.random.split(key)
        prompts = jax.random.randint(prompt_key, (32, LENGTH), 0, CLASSES)
        rollout = roll_out(policy, key, prompts, group=8)
        deviations = []
        for _ in range(2):
            (_, deviation), gradients = nnx.value_and_grad(grpo_loss, has_aux=True)(
                policy, rollout, replay
            )
            optimizer.update(policy, gradients)
            deviations.append(deviation)
        return rollout.rewards.mean(), deviations[0]

    warm_key, key = jax.random.split(jax.random.key(seed))
    for each in jax.random.split(warm_key, WARM_UP):
        warm_up(policy, optimizer, each)
    keys = jax.random.split(key, steps)
    done = [step(policy, optimizer, key) for key in keys]
    return Run(np.array([reward for reward, _ in done]), float(done[0][1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.grpo",
        description="Trains a policy by GRPO, with sampling replay and without.",
    )
    parser.add_argument("--steps", type=int, default=100, help="rollouts (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error("--steps must be at least 5")
    print(f"mean reward over each fifth of {options.steps} rollouts")
    for name, replay in (("replay", True), ("no replay", False)):
        run = train(replay, steps=options.steps, seed=options.seed)
        curve = " ".join(
            f"{part.mean():.3f}" for part in np.array_split(run.rewards, 5)
        )
        print(f"{name:9}  {curve}  first ratios {run.deviation:.4f} from 1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
