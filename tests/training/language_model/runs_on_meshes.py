"""Trains on meshes of eight virtual devices; prints what `test_mesh.py` asserts.

Started by that test in a process of its own: the number of CPU devices is fixed when
JAX starts. The only argument is a JSON object with the fields of a configuration.
"""

import contextlib
import io
import json
import re
import sys

import jax
import numpy as np

from jaxsoft.cli.main import main
from jaxsoft.training import (
    LanguageModelConfig,
    Listener,
    parse_mesh,
    train_language_model,
)
from jaxsoft.training.heads import HEADS, HeadPlan
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.steps import Programs
from jaxsoft.training.run_directory import RunDirectory

MESHES = {
    "none": None,
    "data=2,vocab=4": parse_mesh("data=2,vocab=4"),
    # A user's own mesh: the other order, and axes of JAX's default kind.
    "vocab=2,data=4": jax.make_mesh((2, 4), ("vocab", "data")),
}


class DiesAfter(Listener):
    """Ends the run in the middle, as a kill would; collects notes."""

    def __init__(self, last=None):
        self.last, self.notes = last, []

    def note(self, text):
        self.notes.append(text)

    def step(self, record):
        if record["step"] == self.last:
            raise MemoryError


def train(fields, name, mesh, *, then=()):
    """Trains on a mesh; with `then`, dies there and goes on on other meshes."""
    config = LanguageModelConfig(**fields | {"out": f"{fields['out']}-{name}"})
    listener = DiesAfter(7 if then else None)
    with contextlib.suppress(MemoryError):
        train_language_model(config, mesh=MESHES[mesh], listener=listener)
    for place, later in enumerate(then):
        listener = DiesAfter(9 if place + 1 < len(then) else None)
        with contextlib.suppress(MemoryError):
            train_language_model(
                config, mesh=MESHES[later], listener=listener, resume=True
            )
    lines = list(RunDirectory(config.out).records())
    return {
        "steps": [line["step"] for line in lines if line["event"] == "train"],
        "losses": [line["loss"] for line in lines],
        "norms": [x["gradient_norm"] for x in lines if x["event"] == "train"],
        "texts": [sample["text"] for sample in lines[-1]["samples"]],
        "memory": lines[-1]["memory"],
        "notes": listener.notes,
    }


def placement(fields):
    """Where a training state lies after a step, and what the step gathers."""
    config = LanguageModelConfig(**fields)
    programs = Programs(
        config.transformer(272),
        OptimizerConfig(config.steps, config.learning_rate),
        (config.batch_size, config.sequence_length),
        head=HeadPlan("full", (1,) * 272),
        seed=0,
        mesh=MESHES["data=2,vocab=4"],
    )
    state = programs.init()
    batch = np.zeros((config.batch_size, config.sequence_length + 1), np.int32)
    for index in range(1, 3):
        state, _ = programs.step(state, batch, 1e-3, index)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    text = programs._step.as_text() or ""
    return {
        "cut": {
            jax.tree_util.keystr(path): str(leaf.sharding.spec)
            for path, leaf in leaves
            if not leaf.sharding.is_fully_replicated
        },
        "whole": sum(leaf.sharding.is_fully_replicated for _, leaf in leaves),
        "collectives": re.findall(r" = (.+?) (all-[a-z-]+?)(?:-start)?\(", text),
    }


def losses_over_data(fields):
    """Losses of a few steps of every head, on one device and over eight."""
    config = LanguageModelConfig(**fields)
    random = np.random.default_rng(0)
    counts = tuple(random.integers(1, 99, 272).tolist())
    shape = (8, config.sequence_length + 1)
    batches = random.integers(0, 272, (3, *shape)).astype(np.int32)
    found = {}
    for head in HEADS:
        found[head] = []
        for mesh in (None, parse_mesh("data=8")):
            programs = Programs(
                config.transformer(272),
                OptimizerConfig(config.steps, config.learning_rate),
                (8, config.sequence_length),
                head=HeadPlan(head, counts, 16),
                seed=0,
                mesh=mesh,
            )
            state, losses = programs.init(), []
            for index, batch in enumerate(batches, 1):
                state, result = programs.step(state, batch, 0.01, index)
                losses.append(float(result.loss))
            losses.append(programs.evaluate(state.params, batches[0]))
            found[head].append(losses)
    return found


def command(fields, *more):
    """Runs `jaxsoft train`; returns its exit code and its output."""
    words = ["train"]
    for name, value in fields.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main([*words, *more])
    return code, output.getvalue(), errors.getvalue()


def run(fields):
    """Everything, as JSON."""
    two_four, four_two = list(MESHES)[1:]
    told = fields | {"out": fields["out"] + "-cli", "steps": 2}
    refused = fields | {"out": fields["out"] + "-refused"}
    return {
        "none": train(fields, "none", "none"),
        "whole": train(fields, "whole", two_four),
        "moved": train(fields, "moved", two_four, then=[four_two, "none"]),
        "grown": train(fields, "grown", "none", then=[two_four]),
        "placement": placement(fields),
        "over_data": losses_over_data(fields),
        "command": command(told, "--mesh", two_four),
        "batch": command(refused | {"batch_size": 3}, "--mesh", two_four),
        "vocabulary": command(refused | {"vocab_size": 270}, "--mesh", two_four),
        "devices": command(refused, "--mesh", "data=3,vocab=2"),
        "tree": command(refused | {"head": "hierarchical"}, "--mesh", two_four),
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
