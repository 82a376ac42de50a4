"""How much memory a job may take for what a file holds or declares."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["MemoryBudget", "bytes_in", "readable"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", re.IGNORECASE)
_UNITS = "KMGT"


@dataclass(frozen=True)
class MemoryBudget:
    """The most bytes that what is read from files may take.

    A size that a file declares is held against the budget before anything of that size
    is made, and a compressed file while it is unpacked.

    Attributes:
      num_bytes: the most.
    """

    num_bytes: int

    @classmethod
    def of_machine(cls) -> MemoryBudget:
        """Half of the memory that is free, as the operating system tells it.

        Example:
          >>> MemoryBudget.of_machine().num_bytes > 0
          True
        """
        import psutil

        return cls(psutil.virtual_memory().available // 2)

    @classmethod
    def parse(cls, text: str | None) -> MemoryBudget:
        """Reads a size.

        Args:
          text: a size as `bytes_in` reads it, such as "4G" or "1.5 GB"; None is
            `of_machine()`.

        Returns:
          The budget.

        Raises:
          ValueError: it is no size, or is 0.

        Example:
          >>> MemoryBudget.parse("1.5 GB").num_bytes
          1500000000
        """
        return cls.of_machine() if text is None else cls(bytes_in(text, "memory"))

    def require(
        self, num_bytes: int, what: str, error: type[Exception] = MemoryError
    ) -> None:
        """Raises unless so many bytes are within the budget.

        Args:
          num_bytes: how many are needed.
          what: what needs them, to begin a sentence with.
          error: the class of what is raised.
        """
        if num_bytes > self.num_bytes:
            raise error(
                f"{what} would take {readable(num_bytes)} of memory, more than the "
                f"{readable(self.num_bytes)} of `memory`; allow it more, or give less."
            )


def bytes_in(text: str, name: str) -> int:
    """Reads a size.

    Args:
      text: a number of bytes, or of K, M, G or T (powers of 1,000) such as "4G" or
        "1.5 GB", or of Ki, Mi, Gi or Ti (powers of 1,024) such as "1GiB".
      name: the option that it was given for, for messages.

    Returns:
      The bytes.

    Raises:
      ValueError: it is no size, or is 0.

    Example:
      >>> bytes_in("1.5 GB", "memory"), bytes_in("1GiB", "workspace")
      (1500000000, 1073741824)
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found:
        power = _UNITS.index(found[2].upper()) + 1 if found[2] else 0
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if size < 1:
        raise ValueError(f"`{name}` must be a size such as 4G, got {text!r}.")
    return size


def readable(num_bytes: int) -> str:
    """A size in the largest unit that it has one of."""
    size = float(num_bytes)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
