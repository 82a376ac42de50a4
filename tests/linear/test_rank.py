"""Ranks of labels and best classes beside statistics: those of the same logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxsoft import linear_statistics, linear_top_k, over_mesh
from tests import truth
from tests.linear import cases
from tests.linear.plans import PLANS, chosen_plans

IMPLEMENTATIONS = ("xla", "reference")
# No room for a second look at products; for that of some rows; of all.
TILE = 4 * 8 * 128
WORKSPACES = (TILE, 2**21, None)
WAYS = [(workspace, "xla") for workspace in WORKSPACES] + [(None, "reference")]

__all__ = ["chosen_plans"]


def statistics_of(*layer, **options) -> Any:
    """Returns the statistics of a layer; which are there is for the call to say."""
    return linear_statistics(*layer, **options)


def rank_of(u, labels):
    """Returns how many logits are larger than the label's, or equal and before it."""
    ranks = []
    for row, label in zip(u, labels, strict=True):
        has_label = 0 <= label < len(row) and row[label] > -np.inf
        if not (has_label and (row < np.inf).all()):
            ranks.append(len(row))
            continue
        own = row[label]
        ranks.append((row > own).sum() + (row[:label] == own).sum())
    return np.asarray(ranks)


@functools.partial(
    jax.jit, static_argnames=("workspace", "implementation", "k", "logit_softcap")
)
def ranked(hidden, kernel, labels, workspace, implementation=None, k=None, **options):
    return statistics_of(
        hidden,
        kernel,
        labels,
        return_rank=True,
        return_top_k=k,
        workspace_bytes=workspace,
        implementation=implementation,
        **options,
    )


def layer_of_integers(rows, classes, seed=0):
    """Returns a layer with exact logits, many of them equal."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-1, 2, (rows, 8)).astype("float32")
    kernel = rng.integers(-1, 2, (8, classes)).astype("float32")
    return hidden, kernel, rng.integers(0, classes, rows)


@pytest.mark.parametrize("workspace, implementation", WAYS)
@pytest.mark.parametrize("classes", [1, 3, 1009, 3001])
def test_equal_logits_rank_by_class(classes, workspace, implementation):
    rows = 333 if classes > 1000 else 13
    hidden, kernel, labels = layer_of_integers(rows, classes)
    k = min(classes, 5)
    found = ranked(hidden, kernel, labels, workspace, implementation, k)
    u = hidden @ kernel
    np.testing.assert_array_equal(found.rank, rank_of(u, labels))
    assert found.rank.dtype == found.top_ids.dtype == jnp.int32
    best = np.argsort(-u, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.top_ids, best)
    is_best = np.asarray(found.top_ids) == labels[:, None]
    np.testing.assert_array_equal(is_best.any(1), np.asarray(found.rank) < k)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "classes",
    [3, 1000, pytest.param(50257, marks=pytest.mark.slow)],
)
def test_everything_matches_float64(classes, kind):
    rows, k, tau = 13, 3, 0.7
    hidden, kernel, labels = cases.layer(rows, 16, classes, kind)
    u = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    plain = np.asarray(hidden) @ np.asarray(kernel)
    own = u[np.arange(rows), labels][:, None]
    rounding = 4 * np.abs(plain - u).max() + 1e-6 * np.abs(u).max()
    exact = truth.log_softmax(u, tau)
    for workspace in (TILE, None):
        found = ranked(hidden, kernel, labels, workspace, k=k, temperature=tau)
        rank = np.asarray(found.rank)
        # Equal logits are ordered by class, and so may be those within rounding.
        assert (rank >= (u > own + rounding).sum(1)).all()
        assert (rank <= (u >= own - rounding).sum(1) - 1).all()
        if kind == "zero":
            np.testing.assert_array_equal(rank, labels)
        log_probs, ids = linear_top_k(
            hidden, kernel, k, temperature=tau, workspace_bytes=workspace
        )
        if kind != "offset":
            np.testing.assert_array_equal(found.top_ids, ids)
        np.testing.assert_allclose(found.top_log_probs, log_probs, rtol=2e-5, atol=1e-5)
        at = np.take_along_axis(exact, np.asarray(found.top_ids), 1)
        same = truth.log_softmax(plain, np.float32(tau))
        same = np.take_along_axis(same, np.asarray(found.top_ids), 1)
        truth.assert_as_good(found.top_log_probs, same, at, slack=3e-6)
        others = statistics_of(
            hidden, kernel, labels, temperature=tau, workspace_bytes=workspace
        )
        for name in ("lse", "log_prob", "entropy"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(others, name), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_both_looks_at_a_logit_see_the_same_bits(workspace):
    """The class that comes third is beaten by two, neither by itself nor by less."""
    hidden, kernel, labels = cases.layer(333, 64, 3001)
    bias = np.random.default_rng(2).standard_normal(3001).astype("float32")
    step = functools.partial(
        ranked, hidden, kernel, workspace=workspace, k=9, bias=bias, logit_softcap=3.0
    )
    best = np.asarray(step(labels).top_ids)
    for place in (0, 2, 8):
        np.testing.assert_array_equal(step(best[:, place]).rank, place)


@pytest.mark.parametrize("workspace, implementation", WAYS)
def test_labels_that_are_no_kept_class_rank_last(workspace, implementation):
    hidden, kernel, labels = layer_of_integers(21, 300)
    labels[:4] = [-1, 300, -100, 7]
    mask = np.ones(300, bool)
    mask[[7, 11]] = False
    mask[labels[4:]] = True
    bias = np.where(np.arange(300) == 20, -np.inf, 0).astype("float32")
    labels[5] = 20
    hidden[6, 0] = np.nan
    hidden[:, 1], kernel[1, 30] = 0, np.inf
    hidden[7, 1] = 1
    hidden[8:, 1], hidden[8:, 2] = -1, 1
    options = {"class_mask": mask, "bias": bias}
    found = ranked(hidden, kernel, labels, workspace, implementation, **options)
    with np.errstate(invalid="ignore"):
        u = np.where(mask, hidden @ kernel + bias, -np.inf)
    expected = rank_of(u, labels)
    np.testing.assert_array_equal(found.rank, expected)
    assert (expected[:8] == 300).all() and (expected[8:] < 300).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_batches_and_layouts(dtype):
    hidden, kernel, labels = layer_of_integers(24, 1009)
    with jax.enable_x64(True):
        wide = jnp.asarray(hidden, dtype).reshape(4, 6, 8)
        found = statistics_of(
            wide,
            jnp.asarray(kernel.T, dtype),
            labels.reshape(4, 6),
            kernel_layout="vh",
            temperature=jnp.full((4, 6), 0.5),
            return_rank=True,
            return_top_k=4,
            workspace_bytes=2**16,
        )
        assert found.rank.shape == (4, 6) and found.top_ids.shape == (4, 6, 4)
        mapped = jax.vmap(
            lambda h, y: (
                statistics_of(
                    h, kernel, y, return_rank=True, workspace_bytes=2**16
                ).rank
            )
        )(hidden.reshape(4, 6, 8), labels.reshape(4, 6))
    expected = rank_of(hidden @ kernel, labels)
    np.testing.assert_array_equal(np.ravel(found.rank), expected)
    np.testing.assert_array_equal(np.ravel(mapped), expected)
    assert found.top_log_probs.dtype == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("tau", [0.0, np.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_limits_of_the_temperature_keep_the_ranks(tau, implementation):
    hidden, kernel, labels = layer_of_integers(13, 300)
    found = ranked(hidden, kernel, labels, TILE, implementation, 7, temperature=tau)
    u = hidden @ kernel
    np.testing.assert_array_equal(found.rank, rank_of(u, labels))
    log_probs, ids = linear_top_k(hidden, kernel, 7, temperature=tau)
    np.testing.assert_array_equal(found.top_ids, ids)
    np.testing.assert_allclose(found.top_log_probs, log_probs, rtol=1e-6)


def test_without_a_row_and_without_labels():
    hidden, kernel, labels = layer_of_integers(3, 300)
    none = statistics_of(
        hidden[:0], kernel, labels[:0], return_rank=True, return_top_k=4
    )
    assert none.rank.shape == (0,) and none.top_ids.shape == (0, 4)
    assert none.top_log_probs.shape == (0, 4) and none.rank.dtype == jnp.int32
    found = statistics_of(hidden, kernel, return_top_k=4)
    assert found.rank is None and found.label is None
    best = np.argsort(-(hidden @ kernel), axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.top_ids, best)
    few = statistics_of(
        hidden, kernel, labels, class_mask=np.arange(300) < 2, return_top_k=4
    )
    np.testing.assert_array_equal(few.top_ids[:, 2:], -1)
    np.testing.assert_array_equal(few.top_log_probs[:, 2:], -np.inf)


def total(statistics, k):
    """Returns a number made of all statistics, and the ranks."""
    weights = jnp.cos(jnp.arange(1.0, statistics.lse.size + 1))
    loss = (weights * statistics.log_prob).sum() + (statistics.entropy**2).sum()
    if k is not None:
        of_best = jnp.sin(jnp.arange(1.0, k + 1))[None] * weights[:, None]
        loss += (of_best * statistics.top_log_probs).sum() + statistics.lse.sum()
    return loss, (statistics.rank, statistics.top_ids)


@functools.partial(jax.jit, static_argnums=0)
def plain_step(k, *args):
    def plain(hidden, kernel, bias, tau, labels):
        u = (hidden @ kernel + bias[None]) / tau[:, None]
        log_p = jax.nn.log_softmax(u)
        weights = jnp.cos(jnp.arange(1.0, len(u) + 1))
        own = jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
        entropy = -(jnp.exp(log_p) * log_p).sum(1)
        loss = (weights * own).sum() + (entropy**2).sum()
        if k is not None:
            of_best = jnp.sin(jnp.arange(1.0, k + 1))[None] * weights[:, None]
            best = jax.lax.top_k(log_p, k)[0]
            loss += (of_best * best).sum() + jax.nn.logsumexp(u, axis=1).sum()
        return loss

    return jax.value_and_grad(plain, (0, 1, 2, 3))(*args)


@pytest.mark.many_cases
@pytest.mark.parametrize(
    "plan, implementation",
    [(plan, "xla") for plan in ("none", *PLANS)] + [("none", "reference")],
)
@pytest.mark.parametrize("k", [None, 3])
def test_gradients_by_every_plan(k, plan, implementation):
    """Ranks beside a gradient; best classes have one of their own."""
    workspace = PLANS.get(plan, TILE)
    hidden, kernel, labels = cases.layer(21, 8, 300)
    bias = np.random.default_rng(3).standard_normal(300).astype("float32")
    tau = np.linspace(0.5, 1.5, 21).astype("float32")

    @jax.jit
    def step(hidden, kernel, bias, tau):
        def loss(hidden, kernel, bias, tau):
            found = statistics_of(
                hidden,
                kernel,
                labels,
                bias=bias,
                temperature=tau,
                return_rank=True,
                return_top_k=k,
                workspace_bytes=workspace,
                implementation=implementation,
            )
            return total(found, k)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(
            hidden, kernel, bias, tau
        )

    (value, (rank, ids)), grads = step(hidden, kernel, bias, tau)
    expected, true = plain_step(k, hidden, kernel, bias, tau, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(grads, true, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(rank, rank_of(hidden @ kernel + bias[None], labels))
    if k is not None:
        best = jax.lax.top_k(hidden @ kernel + bias[None], k)[1]
        np.testing.assert_array_equal(ids, best)


@pytest.mark.parametrize("workspace", [TILE, None])
def test_second_derivatives(workspace):
    """Forward over reverse, of everything that has a derivative."""
    hidden, kernel, labels = cases.layer(5, 4, 150)
    tangent = jnp.cos(jnp.arange(20.0)).reshape(5, 4)
    ones = jnp.ones(5)

    def ours(hidden):
        found = statistics_of(
            hidden,
            kernel,
            labels,
            return_rank=True,
            return_top_k=2,
            workspace_bytes=workspace,
        )
        return total(found, 2)[0]

    def plain(hidden):
        return plain_step(2, hidden, kernel, jnp.zeros(150), ones, labels)[1][0]

    @jax.jit
    def both(hidden):
        found = jax.jvp(jax.grad(ours), (hidden,), (tangent,))
        return found, jax.jvp(plain, (hidden,), (tangent,))

    for found, exact in zip(*both(hidden), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_memory_is_free_of_rows_times_classes():
    """At V = 131072, 512 rows: 256 MiB of logits, with a gradient and without."""
    shape = jax.ShapeDtypeStruct
    args = (
        shape((512, 64), jnp.float32),
        shape((64, 131072), jnp.float32),
        shape((512,), jnp.int32),
    )

    def loss(hidden, kernel, labels):
        found = statistics_of(
            hidden,
            kernel,
            labels,
            return_rank=True,
            return_top_k=8,
            workspace_bytes=2**24,
        )
        return total(found, 8)

    def step(*args):
        return loss(*args), jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)

    analysis = jax.jit(step).lower(*args).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes <= 40 * 2**20


def test_equal_logits_rank_by_class_whatever_shard_they_are_on():
    hidden, kernel, labels = layer_of_integers(24, 1208)
    mesh = Mesh(np.asarray(jax.devices()), ("vocab",))
    over = over_mesh(linear_statistics, mesh, vocab_axis="vocab")
    for workspace in (TILE, None):
        found = over(
            hidden,
            kernel,
            labels,
            return_rank=True,
            return_top_k=5,
            workspace_bytes=workspace,
        )
        u = hidden @ kernel
        np.testing.assert_array_equal(found.rank, rank_of(u, labels))
        best = np.argsort(-u, axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(found.top_ids, best)


def test_messages():
    hidden, kernel, labels = layer_of_integers(3, 30)
    with pytest.raises(ValueError, match="`labels` must be given with return_rank"):
        statistics_of(hidden, kernel, return_rank=True)
    with pytest.raises(ValueError, match="`return_top_k` must be at most V = 30, got"):
        statistics_of(hidden, kernel, labels, return_top_k=31)
    with pytest.raises(ValueError, match="`return_top_k` must be at least 1, got 0"):
        statistics_of(hidden, kernel, labels, return_top_k=0)
    match = '"xla" or "reference" with return_rank'
    layer = functools.partial(
        linear_statistics, hidden, kernel, labels, implementation="mosaic_tpu"
    )
    with pytest.raises(NotImplementedError, match=match):
        layer(return_rank=True)
    with pytest.raises(NotImplementedError, match=match):
        layer(return_top_k=3)
