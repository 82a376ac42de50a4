"""Adaptive softmax against its definition, written down once more in NumPy."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxsoft
from jaxsoft import AdaptiveTail, ClassBands
from jaxsoft._core import registry
from jaxsoft.adaptive import decoding

KEY = jax.random.key(3)


def _log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _definition(hidden, head, bias, tails, bands):
    """Grave et al., and what torch.nn.AdaptiveLogSoftmaxWithLoss computes."""
    entries = _log_softmax(hidden @ head + bias)
    size = bands.shortlist
    found = [entries[:, :size]]
    for index, tail in enumerate(tails):
        logits = hidden @ tail.projection @ tail.kernel
        if tail.bias is not None:
            logits = logits + tail.bias
        found.append(entries[:, size + index, None] + _log_softmax(logits))
    by_rank = np.concatenate(found, axis=1)
    return by_rank if bands.ranks is None else by_rank[:, bands.ranks]


class Case:
    """A layer of float64 NumPy arrays, and its truth."""

    def __init__(self, bands, rows=37, features=6, seed=0, scale=1.0):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.normal(size=shape) * scale

        self.bands = bands
        self.hidden = normal(rows, features)
        entries = bands.shortlist + len(bands.tails)
        self.head, self.bias = normal(features, entries), normal(entries)
        self.tails = [
            AdaptiveTail(
                normal(features, 3 - index % 2),
                normal(3 - index % 2, classes),
                normal(classes) if index else None,
            )
            for index, classes in enumerate(bands.tails)
        ]
        self.labels = rng.integers(0, bands.num_classes, rows).astype(np.int32)
        self.truth = _definition(self.hidden, self.head, self.bias, self.tails, bands)
        self.log_prob = np.take_along_axis(self.truth, self.labels[:, None], 1)[:, 0]

    @property
    def layer(self):
        """The arrays that a compiled function takes as one argument."""
        return self.hidden, self.head, self.bias, self.tails

    def call(self, function, *middle, hidden=None, **options):
        """Calls a public function with this layer."""
        first = self.hidden if hidden is None else hidden
        return function(
            first,
            self.head,
            self.tails,
            *middle,
            self.bands,
            head_bias=self.bias,
            **options,
        )


def _bands(num_classes, cutoffs, shuffled):
    if not shuffled:
        return ClassBands.in_order(num_classes, cutoffs)
    counts = np.random.default_rng(num_classes).permutation(num_classes)
    return ClassBands.from_counts(counts, cutoffs=cutoffs)


BANDS = [
    pytest.param(_bands(*args), id="-".join(map(str, args)))
    for args in [
        (1, (), False),
        (2, (1,), True),
        (40, (), True),
        (50, (7,), False),
        (50, (1, 2, 48), True),
        (300, (20, 100), True),
    ]
]


@functools.partial(jax.jit, static_argnames="counts")
def _scores(layer, labels, bands, counts=()):
    """Returns the log-probabilities of all classes and of labels, and the best ones."""
    hidden, head, bias, tails = layer
    return (
        jaxsoft.adaptive_log_probs(hidden, head, tails, bands, head_bias=bias),
        jaxsoft.adaptive_log_prob(hidden, head, tails, labels, bands, head_bias=bias),
        [
            jaxsoft.adaptive_top_k(hidden, head, tails, k, bands, head_bias=bias)
            for k in counts
        ],
    )


@jax.jit
def _sample(layer, bands, temperature=None):
    """Returns a class for each row; without a temperature, at the default one."""
    hidden, head, bias, tails = layer
    options = {} if temperature is None else {"temperature": temperature}
    return jaxsoft.adaptive_sample(
        KEY, hidden, head, tails, bands, head_bias=bias, **options
    )


@pytest.fixture(params=["among all", "by bands"])
def searched(request, monkeypatch):
    """How the best classes are looked for, which the number of logits decides."""
    if request.param == "by bands":
        monkeypatch.setattr(decoding, "_STORED", 0)
    # What was traced is not known to depend on it.
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.many_cases
@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.usefixtures("searched")
def test_scores_by_definition(bands):
    counts = tuple(sorted({1, min(5, bands.num_classes), bands.num_classes}))
    for scale in (0.3, 1.0, 3.0):
        case = Case(bands, scale=scale)
        with jax.enable_x64(True):
            every, own, best = _scores(case.layer, case.labels, bands, counts)
        np.testing.assert_allclose(every, case.truth, atol=1e-12)
        np.testing.assert_allclose(own, case.log_prob, atol=1e-12)
        np.testing.assert_allclose(np.exp(every).sum(axis=1), 1, atol=1e-12)
        for k, (log_probs, ids) in zip(counts, best, strict=True):
            order = np.argsort(-case.truth, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(ids, order)
            truth = np.take_along_axis(case.truth, order, 1)
            np.testing.assert_allclose(log_probs, truth, atol=1e-12)


@jax.jit
def _log_probs(layer, bands):
    hidden, head, bias, tails = layer
    return jaxsoft.adaptive_log_probs(hidden, head, tails, bands, head_bias=bias)


@pytest.mark.parametrize("num_classes", [*range(1, 41), 1000])
@pytest.mark.many_cases
def test_probabilities_add_up(num_classes):
    bands = ClassBands.from_counts(1 / np.arange(1, num_classes + 1))
    case = Case(bands, rows=3, scale=2)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            found = np.asarray(_log_probs(case.layer, bands), np.float64)
        total = np.exp(found).sum(axis=1)
        np.testing.assert_allclose(total, 1, atol=1e-13 if x64 else 1e-5)


def _loss(hidden, head, bias, tails, tau, labels, bands, weights):
    found = jaxsoft.adaptive_log_prob(
        hidden, head, tails, labels, bands, head_bias=bias, temperature=tau
    )
    return jnp.sum(found * weights)


def _plain_loss(hidden, head, bias, tails, tau, labels, bands, weights):
    """The same by autodiff of the definition."""

    def log_softmax(logits):
        return jax.nn.log_softmax(logits / tau[:, None])

    entries = log_softmax(hidden @ head + bias[None])
    size = bands.shortlist
    found = [entries[:, :size]]
    for index, tail in enumerate(tails):
        logits = hidden @ tail.projection @ tail.kernel
        if tail.bias is not None:
            logits = logits + tail.bias[None]
        found.append(entries[:, size + index, None] + log_softmax(logits))
    by_rank = jnp.concatenate(found, axis=1)
    ranks = bands.rank_of(labels)
    return jnp.sum(by_rank[jnp.arange(len(ranks)), ranks] * weights)


@jax.jit
def _gradients(arguments, labels, bands, weights):
    """Returns value and gradients, and those of the definition."""
    return [
        jax.value_and_grad(function, argnums=range(5))(
            *arguments, labels, bands, weights
        )
        for function in (_loss, _plain_loss)
    ]


@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("rows", [37, 600])
@pytest.mark.many_cases
def test_gradients_by_definition(bands, rows):
    """600 rows are several blocks of a tail."""
    case = Case(bands, rows=rows)
    rng = np.random.default_rng(1)
    tau, weights = rng.uniform(0.5, 2, rows), rng.normal(size=rows)
    with jax.enable_x64(True):
        results = _gradients((*case.layer, tau), case.labels, bands, weights)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_gradients_in_bfloat16_come_in_the_arguments_dtype():
    case = Case(ClassBands.in_order(60, (10, 30)))
    narrow = jax.tree.map(lambda a: np.asarray(a, jnp.bfloat16), case.layer)
    weights = np.ones(len(case.labels), np.float32)

    @jax.jit
    def value_and_gradients(layer, labels, weights):
        return jax.value_and_grad(_loss, argnums=range(4))(
            *layer, 1.0, labels, case.bands, weights
        )

    value, gradients = value_and_gradients(narrow, case.labels, weights)
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_allclose(value, case.log_prob.sum(), rtol=0.02)


@pytest.mark.usefixtures("optimized")
def test_a_tail_costs_what_its_tokens_cost():
    """No [N, V] array, and no work for tails without tokens: NaN there is not met."""
    bands = ClassBands.in_order(50_000, (100, 1000))
    case = Case(bands, rows=256)
    bad = [
        tail._replace(kernel=np.full_like(tail.kernel, np.nan)) for tail in case.tails
    ]
    labels = np.zeros(256, np.int32)

    def loss(tails):
        return jaxsoft.adaptive_log_prob(
            case.hidden, case.head, tails, labels, bands
        ).sum()

    bad = jax.tree.map(lambda a: np.asarray(a, np.float32), bad)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(bad).compile()
    value, gradients = compiled(bad)
    assert np.isfinite(value)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients))
    stored = compiled.memory_analysis()
    assert stored is not None
    assert stored.temp_size_in_bytes < 4 * 256 * 50_000 / 4


@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.many_cases
def test_samples_follow_the_probabilities(bands):
    case = Case(bands, rows=2)
    many = 20_000
    hidden = np.repeat(case.hidden, many, axis=0)
    found = _sample((hidden, *case.layer[1:]), bands)
    check_rates(case, np.asarray(found).reshape(2, many))


@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.many_cases
def test_samples_of_few_rows_follow_the_probabilities(bands):
    """All log-probabilities are computed where they are few."""
    case, draws = Case(bands, rows=2), 10_000
    keys = jax.random.split(KEY, draws)

    @jax.jit
    def drawn(keys):
        return jax.lax.map(
            lambda key: case.call(functools.partial(jaxsoft.adaptive_sample, key)), keys
        )

    check_rates(case, np.asarray(drawn(keys)).T)


def check_rates(case, found):
    """Compares classes drawn for each row with their probabilities."""
    many, bands = found.shape[1], case.bands
    for row, drawn in enumerate(found):
        expected = np.exp(case.truth[row]) * many
        counts = np.bincount(drawn, minlength=bands.num_classes)
        common = expected >= 20
        off, of = counts[common] - expected[common], expected[common]
        statistic = (off**2 / of).sum()
        degrees = common.sum()
        assert statistic < degrees + 6 * np.sqrt(2 * degrees) + 6
        rest = counts[~common].sum(), expected[~common].sum()
        assert abs(rest[0] - rest[1]) < 6 * np.sqrt(rest[1] + 1)


def test_blocks_of_rows_draw_apart():
    """512 rows of one state, all of which come to the tail, are four blocks of it."""
    bands = ClassBands.in_order(1000, (1,))
    tail = AdaptiveTail(np.zeros((2, 1), np.float32), np.zeros((1, 999), np.float32))
    head, bias = np.zeros((2, 2), np.float32), np.array([-200.0, 0.0], np.float32)
    layer = np.zeros((512, 2), np.float32), head, bias, [tail]
    blocks = np.asarray(_sample(layer, bands)).reshape(4, 128)
    assert (blocks > 0).all()
    for one, other in itertools.combinations(blocks, 2):
        assert (one == other).mean() < 0.1


def test_cold_samples_are_greedy_and_cold_rows_may_stand_beside_warm_ones():
    case = Case(ClassBands.in_order(60, (10, 30)), rows=8)
    tau = np.array([0.0, 1.0] * 4, np.float32)
    found = _sample(case.layer, case.bands, tau)
    entries = (case.hidden @ case.head + case.bias).argmax(axis=1)
    for row in range(0, 8, 2):
        entry, rank = entries[row], entries[row]
        if entry >= 10:
            tail = case.tails[entry - 10]
            logits = case.hidden[row] @ tail.projection @ tail.kernel
            logits = logits if tail.bias is None else logits + tail.bias
            rank = case.bands.cutoffs[entry - 10] + logits.argmax()
        assert found[row] == rank


@pytest.mark.parametrize("temperature", [0.0, 1e-40])
def test_the_first_of_equal_entries_is_taken_at_a_known_temperature_of_zero(
    temperature,
):
    bands = ClassBands.in_order(60, (10, 30))
    case = Case(bands, rows=8, scale=0.0)
    greedy = functools.partial(jaxsoft.adaptive_sample, KEY)
    np.testing.assert_array_equal(case.call(greedy, temperature=temperature), 0)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("has_head_bias", [True, False])
def test_a_tail_without_any_class_is_no_entry_of_the_head(has_head_bias):
    """However many rows there are, the other classes share its probability."""
    bands, many = ClassBands.in_order(9, (2, 5)), 5000
    case = Case(bands, rows=2)
    case.bias = case.bias * has_head_bias
    case.bias[3] = -np.inf
    case.truth = _definition(case.hidden, case.head, case.bias, case.tails, bands)
    masked = case.tails[1]._replace(bias=np.full(4, -np.inf))
    tails, bias = [case.tails[0], masked], np.where(np.isinf(case.bias), 4, case.bias)

    @jax.jit
    def results(hidden, head, bias, tails, labels):
        own_bias = bias if has_head_bias else None
        options: dict[str, Any] = {"head_bias": own_bias}
        layer = hidden, head, tails

        def total(head):
            own = jaxsoft.adaptive_log_prob(
                hidden, head, tails, labels, bands, **options
            )
            return jnp.sum(jnp.where(labels < 5, own, 0)), own

        _, pull, own = jax.vjp(total, head, has_aux=True)
        best = jaxsoft.adaptive_top_k(*layer, 9, bands, **options)
        return (
            jaxsoft.adaptive_log_probs(*layer, bands, **options),
            own,
            best,
            pull(jnp.ones(()))[0],
            jaxsoft.adaptive_sample(KEY, *layer, bands, **options),
        )

    with jax.enable_x64(True):
        hidden = np.repeat(case.hidden, many, axis=0)
        every, own, best, gradient, drawn = jax.device_get(
            results(hidden, case.head, bias, tails, np.array([4, 8] * many))
        )
    np.testing.assert_allclose(every[::many], case.truth, atol=1e-12)
    np.testing.assert_allclose(own[0], case.truth[0, 4], atol=1e-12)
    assert (own[1::2] == -np.inf).all()
    order = np.argsort(-case.truth, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(best[1][::many, :5], order)
    assert (best[1][:, 5:] == -1).all() or (best[0][:, 5:] == -np.inf).all()
    assert np.isfinite(gradient).all()
    check_rates(case, drawn.reshape(2, many))


@pytest.mark.parametrize("has_head_bias", [True, False])
def test_a_head_without_infinity_leaves_out_a_tail_without_any_class(has_head_bias):
    bands = ClassBands.in_order(9, (2, 5))
    case = Case(bands, rows=2)
    head = jnp.asarray(case.head).astype("float8_e4m3fn")
    masked = case.tails[1]._replace(bias=np.full(4, -np.inf, "float32"))
    bias = jnp.zeros(4, head.dtype) if has_head_bias else None
    found = jaxsoft.adaptive_log_probs(
        case.hidden, head, [case.tails[0], masked], bands, head_bias=bias
    )
    np.testing.assert_allclose(jnp.exp(found[:, :5]).sum(1), 1, rtol=1e-5)
    assert (found[:, 5:] == -jnp.inf).all()


def test_a_nan_is_not_a_class():
    case = Case(ClassBands.in_order(60, (10, 30)), rows=8)
    hidden, tau = case.hidden.copy(), np.ones(8, np.float32)
    hidden[0] = np.nan
    found = np.asarray(_sample((hidden, *case.layer[1:]), case.bands, tau))
    assert found[0] == -1
    assert (found[1:] >= 0).all()


@pytest.mark.usefixtures("searched")
def test_equal_classes_are_ordered_by_rank():
    bands = ClassBands.in_order(6, (2, 4))
    tails = [AdaptiveTail(np.zeros((2, 1)), np.zeros((1, 2)))] * 2
    with jax.enable_x64(True):
        log_probs, ids = jax.jit(jaxsoft.adaptive_top_k, static_argnums=3)(
            np.zeros((1, 2)), np.zeros((2, 4)), tails, 6, bands
        )
    np.testing.assert_array_equal(ids, [range(6)])
    np.testing.assert_allclose(np.exp(log_probs), [[0.25] * 2 + [0.125] * 4])


@pytest.mark.usefixtures("searched")
def test_best_classes_of_cold_masked_and_unknown_rows():
    """Classes of probability 0 come by band before places of no class."""
    bands = ClassBands.in_order(7, (2, 5))
    tails = [
        AdaptiveTail(np.zeros((1, 1)), np.zeros((1, 3)), np.array([0, -np.inf, 0.5])),
        AdaptiveTail(np.zeros((1, 1)), np.zeros((1, 2)), np.array([0.2, 0])),
    ]
    hidden = np.array([[1.0], [1.0], [np.nan]])
    head, tau = np.array([[1.0, 2, 0, -1]]), np.array([1.0, 0, 1])

    @jax.jit
    def results(hidden, head, tails, tau):
        layer, options = (hidden, head, tails), {"temperature": tau}
        every = jaxsoft.adaptive_log_probs(*layer, bands, **options)
        return every, jaxsoft.adaptive_top_k(*layer, 7, bands, **options)

    with jax.enable_x64(True):
        every, (found, ids) = jax.device_get(results(hidden, head, tails, tau))
    assert np.isnan(found[2][:6]).all()
    assert ids[1].tolist() in ([1, 0, 2, 4, 5, 6, -1], [1, 0, 4, 2, 5, 6, -1])
    order = np.argsort(-every[0], kind="stable")
    np.testing.assert_array_equal(ids[0], [*order[:6], -1])
    for row in (0, 1):
        best = np.where(ids[row] < 0, -np.inf, every[row][ids[row]])
        np.testing.assert_allclose(found[row], best, atol=1e-12)


@pytest.mark.usefixtures("searched")
def test_top_k_is_differentiable():
    case = Case(ClassBands.in_order(60, (10, 30)))

    def best(hidden):
        return case.call(jaxsoft.adaptive_top_k, 4, hidden=hidden)[0].sum()

    def at(hidden):
        every = case.call(jaxsoft.adaptive_log_probs, hidden=hidden)
        return jax.lax.top_k(every, 4)[0].sum()

    @jax.jit
    def gradients(hidden):
        return jax.grad(best)(hidden), jax.grad(at)(hidden)

    with jax.enable_x64(True):
        found, truth = gradients(case.hidden)
    np.testing.assert_allclose(found, truth, atol=1e-12)


@pytest.mark.usefixtures("searched")
def test_shapes_vmap_and_no_rows():
    case = Case(ClassBands.in_order(60, (10, 30)), rows=24)
    hidden = case.hidden.reshape(2, 3, 4, 6)
    labels = case.labels.reshape(2, 3, 4)
    none = np.zeros((0, 6), np.float32)

    def one(hidden, labels):
        return case.call(jaxsoft.adaptive_log_prob, labels, hidden=hidden)

    def total(hidden, labels):
        found = one(hidden, labels)
        return found.sum(), found

    @jax.jit
    def results(flat, hidden, labels):
        value_and_grad = jax.value_and_grad(total, has_aux=True)
        (_, found), gradient = value_and_grad(hidden, labels)
        (_, mapped), by_vmap = jax.vmap(value_and_grad)(hidden, labels)
        empty = (
            one(none, np.zeros(0, np.int32)),
            case.call(jaxsoft.adaptive_log_probs, hidden=none),
            case.call(jaxsoft.adaptive_top_k, 3, hidden=none)[1],
            jaxsoft.adaptive_sample(KEY, none, case.head, case.tails, case.bands),
        )
        return one(*flat), (found, gradient), (mapped, by_vmap), empty

    flat, (found, gradient), (mapped, by_vmap), empty = results(
        (case.hidden, case.labels), hidden, labels
    )
    np.testing.assert_allclose(np.ravel(found), flat, atol=1e-6)
    np.testing.assert_allclose(mapped, found, atol=1e-6)
    np.testing.assert_allclose(by_vmap, gradient, atol=1e-5)
    assert [a.shape for a in empty] == [(0,), (0, 60), (0, 3), (0,)]


@pytest.mark.usefixtures("searched")
def test_inside_shard_map():
    case = Case(ClassBands.in_order(60, (10, 30)), rows=24)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")

    def loss(hidden, labels):
        found = case.call(jaxsoft.adaptive_log_prob, labels, hidden=hidden)
        return found, case.call(jaxsoft.adaptive_top_k, 3, hidden=hidden)[1]

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    found = jax.jit(sharded)(case.hidden, case.labels)
    whole = jax.jit(loss)(case.hidden, case.labels)
    np.testing.assert_allclose(found[0], whole[0], atol=1e-6)
    np.testing.assert_array_equal(found[1], whole[1])


def _log_prob(layer, labels, bands):
    hidden, head, bias, tails = layer
    return jaxsoft.adaptive_log_prob(hidden, head, tails, labels, bands, head_bias=bias)


_compiled_log_prob = jax.jit(_log_prob)


def test_unknown_labels_are_nan():
    case = Case(ClassBands.from_counts(np.arange(60), cutoffs=(10, 30)), rows=4)
    labels = np.array([-1, 60, 5, -100], np.int32)
    found = _compiled_log_prob(case.layer, labels, case.bands)
    np.testing.assert_array_equal(np.isnan(found), [True, True, False, True])


def test_tokens_without_weight_are_zero_and_reach_no_gradient():
    case = Case(ClassBands.from_counts(np.arange(60), cutoffs=(10, 30)), rows=6)
    keep = np.array([True, False, True, False, True, False])
    weights = np.where(keep, [0.5, 0, 2, 0, 1, 1], 0).astype(np.float32)
    labels = np.where(keep, case.labels, [0, -1, 0, 60, 0, -100]).astype(np.int32)
    bad = np.array([0, np.nan, 0, np.inf, 0, 0], np.float32)[:, None]

    def total(layer, labels, weights, ignore_label=None):
        hidden, head, bias, tails = layer
        found = jaxsoft.adaptive_log_prob(
            hidden,
            head,
            tails,
            labels,
            case.bands,
            head_bias=bias,
            weights=weights,
            ignore_label=ignore_label,
        )
        return jnp.where(keep, found, 0).sum(), found

    run = jax.jit(
        jax.value_and_grad(total, has_aux=True), static_argnames="ignore_label"
    )
    layer = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), case.layer)
    # A state of 0 adds nothing to the gradient of a kernel, but it does to a bias's.
    only = jax.tree.map(lambda a: a, (layer[0][keep], *layer[1:]))
    (_, expected), wanted = jax.value_and_grad(
        lambda layer: (
            (found := _log_prob(layer, case.labels[keep], case.bands)).sum(),
            found,
        ),
        has_aux=True,
    )(only)
    hidden = jnp.where(keep[:, None], layer[0], bad)
    (_, found), gradients = run((hidden, *layer[1:]), labels, keep, ignore_label=-100)
    np.testing.assert_allclose(found[keep], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[~keep], 0)
    assert (np.asarray(gradients[0])[~keep] == 0).all()
    gradients = (gradients[0][keep], *gradients[1:])
    for a, b in zip(*map(jax.tree.leaves, (gradients, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    (_, found), _ = run((hidden, *layer[1:]), labels, weights)
    np.testing.assert_allclose(found[keep], weights[keep] * expected, rtol=1e-5)
    np.testing.assert_array_equal(found[~keep], 0)


def test_bands_are_arguments_of_a_program():
    bands = ClassBands.from_counts(np.arange(60), cutoffs=(10, 30))
    case = Case(bands, rows=4)
    found = _compiled_log_prob(case.layer, case.labels, bands)
    constant = jax.jit(lambda layer, labels: _log_prob(layer, labels, bands))
    np.testing.assert_allclose(found, constant(case.layer, case.labels), atol=1e-6)
    exported = export.export(_compiled_log_prob)(case.layer, case.labels, bands)
    again = export.deserialize(exported.serialize())
    found_again = again.call(case.layer, case.labels, bands)
    np.testing.assert_allclose(found_again, found, atol=1e-6)


def _cost(weights, cutoffs, factor):
    ends = [*cutoffs, len(weights)]
    share = weights / weights.sum()
    tails = sum(
        share[start:end].sum() * (end - start) / factor ** (index + 1)
        for index, (start, end) in enumerate(itertools.pairwise(ends))
    )
    return ends[0] + tails


@pytest.mark.parametrize("tails", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 4])
def test_cutoffs_are_the_cheapest(tails, factor):
    rng = np.random.default_rng(tails)
    weights = np.sort(rng.pareto(1, 30))[::-1]
    found = ClassBands.from_counts(weights, num_tails=tails, tail_factor=factor)
    every = itertools.combinations(range(1, 30), tails)
    least = min(_cost(weights, cutoffs, factor) for cutoffs in every)
    np.testing.assert_allclose(_cost(weights, found.cutoffs[:-1], factor), least)


def test_bands_of_many_classes():
    counts = np.random.default_rng(0).permutation(1 / np.arange(1, 10**6 + 1))
    bands = ClassBands.from_counts(counts)
    assert bands.num_classes == 10**6
    assert len(bands.tails) == 2
    assert 1000 < bands.shortlist < 100_000
    assert bands.order is not None and bands.ranks is not None
    np.testing.assert_array_equal(bands.ranks[bands.order], np.arange(10**6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassBands.in_order(10, (5, 5)), "`cutoffs` must ascend"),
        (lambda: ClassBands.in_order(10, (10,)), "end below 10"),
        (lambda: ClassBands.in_order(10, (0,)), "`cutoffs` must be at least 1"),
        (lambda: ClassBands.in_order(0, ()), "`num_classes` must be at least 1"),
        (lambda: ClassBands.from_counts([]), r"\[V\] with V >= 1"),
        (lambda: ClassBands.from_counts([1, -1]), "not negative"),
        (lambda: ClassBands.from_counts([1, np.nan]), "finite"),
        (lambda: ClassBands.from_counts([1, 2], tail_factor=0.5), ">= 1"),
    ],
)
def test_bad_bands(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments():
    case = Case(ClassBands.in_order(60, (10, 30)))
    good = {
        "hidden": case.hidden,
        "head_kernel": case.head,
        "tails": case.tails,
        "labels": case.labels,
        "bands": case.bands,
    }
    first, second = case.tails
    zero_width = AdaptiveTail(np.zeros((6, 0)), np.zeros((0, 30)))
    for bad, message in [
        ({"head_kernel": case.head[:, 1:]}, "`head_kernel` must have shape"),
        ({"head_bias": case.bias[1:]}, "`head_bias` must have shape"),
        ({"tails": [first]}, "`tails` must be one for each of the 2 bands"),
        ({"tails": [first, zero_width]}, r"`tails\[1\].kernel` must have shape"),
        ({"tails": [second, first]}, r"`tails\[0\].kernel` must have shape"),
        ({"hidden": case.hidden[:, 1:]}, "`head_kernel` must have shape"),
        ({"labels": case.labels[1:]}, "`labels` must have shape"),
        ({"temperature": -1.0}, "`temperature` must"),
    ]:
        with pytest.raises(ValueError, match=message):
            jaxsoft.adaptive_log_prob(**{**good, **bad})
    with pytest.raises(TypeError, match="`bands` must be a ClassBands"):
        jaxsoft.adaptive_log_prob(**{**good, "bands": (10, 30)})
    with pytest.raises(NotImplementedError):
        jaxsoft.adaptive_log_prob(**good, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="`k` must be at most"):
        case.call(jaxsoft.adaptive_top_k, 61)


def test_every_part_runs_the_implementation_that_was_asked_for(monkeypatch):
    other_defaults = {
        "linear_cross_entropy": ("reference", "xla"),
        "linear_sample": ("mosaic_gpu", "xla"),
    }
    for operation, implementations in other_defaults.items():
        monkeypatch.setitem(registry._OPERATIONS, operation, implementations)
    resolve, chosen = registry.resolve, {}

    def recording(operation, implementation):
        chosen[operation] = resolve(operation, implementation)
        return chosen[operation]

    monkeypatch.setattr(registry, "resolve", recording)
    case = Case(_bands(20, (4, 9), False), rows=13)
    for implementation, expected in (("xla", {"xla"}), (None, {"xla", "reference"})):
        log_prob = functools.partial(
            case.call,
            jaxsoft.adaptive_log_prob,
            case.labels,
            implementation=implementation,
        )
        # Implementations are chosen while a call is traced.
        chosen.clear()
        jax.eval_shape(log_prob)
        assert set(chosen.values()) == expected
    chosen.clear()
    sample = functools.partial(jaxsoft.adaptive_sample, KEY)
    # Of rows with temperatures of their own not all log-probabilities are stored.
    tau = np.ones(13, np.float32)
    jax.eval_shape(
        functools.partial(case.call, sample, temperature=tau, implementation="xla")
    )
    assert "linear_sample" in chosen
    assert set(chosen.values()) == {"xla"}
