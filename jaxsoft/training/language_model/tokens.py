"""Tokens of a corpus: a byte-level BPE, and a cache of memory-mapped token files.

The tokenizer is trained on the training texts alone, so that validation is honest. A
cache entry is a folder named by the hash of everything that its contents depend on;
it is written under another name and renamed when complete, so a killed run leaves no
half-written entry behind.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxsoft.training.errors import CorpusError
from jaxsoft.training.files import map_array
from jaxsoft.training.language_model.corpus import Corpus
from jaxsoft.training.panics import panics_as_errors
from jaxsoft.training.schemas import decode_file
from jaxsoft.training.unfinished import unfinished_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "DOCUMENT_START",
    "DOCUMENT_START_ID",
    "MIN_VOCAB_SIZE",
    "TokenCache",
    "TokenFacts",
    "default_cache_dir",
    "encode_texts",
    "prepare_tokens",
]

DOCUMENT_START = "<|endoftext|>"
DOCUMENT_START_ID = 0
MIN_VOCAB_SIZE = 257  # the 256 bytes and the document mark

# A merge seen only once would name one place of the corpus: no use to a model.
_MIN_FREQUENCY = 2
_CACHE_FORMAT = 2
_ENCODE_BATCH = 256
# Tokens that are checked at a time.
_CHECKED = 1 << 24
# Letters of a run, such as a genome's, that are looked at together: merging takes time
# by the square of them. Words and what else stands in ordinary text are shorter.
_LONGEST_RUN = 256
# GPT-2's rule of where a text is cut before pairs are merged, but for that.
_RUNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}"
    r"|\s{1,N}(?!\S)|\s{1,N}"
).replace("1,N", f"1,{_LONGEST_RUN}")


@dataclass(frozen=True)
class TokenFacts:
    """What a cache entry says about itself.

    Attributes:
      vocab_size: `V`, the number of tokens that the tokenizer has; less than asked
        for where the corpus has too few distinct merges.
      train_tokens: length of the training tokens.
      validation_tokens: length of the validation tokens.
      digest: hash of the tokenizer and of all tokens.
    """

    vocab_size: int
    train_tokens: int
    validation_tokens: int
    digest: str


@dataclass(frozen=True)
class TokenCache:
    """Memory-mapped tokens and the tokenizer that made them.

    Attributes:
      directory: the cache entry.
      facts: sizes and digest.
      train: `[train_tokens]`, uint16 where `V` allows it, otherwise uint32. Every
        text starts with the document mark.
      validation: `[validation_tokens]`, likewise.
    """

    directory: Path
    facts: TokenFacts
    train: np.ndarray
    validation: np.ndarray

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, in the format of the `tokenizers` library."""
        return self.directory / "tokenizer.json"

    def load_tokenizer(self) -> "Tokenizer":
        """Loads the tokenizer."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer_file))

    def counts(self, split: str) -> np.ndarray:
        """Counts each token in the "train" or "validation" split; `[V]` int64."""
        tokens = {"train": self.train, "validation": self.validation}[split]
        return np.bincount(tokens, minlength=self.facts.vocab_size)


def default_cache_dir() -> Path:
    """The user's cache folder: XDG_CACHE_HOME, or .cache in the home folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxsoft"


def prepare_tokens(
    corpus: Corpus,
    vocab_size: int,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    note: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> TokenCache:
    """Finds the tokens of a corpus in the cache, or makes them.

    Args:
      corpus: the texts.
      vocab_size: `V` to train for, at least 257. A corpus too small to reach it
        gives fewer tokens; `facts.vocab_size` says how many.
      cache_dir: root of the cache; None means `default_cache_dir()`.
      note: called with a line of text for each thing worth telling.
      check: called now and then while tokens are made; what it raises ends the work
        and leaves nothing behind.

    Returns:
      The tokens, opened without reading them.

    Raises:
      ValueError: `vocab_size` is too small.
      CorpusError: the cache cannot be written.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"`vocab_size` must be at least {MIN_VOCAB_SIZE} (256 bytes and the "
            f"document mark), got {vocab_size}."
        )
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    directory = root / "tokens" / _cache_key(corpus, vocab_size)
    cache = _open(directory)
    if cache is not None:
        note(f"tokens: {_describe(cache.facts)}, from the cache in {root}")
        return cache
    size = f"{corpus.num_bytes / 1e6:,.1f} MB"
    note(f"training a byte-level BPE with {vocab_size:,} tokens on {size}")
    started = time.perf_counter()
    try:
        _build(corpus, vocab_size, directory, check)
    except OSError as error:
        raise CorpusError(
            f"the token cache {root} cannot be written ({error}); name another folder "
            "by `cache_dir`."
        ) from error
    cache = _open(directory)
    if cache is None:
        raise CorpusError(f"the token cache {directory} cannot be read back.")
    took = time.perf_counter() - started
    note(f"tokens: {_describe(cache.facts)}, made in {took:.1f} s")
    if cache.facts.vocab_size < vocab_size:
        reached = f"{cache.facts.vocab_size:,}"
        note(
            f"the corpus has merges for {reached} tokens only; training goes on with "
            f"V = {reached} instead of {vocab_size:,}"
        )
    return cache


def _describe(facts: TokenFacts) -> str:
    return (
        f"V = {facts.vocab_size:,}, {facts.train_tokens:,} to train and "
        f"{facts.validation_tokens:,} to validate"
    )


def _cache_key(corpus: Corpus, vocab_size: int) -> str:
    """Names the cache entry by all that its contents depend on."""
    import tokenizers

    settings = {
        "format": _CACHE_FORMAT,
        "corpus": corpus.digest,
        "vocab_size": vocab_size,
        "min_frequency": _MIN_FREQUENCY,
        "tokenizers": tokenizers.__version__,
    }
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _open(directory: Path) -> TokenCache | None:
    """Opens a cache entry; None if it is missing or damaged."""
    try:
        facts = decode_file(directory / "facts.json", TokenFacts, ValueError)
        train, validation = (
            map_array(directory / f"{split}.npy", ValueError)
            for split in ("train", "validation")
        )
    except ValueError:
        return None
    dtype = _token_dtype(facts.vocab_size)
    lengths = (facts.train_tokens, facts.validation_tokens)
    for tokens, length in zip((train, validation), lengths, strict=True):
        if tokens.dtype != dtype or tokens.shape != (length,):
            return None
        starts = range(0, length, _CHECKED)
        most = (tokens[start : start + _CHECKED].max() for start in starts)
        if any(token >= facts.vocab_size for token in most):
            return None
    cache = TokenCache(directory, facts, train, validation)
    try:
        with panics_as_errors():
            fits = cache.load_tokenizer().get_vocab_size() == facts.vocab_size
    except Exception:  # The library has no class of its own.
        return None
    return cache if fits else None


def _token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _build(
    corpus: Corpus, vocab_size: int, directory: Path, check: Callable[[], None]
) -> None:
    """Makes a cache entry beside its place, then renames it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)  # only a damaged entry gets here
    with unfinished_folder(directory) as unfinished:
        _write_entry(corpus, vocab_size, unfinished, check)
        try:
            unfinished.rename(directory)
        except OSError:
            if _open(directory) is None:  # else another process was first: as good
                raise


def _write_entry(
    corpus: Corpus, vocab_size: int, directory: Path, check: Callable[[], None]
) -> None:
    """Trains the tokenizer, encodes the texts, and writes all files."""
    tokenizer = _train_tokenizer(corpus.train, vocab_size)
    size = tokenizer.get_vocab_size()
    dtype = _token_dtype(size)
    tokenizer.save(str(directory / "tokenizer.json"))
    digest = hashlib.blake2b(
        (directory / "tokenizer.json").read_bytes(), digest_size=16
    )
    lengths = []
    for split, texts in (("train", corpus.train), ("validation", corpus.validation)):
        tokens = encode_texts(tokenizer, texts, dtype, check)
        np.save(directory / f"{split}.npy", tokens)
        digest.update(tokens.tobytes())
        lengths.append(len(tokens))
    facts = TokenFacts(size, *lengths, digest=digest.hexdigest())
    text = json.dumps(asdict(facts), indent=2) + "\n"
    (directory / "facts.json").write_text(text, encoding="utf-8")


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> "Tokenizer":
    """Trains the BPE."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_RUNS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # A text has no more merges than bytes; the trainer makes room for all at once.
        vocab_size=min(vocab_size, MIN_VOCAB_SIZE + 4 * sum(map(len, texts))),
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[DOCUMENT_START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_texts(
    tokenizer: "Tokenizer",
    texts: Sequence[str],
    dtype: type,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Encodes texts into one array, a document mark before each.

    Args:
      tokenizer: the tokenizer.
      texts: at least one.
      dtype: of the array.
      check: called now and then; what it raises ends the work.
    """
    # A text that spells out the document mark is encoded as ordinary characters.
    tokenizer.encode_special_tokens = True
    pieces = []
    for start in range(0, len(texts), _ENCODE_BATCH):
        check()
        batch = list(texts[start : start + _ENCODE_BATCH])
        for encoding in tokenizer.encode_batch_fast(batch):
            pieces.append(np.array([DOCUMENT_START_ID, *encoding.ids], dtype))
    return np.concatenate(pieces)
