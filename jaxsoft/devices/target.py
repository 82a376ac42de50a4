"""Accelerators that programs can be compiled for without owning one.

Compilers for TPUs and GPUs are chosen before JAX starts, so what compiles for a target
runs in a process of its own, under `ENVIRONMENT`.
"""

import dataclasses
import importlib.resources
import importlib.util
import re
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jaxsoft._core.registry import Gpu, Tpu
    from jaxsoft.devices.ptx import Limits

__all__ = ["ENVIRONMENT", "HERE", "TARGETS", "Target"]

# What is no target, but where this process runs.
HERE = "here"

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    # No chip is held: programs may be compiled side by side.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_PACKAGES = {"cuda": "jax_plugins.xla_cuda13", "tpu": "libtpu"}


@dataclasses.dataclass(frozen=True)
class Target:
    """An accelerator.

    Attributes:
      name: what it is called on the command line.
      platform: JAX's name of its platform.
      slice: of TPUs, JAX's name of the smallest slice that has them.
    """

    name: str
    platform: Literal["cuda", "tpu"]
    slice: str = ""

    @property
    def package(self) -> str:
        """The module that compiles for it."""
        return _PACKAGES[self.platform]

    @property
    def gpu(self) -> "Gpu | None":
        """The GPU, as kernels ask about it; None for TPUs."""
        if self.platform != "cuda":
            return None
        from jaxsoft._core.registry import Gpu

        major, minor = self._read(r"major: (\d+) minor: (\d+)")
        return Gpu(f"{major}.{minor}", int(*self._read(r"core_count: (\d+)")))

    @property
    def chip(self) -> "Gpu | Tpu":
        """The device, as kernels ask about it."""
        from jaxsoft._core.registry import TPUS

        return self.gpu or TPUS[self.name]

    @property
    def description(self) -> str:
        """The device in words."""
        if self.gpu is None:
            return f"TPU {self.name}"
        (words,) = self._read(r'device_description_str: "(.*)"')
        return f"{words}, compute capability {self.gpu.compute_capability}"

    @property
    def limits(self) -> "Limits | None":
        """What a multiprocessor of the GPU has; None for TPUs."""
        if self.platform != "cuda":
            return None
        from jaxsoft.devices.ptx import Limits

        (threads,) = self._read(r"threads_per_core_limit: (\d+)")
        (registers,) = self._read(r"registers_per_core_limit: (\d+)")
        (shared,) = self._read(r"shared_memory_per_core: (\d+)")
        return Limits(int(threads), int(registers), int(shared))

    def installed(self) -> bool:
        """Whether the compiler is here."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:
            return False

    def devices(self, topology: str = "") -> list[Any]:
        """Returns abstract devices, to compile for.

        Args:
          topology: another slice of TPUs, or number of GPUs such as "1x1x4".
        """
        from jax.experimental import topologies

        if self.platform == "tpu":
            described = topologies.get_topology_desc(topology or self.slice, "tpu")
        else:
            described = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=topology or "1x1x1",
                target_config=self._text(),
            )
        return list(described.devices)

    def _text(self) -> str:
        """Returns XLA's description of a GPU."""
        folder = importlib.resources.files("jaxsoft.devices") / "targets"
        return (folder / f"{self.name}.textproto").read_text(encoding="utf-8")

    def _read(self, pattern: str) -> tuple[str, ...]:
        """Returns what a pattern finds in the description."""
        match = re.search(pattern, self._text())
        if match is None:
            raise ValueError(f"`{self.name}.textproto` must have {pattern!r}.")
        return match.groups()


TARGETS = {
    target.name: target
    for target in (
        Target("h100", "cuda"),
        Target("b200", "cuda"),
        Target("v5e", "tpu", "v5e:2x2"),
        Target("v6e", "tpu", "v6e:2x2"),
        Target("7x", "tpu", "tpu7x:2x2x1"),
    )
}
