"""Draws results that are points of curves: time and memory against a size."""

import pathlib
from typing import Any

import numpy as np

from benchmarks.trees_findings import LOGARITHMIC

# Sizes of the figure, in inches, for each panel.
_WIDTH, _HEIGHT = 5.4, 3.7
_MARKERS = "osD^v<>"


def draw(document: dict[str, Any], path: pathlib.Path, title: str) -> None:
    """Writes an image with a row a workload, of results that were swept.

    Args:
      document: as `Session.document` makes it, or as read from its JSON file.
      path: of the image; its suffix names the format.
      title: of the figure.
    """
    from matplotlib.figure import Figure

    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in document["results"]:
        if result.get("swept") and (result["seconds"] or result["figures"]):
            curves = rows.setdefault(result["workload"], {})
            curves.setdefault(result["name"], []).append(result)
    size = (2 * _WIDTH, _HEIGHT * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (times, others), (workload, curves) in zip(grid, rows.items(), strict=True):
        timed = {n: found for n, found in curves.items() if found[0]["seconds"]}
        counted = {n: found for n, found in curves.items() if found[0]["figures"]}
        _draw_times(times, timed)
        shape = timed[next(iter(timed))][0]["shape"] if timed else {}
        sizes = ", ".join(f"{k} = {v}" for k, v in shape.items() if k in ("N", "H"))
        times.set_title(f"{workload}: {sizes}", fontsize=10, loc="left")
        if counted:
            _draw_figures(others, counted)
        else:
            _draw_temporaries(others, timed)
        for axes in (times, others):
            _finish(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=150)


def _sizes(results: list[dict[str, Any]]) -> np.ndarray:
    return np.array([result["shape"][result["swept"]] for result in results])


def _draw_times(axes: Any, curves: dict[str, list[dict[str, Any]]]) -> None:
    for place, (name, results) in enumerate(curves.items()):
        sizes = _sizes(results)
        each = [result["seconds"] for result in results]
        median, low, high = (
            1e3 * np.array([seconds[key] for seconds in each])
            for key in ("median", "low", "high")
        )
        colour, marker = f"C{place}", _MARKERS[place % len(_MARKERS)]
        label, fitted = name, name in LOGARITHMIC and len(sizes) > 1
        if fitted:
            levels = np.log2(sizes)
            # Deviations relative to the time: a logarithmic scale shows these.
            slope, start = np.polyfit(levels, median, 1, w=1 / median)
            fine = np.linspace(levels[0], levels[-1])
            line = start + slope * fine
            axes.plot(2**fine, line, color=colour, linestyle="--", linewidth=1)
            sign = "+" if slope >= 0 else "-"
            label += f": {start:.2g} {sign} {abs(slope):.2g} log2 V"
        axes.errorbar(
            sizes,
            median,
            yerr=[median - low, high - median],
            color=colour,
            marker=marker,
            markersize=5,
            capsize=3,
            linestyle="none" if fitted else "-",
            linewidth=1.2,
            label=label,
        )
    axes.set_ylabel("ms: median and quartiles")


def _draw_temporaries(axes: Any, curves: dict[str, list[dict[str, Any]]]) -> None:
    for place, (name, results) in enumerate(curves.items()):
        known = [r for r in results if r["temporary_bytes"] is not None]
        mebibytes = [max(r["temporary_bytes"], 1) / 2**20 for r in known]
        axes.plot(
            _sizes(known),
            mebibytes,
            color=f"C{place}",
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            linewidth=1.2,
            label=name,
        )
    axes.set_ylabel("temporaries, MiB")


def _draw_figures(axes: Any, curves: dict[str, list[dict[str, Any]]]) -> None:
    for name, results in curves.items():
        sizes = _sizes(results)
        figures = [result["figures"] for result in results]
        inner = [each["inner nodes"] for each in figures]
        visits, low, high = (
            np.array([each[key] for each in figures])
            for key in ("visits", "low", "high")
        )
        axes.plot(sizes, inner, color="0.5", linewidth=1, label="all inner nodes")
        axes.plot(sizes, visits, color="C2", marker="D", markersize=5, label=name)
        axes.fill_between(
            sizes, low, high, color="C2", alpha=0.25, label="quartiles of the tokens"
        )
    axes.set_ylabel("inner nodes visited for a token: mean")


def _finish(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("V, classes")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="best")
