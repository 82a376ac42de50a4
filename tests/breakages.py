"""Proof that the tests catch bugs: each of a list is made in a copy, and must fail.

    python -m tests.breakages                    all of them, by the default tests
    python -m tests.breakages --tier all         by the slow tests too
    python -m tests.breakages --only 'gpu-*'     some, by name or pattern
    python -m tests.breakages --check            only that each line is still there

A copy has what git tracks or would track, and its own jaxsoft is imported. A test that
fails in a copy without any bug proves nothing: it is left out, the others run again.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

if __package__:
    from tests.breakages_list import BREAKAGES, Breakage
else:
    from breakages_list import BREAKAGES, Breakage

CAUGHT, SKIPPED = "caught", "skipped"
MISSED, TIMEOUT, ERROR = "MISSED", "TIMEOUT", "ERROR"
# Tests that are run together without a bug.
_TOGETHER = 20

# Run in a copy: the broken module must be the copy's, and must not die at its import.
_IMPORT = """
import importlib, sys, jaxsoft
print(jaxsoft.__file__, importlib.import_module(sys.argv[1]).__file__, sep="\\n")
"""
# A test, whose parameters may hold anything, comes before a dash and its message.
_FAILURE = re.compile(
    r"^(?:FAILED|ERROR) (\S+?\.py(?:::[^\s\[]+)*(?:\[.*?\])?)(?= - |$)", re.MULTILINE
)


class BreakageError(Exception):
    """A breakage cannot be tried; the message says why."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs tests in copies of a checkout.

    Attributes:
      checkout: the repository's root.
      python: that has all that the tests need.
      tier: "default", or "all" for tests of every marker.
      timeout: of a run, in seconds.
    """

    checkout: Path
    python: str
    tier: str
    timeout: float

    def copy(self, folder: Path) -> None:
        """Copies the files that git tracks or would track."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self.checkout,
            capture_output=True,
            check=True,
        )
        for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
            source, target = self.checkout / name, folder / name
            if source.is_file():  # deleted files are still listed
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def check_import(self, folder: Path, file: str) -> None:
        """Requires that a module of the copy is imported, and can be."""
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        code, output = self._run(folder, ["-c", _IMPORT, module])
        if code:
            raise BreakageError(f"{module} dies at its import:\n{output}")
        for path in output.split()[-2:]:
            if not Path(path).is_relative_to(folder):
                raise BreakageError(f"{path} is imported, which is not in {folder}.")

    def jax_version(self) -> tuple[int, int]:
        """Returns the version of JAX."""
        code, output = self._run(
            self.checkout, ["-c", "import jax; print(*jax.__version_info__[:2])"]
        )
        if code:
            raise BreakageError(f"{self.python} has no JAX:\n{output}")
        major, minor = map(int, output.split()[-2:])
        return major, minor

    def failures(
        self, folder: Path, tests: Iterable[str], *more: str
    ) -> tuple[str, ...] | None:
        """Returns the tests that fail, in the order of their failing; None if late."""
        every = ["-m", ""] if self.tier == "all" else []
        # The last two: a line for each failure, and nothing of where it came from.
        options = ["-q", "-n", "2", "-rfE", "--tb=no", "--color=no"]
        command = ["-m", "pytest", *options, *every, *more, *tests]
        code, output = self._run(folder, command)
        if code is None:
            return None
        found = tuple(dict.fromkeys(_FAILURE.findall(output)))
        if code == 5 and not every:
            return ()  # The default tier has none of these tests, so it sees no bug.
        # 0 passed, 1 failed, 2 failed while tests were collected, 5 ran nothing.
        if code not in (0, 1, 2) or (code != 0) != bool(found):
            raise BreakageError(f"pytest ended with {code}:\n{output}")
        return found

    def _run(self, folder: Path, arguments: Sequence[str]) -> tuple[int | None, str]:
        """Returns exit code and output of the copy's Python; no code if it is late."""
        process = subprocess.Popen(
            [self.python, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=self.timeout)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                # With the workers and what they started.
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@dataclasses.dataclass
class Trial:
    """What became of a breakage.

    Attributes:
      breakage: which.
      outcome: one of the words above; None while it is not known.
      failing: the tests that fail with it.
      seconds: that its runs took.
    """

    breakage: Breakage
    outcome: str | None = None
    failing: tuple[str, ...] = ()
    seconds: float = 0.0


def broken(breakage: Breakage, text: str) -> str:
    """Returns a file's text with a bug; raises where the bug's place is not there."""
    count = text.count(breakage.before)
    if count != 1:
        raise BreakageError(
            f"stale breakage {breakage.name}: {breakage.file} has {count} times "
            f"{breakage.before!r}, not once."
        )
    return text.replace(breakage.before, breakage.after)


def problems(checkout: Path, breakages: Sequence[Breakage]) -> list[str]:
    """Returns what is wrong with a list, without running anything."""
    found = []
    names = [one.name for one in breakages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"{name} is the name of two breakages.")
    for one in breakages:
        file = checkout / one.file
        missing = [path for path in one.tests if not (checkout / path).exists()]
        if not file.is_file():
            missing.append(one.file)
        if missing or "\n" in one.before or one.before == one.after:
            wrong = f"there is no {', '.join(missing)}" if missing else "no such bug"
            found.append(f"stale breakage {one.name}: {wrong}.")
            continue
        try:
            ast.parse(broken(one, file.read_text()))
        except (BreakageError, SyntaxError) as error:
            found.append(str(error))
    return found


def _try(runner: Runner, trial: Trial, unsound: set[str], first: bool) -> None:
    """Makes the bug in a fresh copy, and runs its tests there."""
    started, one = time.monotonic(), trial.breakage
    with tempfile.TemporaryDirectory(prefix="breakage-") as name:
        folder = Path(name).resolve()
        runner.copy(folder)
        file = folder / one.file
        file.write_text(broken(one, file.read_text()))
        runner.check_import(folder, one.file)
        # Past the first failing test that proves nothing, all others are looked at.
        options = ["-x"] if first else [f"--deselect={test}" for test in unsound]
        found = runner.failures(folder, one.tests, *options)
    trial.seconds += time.monotonic() - started
    if found is None:
        trial.outcome = TIMEOUT
    elif not found:
        trial.outcome = MISSED
    trial.failing = found or ()


def _judge(
    runner: Runner, trials: Sequence[Trial], sound: set[str], unsound: set[str]
) -> None:
    """Runs the tests that failed without any bug, which they must pass."""
    new = {test for trial in trials for test in trial.failing} - sound - unsound
    if new:
        sound |= _passing(runner, sorted(new))
        unsound |= new - sound
    for trial in trials:
        good = tuple(test for test in trial.failing if test in sound)
        if good:
            trial.outcome, trial.failing = CAUGHT, good


def _passing(runner: Runner, tests: Sequence[str]) -> set[str]:
    """Returns those of some tests that pass without any bug."""
    passing = set()
    with tempfile.TemporaryDirectory(prefix="unbroken-") as name:
        folder = Path(name).resolve()
        runner.copy(folder)
        for start in range(0, len(tests), _TOGETHER):
            some = tests[start : start + _TOGETHER]
            try:
                failing = runner.failures(folder, some)
            except BreakageError as error:
                print(error, file=sys.stderr)
                failing = None
            # Where it is late or went wrong, nothing is proved.
            passing |= set() if failing is None else set(some) - set(failing)
    return passing


def run(runner: Runner, breakages: Sequence[Breakage], jobs: int) -> list[Trial]:
    """Tries breakages, some at the same time."""
    trials = [Trial(one) for one in breakages]
    version = runner.jax_version()
    for trial in trials:
        if trial.breakage.needs_jax > version:
            trial.outcome = SKIPPED
    sound: set[str] = set()
    unsound: set[str] = set()
    first, done = True, 0
    while pending := [trial for trial in trials if trial.outcome is None]:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            running = {
                pool.submit(_try, runner, trial, set(unsound), first): trial
                for trial in pending
            }
            for future in concurrent.futures.as_completed(running):
                trial = running[future]
                try:
                    future.result()
                except BreakageError as error:
                    trial.outcome = ERROR
                    print(error, file=sys.stderr)
                done += 1
                test = trial.failing[0] if trial.failing else trial.outcome
                print(
                    f"{done}: {trial.breakage.name}, {test}, {trial.seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        _judge(runner, pending, sound, unsound)
        first = False
    for test in sorted(unsound):
        print(f"fails without any bug: {test}", file=sys.stderr)
    return trials


def table(trials: Sequence[Trial]) -> list[str]:
    """Returns the lines of a table."""
    rows = [("name", "kind", "outcome", "seconds", "first failing test")]
    for trial in trials:
        one = trial.breakage
        test = trial.failing[0] if trial.failing else ""
        if trial.outcome == SKIPPED:
            test = f"needs JAX {'.'.join(map(str, one.needs_jax))}"
        cells = (one.name, one.kind, str(trial.outcome), f"{trial.seconds:.0f}", test)
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if too many are missed, 2 if one is stale."""
    parser = argparse.ArgumentParser(prog="python -m tests.breakages")
    parser.add_argument("--tier", choices=("default", "all"), default="default")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="names, or patterns"
    )
    parser.add_argument("--jobs", type=int, default=1, help="copies at the same time")
    parser.add_argument("--allow", type=int, default=0, help="that may be missed")
    parser.add_argument("--check", action="store_true", help="run no tests")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a run")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    options = parser.parse_args(arguments)
    chosen = [
        one
        for one in BREAKAGES
        if any(fnmatch.fnmatchcase(one.name, name) for name in options.only)
    ]
    for name in options.only:
        if not any(fnmatch.fnmatchcase(one.name, name) for one in chosen):
            parser.error(f"there is no breakage {name}")
    checkout = options.checkout.resolve()
    if wrong := problems(checkout, chosen):
        print("\n".join(wrong), file=sys.stderr)
        return 2
    if options.check:
        print(f"{len(chosen)} breakages are where they were")
        return 0
    runner = Runner(checkout, options.python, options.tier, options.timeout)
    try:
        trials = run(runner, chosen, max(1, options.jobs))
    except BreakageError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(line.rstrip() for line in table(trials)))
    tried = [trial for trial in trials if trial.outcome != SKIPPED]
    caught = sum(trial.outcome == CAUGHT for trial in tried)
    skipped = len(trials) - len(tried)
    print(
        f"caught {caught} of {len(tried)}" + (f", skipped {skipped}" if skipped else "")
    )
    return int(len(tried) - caught > options.allow)


if __name__ == "__main__":
    sys.exit(main())
