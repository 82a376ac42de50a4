"""Whoever is told of a run's progress."""

from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["Listener", "Record", "printable"]

# A line of metrics, as JSON has it: an event, its step, and what was measured.
Record: TypeAlias = Mapping[str, Any]


class Listener:
    """Told what a run does; this one keeps silent. Override what you care for."""

    def note(self, text: str) -> None:
        """One line about the preparation or the end of the run."""

    def start(self, step: int, steps: int) -> None:
        """Training starts, or goes on, after `step` of `steps` updates."""

    def step(self, record: Record) -> None:
        """A step was made; `record` is its metrics line."""

    def validation(self, record: Record) -> None:
        """A validation was made; `record` is its metrics line."""

    def stop(self) -> None:
        """Training ends, for whatever reason."""


def printable(text: str) -> str:
    """Spells out control characters, which sampled text may hold, line ends apart."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )
