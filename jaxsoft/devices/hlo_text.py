"""The text of optimized HLO, taken apart."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

__all__ = ["OPERAND", "Array", "Computation", "Instruction", "parse"]

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
# A number that a TPU keeps on the chip is not in its memory.
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's number of elements, bytes of one, sizes and place."""

    shape: tuple[int, ...]
    bits: int
    on_chip: bool

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def bytes_of(self, elements: int) -> int:
        """Returns the bytes of so many elements; none where they are on the chip."""
        return 0 if self.on_chip else elements * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    # What is between the parentheses, and after them.
    inside: str
    rest: str

    @property
    def size(self) -> int:
        """How many elements all results have."""
        return sum(array.size for array in self.arrays)

    def moved(self) -> int:
        """Returns the bytes of the whole result."""
        return sum(array.bytes_of(array.size) for array in self.arrays)


class Computation:
    """Instructions by name, and who uses each."""

    def __init__(self):
        """Makes an empty one."""
        self.instructions: dict[str, Instruction] = {}
        self.users: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.root: Instruction | None = None

    def add(self, one: Instruction, *, is_root: bool) -> None:
        """Adds an instruction whose operands are there."""
        self.instructions[one.name] = one
        for name in dict.fromkeys(one.operands):
            self.users[name].append(one)
        if is_root:
            self.root = one

    def operands(self, one: Instruction) -> list[Instruction]:
        """Returns the instructions that make an instruction's operands."""
        return [self.instructions[n] for n in one.operands if n in self.instructions]

    def parameter(self, index: int) -> Instruction | None:
        """Returns the parameter of this number; None where it is not used."""
        for one in self.instructions.values():
            if one.opcode == "parameter" and one.inside == str(index):
                return one
        return None


def parse(text: str) -> tuple[dict[str, Computation], str | None]:
    """Returns the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header[2]] = Computation()
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif named := _NAMED.match(line):
            one = _instruction(named[2], line[named.end() :])
            if one is not None:
                current.add(one, is_root=named[1] is not None)
    return computations, entry


def _instruction(name: str, text: str) -> Instruction | None:
    """Parses what stands behind the equals sign."""
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    found = _OPCODE.match(text, end)
    if end < 0 or found is None:
        return None
    close = _closing(text, found.end() - 1)
    inside = text[found.end() : close - 1]
    arrays = tuple(_arrays(text[:end]))
    operands = tuple(OPERAND.findall(inside))
    return Instruction(name, arrays, found[1], operands, inside, text[close:])


def _closing(text: str, start: int) -> int:
    """Returns the place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    return len(text)


def _arrays(text: str) -> Iterator[Array]:
    for _, bits, sizes, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Array(shape, int(bits or 8), _ON_CHIP.search(layout) is not None)
