import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from jaxsoft.training.errors import CorpusError
from jaxsoft.training.language_model import tokens as tokens_module
from jaxsoft.training.language_model.corpus import read_corpus
from jaxsoft.training.language_model.tokens import default_cache_dir, prepare_tokens
from jaxsoft.training.language_model.windows import Windows
from jaxsoft.training.unigram import (
    unigram_cross_entropy,
    unigram_entropy,
    unigram_log_probs,
)


@pytest.fixture
def corpus(corpus_dir):
    return read_corpus(corpus_dir)


def decode_texts(cache, tokens):
    tokenizer = cache.load_tokenizer()
    starts = [*np.flatnonzero(tokens == 0), len(tokens)]
    return [
        tokenizer.decode(tokens[first + 1 : last].tolist())
        for first, last in zip(starts[:-1], starts[1:], strict=True)
    ]


def test_tokens_spell_the_texts(corpus, tmp_path):
    cache = prepare_tokens(corpus, 270, tmp_path)
    assert tuple(decode_texts(cache, cache.train)) == corpus.train
    assert tuple(decode_texts(cache, cache.validation)) == corpus.validation
    assert cache.facts.vocab_size == 270
    assert cache.train.max() < 270
    assert len(cache.train) == cache.facts.train_tokens


def test_second_time_reads_the_memory_mapped_cache(corpus, tmp_path, monkeypatch):
    first = prepare_tokens(corpus, 270, tmp_path)
    monkeypatch.setattr(tokens_module, "_build", None)  # would fail if called
    notes = []
    second = prepare_tokens(corpus, 270, tmp_path, note=notes.append)
    assert isinstance(second.train, np.memmap)
    assert second.train.dtype == np.uint16
    assert second.facts == first.facts
    assert "from the cache" in notes[0]


def test_another_vocabulary_is_another_entry(corpus, tmp_path):
    one = prepare_tokens(corpus, 270, tmp_path)
    two = prepare_tokens(corpus, 280, tmp_path)
    assert one.directory != two.directory
    assert two.facts.vocab_size == 280


def test_unreachable_vocabulary_is_told_and_used(corpus, tmp_path):
    notes = []
    cache = prepare_tokens(corpus, 65_536, tmp_path, note=notes.append)
    assert 257 < cache.facts.vocab_size < 1000
    assert any(f"V = {cache.facts.vocab_size}" in note for note in notes[2:])
    assert len(cache.counts("train")) == cache.facts.vocab_size


def test_the_validation_text_does_not_shape_the_tokenizer(tmp_path):
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        (root / "big.txt").write_text("the same training text\n" * 200)
        (root / "small.txt").write_text(f"{name} {name}\n" * 10)
    one, two = (
        prepare_tokens(read_corpus(tmp_path / name), 300, tmp_path / "cache")
        for name in ("one", "two")
    )
    assert one.tokenizer_file.read_text() == two.tokenizer_file.read_text()


def test_document_mark_in_a_text_is_ordinary_text(tmp_path):
    text = "say <|endoftext|> twice\n" * 100
    (tmp_path / "one.txt").write_text(text)
    corpus = read_corpus(tmp_path / "one.txt")
    cache = prepare_tokens(corpus, 300, tmp_path / "cache")
    assert (cache.train == 0).sum() == 1
    assert decode_texts(cache, cache.train) == list(corpus.train)


def test_failure_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens_module, "encode_texts", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(corpus, 270, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("name", ["facts.json", "train.npy", "tokenizer.json"])
@pytest.mark.parametrize("change", ["missing", "short", "other"])
def test_damaged_entry_is_made_again(corpus, tmp_path, name, change):
    first = prepare_tokens(corpus, 270, tmp_path)
    expected = np.array(first.train)
    damaged = first.directory / name
    content = damaged.read_bytes()
    if change == "missing":
        damaged.unlink()
    elif change == "short":
        damaged.write_bytes(content[:100])
    else:
        # A number of the wrong type, and a header that is cut.
        damaged.write_bytes(content.replace(b": 0,", b": false,", 1)[:-20] + b"}")
    second = prepare_tokens(corpus, 270, tmp_path)
    np.testing.assert_array_equal(second.train, expected)
    assert second.load_tokenizer().get_vocab_size() == second.facts.vocab_size


def test_an_entry_with_other_facts_or_arrays_is_made_again(corpus, tmp_path):
    first = prepare_tokens(corpus, 270, tmp_path)
    train, facts = np.array(first.train), first.directory / "facts.json"
    good = json.loads(facts.read_text())
    for changes in (
        {"vocab_size": "270"},
        {"vocab_size": 10**9},
        {"digest": None},
        {"train_tokens": 1.5},
        {"more": 1},
    ):
        facts.write_text(json.dumps({**good, **changes}))
        assert prepare_tokens(corpus, 270, tmp_path).facts == first.facts
    for array in (
        train.astype(np.int64),
        train.astype("U9"),
        train[:, None],
        np.where(np.arange(len(train)) == 5, 270, train).astype(np.uint16),
    ):
        np.save(first.directory / "train.npy", array)
        again = prepare_tokens(corpus, 270, tmp_path)
        np.testing.assert_array_equal(again.train, train)
        assert again.train.dtype == np.uint16
    np.savez(first.directory / "train", train=train)
    (first.directory / "train.npz").rename(first.directory / "train.npy")
    np.testing.assert_array_equal(prepare_tokens(corpus, 270, tmp_path).train, train)


# Tokens of ordinary text are those of the library's own rule of where to cut.
ORDINARY = (
    "It's we'll I'd 12 345,67 -- ==== \t\n\n  x\u00a0y \u6771\u4eac caf\u00e9 ",
    "=" * 200 + "\n" + " " * 200 + "a" * 255 + " " + "1" * 255,
)


def test_ordinary_text_is_cut_as_the_library_cuts_it():
    from tokenizers import pre_tokenizers

    texts = [*ORDINARY, Path(argparse.__file__).read_text(encoding="utf-8")]
    expected = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = tokens_module._train_tokenizer(texts, 300).pre_tokenizer
    for text in texts:
        assert found.pre_tokenize_str(text) == expected.pre_tokenize_str(text)


def test_a_line_without_spaces_is_cut_into_pieces():
    """Merging takes time by the square of a piece's length, so none may be long."""
    letters = "".join(random.Random(1).choices("ACGT", k=100_000))
    tokenizer = tokens_module._train_tokenizer([letters], 1000)
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(letters)
    assert max(len(piece) for piece, _ in pieces) == 256
    assert tokenizer.decode(tokenizer.encode(letters).ids) == letters


@pytest.mark.parametrize("run", ["a", " ", "\n", "\u00e9", "\u6771", "=", "7"])
def test_long_runs_come_back(run):
    text = f"x{run * 3001} y"
    tokenizer = tokens_module._train_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_an_absurd_vocabulary_makes_no_room_for_it(corpus, tmp_path):
    cache = prepare_tokens(corpus, 10**12, tmp_path)
    assert cache.facts.vocab_size < 1000


def test_leftovers_are_swept(corpus, tmp_path):
    left = tmp_path / "tokens" / f".jaxsoft-{'0' * 16}"
    left.mkdir(parents=True)
    (left / "train.npy").touch()
    prepare_tokens(corpus, 270, tmp_path)
    assert not left.exists()


def test_unwritable_cache_is_an_error(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match="cannot be written"):
        prepare_tokens(corpus, 270, tmp_path / "file")


def test_vocabulary_below_the_bytes_is_an_error(corpus, tmp_path):
    with pytest.raises(ValueError, match="`vocab_size` must be at least 257"):
        prepare_tokens(corpus, 256, tmp_path)
    assert prepare_tokens(corpus, 257, tmp_path).facts.vocab_size == 257


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "jaxsoft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "jaxsoft"


def test_facts_are_plain_json(corpus, tmp_path):
    cache = prepare_tokens(corpus, 270, tmp_path)
    facts = json.loads((cache.directory / "facts.json").read_text())
    assert facts["vocab_size"] == 270


def test_unigram_figures_against_the_definition():
    train, other = np.array([4, 0, 3, 1]), np.array([1, 1, 0, 2])
    p = np.array([0.5, 0.375, 0.125])
    assert math.isclose(unigram_entropy(train), -(p * np.log(p)).sum())
    smoothed = np.array([4.5, 0.5, 3.5, 1.5]) / 10
    np.testing.assert_allclose(np.exp(unigram_log_probs(train)), smoothed)
    expected = -(np.log(0.45) + np.log(0.05) + 2 * np.log(0.15)) / 4
    assert math.isclose(unigram_cross_entropy(train, other), expected)


def test_windows_cover_every_label_once():
    tokens = np.arange(25, dtype=np.uint16)
    windows = Windows(tokens, 6)
    assert len(windows) == 4
    labels = np.concatenate([windows[index][1:] for index in range(4)])
    np.testing.assert_array_equal(labels, np.arange(1, 25))
    assert windows[3].dtype == np.int32
    assert len(Windows(tokens[:6], 6)) == 0
    assert len(Windows(tokens[:0], 6)) == 0


def test_spread_reaches_both_ends():
    windows = Windows(np.arange(61), 6)
    spread = windows.spread(3)
    assert spread[0, 0] == 0 and spread[-1, -1] == 60
    assert len(windows.spread(99)) == len(windows)


def test_batches_are_a_function_of_seed_and_index():
    windows = Windows(np.arange(73), 6)  # twelve windows
    batches = windows.batches(3, seed=5)
    again = windows.batches(3, seed=5)
    for index in (7, 0, 3):
        np.testing.assert_array_equal(batches(index), again(index))
    assert batches(0).shape == (3, 7)
    firsts = [set((batches(index)[:, 0] // 6).tolist()) for index in range(8)]
    assert set.union(*firsts[:4]) == set(range(12))  # an epoch sees each window
    assert set.union(*firsts[4:]) == set(range(12))
    orders = [np.concatenate([b(i)[:, 0] for i in range(4)]) for b in (batches, again)]
    np.testing.assert_array_equal(orders[0], orders[1])
    second_epoch = np.concatenate([batches(index)[:, 0] for index in range(4, 8)])
    assert (orders[0] != second_epoch).any()
    other = windows.batches(3, seed=6)
    assert any((batches(index) != other(index)).any() for index in range(4))
