"""The files of a regression's run.

One folder holds one run:

- `config.json`: what the run is, written before it starts and never changed;
- `metrics.jsonl`: a JSON object a line, the objective after each segment of iterations;
- `checkpoints/`: Orbax checkpoints;
- `model.safetensors`: the fitted `SoftmaxRegression`;
- `confusion.png`, `reliability.png`: of the test rows;
- `weights.png`: the coefficients of the classes, as images where rows are images;
- `convergence.png`: objective and gradient against iterations;
- `metrics.json`: the report, written before the pictures, so that none can keep a run
  from its end.
"""

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsoft.training.errors import RunDirectoryError
from jaxsoft.training.regression.report import RegressionReport
from jaxsoft.training.reporting import Record
from jaxsoft.training.run_directory import (
    RunDirectory,
    save_figure,
    write_atomically,
)
from jaxsoft.training.schemas import decode_file

if TYPE_CHECKING:
    from jaxsoft.training.regression.inputs import Csr

__all__ = ["RegressionDirectory"]

# The most classes that a picture shows.
_CONFUSION_CLASSES = 1000
_NAMED_CLASSES = 30
_IMAGES = 100


class RegressionDirectory(RunDirectory):
    """The files of one run."""

    own_names = (
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "metrics.json",
        "confusion.png",
        "reliability.png",
        "weights.png",
        "convergence.png",
    )

    def __init__(self, path: str | os.PathLike[str]):
        """Names the folder; touches nothing.

        Args:
          path: the folder, which may not exist yet.
        """
        super().__init__(path)
        self.model = self.path / "model.safetensors"
        self.report = self.path / "metrics.json"

    def write_report(self, record: Record) -> None:
        """Writes what the run measured; a run that has it is finished."""
        write_atomically(self.report, (json.dumps(record, indent=2) + "\n").encode())

    def read_report(self) -> RegressionReport | None:
        """Reads what the run measured; None while it is not finished."""
        if not self.report.exists():
            return None
        return decode_file(
            self.report,
            RegressionReport,
            RunDirectoryError,
            what="the report",
            finite=False,
        )

    def plot_confusion(self, counts: "Csr", classes: np.ndarray) -> None:
        """Draws a confusion matrix, unless the classes are too many.

        Args:
          counts: [K, K] sparse, true classes by predicted ones.
          classes: [K].
        """
        if len(classes) > _CONFUSION_CLASSES:
            return
        figure, axes = _figure(6, 5.4)
        dense = counts.toarray()
        shares = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, label="share of the class's rows")
        axes.set(xlabel="predicted", ylabel="true")
        if len(classes) <= _NAMED_CLASSES:
            names = [_plain(name) for name in classes.tolist()]
            slant = 90 if max(map(len, names)) > 3 else 0
            axes.set_xticks(range(len(names)), names, rotation=slant)
            axes.set_yticks(range(len(names)), names)
            for row, column in zip(*np.nonzero(dense), strict=True):
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = f"{dense[row, column]:,}"
                axes.text(column, row, text, ha="center", va="center", c=colour, size=7)
        save_figure(figure, self.path / "confusion.png")

    def plot_weights(
        self, coef: np.ndarray, classes: np.ndarray, shape: tuple[int, ...] | None
    ) -> None:
        """Draws coefficients: an image a class, or one of classes by features.

        Args:
          coef: [K, d], or [1, d] of the second of two classes.
          classes: [K].
          shape: of an image, or None.
        """
        names = classes.tolist()[-len(coef) :][:_IMAGES]
        shown = np.asarray(coef, np.float64)[:_IMAGES]
        most = np.abs(shown).max() or 1.0
        colours = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
        if shape is None:
            figure, axes = _figure(7, 4.2)
            image = axes.imshow(shown, aspect="auto", **colours)
            axes.set(xlabel="feature", ylabel="class")
            if len(names) <= _NAMED_CLASSES:
                axes.set_yticks(range(len(names)), [_plain(name) for name in names])
            figure.colorbar(image, label="coefficient")
        else:
            columns = min(len(names), max(5, int(len(names) ** 0.5)))
            rows = -(-len(names) // columns)
            figure, panels = _figure(1.3 * columns + 1, 1.5 * rows, (rows, columns))
            for axes in panels.flat:
                axes.axis("off")
            for name, row, axes in zip(names, shown, panels.flat, strict=False):
                picture = row.reshape(shape)
                picture = picture if picture.ndim == 2 else picture.mean(axis=2)
                image = axes.imshow(picture, **colours)
                axes.set_title(_plain(name), size=8)
            figure.colorbar(image, ax=panels, label="coefficient")
        save_figure(figure, self.path / "weights.png")

    def plot_convergence(self) -> None:
        """Draws the metrics file; draws nothing where it is empty."""
        lines = [record for record in self.records() if record["event"] == "train"]
        if not lines:
            return
        figure, axes = _figure(7, 4.2)
        steps = [record["step"] for record in lines]
        losses = np.array([record["loss"] for record in lines])
        axes.plot(steps, losses, marker=".", label="objective")
        axes.set(xlabel="iteration", ylabel="objective (nats per row)")
        if (losses > 0).all():
            axes.set_yscale("log")
        norms = np.array([record["gradient_norm"] for record in lines], np.float64)
        handles = axes.get_lines()
        if (np.isfinite(norms) & (norms > 0)).any():
            right = axes.twinx()
            right.plot(steps, norms, color="tab:orange", label="gradient")
            right.set(ylabel="largest entry of the gradient", yscale="log")
            handles = [*handles, *right.get_lines()]
        axes.legend(handles=handles)
        axes.grid(alpha=0.3)
        save_figure(figure, self.path / "convergence.png")


def _plain(name: object) -> str:
    """A name as matplotlib shows it, its dollar signs no formula's."""
    return str(name).replace("$", r"\$")


def _figure(
    width: float, height: float, panels: tuple[int, int] | None = None
) -> tuple[Any, Any]:
    """Starts a figure of one panel, or of rows and columns of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if panels is None:
        return figure, figure.add_subplot()
    return figure, figure.subplots(*panels, squeeze=False)
