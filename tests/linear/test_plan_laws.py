"""Every plan of a derivative gives the same numbers, and computes what it says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

import jaxsoft
from jaxsoft import linear_cross_entropy
from jaxsoft.linear import total as reduced_losses
from jaxsoft.linear.arguments import prepare
from jaxsoft.linear.fold import _Gradients
from jaxsoft.linear.folds.statistics import Fields, Statistics
from jaxsoft.linear.gradients import _Step
from jaxsoft.linear.kept import Keep, KeptAll
from tests import truth
from tests.linear import cases
from tests.linear.plans import (
    ALL,
    CHUNKS,
    PLANS,
    PLANS_OF_GPUS,
    RECOMPUTE,
    chosen_plans,
)

__all__ = ["chosen_plans"]

ROWS, FEATURES, CLASSES = 20, 8, 300
# Slopes are multiplied as one matrix where classes are a multiple of 128.
CLASSES_ON_GPU = 384
BY_NAME = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def close(a: Any, b: Any, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, "float64"), np.asarray(y, "float64"), rtol=rtol, atol=atol
        )


@functools.cache
def _plain(name: str, reduction: str, dtype: str, classes: int, wide: str):
    """Returns value and gradients of the plain formula, computed in `wide`."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, classes, dtype=dtype)
    options = cases.arrays(cases.OPTIONS[name], ROWS, classes, labels)
    moving = {k: options.pop(k) for k in ("bias", "temperature") if k in options}

    def cast(tree):
        def one(a):
            a = jnp.asarray(a)
            return a.astype(wide) if jnp.issubdtype(a.dtype, jnp.floating) else a

        return jax.tree.map(one, tree)

    hidden, kernel, moving, fixed = cast((hidden, kernel, moving, options))
    for number in ("logit_softcap", "label_smoothing", "z_loss"):
        if number in options:
            fixed[number] = options[number]

    def total(hidden, kernel, moving):
        losses = cases.plain_loss(hidden, kernel, labels, **fixed, **moving)
        if reduction == "mean":
            weights = options.get("weights")
            count = ROWS if weights is None else weights.sum().astype(losses.dtype)
            return losses.sum() / count
        return (losses * jnp.cos(jnp.arange(ROWS, dtype=losses.dtype))).sum()

    return jax.value_and_grad(total, (0, 1, 2))(hidden, kernel, moving)


@BY_NAME
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", cases.OPTIONS)
@pytest.mark.many_cases
def test_every_option_by_every_plan(name, reduction, dtype, plan, x64):
    _compare_with_plain(name, reduction, dtype, plan)


@pytest.mark.parametrize("plan", PLANS_OF_GPUS.values(), ids=PLANS_OF_GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", cases.OPTIONS)
@pytest.mark.many_cases
def test_every_option_by_the_chunks_of_a_gpu(name, dtype, plan, x64):
    _compare_with_plain(name, "mean", dtype, plan, CLASSES_ON_GPU)


@pytest.mark.parametrize("plan", PLANS_OF_GPUS.values(), ids=PLANS_OF_GPUS)
def test_chunks_of_a_gpu_join_their_tiles(plan, monkeypatch):
    joined, original = [], _Step.joined

    def spy(self, sums):
        joined.append(self.tiles)
        return original(self, sums)

    monkeypatch.setattr(_Step, "joined", spy)
    arrays = cases.layer(ROWS, FEATURES, CLASSES_ON_GPU, dtype="bfloat16")
    loss = functools.partial(linear_cross_entropy, workspace_bytes=plan)
    jax.jit(jax.grad(loss, (0, 1))).lower(*arrays)
    assert joined and all(tiles.classes_overlap for tiles in joined)


def _compare_with_plain(name, reduction, dtype, plan, classes=CLASSES):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, classes, dtype=dtype)
    options = cases.arrays(cases.OPTIONS[name], ROWS, classes, labels)
    moving = {k: options.pop(k) for k in ("bias", "temperature") if k in options}
    layout = "vh" if (len(name) + plan) % 2 else "hv"

    def total(hidden, kernel, moving):
        losses = linear_cross_entropy(
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            reduction=reduction,
            kernel_layout=layout,
            workspace_bytes=plan,
            **options,
            **moving,
        )
        if reduction == "mean":
            return losses
        return (losses * jnp.cos(jnp.arange(ROWS, dtype=losses.dtype))).sum()

    got = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(hidden, kernel, moving)
    exact = _plain(name, reduction, dtype, classes, "float64")
    plain = _plain(name, reduction, dtype, classes, dtype)
    leaves = zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True)
    for mine, theirs, truly in leaves:
        # Both round their gradients once to bfloat16, of 8 bits.
        slack = 2e-6 if mine.dtype == jnp.float32 else 4e-3
        truth.assert_as_good(mine, theirs, truly, slack=slack)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scale", [30, 1000])
def test_errors_at_large_activations(scale, reduction, dtype, x64):
    """Without a workspace products are as wide as the plain formula's, and as good."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype=dtype)
    hidden = scale * hidden

    def both(loss):
        def total(hidden, kernel):
            losses = loss(hidden, kernel, labels)
            if losses.ndim == 0:
                return losses
            return losses.mean() if reduction == "mean" else (losses**2).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1)))

    ours = both(functools.partial(linear_cross_entropy, reduction=reduction))
    plain = both(cases.plain_loss)
    wide = (hidden.astype("float64"), kernel.astype("float64"))
    results = (ours(hidden, kernel), plain(hidden, kernel), plain(*wide))
    for mine, theirs, truly in zip(*map(jax.tree.leaves, results), strict=True):
        slack = 2e-6 if mine.dtype == jnp.float32 else 4e-3
        truth.assert_as_good(mine, theirs, truly, slack=slack)


def _every_function(key, hidden, kernel, labels, values, teacher, **size: Any):
    """Yields every function that streams a layer and has a derivative, as a number."""
    ids = (labels[:, None] + jnp.arange(3, dtype=jnp.int32)[None]) % CLASSES
    ids = ids.at[0, 1].set(ids[0, 0])
    listed = jnp.log(jnp.full(ids.shape, 0.2))
    cosine = jnp.cos(jnp.arange(ROWS, dtype=jnp.float32))

    def log_prob(h, w):
        log_probs, entropies = jaxsoft.linear_log_prob(h, w, labels, **size)
        return (log_probs * cosine).sum() - entropies.sum()

    def log_prob_at(h, w):
        return (jaxsoft.linear_log_prob_at(h, w, ids, **size) ** 2).sum()

    def statistics(h, w):
        found = jaxsoft.linear_statistics(h, w, labels, **size)
        return (found.lse * cosine).sum() + found.label_logit.sum()

    def excluded(h, w):
        return jaxsoft.nt_xent(h, h[::-1] + w[:, :ROWS].T, **size)

    def expected(h, w, **more):
        return (jaxsoft.linear_expected(h, w, values, **size, **more) ** 2).sum()

    def top_k(h, w):
        return jaxsoft.linear_top_k(h, w, 4, **size)[0].sum()

    def distillation(h, w, **more):
        return jaxsoft.linear_distillation(h, w, hidden + 1, teacher, **size, **more)

    def of_both(h, w):
        return jaxsoft.linear_distillation(
            h, w, h[:, ::-1], w[::-1], teacher_gradient=True, temperature=2.0, **size
        )

    def listed_only(h, w, **more):
        return jaxsoft.linear_distillation_top_k(h, w, ids, listed, **size, **more)

    yield log_prob
    yield log_prob_at
    yield statistics
    yield excluded
    yield expected
    yield functools.partial(expected, key=key, hard=True)
    yield top_k
    yield distillation
    yield functools.partial(distillation, divergence="reverse_kl", reduction="sum")
    yield functools.partial(distillation, divergence="jensen_shannon", temperature=2.0)
    yield functools.partial(distillation, labels=labels, temperature=2.0)
    yield of_both
    yield listed_only
    yield functools.partial(listed_only, labels=labels, remaining="drop")
    yield functools.partial(listed_only, labels=labels, temperature=2.0)


@functools.cache
def _by_plan(index: int, plan: int):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES)
    rng = np.random.default_rng(3)
    values = jnp.asarray(rng.standard_normal((CLASSES, 5)), "float32")
    teacher = jnp.asarray(rng.standard_normal((FEATURES, CLASSES)), "float32")
    functions = _every_function(
        jax.random.key(0), hidden, kernel, labels, values, teacher, workspace_bytes=plan
    )
    function = list(functions)[index]
    return jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, kernel)


@pytest.mark.parametrize("plan", [p for p in PLANS.values() if p != RECOMPUTE])
@pytest.mark.parametrize("index", range(12))
@pytest.mark.many_cases
def test_every_function_by_every_plan(index, plan):
    close(_by_plan(index, plan), _by_plan(index, RECOMPUTE))


def _loss(plan: int, reduction: Any = "mean"):
    def loss(hidden, kernel, labels):
        losses = linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, workspace_bytes=plan
        )
        return (losses**2).sum()

    return loss


# The last case is of the default tier: z_loss alone shows a maximum that moves.
SECOND = [
    ("plain", "bfloat16"),
    *((name, "float32") for name in cases.OPTIONS if name != "z_loss"),
    ("z_loss", "float32"),
]


@BY_NAME
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name, dtype", SECOND)
@pytest.mark.many_cases
def test_forward_over_reverse(plan, reduction, name, dtype):
    """No derivative flows through what was kept, nor through the rows' maxima."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype=dtype)
    options = cases.arrays(cases.OPTIONS[name], ROWS, CLASSES, labels)
    moving = {
        k: jnp.asarray(options.pop(k)) for k in ("bias", "temperature") if k in options
    }

    def product(losses, *arrays):
        def total(hidden, kernel, moving):
            found = losses(hidden, kernel, labels, **moving, **options)
            return jnp.sum(found**2)

        gradient = jax.grad(total, (0, 1, 2))
        tangents = jax.tree.map(jnp.sin, arrays)
        return jax.jvp(gradient, arrays, tangents)

    def plain(hidden, kernel, labels, **options):
        losses = cases.plain_loss(hidden, kernel, labels, **options)
        if reduction == "none":
            return losses
        return losses.sum() / options.get("weights", jnp.ones(ROWS)).sum()

    ours = functools.partial(
        linear_cross_entropy, reduction=reduction, workspace_bytes=plan
    )
    got = jax.jit(functools.partial(product, ours))(hidden, kernel, moving)
    wide = [a.astype("float32") for a in (hidden, kernel)]
    truly = product(plain, *wide, moving)
    for mine, theirs in zip(*map(jax.tree.leaves, (got, truly)), strict=True):
        assert truth.error(mine, theirs) < (1e-5 if dtype == "float32" else 1e-2)


@BY_NAME
def test_batches(plan):
    hidden, kernel, labels = cases.layer(3 * ROWS, FEATURES, CLASSES)
    hidden, labels = hidden.reshape(3, ROWS, -1), labels.reshape(3, ROWS)
    gradient = jax.value_and_grad(_loss(plan), (0, 1))
    alone = [gradient(h, kernel, y) for h, y in zip(hidden, labels, strict=True)]
    values, (by_hidden, by_kernel) = jax.tree.map(lambda *a: jnp.stack(a), *alone)

    def total(hidden, kernel):
        return jax.vmap(_loss(plan), (0, None, 0))(hidden, kernel, labels).sum()

    close(
        jax.jit(jax.vmap(gradient, (0, None, 0)))(hidden, kernel, labels),
        (values, (by_hidden, by_kernel)),
    )
    close(
        jax.jit(jax.grad(total, (0, 1)))(hidden, kernel), (by_hidden, by_kernel.sum(0))
    )
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])
    by_kernels = [gradient(hidden[0], k, labels[0])[1] for k in kernels]
    mapped = jax.jit(jax.vmap(gradient, (None, 0, None)))(hidden[0], kernels, labels[0])
    close(mapped[1], jax.tree.map(lambda *a: jnp.stack(a), *by_kernels))


@BY_NAME
def test_many_cotangents_of_one_forward_pass(plan):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES)

    def losses(workspace):
        return lambda h: linear_cross_entropy(
            h, kernel, labels, reduction="none", workspace_bytes=workspace
        )

    jacobian = jax.jit(jax.jacrev(losses(plan)))(hidden)
    close(jacobian, jax.jacrev(losses(RECOMPUTE))(hidden))


@BY_NAME
@pytest.mark.parametrize("kind", ["unit", "zero", "peaked"])
def test_gradients_of_extreme_logits_in_bfloat16(plan, kind, x64):
    """Where a token is sure of its label, p - 1 has more digits than p."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, kind, "bfloat16")
    labels = jnp.argmax(hidden.astype("float32") @ kernel.astype("float32"), axis=1)

    def plain(hidden, kernel, labels):
        return (cases.plain_loss(hidden, kernel, labels) ** 2).sum()

    got = jax.jit(jax.grad(_loss(plan, "none"), (0, 1)))(hidden, kernel, labels)
    exact = jax.grad(plain, (0, 1))(
        *(a.astype("float64") for a in (hidden, kernel)), labels
    )
    theirs = jax.grad(plain, (0, 1))(hidden, kernel, labels)
    for mine, plainly, truly in zip(got, theirs, exact, strict=True):
        truth.assert_as_good(mine, plainly, truly, slack=4e-3)


def test_what_was_kept_of_other_classes_is_not_read():
    """Devices may lie otherwise in the backward pass; the numbers are garbage then."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="bfloat16")
    call = prepare("linear_statistics", hidden, kernel, labels)
    keep = Keep("weights", None, (16, 128))
    fold = Statistics(call.config, frozenset({"label"})).keeping(keep)
    arrays = call.arrays._replace(labels=labels[:, None].astype("int32"))
    saved, (kept,) = fold.forward(arrays, keep, fold.room(arrays, keep))
    moving = jax.tree.map(lambda _: False, arrays)._replace(hidden=True, kernel=True)
    cotangents: Any = Fields(None, jnp.ones(ROWS), -jnp.ones((ROWS, 1)))  # pyright: ignore
    program = _Gradients(fold, moving, is_guarded=True)
    right = fold.gradients(arrays, saved, cotangents, moving)
    found = program.call(arrays, saved, (kept,), cotangents)
    close(found, right, rtol=2e-2, atol=2e-2)
    assert kept.peaks is not None
    garbage = KeptAll(jnp.full_like(kept.numbers, jnp.nan), kept.peaks)
    assert np.isnan(program.call(arrays, saved, (garbage,), cotangents).hidden).any()
    for place in range(2):
        moved = KeptAll(garbage.numbers, kept.peaks.at[:, place].add(100))
        close(program.call(arrays, saved, (moved,), cotangents), right)


@BY_NAME
def test_rows_whose_first_tiles_are_masked(plan):
    """Their peak is far below 0, about which those tiles weigh nothing."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype="bfloat16")
    bias = jnp.full(CLASSES, -400.0)
    mask, labels = jnp.arange(CLASSES) >= 200, 200 + labels % 100

    def loss(plan):
        return lambda h, w: linear_cross_entropy(
            h, w, labels, bias=bias, class_mask=mask, workspace_bytes=plan
        )

    got = jax.jit(jax.grad(loss(plan), (0, 1)))(hidden, kernel)
    truly = jax.jit(jax.grad(loss(RECOMPUTE), (0, 1)))(hidden, kernel)
    for mine, theirs in zip(got, truly, strict=True):
        assert truth.error(mine, theirs) < 2e-2


@BY_NAME
@pytest.mark.parametrize("weighted", [False, True])
def test_a_scaled_loss_in_float16(plan, weighted):
    hidden, kernel, labels = cases.layer(256, FEATURES, 600, dtype="float16")
    weights = jnp.full(256, 2.0) if weighted else None

    def scaled(loss):
        return jax.jit(jax.grad(lambda h, w: 2.0**14 * loss(h, w), (0, 1)))

    def ours(hidden, kernel):
        return linear_cross_entropy(
            hidden, kernel, labels, weights=weights, workspace_bytes=plan
        )

    def plain(hidden, kernel):
        return cases.plain_loss(hidden, kernel, labels).mean()

    exact = scaled(plain)(hidden.astype("float32"), kernel.astype("float32"))
    for mine, theirs in zip(scaled(ours)(hidden, kernel), exact, strict=True):
        assert truth.error(mine, theirs) < 2e-3


# What is below is counted in products of N·H·V multiplications and additions.
SIZES = (256, 64, 2048)


def products(function, dtype=jnp.float32) -> float:
    """Returns how many products a program computes, every turn of a loop counted."""
    rows, features, classes = SIZES
    shapes = [
        jax.ShapeDtypeStruct((rows, features), dtype),
        jax.ShapeDtypeStruct((features, classes), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]
    jaxpr = jax.make_jaxpr(function)(*shapes)
    return _flops(jaxpr.jaxpr) / (2 * rows * features * classes)


def _flops(jaxpr) -> float:
    """Returns the flops of a program's matrix products."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = np.prod([shape[i] for i in contracted])
            total += 2 * depth * np.prod(equation.outvars[0].aval.shape)
        inner = [_flops(j) for j in _inner(equation)]
        if equation.primitive.name == "cond":
            # At most: the dearer branch.
            total += max(inner)
        elif inner:
            total += _turns(equation) * sum(inner)
    return total


def _inner(equation):
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _turns(equation) -> int:
    """Returns how often a loop turns: scans say it, no other loop of ours is left."""
    return equation.params.get("length", 1)


@pytest.mark.parametrize(
    "plan, wanted, expected",
    [
        (RECOMPUTE, (0, 1), 4),
        (ALL, (0, 1), 3),
        (CHUNKS, (0, 1), 3),
        (RECOMPUTE, 0, 3),
        (ALL, 0, 2),
        (CHUNKS, 0, 2),
        (CHUNKS, 1, 2),
        (RECOMPUTE, 1, 3),
    ],
)
def test_products_of_a_gradient(plan, wanted, expected):
    assert products(jax.value_and_grad(_loss(plan), wanted)) == pytest.approx(
        expected, rel=0.01
    )


def dots(function, *arrays) -> int:
    """Returns how many matrix products a program has that something uses."""
    jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
    live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return str(live).count("dot_general[")


@pytest.mark.parametrize("plan", [RECOMPUTE, ALL, CHUNKS], ids=["8", "6", "chunks"])
def test_a_loss_that_needs_no_gradient_pays_for_none(plan):
    layer = cases.layer(ROWS, FEATURES, CLASSES)
    loss = _loss(plan)

    def with_aux(hidden, kernel, labels):
        gradient, aux = jax.grad(
            lambda h: (jnp.sum(h * h), loss(h, kernel, labels)), has_aux=True
        )(hidden)
        return gradient, aux

    value = dots(loss, *layer)
    assert dots(with_aux, *layer) == value
    gradient = dots(jax.grad(loss, (0, 1)), *layer)
    again = dots(jax.grad(jax.checkpoint(loss), (0, 1)), *layer)
    # The forward pass of a function that is run again computes the value alone.
    assert value < gradient <= again <= gradient + value


@BY_NAME
@pytest.mark.parametrize("cotangent", [1.0, -3.0, 2.0**15])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.many_cases
def test_cotangents_of_a_reduced_loss(plan, cotangent, dtype):
    """A loss is scaled lest gradients of 16 bits vanish; it may be used twice."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype=dtype)

    def scaled(loss):
        def total(hidden, kernel):
            value = loss(hidden, kernel, labels)
            return cotangent * value + value * 0.5

        return total

    def plain(hidden, kernel, labels):
        hidden, kernel = hidden.astype("float32"), kernel.astype("float32")
        return cases.plain_loss(hidden, kernel, labels).mean() ** 2

    got = jax.jit(jax.grad(scaled(_loss(plan)), (0, 1)))(hidden, kernel)
    exact = jax.grad(scaled(plain), (0, 1))(hidden, kernel)
    for mine, theirs in zip(got, exact, strict=True):
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        assert truth.error(mine, theirs) < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_scaled_tile_by_tile(dtype, monkeypatch):
    """So are they on a TPU; the last tile overlaps the one before."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype=dtype)
    scale = jnp.float32(-3.0)

    def scaled(scale, hidden, kernel):
        return scale * _loss(CHUNKS)(hidden, kernel, labels)

    def gradients():
        return jax.jit(jax.grad(scaled, (1, 2)))(scale, hidden, kernel)

    as_here = gradients()
    shapes = []

    def by_tiles(sums, *others):
        shapes.append(sums.shape)
        return reduced_losses._scaled_by_tiles(sums, *others)

    # Several devices may share the classes, and a slice of them gathers.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(reduced_losses, "_SCALED", 1)
    monkeypatch.setattr(reduced_losses, "_scaled_columns", by_tiles)
    jax.clear_caches()
    as_there = gradients()
    assert shapes == [(FEATURES, CLASSES)]
    for mine, theirs in zip(as_there, as_here, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@BY_NAME
def test_gradients_under_a_scan(plan):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES)

    def total(kernel):
        def step(kernel, hidden):
            loss, slope = jax.value_and_grad(_loss(plan), 1)(hidden, kernel, labels)
            return kernel - slope, loss

        kernel, losses = jax.lax.scan(step, kernel, jnp.stack([hidden, hidden[::-1]]))
        return losses, kernel

    def plain(kernel):
        losses = []
        for states in (hidden, hidden[::-1]):
            loss, slope = jax.value_and_grad(_loss(RECOMPUTE), 1)(
                states, kernel, labels
            )
            kernel = kernel - slope
            losses.append(loss)
        return jnp.stack(losses), kernel

    close(jax.jit(total)(kernel), plain(kernel))
