"""The files of a training run: configuration, metrics, loss curve, checkpoints.

One folder holds one run:

- `config.json`: what the run is, written before its first step and never changed;
- `metrics.jsonl`: one JSON object a line, each with an `event` ("train", "validation"
  or, last, "final") and its `step`;
- `loss.png`: the curve of both losses beside the unigram entropy;
- `tokenizer.json`: the tokenizer, so that the run stands without the token cache;
- `counts.npy`: how often each token comes in training, which heads are made from;
- `checkpoints/`: Orbax checkpoints;
- `model.safetensors`: of a finished run, the parameters by name;
- `model-card.md`: what they are: data, options, and what they reached;
- `reliability.png`: once it was evaluated, how well it knows the next token.

A comparison of heads has `comparison.json` and `comparison.png` instead.
"""

import contextlib
import io
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np

from jaxsoft.training.errors import RunDirectoryError
from jaxsoft.training.files import open_regular
from jaxsoft.training.reporting import Record
from jaxsoft.training.schemas import MOST_BYTES, convert, decode
from jaxsoft.training.unfinished import unfinished_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "WALL_CLOCK_FIELDS",
    "RunDirectory",
    "check_writable",
    "replacing",
    "save_figure",
    "write_atomically",
]

# Fields of a metrics line that differ between equal runs.
WALL_CLOCK_FIELDS = frozenset({"seconds", "tokens_per_second", "compile_seconds"})


class _Validation(TypedDict):
    event: Literal["validation"]
    step: int
    loss: float


class _Train(TypedDict):
    event: Literal["train"]
    step: int
    loss: float
    gradient_norm: float
    seconds: float
    parameter_norm: NotRequired[float]
    learning_rate: NotRequired[float]
    tokens: NotRequired[int]
    tokens_per_second: NotRequired[float]
    rows_per_second: NotRequired[float]


class _Final(TypedDict):
    """Of the "final" line what any run has; the rest is of its report."""

    event: Literal["final"]
    step: int


class RunDirectory:
    """The files of one run.

    Attributes:
      own_names: names of all files and folders that a run may have.
    """

    own_names: tuple[str, ...] = (
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "tokenizer.json",
        "counts.npy",
        "checkpoints",
        "model.safetensors",
        "model-card.md",
        "reliability.png",
        "comparison.json",
        "comparison.png",
    )

    def __init__(self, path: str | os.PathLike[str]):
        """Names the folder; touches nothing.

        Args:
          path: the folder, which may not exist yet.
        """
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curve = self.path / "loss.png"
        self.tokenizer = self.path / "tokenizer.json"
        self.counts = self.path / "counts.npy"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "model.safetensors"
        self.card = self.path / "model-card.md"
        self.reliability = self.path / "reliability.png"
        self.comparison = self.path / "comparison.json"
        self.comparison_curve = self.path / "comparison.png"

    def check_vacant(self) -> None:
        """Raises `RunDirectoryError` unless a new run can be written here."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise RunDirectoryError(f"`out` {self.path} is a file, not a folder.")
            for name in self.own_names:
                if (self.path / name).exists():
                    raise RunDirectoryError(
                        f"`out` {self.path} already holds a run ({name}); continue it "
                        "with `resume` or name another folder."
                    )
            check_writable(self.path)
        except OSError as error:
            raise RunDirectoryError(
                f"`out` {self.path} cannot be written ({error.strerror})."
            ) from error

    def check_resumable(self) -> None:
        """Raises `RunDirectoryError` unless a run was started here."""
        if not self.config.is_file():
            raise RunDirectoryError(
                f"`out` {self.path} holds no run to resume (no config.json)."
            )

    def check_finished(self) -> None:
        """Raises `RunDirectoryError` unless a run was finished here."""
        if not self.config.is_file():
            raise RunDirectoryError(f"{self.path} holds no run (no config.json).")
        if self.final_record() is None:
            raise RunDirectoryError(
                f"the run in {self.path} is not finished; `jaxsoft train --resume` "
                "goes on with it."
            )

    def start(self, description: Mapping[str, object]) -> None:
        """Makes the folder and writes what the run is, first of all its files.

        Args:
          description: JSON-serialisable contents of `config.json`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(description, indent=2) + "\n"
            write_atomically(self.config, text.encode())
            self.metrics.touch()
        except OSError as error:
            raise RunDirectoryError(
                f"`out` {self.path} cannot be written ({error})."
            ) from error

    def keep_tokens(self, tokenizer: Path, counts: np.ndarray) -> None:
        """Copies the tokenizer's file and writes the counts, unless they are there.

        Args:
          tokenizer: the file.
          counts: `[V]`, how often each token comes in training.
        """
        array = io.BytesIO()
        np.save(array, counts)
        try:
            for path, data in (
                (self.tokenizer, tokenizer.read_bytes()),
                (self.counts, array.getvalue()),
            ):
                if not path.exists():
                    write_atomically(path, data)
        except OSError as error:
            raise RunDirectoryError(
                f"`out` {self.path} cannot be written ({error})."
            ) from error

    def records(self) -> Iterator[Record]:
        """Yields the complete lines of the metrics file.

        Raises:
          RunDirectoryError: a line is none of a run's; the last line of a killed
            process may be cut short.
        """
        if not self.metrics.exists():
            return
        with open_regular(self.metrics, RunDirectoryError) as file:
            for number in itertools.count(1):
                line = file.readline(MOST_BYTES)
                if not line:
                    return
                try:
                    yield _record(line, f"{self.metrics}, line {number},")
                except RunDirectoryError:
                    if line.endswith(b"\n") or len(line) == MOST_BYTES:
                        raise
                    return

    def final_record(self) -> Record | None:
        """The "final" metrics line of a finished run, or None."""
        return next((line for line in self.records() if line["event"] == "final"), None)

    def append(self, record: Mapping[str, object]) -> None:
        """Adds a metrics line and hands it to the operating system at once."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drops the metrics lines after a step, and the "final" one.

        Args:
          step: the checkpoint's step; 0 drops all.
        """
        kept = [
            json.dumps(record) + "\n"
            for record in self.records()
            if record["step"] <= step and record["event"] != "final"
        ]
        write_atomically(self.metrics, "".join(kept).encode())

    def plot(self, unigram: float, final: Record) -> None:
        """Draws the loss curve from the metrics file.

        Args:
          unigram: height in nats of the reference line, the unigram entropy.
          final: the "final" metrics line, not yet in the file.
        """
        curves: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}
        for record in self.records():
            if record["event"] in curves:
                curves[record["event"]].append((record["step"], record["loss"]))
        curves["validation"].append((final["step"], final["loss"]))
        figure, axes = _figure("step", unigram)
        if curves["train"]:
            axes.plot(*zip(*curves["train"], strict=True), lw=0.8, label="training")
        axes.plot(
            *zip(*curves["validation"], strict=True), marker="o", label="validation"
        )
        _draw(figure, axes, self.curve)

    def write_comparison(self, text: str) -> None:
        """Makes the folder and writes the measurements of all heads.

        Args:
          text: JSON.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.comparison, text.encode())
        except OSError as error:
            raise RunDirectoryError(
                f"`out` {self.path} cannot be written ({error})."
            ) from error

    def plot_comparison(
        self, curves: Mapping[str, Sequence[tuple[float, float]]], unigram: float
    ) -> None:
        """Draws validation losses over training time.

        Args:
          curves: of each head, seconds and losses.
          unigram: height in nats of the reference line, the unigram entropy.
        """
        figure, axes = _figure("seconds of training", unigram)
        for head, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), marker="o", label=head)
        _draw(figure, axes, self.comparison_curve)

    def files(self) -> list[Path]:
        """The run's files and folders that exist."""
        paths = [self.path / name for name in self.own_names]
        return [path for path in paths if path.exists()]


def _record(line: bytes, where: str) -> Record:
    """Reads a line of metrics."""
    record = decode(line, dict[str, Any], where, RunDirectoryError, finite=False)
    match record.get("event"):
        case "final":
            known = {name: record[name] for name in record.keys() & {"event", "step"}}
            return record | convert(known, _Final, where, RunDirectoryError)
        case "validation":
            return convert(record, _Validation, where, RunDirectoryError)
    return convert(record, _Train, where, RunDirectoryError)


def _figure(horizontal: str, unigram: float) -> tuple["Figure", "Axes"]:
    """Starts a figure of losses with the unigram entropy as its yardstick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(unigram, color="0.5", ls="--", lw=1, label="unigram entropy")
    axes.set(xlabel=horizontal, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(figure: "Figure", axes: "Axes", path: Path) -> None:
    """Writes a figure, whole or not at all."""
    axes.legend()
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    with warnings.catch_warnings(), replacing(path, "xb") as file:
        # Where matplotlib's font lacks a letter of a class's name it draws a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, dpi=150, format="png")


def check_writable(folder: Path) -> None:
    """Makes a file in a folder, and the folder if need be, and removes them again.

    Args:
      folder: the folder.

    Raises:
      OSError: that cannot be done.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished_file(folder / "any"):
            pass
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file so that it is never seen half-written."""
    with replacing(path, "xb") as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, mode: str, **options: Any) -> Iterator[IO[Any]]:
    """Opens a new file, which takes another's place when it is whole, else vanishes.

    Args:
      path: the file to replace, or to make.
      mode: "x" or "xb".
      options: of `open`.
    """
    with unfinished_file(path) as partial:
        # It is there already, and locked.
        with partial.open(mode.replace("x", "w"), **options) as file:
            yield file
        partial.replace(path)
