"""Boltzmann exploration of a bandit: `python -m jaxsoft.examples.bandit`.

A bandit has arms of unknown mean reward, drawn from a normal distribution; a pull gives
the mean plus unit noise. A player pulls by the Boltzmann policy of its average rewards
so far, at a temperature that is 0 (greedy), ∞ (uniform), fixed, or annealed by an Optax
schedule. Its regret is what the best arm would have given more. All players and all
bandits are one program: `vmap` over seeds, and over schedules, whose bandits and random
numbers are the same.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoft import boltzmann_policy

__all__ = ["Result", "main", "play", "schedules", "simulate"]


class Result(NamedTuple):
    """What one player did, averaged over its bandits.

    Attributes:
      name: of the schedule.
      regret: mean regret of each step, [steps].
      total: mean regret of all steps.
      error: standard error of `total`.
      best: how often the last tenth of the steps pulled the best arm.
    """

    name: str
    regret: np.ndarray
    total: float
    error: float
    best: float


def schedules(steps: int) -> dict[str, optax.Schedule]:
    """Returns the temperature schedules that are compared, by name.

    Args:
      steps: how many steps an annealed one lasts.
    """
    return {
        "greedy (τ = 0)": optax.constant_schedule(0.0),
        "τ = 0.1": optax.constant_schedule(0.1),
        "τ = 0.3": optax.constant_schedule(0.3),
        "τ = 1": optax.constant_schedule(1.0),
        "uniform (τ = ∞)": optax.constant_schedule(float("inf")),
        "cosine, 0.5 to 0": optax.cosine_decay_schedule(0.5, steps),
        "exponential, 0.5 to 0.03": optax.exponential_decay(0.5, steps, 0.03 / 0.5),
    }


def play(key: jax.Array, temperatures: jax.Array, num_arms: int) -> jax.Array:
    """Plays one bandit, one pull for each temperature.

    Args:
      key: the bandit and its noise.
      temperatures: [steps] float32.
      num_arms: the number of arms.

    Returns:
      The regret of each step, [steps] float32; 0 for a pull of the best arm.
    """
    arms_key, pulls_key = jax.random.split(key)
    means = jax.random.normal(arms_key, (num_arms,))
    # Two fusions may round a mean differently: the best arm's gap is made exact.
    gaps = jnp.maximum(means.max() - means, 0).at[means.argmax()].set(0)

    def pull(state, step):
        averages, counts = state
        temperature, key = step
        arm_key, noise_key = jax.random.split(key)
        policy = boltzmann_policy(averages, temperature)
        arm = jax.random.choice(arm_key, num_arms, p=policy)
        reward = means[arm] + jax.random.normal(noise_key)
        counts = counts.at[arm].add(1)
        change = (reward - averages[arm]) / counts[arm]
        return (averages.at[arm].add(change), counts), gaps[arm]

    keys = jax.random.split(pulls_key, len(temperatures))
    start = (jnp.zeros(num_arms), jnp.zeros(num_arms))
    _, regret = jax.lax.scan(pull, start, (temperatures, keys))
    return regret


def simulate(num_arms: int, steps: int, seeds: int) -> list[Result]:
    """Plays every schedule on the same bandits.

    Args:
      num_arms: arms of each bandit.
      steps: pulls of each player.
      seeds: how many bandits.

    Returns:
      One result a schedule.
    """
    named = schedules(steps)
    counts = jnp.arange(steps, dtype=jnp.float32)
    temperatures = jnp.stack(
        [
            jnp.broadcast_to(jnp.asarray(schedule(counts), jnp.float32), (steps,))
            for schedule in named.values()
        ]
    )
    keys = jax.random.split(jax.random.key(0), seeds)
    by_seed = jax.vmap(play, (0, None, None))
    by_schedule = jax.jit(jax.vmap(by_seed, (None, 0, None)), static_argnums=2)
    regret = np.asarray(by_schedule(keys, temperatures, num_arms))
    totals = regret.sum(-1, dtype=np.float64)
    last = regret[..., -max(steps // 10, 1) :]
    return [
        Result(
            name,
            regret[i].mean(0),
            float(totals[i].mean()),
            float(totals[i].std() / np.sqrt(seeds)),
            float((last[i] == 0).mean()),
        )
        for i, name in enumerate(named)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.bandit",
        description="Compares Boltzmann policies of a bandit by their regret.",
    )
    parser.add_argument("--arms", type=int, default=10, help="arms (default 10)")
    parser.add_argument("--steps", type=int, default=1000, help="pulls (default 1000)")
    parser.add_argument("--seeds", type=int, default=500, help="bandits (default 500)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="draw the regret curves into this PNG"
    )
    options = parser.parse_args(arguments)
    for name in ("arms", "steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"{options.out}: there is no folder {options.out.parent}")
    try:
        _run(options)
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing: pip install 'jaxsoft[train]'")
    return 0


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    results = simulate(options.arms, options.steps, options.seeds)
    table = Table(
        title=f"{options.seeds} bandits, {options.arms} arms, {options.steps} pulls"
    )
    table.add_column("policy", no_wrap=True)
    for name in ("regret", "± s.e.", "a pull at the end", "best arm at the end"):
        table.add_column(name, justify="right")
    fewest = min(result.total for result in results)
    last = max(options.steps // 10, 1)
    for result in results:
        table.add_row(
            result.name,
            f"{result.total:.1f}",
            f"{result.error:.1f}",
            f"{result.regret[-last:].mean():.3f}",
            f"{100 * result.best:.0f} %",
            style="bold" if result.total == fewest else None,
        )
    console = Console()
    console.print(table)
    if options.out:
        _draw(results, options.out)
        console.print(f"curves: {options.out}", markup=False, highlight=False)


def _draw(results: list[Result], path: pathlib.Path) -> None:
    """Draws the regret so far against the pulls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        pulls = np.arange(1, len(result.regret) + 1)
        axes.plot(pulls, result.regret.cumsum(), label=result.name)
    axes.set(xlabel="pulls", ylabel="mean regret so far", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")


if __name__ == "__main__":
    sys.exit(main())
