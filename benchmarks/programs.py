"""`python -m benchmarks programs`: what every program takes, to compare with later.

    python -m benchmarks programs --out new.json --against old.json

compiles the programs of `programs_cases`, for the CPU and for accelerators that need
not be here, and exits with 1 if a figure of one grew by more than 2 %. Nothing is run,
so that nothing depends on the machine's speed. `programs_figures` says what the figures
are. A record also has the signatures of all that is public; their differences are
printed, and no failure. To record an older checkout, copy `programs*.py` into its
`benchmarks` and call `python -m benchmarks.programs` there.
"""

import argparse
import importlib.metadata
import inspect
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

import jaxsoft
import jaxsoft.nn
import jaxsoft.training
from benchmarks import programs_cases as cases
from benchmarks.programs_figures import COLLECTIVES, measure
from jaxsoft._core.registry import Gpu, compiling_for
from jaxsoft.devices.target import ENVIRONMENT, TARGETS

__all__ = ["ask", "changes", "main", "signatures", "target_mesh", "tell"]

SCHEMA = "jaxsoft programs 1"
DEFAULT_TARGETS = ("cpu", "h100", "v6e")
MOST = 1.02

# Of the lines that are for the parent: compilers print too.
_PREFIX = "RESULT "
_MODULE = "benchmarks.programs"
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax", "optax")
_SLICES = {"cuda": "1x1x4", "tpu": ""}
_COLUMNS = ("target", "program", "figure", "before", "after", "ratio")


def main(arguments: Sequence[str] | None = None) -> int:
    """Records programs, and compares them with an earlier record.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code: 1 if a figure grew or a compiler failed, otherwise 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.child:
        return _tell(options.child, options.only)
    for target in options.targets:
        if target != "cpu" and target not in TARGETS:
            parser.error(f"no target {target!r}; there are cpu, {', '.join(TARGETS)}")
    if options.out is None:
        parser.error("--out is needed")
    old = _load(parser, options.against) if options.against else None
    versions = {name: _version(name) for name in _PACKAGES}
    record = {"schema": SCHEMA, "versions": versions, "signatures": signatures()}
    record["seconds"], record["programs"] = {}, {}
    failed = False
    for target in options.targets:
        start = time.perf_counter()
        found = record["programs"][target] = {}
        only = ["--only", *options.only] if options.only else []
        for name, figures, seconds in ask([_MODULE, "--child", target, *only]):
            said = figures.get("error", f"{seconds:.1f} s")
            print(f"{target} · {name}: {said}", file=sys.stderr, flush=True)
            failed |= "error" in figures
            found[name] = figures
        record["seconds"][target] = round(time.perf_counter() - start, 1)
        options.out.write_text(_text(record) + "\n")
    grew = _compare(old, record) if old else False
    return int(failed or grew)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks programs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write here")
    parser.add_argument(
        "--against", type=pathlib.Path, metavar="FILE", help="an earlier record"
    )
    parser.add_argument(
        "--targets",
        type=lambda text: text.split(","),
        default=DEFAULT_TARGETS,
        metavar="NAMES",
        help=f"separated by commas: {','.join(('cpu', *TARGETS))}",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the programs those whose name starts so",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(parser: argparse.ArgumentParser, path: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        parser.error(f"{path}: no record of programs of this version")
    return record


def _text(value: Any, depth: int = 3) -> str:
    """Returns JSON with a line for each signature and program."""
    if not depth or not isinstance(value, dict):
        return json.dumps(value)
    lines = [f"{json.dumps(k)}: {_text(v, depth - 1)}" for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


# Signatures.


def signatures() -> dict[str, str]:
    """Returns the signatures of all that is public, and of the methods of classes.

    Types are named without the modules that they live in, which may move.
    """
    found = {}
    rooms = (jaxsoft, jaxsoft.nn, jaxsoft.training, jaxsoft.schedules)
    for room in rooms:
        for name in room.__all__:
            try:
                member = getattr(room, name)
            except jaxsoft.training.MissingExtraError:
                continue
            whole = f"{room.__name__}.{name}"
            if inspect.isclass(member):
                found |= _of_class(whole, member)
            elif inspect.isfunction(member):
                found[whole] = _signature(member)
    return found


def _of_class(whole: str, found: type) -> dict[str, str]:
    """Returns the signatures of a class: how it is made, and its methods."""
    # Flax's modules are made by their metaclass, named tuples without `__init__`.
    written = inspect.isfunction(found.__init__)
    signatures = {whole: _signature(found.__init__ if written else found)}
    for name in dir(found):
        owner = next(each for each in found.__mro__ if name in vars(each))
        ours = owner.__module__.startswith("jaxsoft")
        if not ours or (name.startswith("_") and name != "__call__"):
            continue
        member = inspect.getattr_static(found, name)
        if isinstance(member, property):
            signatures[f"{whole}.{name}"] = "property"
        elif isinstance(member, (classmethod, staticmethod)):
            signatures[f"{whole}.{name}"] = _signature(member.__func__)
        elif inspect.isfunction(member):
            signatures[f"{whole}.{name}"] = _signature(member)
    return signatures


def _signature(function: Any) -> str:
    try:
        text = str(inspect.signature(function))
        # An annotation that Python has not evaluated is a string.
        text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
        text = _without_modules(text)
    except ValueError:
        return "built in"
    union = _without_modules(inspect.formatannotation(ArrayLike))
    text = text.replace(union, "ArrayLike")
    return text.replace(f"{union[:-1]}, NoneType]", "ArrayLike | None")


def _without_modules(text: str) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)


# Programs.


def ask(
    arguments: Sequence[str],
) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yields a program's name, figures and seconds, as another process finds them.

    Args:
      arguments: a module that calls `tell`, and its arguments.
    """
    command = [sys.executable, "-m", *arguments]
    devices = {"JAX_NUM_CPU_DEVICES": "4"}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | ENVIRONMENT | devices,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_PREFIX):
                yield tuple(json.loads(line.removeprefix(_PREFIX)))
        if process.wait():
            said.seek(0)
            last = [line for line in said.read().splitlines() if line.strip()][-1:]
            yield "compiler", {"error": " ".join(last)[:300]}, 0.0


def tell(name: str, figures: dict[str, Any], seconds: float) -> None:
    """Prints a line for the process that called `ask`."""
    print(_PREFIX + json.dumps([name, figures, seconds]), flush=True)


def target_mesh(target: str) -> tuple[Mesh, str, Gpu | None]:
    """Returns four devices in a square, their platform, and what is known of a GPU."""
    if target == "cpu":
        platform, devices, gpu = "cpu", jax.devices(), None
    else:
        chosen = TARGETS[target]
        platform, gpu = chosen.platform, chosen.gpu
        devices = chosen.devices(_SLICES[platform])
    return Mesh(np.array(devices[:4]).reshape(2, 2), cases.AXES), platform, gpu


def _tell(target: str, names: Sequence[str]) -> int:
    """Prints a line for each program, for the parent; a name may be a prefix."""
    mesh, platform, gpu = target_mesh(target)
    dtype = "float32" if target == "cpu" else "bfloat16"
    with compiling_for(gpu):
        for name, program in cases.programs(mesh, dtype).items():
            if names and not name.startswith(tuple(names)):
                continue
            if program.place == cases.JIT and platform == "tpu":
                continue
            start = time.perf_counter()
            try:
                figures = measure(program, mesh, platform)
            except Exception as error:
                figures = {"error": f"{type(error).__name__}: {error}"[:300]}
            tell(name, figures, time.perf_counter() - start)
    return 0


# Comparison.


def changes(
    old: dict[str, Any], new: dict[str, Any]
) -> list[tuple[str, str, str, Any, Any, float]]:
    """Returns target, program, figure, before, after and ratio of what changed.

    That is by more than 2 %, or by anything where collectives are counted; the worst
    first. A program that no longer compiles has an infinite ratio.
    """
    found = []
    for target, programs in new["programs"].items():
        earlier = old["programs"].get(target, {})
        for name in programs.keys() & earlier.keys():
            before, after = earlier[name], programs[name]
            if "error" in before or "error" in after:
                if before.keys() != after.keys():
                    ratio = math.inf if "error" in after else 0.0
                    errors = [x.get("error", "compiled") for x in (before, after)]
                    found.append((target, name, "error", *errors, ratio))
                continue
            for figure in before.keys() | after.keys():
                was, now = before.get(figure, 0), after.get(figure, 0)
                ratio = now / was if was else math.inf if now else 1.0
                moves = re.match(COLLECTIVES.replace("-", "[-_]"), figure)
                if not 1 / MOST <= ratio <= MOST or (moves and was != now):
                    found.append((target, name, figure, was, now, ratio))
    return sorted(found, key=lambda change: (-change[-1], change))


def _compare(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Prints what changed, and returns whether a figure grew."""
    for package, version in new["versions"].items():
        if version != old["versions"].get(package):
            print(f"{package}: {old['versions'].get(package)} before, {version} after")
    print("\nSignatures")
    before, after = old["signatures"], new["signatures"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            print(f"- {name}{before.get(name, ' was not there')}")
            print(f"+ {name}{after.get(name, ' is not there')}")
    print("\nPrograms")
    found = changes(old, new)
    if found:
        _draw([list(_COLUMNS), *([*map(_cell, change)] for change in found)])
    compared = sum(
        len(programs.keys() & old["programs"].get(target, {}).keys())
        for target, programs in new["programs"].items()
    )
    grown = [change for change in found if change[-1] > MOST]
    print(
        f"{compared} of {sum(map(len, new['programs'].values()))} programs compared, "
        f"{len(grown)} figures grew, {sum(x[-1] < 1 / MOST for x in found)} shrank, "
        f"worst ratio {max((x[-1] for x in found), default=1.0):.3f}"
    )
    return bool(grown)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value


def _draw(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = [
            cell.ljust(width) if position < 3 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


if __name__ == "__main__":
    sys.exit(main())
