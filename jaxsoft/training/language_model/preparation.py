"""From a corpus to tokens that are enough for a run."""

import jax
from jax.sharding import Mesh

from jaxsoft.training.errors import CorpusError, MeshError
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.language_model.config import LanguageModelConfig
from jaxsoft.training.language_model.corpus import Corpus, read_corpus
from jaxsoft.training.language_model.tokens import (
    MIN_VOCAB_SIZE,
    TokenCache,
    prepare_tokens,
)
from jaxsoft.training.language_model.windows import Windows
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.mesh import VOCAB
from jaxsoft.training.reporting import Listener

__all__ = ["check_vocabulary", "prepare"]


def prepare(
    config: LanguageModelConfig, listener: Listener, stop: StopRequest
) -> tuple[Corpus, TokenCache]:
    """Reads the corpus and makes its tokens.

    Args:
      config: names the corpus, the token cache and what must fit.
      listener: told what was read.
      stop: asked now and then whether to stop.

    Returns:
      The corpus and its tokens.

    Raises:
      CorpusError: the corpus is missing, empty or too small.
      MemoryError: the model is too large for this machine.
      TrainingInterrupted: `stop` received a signal.
    """
    budget = MemoryBudget.parse(config.memory)
    # What accelerators hold, they tell themselves.
    on_host = jax.default_backend() == "cpu"
    if on_host:
        config.check_memory(budget, MIN_VOCAB_SIZE)
    corpus = read_corpus(config.corpus, memory=budget)
    _describe_corpus(corpus, listener)
    tokens = prepare_tokens(
        corpus,
        config.vocab_size,
        config.cache_dir,
        note=listener.note,
        check=stop.check,
    )
    _check_large_enough(config, corpus, tokens)
    if on_host:
        config.check_memory(budget, tokens.facts.vocab_size)
    return corpus, tokens


def check_vocabulary(mesh: Mesh, num_classes: int, head: str = "full") -> None:
    """Raises `MeshError` unless each shard of the head has as many classes.

    Args:
      mesh: with both axes.
      num_classes: tokens of the vocabulary in use.
      head: the kind of head: only a full one can be cut.
    """
    size = mesh.shape[VOCAB]
    if size > 1 and head != "full":
        raise MeshError(
            f"`mesh` must have one device along vocab with `head` {head!r}, got "
            f"{size}; only a full head is cut."
        )
    if num_classes % size:
        fitting = num_classes - num_classes % size
        fitting += 0 if fitting >= MIN_VOCAB_SIZE else size
        raise MeshError(
            f"the vocabulary must be a multiple of the {size} devices along vocab, got "
            f"{num_classes} tokens; give `vocab_size` {fitting}, or another `mesh`."
        )


def _describe_corpus(corpus: Corpus, listener: Listener) -> None:
    """Notes what was read and what was left out."""
    files = len(corpus.train) + len(corpus.validation)
    listener.note(
        f"corpus: {corpus.source}, {corpus.num_bytes / 1e6:,.1f} MB; {files:,} texts, "
        f"{len(corpus.validation):,} of them to validate"
    )
    if corpus.skipped or corpus.duplicates:
        listener.note(
            f"left out {corpus.skipped:,} files that are not UTF-8 text or cannot be "
            f"read, and {corpus.duplicates:,} copies"
        )


def _check_large_enough(
    config: LanguageModelConfig, corpus: Corpus, tokens: TokenCache
) -> None:
    """Raises `CorpusError` unless a batch can be trained and a window validated."""
    length = config.sequence_length
    for what, available, wanted in (
        ("training", tokens.train, config.batch_size),
        ("validation", tokens.validation, 1),
    ):
        if len(Windows(available, length)) < wanted:
            raise CorpusError(
                f"the corpus {corpus.source} is too small: {len(available):,} {what} "
                f"tokens, {wanted * length + 1:,} needed; give more text or a smaller "
                "`batch_size` or `sequence_length`."
            )
