"""What the results of the suite of trees say about its question, in numbers."""

from collections.abc import Iterator, Sequence

from benchmarks import timing
from benchmarks.session import Finding, Result
from benchmarks.workloads import TreeWorkload

SUITE = "trees"
ROW_OPTIMIZERS = ("row_sgd", "row_adagrad", "row_adam")
# What should cost O(log V).
LOGARITHMIC = (*ROW_OPTIMIZERS, "hierarchical_sample")
# The softmax over all classes.
FULL = ("linear_cross_entropy", "optax")
SEARCH = "best-first search"

# How many times the time at 2**12 classes 2**22 may take.
_GROWTH = 4.0
# How many times faster than the full softmax a step must be at 2**18 classes.
_FASTER = {"row_sgd": 500.0, "row_adagrad": 150.0}
# Bytes of temporaries that may come with each byte of kernel.
_TEMPORARIES = 0.01

# By contender and V.
Results = dict[tuple[str, int], Result]


def findings(
    results: Sequence[Result], workload: TreeWorkload, *, asked: bool
) -> list[Finding]:
    """Growth of time and temporaries, the ratio to the full softmax, and visits.

    Args:
      results: of any suite and workload.
      workload: whose results are read.
      asked: whether numbers are held against what is asked for.

    Returns:
      Findings about what was measured.
    """
    mine = {
        (result.name, result.shape["V"]): result
        for result in results
        if (result.suite, result.workload) == (SUITE, workload.name)
    }
    found = []
    for of in (_growth, _temporaries, _faster, _visits):
        for what, value, bounds in of(mine, workload):
            text = f"{workload.name}: {what}"
            found.append(Finding(SUITE, text, value, **(bounds if asked else {})))
    return found


def power(classes: int) -> str:
    """A power of two, in words."""
    return f"2^{classes.bit_length() - 1}"


# What a number is, the number, and its bounds as `Finding` takes them.
_Found = Iterator[tuple[str, float, dict[str, float]]]


def _ends(results: Results, workload: TreeWorkload) -> Iterator[tuple[Result, Result]]:
    """Each contender's results at both ends of the span, where it has both."""
    low, high = workload.growth
    for name in dict.fromkeys(name for name, _ in results):
        small, large = results.get((name, low)), results.get((name, high))
        if small and large and small.timing and large.timing:
            yield small, large


def _growth(results: Results, workload: TreeWorkload) -> _Found:
    low, high = map(power, workload.growth)
    for small, large in _ends(results, workload):
        assert small.timing and large.timing
        bounds = {"at_most": _GROWTH} if small.name in LOGARITHMIC else {}
        what = f"time of {small.name} at V = {high}, over that at {low}"
        yield what, large.timing.median / small.timing.median, bounds


def _temporaries(results: Results, workload: TreeWorkload) -> _Found:
    low, high = workload.growth
    span = f"from V = {power(low)} to {power(high)}"
    for small, large in _ends(results, workload):
        memories = [
            result.program.temporary_bytes if result.program else None
            for result in (small, large)
        ]
        if small.name not in LOGARITHMIC or None in memories:
            continue
        grown = (memories[1] or 0) - (memories[0] or 0)
        what = f"temporaries of {small.name} for each byte of kernel, {span}"
        kernel = 4 * workload.features * (high - low)
        yield what, grown / kernel, {"at_most": _TEMPORARIES}


def _faster(results: Results, workload: TreeWorkload) -> _Found:
    classes = workload.compared
    every = [results.get((name, classes)) for name in FULL]
    full = [result.timing for result in every if result and result.timing]
    if not full:
        return
    fastest = min(full, key=lambda timing: timing.median)
    for name in ROW_OPTIMIZERS:
        rows = results.get((name, classes))
        if rows and rows.timing:
            bounds = {"at_least": _FASTER[name]} if name in _FASTER else {}
            what = f"time of the full softmax at V = {power(classes)}, over {name}'s"
            yield what, timing.paired_ratio(fastest, rows.timing), bounds


def _visits(results: Results, workload: TreeWorkload) -> _Found:
    for classes in workload.classes:
        if search := results.get((SEARCH, classes)):
            share = search.figures["visits"] / search.figures["inner nodes"]
            what = f"share of the {power(classes)} - 1 inner nodes that must be visited"
            yield what, share, {}
