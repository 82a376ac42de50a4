"""`python -m benchmarks everyday`: is anything slower than what a user would write?

    python -m benchmarks everyday --out new.json --plot new.png

takes every public function at every size, value and gradient, beside the strongest
short formula of jax.nn, jax.lax and Optax: first whether both give the same numbers,
then time by turns in one process, the time to compile and temporary memory. One table
has all cells, the worst first, each with its bounds: of time 1.05 of the formula's, or
1.10 where that takes less than 50 µs; to compile 2.5 times as long, or 0.4 s. On a busy
machine a ratio may be off by a half. `--markdown` prints a line for each function.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

import jaxsoft
from benchmarks import (
    contest,
    everyday_compiled,
    everyday_draws,
    everyday_layers,
    everyday_report,
    everyday_trees,
    machine,
    timing,
)
from benchmarks.everyday_case import (
    OURS,
    PLAIN,
    Case,
    Inputs,
    Pair,
    Room,
    Size,
    compare,
    compile_pair,
)
from jaxsoft.devices.target import TARGETS

__all__ = ["ROOMS", "UNTIMED", "main", "settled", "unexplained"]

SCHEMA = "jaxsoft everyday 1"
ROOMS = (everyday_draws.ROOM, *everyday_layers.ROOMS, *everyday_trees.ROOMS)

_HOLDS = "holds arrays and computes nothing by itself"
_BUILT = (
    "is made once, before any program is compiled; the functions that take it count"
)
# Public names without a cell, and why.
UNTIMED = {
    "AdaptiveTail": _HOLDS,
    "ClassBands": _BUILT,
    "ClassPath": _HOLDS,
    "ClassSampler": _BUILT,
    "ClassTree": _BUILT,
    "LoRA": _HOLDS,
    "LogitStatistics": _HOLDS,
    "MixedNegatives": _HOLDS,
    "RowGradient": _HOLDS,
    "RowOptimizer": _HOLDS,
    "SpeculativeSample": _HOLDS,
    "SampledClasses": _HOLDS,
    "TemperatureFit": _HOLDS,
    "over_mesh": "needs devices: `programs` counts what its programs take on four",
    "schedules": "has functions of a number, the step",
}

# A formula that is quicker than this is measured less well.
_SHORT, _SHORT_BOUND, _BOUND = 50e-6, 1.10, 1.05
_COMPILE_RATIO, _COMPILE_SECONDS = 2.5, 0.4
# A call of this length that was checked is a sample of the first round.
_LONG = 0.05
# Rounds end once the ratio is further from its bound than this many standard errors,
# for which a round is taken to be off by a tenth at least. Short ones are five before.
_SURE, _NOISE, _FEW_ROUNDS, _FEW_SECONDS = 4.0, 0.1, 5, 0.25
# Those of a cell beside its bound end after so long, and are at least three.
_CELL_SECONDS, _FEWEST_ROUNDS, _ROUNDS = 0.8, 3, 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures cells, or shows what an earlier run saved.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code: 1 if a function of ours was wrong or raised, or a public one has
      neither a cell nor a reason; otherwise 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.child:
        everyday_compiled.tell(options.child, ROOMS, options.only, options.sizes)
        return 0
    for target in options.compiled:
        if target != "cpu" and target not in TARGETS:
            parser.error(f"no target {target!r}; there are cpu, {', '.join(TARGETS)}")
    for path in (options.out, options.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'jaxsoft[bench]'")
    if options.compiled:
        return _compile(parser, options)
    if options.load:
        document = _load(parser, options.load)
    else:
        document = _measure(options)
        if not document["cells"]:
            parser.error("there is no cell of that name and size")
    if options.markdown:
        everyday_report.print_markdown(document)
    else:
        everyday_report.print_terminal(document)
        for name, reason in UNTIMED.items():
            print(f"Without a cell: {name} {reason}.")
    for name in unexplained():
        print(f"{name} has no cell, and no reason for it.", file=sys.stderr)
    if options.plot:
        everyday_report.draw(document, options.plot)
    failed = any(cell["status"] in ("wrong", "failed") for cell in document["cells"])
    return int(failed or bool(unexplained()))


def unexplained() -> list[str]:
    """Returns the public names that have neither a cell nor a reason."""
    timed = {case.function for room in ROOMS for case in room.cases}
    return sorted({*jaxsoft.__all__} - timed - {*UNTIMED})


def _parser() -> argparse.ArgumentParser:
    names = sorted({case.function for room in ROOMS for case in room.cases})
    sizes = dict.fromkeys(size.name for room in ROOMS for size in room.sizes)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks everyday",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=names,
        help="these functions",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="SIZE",
        choices=sizes,
        help=f"these sizes, rows first and classes last: {', '.join(sizes)}",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        metavar="N",
        help=f"samples of each; else up to {_ROUNDS}, until a ratio is clearly within "
        "its bound or above",
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write JSON")
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw a map of the ratios"
    )
    parser.add_argument(
        "--from",
        dest="load",
        type=pathlib.Path,
        metavar="FILE",
        help="measure nothing: show, or draw, what an earlier --out wrote",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print a line for each function"
    )
    parser.add_argument(
        "--compiled",
        type=lambda text: text.split(","),
        default=[],
        metavar="TARGETS",
        help="run nothing: bytes, and bundles of TPUs, by the compilers for these, "
        "separated by commas, at the largest sizes if none is named: "
        f"{','.join(('cpu', *TARGETS))}",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _load(parser: argparse.ArgumentParser, path: pathlib.Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        parser.error(f"{path}: no cells of this version")
    return document


def _compile(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Compiles cells for devices that need not be here; the exit code."""
    cells = [*everyday_compiled.ask(options.compiled, options.only, options.sizes)]
    if not cells:
        parser.error("there is no cell of that name and size")
    if options.out:
        options.out.write_text(everyday_compiled.save_text(cells))
    everyday_compiled.print_table(cells)
    return int(any("error" in cell for cell in cells))


# Measurement.


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the cells that are asked for, and saves them as they come."""
    busy = machine.busy()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "started": machine.now(),
        "finished": None,
        "machine": machine.describe(),
        "notes": [busy] if busy else [],
        "rates_per_second": {},
        "cells": [],
    }
    # The first program of a process takes longer to compile than any other.
    timing.compile_program("first", lambda x: jnp.sin(x).sum(), (jnp.ones(8),))
    for room in ROOMS:
        for size in room.sizes:
            if options.sizes and size.name not in options.sizes:
                continue
            for cell in _cells(room, size, options):
                document["cells"].append(cell)
                document["finished"] = machine.now()
                _show(cell)
            # A run that is cut keeps what it measured.
            if options.out:
                options.out.write_text(_text(document))
    return document


def _text(document: dict[str, Any]) -> str:
    """Returns JSON with a line for each cell."""
    rest = {name: value for name, value in document.items() if name != "cells"}
    head = json.dumps(rest, indent=1, allow_nan=False).removesuffix("\n}")
    cells = (json.dumps(_rounded(c), allow_nan=False) for c in document["cells"])
    return head + ',\n "cells": [\n  ' + ",\n  ".join(cells) + "\n ]\n}\n"


def _rounded(value: Any) -> Any:
    """Returns numbers with four digits: no measurement has more."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cells(
    room: Room, size: Size, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields the cells of one size, whose inputs are then dropped."""
    inputs = Inputs(room, size)
    for case in room.cases:
        if options.only and case.function not in options.only:
            continue
        for what in case.whats if case.at(size) else ():
            cell = {
                "room": room.name,
                "function": case.function,
                "title": case.title,
                "what": what,
                "size": size.name,
                "dtype": size.dtype,
                "status": "timed",
                "reason": "",
            }
            try:
                pair = compile_pair(case, what, size, inputs)
                cell |= _of_programs(pair)
                cell |= _of_calls(pair, case, what, size, options.rounds)
            except Exception as error:  # A failure is a result, not ours to raise.
                reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
                cell |= {"status": "failed", "reason": reason}
            yield cell


def _of_programs(pair: Pair) -> dict[str, Any]:
    """Returns what compilation shows."""
    both = (pair.plain, pair.ours)
    seconds = {program.name: program.compile_seconds for program in both}
    bound = max(_COMPILE_RATIO * seconds[PLAIN], _COMPILE_SECONDS)
    return {
        "compile_seconds": seconds,
        "compile_bound": bound,
        "compile_excess": seconds[OURS] / bound,
        "temporary_bytes": {program.name: program.temporary_bytes for program in both},
    }


def _of_calls(
    pair: Pair, case: Case, what: str, size: Size, rounds: int | None
) -> dict[str, Any]:
    """Checks both programs, and times them if they are right."""
    both = (pair.plain, pair.ours)
    for program in both:
        if reason := contest.too_large(program):
            return {"status": "not run", "reason": f"{program.name} {reason}"}
    outputs, seconds = {}, {}
    for program in both:
        outputs[program.name], seconds[program.name] = timing.call(
            program, pair.arguments
        )
    errors, faults = compare(case, what, size, outputs[PLAIN], outputs[OURS])
    outputs.clear()
    if faults:
        return {"status": "wrong", "reason": "; ".join(faults)}
    allowed = case.allowed(size)
    called = {name: each for name, each in seconds.items() if each > _LONG}
    until = _until_settled(allowed, sum(called.values()))
    found = timing.interleave(
        both,
        pair.arguments,
        rounds or _ROUNDS,
        called=called,
        enough=(lambda samples: False) if rounds else until,
    )
    bound = _bound(found[PLAIN].median, allowed)
    ratio = timing.paired_ratio(found[OURS], found[PLAIN])
    return {
        "error": max(errors.values(), default=None),
        "rounds": len(found[OURS].samples),
        "seconds": {name: each.median for name, each in found.items()},
        "ratio": ratio,
        "ratio_bound": bound,
        "ratio_excess": ratio / bound,
    }


def _bound(plain_seconds: float, allowed: float) -> float:
    """Returns what a cell's ratio may be."""
    return (_SHORT_BOUND if plain_seconds < _SHORT else _BOUND) * allowed


def _until_settled(
    allowed: float, spent: float
) -> Callable[[Mapping[str, Sequence[float]]], bool]:
    """Returns what ends a cell's rounds, which took so many seconds by now."""
    start = time.perf_counter() - spent

    def enough(samples: Mapping[str, Sequence[float]]) -> bool:
        seconds = time.perf_counter() - start
        count = len(samples[OURS])
        if count >= _FEWEST_ROUNDS and seconds > _CELL_SECONDS:
            return True
        few = count < _FEW_ROUNDS and seconds < _FEW_SECONDS
        return not few and settled(samples[OURS], samples[PLAIN], allowed)

    return enough


def settled(ours: Sequence[float], plain: Sequence[float], allowed: float) -> bool:
    """Tells whether more rounds would leave a ratio on its side of the bound.

    Args:
      ours: seconds of each round.
      plain: those of the formula in the same rounds.
      allowed: what the bound is multiplied by.
    """
    bound = _bound(statistics.median(plain), allowed)
    away = [math.log(a / b / bound) for a, b in zip(ours, plain, strict=True)]
    spread = max(_NOISE, statistics.stdev(away) if len(away) > 1 else 0.0)
    return abs(statistics.median(away)) > _SURE * spread / math.sqrt(len(away))


def _show(cell: dict[str, Any]) -> None:
    """Prints a line as each cell comes, apart from the table."""
    said = cell["status"] + f": {cell['reason']}" * bool(cell["reason"])
    if cell["status"] == "timed":
        said = f"{cell['ratio']:.2f} of {cell['seconds'][PLAIN] * 1e3:.4g} ms"
    print(f"{everyday_report.title_of(cell)}: {said}", file=sys.stderr, flush=True)
