import random

import pytest

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


def sentences(count, seed):
    """Lines in which each word mostly decides the next: a model can learn that."""
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        index, line = source.randrange(len(WORDS)), []
        for _ in range(10):
            line.append(WORDS[index])
            index = (index + 1 if source.random() < 0.8 else 5 * index + 2) % len(WORDS)
        lines.append(" ".join(line) + ".")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A folder of 30 small text files."""
    root = tmp_path_factory.mktemp("corpus")
    for index in range(30):
        (root / f"text{index:02d}.txt").write_text(sentences(40, index))
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(corpus_dir, cache_dir, tmp_path):
    """Fields of a configuration that trains in a second."""
    return {
        "corpus": str(corpus_dir),
        "cache_dir": str(cache_dir),
        "out": str(tmp_path / "run"),
        "vocab_size": 270,
        "steps": 12,
        "batch_size": 4,
        "sequence_length": 16,
        "features": 16,
        "layers": 1,
        "heads": 2,
        "evaluate_every": 5,
        "evaluation_tokens": 128,
        "checkpoint_every": 5,
        "sample_tokens": 8,
    }
