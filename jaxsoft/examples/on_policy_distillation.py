"""On-policy distillation: `python -m jaxsoft.examples.on_policy_distillation`.

A student learns a teacher where the student itself goes: it continues text by its own
draws, and at each word its softmax nears the teacher's at K words, the student's K
likeliest or the teacher's; all other words are one more class. What is printed is the
loss as it falls, and the reverse KL over all words, on text that the student draws,
before and after.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsoft import linear_distillation_top_k
from jaxsoft.examples.words import (
    WordModel,
    continued,
    draw_windows,
    pretrain,
    read_words,
)

__all__ = ["distill", "distillation_loss", "divergence", "main"]

CLASSES, K = 1024, 16


def distillation_loss(
    student: WordModel, teacher: WordModel, windows: jax.Array, ids_of: str
) -> jax.Array:
    """Returns the mean divergence at K words, Jensen-Shannon with β = 0.9.

    Args:
      student: what learns.
      teacher: what it learns from.
      windows: [..., WINDOW], drawn by the student.
      ids_of: whose likeliest words, "student" or "teacher".
    """
    hidden, teacher_hidden = student(windows), teacher(windows)
    if ids_of == "teacher":
        log_probs, ids = teacher.head.top_k(teacher_hidden, K)
    else:
        _, ids = student.head.top_k(jax.lax.stop_gradient(hidden), K)
        log_probs = teacher.head.log_prob_at(teacher_hidden, ids)
    return student.head.call(
        linear_distillation_top_k,
        hidden,
        teacher_ids=ids,
        teacher_log_probs=log_probs,
        divergence="jensen_shannon",
        beta=0.9,
    )


@functools.partial(nnx.jit, static_argnames="length")
def divergence(
    student: WordModel,
    teacher: WordModel,
    key: jax.Array,
    prompts: jax.Array,
    length: int = 8,
) -> jax.Array:
    """Returns the mean reverse KL over all words, on text that the student draws.

    Args:
      student: draws the text.
      teacher: the other side.
      key: of the draws.
      prompts: [B, WINDOW].
      length: words a prompt.
    """
    windows = continued(student, key, prompts, length)
    return student.head.distillation(
        student(windows), teacher.head, teacher(windows), divergence="reverse_kl"
    )


def distill(
    student: WordModel,
    teacher: WordModel,
    ids: np.ndarray,
    *,
    ids_of: str,
    steps: int,
    seed: int,
) -> np.ndarray:
    """Trains a student on its own text.

    Args:
      student: is changed.
      teacher: what it learns from.
      ids: [N], text that gives the prompts.
      ids_of: see `distillation_loss`.
      steps: how many, of 64 prompts each.
      seed: of prompts and draws.

    Returns:
      The loss of each step, [steps].
    """
    optimizer = nnx.Optimizer(student, optax.adam(3e-3), wrt=nnx.Param)
    text = jnp.asarray(ids)

    @nnx.jit
    def step(student, optimizer, teacher, key):
        prompt_key, key = jax.random.split(key)
        prompts = draw_windows(prompt_key, text, 64)
        windows = continued(student, key, prompts, 8)
        loss, gradients = nnx.value_and_grad(distillation_loss)(
            student, teacher, windows, ids_of
        )
        optimizer.update(student, gradients)
        return loss

    keys = jax.random.split(jax.random.key(seed), steps)
    return np.array([step(student, optimizer, teacher, key) for key in keys])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.examples.on_policy_distillation",
        description="Distills a model of words into a smaller one, on its own text.",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="of distillation (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error("--steps must be at least 5")
    _, ids = read_words(CLASSES)
    teacher = WordModel(CLASSES, 64, rngs=nnx.Rngs(options.seed))
    pretrain(teacher, ids, steps=2 * options.steps, seed=options.seed)
    prompt_key, key = jax.random.split(jax.random.key(options.seed + 1))
    prompts = draw_windows(prompt_key, jnp.asarray(ids), 256)
    start = WordModel(CLASSES, 24, rngs=nnx.Rngs(options.seed + 1))
    pretrain(start, ids, steps=options.steps // 4 + 1, seed=options.seed + 1)
    print("reverse KL to the teacher, in nats a word")
    for ids_of in ("student", "teacher"):
        student = nnx.clone(start)
        before = float(divergence(student, teacher, key, prompts))
        losses = distill(
            student, teacher, ids, ids_of=ids_of, steps=options.steps, seed=options.seed
        )
        after = float(divergence(student, teacher, key, prompts))
        curve = " ".join(f"{part.mean():.3f}" for part in np.array_split(losses, 5))
        print(f"at the {K} likeliest of the {ids_of}: {before:.3f} -> {after:.3f}")
        print(f"  loss over each fifth of the steps: {curve}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
