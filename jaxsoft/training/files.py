"""Files that strangers made: opened if they are regular, unpacked in bounded pieces."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxsoft.training.memory import MemoryBudget

__all__ = [
    "COMPRESSIONS",
    "DAMAGED",
    "endings",
    "map_array",
    "malformed_arrays",
    "open_regular",
    "open_unpacked",
    "read_unpacked",
]

# What is read of a compressed file at a time.
_PIECE = 1 << 20


def _open_zstandard(file: BinaryIO) -> BinaryIO:
    """Opens a Zstandard file, whose damage is an `OSError` as that of the others."""
    from backports import zstd

    class Reader(zstd.ZstdFile):
        def readinto(self, buffer: Any) -> int:
            try:
                return super().readinto(buffer)
            except zstd.ZstdError as reason:
                raise OSError(str(reason)) from reason

    return io.BufferedReader(Reader(file))


COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
# What reading a file that is damaged, or compressed in another way, raises.
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


def endings(path: Path) -> tuple[str, str]:
    """The ending of a file's name and that of its compression, both in lower case.

    Args:
      path: the file.

    Returns:
      Such as (".csv", ".gz") of DATA.CSV.GZ; empty where there is none.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), packed


@contextlib.contextmanager
def open_regular(
    path: Path, error: type[Exception], what: str = "the file"
) -> Iterator[BinaryIO]:
    """Opens a regular file; a pipe, a device or a folder is refused without waiting.

    Args:
      path: the file.
      error: the class of what is raised.
      what: what the file is, for messages.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist.") from None
    except (OSError, ValueError) as reason:
        raise error(f"{what} {path} cannot be read ({reason}).") from reason
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{what} {path} is not a file.")
    with open(descriptor, "rb") as file:
        yield file


@contextlib.contextmanager
def open_unpacked(
    path: Path, error: type[Exception], what: str = "the file"
) -> Iterator[BinaryIO]:
    """Opens a regular file, compressed if its name says so.

    Args:
      path: the file; its name may end in .gz, .bz2, .xz or .zst, in any case.
      error: the class of what is raised, while it is open too, where it is damaged.
      what: what the file is, for messages.
    """
    with open_regular(path, error, what) as file:
        unpack = COMPRESSIONS.get(endings(path)[1])
        try:
            if unpack is None:
                yield file
            else:
                with unpack(file) as unpacked:
                    yield unpacked
        except DAMAGED as reason:
            raise error(f"{what} {path} cannot be read ({reason}).") from reason


def read_unpacked(
    path: Path,
    budget: MemoryBudget,
    error: type[Exception],
    what: str = "the file",
    *,
    excess: type[Exception] | None = None,
) -> bytes:
    """Reads a regular file, compressed or not, that is within the budget.

    Args:
      path: the file; its name may end in .gz, .bz2, .xz or .zst, in any case.
      budget: what its contents must not exceed.
      error: the class of what is raised.
      what: what the file is, for messages.
      excess: the class of what is raised beyond the budget; None is `error`.

    Returns:
      Its contents.
    """
    pieces, size = [], 0
    with open_unpacked(path, error, what) as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            if size > budget.num_bytes:
                budget.require(size, f"{what} {path} unpacked", excess or error)
            pieces.append(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def malformed_arrays() -> Iterator[None]:
    """Makes what NumPy raises at a file that is no array of its format a `ValueError`.

    The headers are Python's literals. NumPy warns of those that Python 2 wrote.
    """
    with warnings.catch_warnings(), np.errstate(over="raise"):
        warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file required")
        try:
            yield
        except (
            ArithmeticError,
            EOFError,
            LookupError,
            MemoryError,
            RecursionError,
            SyntaxError,
            TypeError,
            tokenize.TokenError,
        ) as reason:
            raise ValueError(str(reason)) from reason


def map_array(path: Path, error: type[Exception]) -> np.memmap:
    """Maps an array of NumPy's format into memory, to be read.

    Args:
      path: the .npy file.
      error: the class of what is raised where it is none, or not whole.

    Returns:
      The array, whose dtype holds no objects.
    """
    with open_regular(path, error):
        try:
            with malformed_arrays():
                return np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as reason:
            raise error(f"the file {path} cannot be read ({reason}).") from reason
