"""What a head calls, and how it is tied: the same numbers as the functions alone."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import jaxsoft
from jaxsoft.nn import SampledSoftmaxHead, SoftmaxHead
from tests.linear import cases

H, V, N = 8, 50, 6
HIDDEN, _, LABELS = cases.layer(N, H, V)
KEY = jax.random.key(3)
IDS = jnp.stack([LABELS, (LABELS + 7) % V], -1)
VALUES = jnp.sin(jnp.arange(3.0 * V)).reshape(V, 3)
MASK = np.arange(V) % 7 > 0
TEACHER = cases.layer(N, 5, V)
LOG_PROBS = jnp.log(jnp.full(IDS.shape, 0.4))
# The arguments of a function by position, without those of the layer, and its options.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "linear_cross_entropy": ((HIDDEN, LABELS), {"label_smoothing": 0.1}),
    "linear_distillation": (
        (HIDDEN, TEACHER[0], TEACHER[1]),
        {"divergence": "reverse_kl", "alpha": 0.1},
    ),
    "linear_distillation_top_k": (
        (HIDDEN, IDS, LOG_PROBS),
        {"remaining": "ignore", "labels": LABELS, "label_weight": 0.2},
    ),
    "linear_expected": ((HIDDEN, VALUES), {"key": KEY}),
    "linear_fit_temperature": ((HIDDEN, LABELS), {"bounds": (0.1, 5.0)}),
    "linear_log_prob": ((HIDDEN, LABELS), {"class_mask": MASK}),
    "linear_log_prob_at": ((HIDDEN, IDS), {"ignore_label": 7}),
    "linear_sample": (
        (KEY, HIDDEN),
        {"class_mask": MASK, "top_k": 5, "top_p": 0.9, "return_log_prob": True},
    ),
    "linear_statistics": (
        (HIDDEN, LABELS),
        {"return_argmax": True, "return_rank": True, "return_top_k": 3},
    ),
    "linear_top_k": ((HIDDEN, 3), {}),
}


KINDS = ("hv", "vh", "tied")


def _head(**options):
    options = {"rngs": nnx.Rngs(0), "use_bias": True} | options
    options.setdefault("bias_init", nnx.initializers.normal(1.0))
    return SoftmaxHead(H, V, **options)


def _of_kind(kind, **options):
    """Returns a head whose kernel is [H, V], [V, H], or that of an embedding."""
    if kind == "tied":
        return _head(embedding=nnx.Embed(V, H, rngs=nnx.Rngs(1)), **options)
    return _head(kernel_layout=kind, **options)


def _equal(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kernel_of_either_layout_starts_alike():
    by_features, by_classes = heads = [_head(kernel_layout=x) for x in KINDS[:2]]
    assert by_features.kernel is not None and by_classes.kernel is not None
    assert by_classes.kernel[...].shape == (V, H)
    _equal(by_classes.kernel[...].T, by_features.kernel[...])
    losses = [head.loss(HIDDEN, LABELS) for head in heads]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    np.testing.assert_allclose(*(head(HIDDEN) for head in heads), rtol=1e-5)
    with pytest.raises(ValueError, match="`kernel_layout` must be"):
        _head(kernel_layout="v")
    partitioned = nnx.with_partitioning(nnx.initializers.zeros, (None, "classes"))
    with pytest.raises(TypeError, match="`kernel_init` must return an array"):
        _head(kernel_layout="vh", kernel_init=partitioned)


def test_every_function_of_a_layer_is_called():
    names = {name for name in jaxsoft.__all__ if name.startswith("linear_")}
    assert CALLS.keys() == names


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.many_cases
def test_call_gives_a_function_all_of_the_head(name, kind):
    head = _of_kind(
        kind,
        logit_softcap=0.7,
        temperature=0.6,
        dtype=jnp.bfloat16,
        workspace_bytes=1024,
    )
    function = getattr(jaxsoft, name)
    arguments, options = CALLS[name]
    names = list(inspect.signature(function).parameters)
    prefix = "student_" if "student_kernel" in names else ""

    @nnx.jit
    def results(head):
        param = head.embedding.embedding if kind == "tied" else head.kernel
        kernel = param[...].astype("bfloat16")
        place = names.index(f"{prefix}hidden")
        plain = list(arguments)
        plain[place] = plain[place].astype("bfloat16")
        plain.insert(place + 1, kernel)
        own = {
            f"{prefix}bias": head.bias[...],
            f"{prefix}logit_softcap": 0.7,
            f"{prefix}kernel_layout": "hv" if kind == "hv" else "vh",
            "workspace_bytes": 1024,
        }
        if "temperature" in names:
            own["temperature"] = 0.6
        hot = {"temperature": 2.0} if "temperature" in names else {}
        return (
            head.call(function, *arguments, **options),
            function(*plain, **own, **options),
            head.call(function, *arguments, **options, **hot),
            function(*plain, **own | hot, **options),
        )

    found, expected, hot, hot_expected = results(head)
    _equal(found, expected)
    _equal(hot, hot_expected)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_are_calls_with_names(kind):
    head = _of_kind(kind, logit_softcap=0.7, temperature=0.6)
    teacher = SoftmaxHead(5, V, logit_softcap=2.0, use_bias=True, rngs=nnx.Rngs(2))
    masked: Any = {"class_mask": MASK, "temperature": 0.8}
    weights = np.linspace(0, 1, N, dtype=np.float32)

    @nnx.jit
    def results(head, teacher):
        pair = head.call(jaxsoft.linear_log_prob, HIDDEN, LABELS, **masked)
        return [
            (head.log_prob(HIDDEN, LABELS, return_entropy=True, **masked), pair),
            (head.log_prob(HIDDEN, LABELS, **masked), pair[0]),
            (
                head.log_prob_at(HIDDEN, IDS, weights=weights, **masked),
                head.call(
                    jaxsoft.linear_log_prob_at, HIDDEN, IDS, weights=weights, **masked
                ),
            ),
            (
                head.log_prob_at(HIDDEN, IDS, normalize=True, **masked),
                head.call(
                    jaxsoft.linear_log_prob_at, HIDDEN, IDS, normalize=True, **masked
                ),
            ),
            (
                head.statistics(
                    HIDDEN,
                    LABELS,
                    return_argmax=True,
                    return_rank=True,
                    return_top_k=3,
                    **masked,
                ),
                head.call(
                    jaxsoft.linear_statistics,
                    HIDDEN,
                    LABELS,
                    return_argmax=True,
                    return_rank=True,
                    return_top_k=3,
                    **masked,
                ),
            ),
            (
                head.statistics(HIDDEN).lse,
                head.call(jaxsoft.linear_statistics, HIDDEN).lse,
            ),
            (
                head.fit_temperature(HIDDEN, LABELS, weights=weights, bounds=(0.1, 9)),
                head.call(
                    jaxsoft.linear_fit_temperature,
                    HIDDEN,
                    LABELS,
                    weights=weights,
                    bounds=(0.1, 9),
                ),
            ),
            (
                head.distillation(
                    HIDDEN,
                    teacher,
                    TEACHER[0],
                    divergence="jensen_shannon",
                    beta=0.3,
                    labels=7 * (LABELS // 14) + 1,
                    label_weight=0.3,
                    **masked,
                ),
                jaxsoft.distillation_loss(
                    head(HIDDEN),
                    teacher(TEACHER[0]),
                    0.8,
                    where=MASK[None],
                    divergence="jensen_shannon",
                    beta=0.3,
                    labels=7 * (LABELS // 14) + 1,
                    label_weight=0.3,
                ).mean(),
            ),
        ]

    options = {"remaining": "drop", "divergence": "reverse_kl", "labels": LABELS}
    _equal(
        head.distillation_top_k(HIDDEN, IDS, LOG_PROBS, label_weight=0.1, **options),
        head.call(
            jaxsoft.linear_distillation_top_k,
            *(HIDDEN, IDS, LOG_PROBS),
            label_weight=0.1,
            **options,
        ),
    )
    *same, distilled = results(head, teacher)
    for found, expected in same:
        _equal(found, expected)
    np.testing.assert_allclose(*distilled, rtol=1e-5)


def test_a_function_over_a_mesh_and_one_of_ones_own():
    head = _head(temperature=0.6)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("vocab",))
    shared = jaxsoft.over_mesh(jaxsoft.linear_log_prob, mesh, vocab_axis="vocab")

    def largest(hidden, kernel, **options):
        assert options["kernel_layout"] == "hv"
        return jnp.max(hidden @ kernel + options["bias"][None], axis=1)

    def no_bias(hidden, kernel):
        return hidden @ kernel

    @nnx.jit
    def results(head, plain):
        return (
            (head.call(shared, HIDDEN, LABELS)[0], head.log_prob(HIDDEN, LABELS)),
            (head.call(largest, HIDDEN), jnp.max(head(HIDDEN), axis=1)),
            (plain.call(no_bias, hidden=HIDDEN), plain(HIDDEN)),
        )

    for found, expected in results(head, _head(use_bias=False)):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(
        ValueError,
        match="`bias` must be None in a head for no_bias, which has no other",
    ):
        head.call(no_bias, HIDDEN)
    with pytest.raises(ValueError, match="`kernel_layout` must be 'hv' in a head for"):
        _of_kind("tied", use_bias=False).call(no_bias, HIDDEN)
    with pytest.raises(ValueError, match="`logit_softcap` must be None in a head for "):
        _head(logit_softcap=2.0).call(
            jaxsoft.sampled_softmax_loss,
            KEY,
            HIDDEN,
            LABELS,
            4,
            sampler=jaxsoft.ClassSampler.uniform(V),
        )
    with pytest.raises(TypeError, match="`function` must take `hidden` and `kernel`"):
        head.call(jaxsoft.softmax, HIDDEN)
    with pytest.raises(TypeError, match="missing a required argument: 'labels'"):
        head.call(jaxsoft.linear_log_prob, HIDDEN)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_q'"):
        head.call(jaxsoft.linear_sample, KEY, HIDDEN, top_q=0.9)
    other = _head(vocab_axis="vocab")
    with pytest.raises(
        ValueError, match="`teacher` must have the vocab_axis None, got"
    ):
        head.distillation(HIDDEN, other, HIDDEN)


def test_logits_of_leading_axes_and_of_the_wrong_width():
    head = _of_kind("tied", logit_softcap=0.7)
    logits = nnx.jit(lambda head: head(HIDDEN.reshape(2, 3, H)))(head)
    assert head.embedding is not None and head.bias is not None
    table = np.asarray(head.embedding.embedding[...], np.float64)
    u = np.asarray(HIDDEN, np.float64) @ table.T + np.asarray(head.bias[...])
    np.testing.assert_allclose(
        logits.reshape(N, V), 0.7 * np.tanh(u / 0.7), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(
        ValueError, match=r"`kernel` must have shape \[V, H\] with H = 7"
    ):
        head(HIDDEN[:, :7])


class _Model(nnx.Module):
    """A model that Flax's tree mode takes: no part of it is in two places."""

    def __init__(self, kind, rngs):
        self.embedding = nnx.Embed(V, H, rngs=rngs)
        options: Any = {"tied": True, "use_bias": True, "rngs": rngs}
        if kind == "full":
            self.head = SoftmaxHead(H, V, **options)
        else:
            sampler = jaxsoft.ClassSampler.uniform(V)
            self.head = SampledSoftmaxHead(H, V, 16, sampler, **options)

    def loss(self, tokens, **options):
        head = self.head.tied_to(self.embedding)
        return head.loss(self.embedding(tokens), tokens, **options)


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_tied_heads_in_tree_mode(kind):
    model = _Model(kind, nnx.Rngs(0))
    graph, parameters, others = nnx.split(model, nnx.Param, ..., graph=False)
    names: Any = {"embedding": {"embedding": (V, H)}, "head": {"bias": (V,)}}
    options = {}
    if kind == "sampled":
        names["head"] = {"full": names["head"]}
        options["key"] = KEY
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(parameters)) == names

    @jax.jit
    def step(parameters, others, rate):
        def loss(parameters):
            return nnx.merge(graph, parameters, others).loss(LABELS, **options)

        value, gradient = jax.value_and_grad(loss)(parameters)
        return value, jax.tree.map(lambda p, g: p - rate * g, parameters, gradient)

    def plain(table, bias):
        logits = table[LABELS] @ table.T + bias[None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    first, moved = step(parameters, others, np.float32(0.5))
    if isinstance(model.head, SoftmaxHead):
        assert model.head.bias is not None
        table, bias = model.embedding.embedding[...], model.head.bias[...]
        value, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(table, bias)
        np.testing.assert_allclose(first, value, rtol=1e-5)
        found = (moved["embedding"]["embedding"][...], moved["head"]["bias"][...])
        for after, before, gradient in zip(
            found, (table, bias), gradients, strict=True
        ):
            np.testing.assert_allclose(after, before - 0.5 * gradient, atol=1e-6)
    assert step(moved, others, np.float32(0.5))[0] < first


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_a_head_is_tied_in_a_program_that_it_was_not_made_in(kind):
    model = _Model(kind, nnx.Rngs(0))
    options = {"key": KEY} if kind == "sampled" else {}

    def loss(tokens):
        return model.loss(tokens, **options)

    whole = loss(LABELS)
    np.testing.assert_allclose(jax.jit(loss)(LABELS), whole, rtol=1e-6)
    each = jax.jit(jax.vmap(lambda token: loss(token[None])))(LABELS)
    np.testing.assert_allclose(each.mean(), whole, rtol=1e-5)
    # All parts of the head are those of the one that was tied, and what it draws
    # from its stream of keys is not drawn again.
    tied = model.head.tied_to(model.embedding)
    parts = {name for name in vars(model.head) if not name.startswith("_")}
    assert parts == {name for name in vars(tied) if not name.startswith("_")}
    assert type(model.head) in type(tied).__mro__
    if kind == "sampled":
        assert model.loss(LABELS) != model.loss(LABELS)


def test_a_tied_head_that_has_no_parameters_needs_no_keys():
    embedding = nnx.Embed(V, H, rngs=nnx.Rngs(1))
    plain, with_keys = (
        SoftmaxHead(H, V, embedding=embedding, rngs=rngs)
        for rngs in (None, nnx.Rngs(0))
    )
    np.testing.assert_array_equal(
        plain.loss(HIDDEN, LABELS), with_keys.loss(HIDDEN, LABELS)
    )
    sampled = SampledSoftmaxHead(
        H, V, 16, jaxsoft.ClassSampler.uniform(V), embedding=embedding
    )
    assert np.isfinite(sampled.loss(HIDDEN, LABELS, key=KEY))
    with pytest.raises(
        ValueError, match="`key` must be given where the head has no `rn"
    ):
        sampled.loss(HIDDEN, LABELS)
    for tied in (False, True):
        with pytest.raises(TypeError, match="`rngs` must be an nnx.Rngs to make param"):
            SoftmaxHead(H, V, tied=tied, use_bias=tied)
    with pytest.raises(
        ValueError, match="`embedding` must be given to a head with tie"
    ):
        SoftmaxHead(H, V, tied=True).loss(HIDDEN, LABELS)
    with pytest.raises(
        ValueError, match="`embedding` must be None with tied=True, and"
    ):
        SoftmaxHead(H, V, tied=True, embedding=embedding)
    with pytest.raises(ValueError, match="`embedding` must have shape"):
        SoftmaxHead(H, V + 1, tied=True).tied_to(embedding)
    with pytest.raises(ValueError, match="`tied` must be True in a head for `tied_to`"):
        _head().tied_to(embedding)
    with pytest.raises(ValueError, match="`kernel_metadata` must be empty with a tied"):
        SoftmaxHead(H, V, tied=True, kernel_metadata={"out_sharding": (None, "vocab")})
