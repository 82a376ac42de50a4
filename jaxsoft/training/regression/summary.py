"""A regression's measurements on a terminal, or in a log."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsoft.training.console import clock, say
from jaxsoft.training.regression.measures import Measures
from jaxsoft.training.regression.prediction import PredictionReport
from jaxsoft.training.regression.report import RegressionReport
from jaxsoft.training.reporting import printable

__all__ = ["summarise_prediction", "summarise_regression"]

# A table shows the confusion matrix of at most so many classes, else the worst ones.
_SHOWN_CLASSES = 20
_WORST_CLASSES = 10


def summarise_regression(
    console: Console, report: RegressionReport, files: Sequence[Path]
) -> None:
    """Prints the measurements and the files of a finished run.

    Args:
      console: where to print.
      report: the measurements.
      files: the run's files.
    """
    say(console, "")
    confusion = _confusion(console.width, report)
    if confusion is None:
        _print_recall(console, report)
    else:
        console.print(confusion)
    say(console, "")
    _print_measures(console, {"train": report.train, "test": report.test})
    why = report.stopping_reason
    stopped = f"converged ({why})" if report.converged else f"not converged ({why})"
    unit = "epochs" if report.solver == "minibatch" else "iterations"
    lines = [
        f"solver: {report.solver}, {report.iterations:,} {unit} in "
        f"{clock(report.seconds)}, {stopped}",
        f"objective: {report.objective:.8g} nats a row",
    ]
    if report.temperature != 1:
        lines.append(f"temperature: {report.temperature:.4g}")
    for line in (*lines, "files: " + ", ".join(str(file) for file in files)):
        say(console, line)


def summarise_prediction(console: Console, report: PredictionReport) -> None:
    """Prints what was predicted, and how well.

    Args:
      console: where to print.
      report: the predictions' counts and measurements.
    """
    for text in report.notes:
        say(console, text)
    if report.measures is not None:
        _print_measures(console, {"rows": report.measures})
        if report.labelled < report.rows:
            without = report.rows - report.labelled
            say(console, f"{without:,} other rows have no label")
    else:
        table = _table("class", "predicted")
        order = sorted(range(len(report.classes)), key=lambda i: -report.counts[i])
        for index in order[:_SHOWN_CLASSES]:
            if report.counts[index]:
                name = Text(printable(str(report.classes[index])))
                table.add_row(name, f"{report.counts[index]:,}")
        console.print(table)
        say(console, f"{report.rows:,} rows, without labels")
    if report.out is None:
        say(console, "nothing was written; --out FILE writes the predictions")
    else:
        say(console, f"files: {report.out}")


def _print_measures(console: Console, measures: dict[str, Measures]) -> None:
    """Prints a line for each set of rows."""
    table = _table("", "rows", "accuracy", "log-loss", "ECE")
    for name, part in measures.items():
        table.add_row(
            name,
            f"{part.rows:,}",
            f"{part.accuracy:.4f}",
            f"{part.log_loss:.4f}",
            f"{part.calibration_error:.4f}",
        )
    console.print(table)


def _confusion(width: int, report: RegressionReport) -> Table | None:
    """Test rows by true and predicted class; None where that is too wide."""
    if report.confusion is None or len(report.classes) > _SHOWN_CLASSES:
        return None
    names = [printable(str(name)) for name in report.classes]
    rows = [
        [name, *(f"{count:,}" if count else "." for count in row), _share(recall)]
        for name, row, recall in zip(
            names, report.confusion, report.recall, strict=True
        )
    ]
    heading = ["true \\ predicted", *names, "recall"]
    columns = zip(heading, *rows, strict=True)
    if sum(3 + max(map(len, column)) for column in columns) >= width:
        return None
    table = _table(*heading)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print_recall(console: Console, report: RegressionReport) -> None:
    """Prints the classes that are recognised least."""
    table = _table("class", "recall")
    known = [
        (recall, name)
        for recall, name in zip(report.recall, report.classes, strict=True)
        if recall is not None
    ]
    known.sort(key=lambda pair: pair[0])
    for recall, name in known[:_WORST_CLASSES]:
        table.add_row(Text(printable(str(name))), _share(recall))
    console.print(table)
    middle = known[len(known) // 2][0]
    shown = min(_WORST_CLASSES, len(known))
    say(
        console,
        f"the {shown} classes of {len(report.classes):,} that are recognised least; "
        f"half of all have a recall of {middle:.4f} or more",
    )


def _table(first: str, *others: str) -> Table:
    """Starts a table whose first column is words, the others numbers; no markup."""
    table = Table(box=box.MARKDOWN)
    table.add_column(Text(first), no_wrap=True)
    for name in others:
        table.add_column(Text(name), justify="right")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
