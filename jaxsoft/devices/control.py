"""How often each bundle of a TPU's code runs, found by running its scalar unit.

Loops of the code count up to numbers that are written there, and what a kernel does in
its first or last step is jumped over in others. All of it is scalar arithmetic: what
branches depend on is computed here, and nothing else. A branch on what is not known,
such as a number that the program is given, counts as taken where it jumps over code and
as not taken where it repeats code, so that the counts are the least.
"""

import bisect
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxsoft.devices.bundles import Bundle, Operation

__all__ = ["Counts", "Loop", "count"]

_BRANCH, _STORE, _LOAD, _PHI = "sbr", "sst", "sld", "sphi"
# Longer programs are given up: what ran until then counts.
_MOST_OPERATIONS = 2_000_000
_BITS = 2**32


def _signed(number: int) -> int:
    return (number ^ 2**31) - 2**31


def _of_signed(compare: Callable[[int, int], bool]) -> Callable[[int, int], bool]:
    return lambda a, b: compare(_signed(a), _signed(b))


_COMPARISONS = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
# By opcode, of unsigned numbers of 32 bits or of bools; others are not known.
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "smov": lambda a: a,
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, b: a << b if b < 32 else 0,
    "sshrl.u32": lambda a, b: a >> b,
    "sshra.s32": lambda a, b: _signed(a) >> b,
    "scalar_select": lambda p, a, b: a if p else b,
    "pmov": lambda p: p,
    "pneg": lambda p: not p,
    "pand": lambda p, q: p and q,
    "por": lambda p, q: p or q,
    "pxor": lambda p, q: p != q,
    "pnand": lambda p, q: not (p and q),
    "pnor": lambda p, q: not (p or q),
    _LOAD: lambda a: a,
    _STORE: lambda a: a,
}
for _name, _compare in _COMPARISONS.items():
    _FUNCTIONS[f"scmp.{_name}.u32.totalorder"] = _compare
    _FUNCTIONS[f"scmp.{_name}.s32.totalorder"] = _of_signed(_compare)


# How many operands they have, where it is not two.
_OPERANDS = dict.fromkeys(("smov", "pmov", "pneg", _LOAD), 1) | {"scalar_select": 3}
# Scalar memory that nothing but the scalar unit writes: registers that were too many.
_SPILLED = "_spill]"


class Loop(NamedTuple):
    """Bundles that a branch repeats.

    Attributes:
      first: the place of the first one.
      end: the place behind the last one.
      trips: how often the first one runs; None if a branch on something unknown
        decides on that, its own or one around it.
    """

    first: int
    end: int
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often bundles run.

    Attributes:
      times: of each bundle.
      is_least: whether some run more often, or nobody knows whether they run.
      loops: in order of their first bundles.
    """

    times: tuple[int, ...]
    is_least: bool
    loops: tuple[Loop, ...]


class _Step(NamedTuple):
    """An operation that branches depend on; places are registers and memory."""

    target: str
    function: Callable[..., int]
    operands: tuple[str | int, ...]
    predicate: str
    negated: bool


class _Branch(NamedTuple):
    """A branch, and what is behind the bundles that run before it jumps.

    Its predicate is None where it is not known.
    """

    place: int
    behind: int
    target: int
    predicate: str | None
    negated: bool


def count(bundles: Sequence[Bundle], delay: int) -> Counts:
    """Returns how often each bundle runs in one run of the code.

    Args:
      bundles: the code.
      delay: how many bundles behind a branch run before it jumps, at the most: none of
        the next region, before which a 7x has one empty bundle in place of several.
    """
    branches = list(_branches(bundles, delay))
    known = _known(bundles, branches)
    branches = [
        branch
        if not branch.predicate or branch.predicate in known
        else branch._replace(predicate=None)
        for branch in branches
    ]
    steps = _steps(bundles, branches, known)
    times, finished = _Machine(steps, branches).run()
    unknown = [branch for branch in branches if branch.predicate is None]
    ends: dict[int, int] = {}
    for branch in branches:
        if branch.target <= branch.place:
            ends[branch.target] = max(branch.behind, ends.get(branch.target, 0))
    loops = []
    for first, end in sorted(ends.items()):
        around = [(a, b) for a, b in ends.items() if a <= first and end <= b]
        is_open = any(_decides(branch, first, around) for branch in unknown)
        trips = None if is_open or not finished else times[first]
        loops.append(Loop(first, end, trips))
    return Counts(tuple(times), bool(unknown) or not finished, tuple(loops))


def _decides(branch: _Branch, first: int, around: Sequence[tuple[int, int]]) -> bool:
    """Tells whether a branch decides how often a loop's first bundle runs.

    Args:
      branch: it repeats a loop, jumps over the bundle, or leaves a loop early.
      first: the bundle's place.
      around: the first place of each loop that has the bundle, and the one behind it.
    """
    if branch.target <= branch.place:
        return branch.target in [start for start, _ in around]
    return branch.place < first < branch.target or any(
        start <= branch.place < end <= branch.target for start, end in around
    )


def _branches(bundles: Sequence[Bundle], delay: int) -> Iterator[_Branch]:
    starts = {n: place for place, one in enumerate(bundles) for n in one.regions}
    begins = [*sorted(set(starts.values())), len(bundles)]
    for place, bundle in enumerate(bundles):
        for one in bundle.scalars:
            if one.opcode.startswith(_BRANCH) and one.operands:
                region = one.operands[-1].removeprefix("$region")
                target = starts.get(int(region)) if region.isdigit() else None
                if target is not None:
                    following = begins[bisect.bisect_right(begins, place)]
                    behind = min(place + delay + 1, following)
                    yield _Branch(place, behind, target, one.predicate, one.negated)


def _reads(one: Operation) -> Iterator[str]:
    """Yields the names and the scalar memory that an operation reads."""
    for operand in one.operands[one.opcode == _STORE :]:
        if not operand.isdigit():
            yield operand.removeprefix("%")
    if one.predicate:
        yield one.predicate


def _writes(one: Operation) -> str:
    return one.operands[0] if one.opcode == _STORE and one.operands else one.result


def _definitions(bundles: Sequence[Bundle]) -> dict[str, list[Operation]]:
    """Returns what writes each name and each place of scalar memory."""
    found: dict[str, list[Operation]] = {}
    for bundle in bundles:
        for one in bundle.scalars:
            if one.opcode == _PHI or _is_readable(one):
                found.setdefault(_writes(one), []).append(one)
    return found


def _is_readable(one: Operation) -> bool:
    """Tells whether what an operation does follows from its text."""
    if one.opcode not in _FUNCTIONS:
        return False
    if one.opcode in (_LOAD, _STORE) and _SPILLED not in "".join(one.operands[:1]):
        return False
    return len(one.operands) == _OPERANDS.get(one.opcode, 2)


def _known(bundles: Sequence[Bundle], branches: Sequence[_Branch]) -> set[str]:
    """Returns the names and places whose numbers follow from what is written.

    What is written where an unknown branch may jump over it is not known.
    """
    defined = _definitions(bundles)
    unknown: set[str] = set()
    while True:
        new = {
            name
            for name, writers in defined.items()
            if name not in unknown
            and any(
                read not in defined or read in unknown
                for one in writers
                for read in _reads(one)
            )
        }
        known = set(defined) - unknown - new
        for branch in branches:
            if branch.predicate and branch.predicate not in known:
                jumped = bundles[branch.behind : branch.target]
                written = (_writes(one) for bundle in jumped for one in bundle.scalars)
                new |= known.intersection(written)
        if not new:
            return known
        unknown |= new


def _steps(
    bundles: Sequence[Bundle], branches: Sequence[_Branch], known: set[str]
) -> list[list[_Step]]:
    """Returns for each bundle the operations that branches depend on."""
    defined = _definitions(bundles)
    needed: set[str] = set()
    waiting = [b.predicate for b in branches if b.predicate]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        for one in defined.get(name, ()):
            waiting += [read for read in _reads(one) if read in known]
    return [
        [
            _Step(
                _register(_writes(one)),
                _FUNCTIONS[one.opcode],
                tuple(
                    int(o) % _BITS if o.isdigit() else _register(o.removeprefix("%"))
                    for o in one.operands[one.opcode == _STORE :]
                ),
                _register(one.predicate),
                one.negated,
            )
            for one in bundle.scalars
            if _is_readable(one) and _writes(one) in needed
        ]
        for bundle in bundles
    ]


def _register(name: str) -> str:
    """Returns the register of a name; memory keeps its address.

    What joins two names where two ways meet, a phi, has the register of both.
    """
    return name if name.startswith("[") else name.rpartition("_")[2]


class _Machine:
    """Runs the steps of blocks of bundles, and counts the blocks."""

    def __init__(
        self,
        steps: Sequence[Sequence[_Step]],
        branches: Sequence[_Branch],
    ):
        self._size = len(steps)
        self._steps = steps
        self._branches = {branch.place: branch for branch in branches}
        jumps = {place for b in branches for place in (b.behind, b.target)}
        self._starts = sorted({0, *jumps} - {self._size})
        self._registers: dict[str, int] = {}

    def run(self) -> tuple[list[int], bool]:
        """Returns how often each bundle runs, and whether that is all."""
        ends = dict(zip(self._starts, [*self._starts[1:], self._size], strict=True))
        blocks = {
            start: [
                place
                for place in range(start, end)
                if self._steps[place] or place in self._branches
            ]
            for start, end in ends.items()
        }
        times = dict.fromkeys(ends, 0)
        done, block = 0, 0
        while block < self._size:
            times[block] += 1
            following = ends[block]
            for place in blocks[block]:
                self._do(self._steps[place])
                done += len(self._steps[place]) + 1
                branch = self._branches.get(place)
                if branch is not None and self._is_taken(branch):
                    following = branch.target
            block = following
            if done > _MOST_OPERATIONS:
                break
        counted = [0] * self._size
        for start, end in ends.items():
            counted[start:end] = [times[start]] * (end - start)
        return counted, done <= _MOST_OPERATIONS

    def _is_taken(self, branch: _Branch) -> bool:
        if branch.predicate is None:
            return branch.target > branch.place
        if not branch.predicate:
            return True
        holds = bool(self._registers.get(_register(branch.predicate), 0))
        return holds != branch.negated

    def _do(self, steps: Sequence[_Step]) -> None:
        """Runs what issues at once: everything is read before anything is written."""
        registers, new = self._registers, []
        for target, function, operands, predicate, negated in steps:
            if predicate and bool(registers.get(predicate, 0)) == negated:
                continue
            # What was never written is read where the result does not matter.
            values = (
                operand if isinstance(operand, int) else registers.get(operand, 0)
                for operand in operands
            )
            new.append((target, function(*values) % _BITS))
        registers.update(new)
