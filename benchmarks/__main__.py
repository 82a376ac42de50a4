"""`python -m benchmarks [SUITE…] [--quick] [--json FILE] …`."""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
from typing import Any

from benchmarks import (
    device,
    discrete,
    everyday,
    heads,
    linear,
    many_classes,
    plot,
    programs,
    regression,
    report,
    schedule,
    softmax,
    trees,
    watch,
    workloads,
    workspace,
)
from benchmarks.session import SCHEMA, Result, Session

SUITES = {
    suite.SUITE: suite.run
    for suite in (
        linear,
        softmax,
        discrete,
        heads,
        trees,
        regression,
        many_classes,
        workspace,
        device,
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Runs suites, or shows what an earlier run saved.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code: 1 if a function of ours was wrong or raised, otherwise 0.
    """
    given = sys.argv[1:] if arguments is None else arguments
    commands = {
        "everyday": everyday.main,
        "programs": programs.main,
        "schedule": schedule.main,
    }
    if given[:1] and given[0] in commands:
        return commands[given[0]](given[1:])
    parser = _parser()
    options = parser.parse_args(given)
    for suite in options.suites:
        if suite not in SUITES:
            parser.error(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'jaxsoft[bench]'")
    if options.minutes is None and options.suites == [device.SUITE]:
        options.minutes = device.DEFAULT_MINUTES
    if _is_watched(options) and watch.CHILD not in os.environ:
        command = [sys.executable, "-m", "benchmarks", *given]
        return watch.supervise(command, options.minutes or 0.0, options.json)
    if options.load:
        document, failed = _load(parser, options.load), False
    else:
        document, failed = _measure(parser, options)
        if not document["results"]:
            parser.error("none of the suites has a workload of that name")
    if options.markdown:
        report.print_markdown(document)
    else:
        report.print_terminal(document)
    if options.plot:
        try:
            plot.draw(document, options.plot)
        except ValueError as error:
            parser.error(str(error))
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    every = (
        *workloads.LINEAR,
        *workloads.LAYERS,
        *workloads.HEADS,
        *workloads.CONTRASTIVE,
        *workloads.SOFTMAX,
        *workloads.SAMPLING,
        *workloads.RELAXATION,
        *workloads.TREES,
        *workloads.REGRESSION,
        *workloads.MANY_CLASSES,
    )
    names = list(dict.fromkeys(workload.name for workload in every))
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"{', '.join(SUITES)}; linear and softmax if none is named",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: does it work at all?"
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        choices=names,
        metavar="NAME",
        help=f"run only these, whatever the platform: {', '.join(names)}",
    )
    parser.add_argument("--rounds", type=_positive(int), help="samples of each")
    parser.add_argument(
        "--minutes",
        type=_positive(float),
        help="skip, and name, what does not fit; "
        f"{device.DEFAULT_MINUTES:g} for the device suite, else no limit",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        help="write here; the device suite goes on where the file ends",
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw here")
    parser.add_argument(
        "--from",
        dest="load",
        type=pathlib.Path,
        metavar="FILE",
        help="measure nothing: show, or draw, what an earlier --json wrote",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


def _is_watched(options: argparse.Namespace) -> bool:
    """Whether a run goes on where one that was ended stopped, or hung."""
    return options.suites == [device.SUITE] and options.json and not options.load


def _measure(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    session = Session(
        quick=options.quick,
        rounds=options.rounds,
        minutes=options.minutes,
        workloads=tuple(options.workload),
        path=options.json,
        show=_show,
    )
    if _is_watched(options):
        if options.json.exists():
            try:
                session.resume(_load(parser, options.json))
            except ValueError as error:
                parser.error(f"{options.json}: {error}")
        session.guard(device.PATIENCE)
    for suite in options.suites or [linear.SUITE, softmax.SUITE]:
        SUITES[suite](session)
    return session.finish(), session.failed


def _load(parser: argparse.ArgumentParser, path: pathlib.Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        parser.error(f"{path}: not the results of this version of the benchmarks")
    return document


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    return parse


def _show(result: Result) -> None:
    """Prints a line as each result comes, apart from the tables."""
    figures = result.status
    if result.timing:
        figures = f"{result.timing.median * 1e3:.4g} ms"
    elif result.reason:
        figures += f": {result.reason}"
    where = f"{result.suite} · {result.workload} · {result.case} · {result.name}"
    print(f"{where}: {figures}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
