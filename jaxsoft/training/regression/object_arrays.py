"""Texts of a NumPy array of objects, read without running anything of its pickle.

`DataFrame.values` is such an array, and NumPy saves it as a pickle. Of all that a
pickle can call, three names are known here, and stand for functions that keep their
arguments: no class is imported, and nothing but lists, texts and numbers is made.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

import numpy as np

from jaxsoft.training.errors import TableError, first_line

__all__ = ["read_object_array"]


class _Kept:
    """Stands for an array or a dtype; keeps what it would be set to."""

    state: Any = None

    def __init__(self, *arguments: object):
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


def _reconstruct(*arguments: object) -> _Kept:
    return _Kept(*arguments)


_KNOWN = {
    ("numpy", "ndarray"): _Kept,
    ("numpy", "dtype"): _Kept,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


# The unpickler that is written in Python: the other one makes room for as many memos as
# a file claims.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _KNOWN[module, name]


def read_object_array(file: IO[bytes], shape: tuple[int, ...], what: str) -> np.ndarray:
    """Reads the rest of a .npy file of objects, which must be texts, numbers or None.

    Args:
      file: behind its header.
      shape: from the header.
      what: what is read, for messages.

    Returns:
      An array of texts, of dtype object.

    Raises:
      TableError: it holds anything else.
    """
    try:
        found = _Unpickler(file).load()
        values = found.state[4]
        if not isinstance(values, list) or len(values) != int(np.prod(shape)):
            raise ValueError("its length is not that of its shape")
        if not all(
            value is None or type(value) in (str, int, float, bool) for value in values
        ):
            raise ValueError("it holds other objects")
    except Exception as error:
        # A pickle that is malformed can raise anything.
        raise TableError(
            f"{what} holds objects that are not texts ({first_line(error)}); save it "
            "as an array of texts or numbers."
        ) from error
    texts = np.empty(len(values), object)
    texts[:] = ["" if value is None else str(value) for value in values]
    return texts.reshape(shape)
