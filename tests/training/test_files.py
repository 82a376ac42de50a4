"""Files of strangers: regular ones alone, unpacked within a budget."""

import bz2
import gzip
import lzma
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from jaxsoft.training.errors import TableError
from jaxsoft.training.files import endings, map_array, open_regular, read_unpacked
from jaxsoft.training.memory import MemoryBudget

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACK[".zst"] = zstd.compress
BUDGET = MemoryBudget(10**7)


def test_endings(tmp_path):
    assert endings(tmp_path / "a.b.CSV.GZ") == (".csv", ".gz")
    assert endings(tmp_path / "a.zst") == ("", ".zst")
    assert endings(tmp_path / "a9a") == ("", "")


@pytest.mark.parametrize("packed", PACK)
def test_unpacking(tmp_path, packed):
    """In any case of the ending; a damaged file and a bomb are one line each."""
    path = tmp_path / f"a.txt{packed.upper()}"
    data = PACK[packed](b"some words\n" * 1000)
    path.write_bytes(data + data)
    assert read_unpacked(path, BUDGET, TableError) == b"some words\n" * 2000
    for damaged in (data[:-9], b"no archive at all, but text", data[:10] + b"\xff" * 9):
        path.write_bytes(damaged)
        with pytest.raises(TableError, match="cannot be read"):
            read_unpacked(path, BUDGET, TableError)
    path.write_bytes(PACK[packed](bytes(6 * 10**7)))
    tracemalloc.start()
    with pytest.raises(TableError, match="more than the 10 MB of `memory`"):
        read_unpacked(path, BUDGET, TableError)
    assert tracemalloc.get_traced_memory()[1] < 3 * BUDGET.num_bytes
    tracemalloc.stop()


def test_only_regular_files_are_opened(tmp_path):
    """A pipe without a writer would wait for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(TableError, match="is not a file"):
            with open_regular(path, TableError):
                pass
    with pytest.raises(TableError, match="does not exist"):
        with open_regular(tmp_path / "none", TableError):
            pass
    with pytest.raises(TableError, match="cannot be read"):
        with open_regular(tmp_path / "a\0b", TableError):
            pass


@pytest.mark.parametrize("text", ["", "four", "-4G", "0", "4X", "1e9"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="`memory` must be a size"):
        MemoryBudget.parse(text)


def test_sizes():
    sizes = {
        "4G": 4 * 10**9,
        "512 MiB": 2**29,
        "512 MB": 512 * 10**6,
        "1.5kb": 1500,
        "77": 77,
    }
    for text, size in sizes.items():
        assert MemoryBudget.parse(text).num_bytes == size
    assert MemoryBudget.parse(None).num_bytes > 10**6


def npy(header):
    """An array of 8 bytes under any header."""
    text = header.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'shape': (1,)}", "'shape': (1,"),  # Python's tokens end too early.
        ("'<f8', 'f", "\xa3'f"),
        ("(1,)", "(4611686018427387904, 4)"),
        ("(1,)", "((1,),)"),
        ("(1,)", "(2,)"),
        ("'<f8'", "'|O'"),
        ("'<f8'", "[('a', 7)]"),
    ],
)
def test_headers_that_are_none(tmp_path, old, new):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(HEADER.replace(old, new)))
    with pytest.raises(TableError, match="a.npy cannot be read"):
        map_array(path, TableError)


def test_a_header_of_python_2(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(HEADER.replace("(1,)", "(1L,)")))
    np.testing.assert_array_equal(map_array(tmp_path / "a.npy", TableError), [0.0])
