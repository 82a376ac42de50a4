"""Cached generation against the uncached model, for every head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsoft.training.heads import HeadPlan
from jaxsoft.training.language_model import generation
from jaxsoft.training.language_model.config import TransformerConfig
from jaxsoft.training.language_model.generation import (
    Generator,
    Sampling,
    TokenText,
    encode_prompt,
)
from jaxsoft.training.language_model.tokens import DOCUMENT_START, _train_tokenizer
from jaxsoft.training.language_model.transformer import LanguageModel

# One worker: its programs serve many tests.
CONFIG = TransformerConfig(num_classes=40, features=16, layers=2, heads=2)
LENGTH = 8
PROMPT = [5, 6, 7]


@functools.cache
def model_of(kind):
    """A model whose parameters are all random: heads start at zero kernels."""
    plan = HeadPlan(kind, tuple(range(40)), 8)
    model = LanguageModel(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(
        structure,
        [
            leaf + 0.3 * jax.random.normal(key, leaf.shape)
            for key, leaf in zip(keys, leaves, strict=True)
        ],
    )
    model = nnx.merge(graph, params, rest)
    model.eval()
    return model


@functools.cache
def generator_of(kind):
    return Generator(model_of(kind), LENGTH)


# The first and the last are of the default tier, where there are many cases.
@pytest.fixture(params=("full", "sampled", "adaptive", "hierarchical"))
def kind(request):
    return request.param


def drawn(kind, prompt, num_tokens, sampling, **options) -> Any:
    """Tokens [B, n] and, if they are asked for, their log-probabilities."""
    options.setdefault("seed", 3)
    steps = [*generator_of(kind).stream(prompt, num_tokens, sampling, **options)]
    tokens = np.stack([step.token_ids for step in steps], axis=1)
    log_probs = [step.log_probs for step in steps if step.log_probs is not None]
    return (tokens, np.stack(log_probs, axis=1)) if log_probs else tokens


@nnx.jit
def draw_plainly(model, window, last, key, temperature):
    hidden = model.trunk(window)[:, last]
    return model.head.sample(key, hidden, temperature=temperature)


def plain_loop(kind, prompt, num_tokens, temperature):
    """Draws with the whole window through the model each time."""
    model, context, tokens = model_of(kind), list(prompt)[-LENGTH:], []
    for number in range(num_tokens):
        if len(context) > LENGTH:
            context = context[-(LENGTH // 2) :]
        window = jnp.asarray([context + [39] * (LENGTH - len(context))])
        key = jax.random.fold_in(jax.random.key(3), number)
        last, tau = len(context) - 1, jnp.array([temperature])
        token = int(draw_plainly(model, window, last, key, tau)[0])
        tokens.append(token)
        context.append(token)
    return tokens


def test_hidden_states_by_pieces_are_those_of_the_whole():
    model = model_of("full")
    tokens = jax.random.randint(jax.random.key(2), (3, 8), 0, 40)

    @nnx.jit
    def by_pieces(model):
        cache = model.trunk.empty_cache(3, 8)
        # What lies beyond the positions that were seen does not matter.
        cache = jax.tree.map(lambda array: array + 1e3, cache)
        parts, first = [], 0
        for length in (5, 1, 2):
            piece = tokens[:, first : first + length]
            part, cache = model.trunk.extend(piece, cache, jnp.int32(first))
            parts.append(part)
            first += length
        return jnp.concatenate(parts, axis=1)

    whole, hidden = nnx.jit(lambda model: model.trunk(tokens))(model), by_pieces(model)
    np.testing.assert_allclose(hidden, whole, rtol=2e-5, atol=2e-5)
    logits, expected = model.head(hidden), model.head(whole)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_those_of_a_plain_loop(kind, temperature):
    """Past the window's end, too, where its older half goes."""
    generator: Any = generator_of(kind)
    programs = generator._step, generator._read
    before = [program._cache_size() for program in programs]
    found = drawn(kind, PROMPT, 20, Sampling(temperature))
    assert found[0].tolist() == plain_loop(kind, PROMPT, 20, temperature)
    for program, size in zip(programs, before, strict=True):
        assert program._cache_size() <= size + 1


@pytest.mark.many_cases
def test_long_prompt_counts_by_its_end(kind):
    long = [*range(20)]
    found = drawn(kind, long, 4, Sampling(0.7))
    np.testing.assert_array_equal(found, drawn(kind, long[-8:], 4, Sampling(0.7)))
    assert found[0].tolist() == plain_loop(kind, long, 4, 0.7)


@pytest.mark.many_cases
def test_a_seed_gives_the_same_texts_however_many(kind):
    warm = Sampling(1.5)
    one, again, other = (drawn(kind, PROMPT, 12, warm, seed=seed) for seed in (3, 3, 4))
    three = drawn(kind, PROMPT, 12, warm, rows=3)
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, three[:1])
    assert one.tolist() != other.tolist()
    assert three[0].tolist() != three[1].tolist()


def test_a_window_of_one_token():
    generator = Generator(model_of("full"), 1)
    steps = [*generator.stream(PROMPT, 3, Sampling(0.0), seed=0)]
    assert len(steps) == 3


@pytest.mark.many_cases
def test_log_probs_are_those_of_the_logits(kind):
    temperatures = (0.0, 0.7, 2.0)
    options = {"sampling": Sampling(temperatures), "rows": 3}
    tokens, log_probs = drawn(kind, PROMPT, 5, **options, log_probs=True)
    model = model_of(kind)
    texts = np.concatenate([np.tile(PROMPT, (3, 1)), tokens], axis=1)

    @nnx.jit
    def of_logits(model, texts):
        hidden = model.trunk(texts[:, :-1])[:, 2:]
        temperature = jnp.tile(jnp.array(temperatures)[:, None], (1, 5))
        return model.head.log_prob(hidden, texts[:, 3:], temperature=temperature)

    found = of_logits(model, jnp.asarray(texts))
    np.testing.assert_allclose(log_probs, found, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(tokens, drawn(kind, PROMPT, 5, **options))


@pytest.mark.parametrize("kind", ["full", "sampled"])
@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 3, "min_p": 1}]
)
def test_filters_leave_the_likeliest_token(kind, filters):
    greedy = drawn(kind, PROMPT, 6, Sampling(0.0))
    found = drawn(kind, PROMPT, 6, Sampling(2.0, **filters))
    np.testing.assert_array_equal(found, greedy)
    unfiltered, log_probs = drawn(kind, PROMPT, 6, Sampling(2.0), log_probs=True)
    assert (unfiltered != greedy).any() and (log_probs < -0.01).any()


@pytest.mark.parametrize("kind", ["hierarchical", "adaptive"])
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_a_filter_that_a_head_lacks_is_named(kind, name):
    with pytest.raises(ValueError, match=f"`{name}` must be left out .*Head, which ha"):
        drawn(kind, PROMPT, 2, Sampling(**{name: 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "`temperature` must be in [0, inf], got -1.0."),
        ({"temperature": float("nan")}, "`temperature` must be in [0, inf], got nan."),
        ({"temperature": (1.0, -2.0)}, "`temperature` must be in [0, inf], got -2.0."),
        ({"top_k": -1}, "`top_k` must be at least 0, got -1."),
        ({"top_p": 1.5}, "`top_p` must be in [0, 1], got 1.5."),
        ({"min_p": -0.1}, "`min_p` must be in [0, 1], got -0.1."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError) as caught:
        Sampling(**options)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer():
    return _train_tokenizer(["the text, the text, the text"] * 3, 270)


def test_characters_come_when_they_are_whole(tokenizer):
    text = "the é東🙂 end"
    ids, decoder = encode_prompt(tokenizer, text), TokenText(tokenizer)
    assert ids[0] == 0 and len(ids) > len(text)
    pieces = [decoder.add(token_id) for token_id in ids]
    assert "".join(pieces) == text and decoder.end() == ""
    assert "�" not in "".join(pieces) and "" in pieces[1:]


def test_a_spelt_out_mark_is_text(tokenizer):
    """As it is in training."""
    text = f"a{DOCUMENT_START}b"
    ids = encode_prompt(tokenizer, text)
    assert ids.count(0) == 1 and tokenizer.decode(ids) == text


def test_a_trunk_with_half_a_cache_reads_all():
    class Extends(nnx.Module):
        extend = None

    trunk = Extends()
    assert generation._cached(trunk) is not trunk
    assert generation._cached(model_of("full").trunk) is model_of("full").trunk


def test_pieces_are_what_the_tokenizer_decodes(tokenizer):
    """Whatever bytes they are."""
    size = tokenizer.get_vocab_size()
    for seed in range(50):
        ids = np.random.default_rng(seed).integers(0, size, 40).tolist()
        decoder = TokenText(tokenizer)
        pieces = [decoder.add(token_id) for token_id in ids]
        assert "".join(pieces) + decoder.end() == tokenizer.decode(ids)
