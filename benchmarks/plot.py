"""Draws a document's figures: time and temporaries against the baseline's."""

import pathlib
from typing import Any

from benchmarks import curves, workspace
from benchmarks.peers import OURS

_BAR = 0.8


def draw(document: dict[str, Any], path: pathlib.Path) -> None:
    """Writes an image with a row of bars a case, or with curves, or one of workspaces.

    Args:
      document: as `Session.document` makes it, or as read from its JSON file.
      path: of the image; its suffix names the format. What there is beside bars goes
        to further images, with `-curves` or `-workspace` after its name; likewise
        workspaces beside curves.

    Raises:
      ValueError: if nothing in the document was timed.
    """
    cases: dict[str, list[dict[str, Any]]] = {}
    swept = spaces = False
    for result in document["results"]:
        if result["status"] != "timed":
            continue
        if result.get("swept"):
            swept = True
        elif result["suite"] == workspace.SUITE:
            spaces = True
        else:
            name = f"{result['workload']}\n{result['case']}"
            cases.setdefault(name, []).append(result)
    if not (cases or swept or spaces):
        raise ValueError("nothing was timed, so there is nothing to draw")
    title = title_of(document)
    if cases:
        _draw_bars(cases, path, title)
    if swept:
        beside = path.with_stem(path.stem + "-curves") if cases else path
        curves.draw(document, beside, title)
    if spaces:
        alone = not (cases or swept)
        beside = path if alone else path.with_stem(path.stem + "-workspace")
        workspace.draw(document, beside, title)


def title_of(document: dict[str, Any]) -> str:
    """Names the machine, the versions and the day."""
    machine = document["machine"]
    return (
        f"{machine['device']}, jax {machine['versions']['jax']}, "
        f"jaxsoft {machine['versions']['jaxsoft']}, {document['started'][:10]}"
    )


def _draw_bars(
    cases: dict[str, list[dict[str, Any]]], path: pathlib.Path, title: str
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    present = {result["name"] for results in cases.values() for result in results}
    names = sorted(present, key=lambda name: (name != OURS, name))
    colours = {name: f"C{position}" for position, name in enumerate(names)}
    figure = Figure(figsize=(13, 1.6 + 0.62 * len(cases)), layout="constrained")
    times, memories = figure.subplots(1, 2, sharey=True)
    for position, results in enumerate(cases.values()):
        unit = next(
            (r["seconds"]["median"] for r in results if r["name"] == r["baseline"]),
            results[0]["seconds"]["median"],
        )
        height = _BAR / len(results)
        for place, result in enumerate(results):
            where = position - _BAR / 2 + (place + 0.5) * height
            colour = colours[result["name"]]
            _draw_time(times, result, unit, where, height, colour)
            if result["temporary_bytes"] is not None:
                mebibytes = result["temporary_bytes"] / 2**20
                bars = memories.barh(where, mebibytes, height, color=colour)
                memories.bar_label(bars, [f" {mebibytes:.4g}"], fontsize=6)
    times.set_yticks(range(len(cases)), list(cases), fontsize=7)
    times.set_ylim(len(cases) - 0.5, -0.5)
    times.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    times.set_xlabel("time over the baseline's: median, quartiles; | is the floor")
    memories.set_xlabel("temporaries, MiB")
    memories.set_xscale("symlog", linthresh=1)
    handles = [Patch(color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(names))
    figure.suptitle(title, x=0.02, ha="left", fontsize=9)
    figure.savefig(path, dpi=150)


def _draw_time(
    axes: Any,
    result: dict[str, Any],
    unit: float,
    where: float,
    height: float,
    colour: str,
) -> None:
    seconds = result["seconds"]
    median, low, high = (seconds[name] / unit for name in ("median", "low", "high"))
    spread = [[median - low], [high - median]]
    bars = axes.barh(where, median, height, color=colour, xerr=spread, ecolor="0.3")
    axes.bar_label(bars, [f" {seconds['median'] * 1e3:.4g} ms"], fontsize=6)
    if result["floor_seconds"]:
        floor = result["floor_seconds"] / unit
        axes.plot([floor, floor], [where - height / 2, where + height / 2], color="k")
