"""The subcommands `jaxsoft regress` and `jaxsoft predict`."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jaxsoft.cli.process import Signals
from jaxsoft.cli.text import asking, farewell, flag, terminal
from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.regression.settings import RegressConfig
from jaxsoft.training.running import read_config, require_train_extra

__all__ = ["add_commands"]

_DATA_HELP = (
    "table: text such as .csv or .tsv, .parquet, .feather, .ndjson, .npz or libsvm; "
    "all but .npz also as .gz, .bz2, .xz or .zst"
)
_READING_HELP = {
    "id": "column with the rows' names: no feature, carried to predictions",
    "sep": "the character between cells of a text (default: judged by its rows)",
    "encoding": "of a text, such as cp1252 (default: judged by its bytes)",
    "header": "the first line of a text has names (default: judged by the rows)",
    "memory": "the most that the table may take, such as 4G (default: half of what is "
    "free)",
}
_HELP = {
    "data": f"{_DATA_HELP} (default: scikit-learn's digits)",
    "label": "column with the labels, by name or by index from 0 (default: the last)",
    "drop": "column to leave out; may be repeated",
    "weights": "column with the rows' weights in the fit",
    **_READING_HELP,
    "out": "folder of the run",
    "test_fraction": "share of the rows to test on, of each class alike",
    "C": "inverse strength of the penalty, as in scikit-learn",
    "solver": "auto, lbfgs, newton, fista or minibatch",
    "head": "full, hierarchical or adaptive",
    "tol": "tolerance of the stopping rule",
    "max_iter": "the largest number of iterations, or of epochs of minibatches "
    "(default: the solver's own)",
    "standardize": "bring columns to mean 0 and standard deviation 1 for the fit; the "
    "model saved takes the features as they are (default: so for dense columns; images "
    "are divided by their largest value, sparse features and other heads' left alone)",
    "calibrate": "fit a temperature on held-out training rows",
    "label_smoothing": "share of each label that is spread over all classes",
    "dtype": "float32 or float64, of the fit",
    "seed": "seed of the split and of the solver",
    "checkpoint_every": "seconds between checkpoints",
}
_TYPES = {int: int, float: float, int | None: int}
# Names that errors spell as --flags; MODEL and DATA are no options.
_PREDICT_FIELDS = ("label", "out", "probabilities", *_READING_HELP)


def add_commands(commands: Any) -> None:
    """Adds the subcommands.

    Args:
      commands: what `add_subparsers` returned.
    """
    regress = commands.add_parser(
        "regress",
        help="fit a softmax regression to a table",
        description="Fits a softmax regression to a table, tests it on rows held out, "
        "and writes the model, its measurements and pictures.",
    )
    # `data` is an argument, and a key of NPZ files.
    names = [field.name for field in dataclasses.fields(RegressConfig)]
    fields = [*(name for name in names if name != "data"), "resume"]
    regress.set_defaults(run=_regress, farewell=_farewell, fields=fields)
    for field in dataclasses.fields(RegressConfig):
        _add_option(regress, field)
    regress.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out; options not given are the run's own",
    )
    predict = commands.add_parser(
        "predict",
        help="predict the rows of a table",
        description="Predicts the rows of a table by a model of `jaxsoft regress`, and "
        "measures how well where the table has labels.",
    )
    predict.set_defaults(
        run=_predict,
        farewell=_farewell_of_predict,
        fields=_PREDICT_FIELDS,
    )
    predict.add_argument(
        "model", metavar="MODEL", help="a run's model.safetensors, or its folder"
    )
    predict.add_argument("data", metavar="DATA", help=_DATA_HELP)
    predict.add_argument(
        "--label",
        metavar="LABEL",
        help="column with the labels, if there is one (default: the one that the model "
        "was trained with)",
    )
    for name, text in _READING_HELP.items():
        if name == "header":
            boolean = argparse.BooleanOptionalAction
            predict.add_argument(flag(name), action=boolean, help=text)
        else:
            predict.add_argument(flag(name), metavar=name.upper(), help=text)
    predict.add_argument(
        "--out", metavar="FILE", help="CSV file of predicted classes to write"
    )
    predict.add_argument(
        "--probabilities",
        action="store_true",
        help="write the probability of each class, too",
    )


def _add_option(parser: argparse.ArgumentParser, field: Any) -> None:
    """Adds the option of a configuration field."""
    text = _HELP[field.name]
    if field.name == "data":
        parser.add_argument(
            "data", nargs="?", default=argparse.SUPPRESS, metavar="DATA", help=text
        )
        return
    if field.name == "drop":
        parser.add_argument(
            "--drop",
            action="append",
            default=argparse.SUPPRESS,
            metavar="COLUMN",
            help=text,
        )
        return
    if field.default is not None and field.default is not False:
        text += f" (default: {field.default})"
    if field.name in ("standardize", "calibrate", "header"):
        parser.add_argument(
            flag(field.name),
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=text,
        )
        return
    parser.add_argument(
        flag(field.name),
        type=_TYPES.get(field.type, str),
        default=argparse.SUPPRESS,
        metavar=field.name.rpartition("_")[2].upper(),
        help=text,
    )


def _regress(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft regress`."""
    fields = [field.name for field in dataclasses.fields(RegressConfig)]
    given = {name: getattr(parsed, name) for name in fields if hasattr(parsed, name)}
    if "drop" in given:
        given["drop"] = tuple(given["drop"])
    out = given.setdefault("out", RegressConfig.out)
    with asking():
        require_train_extra()
        stored = read_config(out, RegressConfig) if parsed.resume else RegressConfig()
        config = dataclasses.replace(stored, **given)
    with Signals.request() as stop:
        return _regress_until(stop, config, resume=parsed.resume)


def _farewell(parsed: argparse.Namespace) -> Callable[[TrainingInterrupted], str]:
    """Returns what to say of an interrupted run."""
    out = getattr(parsed, "out", RegressConfig.out)
    words = ["jaxsoft", "regress", "--out", out, "--resume"]
    return lambda interruption: farewell(interruption, words, out, "iteration")


def _farewell_of_predict(
    parsed: argparse.Namespace,
) -> Callable[[TrainingInterrupted], str]:
    """Returns what to say of interrupted predictions; `out` appears when complete."""

    def say(interruption: TrainingInterrupted) -> str:
        written = parsed.out is not None and os.path.exists(parsed.out)
        return f"{interruption}" + ("" if written else "; nothing was written")

    return say


def _regress_until(stop: StopRequest, config: RegressConfig, *, resume: bool) -> int:
    """Fits, prints the summary, and returns the exit code."""
    from jaxsoft.training.console import ConsoleListener
    from jaxsoft.training.regression.job import train_regression
    from jaxsoft.training.regression.run_files import RegressionDirectory
    from jaxsoft.training.regression.summary import summarise_regression

    console = terminal()
    listener = ConsoleListener.for_fit(console, remaining=False)
    report = train_regression(config, resume=resume, listener=listener, stop=stop)
    summarise_regression(console, report, RegressionDirectory(config.out).files())
    return 0


def _predict(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft predict`."""
    require_train_extra()
    from jaxsoft.training.regression.prediction import predict_table
    from jaxsoft.training.regression.summary import summarise_prediction

    report = predict_table(
        parsed.model,
        parsed.data,
        label=parsed.label,
        out=parsed.out,
        probabilities=parsed.probabilities,
        **{name: getattr(parsed, name) for name in _READING_HELP},
    )
    summarise_prediction(terminal(), report)
    return 0
