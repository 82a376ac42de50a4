import json
import shutil

import numpy as np
import pytest
import safetensors

from jaxsoft.training import (
    LanguageModelConfig,
    RunDirectoryError,
    load_language_model,
    train_language_model,
)
from jaxsoft.training.language_model.corpus import read_corpus
from jaxsoft.training.language_model.tokens import prepare_tokens
from jaxsoft.training.language_model.windows import Windows
from jaxsoft.training.run_directory import RunDirectory

# One worker: its run serves many tests.


@pytest.fixture(scope="module")
def finished(corpus_dir, cache_dir, tmp_path_factory):
    """A finished run's configuration and report."""
    config = LanguageModelConfig(
        corpus=str(corpus_dir),
        cache_dir=str(cache_dir),
        out=str(tmp_path_factory.mktemp("finished") / "run"),
        vocab_size=270,
        steps=6,
        learning_rate=0.03,
        batch_size=4,
        sequence_length=16,
        features=16,
        layers=1,
        heads=2,
        evaluation_tokens=128,
        sample_tokens=8,
        prompt="alpha beta",
    )
    return config, train_language_model(config)


@pytest.fixture(scope="module")
def trained(finished):
    return load_language_model(finished[0].out)


def validation_loss(trained):
    config = trained.config
    tokens = prepare_tokens(
        read_corpus(config.corpus), config.vocab_size, config.cache_dir
    )
    windows = Windows(tokens.validation, 16).spread(32)
    return float(trained.model.loss(windows[:, :-1], windows[:, 1:]))


def test_what_is_loaded_is_what_was_trained(finished, trained):
    config, report = finished
    assert (trained.step, trained.config) == (6, config)
    assert trained.tokenizer.get_vocab_size() == 270
    np.testing.assert_allclose(validation_loss(trained), report.loss, rtol=1e-5)


def test_a_tree_is_made_anew_from_the_counts(tiny):
    tiny |= {"head": "hierarchical", "steps": 2}
    report = train_language_model(LanguageModelConfig(**tiny))
    # The run alone is enough.
    trained = load_language_model(tiny["out"])
    np.testing.assert_allclose(validation_loss(trained), report.loss, rtol=1e-5)
    assert trained.generate("alpha", max_tokens=4)[0].token_ids


def test_the_runs_own_samples_are_drawn_by_the_same_code(finished, trained):
    config, report = finished
    (greedy,) = trained.generate("alpha beta", temperature=0, max_tokens=8)
    assert 0 not in greedy.token_ids
    assert report.samples[0].text == greedy.text
    (warm,) = trained.generate("alpha beta", temperature=0.7, max_tokens=8)
    assert len(warm.token_ids) == 8 and warm.log_probs is None


def test_texts_are_the_pieces_of_their_stream(trained):
    options = {"number": 3, "max_tokens": 40, "seed": 5, "log_probs": True}
    texts = trained.generate("alpha", **options)
    steps = [*trained.stream("alpha", **options)]
    for row, text in enumerate(texts):
        pieces = [step[row] for step in steps if step[row] is not None]
        assert "".join(piece.text for piece in pieces) == text.text
        assert tuple(piece.token_id for piece in pieces) == text.token_ids
        assert tuple(piece.log_prob for piece in pieces) == text.log_probs
        assert trained.tokenizer.decode(list(text.token_ids)) == text.text
        assert len(text.token_ids) == 40 or text.token_ids[-1] == 0
    assert trained.generate("alpha", **options) == texts


def test_a_text_ends_with_the_mark_before_another(trained, monkeypatch):
    class Marked:
        def stream(self, prompt, num_tokens, sampling, *, rows, **options):
            from jaxsoft.training.language_model.generation import Drawn

            for number in range(num_tokens):
                ids = [0 if number == 2 + row else 70 for row in range(rows)]
                yield Drawn(np.array(ids), None)

    monkeypatch.setitem(vars(trained), "_generator", Marked())
    one, two = trained.generate(number=2, max_tokens=9)
    assert one.token_ids == (70, 70, 0) and two.token_ids == (70, 70, 70, 0)
    assert len([*trained.stream(number=2, max_tokens=9)]) == 4


@pytest.mark.parametrize("name", ["number", "max_tokens", "seed"])
def test_counts_are_checked_at_once(trained, name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got -1."):
        trained.stream(**{name: -1})


def test_weights_are_in_one_file_by_name(finished, trained):
    directory = RunDirectory(finished[0].out)
    with safetensors.safe_open(directory.weights, "numpy") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}
    assert metadata["step"] == "6" and json.loads(metadata["config"])["features"] == 16
    attention = trained.model.trunk.blocks[0].attention
    expected = {
        "trunk.embedding.embedding": trained.model.trunk.embedding.embedding,
        "trunk.blocks.0.attention.out.kernel": attention.out.kernel,
        "head.kernel": trained.model.head.kernel,
        "head.bias": trained.model.head.bias,
    }
    assert expected.keys() <= found.keys() and len(found) == 13
    for name, parameter in expected.items():
        np.testing.assert_array_equal(found[name], parameter[...])


def test_the_model_card_says_what_was_trained(finished):
    config, report = finished
    card = RunDirectory(config.out).card.read_text()
    for text in (
        "16 features and 2 attention heads",
        f"corpus: `{config.corpus}`",
        f"perplexity {report.perplexity:,.1f}",
        "| learning_rate | `0.03` |",
        "| prompt | `alpha beta` |",
        "- head: full",
    ):
        assert text in card, text
    assert "cache_dir" not in card and "| out |" not in card


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run .no config.json.."):
        load_language_model(tmp_path)


def copied(finished, tmp_path):
    shutil.copytree(finished[0].out, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_a_run_that_is_not_finished_is_an_error(finished, tmp_path):
    directory = copied(finished, tmp_path)
    directory.truncate_metrics(6)
    with pytest.raises(RunDirectoryError, match="is not finished; .*--resume"):
        load_language_model(directory.path)


def test_a_run_of_an_older_version_is_named(finished, tmp_path):
    directory = copied(finished, tmp_path)
    directory.counts.unlink()
    with pytest.raises(RunDirectoryError, match="not exist.*an older version"):
        load_language_model(directory.path)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("counts.npy", None, "counts.npy does not exist."),
        ("counts.npy", b"x", "counts.npy cannot be read"),
        ("tokenizer.json", None, "the tokenizer .* cannot be read"),
        ("tokenizer.json", b"{}", "the tokenizer .* cannot be read"),
    ],
)
def test_damaged_files_are_named(finished, tmp_path, name, contents, message):
    file = copied(finished, tmp_path).path / name
    file.unlink() if contents is None else file.write_bytes(contents)
    with pytest.raises(RunDirectoryError, match=message):
        load_language_model(tmp_path / "run")


def test_counts_of_another_vocabulary_are_an_error(finished, tmp_path):
    directory = copied(finished, tmp_path)
    np.save(directory.counts, np.ones(9, np.int64))
    with pytest.raises(RunDirectoryError, match=r"must be 270 integers, .*\(9,\)"):
        load_language_model(directory.path)
