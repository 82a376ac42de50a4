"""The subcommand `jaxsoft devices`."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxsoft.cli.text import asking, one_line
from jaxsoft.devices.target import HERE, TARGETS
from jaxsoft.training.memory import bytes_in

if TYPE_CHECKING:
    from jaxsoft.devices.programs import Operation, Shapes

__all__ = ["add_commands"]

# Features and classes of the heads of models.
MODELS = {
    "llama3": (4096, 128256),
    "gemma3": (2560, 262144),
    "qwen3": (4096, 151936),
}
DTYPES = ("float32", "bfloat16", "float16")
_TOKENS, _DTYPE = 4096, "bfloat16"
# Two tails, each with a class at least, and a shortlist.
_FEWEST_CLASSES = 3
_SIZES = ("model", "tokens", "hidden", "vocabulary", "dtype", "workspace")
_FIELDS = ("target", "op", *_SIZES, "schedule", "json")


def add_commands(commands: Any) -> None:
    """Adds the subcommand.

    Args:
      commands: what `add_subparsers` returned.
    """
    devices = commands.add_parser(
        "devices",
        help="say what each function runs here or on an accelerator, and its memory",
        description="Says which implementation each function uses here or on an "
        "accelerator that is elsewhere, which others it may be asked for, and, where "
        "shapes are given, what the compiled program takes: memory beside arguments "
        "and results, matrix products, bytes read and written, and by which plan a "
        "layer's gradient is made.",
    )
    devices.set_defaults(run=_devices, farewell=lambda parsed: str, fields=_FIELDS)
    devices.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help=f"{HERE}, {', '.join(TARGETS)}; may come more than once (default: {HERE})",
    )
    devices.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help="a function of jaxsoft; may come more than once (default: all)",
    )
    models = ", ".join(f"{name} ({h}, {v})" for name, (h, v) in MODELS.items())
    devices.add_argument(
        "--model", metavar="NAME", help=f"hidden and vocabulary of {models}"
    )
    devices.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"rows of hidden states or of logits (default: {_TOKENS})",
    )
    devices.add_argument("--hidden", type=int, metavar="H", help="features")
    devices.add_argument("--vocabulary", type=int, metavar="V", help="classes")
    devices.add_argument(
        "--dtype",
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: {_DTYPE})",
    )
    devices.add_argument(
        "--workspace",
        metavar="SIZE",
        help="temporary memory that functions of layers may take, such as 1GiB; "
        "without --op those alone are shown (default: each function's own)",
    )
    devices.add_argument(
        "--schedule",
        action="store_true",
        help="read the compiled code too: the least time that bytes, products and, on "
        "TPUs, bundles of instructions take, and which units loops fill; of GPUs "
        "registers, spills and matrix instructions",
    )
    devices.add_argument(
        "--json", action="store_true", help="print one JSON document instead"
    )


def _devices(parsed: argparse.Namespace) -> int:
    """Runs `jaxsoft devices`."""
    # Tables and compilers only where they are used.
    from jaxsoft.devices import report, report_schedule
    from jaxsoft.devices.operations import operations
    from jaxsoft.devices.surveying import DeviceError, device_of, survey

    with asking():
        names = _named("op", parsed.op, operations(), list(operations()))
        if parsed.workspace is not None:
            names = _with_workspace(names, operations(), asked=bool(parsed.op))
        targets = _named("target", parsed.target, (HERE, *TARGETS), [HERE])
        shapes = _shapes(parsed)
        _check_schedule(parsed.schedule, targets, shapes)
    code, surveyed = 0, []
    for target in targets:
        device, found, problem = device_of(target), [], None
        try:
            told = survey(target, names, shapes, schedule=parsed.schedule)
            for one in _watched(target, len(names), told):
                found.append(one)
        except DeviceError as error:
            code, problem = 1, str(error)
            print(f"jaxsoft devices: {one_line(problem)}", file=sys.stderr)
            found = list(survey(target, names, None))
        surveyed.append(report.Surveyed(target, device, found, problem))
        if parsed.json:
            continue
        if parsed.schedule and problem is None and shapes is not None:
            report_schedule.show(surveyed[-1], shapes)
        else:
            report.show(surveyed[-1], shapes)
    if parsed.json:
        print(report.as_json(surveyed, shapes))
    return code


def _check_schedule(
    asked: bool, targets: Sequence[str], shapes: "Shapes | None"
) -> None:
    """Requires what there is code of."""
    if asked and HERE in targets:
        raise ValueError(
            f"`schedule` must be given with `target` {', '.join(TARGETS)}, got {HERE}."
        )
    if asked and shapes is None:
        raise ValueError("`schedule` must be given with sizes, such as `model` llama3.")


def _named(
    option: str, given: Sequence[str] | None, known: Iterable[str], default: list[str]
) -> list[str]:
    """Returns the names given, each once; raises for one that there is not."""
    known = tuple(known)
    for name in given or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or known
            some = ", ".join(near[:8]) + (", …" if len(near) > 8 else "")
            raise ValueError(f"`{option}` must be a name such as {some}, got {name!r}.")
    return list(dict.fromkeys(given)) if given else default


def _with_workspace(
    names: Sequence[str], known: Mapping[str, "Operation"], *, asked: bool
) -> list[str]:
    """Returns the functions that take a workspace; raises for another asked for."""
    for name in names:
        if asked and not known[name].takes_workspace:
            raise ValueError(
                f"`workspace` must be left out with `op` {name}, which takes none."
            )
    return [name for name in names if known[name].takes_workspace]


def _shapes(parsed: argparse.Namespace) -> "Shapes | None":
    """Returns the sizes to compile for; None where none was given."""
    given: Mapping[str, Any] = {
        name: getattr(parsed, name)
        for name in _SIZES
        if getattr(parsed, name) is not None
    }
    if not given:
        return None
    sizes = dict(given)
    model = sizes.pop("model", None)
    if model is not None:
        _named("model", [model], MODELS, [])
        for name in ("hidden", "vocabulary"):
            if name in sizes:
                raise ValueError(
                    f"`{name}` must be left out with `model`, got {sizes[name]}."
                )
        sizes["hidden"], sizes["vocabulary"] = MODELS[model]
    for name in ("hidden", "vocabulary"):
        if name not in sizes:
            raise ValueError(
                f"`{name}` must be given with other sizes, or else `model`, got "
                f"{', '.join(given)}."
            )
    sizes = {"tokens": _TOKENS, "dtype": _DTYPE} | sizes
    if "workspace" in sizes:
        sizes["workspace"] = bytes_in(sizes["workspace"], "workspace")
    _named("dtype", [sizes["dtype"]], DTYPES, [])
    for name in ("tokens", "hidden", "vocabulary"):
        least = _FEWEST_CLASSES if name == "vocabulary" else 1
        if not least <= sizes[name] < 2**31:
            raise ValueError(
                f"`{name}` must be in [{least}, 2**31), got {sizes[name]}."
            )
    from jaxsoft.devices.programs import Shapes

    return Shapes(**sizes)


def _watched(target: str, count: int, found: Iterator[Any]) -> Iterator[Any]:
    """Yields what is found, and shows on a terminal how far it is."""
    if not sys.stderr.isatty():
        yield from found
        return
    for done, one in enumerate(found, 1):
        said = f"{target}: {done} of {count}, {one.operation}"
        print(f"\r\x1b[2K{said}", end="", file=sys.stderr, flush=True)
        yield one
    print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
