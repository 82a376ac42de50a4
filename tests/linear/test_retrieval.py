"""The in-batch softmax of retrieval against stored logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import MixedNegatives, in_batch_cross_entropy
from tests import truth
from tests.linear import cases
from tests.linear.plans import PLANS, PLANS_OF_GPUS, chosen_plans

__all__ = ["chosen_plans"]

COUNT, MORE, WIDTH = 33, 20, 7
TILE = 4 * 8 * 128


def arrays_of(count=COUNT, more=MORE, dtype="float64", kind="unit", seed=0):
    """Returns queries, candidates and log-probabilities, of the batch and beside it.

    Args:
      count: N.
      more: M.
      dtype: of the embeddings.
      kind: of the logits without correction.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((count, WIDTH))
    candidates = rng.standard_normal((count + more, WIDTH))
    if kind == "zero":
        candidates *= 0
    elif kind == "peaked":
        candidates *= 20
    elif kind == "offset":
        queries[:, 0], candidates[:, 0] = 256, 128
    elif kind == "negative":
        queries[:, 0], candidates[:, 0] = 1, -20
        queries[:, 1:] *= 1e-3
    log_q = np.log(rng.uniform(0.01, 1, count + more))
    wide = "float64" if dtype == "float64" else "float32"
    return {
        "queries": queries.astype(dtype),
        "candidates": candidates[:count].astype(dtype),
        "extra": candidates[count:].astype(dtype),
        "log_q": log_q[:count].astype(wide),
        "extra_log_q": log_q[count:].astype(wide),
        "tau": np.asarray(0.7, wide),
    }


def ids_of(count=COUNT, more=MORE):
    rng = np.random.default_rng(5)
    return rng.integers(0, 9, count), rng.integers(0, 12, more)


# Which arrays a call takes beside queries and candidates.
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "log_q": ("log_q",),
    "ids": ("log_q", "ids"),
    "extra": ("extra",),
    "extra with ids": ("log_q", "ids", "extra", "extra_log_q", "extra_ids"),
    "extra without ids": ("ids", "extra", "extra_log_q"),
}


def call(arrays, kind, **options) -> Any:
    """Calls the function with the arrays of a kind."""
    names = KINDS[kind]
    count, more = len(arrays["queries"]), len(arrays["extra"])
    ids = dict(zip(("ids", "extra_ids"), ids_of(count, more), strict=True))
    given = {n: (arrays | ids)[n] if n in names else None for n in (*arrays, *ids)}
    extra = None
    if "extra" in names:
        others = (given["extra_log_q"], given["extra_ids"])
        extra = MixedNegatives(arrays["extra"], *others)
    return in_batch_cross_entropy(
        arrays["queries"],
        arrays["candidates"],
        given["log_q"],
        given["ids"],
        extra,
        temperature=arrays["tau"],
        **options,
    )


def plain_logits(arrays, kind):
    """Returns the logits [N, N + M], -inf at accidental hits."""
    names, count = KINDS[kind], len(arrays["queries"])
    candidates, log_q = arrays["candidates"], jnp.zeros_like(arrays["log_q"])
    ids, extra_ids = ids_of(count, len(arrays["extra"]))
    log_q = arrays["log_q"] if "log_q" in names else log_q
    others = ids
    if "extra" in names:
        candidates = jnp.concatenate([candidates, arrays["extra"]])
        more = arrays["extra_log_q"]
        more = more if "extra_log_q" in names else jnp.zeros_like(more)
        log_q = jnp.concatenate([log_q, more])
        extra_ids = extra_ids if "extra_ids" in names else extra_ids * 0 - 1
        others = np.concatenate([ids, extra_ids])
    products = jnp.matmul(arrays["queries"], candidates.T).astype(log_q.dtype)
    u = products / arrays["tau"] - log_q[None]
    hits = (ids[:, None] == others[None]) & ~np.eye(count, len(others), dtype=bool)
    return jnp.where(hits, -1e30, u) if "ids" in names else u


def plain(arrays, kind):
    """Returns the losses of all rows by the formula."""
    rows = jnp.arange(len(arrays["queries"]))
    return -jax.nn.log_softmax(plain_logits(arrays, kind))[rows, rows]


@functools.partial(jax.jit, static_argnums=1)
def plain_step(arrays, kind):
    return jax.value_and_grad(lambda a: plain(a, kind).mean())(arrays)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_value_and_gradients(kind, implementation, x64):
    """Of embeddings, log-probabilities and the temperature, those of extras too."""
    arrays = arrays_of()

    @jax.jit
    def step(arrays):
        return jax.value_and_grad(
            lambda a: call(a, kind, implementation=implementation, workspace_bytes=TILE)
        )(arrays)

    for x, y in zip(
        *map(jax.tree.leaves, (step(arrays), plain_step(arrays, kind))), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", [*PLANS, *PLANS_OF_GPUS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.many_cases
def test_every_plan(plan, reduction):
    """Dropped hits stay dropped where something of their tiles is kept."""
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 4e-2)):
        arrays = arrays_of(300, 29, dtype)
        workspace = (PLANS | PLANS_OF_GPUS)[plan]

        def loss(arrays, workspace=workspace):
            losses = call(
                arrays, "extra with ids", reduction=reduction, workspace_bytes=workspace
            )
            return losses.mean()

        found = jax.jit(jax.value_and_grad(loss))(arrays)
        wide = jax.tree.map(lambda a: np.asarray(a, "float32"), arrays)
        exact = plain_step(wide, "extra with ids")
        for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
            x, y = np.asarray(x, "float32"), np.asarray(y)
            size = np.abs(y).max()
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("count", [3, 1000, pytest.param(4001, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.many_cases
def test_as_good_as_the_formula(kind, count, dtype):
    arrays = arrays_of(count, 5, dtype, kind)
    name = "extra with ids"

    @jax.jit
    def both(arrays):
        def ours(arrays):
            losses = call(arrays, name, reduction="none")
            return losses.sum(), losses

        def formula(arrays):
            losses = plain(arrays, name)
            return losses.sum(), losses

        step = functools.partial(jax.value_and_grad, has_aux=True)
        return step(ours)(arrays), step(formula)(arrays)

    ((_, ours), grads), ((_, formula), plain_grads) = both(arrays)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, "float64"), arrays)
        exact = jax.jit(plain, static_argnums=1)(wide, name)
        _, exact_grads = plain_step(wide, name)
        exact = np.asarray(exact)
        exact_grads = {n: count * np.asarray(a) for n, a in exact_grads.items()}
    # A product of another shape rounds differently, by some of the logits' digits.
    products = wide["queries"][:8] @ wide["candidates"].T
    largest = float(np.abs(products).max()) / 0.7
    slack = 2e-6 + 1e-7 * largest
    truth.assert_as_good(ours, formula, exact, slack)
    # Slopes are rounded to the dtype of what they are multiplied by.
    eps = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    for key in ("queries", "candidates", "extra", "log_q"):
        assert grads[key].dtype == arrays[key].dtype
        x, y, z = (
            np.asarray(g[key], "float64") for g in (grads, plain_grads, exact_grads)
        )
        factor = wide["candidates" if key == "queries" else "queries"]
        factor = 1 if key == "log_q" else np.abs(factor).max() / 0.7
        rounding = 2 * eps * factor
        if np.abs(z).max() > 1e-9:
            slack_of_key = slack + rounding / np.abs(z).max()
            assert truth.error(x, z) <= truth.error(y, z) + slack_of_key


def test_a_common_offset_changes_nothing():
    """Of log-probabilities, or of products, that are exactly representable."""
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (40, 6)).astype("float32")
    candidates = rng.integers(-2, 3, (40, 6)).astype("float32")
    log_q = -rng.integers(0, 16, 40).astype("float32") / 4
    loss = jax.jit(functools.partial(in_batch_cross_entropy, reduction="none"))
    expected = loss(queries, candidates, log_q)
    np.testing.assert_array_equal(loss(queries, candidates, log_q - 1e5), expected)
    one, more = np.ones((40, 1), "float32"), np.full((40, 1), 1e5, "float32")
    moved = np.hstack([queries, one]), np.hstack([candidates, more])
    np.testing.assert_array_equal(loss(*moved, log_q), expected)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("is_traced", [False, True])
def test_limits_of_the_temperature(implementation, is_traced):
    """At 0 the best product wins, at infinity log_q alone is left."""
    arrays = {n: a for n, a in arrays_of(dtype="float32").items() if n != "tau"}
    products = arrays["queries"] @ arrays["candidates"].T
    own = np.arange(COUNT)

    def losses(tau, arrays):
        return call(
            arrays | {"tau": tau},
            "log_q",
            reduction="none",
            implementation=implementation,
            workspace_bytes=TILE,
        )

    def both(tau):
        step = jax.value_and_grad(lambda a, t: losses(t, a).sum(), allow_int=True)
        if is_traced:
            tau = jnp.float32(tau)
            return jax.jit(losses)(tau, arrays), jax.jit(step)(arrays, tau)[1]
        return losses(tau, arrays), step(arrays, tau)[1]

    cold, gradient = both(0.0)
    is_best = products.argmax(1) == own
    np.testing.assert_array_equal(cold, np.where(is_best, 0, np.inf))
    if implementation == "xla":
        for name in ("queries", "candidates", "log_q"):
            np.testing.assert_array_equal(gradient[name], 0)
    hot, gradient = both(np.inf)
    log_p = truth.log_softmax(-arrays["log_q"])
    np.testing.assert_allclose(hot, -log_p, rtol=1e-5)
    np.testing.assert_allclose(gradient["queries"], 0, atol=1e-25)
    of_log_q = 1 - COUNT * np.exp(log_p)
    np.testing.assert_allclose(gradient["log_q"], of_log_q, rtol=1e-4, atol=1e-4)
    assert np.isfinite(gradient["candidates"]).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_queries_without_weight_and_dropped_candidates(implementation):
    """A padded pair weighs nothing as a query, and nothing as a candidate."""
    arrays = arrays_of(dtype="float32")
    padded = {n: a.copy() for n, a in arrays.items()}
    padded["queries"][-3:] = np.nan
    padded["candidates"][-3:] = 1e30
    padded["log_q"][-3:] = np.inf
    weights = np.arange(COUNT) < COUNT - 3
    rest = {
        n: a[: COUNT - 3] if a.ndim and len(a) == COUNT else a
        for n, a in arrays.items()
    }

    @jax.jit
    def step(arrays, weights):
        return jax.value_and_grad(
            lambda a: call(
                a,
                "log_q",
                weights=weights,
                implementation=implementation,
                workspace_bytes=TILE,
            )
        )(arrays)

    loss, grads = step(padded, weights)
    expected, true = plain_step(rest, "log_q")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name in ("queries", "candidates", "log_q", "tau"):
        found = np.asarray(grads[name])
        if found.ndim:
            np.testing.assert_array_equal(found[-3:], 0)
            found = found[:-3]
        np.testing.assert_allclose(found, true[name], rtol=1e-4, atol=1e-6)
    none, grads = step(padded, weights & False)
    assert none == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_reductions(kind):
    arrays = arrays_of(dtype="float32")
    losses, statistics = call(
        arrays, kind, reduction="none", return_statistics=True, workspace_bytes=TILE
    )
    expected = np.asarray(plain(arrays, kind))
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.log_prob, -expected, rtol=1e-4, atol=1e-5)
    u = np.asarray(plain_logits(arrays, kind))
    own = np.diagonal(u)[:, None]
    np.testing.assert_array_equal(statistics.rank, (u > own).sum(1))
    entropy = truth.entropy(u)
    np.testing.assert_allclose(statistics.entropy, entropy, rtol=1e-4, atol=1e-5)
    weights = np.linspace(0, 2, COUNT).astype("float32")
    for reduction, total in (("sum", 1), ("mean", weights.sum())):
        loss = call(arrays, kind, reduction=reduction, weights=weights)
        np.testing.assert_allclose(loss, (weights * expected).sum() / total, rtol=1e-5)


def test_vmap_is_one_batch_after_another():
    """Each batch has its own candidates and ids."""
    arrays = [arrays_of(dtype="float32", seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *arrays)
    step = jax.value_and_grad(lambda a: call(a, "extra with ids"))
    found = jax.jit(jax.vmap(step))(stacked)
    for index, one in enumerate(arrays):
        exact = plain_step(one, "extra with ids")
        for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
            np.testing.assert_allclose(x[index], y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shards", [8, 4])
@pytest.mark.parametrize("is_replicated", [False, True])
@pytest.mark.parametrize("workspace", [TILE, None])
def test_over_shards_of_the_batch(shards, is_replicated, workspace):
    """Candidates of all shards are negatives; extras are each shard's, or everyone's.

    The ranks are those of one device, and so are gradients.
    """
    arrays = arrays_of(40, 16, "float32")
    ids, extra_ids = ids_of(40, 16)
    names = ("data",) if shards == 8 else ("data", "more")
    sizes = (8,) if shards == 8 else (2, 2)
    mesh = Mesh(np.asarray(jax.devices()[:shards]).reshape(sizes), names)
    over, of_extra = P(names), P() if is_replicated else P(names)
    weights = np.linspace(0.5, 2, 40).astype("float32")
    specs = {
        name: P() if name == "tau" else of_extra if "extra" in name else over
        for name in arrays
    }

    def loss(arrays, ids, extra_ids, weights):
        loss, statistics = in_batch_cross_entropy(
            arrays["queries"],
            arrays["candidates"],
            arrays["log_q"],
            ids,
            (arrays["extra"], arrays["extra_log_q"], extra_ids),
            temperature=arrays["tau"],
            weights=weights,
            token_axes=names,
            return_statistics=True,
            workspace_bytes=workspace,
        )
        plain = in_batch_cross_entropy(
            arrays["queries"], arrays["candidates"], token_axes=names
        )
        return loss + plain, statistics.rank

    mapped = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(specs, over, of_extra, over),
        out_specs=(P(), over),
    )
    step = jax.jit(jax.value_and_grad(mapped, has_aux=True))
    (value, rank), grads = step(arrays, ids, extra_ids, weights)

    @jax.jit
    def formula(arrays):
        u = plain_logits(arrays, "extra with ids")
        losses = -jnp.diagonal(jax.nn.log_softmax(u))
        alone = arrays | {"tau": jnp.ones_like(arrays["tau"])}
        plainly = plain(alone, "plain").mean()
        return (weights * losses).sum() / weights.sum() + plainly, u

    (expected, u), true = jax.value_and_grad(formula, has_aux=True)(arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    own = np.diagonal(u)[:, None]
    np.testing.assert_array_equal(rank, (np.asarray(u) > own).sum(1))
    for name, gradient in grads.items():
        np.testing.assert_allclose(gradient, true[name], rtol=1e-3, atol=2e-6)


def test_devices_share_a_batch_under_jit_alone():
    arrays = arrays_of(40, 16, "float32")
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    placed = {
        name: jax.device_put(a, NamedSharding(mesh, P("data") if a.ndim else P()))
        for name, a in arrays.items()
    }
    step = jax.jit(jax.value_and_grad(lambda a: call(a, "extra with ids")))
    found = step(placed)
    exact = plain_step(arrays, "extra with ids")
    for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_ids_of_any_integers():
    """Hashes stay apart as NumPy arrays, and narrow ids are those of wide ones."""
    arrays = arrays_of(dtype="float32")
    ids, extra_ids = ids_of()

    def loss(ids, extra_ids):
        return in_batch_cross_entropy(
            arrays["queries"],
            arrays["candidates"],
            None,
            ids,
            (arrays["extra"], None, extra_ids),
        )

    expected = loss(ids, extra_ids)
    for change in (
        lambda a: a * 2**40,
        lambda a: a.astype("uint8"),
        lambda a: (a + 2**31).astype("uint32"),
        lambda a: jnp.asarray(a - 7, "int8"),
        lambda a: jnp.asarray(a, "uint32"),
    ):
        np.testing.assert_array_equal(loss(change(ids), change(extra_ids)), expected)
    for mixed in (
        (jnp.asarray(ids, "uint8"), extra_ids.astype("int16")),
        ((ids + 2**53).astype("uint64"), extra_ids.astype("int64") + 2**53),
    ):
        np.testing.assert_array_equal(loss(*mixed), expected)


def test_without_a_row():
    none = np.zeros((0, WIDTH), "float32")
    some = np.ones((3, WIDTH), "float32")
    assert in_batch_cross_entropy(none, none) == 0
    assert in_batch_cross_entropy(none, none, extra=(some,)) == 0
    losses, statistics = in_batch_cross_entropy(
        none,
        none,
        np.zeros(0, "float32"),
        np.zeros(0, int),
        reduction="none",
        return_statistics=True,
    )
    assert losses.shape == statistics.rank.shape == (0,)


def test_second_derivatives():
    """Forward over reverse."""
    arrays = arrays_of(dtype="float32")
    tangent = jax.tree.map(lambda a: np.cos(a) / 9, arrays)

    @jax.jit
    def both(arrays):
        def hessian(loss):
            return jax.jvp(jax.grad(loss), (arrays,), (tangent,))[1]

        ours = hessian(lambda a: call(a, "extra with ids", workspace_bytes=TILE))
        return ours, hessian(lambda a: plain(a, "extra with ids").mean())

    for x, y in zip(*map(jax.tree.leaves, both(arrays)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("is_ranked", [False, True])
def test_memory_is_free_of_the_square_of_the_batch(is_ranked):
    """16384 pairs and as many extras: 2 GiB of logits."""
    shape = jax.ShapeDtypeStruct
    states, column = shape((16384, 32), jnp.float32), shape((16384,), jnp.float32)

    def loss(queries, candidates, extra, log_q, ids):
        found = in_batch_cross_entropy(
            queries,
            candidates,
            log_q,
            ids,
            (extra, log_q, ids),
            return_statistics=is_ranked,
            workspace_bytes=2**24,
        )
        return found if is_ranked else (found, None)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    ids = shape((16384,), jnp.int32)
    lowered = step.lower(states, states, states, column, ids)
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    # A workspace, states and candidates, and their gradients.
    assert analysis.temp_size_in_bytes <= 2**24 + 8 * 16384 * 32 * 4 + 2**22


def test_messages():
    z = np.ones((4, 3), "float32")
    call: Any = in_batch_cross_entropy
    for match, error, args, options in (
        ("`queries` must have shape", ValueError, (z[0], z), {}),
        ("`candidates` must have shape", ValueError, (z, z[:, :2]), {}),
        ("`candidates` must have shape", ValueError, (z, z[:3]), {}),
        ("`log_q` must have shape", ValueError, (z, z, z[:3, 0]), {}),
        ("`candidate_ids` must have shape", ValueError, (z, z, None, [1]), {}),
        ("`candidate_ids` must have an int", TypeError, (z, z, None, z[:, 0]), {}),
        (
            "`extra.candidate_ids` must have an integer dtype",
            TypeError,
            (z, z, None, np.arange(4), (z, None, z[:, 0])),
            {},
        ),
        (
            "`extra.candidates` must have",
            ValueError,
            (z, z, None, None, (z[:, 1:],)),
            {},
        ),
        ("`extra` must be a MixedNegatives", TypeError, (z, z, None, None, z), {}),
        (
            "`extra` must be a MixedNegatives",
            TypeError,
            (z, z, None, None, (z,) * 4),
            {},
        ),
        (
            "`candidate_ids` must be given where extra has them",
            ValueError,
            (z, z, None, None, (z, None, [1, 2, 3, 4])),
            {},
        ),
        (
            "`temperature` must be a scalar",
            ValueError,
            (z, z),
            {"temperature": z[:, 0]},
        ),
        ("`reduction` must be", ValueError, (z, z), {"reduction": "max"}),
        ("`weights` must have shape", ValueError, (z, z), {"weights": z}),
        (
            "`implementation` must be",
            NotImplementedError,
            (z, z),
            {"implementation": "mosaic_gpu"},
        ),
    ):
        with pytest.raises(error, match=match):
            call(*args, **options)
