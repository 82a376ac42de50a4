"""How many passes over the logits a value and gradient of ours takes: its plan says.

With stored logits there are three, 6·N·H·V operations: logits, dhidden and dkernel.
"""

import dataclasses

import jax.numpy as jnp

from benchmarks.workloads import LinearWorkload
from jaxsoft._core import registry
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.plans import Layer

__all__ = ["STORED", "computed_again", "cross_entropy", "distillation"]

# Passes of a value and gradient that stores its logits.
STORED = 3


def computed_again(
    workload: LinearWorkload,
    *,
    workspace: int | None = None,
    implementation: Implementation | None = None,
    as_weights: bool = False,
    reduced: bool = False,
    layers: int = 1,
) -> float:
    """Returns the share of the logits that a gradient computes a second time.

    Args:
      workload: the layer; the widest where several share the workspace.
      workspace: the bytes that the call is given; None for those that it chooses.
      implementation: of the call.
      as_weights: whether what is kept of a logit is in the dtype of the operands, and
        not float32.
      reduced: whether the loss is reduced inside the call.
      layers: how many layers share the workspace.
    """
    if registry.resolve("linear_cross_entropy", implementation) != "xla":
        return 1.0
    layer = _layer(workload, layers)
    kept_bytes = layer.operand_bytes if as_weights else layer.logit_bytes
    plan = layer.plan(workspace, kept_bytes=kept_bytes, reduced=reduced)
    return 1 - min(plan.kept_classes, workload.classes) / workload.classes


def _layer(workload: LinearWorkload, layers: int) -> Layer:
    """Returns the sizes that a plan is made of."""
    size = jnp.dtype(workload.dtype).itemsize
    return Layer(
        workload.tokens,
        workload.features,
        workload.classes,
        operand_bytes=size,
        hidden_bytes=size,
        kernel_bytes=size,
        layers=layers,
    )


def distillation(workload: LinearWorkload) -> float:
    """Returns the passes of the losses of a student, and of their gradient.

    Args:
      workload: the student's layer; the teacher's is twice as wide and counts twice.
    """
    teacher = dataclasses.replace(workload, features=2 * workload.features)
    again = computed_again(teacher, layers=2)
    # The second stream and the gradient read both layers' logits.
    streams = 2
    if again > 1 / 2 and _layer(teacher, layers=2).rows_read_twice(None):
        # Those of a few rows at once are there for both streams.
        streams, again = 1, 1
    return STORED + 2 + 3 * streams * again


def cross_entropy(
    workload: LinearWorkload,
    *,
    workspace: int | None = None,
    implementation: Implementation | None = None,
    reduced: bool = False,
) -> float:
    """Returns the passes of a loss of one label a row, and of its gradient."""
    again = computed_again(
        workload,
        workspace=workspace,
        implementation=implementation,
        as_weights=True,
        reduced=reduced,
    )
    return STORED + again
