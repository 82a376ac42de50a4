"""Records how long each file of tests takes, so that long ones are dealt out first.

    pytest --junitxml=REPORT && python -m tests.durations REPORT…

Reports of several tiers add to one record, tests/durations.json.
"""

import argparse
import collections
import json
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "seconds_of_files"]

_TESTS = Path(__file__).parent


def seconds_of_files(report: Path) -> dict[str, float]:
    """Returns the seconds of each file of tests, by its path from tests/.

    Args:
      report: what `pytest --junitxml` wrote.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        parts = case.get("classname", "").removeprefix("tests.").split(".")
        path = Path(*parts).with_suffix(".py")
        if (_TESTS / path).is_file():
            seconds[path.as_posix()] += float(case.get("time", 0))
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.durations")
    parser.add_argument("reports", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    record = _TESTS / "durations.json"
    seconds = json.loads(record.read_text()) if record.exists() else {}
    recorded: dict[str, float] = collections.defaultdict(float)
    for report in options.reports:
        for path, time in seconds_of_files(report).items():
            recorded[path] += time
    seconds |= recorded
    seconds = {
        path: round(time, 1)
        for path, time in sorted(seconds.items())
        if (_TESTS / path).is_file()
    }
    record.write_text(json.dumps(seconds, indent=0) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
