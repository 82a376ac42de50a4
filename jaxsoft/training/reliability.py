"""A picture of calibration: accuracy against confidence, bin by bin."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from jaxsoft.logits.calibration import CalibrationBins, calibration_bins
from jaxsoft.training.errors import MissingExtraError
from jaxsoft.training.run_directory import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_bins", "reliability_diagram"]


def reliability_diagram(
    probabilities: ArrayLike,
    labels: ArrayLike,
    path: str | Path,
    num_bins: int = 15,
    *,
    weights: ArrayLike | None = None,
    title: str | None = None,
) -> Path:
    """Draws the accuracy of each bin of confidence, and writes it as a PNG.

    Bars are accuracies, marks mean confidences, and what lies between the two is the
    gap; below is the share of rows in each bin. The bins are those of
    `jaxsoft.expected_calibration_error`, whose value is in the legend: the gaps'
    mean, weighted by these shares.

    Args:
      probabilities: [..., V], any floating dtype: what `softmax` gives, not logits.
      labels: [...] integers in [0, V).
      path: the file to write; what is there is replaced, whole or not at all. Its
        folder must exist.
      num_bins: M, at least 1.
      weights: [...] booleans or reals >= 0, one weight a row; None weighs all alike.
      title: a line above the picture, or None.

    Returns:
      The path of the file.

    Raises:
      MissingExtraError: if matplotlib, of the extra `train`, is not installed.
      TypeError: if a dtype is wrong, or `num_bins` is no int.
      ValueError: if a shape does not fit, `num_bins` is below 1, or a label is outside
        [0, V), a probability NaN or a weight negative.
      OSError: if the file cannot be written.

    Notes:
      Not for use under `jax.jit`: it reads values. Draws no window.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from jaxsoft.training import reliability_diagram
      >>> probabilities = jnp.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "reliability.png")
      ...     path = reliability_diagram(probabilities, jnp.array([0, 1, 1]), path)
      ...     print(path.name, path.read_bytes()[1:4])
      reliability.png b'PNG'

    References:
      Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks,
      arXiv:1706.04599.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            "a reliability diagram needs matplotlib, which the extra `train` installs: "
            'pip install "jaxsoft[train]"'
        )
    path = Path(path)
    draw_bins(
        calibration_bins(probabilities, labels, num_bins, weights=weights), path, title
    )
    return path


def draw_bins(bins: CalibrationBins, path: Path, title: str | None) -> None:
    """Draws bins, and writes the picture; see `reliability_diagram`.

    Args:
      bins: sums of the rows in each.
      path: the file to write.
      title: a line above the picture, or None.
    """
    bins = CalibrationBins._make(np.asarray(values, np.float64) for values in bins)
    if not all(np.isfinite(values).all() for values in bins):
        raise ValueError(
            "`probabilities`, `labels` and `weights` must be finite, within [0, V) and "
            "not negative, got a bin that is NaN."
        )
    save_figure(_figure(bins, title), path)


def _figure(bins: CalibrationBins, title: str | None) -> Figure:
    """Returns the figure of bins' sums."""
    from matplotlib.figure import Figure

    weight, confidence, correct, gap = bins
    edges = np.linspace(0, 1, len(weight) + 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    total = weight.sum() or 1.0
    used = weight > 0
    divisor = np.where(used, weight, 1)
    accuracy, mean = correct / divisor, confidence / divisor
    error = np.abs(gap).sum() / total
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    top, bottom = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)}
    )
    top.plot([0, 1], [0, 1], color="0.5", ls="--", lw=1, label="calibrated")
    top.bar(centres[used], accuracy[used], width, ec="white", label="accuracy")
    top.bar(
        centres[used],
        (mean - accuracy)[used],
        width,
        bottom=accuracy[used],
        alpha=0.3,
        color="tab:red",
        ec="tab:red",
        label=f"gap (ECE {error:.4f})",
    )
    top.plot(mean[used], mean[used], "k.", label="mean confidence")
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left")
    bottom.bar(centres, weight / total, width, color="0.6", ec="white")
    bottom.set(xlabel="confidence", ylabel="share of rows")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    if title is not None:
        figure.suptitle(title)
    return figure
