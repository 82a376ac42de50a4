"""Heads that swap by one line: each against its own logits, in NNX and in Linen."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxsoft
from jaxsoft.nn import (
    AdaptiveSoftmaxHead,
    HierarchicalSoftmaxHead,
    SampledSoftmaxHead,
    SoftmaxHead,
)
from jaxsoft.nn.tables import Tables
from tests import truth

H, V, N = 16, 50, 6
RANDOM = np.random.default_rng(0)
COUNTS = RANDOM.integers(0, 60, V)
HIDDEN = jnp.asarray(RANDOM.standard_normal((N, H)), jnp.float32)
LABELS = jnp.asarray([0, V - 1, 3, 17, 3, 30])
TREE = jaxsoft.ClassTree.huffman(COUNTS, 4)
BANDS = jaxsoft.ClassBands.from_counts(COUNTS, cutoffs=(12, 30))
SAMPLER = jaxsoft.ClassSampler.unigram(COUNTS + 1)
KINDS_OF_COUNTS: dict[str, Callable[[Any], Any]] = {
    "hierarchical": jaxsoft.ClassTree.huffman,
    "adaptive": jaxsoft.ClassBands.from_counts,
    "sampled": jaxsoft.ClassSampler.unigram,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A head, and what it is made of besides `in_features` and options."""

    module: Callable[..., Any]
    arguments: tuple[Any, ...]

    def make(self, seed=0, **options) -> Any:
        """Returns a head with biases that are not 0."""
        options = {"use_bias": True, "rngs": nnx.Rngs(seed)} | options
        options.setdefault("bias_init", nnx.initializers.normal(0.5))
        head = self.module(H, *self.arguments, **options)
        head.eval()
        return head


KINDS = {
    "full": Kind(SoftmaxHead, (V,)),
    "hierarchical": Kind(HierarchicalSoftmaxHead, (TREE,)),
    "adaptive": Kind(AdaptiveSoftmaxHead, (BANDS,)),
    "sampled": Kind(SampledSoftmaxHead, (V, 16, SAMPLER)),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@each_kind
@pytest.mark.many_cases
def test_loss_log_prob_and_top_k_are_those_of_the_logits(kind):
    head = KINDS[kind].make()
    assert head.num_classes == V

    @nnx.jit
    def results(head):
        return (
            head(HIDDEN),
            head.log_prob(HIDDEN, LABELS),
            head.loss(HIDDEN, LABELS, reduction="none"),
            head.loss(HIDDEN, LABELS),
            head.top_k(HIDDEN, 5),
        )

    logits, own, per_token, mean, (found, ids) = results(head)
    assert logits.shape == (N, V) and logits.dtype == jnp.float32
    log_probs = truth.log_softmax(logits)
    expected = np.take_along_axis(log_probs, np.asarray(LABELS)[:, None], 1)[:, 0]
    np.testing.assert_allclose(own, expected, rtol=1e-5)
    np.testing.assert_allclose(per_token, -expected, rtol=1e-5)
    np.testing.assert_allclose(mean, -expected.mean(), rtol=1e-5)
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(found, np.take_along_axis(log_probs, best, 1), rtol=1e-5)


@each_kind
@pytest.mark.many_cases
def test_leading_axes_and_jit(kind):
    head = KINDS[kind].make()
    hidden, labels = HIDDEN.reshape(2, 3, H), LABELS.reshape(2, 3)

    @nnx.jit
    def results(head, hidden, labels):
        return (
            head.log_prob(hidden, labels),
            head(hidden),
            head.sample(jax.random.key(0), hidden),
            head.top_k(hidden, 4),
        )

    folded, logits, drawn, best = results(head, hidden, labels)
    np.testing.assert_allclose(
        folded.reshape(-1), head.log_prob(HIDDEN, LABELS), rtol=1e-5
    )
    assert logits.shape == (2, 3, V)
    assert drawn.shape == (2, 3)
    assert [a.shape for a in best] == [(2, 3, 4)] * 2


@each_kind
def test_weights_and_ignored_labels(kind):
    head = KINDS[kind].make()
    weights = np.array([1.0, 0.0, 0.5, 2.0, 0.0, 1.0], np.float32)
    hidden = HIDDEN.at[1].set(jnp.nan)
    labels = LABELS.at[4].set(-100)

    @nnx.jit
    def results(head):
        def nothing(hidden):
            return head.loss(hidden, jnp.full(N, -100), ignore_label=-100)

        return (
            head.loss(HIDDEN, LABELS, reduction="none"),
            head.loss(hidden, labels, weights=weights),
            head.loss(HIDDEN, labels, ignore_label=-100, reduction="sum"),
            head.loss(HIDDEN, labels),
            jax.value_and_grad(nothing)(HIDDEN),
        )

    per_token, weighted, total, bad, (value, gradient) = results(head)
    per_token = np.asarray(per_token)
    expected = (weights * per_token).sum() / weights.sum()
    np.testing.assert_allclose(weighted, expected, rtol=1e-5)
    np.testing.assert_allclose(total, per_token[[0, 1, 2, 3, 5]].sum(), rtol=1e-5)
    assert value == 0 and (np.asarray(gradient) == 0).all()
    assert np.isnan(bad)


@each_kind
def test_log_prob_of_tokens_without_weight(kind):
    head = KINDS[kind].make()
    weights = np.array([1.0, 0.0, 0.5, 2.0, 1.0, 1.0], np.float32)
    bad = HIDDEN.at[1].set(jnp.nan).at[4].set(jnp.inf)
    labels = LABELS.at[1].set(-1).at[4].set(-100)
    keep = np.array([True, False, True, True, False, True])

    @nnx.jit
    def results(head, hidden, labels):
        def total(head, hidden):
            found = head.log_prob(
                hidden, labels, weights=weights, ignore_label=-100, temperature=0.7
            )
            # As a loss that selects by a mask of its own.
            return jnp.where(keep, jnp.exp(found), 0).sum(), found

        return nnx.grad(total, argnums=(0, 1), has_aux=True)(head, hidden)

    (of_head, of_hidden), found = results(head, bad, labels)
    expected = weights * head.log_prob(HIDDEN, LABELS, temperature=0.7)
    np.testing.assert_allclose(found, np.where(keep, expected, 0), rtol=1e-5)
    assert (np.asarray(of_hidden)[~keep] == 0).all()
    for leaf in jax.tree.leaves(of_head):
        assert np.isfinite(leaf).all()
    (clean, _), _ = results(head, HIDDEN, LABELS.at[4].set(-100))
    for a, b in zip(*map(jax.tree.leaves, (of_head, clean)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@each_kind
@pytest.mark.many_cases
def test_temperature_of_the_module_and_of_the_call(kind):
    warm, tau = KINDS[kind].make(), np.linspace(0.5, 2, N, dtype=np.float32)
    cold = [KINDS[kind].make(temperature=given) for given in (0.5, jnp.asarray(0.5))]

    @nnx.jit
    def results(warm, *cold):
        return (
            warm.log_prob(HIDDEN, LABELS),
            warm.log_prob(HIDDEN, LABELS, temperature=0.5),
            [head.log_prob(HIDDEN, LABELS) for head in cold],
            warm.log_prob(HIDDEN, LABELS, temperature=tau),
            warm.loss(HIDDEN, LABELS, temperature=tau, reduction="none"),
            [
                warm.sample(jax.random.key(seed), HIDDEN, temperature=0.0)
                for seed in range(2)
            ],
        )

    @nnx.jit
    def row_alone(head, hidden, label, tau):
        return head.log_prob(hidden, label, temperature=tau)

    other, expected, of_modules, rows, loss, greedy = results(warm, *cold)
    for found in of_modules:
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert (np.abs(found - other) > 1e-3).any()
    for row in range(N):
        alone = row_alone(warm, HIDDEN[row], LABELS[row], tau[row])
        np.testing.assert_allclose(rows[row], alone, rtol=1e-5)
    np.testing.assert_allclose(loss, -rows, rtol=1e-6)
    np.testing.assert_array_equal(*greedy)


@each_kind
def test_logits_are_not_divided_by_the_temperature(kind):
    @nnx.jit
    def logits(cold, warm):
        return cold(HIDDEN), warm(HIDDEN)

    cold, warm = logits(KINDS[kind].make(temperature=0.5), KINDS[kind].make())
    np.testing.assert_allclose(cold, warm, rtol=1e-6)


@each_kind
def test_samples_follow_the_probabilities(kind):
    head = KINDS[kind].make()
    draws = 40_000

    @nnx.jit
    def results(head):
        hidden = jnp.broadcast_to(HIDDEN[:1], (draws, H))
        return head.sample(jax.random.key(7), hidden), head(HIDDEN[0])

    drawn, logits = results(head)
    expected = draws * truth.softmax(logits)
    observed = np.bincount(drawn, minlength=V)
    squares = (observed - expected) ** 2 / expected
    # 49 degrees of freedom: above 100 once in 40,000 times.
    assert squares.sum() < 100


@each_kind
def test_parameters_alone_are_trained(kind):
    head = KINDS[kind].make()
    head.train()
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(head, nnx.Param)))
    assert all(jax.tree.leaves(shapes))
    optimizer = nnx.Optimizer(head, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(head, optimizer):
        loss, grads = nnx.value_and_grad(lambda h: h.loss(HIDDEN, LABELS))(head)
        optimizer.update(head, grads)
        return loss

    log_prob = nnx.jit(lambda head: head.log_prob(HIDDEN, LABELS))
    before = log_prob(head).mean()
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        for _ in range(30):
            step(head, optimizer)
    after = log_prob(head)
    assert after.mean() > 0.2 * before
    graph, state = nnx.split(head)
    again = nnx.merge(graph, state)
    np.testing.assert_array_equal(log_prob(again), after)


@each_kind
@pytest.mark.many_cases
def test_dtype_and_param_dtype(kind):
    head = KINDS[kind].make(dtype=jnp.bfloat16)
    exact = KINDS[kind].make()
    params = jax.tree.leaves(nnx.state(head, nnx.Param))
    assert {leaf.dtype for leaf in params} == {jnp.dtype("float32")}

    @nnx.jit
    def results(head, exact):
        grads = nnx.grad(lambda head: head.loss(HIDDEN, LABELS))(head)
        return grads, [h.log_prob(HIDDEN, LABELS) for h in (head, exact)]

    grads, (found, expected) = results(head, exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=3e-2)
    assert (np.asarray(found) != np.asarray(expected)).any()
    short = KINDS[kind].make(param_dtype=jnp.bfloat16)
    params = jax.tree.leaves(nnx.state(short, nnx.Param))
    assert {leaf.dtype for leaf in params} == {jnp.dtype("bfloat16")}


@each_kind
def test_linen_model_through_the_bridge(kind):
    chosen = KINDS[kind]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            head = bridge.ToLinen(
                chosen.module, args=(H, *chosen.arguments), name="head"
            )
            return head(nn.Dense(H)(x), labels, nnx_method="log_prob")

    model = Model()
    variables: Any = jax.jit(model.init)(jax.random.key(0), HIDDEN, LABELS)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        found: Any = model.apply(variables | {"params": params}, HIDDEN, LABELS)
        return -found.mean()

    value, grads = loss(variables["params"])
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda a, g: a - 0.1 * g, variables["params"], grads)
    assert loss(moved)[0] < value


def test_row_gradients_are_the_dense_ones():
    head = KINDS["hierarchical"].make()
    weights = jnp.array([1.0, 0.0, 0.5, 2.0, 0.0, 1.0])
    options: Any = {"weights": weights, "temperature": 0.7}

    @nnx.jit
    def results(head):
        loss, dhidden, rows = head.value_and_row_grad(HIDDEN, LABELS, **options)
        dense = nnx.value_and_grad(
            lambda head, hidden: head.loss(hidden, LABELS, **options), argnums=(0, 1)
        )(head, HIDDEN)
        ignored = (
            head.value_and_row_grad(HIDDEN, LABELS, ignore_label=3)[0],
            head.loss(HIDDEN, LABELS, ignore_label=3),
        )
        return (loss, dhidden, rows.dense(V - 1)), dense, ignored

    (loss, dhidden, (kernel, bias)), (value, (grads, expected)), ignored = results(head)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(dhidden, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(kernel, grads["node_kernel"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(bias, grads["node_bias"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(*ignored, rtol=1e-6)


def test_adaptive_tails_get_narrower_and_never_vanish():
    head = KINDS["adaptive"].make(tail_factor=2.0)
    assert [p.shape for p in head.projections] == [(H, 8), (H, 4)]
    assert [k.shape for k in head.tail_kernels] == [(8, 18), (4, 20)]
    assert [b.shape for b in head.tail_biases] == [(18,), (20,)]
    wide = KINDS["adaptive"].make(tail_features=(5, 3), use_bias=False)
    assert [p.shape for p in wide.projections] == [(H, 5), (H, 3)]
    assert wide.bias is None and not wide.tail_biases


def test_sampled_head_samples_in_training_alone():
    head = KINDS["sampled"].make()
    key = jax.random.key(5)

    @nnx.jit
    def evaluated(head):
        return head.full.loss(HIDDEN, LABELS), head.loss(HIDDEN, LABELS)

    @nnx.jit
    def trained(head):
        expected = jaxsoft.sampled_softmax_loss(
            key,
            HIDDEN,
            head.full.kernel[...],
            LABELS,
            16,
            sampler=SAMPLER,
            bias=head.full.bias[...],
            temperature=0.7,
        )
        found = head.loss(HIDDEN, LABELS, key=key, temperature=0.7)
        return expected, found, head.loss(HIDDEN, LABELS)

    full, found = evaluated(head)
    np.testing.assert_array_equal(found, full)
    head.train()
    expected, found, first = trained(head)
    np.testing.assert_array_equal(found, expected)
    # Its own keys: another sample each time.
    _, _, second = trained(head)
    assert first != second and first != full


def test_sampled_head_tied_to_an_embedding():
    embedding = nnx.Embed(V, H, rngs=nnx.Rngs(1))
    head = KINDS["sampled"].make(embedding=embedding, use_bias=False)
    head.train()
    key = jax.random.key(2)

    @nnx.jit
    def results(head, embedding):
        table = embedding.embedding[...]
        expected = jaxsoft.sampled_softmax_loss(
            key, HIDDEN, table.T, LABELS, 16, sampler=SAMPLER
        )
        return head.loss(HIDDEN, LABELS, key=key), expected

    np.testing.assert_allclose(*results(head, embedding), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: HierarchicalSoftmaxHead(H, V, rngs=nnx.Rngs(0)),  # type: ignore
            TypeError,
            "`tree` must be a ClassTree, got int.",
        ),
        (
            lambda: AdaptiveSoftmaxHead(H, TREE, rngs=nnx.Rngs(0)),  # type: ignore
            TypeError,
            "`bands` must be a ClassBands, got ClassTree.",
        ),
        (
            lambda: KINDS["adaptive"].make(tail_factor=5.0),
            ValueError,
            r"`tail_factor` must leave each of 2 tails a feature of 16, got 5: widths "
            r"\(3, 0\). Give `tail_features`.",
        ),
        (
            lambda: KINDS["adaptive"].make(tail_features=(2,)),
            ValueError,
            "`tail_features` must be one for each of 2 tails",
        ),
        (
            lambda: KINDS["adaptive"].make(tail_features=(2, 0)),
            ValueError,
            "`tail_features` must be at least 1, got 0.",
        ),
        (
            lambda: SampledSoftmaxHead(H, V, 0, SAMPLER, rngs=nnx.Rngs(0)),
            ValueError,
            "`num_samples` must be at least 1, got 0.",
        ),
        (
            lambda: SampledSoftmaxHead(H, V + 1, 4, SAMPLER, rngs=nnx.Rngs(0)).loss(
                HIDDEN, LABELS
            ),
            ValueError,
            "`sampler` must be over 51 classes, got 50.",
        ),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("counts", lambda x: KINDS_OF_COUNTS["hierarchical"](x[0])),
        ("counts", lambda x: KINDS_OF_COUNTS["adaptive"](x[0])),
        ("counts", lambda x: KINDS_OF_COUNTS["sampled"](x[0])),
        ("embeddings", jaxsoft.ClassTree.clustered),
        ("probabilities", lambda x: TREE.biases(x[0])),
    ],
)
def test_counts_that_a_program_computes_are_told_what_to_do(name, make):
    @nnx.jit
    def build():
        make(jnp.ones((1, V)))
        return HierarchicalSoftmaxHead(H, TREE, rngs=nnx.Rngs(0))

    with pytest.raises(TypeError, match=f"`{name}` must be known when a program is tr"):
        build()


def test_heads_are_made_from_known_counts_inside_a_program():
    known = jnp.asarray(COUNTS + 1.0)

    modules: list[tuple[str, Callable[..., Any], tuple[int, ...]]] = [
        ("hierarchical", HierarchicalSoftmaxHead, (H,)),
        ("adaptive", AdaptiveSoftmaxHead, (H,)),
        ("sampled", SampledSoftmaxHead, (H, V, 16)),
    ]

    @nnx.jit
    def build():
        with jax.ensure_compile_time_eval():
            counts = known * 2
        return [
            module(*sizes, KINDS_OF_COUNTS[name](counts), rngs=nnx.Rngs(0))
            for name, module, sizes in modules
        ]

    tree, bands, sampled = build()
    for found, make in (
        (tree.tree, KINDS_OF_COUNTS["hierarchical"]),
        (bands.bands, KINDS_OF_COUNTS["adaptive"]),
        (sampled.sampler, KINDS_OF_COUNTS["sampled"]),
    ):
        expected = make(2 * np.asarray(known))
        leaves = map(jax.tree.leaves, (found.get_value(), expected))
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.isfinite(tree.loss(HIDDEN, LABELS))


@each_kind
def test_messages_of_calls(kind):
    head = KINDS[kind].make()
    with pytest.raises(TypeError, match="`hidden` must have a floating"):
        head.loss(jnp.zeros((N, H), int), LABELS)
    with pytest.raises(ValueError, match="`labels` must have shape"):
        head.loss(HIDDEN, LABELS[:2])
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        head.loss(HIDDEN, LABELS, reduction="median")


@each_kind
def test_state_is_plain_arrays_and_comes_back_from_a_pure_dictionary(kind):
    head = KINDS[kind].make()
    state = nnx.state(head)
    for _, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.RngState):
            np.testing.assert_array_equal(np.asarray(variable[...]) * 0, 0)
    pure = nnx.to_pure_dict(nnx.state(head, nnx.Not(nnx.RngState)))
    arrays = jax.tree.map(np.asarray, pure)
    # Another tree, other bands and another sampler of the same form.
    graph, own, keys = nnx.split(
        KINDS[kind].make(seed=1), nnx.Not(nnx.RngState), nnx.RngState
    )
    for path, variable in nnx.to_flat_state(own):
        if path[0] in ("tree", "bands", "sampler"):
            variable[...] = variable[...] * 0
    nnx.replace_by_pure_dict(own, nnx.restore_int_paths(arrays))
    again = nnx.merge(graph, own, keys)
    for f in (lambda h: h.log_prob(HIDDEN, LABELS), lambda h: h(HIDDEN)):
        np.testing.assert_array_equal(f(again), f(head))


def test_the_structure_of_a_head_is_what_it_was_given():
    kinds = {"hierarchical": ("tree", TREE), "adaptive": ("bands", BANDS)}
    for kind, (name, given) in (kinds | {"sampled": ("sampler", SAMPLER)}).items():
        found = getattr(KINDS[kind].make(), name).get_value()
        assert type(found) is type(given)
        assert jax.tree.structure(found) == jax.tree.structure(given)
        for a, b in zip(*map(jax.tree.leaves, (found, given)), strict=True):
            np.testing.assert_array_equal(a, b)
    # A tree that is known by its form alone has no state.
    balanced = HierarchicalSoftmaxHead(
        H, jaxsoft.ClassTree.balanced(V), rngs=nnx.Rngs(0)
    )
    assert list(nnx.to_pure_dict(nnx.state(balanced))) == ["node_kernel"]


class _EveryOther:
    """A sampler of one's own that is no pytree."""

    def sample(self, key, num_samples):
        return 2 * jax.random.randint(key, (num_samples,), 0, V // 2)

    def log_prob(self, class_ids):
        return jnp.where(class_ids % 2, -jnp.inf, -jnp.log(V // 2))


def test_a_sampler_of_ones_own_is_a_constant():
    sampler = _EveryOther()
    head = SampledSoftmaxHead(H, V, 16, sampler, rngs=nnx.Rngs(0))
    assert head.sampler.get_value() is sampler
    key = jax.random.key(4)
    found = nnx.jit(lambda head: head.loss(HIDDEN, LABELS, key=key))(head)
    assert head.full.kernel is not None
    expected = jaxsoft.sampled_softmax_loss(
        key, HIDDEN, head.full.kernel[...], LABELS, 16, sampler=sampler
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tables_name_their_arrays_by_paths():
    value = {"a": (np.arange(3), 2.5), "b": [np.ones(2, np.int32)], "c": "text"}
    tables = Tables(value)
    names = nnx.to_pure_dict(nnx.state(tables))
    assert sorted(names) == ["a_0", "b_0"]
    assert jax.tree.structure(tables.get_value()) == jax.tree.structure(value)
    assert sorted(nnx.to_pure_dict(nnx.state(Tables((np.arange(3),))))) == ["array_0"]
    np.testing.assert_array_equal(Tables(np.arange(3)).get_value(), np.arange(3))
