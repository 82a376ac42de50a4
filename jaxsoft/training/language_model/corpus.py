"""The text to train on: which files, which of them are read, and how they are split.

A corpus is a text file, compressed or not, or a folder of such; without a path it is
the standard library's own sources, which every Python has. Everything here is
deterministic: the same files give the same corpus, split and digest wherever they lie.

- Inside a folder, what is no file of UTF-8 text is passed over and counted; hidden
  files and folders are not looked at.
- Identical files count once, so that no validation file is also a training file.
- Several files are split file by file, in the order of their contents' hashes. A
  single file is split by position: its end is the validation text.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxsoft.training.errors import CorpusError
from jaxsoft.training.files import read_unpacked
from jaxsoft.training.memory import MemoryBudget

__all__ = ["Corpus", "Texts", "VALIDATION_FRACTION", "read_corpus", "read_texts"]

VALIDATION_FRACTION = 0.05

# Not the standard library's own sources, though they lie in its folder.
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Texts to train and validate on.

    Attributes:
      source: where the texts come from, in words.
      train: one text a file.
      validation: one text a file, none of them in `train`.
      skipped: number of files, pipes and the like that were not UTF-8 text or could
        not be read.
      duplicates: number of files left out because another has the same contents.
      digest: hash of all texts and of the split; independent of names and places.
    """

    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    skipped: int
    duplicates: int
    digest: str

    @property
    def num_bytes(self) -> int:
        """Size of all texts in UTF-8."""
        return sum(len(text.encode()) for text in (*self.train, *self.validation))


@dataclass(frozen=True)
class Texts:
    """All texts of a corpus.

    Attributes:
      source: where they come from, in words.
      texts: one a file, in the order of their contents' hashes.
      skipped: number of files that were not UTF-8 text or could not be read.
      duplicates: number of files left out because another has the same contents.
    """

    source: str
    texts: tuple[str, ...]
    skipped: int
    duplicates: int


def read_corpus(
    path: str | os.PathLike[str] | None = None,
    *,
    validation_fraction: float = VALIDATION_FRACTION,
    memory: MemoryBudget | None = None,
) -> Corpus:
    """Reads the corpus into memory and splits it.

    Args:
      path: a text file, compressed if its name ends in .gz, .bz2, .xz or .zst, or a
        folder (searched recursively). None means the .py files of the running
        Python's standard library, without installed packages.
      validation_fraction: share of the bytes to validate on, in (0, 1).
      memory: what the texts must not exceed; None is half of what is free.

    Returns:
      The corpus, with at least one text on either side of the split.

    Raises:
      CorpusError: the path does not exist, or holds no text, too little of it to
        split, or more than `memory`.

    Example:
      >>> corpus = read_corpus()
      >>> len(corpus.train) > len(corpus.validation) > 0
      True
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(
            f"`validation_fraction` must be between 0 and 1, got {validation_fraction}."
        )
    found = read_texts(path, memory=memory)
    if len(found.texts) == 1:
        train, validation = _split_by_position(
            found.texts[0], validation_fraction, found.source
        )
    else:
        train, validation = _split_by_file(found.texts, validation_fraction)
    return Corpus(
        source=found.source,
        train=tuple(train),
        validation=tuple(validation),
        skipped=found.skipped,
        duplicates=found.duplicates,
        digest=_digest(train, validation),
    )


def read_texts(
    path: str | os.PathLike[str] | None = None, *, memory: MemoryBudget | None = None
) -> Texts:
    """Reads the texts of a corpus into memory.

    Args:
      path: as in `read_corpus`.
      memory: what the texts must not exceed; None is half of what is free.

    Returns:
      The texts, at least one.

    Raises:
      CorpusError: the path does not exist, or holds no text or more than `memory`.
    """
    if path is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        source = f"the Python {version} standard library"
        files = list(_standard_library_files())
    else:
        path, source = Path(path), str(path)
        if not path.exists():
            raise CorpusError(f"the corpus {source} does not exist.")
        if not (path.is_dir() or path.is_file()):
            raise CorpusError(f"the corpus {source} is neither a file nor a folder.")
        files = list(_folder_files(path)) if path.is_dir() else [path]
    single = path is not None and files == [path]
    budget = memory or MemoryBudget.of_machine()
    texts, skipped, duplicates = _read_texts(files, source, budget, single=single)
    if not texts:
        passed_over = f" ({skipped} files are none, or unreadable)" if skipped else ""
        raise CorpusError(f"the corpus {source} holds no text{passed_over}.")
    ordered = tuple(texts[key] for key in sorted(texts))
    return Texts(source, ordered, skipped, duplicates)


def _standard_library_files() -> Iterator[Path]:
    """Yields the standard library's .py files in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _FOREIGN_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)


def _folder_files(root: Path) -> Iterator[Path]:
    """Yields the files below `root` in a fixed order, hidden ones excepted."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


class _Unusable(CorpusError):
    """One file of many is no text."""


def _read_texts(
    files: Sequence[Path], source: str, budget: MemoryBudget, *, single: bool
) -> tuple[dict[str, str], int, int]:
    """Reads files; returns texts by hash, and the skipped and duplicate counts."""
    texts: dict[str, str] = {}
    taken = skipped = duplicates = 0
    for file in files:
        try:
            text = _read_text(file, MemoryBudget(budget.num_bytes - taken))
        except _Unusable as error:
            if single:
                raise CorpusError(str(error)) from error
            skipped += 1
            continue
        if not text.strip():
            continue
        data = text.encode()
        key = hashlib.blake2b(data).hexdigest()
        if key in texts:
            duplicates += 1
            continue
        texts[key] = text
        taken += len(data)
        budget.require(taken, f"the corpus {source}", CorpusError)
    return texts, skipped, duplicates


def _read_text(file: Path, budget: MemoryBudget) -> str:
    """Reads one file, or raises; a NUL byte marks it as binary."""
    try:
        # Files of the kernel's, such as /proc/kmsg, have no size and may have no end.
        if file.stat().st_size == 0 and file.is_file():
            return ""
        data = read_unpacked(file, budget, _Unusable, "the corpus", excess=CorpusError)
        if b"\0" not in data:
            return data.decode("utf-8-sig")
    except OSError as error:
        raise _Unusable(f"the corpus {file} cannot be read ({error}).") from error
    except UnicodeDecodeError:
        pass
    raise _Unusable(f"the corpus {file} is not UTF-8 text.")


def _split_by_file(
    texts: Sequence[str], fraction: float
) -> tuple[list[str], list[str]]:
    """Fills the validation share of the bytes with texts, in the order given.

    Texts larger than a tenth of the share would make it one-sided: they are taken only
    where the others do not fill half of it. Where no text fits at all, the smallest one
    is the validation text.
    """
    sizes = [len(text.encode()) for text in texts]
    share = fraction * sum(sizes)
    chosen: set[int] = set()
    taken = 0
    for largest in (0.1 * share, share):
        for index, size in enumerate(sizes):
            fits = size <= largest and taken + size <= share
            if index not in chosen and fits:
                chosen.add(index)
                taken += size
        if taken >= 0.5 * share:
            break
    if not chosen:
        chosen = {min(range(len(texts)), key=sizes.__getitem__)}
    train = [text for index, text in enumerate(texts) if index not in chosen]
    return train, [texts[index] for index in sorted(chosen)]


def _split_by_position(
    text: str, fraction: float, source: str
) -> tuple[list[str], list[str]]:
    """Cuts one text in two, at a line's end where there is one near the fraction."""
    cut = round(len(text) * (1.0 - fraction))
    line_end = text.rfind("\n", 0, cut) + 1
    if line_end > 0.9 * cut:
        cut = line_end
    train, validation = text[:cut], text[cut:]
    if not train.strip() or not validation.strip():
        raise CorpusError(f"the corpus {source} is too small to split.")
    return [train], [validation]


def _digest(train: Sequence[str], validation: Sequence[str]) -> str:
    """Hashes the texts and the split."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, validation):
        digest.update(len(part).to_bytes(8, "little"))
        for text in part:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
