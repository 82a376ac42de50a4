"""Every public function, to compile for an accelerator that is not here.

The functions are those of `jaxsoft devices`, at the head of a real model. The arguments
are a target, a room and how much: `all`; `largest`, which leaves out stored logits for
checking, and the value alone of a function that has a gradient, whose program has the
value too; or `quick`, of those what does not take a compiler for TPUs long. By hand:

    python -m tests.accelerators.compiling functions v6e layers quick
"""

import re
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxsoft._core.registry import compiling_for, platform_of
from jaxsoft.cli.devices import MODELS
from jaxsoft.devices.measuring import Device, describe
from jaxsoft.devices.operations import operations
from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.target import TARGETS
from tests.accelerators.compiling import report
from tests.accelerators.mosaic_tpu import products

__all__ = ["HOW_MUCH", "SLOW", "main", "names_of", "shapes_of"]

MODEL_OF = {
    "h100": "llama3",
    "b200": "gemma3",
    "v5e": "qwen3",
    "v6e": "gemma3",
    "7x": "llama3",
}
# Compilers for TPUs take several times as long as those for GPUs.
HOW_MUCH = {
    "h100": "all",
    "b200": "all",
    "v5e": "largest",
    "v6e": "quick",
    "7x": "quick",
}
# Compiled at the heads of all three models on the first target.
LOSSES = ("linear_cross_entropy", "linear_log_prob", "linear_distillation")
# Functions with a program that takes a compiler for TPUs 15 seconds or more.
SLOW = (
    "codistillation_loss",
    "hierarchical_log_probs",
    "hierarchical_top_k",
    "adaptive_log_prob",
    "adaptive_log_probs",
    "adaptive_sample",
    "adaptive_top_k",
)
# The first and the last function of a room, in the order of the table.
_ROOMS = {
    "logits": ("softmax", "expected_calibration_error"),
    "layers": ("linear_statistics", "linear_fit_temperature"),
    "embeddings": ("nt_xent", "in_batch_cross_entropy"),
    "trees": ("hierarchical_log_prob", "sampled_softmax_loss"),
}

_KERNEL = re.compile(r"jaxsoft_(?:statistics|sample|softmax|gumbel_softmax)_[a-z]+")


def names_of(room: str) -> list[str]:
    """Returns the functions of a room."""
    names = list(operations())
    first, last = map(names.index, _ROOMS[room])
    return names[first : last + 1]


def shapes_of(name: str, model: str) -> Shapes:
    """Returns the sizes that a function is compiled for, at a model's head."""
    if name in names_of("embeddings"):
        # Batches are larger where models are narrower.
        return Shapes(8192, 768)
    tokens = 4096
    if name == "codistillation_loss":
        # Of several heads; with more tokens compilers for TPUs take minutes.
        tokens = 256
    elif name in names_of("logits") or name.endswith("log_probs"):
        tokens = 1024
    return Shapes(tokens, *MODELS[model])


def main(target: str, room: str, much: str, *names: str) -> None:
    """Compiles every implementation of a room's functions, and reports each."""
    chosen = TARGETS[target]
    place = SingleDeviceSharding(chosen.devices()[0])
    device = Device(chosen.platform, chosen.description)
    with compiling_for(chosen.gpu):
        for found in describe(device, names or names_of(room), None):
            name = found.operation
            if much == "quick" and name in SLOW:
                continue
            everywhere = target == "h100" and name in LOSSES
            for model in MODELS if everywhere else [MODEL_OF[target]]:
                for ran in found.implementations:
                    if ran.name == "reference" and much != "all":
                        continue
                    if platform_of(ran.name) in (None, chosen.platform):
                        option = None if ran.name == found.uses else ran.name
                        _compile(place, much, name, model, ran.name, option)


def _compile(
    place: Any, much: str, name: str, model: str, ran: str, option: str | None
) -> None:
    """Compiles the programs of an implementation."""
    operation = operations()[name]
    program = operation.program(shapes_of(name, model))
    calls = list(program.calls(operation.options(option)))
    if much != "all":
        calls = calls[-1:]
    for kind, function, arrays in calls:
        donated = program.donated if kind == "value" else ()
        traced, compiled = _compiled(place, function, arrays, donated)
        calls_of_kernels = [
            line
            for line in (compiled.as_text() or "").splitlines()
            if "custom-call(" in line
        ]
        dots = products(traced.jaxpr.jaxpr)
        report(
            name,
            kind,
            compiled,
            model=model,
            implementation=ran,
            kernels=sorted(set(_KERNEL.findall("\n".join(calls_of_kernels)))),
            products=len(dots),
            wide=[types for types in dots if set(types) != {"bfloat16"}],
        )


def _compiled(
    place: SingleDeviceSharding, function: Any, arrays: Any, donated: tuple[int, ...]
) -> tuple[Any, Any]:
    """Returns the traced and the compiled program."""
    (device,) = place.device_set
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arrays
    )
    traced = jax.jit(function, donate_argnums=donated).trace(*arrays)
    platform = "tpu" if device.platform == "tpu" else "cuda"
    return traced, traced.lower(lowering_platforms=(platform,)).compile()
