"""What a compiled program computes and moves, counted in the text of its HLO.

A compiler's own `cost_analysis()` takes the body of a loop once, and those for GPUs
that are elsewhere have none; here a body counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxsoft.devices.hlo_text import OPERAND, Computation, Instruction, parse

__all__ = ["Work", "runs_of", "work_of"]

_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.\-]+)")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER = re.compile(r"(?:true|false)_computation=%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_DIMS = r"{}_contracting_dims=\{{([\d,]*)\}}"
_SUMMED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_TOLD = re.compile(r'"cost_estimate":\{"flops":"?(\d+)"?.*?"bytes_accessed":"?(\d+)"?')

# What makes no array of its own.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier "
    "optimization-barrier partition-id replica-id domain".split()
)
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "Sharding")
_PRODUCTS = re.compile("gemm|matmul|__cudnn")
_KERNELS = re.compile("mosaic|tpu_custom_call|triton|cute", re.IGNORECASE)
# Of these an element of the result is made of one of the operand.
_ONE_BY_ONE = frozenset(
    "bitcast bitcast-convert convert copy reshape transpose".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATE = "dynamic-update-slice"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does.

    Attributes:
      dot_flops: multiplications and additions of matrix products.
      accessed: bytes that instructions read and write in the device's memory.
      is_least: whether there is more: a loop that runs nobody knows how often, or a
        kernel that does not tell.
      is_untold: whether there is such a kernel.
    """

    dot_flops: int = 0
    accessed: int = 0
    is_least: bool = False
    is_untold: bool = False

    def __add__(self, other: "Work") -> "Work":
        """Adds what is done after it."""
        return Work(
            self.dot_flops + other.dot_flops,
            self.accessed + other.accessed,
            self.is_least or other.is_least,
            self.is_untold or other.is_untold,
        )

    def __or__(self, other: "Work") -> "Work":
        """Returns the most that is done where it is this or the other."""
        return Work(
            max(self.dot_flops, other.dot_flops),
            max(self.accessed, other.accessed),
            self.is_least or other.is_least,
            self.is_untold or other.is_untold,
        )

    def times(self, count: int) -> "Work":
        """Returns the work of so many iterations."""
        return dataclasses.replace(
            self, dot_flops=self.dot_flops * count, accessed=self.accessed * count
        )


def work_of(text: str) -> Work | None:
    """Counts what a program does.

    Of branches the most counts, of products and of bytes each. What instructions of one
    fusion hand each other is not moved; of an array that is sliced, or updated in
    place, the slice is. Arrays that a processor's caches hold count as if in memory.

    Args:
      text: optimized HLO, as a compiled program's `as_text()` gives it.

    Returns:
      The work; None where the text is not such.
    """
    computations, entry = parse(text)
    if entry is None:
        return None
    return _Counter(computations).of(entry)


def runs_of(text: str, weights: Mapping[str, int]) -> tuple[dict[str, int], set[str]]:
    """Counts how often each instruction outside of fusions runs.

    Args:
      text: optimized HLO.
      weights: of instructions by name; of branches the heaviest counts.

    Returns:
      The counts by name, and the names of those that may run more often: a loop of
      which nobody knows how often it runs counts as run once.
    """
    computations, entry = parse(text)
    found: dict[str, int] = {}
    more: set[str] = set()
    if entry is not None:
        _Counter(computations).add_runs(entry, 1, weights, found, more)
    return found, more


class _Place(NamedTuple):
    """An instruction of a computation, and the fusion that this one is, if it is."""

    where: Computation
    one: Instruction
    fusion: "_Place | None" = None


class _Counter:
    """Counts computations, each once."""

    def __init__(self, computations: dict[str, Computation]):
        self._computations = computations
        self._done: dict[str, Work] = {}

    def of(self, name: str) -> Work:
        """Returns the work of a computation."""
        if name not in self._done:
            self._done[name] = functools.reduce(
                Work.__add__,
                (
                    self._of_one(self._computations[name], one)
                    for one in self._computations[name].instructions.values()
                ),
                Work(),
            )
        return self._done[name]

    def _of_one(self, where: Computation, one: Instruction) -> Work:
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return Work()
        if one.opcode == "while":
            return self._of_loop(where, one)
        if one.opcode == "conditional":
            works = (self.of(name) for name in self._called(one))
            return functools.reduce(Work.__or__, works, Work())
        called = _CALLED.search(one.rest)
        if one.opcode in ("call", "async-start") and called:
            return self.of(called[1])
        if one.opcode == "fusion" and called:
            return Work(self._flops_within(called[1]), self._moved(where, one))
        if one.opcode == "custom-call":
            return self._of_custom_call(where, one)
        return Work(_dot_flops(where, one), self._moved(where, one))

    def _of_loop(self, where: Computation, one: Instruction) -> Work:
        names = _LOOP.search(one.rest)
        assert names is not None
        work = self.of(names[1]) + self.of(names[2])
        count = self._trips(where, one)
        if count is None:
            return dataclasses.replace(work, is_least=True)
        return work.times(count)

    def add_runs(
        self,
        name: str,
        times: int,
        weights: Mapping[str, int],
        found: dict[str, int],
        more: set[str],
        is_least: bool = False,
    ) -> None:
        """Adds how often each instruction runs where a computation runs so often.

        Args:
          name: the computation's.
          times: how often it runs.
          weights: of instructions; of branches the heaviest runs.
          found: by the names of instructions; it grows.
          more: the names of those that may run more often; it grows.
          is_least: whether the computation may.
        """
        where = self._computations[name]
        for one in where.instructions.values():
            names, trips, is_open = self._called(one), 1, is_least
            if one.opcode == "while":
                counted = self._trips(where, one)
                is_open |= counted is None
                trips = 1 if counted is None else counted
            elif one.opcode == "conditional":
                names = sorted(names, key=lambda n: self._weight(n, weights))[-1:]
            elif one.opcode not in ("call", "async-start"):
                names = []
            if not names:
                found[one.name] = found.get(one.name, 0) + times
                more |= {one.name} if is_open else set()
            for inner in names:
                self.add_runs(inner, times * trips, weights, found, more, is_open)

    def _weight(self, name: str, weights: Mapping[str, int]) -> int:
        """Returns the weight of a computation, its loops' iterations counted."""
        found: dict[str, int] = {}
        self.add_runs(name, 1, weights, found, set())
        return sum(times * weights.get(one, 0) for one, times in found.items())

    def _called(self, one: Instruction) -> list[str]:
        """Returns the computations that an instruction runs, or runs one of."""
        if one.opcode == "while":
            names = _LOOP.search(one.rest)
            return [*names.groups()] if names else []
        if one.opcode == "conditional":
            listed = _BRANCHES.search(one.rest)
            return OPERAND.findall(listed[1]) if listed else _EITHER.findall(one.rest)
        called = _CALLED.search(one.rest)
        return [called[1]] if called else []

    def _trips(self, where: Computation, loop: Instruction) -> int | None:
        """Returns how often a loop runs, if that is written."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        names = _LOOP.search(loop.rest)
        assert names is not None
        condition, body = (self._computations[name] for name in names.groups())
        return self._iterations(where, loop, condition, body)

    def _iterations(
        self,
        where: Computation,
        loop: Instruction,
        condition: Computation,
        body: Computation,
    ) -> int | None:
        """Returns how often a loop runs that counts up by a number to another."""
        compare = condition.root
        if compare is None:
            return None
        called = _CALLED.search(compare.rest)
        inner = self._computations[called[1]].root if called else compare
        operands = condition.operands(compare)
        if inner is None or "direction=LT" not in inner.rest or len(operands) != 2:
            return None
        counter, end = operands
        index = re.search(r"index=(\d+)", counter.rest)
        (start,) = where.operands(loop)[:1] or (None,)
        if index is None or not _is_whole(end) or start is None:
            return None
        if start.opcode != "tuple":
            return None
        first = where.instructions[start.operands[int(index[1])]]
        while first.opcode in _ONE_BY_ONE and first.operands:
            first = where.instructions[first.operands[0]]
        step = self._step(body, int(index[1]))
        if not _is_whole(first) or not step:
            return None
        return max(-((int(first.inside) - int(end.inside)) // step), 0)

    def _step(self, body: Computation, index: int) -> int | None:
        """Returns by how much a loop's counter grows, if that is a number above 0."""
        if body.root is None or body.root.opcode != "tuple":
            return None
        new = body.instructions[body.root.operands[index]]
        found = self._source(_Place(body, new))
        if found.one.opcode != "add":
            return None
        terms = [
            self._source(found._replace(one=one))
            for one in found.where.operands(found.one)
        ]
        old, step = sorted((t.one for t in terms), key=lambda one: one.opcode)[::-1]
        if old.opcode != "get-tuple-element" or not _is_whole(step):
            return None
        is_old = f"index={index}," in f"{old.rest},"
        of_body = body.instructions.get(old.operands[0])
        if not is_old or of_body is None or of_body.opcode != "parameter":
            return None
        return max(int(step.inside), 0)

    def _source(self, place: "_Place") -> "_Place":
        """Returns what makes a number, through copies, into fusions and out of them."""
        result = 0
        while True:
            where, one, fusion = place
            called = _CALLED.search(one.rest) if one.opcode == "fusion" else None
            if one.opcode in _ONE_BY_ONE and one.operands:
                place = place._replace(one=where.instructions[one.operands[0]])
            elif called is not None:
                inner = self._computations[called[1]]
                root = inner.root
                assert root is not None
                if root.opcode == "tuple":
                    root = inner.operands(root)[result]
                place = _Place(inner, root, place)
            elif one.opcode == "parameter" and fusion is not None:
                operand = fusion.one.operands[int(one.inside)]
                place = fusion._replace(one=fusion.where.instructions[operand])
            elif one.opcode == "get-tuple-element" and (
                where.operands(one)[0].opcode == "fusion"
            ):
                result = int(one.rest.partition("index=")[2].partition(",")[0])
                place = place._replace(one=where.operands(one)[0])
            else:
                return place

    def _of_custom_call(self, where: Computation, one: Instruction) -> Work:
        target = (_TARGET.search(one.rest) or ("", ""))[1]
        if target.startswith(_NO_WORK):
            return Work()
        if told := _TOLD.search(one.rest):
            return Work(int(told[1]), int(told[2]))
        moved = self._moved(where, one)
        if _PRODUCTS.search(target):
            left = where.operands(one)[0].arrays[0].shape
            summed = _SUMMED.search(one.rest)
            axes = _numbers(summed[1]) if summed else [len(left) - 1]
            flops = 2 * one.arrays[0].size * math.prod(left[axis] for axis in axes)
            return Work(flops, moved)
        is_kernel = _KERNELS.search(target) is not None
        return Work(0, moved, is_kernel, is_kernel)

    def _flops_within(self, name: str) -> int:
        """Returns the flops of products inside a fusion."""
        where = self._computations[name]
        found = 0
        for one in where.instructions.values():
            found += _dot_flops(where, one)
            if one.opcode in ("fusion", "call") and (
                called := _CALLED.search(one.rest)
            ):
                found += self._flops_within(called[1])
        return found

    def _moved(self, where: Computation, one: Instruction) -> int:
        """Returns the bytes that an instruction reads and writes."""
        if one.opcode.endswith("-start"):
            return _moved_by_start(one)
        read = 0
        for operand in dict.fromkeys(one.operands):
            array = where.instructions.get(operand)
            if array is not None and array.arrays:
                elements = min(self._read(one, operand), array.size)
                read += array.arrays[0].bytes_of(elements)
        return read + self._written(where, one)

    def _read(self, user: Instruction, name: str) -> int:
        """Returns how many elements of an array an instruction needs, at the most."""
        everything = 2**62
        places = [i for i, operand in enumerate(user.operands) if operand == name]
        if user.opcode in _SLICES and places == [0]:
            return user.size
        if user.opcode == _UPDATE and places == [0]:
            return 0
        called = _CALLED.search(user.rest) if user.opcode == "fusion" else None
        if called is None:
            return everything
        inner = self._computations[called[1]]
        parameters = [inner.parameter(place) for place in places]
        return sum(self._needed(inner, one) for one in parameters if one is not None)

    def _needed(self, where: Computation, one: Instruction) -> int:
        """Returns how many elements of an instruction in a fusion its users need."""
        found = 0
        for user in where.users[one.name]:
            if self._is_one_by_one(user) and user is not where.root:
                found += self._needed(where, user)
            else:
                found += self._read(user, one.name)
        # Several users need the same slice.
        return min(found, one.size)

    def _is_one_by_one(self, one: Instruction) -> bool:
        """Tells whether an element of the result is made of one of the operand."""
        called = _CALLED.search(one.rest) if one.opcode == "fusion" else None
        if called is None:
            return one.opcode in _ONE_BY_ONE
        inner = self._computations[called[1]].instructions.values()
        return all(i.opcode in (*_ONE_BY_ONE, "parameter") for i in inner)

    def _written(self, where: Computation, one: Instruction) -> int:
        """Returns the bytes of the result that are written."""
        updated = self._updated(where, one)
        if len(updated) != len(one.arrays):
            return one.moved()
        return sum(
            array.bytes_of(array.size if size is None else size)
            for array, size in zip(one.arrays, updated, strict=True)
        )

    def _updated(self, where: Computation, one: Instruction) -> Sequence[int | None]:
        """Returns how many elements of each result are new; None for all."""
        if one.opcode == _UPDATE:
            return [where.instructions[one.operands[1]].size]
        if one.opcode in ("bitcast", "copy") and one.operands:
            return self._updated(where, where.instructions[one.operands[0]])
        if one.opcode == "fusion" and (called := _CALLED.search(one.rest)):
            inner = self._computations[called[1]]
            root = inner.root
            if root is None or root.opcode in ("copy", "parameter"):
                return [None] * len(one.arrays)
            parts = inner.operands(root) if root.opcode == "tuple" else [root]
            return [size for part in parts for size in self._updated(inner, part)]
        return [None] * len(one.arrays)


def _moved_by_start(one: Instruction) -> int:
    """Returns the bytes that an asynchronous copy or slice reads and writes."""
    if len(one.arrays) < 2:
        return one.moved()
    new = min(one.arrays[:2], key=lambda array: array.size)
    return sum(array.bytes_of(new.size) for array in one.arrays[:2])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _is_whole(one: Instruction) -> bool:
    """Tells whether an instruction is a whole number that is written in it."""
    return one.opcode == "constant" and re.fullmatch(r"-?\d+", one.inside) is not None


def _dot_flops(where: Computation, one: Instruction) -> int:
    """Returns the flops of an instruction that is a product, 0 of others."""
    if one.opcode == "dot":
        left = where.operands(one)[0].arrays[0].shape
        axes = re.search(_DIMS.format("lhs"), one.rest)
        summed = [left[axis] for axis in _numbers(axes[1] if axes else "")]
        return 2 * one.size * math.prod(summed)
    # TPUs make convolutions of products.
    labels = _LABELS.search(one.rest) if one.opcode == "convolution" else None
    if labels is not None:
        right = where.operands(one)[1].arrays[0].shape
        return 2 * one.size * math.prod(right) // right[labels[2].index("o")]
    return 0
