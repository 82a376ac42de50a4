"""The Mosaic TPU kernels in JAX's interpreter of TPUs, which has races and garbage.

What a block holds beyond its array is NaN there, as is all memory before it is written.
Blocks are small: there are several of each kind, and the last ones are not full.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import linear_cross_entropy, linear_log_prob, linear_statistics
from jaxsoft.kernels.layer.mosaic_tpu import backward, forward
from jaxsoft.kernels.layer.mosaic_tpu import blocks as choices
from jaxsoft.kernels.layer.mosaic_tpu.blocks import LANES, LayerShape, TpuBlocks
from jaxsoft.linear.folds.statistics import Statistics
from jaxsoft.linear.tiles import Tile, columns_of
from tests import truth
from tests.kernels.interpreters import tpu_interpreter
from tests.linear import cases

ROWS, FEATURES, CLASSES = 37, 23, 293
TPU: dict[str, Any] = {"implementation": "mosaic_tpu"}
# The options of a layout; both together have them all.
OPTIONS: dict[str, dict[str, Any]] = {
    "hv": {"bias": True, "class_mask": True, "temperature": True, "z_loss": 0.1},
    "vh": {"logit_softcap": 0.7, "label_smoothing": 0.2, "temperature": 0.6},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Takes blocks of 128 classes and of 32 rows; of 16 backward, in three parts."""
    monkeypatch.setattr(backward, "CHUNK", 16)
    monkeypatch.setattr(backward, "PART", 48)
    for module, name, rows in (
        (forward, "choose_forward", 32),
        (backward, "choose_backward", 16),
    ):
        blocks = TpuBlocks(rows, 128, 2**20)
        monkeypatch.setattr(module, name, lambda *_, chosen=blocks: chosen)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def interpreter():
    """Interprets kernels, and fails where two accesses race."""
    with tpu_interpreter():
        yield


def _wide(tree):
    return jax.tree.map(
        lambda a: a.astype("float64") if jnp.issubdtype(a.dtype, jnp.floating) else a,
        tree,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", OPTIONS)
def test_losses_and_gradients_match_float64(
    layout, dtype, small_blocks, interpreter, x64
):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES, dtype=dtype)
    options = cases.arrays(OPTIONS[layout], ROWS, CLASSES, labels, dtype)
    if layout == "vh":
        options["temperature"] = jnp.full(ROWS, 0.6, "float32")
    moving = {k: options.pop(k) for k in ("bias", "temperature") if k in options}
    cotangent = np.random.default_rng(1).standard_normal(ROWS)
    cotangent[:3] = 0

    def plain(hidden, kernel, moving):
        return cases.plain_loss(hidden, kernel, labels, **options, **moving)

    def ours(hidden, kernel, moving):
        return linear_cross_entropy(
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            kernel_layout=layout,
            reduction="none",
            **TPU,
            **options,
            **moving,
        )

    def run(loss, args):
        def total(*args):
            each = loss(*args)
            return (each * cotangent.astype(each.dtype)).sum(), each

        both = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
        gradients, losses = both(*args)
        return jax.tree.leaves((losses, gradients))

    args = (hidden, kernel, moving)
    got, same, exact = run(ours, args), run(plain, args), run(plain, _wide(args))
    types = [a.dtype for a in got]
    assert types == [jnp.float32] + [a.dtype for a in jax.tree.leaves(args)]
    slack = 2e-6 if dtype == "float32" else 4e-3
    for mine, theirs, truly in zip(got, same, exact, strict=True):
        truth.assert_as_good(mine, theirs, truly, slack)
    assert (np.asarray(got[1])[:3] == 0).all()


@pytest.mark.parametrize("tau", [0.0, 1.5, "rows"])
def test_statistics_equal_those_of_the_loops(tau, small_blocks, interpreter):
    """All fields, at the limits of the temperature too, and where numbers are bad."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES)
    if tau == "rows":
        limits = [0, 1e-40, np.inf, np.nan, 3e38, 1.2e-38, -1]
        tau = jnp.asarray(np.resize(limits + [0.3, 2], ROWS), "float32")
    hidden = hidden.at[9].set(jnp.nan)
    labels = labels.at[4:7].set(jnp.asarray([-1, CLASSES, 5]))
    bias = jnp.zeros(CLASSES).at[5].set(-jnp.inf)

    def run(tau, name):
        return linear_statistics(
            hidden,
            kernel,
            labels,
            bias=bias,
            temperature=tau,
            return_argmax=True,
            implementation=name,
        )

    found = [
        # A negative temperature is refused unless it is traced.
        jax.jit(run, static_argnums=1)(tau, name)
        if isinstance(tau, jax.Array)
        else run(tau, name)
        for name in ("mosaic_tpu", "xla")
    ]
    others = np.arange(ROWS) != 9
    for mine, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        if mine.ndim:
            mine, theirs = mine[others], theirs[others]
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6)
    assert np.isfinite(found[0].max[others]).all()


def test_what_is_masked_counts_for_nothing(small_blocks, interpreter):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES)
    hidden = hidden.at[3].set(jnp.nan)
    labels = labels.at[3].set(-100)

    # The logits of rows that only fill a block would overflow on their own.
    bias = jnp.full(CLASSES, 200.0)

    def loss(hidden, kernel, mask):
        return linear_cross_entropy(
            hidden,
            kernel,
            labels,
            bias=bias,
            class_mask=mask,
            ignore_label=-100,
            **TPU,
        )

    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (dhidden, dkernel) = both(hidden, kernel, jnp.ones(CLASSES, bool))
    assert np.isfinite(value) and np.isfinite(dkernel).all()
    assert (dhidden[3] == 0).all() and (dhidden[4] != 0).any()
    nothing = both(hidden, kernel, jnp.zeros(CLASSES, bool))
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(nothing))


def test_entropy_and_sharded_classes(small_blocks, interpreter):
    """Gradients of log-probabilities and entropies, their classes over two devices."""
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, 2 * 149)
    tau = jnp.asarray(np.random.default_rng(2).uniform(0.3, 2, ROWS), "float32")

    def loss(hidden, kernel, tau, **options):
        log_prob, entropy = linear_log_prob(
            hidden, kernel, labels, temperature=tau, **options
        )
        return (log_prob * 0.3 + entropy).sum()

    mesh = Mesh(np.array(jax.devices()[:2]), ("vocab",))

    def sharded(*args):
        body = lambda *a: loss(*a, vocab_axis="vocab", **TPU)  # noqa: E731
        specs = (P(), P(None, "vocab"), P())
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())(*args)

    args = (hidden, kernel, tau)
    mine, theirs = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args) for f in (sharded, loss)
    )
    for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_single_row_and_class_and_a_batch(interpreter):
    """Blocks larger than their arrays, one of each kind: sums never leave VMEM."""
    hidden, kernel, labels = cases.layer(1, 5, 1)
    alone = lambda h, w: linear_cross_entropy(h, w, labels, **TPU)  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(alone, (0, 1)))(hidden, kernel)
    assert value == 0 and all((np.asarray(g) == 0).all() for g in grads)
    hidden, kernel, labels = cases.layer(6, 5, 139)

    def loss(hidden, kernel, labels, **options):
        def one(hidden, labels):
            return linear_cross_entropy(hidden, kernel, labels, **options)

        each = jax.vmap(one)
        return each(hidden.reshape(2, 3, 5), labels.reshape(2, 3)).sum()

    mine, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1)))(
            hidden, kernel, labels
        )
        for options in (TPU, {})
    )
    for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("kind", truth.DISTRIBUTIONS)
@pytest.mark.parametrize("classes", [3, 1000, 50257])
def test_statistics_of_lanes_join_to_those_of_rows(classes, kind):
    """Without a kernel, whose interpreter is slow: every lane starts and ends alone."""
    rows, tau, size = 8, 0.7, 1024
    wanted = frozenset({"label", "mean", "expected", "argmax"})
    fold = Statistics(cast(Any, None), wanted)
    u = truth.logits(kind, (rows, classes))
    labels = jnp.asarray(np.linspace(0, classes - 1, rows), jnp.int32)[:, None]
    padded = np.full((rows, -(-classes // size) * size), -np.inf, np.float32)
    padded[:, :classes] = u
    columns = {
        name: jnp.broadcast_to(a[None], (1, rows, LANES))
        for name, a in fold.empty(rows, 1, jnp.float32).items()
    }
    merge = jax.jit(
        lambda columns, u, start: fold.merge(
            columns,
            Tile(start, u, u, True, columns_of(labels, start, size), None).by_lanes(
                LANES
            ),
            tau,
        )
    )
    for start in range(0, padded.shape[1], size):
        columns = merge(columns, jnp.asarray(padded[:, start : start + size]), start)
    got = {
        name: np.asarray(a)[:, 0]
        for name, a in fold.join_lanes(
            {k: a[0] for k, a in columns.items()}, tau
        ).items()
    }
    c = truth.centred(u, tau)
    total = np.exp(c).sum(1)
    np.testing.assert_array_equal(got["max"], u.max(1))
    np.testing.assert_array_equal(got["argmax"], u.argmax(1))
    np.testing.assert_array_equal(got["label"], u[np.arange(rows), labels[:, 0]])
    np.testing.assert_array_equal(got["number"], classes)
    np.testing.assert_allclose(got["sum"], total, rtol=1e-5)
    np.testing.assert_allclose(got["gap"] / classes, c.mean(1) * tau, rtol=1e-5)
    weighted = (np.exp(c) * c).sum(1)
    np.testing.assert_allclose(got["weighted"], weighted, rtol=2e-5, atol=1e-6)


def _results_of_kernels(function, *args):
    """Returns the shapes that each kernel of a program writes, by its name."""
    found = {}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                shapes = [v.aval.shape for v in equation.outvars]
                found[equation.params["name"]] = shapes
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_no_gradient_is_built_that_is_not_wanted():
    hidden, kernel, labels = cases.layer(32, 8, 300)
    tau = jnp.ones(32)

    def loss(hidden, kernel, tau):
        return linear_cross_entropy(hidden, kernel, labels, temperature=tau, **TPU)

    wanted = {0: [(32, 128)], 1: [(8, 300)], 2: [(32, 128)]}
    for number, shapes in wanted.items():
        found = _results_of_kernels(jax.grad(loss, number), hidden, kernel, tau)
        assert found == {
            "jaxsoft_statistics_forward": [(32, 128)],
            "jaxsoft_statistics_backward": shapes,
        }
    assert _results_of_kernels(loss, hidden, kernel, tau).keys() == {
        "jaxsoft_statistics_forward"
    }


def test_forward_over_reverse_takes_the_loops():
    """A kernel has no derivative of its own: XLA's loops, which have, run instead."""
    hidden, kernel, labels = cases.layer(9, 5, 139)
    direction = jnp.asarray(np.random.default_rng(3).standard_normal((5, 139)), "f")

    def product(**options):
        gradient = jax.grad(
            lambda w: linear_cross_entropy(hidden, w, labels, **options)
        )
        return jax.jvp(gradient, (kernel,), (direction,))[1]

    np.testing.assert_allclose(product(**TPU), product(), rtol=1e-6, atol=1e-9)
    assert np.abs(product()).max() > 1e-4


def test_errors():
    hidden, kernel, labels = cases.layer(4, 5, 17)
    with pytest.raises(NotImplementedError, match='must be None or "xla" on cpu'):
        linear_cross_entropy(hidden, kernel, labels, **TPU)
    for name, args in {
        "hidden": (hidden.astype("float16"), kernel),
        "kernel": (hidden, kernel.astype("float16")),
    }.items():
        with pytest.raises(NotImplementedError, match=f"`{name}` must have dtype"):
            linear_statistics(*args, **TPU)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        linear_log_prob(hidden.astype("float64"), kernel, labels, **TPU)
    with pytest.raises(NotImplementedError, match="linear_log_prob_at"):
        jaxsoft.linear_log_prob_at(hidden, kernel, labels[:, None], **TPU)
    with pytest.raises(NotImplementedError, match="fewer features"):
        wide = jax.ShapeDtypeStruct((64, 2**17), "float32")
        rows = jax.ShapeDtypeStruct((2**17, 300), "float32")
        jax.eval_shape(lambda h, w: linear_statistics(h, w, **TPU), wide, rows)


def test_blocks_fit_and_are_balanced():
    llama = LayerShape(4096, 4096, 128256, 2, 2, 2)
    small, large = 64 * 2**20, 128 * 2**20
    forward = choices.choose_forward(llama, small)
    assert (forward.rows, forward.classes) == (1024, 768)
    assert forward.vmem_bytes < small
    both = [choices.choose_backward(llama, True, True, vmem) for vmem in (small, large)]
    assert [(b.rows, b.classes) for b in both] == [(256, 512), (512, 1024)]
    few = choices.choose_forward(LayerShape(1100, 64, 300, 4, 4, 4), small)
    assert (few.rows, few.classes) == (560, 384)
    for rows, classes, vmem in ((8, 128, 1), (24, 128, 1), (16, 64, 1), (16, 128, 0)):
        with pytest.raises(ValueError, match="must be"):
            TpuBlocks(rows, classes, vmem)
