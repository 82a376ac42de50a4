import bz2
import gzip
import lzma
import os

import pytest
from backports import zstd

from jaxsoft.training.errors import CorpusError
from jaxsoft.training.language_model.corpus import read_corpus
from jaxsoft.training.memory import MemoryBudget


def write(root, **texts):
    root.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return root


def lines(name, count=50):
    return "".join(f"{name} line {index}\n" for index in range(count))


def test_default_is_the_standard_library():
    corpus = read_corpus()
    texts = corpus.train + corpus.validation
    assert any("class TestCase" in text or "def namedtuple" in text for text in texts)
    assert corpus.num_bytes > 5_000_000
    validation = sum(len(text.encode()) for text in corpus.validation)
    assert 0.04 < validation / corpus.num_bytes < 0.06
    assert "standard library" in corpus.source


def test_split_and_digest_depend_on_contents_alone(tmp_path):
    texts = {f"t{index}": lines(index) for index in range(40)}
    here = read_corpus(write(tmp_path / "here", **texts))
    renamed = {f"x{name}": text for name, text in reversed(texts.items())}
    there = read_corpus(write(tmp_path / "there" / "deep", **renamed))
    assert (here.train, here.validation) == (there.train, there.validation)
    assert here.digest == there.digest
    changed = read_corpus(write(tmp_path / "here", t0=lines(0) + "one more\n"))
    assert changed.digest != here.digest


def test_split_loses_and_shares_nothing(tmp_path):
    texts = {f"t{index}": lines(index) for index in range(40)}
    corpus = read_corpus(write(tmp_path, **texts))
    assert sorted(corpus.train + corpus.validation) == sorted(texts.values())
    assert len(corpus.validation) in (2, 3)


def test_two_files_give_the_smaller_to_validation(tmp_path):
    corpus = read_corpus(write(tmp_path, big=lines("a", 500), small=lines("b", 90)))
    assert corpus.validation == (lines("b", 90),)
    assert corpus.train == (lines("a", 500),)


def test_copies_count_once_and_are_counted(tmp_path):
    corpus = read_corpus(write(tmp_path, a=lines("x"), b=lines("x"), c=lines("y")))
    assert corpus.duplicates == 1
    assert len(corpus.train) + len(corpus.validation) == 2


def test_folder_passes_over_what_is_not_text(tmp_path):
    write(tmp_path, a=lines("x"), b=lines("y"))
    write(tmp_path / ".hidden", secret=lines("never read"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "broken.gz").write_bytes(b"not gzip")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    corpus = read_corpus(tmp_path)
    assert corpus.skipped == 5
    assert not any("never read" in text for text in corpus.train + corpus.validation)
    assert len(corpus.train) + len(corpus.validation) == 2


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("packed.gz", gzip.compress),
        ("text.TXT.GZ", gzip.compress),
        ("text.bz2", bz2.compress),
        ("text.xz", lzma.compress),
        ("text.zst", zstd.compress),
    ],
)
def test_compressed_file_is_the_text_in_it(tmp_path, name, compress):
    text = lines("x", 400)
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / name).write_bytes(compress(text.encode()))
    plain = read_corpus(tmp_path / "plain.txt")
    packed = read_corpus(tmp_path / name)
    assert plain.digest == packed.digest


def test_memory_bounds_what_is_read(tmp_path):
    """Of one file, of all together, and of a bomb, none of which is unpacked."""
    budget = MemoryBudget(10**5)
    (tmp_path / "one.gz").write_bytes(gzip.compress(b"a" * 10**7))
    with pytest.raises(CorpusError, match="more than the 100 KB of `memory`"):
        read_corpus(tmp_path / "one.gz", memory=budget)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.txt").write_text(f"{index} " * 3000)
    with pytest.raises(CorpusError, match="of memory, more than"):
        read_corpus(folder, memory=budget)
    assert len(read_corpus(folder).train) > 15


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="has no /proc")
def test_files_of_the_kernel_are_not_waited_for():
    """One such as /proc/kmsg has no end."""
    with pytest.raises(CorpusError, match="holds no text"):
        read_corpus("/proc/self/status")


def test_single_file_is_cut_at_a_line_near_its_end(tmp_path):
    text = lines("x", 1000)
    (tmp_path / "one.txt").write_text(text)
    corpus = read_corpus(tmp_path / "one.txt")
    assert corpus.train[0] + corpus.validation[0] == text
    assert corpus.train[0].endswith("\n")
    assert 0.04 < len(corpus.validation[0]) / len(text) < 0.06


def test_single_line_is_cut_all_the_same(tmp_path):
    (tmp_path / "one.txt").write_text("word " * 2000)
    corpus = read_corpus(tmp_path / "one.txt")
    assert len(corpus.validation[0]) == 500


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbf" + lines("x").encode())
    assert read_corpus(tmp_path / "one.txt").train[0].startswith("x line 0")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("missing", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("binary.txt", b"a\0b", "is not UTF-8 text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("broken.gz", b"not gzip", "cannot be read"),
        ("tiny.txt", b"ab", "too small to split"),
    ],
)
def test_unusable_file_is_an_error(tmp_path, name, contents, message):
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(CorpusError, match=message):
        read_corpus(tmp_path / name)


def test_truncated_gz_is_an_error(tmp_path):
    packed = gzip.compress(lines("x", 400).encode())
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CorpusError, match="cannot be read"):
        read_corpus(tmp_path / "cut.gz")


def test_folder_without_text_tells_the_count(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.bin").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match="2 files are none"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_validation_fraction_is_checked(tmp_path, fraction):
    with pytest.raises(ValueError, match="`validation_fraction` must be between"):
        read_corpus(tmp_path, validation_fraction=fraction)


def test_device_is_an_error():
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        read_corpus("/dev/null")
