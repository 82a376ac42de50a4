"""The public functions, each as a program of given shapes.

Where a function takes more than N, H, V and a dtype: the best 10 classes, teachers as
wide as their students, 8192 sampled classes, balanced trees, and two tails of widths
H / 4 and H / 16 that start at a fiftieth and a fifth of the classes.
"""

import functools
import inspect
from collections.abc import Callable, Iterator

import jax

import jaxsoft
from jaxsoft._core.exporting import PyTree
from jaxsoft.devices.programs import KEY_SEED, Operation, Program, Shapes, array

__all__ = ["operations"]

Room = Callable[[Shapes], Iterator[tuple[str, Program]]]

_BEST, _SAMPLES = 10, 8192


def _keyed(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Gives a function a key, made when it is traced: no device is asked before."""
    return lambda *args, **options: function(jax.random.key(KEY_SEED), *args, **options)


def _best(shapes: Shapes) -> int:
    return min(_BEST, shapes.vocabulary)


def _of_logits(shapes: Shapes) -> Iterator[tuple[str, Program]]:
    """Yields the functions of stored logits."""
    logits, labels = shapes.logits, shapes.labels
    for name in ("softmax", "log_softmax", "logsumexp", "entropy"):
        yield name, Program(getattr(jaxsoft, name), (logits,), 1)
    yield (
        "softmax_cross_entropy",
        Program(jaxsoft.softmax_cross_entropy, (logits, labels), 1),
    )
    yield "distillation_loss", Program(jaxsoft.distillation_loss, (logits, logits), 1)
    ids, listed = (
        array(shapes.tokens, _best(shapes), dtype=dtype)
        for dtype in ("int32", "float32")
    )
    yield (
        "distillation_loss_top_k",
        Program(jaxsoft.distillation_loss_top_k, (logits, ids, listed), 1),
    )
    heads = array(2, *logits.shape, dtype=shapes.dtype)
    yield "codistillation_loss", Program(jaxsoft.codistillation_loss, (heads,), 1)
    for name in ("boltzmann_policy", "boltzmann_operator", "soft_argmax"):
        function = functools.partial(getattr(jaxsoft, name), temperature=0.5)
        yield name, Program(function, (logits,), 1)
    yield "sample", Program(_keyed(jaxsoft.sample), (logits,))
    drafted = (logits, logits, labels)
    yield "speculative_sample", Program(_keyed(jaxsoft.speculative_sample), drafted)
    for name in ("gumbel_softmax", "reinmax", "gumbel_rao"):
        yield name, Program(_keyed(getattr(jaxsoft, name)), (logits,), 1)
    top_k = functools.partial(_keyed(jaxsoft.gumbel_top_k), k=_best(shapes))
    yield "gumbel_top_k", Program(top_k, (logits,))
    density = functools.partial(jaxsoft.concrete_log_prob, temperature=0.5)
    yield "concrete_log_prob", Program(density, (logits, logits), 2)
    yield "fit_temperature", Program(jaxsoft.fit_temperature, (logits, labels))
    yield (
        "expected_calibration_error",
        Program(jaxsoft.expected_calibration_error, (logits, labels)),
    )


def _of_layers(shapes: Shapes) -> Iterator[tuple[str, Program]]:
    """Yields the functions of `hidden @ kernel`."""
    labels, k = shapes.labels, _best(shapes)
    layer = (shapes.states, shapes.kernel)

    def differentiable(result):
        return result.lse, result.log_prob, result.entropy

    yield (
        "linear_statistics",
        Program(jaxsoft.linear_statistics, (*layer, labels), 2, differentiable),
    )
    for name in ("linear_cross_entropy", "linear_log_prob"):
        yield name, Program(getattr(jaxsoft, name), (*layer, labels), 2)
    ids = array(shapes.tokens, k, dtype="int32")
    yield "linear_log_prob_at", Program(jaxsoft.linear_log_prob_at, (*layer, ids), 2)
    yield "linear_sample", Program(_keyed(jaxsoft.linear_sample), layer)
    top_k = functools.partial(jaxsoft.linear_top_k, k=k)
    yield "linear_top_k", Program(top_k, layer, 2, lambda result: result[0])
    values = array(shapes.vocabulary, shapes.hidden, dtype=shapes.dtype)
    yield "linear_expected", Program(jaxsoft.linear_expected, (*layer, values), 3)
    yield "linear_distillation", Program(jaxsoft.linear_distillation, layer * 2, 2)
    listed = array(shapes.tokens, k, dtype="float32")
    yield (
        "linear_distillation_top_k",
        Program(jaxsoft.linear_distillation_top_k, (*layer, ids, listed), 2),
    )
    yield (
        "linear_fit_temperature",
        Program(jaxsoft.linear_fit_temperature, (*layer, labels)),
    )
    states = shapes.states
    for name in ("nt_xent", "clip_loss"):
        yield name, Program(getattr(jaxsoft, name), (states, states), 2)
    yield (
        "supervised_contrastive",
        Program(jaxsoft.supervised_contrastive, (states, labels), 1),
    )
    yield (
        "in_batch_cross_entropy",
        Program(
            jaxsoft.in_batch_cross_entropy,
            (states, states, array(shapes.tokens, dtype="float32"), labels),
            3,
        ),
    )


def _of_trees(shapes: Shapes) -> Iterator[tuple[str, Program]]:
    """Yields the functions of trees, bands and samples of classes."""
    yield from _of_balanced_trees(shapes)
    yield from _of_bands(shapes)
    starts = array(shapes.vocabulary + 1, dtype="int32")
    sampler = jax.eval_shape(jaxsoft.ClassSampler, starts)
    function = _keyed(jaxsoft.sampled_softmax_loss)

    def sampled(hidden, kernel, labels, sampler, **options):
        return function(hidden, kernel, labels, _SAMPLES, sampler=sampler, **options)

    arrays = (shapes.states, shapes.kernel, shapes.labels, sampler)
    yield "sampled_softmax_loss", Program(sampled, arrays, 2)


def _of_balanced_trees(shapes: Shapes) -> Iterator[tuple[str, Program]]:
    """Yields the functions of a tree, and the optimizers of its rows."""
    tree = jaxsoft.ClassTree.balanced(shapes.vocabulary)
    kernel = array(tree.num_rows, shapes.hidden, dtype=shapes.dtype)
    layer = (shapes.states, kernel)
    labelled = (*layer, shapes.labels, tree)
    yield "hierarchical_log_prob", Program(jaxsoft.hierarchical_log_prob, labelled, 2)
    yield (
        "hierarchical_log_probs",
        Program(jaxsoft.hierarchical_log_probs, (*layer, tree), 2),
    )
    sample = _keyed(jaxsoft.hierarchical_sample)
    yield "hierarchical_sample", Program(sample, (*layer, tree))

    def top_k(hidden, kernel, tree, **options):
        return jaxsoft.hierarchical_top_k(
            hidden, kernel, _best(shapes), tree, **options
        )

    yield "hierarchical_top_k", Program(top_k, (*layer, tree))
    both = jaxsoft.hierarchical_value_and_row_grad
    yield (
        "hierarchical_value_and_row_grad",
        Program(both, labelled, is_gradient=True),
    )
    _, _, gradient = jax.eval_shape(both, *labelled)
    for name in ("row_sgd", "row_adagrad", "row_adam"):
        optimizer = getattr(jaxsoft, name)(0.1)
        state = jax.eval_shape(optimizer.init, kernel)

        def update(kernel, state, gradient, optimizer=optimizer):
            return optimizer.update(kernel, gradient, state)

        yield name, Program(update, (kernel, state, gradient), donated=(0, 1))


def _of_bands(shapes: Shapes) -> Iterator[tuple[str, Program]]:
    """Yields the functions of a shortlist and two tails."""
    hidden, classes = shapes.hidden, shapes.vocabulary
    first = max(1, classes // 50)
    bands = jaxsoft.ClassBands.in_order(classes, (first, max(first + 1, classes // 5)))
    widths = (max(1, hidden // 4), max(1, hidden // 16))
    head = array(hidden, bands.shortlist + len(widths), dtype=shapes.dtype)
    tails = [
        jax.eval_shape(
            jaxsoft.AdaptiveTail,
            array(hidden, width, dtype=shapes.dtype),
            array(width, size, dtype=shapes.dtype),
        )
        for width, size in zip(widths, bands.tails, strict=True)
    ]
    layer = (shapes.states, head, tails)
    labelled = (*layer, shapes.labels, bands)
    yield "adaptive_log_prob", Program(jaxsoft.adaptive_log_prob, labelled, 3)
    yield "adaptive_log_probs", Program(jaxsoft.adaptive_log_probs, (*layer, bands), 3)
    sample = _keyed(jaxsoft.adaptive_sample)
    yield "adaptive_sample", Program(sample, (*layer, bands))

    def top_k(hidden, head, tails, bands, **options):
        return jaxsoft.adaptive_top_k(
            hidden, head, tails, _best(shapes), bands, **options
        )

    yield "adaptive_top_k", Program(top_k, (*layer, bands))


@functools.cache
def _programs(room: Room, shapes: Shapes) -> dict[str, Program]:
    """Returns a room's functions: its trees and states are made once."""
    return dict(room(shapes))


@functools.cache
def operations() -> dict[str, Operation]:
    """Returns the table, functions of stored logits first."""

    def program(room: Room, name: str, shapes: Shapes) -> Program:
        return _programs(room, shapes)[name]

    def takes(name: str, option: str) -> bool:
        return option in inspect.signature(getattr(jaxsoft, name)).parameters

    return {
        name: Operation(
            name,
            functools.partial(program, room, name),
            takes(name, "implementation"),
            takes(name, "workspace_bytes"),
        )
        for room in (_of_logits, _of_layers, _of_trees)
        for name in _programs(room, Shapes())
    }
