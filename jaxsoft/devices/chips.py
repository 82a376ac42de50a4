"""What chips can do, by their makers' word, and the least time that work takes them."""

import dataclasses
from typing import NamedTuple

__all__ = ["CHIPS", "Chip", "Least", "least_time"]

_GOOGLE = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of JAX's can do: of a 7x that is half a chip, one of two cores.

    Attributes:
      clock: cycles a second.
      bandwidth: bytes a second from and to its memory.
      flops: operations a second in products of bfloat16 that are summed in float32.
      source: where bandwidth and flops are written.
      branch_delay: of TPUs, bundles behind a branch that run before it jumps, at the
        most.
    """

    clock: float
    bandwidth: float
    flops: float
    source: str
    branch_delay: int = 0


# A TPU's clock is its flops over those of a cycle in which no matrix unit idles: four
# units of 128 x 128 that take a row each on v5, two of 256 x 256 that take two rows on
# v6e and 7x: libtpu gives 16 rows 8 cycles there. Delays are as libtpu schedules them.
_OF_V5, _OF_V6 = 4 * 2 * 128**2, 2 * 2 * 2 * 256**2
CHIPS = {
    "v5e": Chip(197e12 / _OF_V5, 819e9, 197e12, f"{_GOOGLE}v5e", 4),
    "v6e": Chip(918e12 / _OF_V6, 1638e9, 918e12, f"{_GOOGLE}v6e", 4),
    "7x": Chip(2307e12 / 2 / _OF_V6, 7380e9 / 2, 2307e12 / 2, f"{_GOOGLE}tpu7x", 6),
    # Clocks and bandwidths are those of XLA's descriptions, in `targets/`.
    "h100": Chip(1.98e9, 3352e9, 989e12, f"{_NVIDIA}h100/"),
    "b200": Chip(1.98e9, 8000e9, 2250e12, f"{_NVIDIA}dgx-b200/"),
}


class Least(NamedTuple):
    """The least time that a program takes, in seconds.

    Attributes:
      memory: of bytes read and written.
      products: of matrix products.
      issue: of bundles, one a cycle; 0 where they are not known.
    """

    memory: float
    products: float
    issue: float = 0.0

    @property
    def seconds(self) -> float:
        """The most of all: none of them can be hidden behind itself."""
        return max(self)

    @property
    def binds(self) -> str:
        """Which of them it is."""
        return self._fields[self.index(self.seconds)]


def least_time(chip: Chip, accessed: int, flops: int, bundles: int = 0) -> Least:
    """Returns the least time of a program.

    Args:
      chip: what it runs on.
      accessed: bytes that it reads and writes.
      flops: of its matrix products.
      bundles: that it issues.
    """
    return Least(accessed / chip.bandwidth, flops / chip.flops, bundles / chip.clock)
