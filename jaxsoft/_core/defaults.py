"""Which kernels a call takes that asks for none, where, and by what evidence.

A kernel that was not timed may be a default on a TPU, whose compiler says how long a
program takes at the least: where the bundles of the kernel take 0.85 or less of the
least time of XLA's program, where an interpreter that looks for races finds it right,
and where its machine code spills no registers. That evidence is called "scheduled".
Kernels for GPUs must have been timed: their compilers say no such thing.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxsoft._core import registry
from jaxsoft._core.registry import Implementation

__all__ = [
    "DEFAULTS",
    "VARIABLE",
    "Default",
    "Evidence",
    "Pass",
    "allowed",
    "find",
    "on_chip",
]

Evidence = Literal["scheduled", "timed"]

# Set to 0 it leaves every call to XLA that asks for no kernel.
VARIABLE = "JAXSOFT_DEFAULT_KERNELS"


class Pass(NamedTuple):
    """A pass over the logits of a layer, by what the choice of a kernel depends on.

    Attributes:
      step: the step's name in the registry of kernels.
      rows: N.
      features: H.
      classes: V, those of one shard.
      dtypes: of hidden states and kernel, by their names.
      layout: of the kernel, "hv" or "vh".
    """

    step: str
    rows: int
    features: int
    classes: int
    dtypes: tuple[str, str]
    layout: str


@dataclasses.dataclass(frozen=True)
class Default:
    """A kernel that is the default on a chip, within the sizes that evidence is of.

    Attributes:
      step: the step's name in the registry of kernels.
      implementation: of the kernel.
      chip: such as "v6e".
      evidence: what speaks for it.
      rows: N, at the least.
      features: H, at the least and at the most.
      classes: V, at the least.
      dtype: of hidden states and kernel.
      layouts: of the kernel.
    """

    step: str
    implementation: Implementation
    chip: str
    evidence: Evidence
    rows: int
    features: tuple[int, int]
    classes: int
    dtype: str = "bfloat16"
    layouts: tuple[str, ...] = ("hv",)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Default":
        """Returns what `dataclasses.asdict` took apart."""
        pairs = {name: tuple(fields[name]) for name in ("features", "layouts")}
        return cls(**{**fields, **pairs})

    def covers(self, one: Pass) -> bool:
        """Whether the evidence is of such a pass."""
        least, most = self.features
        return (
            self.step == one.step
            and set(one.dtypes) == {self.dtype}
            and one.layout in self.layouts
            and one.rows >= self.rows
            and least <= one.features <= most
            and one.classes >= self.classes
        )


# `tests/accelerators/test_defaults.py` holds it against what compilers say. Empty: the
# forward kernel is scheduled ahead of XLA's loops on every TPU, and spills registers.
DEFAULTS: tuple[Default, ...] = ()


def allowed() -> bool:
    """Whether calls may take kernels unasked; the environment says so when traced."""
    return os.environ.get(VARIABLE, "1") != "0"


def on_chip() -> tuple[Default, ...]:
    """Returns the kernels that calls may take unasked on the TPU compiled for."""
    chip = registry.tpu()
    return tuple(one for one in DEFAULTS if chip is not None and one.chip == chip.name)


def find(one: Pass) -> Default | None:
    """Returns the kernel that a pass takes unasked on the TPU that is compiled for.

    Args:
      one: the pass.

    Returns:
      None where XLA's loops do it: without evidence, or for an unknown chip.
    """
    return next((default for default in on_chip() if default.covers(one)), None)
