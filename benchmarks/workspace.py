"""What does memory buy? The time of a value and gradient over the workspace it has.

Contenders are ours with more and more of it, Optax, and the products alone: logits,
dhidden and dkernel, 6·N·H·V operations, of which none can be left out.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import checks, contest, linear, peers, timing, workloads
from benchmarks.session import Session
from benchmarks.workloads import MIB, LinearCase, LinearWorkload

SUITE = "workspace"
PRODUCTS = "products alone"

# Workspaces by their share of float32 logits: 8 to 640 MiB at the first workload. What
# is taken by default is a quarter there.
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 5 / 16, 1 / 2, 3 / 4, 1, 5 / 4)


def run(session: Session) -> None:
    """Runs the mean and the loss of each token at the first workload."""
    chosen = workloads.select(
        workloads.LINEAR[:1],
        session.workloads,
        platform=session.platform,
        quick=session.quick,
    )
    for workload in chosen:
        run_workload(session, workload)


def run_workload(session: Session, workload: LinearWorkload) -> None:
    """Checks and times ours with every workspace, in the same rounds.

    Args:
      session: where the results go.
      workload: the shape.
    """
    session.measure(f"matmul {workload.dtype}")
    spaces = tuple(int(workload.logits_bytes * share) for share in _SHARES)
    wanted = [
        LinearCase(reduction="mean", gradient=True, workspaces=spaces),
        LinearCase(reduction="none", gradient=True, workspaces=spaces),
    ]
    inputs = workload.inputs("hv")
    for case in linear.make_cases(session, workload, inputs, wanted, SUITE):
        contest.run_case(_with_products(case), session)


def _with_products(case: contest.Case) -> contest.Case:
    """Makes a case of ours, of the baseline and of the products alone."""
    checked = case.arguments if case.check_arguments is None else case.check_arguments
    hidden, kernel, *_ = checked
    subset = checks.Subset.of(len(hidden), kernel.shape[1])
    products = peers.Contender(
        PRODUCTS,
        program=functools.partial(timing.compile_program, PRODUCTS, _products),
        observe=lambda outputs: {
            "products by hidden": outputs[0][subset.rows],
            "products by kernel": outputs[1][:, subset.classes],
        },
    )
    taking_part = [c for c in case.contenders if c.ours or c.name == case.baseline]
    return dataclasses.replace(
        case,
        contenders=[*taking_part, products],
        truth=lambda: {**case.truth(), **_true_products(hidden, kernel, subset)},
    )


def _products(hidden: Any, kernel: Any, *_: Any) -> tuple[jax.Array, jax.Array]:
    logits = hidden @ kernel
    return logits @ kernel.T, hidden.T @ logits


def _true_products(hidden: Any, kernel: Any, subset: checks.Subset) -> dict[str, Any]:
    hidden, kernel = (np.asarray(a, np.float64) for a in (hidden, kernel))
    return {
        "products by hidden": hidden[subset.rows] @ kernel @ kernel.T,
        "products by kernel": hidden.T @ (hidden @ kernel[:, subset.classes]),
    }


def draw(document: dict[str, Any], path: pathlib.Path, title: str) -> None:
    """Writes an image of time over memory, both as they were measured.

    Args:
      document: as `Session.document` makes it, or as read from its JSON file.
      path: of the image; its suffix names the format.
      title: of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cases: dict[str, list[dict[str, Any]]] = {}
    for result in document["results"]:
        if result["suite"] == SUITE and result["status"] == "timed":
            cases.setdefault(result["case"], []).append(result)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    for place, (case, results) in enumerate(cases.items()):
        _draw_case(axes, case.partition(",")[0], results, f"C{place}", above=place > 0)
    shape = next(iter(cases.values()))[0]["shape"]
    sizes = ", ".join(f"{k} = {v}" for k, v in shape.items() if k != "dtype")
    what = f"{sizes}, {shape['dtype']}: value and gradient"
    axes.set_title(what, fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    ticks = [2.0**power for power in range(-8, 20) if low <= 2.0**power <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("temporaries, MiB; at each point the workspace that was given")
    axes.set_ylabel("time over Optax's: median and quartiles")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="0.3", marker=marker, markersize=size, label=label, ls="")
        for marker, size, label in (
            ("*", 11, "the workspace that is taken by default"),
            ("s", 6, "Optax, on stored logits"),
        )
    ]
    axes.legend(handles=handles, fontsize=8, loc="best")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=150)


def _draw_case(
    axes: Any,
    reduction: str,
    results: list[dict[str, Any]],
    colour: str,
    *,
    above: bool,
) -> None:
    """Draws a reduction: ours as a curve, Optax as a point, the products as a line."""
    by_name = {result["name"]: result for result in results if result["ratio"]}
    ours = [r for name, r in by_name.items() if name.startswith(peers.OURS)]
    ours.sort(key=lambda result: result["temporary_bytes"])
    if ours:
        ratios = [_ratios(result, by_name[result["baseline"]]) for result in ours]
        low, median, high = np.array(ratios).T
        axes.errorbar(
            [_mebibytes(result) for result in ours],
            median,
            yerr=[median - low, high - median],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            elinewidth=0.8,
            label=f"{reduction}: jaxsoft",
        )
        for result, y in zip(ours, median, strict=True):
            _draw_workspace(axes, result, y, colour, above=above)
    if found := by_name.get(PRODUCTS):
        label = f"{reduction}: the three matrix products alone"
        axes.axhline(found["ratio"], color=colour, ls="--", linewidth=1, label=label)
    for result in by_name.values():
        if result["name"] == result["baseline"]:
            axes.plot(_mebibytes(result), 1, color=colour, marker="s", ls="")


def _draw_workspace(
    axes: Any, result: dict[str, Any], y: float, colour: str, *, above: bool
) -> None:
    """Says which workspace a point has."""
    x = _mebibytes(result)
    if result["name"] == peers.OURS:
        axes.plot(x, y, color=colour, marker="*", markersize=12, ls="")
        return
    axes.annotate(
        result["name"].removeprefix(f"{peers.OURS}, ").removesuffix(" MiB"),
        (x, y),
        xytext=(0, 8 if above else -13),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        color=colour,
    )


def _mebibytes(result: dict[str, Any]) -> float:
    return max(result["temporary_bytes"], 1) / MIB


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float]:
    """Returns the quartiles and between them the median of ratios within a round."""
    pairs = zip(ours["seconds"]["samples"], theirs["seconds"]["samples"], strict=True)
    ratios = np.quantile([a / b for a, b in pairs], (0.25, 0.5, 0.75))
    return ratios[0], ratios[1], ratios[2]
