"""The final schedule of a TPU's program, read from what libtpu writes.

A bundle is a line of very long instructions, which all issue in one cycle. `FLAGS` has
libtpu write two files for each instruction of HLO that is a program of its own, fusions
and kernels: the bundles, and how many slots of each unit every bundle takes.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FLAGS", "UNITS", "Bundle", "Code", "Operation", "codes"]

# Of what libtpu reads when it is loaded, in LIBTPU_INIT_ARGS; without the last but one
# a program's every pass would be written, a hundred times as much.
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_hlo_text=true --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=final_|deduplication --xla_jf_debug_level=2"
)
# The columns of the second file.
UNITS = (
    "mxu",
    "xlu",
    "valu",
    "vpop",
    "eup",
    "vload",
    "fill",
    "vstore",
    "spill",
    "salu",
)

_CODE, _SLOTS = "bundles", "hlo-static-per-bundle-utilization"
_FILE = re.compile(rf"(\d+)-(.+)-\d+-final_({_CODE}|{_SLOTS})\.txt")
_ROW = re.compile(rf"\s*\d+(?:\s+\d+){{{len(UNITS) - 1}}}\s*")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", flags=re.DOTALL)
_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
_OPERATION = re.compile(r"(?:%(\w+) = )?([a-z][\w.]*)(.*)", flags=re.DOTALL)
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, %\w+)?\)")
_OPERAND = re.compile(r"%\w+|\[smem:[^%\]]*\]+|\b\d+\b|\$region\d+")
_KEY = re.compile(r"^key:(.*)$|^  (.*)$", flags=re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a bundle's scalar unit.

    Attributes:
      result: its name, "" without one. What follows the last "_" is the register.
      opcode: such as "sadd.s32".
      operands: names with "%", numbers, addresses of scalar memory, regions.
      predicate: the name of what it depends on, "" if nothing.
      negated: whether it runs where the predicate does not hold.
    """

    result: str
    opcode: str
    operands: tuple[str, ...]
    predicate: str = ""
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What issues in one cycle.

    Attributes:
      regions: the numbers of the regions that start here, to which branches go.
      scalars: the operations of the scalar unit, which controls all others.
      slots: how many it takes of each unit.
    """

    regions: tuple[int, ...]
    scalars: tuple[Operation, ...]
    slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Code:
    """The bundles of one instruction of HLO, and of others that are the same.

    Attributes:
      name: the instruction's.
      bundles: in order; what branches jump over is there too.
      capacity: the slots of each unit.
      alike: names of the instructions that run this code, its own among them.
    """

    name: str
    bundles: tuple[Bundle, ...]
    capacity: tuple[int, ...]
    alike: tuple[str, ...]


def codes(folder: Path) -> list[Code]:
    """Returns the code of each instruction that libtpu wrote to a folder.

    Args:
      folder: `FLAGS` named it, and it was empty before the program was compiled.
    """
    alike, texts = _alike(folder), {}
    for path in sorted(folder.iterdir()):
        named = _FILE.fullmatch(path.name)
        if named is not None:
            texts.setdefault((named[1], named[2]), {})[named[3]] = path.read_text()
    return [
        _code(name, found[_CODE], found[_SLOTS], alike.get(name, (name,)))
        for (_, name), found in texts.items()
        if len(found) == 2
    ]


def _alike(folder: Path) -> dict[str, tuple[str, ...]]:
    """Returns which instructions run the code of one, by its name."""
    found: dict[str, tuple[str, ...]] = {}
    for path in folder.glob("*-deduplication-map.txt"):
        key = ""
        for new, name in _KEY.findall(path.read_text()):
            key = new or key
            found[key] = (*found.get(key, ()), *([name] if name else []))
    return {key: names for key, names in found.items() if names}


def _code(name: str, bundles: str, utilization: str, alike: tuple[str, ...]) -> Code:
    rows = [
        tuple(map(int, line.split()))
        for line in utilization.splitlines()
        if _ROW.fullmatch(line)
    ]
    capacity, rows = rows[0], rows[1:]
    read = tuple(
        dataclasses.replace(bundle, slots=slots)
        for bundle, slots in zip(_bundles(bundles), rows, strict=True)
    )
    return Code(name, read, capacity, alike)


def _bundles(text: str) -> Iterator[Bundle]:
    """Yields the bundles of a file, without their slots."""
    starts = list(_BUNDLE.finditer(text))
    ends = [*(start.start() for start in starts[1:]), len(text)]
    for start, end in zip(starts, ends, strict=True):
        said = text[start.end() : end]
        inside, _, behind = said.rpartition("}")
        regions = tuple(map(int, _STARTS.findall(behind)))
        yield Bundle(regions, tuple(_scalars(inside)), ())


def _scalars(text: str) -> Iterator[Operation]:
    """Yields the operations of the scalar unit."""
    for part in text.split(" ;; "):
        named = _OPERATION.search(part)
        if named is None or named[2][0] not in "sp":
            continue
        result, opcode, rest = named[1] or "", named[2], _COMMENT.sub("", named[3])
        predicate = _PREDICATE.search(rest)
        yield Operation(
            result,
            opcode,
            tuple(_OPERAND.findall(_PREDICATE.sub("", rest))),
            predicate[2] if predicate else "",
            predicate is not None and predicate[1] == "!",
        )
