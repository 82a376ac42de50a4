"""What the scheduler of a TPU's compiler made of a program: bundles, loops, units."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsoft.devices import control
from jaxsoft.devices.bundles import UNITS, Code, codes
from jaxsoft.devices.hlo import runs_of

__all__ = ["Loop", "Part", "Schedule", "forget", "schedule_of"]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a part, or what is in none.

    Attributes:
      bundles: of its body, those of loops inside it left out.
      trips: how often the body runs in one run of the part, the loops around it
        counted; None where that depends on what is not written in the code.
      cycles: how many of these bundles run in one run of the part, at the least:
        what is jumped over does not.
      busy: of the slots of each unit the share that is taken in these cycles.
    """

    bundles: int
    trips: int | None
    cycles: int
    busy: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Part:
    """A fusion or a kernel: an instruction of HLO with code of its own.

    Attributes:
      name: the instruction's.
      runs: how often it runs, and those that share its code.
      cycles: of one run, at the least.
      is_least: whether there may be more.
      loops: what takes the most cycles first.
      runs_are_least: whether it may run more often.
    """

    name: str
    runs: int
    cycles: int
    is_least: bool
    loops: tuple[Loop, ...]
    runs_are_least: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A program.

    Attributes:
      cycles: that all parts take, one a bundle, if nothing waits.
      is_least: whether there may be more.
      busy: of the slots of each unit the share that is taken.
      parts: what takes the most cycles first.
    """

    cycles: int
    is_least: bool
    busy: Mapping[str, float]
    parts: tuple[Part, ...]

    @property
    def loops(self) -> list[tuple[Part, Loop]]:
        """All loops with their parts, what takes the most cycles first."""
        loops = [(part, loop) for part in self.parts for loop in part.loops]
        return sorted(loops, key=lambda pair: -pair[0].runs * pair[1].cycles)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Schedule":
        """Returns what `dataclasses.asdict` took apart."""
        parts = tuple(
            Part(**part | {"loops": tuple(Loop(**loop) for loop in part["loops"])})
            for part in fields["parts"]
        )
        return cls(**{**fields, "parts": parts})


def forget(folder: Path) -> None:
    """Empties the folder of `schedule_of`, before another program is compiled.

    Args:
      folder: where libtpu writes code.
    """
    for old in folder.iterdir():
        old.unlink()


def schedule_of(folder: Path, text: str, delay: int) -> Schedule:
    """Returns the schedule of a program.

    Programs without a part that runs have no cycles.

    Args:
      folder: where libtpu wrote its code, by `bundles.FLAGS`.
      text: its optimized HLO, which says how often each part runs.
      delay: `Chip.branch_delay`.
    """
    read = {
        code.name: (code, control.count(code.bundles, delay)) for code in codes(folder)
    }
    weights = {
        name: sum(counts.times) for code, counts in read.values() for name in code.alike
    }
    times, more = runs_of(text, weights)
    parts, used, slots = [], [0] * len(UNITS), [0] * len(UNITS)
    for code, counts in read.values():
        runs = sum(times.get(name, 0) for name in code.alike)
        if not runs:
            # What a program begins and ends with, and what calls its parts.
            continue
        cycles = sum(counts.times)
        loops = sorted(_loops(code, counts), key=lambda loop: -loop.cycles)
        is_open = not more.isdisjoint(code.alike)
        part = Part(code.name, runs, cycles, counts.is_least, tuple(loops), is_open)
        parts.append(part)
        for unit, most in enumerate(code.capacity):
            taken = _taken(code, counts.times, range(len(code.bundles)), unit)
            used[unit] += runs * taken
            slots[unit] += runs * cycles * most
    parts.sort(key=lambda part: -part.runs * part.cycles)
    return Schedule(
        sum(part.runs * part.cycles for part in parts),
        not times or any(part.is_least or part.runs_are_least for part in parts),
        {n: u / max(s, 1) for n, u, s in zip(UNITS, used, slots, strict=True)},
        tuple(parts),
    )


def _loops(code: Code, counts: control.Counts) -> Iterator[Loop]:
    """Yields loops that run, and what is in none."""
    everything = control.Loop(0, len(code.bundles), 1)
    loops = (everything, *counts.loops)
    for one in loops:
        inside = set(range(one.first, one.end))
        for other in counts.loops:
            if other is not one and other.first >= one.first and other.end <= one.end:
                inside -= set(range(other.first, other.end))
        places = sorted(inside)
        cycles = sum(counts.times[place] for place in places)
        if cycles:
            busy = {
                name: _taken(code, counts.times, places, unit)
                / (cycles * code.capacity[unit])
                for unit, name in enumerate(UNITS)
            }
            yield Loop(len(places), one.trips, cycles, busy)


def _taken(
    code: Code, times: Sequence[int], places: Sequence[int] | range, unit: int
) -> int:
    """Returns how many slots of a unit bundles take."""
    return sum(times[place] * code.bundles[place].slots[unit] for place in places)
