"""What every public function may take beside its arguments and results, and must run.

Of a kind of functions there is one formula for each kind of program. It counts in
bytes: L float32 logits, S float32 hidden states, K the kernel, T tiles of logits, C the
slice of the kernel that a tile needs and W the workspace. A function without a kind has
no bound: add it to one, or a kind with its reason.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxsoft.devices.programs import Shapes
from jaxsoft.devices.target import TARGETS
from jaxsoft.linear.plans import Layer
from tests.accelerators.compiling import MIB, NEWER, results
from tests.accelerators.functions import SLOW, names_of, shapes_of

__all__ = ["check"]

# What any program takes: scalars, columns of rows that fill the lanes of a register.
SLACK = 16 * MIB


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of the arrays that bounds are made of.

    Attributes:
      rows: N, a number.
      logits: L.
      states: S.
      kernel: K, in bfloat16.
      tile: T.
      cut: C, in bfloat16.
      layer: what workspaces are made of.
      tpu: whether a TPU runs it.
    """

    rows: int
    logits: int
    states: int
    kernel: int
    tile: int
    cut: int
    layer: Layer
    tpu: bool

    @classmethod
    def of(cls, shapes: Shapes, tpu: bool) -> "Sizes":
        """Returns the sizes at shapes."""
        rows, features, classes = shapes.tokens, shapes.hidden, shapes.vocabulary
        layer = Layer(rows, features, classes, 4, 2, 2, 2)
        tiles = layer.tiling(None)
        return cls(
            rows,
            4 * rows * classes,
            4 * rows * features,
            2 * features * classes,
            4 * tiles.block_rows * tiles.block_classes,
            2 * features * tiles.block_classes,
            layer,
            tpu,
        )

    def workspace(self, **sizes: int) -> int:
        """Returns W of a call that names none, at other sizes of the layer."""
        return dataclasses.replace(self.layer, **sizes).workspace(None)


Formula = Callable[[Sizes, bool], float]


def logits(times: float, on_tpu: float | None = None) -> Formula:
    """Stored logits so many times in float32: XLA keeps what several passes need.

    TPUs lay them out anew where a function has blocks of classes.
    """
    return lambda sizes, _: sizes.logits * (on_tpu if sizes.tpu and on_tpu else times)


def recomputed(sizes: Sizes, gradient: bool) -> float:
    """Tiles, the slices of the kernel and its gradient, and the sum of dhidden."""
    if not gradient:
        return 3 * sizes.tile + sizes.cut
    return 5 * sizes.tile + 3 * sizes.cut + sizes.states


def streamed(sizes: Sizes, gradient: bool) -> float:
    """Tiles; of a gradient the workspace, and the sum of dhidden."""
    if not gradient:
        return recomputed(sizes, gradient)
    return sizes.workspace() + sizes.states


def summed(sizes: Sizes) -> float:
    """The float32 sum of a reduced loss's dkernel, beside its workspace.

    For TPUs XLA lays it out anew, twice, where it is multiplied by a cotangent that is
    not known; of a loss's own gradient it is 1, and `test_passes.py` has the one sum.
    """
    return (6 if sizes.tpu else 2) * sizes.kernel


def reduced(sizes: Sizes, gradient: bool) -> float:
    """As streamed, with the float32 sum of a reduced loss's dkernel."""
    return streamed(sizes, gradient) + gradient * summed(sizes)


def drawn(sizes: Sizes, gradient: bool) -> float:
    """As streamed, with a column of the kernel for each token, in float32."""
    return streamed(sizes, gradient) + sizes.states


def taught(sizes: Sizes, gradient: bool) -> float:
    """As reduced, with the workspace of two layers, which the value takes too."""
    workspace = sizes.workspace(layers=2)
    if not gradient:
        return workspace
    return reduced(sizes, gradient) + workspace - sizes.workspace()


def listed(sizes: Sizes, gradient: bool) -> float:
    """As streamed, with numbers of a few classes a token scattered into tiles."""
    return streamed(sizes, gradient) + 3 * sizes.tile


def listed_and_reduced(sizes: Sizes, gradient: bool) -> float:
    """As listed and as reduced."""
    return reduced(sizes, gradient) + 3 * sizes.tile


def mixed(sizes: Sizes, gradient: bool) -> float:
    """As streamed, with slices of a table like the kernel, and its sum a token."""
    return streamed(sizes, gradient) + sizes.states + 3 * sizes.cut + sizes.tile


def contrasted(sizes: Sizes, gradient: bool) -> float:
    """Two batches are states and kernel, normalized in float32, and their sums."""
    pair = 2 * sizes.states
    if not gradient:
        return 3 * 32 * MIB + 2 * pair
    return sizes.workspace(classes=sizes.rows) + 4 * pair


def contrasted_as_one(sizes: Sizes, gradient: bool) -> float:
    """As contrasted, of both batches with both."""
    count = 2 * sizes.rows
    more = sizes.workspace(rows=count, classes=count)
    more -= sizes.workspace(classes=sizes.rows)
    return contrasted(sizes, gradient) + gradient * more


def path(sizes: Sizes, gradient: bool) -> float:
    """States in float32, their gradients, the rows of blocks of tokens and theirs."""
    return (5 + (sizes.tpu and NEWER) if gradient else 1) * sizes.states


def updated(sizes: Sizes, gradient: bool) -> float:
    """The rows of blocks of tokens, two moments, and what replaces those."""
    return 5 * sizes.states


def beams(sizes: Sizes, gradient: bool) -> float:
    """Beams of 2**23 numbers in float32; TPUs pad tokens to 128."""
    return 128 * sizes.logits / sizes.rows if sizes.tpu else 4 * 2**23 * 4


def banded(sizes: Sizes, gradient: bool) -> float:
    """Tiles; and a gradient of the tails, their sum in float32: 0.095 H V numbers.

    Newer compilers for TPUs copy those, and 5/16 H² of the projections, once more.
    """
    tails, features = 0.095 * sizes.kernel / 2, sizes.states / 4 / sizes.rows
    copied = 2 * (tails + 5 / 16 * features**2) if sizes.tpu and NEWER else 0
    return (6 * tails + copied + sizes.states if gradient else 0) + 2 * sizes.tile


def sampled(sizes: Sizes, gradient: bool) -> float:
    """Logits of 8192 classes, vectors of those and of the labels, and their gradients.

    For TPUs XLA transposes the kernel to take columns of it, and its gradient where
    that was; newer ones keep that beside it, and the zeros that it is added to. They
    keep the derivative in bfloat16 beside the logits, too.
    """
    newer = gradient and NEWER
    numbers = 6 if newer else 4
    of_classes = numbers * sizes.rows * 8192 + (3 if gradient else 2) * sizes.states
    return of_classes + sizes.kernel * sizes.tpu * (3 if newer else 1)


KINDS: Mapping[Formula, tuple[str, ...]] = {
    logits(1.1, 1.3): (
        "softmax",
        "log_softmax",
        "logsumexp",
        "entropy",
        "softmax_cross_entropy",
        "boltzmann_policy",
        "boltzmann_operator",
        "soft_argmax",
        "expected_calibration_error",
    ),
    # Read again by every step.
    logits(2.1): ("fit_temperature",),
    # Two arrays of logits.
    logits(3.5): (
        "distillation_loss",
        "distillation_loss_top_k",
        "concrete_log_prob",
    ),
    # Those of two heads, of each against the others.
    logits(13): ("codistillation_loss",),
    logits(2.1, 4.1): ("gumbel_softmax", "reinmax"),
    # Ten draws, some of them at once.
    logits(5.5, 10): ("gumbel_rao",),
    logits(2.1, 2.6): ("sample", "gumbel_top_k"),
    # Of a few rows at a time on TPUs.
    logits(0.1, 0.5): ("speculative_sample",),
    streamed: (
        "linear_statistics",
        "linear_log_prob",
        "linear_fit_temperature",
    ),
    drawn: ("linear_sample",),
    reduced: ("linear_cross_entropy",),
    taught: ("linear_distillation",),
    listed: ("linear_log_prob_at", "linear_top_k"),
    listed_and_reduced: ("linear_distillation_top_k",),
    mixed: ("linear_expected",),
    contrasted: ("clip_loss", "supervised_contrastive", "in_batch_cross_entropy"),
    contrasted_as_one: ("nt_xent",),
    path: (
        "hierarchical_log_prob",
        "hierarchical_sample",
        "hierarchical_value_and_row_grad",
    ),
    # The results are of all classes, and so is what a level of them takes.
    logits(5, 6.2 if NEWER else 5): ("hierarchical_log_probs",),
    logits(5.4): ("adaptive_log_probs",),
    updated: ("row_sgd", "row_adagrad", "row_adam"),
    beams: ("hierarchical_top_k",),
    banded: ("adaptive_log_prob", "adaptive_sample", "adaptive_top_k"),
    sampled: ("sampled_softmax_loss",),
}
FORMULAS = {name: formula for formula, names in KINDS.items() for name in names}

_TPU = ("jaxsoft_statistics_forward", "jaxsoft_statistics_backward")
_ROWS = ("jaxsoft_softmax_forward", "jaxsoft_softmax_backward")
_GUMBEL = ("jaxsoft_gumbel_softmax_forward", "jaxsoft_softmax_backward")
STATISTICS = ("linear_statistics", "linear_cross_entropy", "linear_log_prob")
# For a 7x, XLA lays the whole kernel out anew before a loop over slices of it, in some
# versions for each of several loops, and the gradient after them: so many kernels of
# value and gradient, and of two layers.
COPIES = (2, 4)
OF_TWO_LAYERS = 7
_REDUCED = (reduced, taught, listed_and_reduced)
COPYING = tuple(
    name for kind in (streamed, drawn, listed, mixed, *_REDUCED) for name in KINDS[kind]
)
# Of a function's value, and those that its gradient adds.
KERNELS: Mapping[tuple[str, str], tuple[str, ...]] = {
    **{(name, "mosaic_tpu"): _TPU for name in STATISTICS},
    ("softmax", "mosaic_tpu"): _ROWS,
    ("softmax", "mosaic_gpu"): _ROWS,
    ("gumbel_softmax", "mosaic_tpu"): _GUMBEL,
    ("gumbel_softmax", "mosaic_gpu"): _GUMBEL,
}
# Kernels for GPUs by chip; the derivative of statistics is XLA's.
CHIPS = {"h100": "hopper", "b200": "blackwell"}


def bound(name: str, ran: str, gradient: bool, sizes: Sizes, target: str) -> float:
    """Returns the most bytes that a program may take."""
    if ran == "xla":
        copies = 0
        if target == "7x" and name in COPYING:
            two = name == "linear_distillation"
            copies = OF_TWO_LAYERS if two else COPIES[gradient]
        return FORMULAS[name](sizes, gradient) + SLACK + copies * sizes.kernel
    if name == "linear_sample":
        # Two numbers of every 32 classes; columns that 128 rows read again, twice.
        columns = 2 * 128 * 32 * 2 * sizes.states / (4 * sizes.rows)
        return SLACK + sizes.logits / 16 + columns
    if name not in STATISTICS:
        # The rows' results, in the dtype of the logits, and columns of rows.
        return SLACK + gradient * sizes.logits / 2
    if gradient and not sizes.tpu:
        return SLACK + recomputed(sizes, gradient)
    return SLACK + gradient * sizes.states


def kernels(name: str, ran: str, gradient: bool, target: str) -> list[str]:
    """Returns the kernels that a program must call."""
    if ran == "mosaic_gpu" and name in (*STATISTICS, "linear_sample"):
        what = "sample" if name == "linear_sample" else "statistics"
        return [f"jaxsoft_{what}_{CHIPS[target]}"]
    return sorted(KERNELS.get((name, ran), ())[: 1 + gradient])


def check(room: str, target: str, much: str) -> None:
    """Requires of every function of a room what is said here."""
    found = results("functions", target, room, much)
    names = [n for n in names_of(room) if much != "quick" or n not in SLOW]
    assert {one["name"] for one in found} == set(names)
    assert not set(names) - set(FORMULAS), "each function needs a kind"
    tpu = TARGETS[target].platform == "tpu"
    broken = []
    for one in found:
        sizes = Sizes.of(shapes_of(one["name"], one["model"]), tpu)
        broken += [(one, why) for why in _broken(one, sizes, target)]
    assert not broken, "\n".join(map(str, broken))


def _broken(one: dict[str, Any], sizes: Sizes, target: str) -> Iterator[str]:
    """Yields what a program does not keep to."""
    name, ran = one["name"], one["implementation"]
    gradient, mib = one["what"] == "value_and_grad", one["mib"]
    layer = name in names_of("layers")
    if ran == "reference":
        # It stores logits, in bfloat16 at the least.
        if layer and mib * MIB < sizes.logits / 2:
            yield "stores no logits"
        return
    most = bound(name, ran, gradient, sizes, target)
    # Stored logits take half of what float32 ones do, at the least; a workspace is up
    # to a quarter of those.
    share = 0.45 if gradient else 1 / 3
    if mib * MIB > most:
        yield f"more than {most / MIB:.1f} MiB"
    if name.startswith("row_") and one["aliased"] * MIB < 0.99 * sizes.kernel:
        yield "no update in place"
    if layer and _beside(name, ran, gradient, sizes) > sizes.logits * share:
        yield "a bound that stored logits would keep"
    if one["kernels"] != kernels(name, ran, gradient, target):
        yield "other kernels"
    wide = {tuple(types) for types in one["wide"]}
    if wide - {("float32", "float32")}:
        yield "a product of float32 and bfloat16"
    if wide and layer:
        yield "a wide product"


def _beside(name: str, ran: str, gradient: bool, sizes: Sizes) -> float:
    """Returns a bound less the sum of dkernel, as large with one token as with all."""
    most = bound(name, ran, gradient, sizes, "any")
    has_sum = gradient and ran == "xla" and FORMULAS[name] in _REDUCED
    return most - has_sum * summed(sizes)
