"""What is read back from files: JSON held against the type that it is to become."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from jaxsoft.training.files import open_regular
from jaxsoft.training.memory import readable

__all__ = ["MOST_BYTES", "convert", "decode", "decode_file", "one_line"]

T = TypeVar("T")

# The most that a header, a configuration or a line of metrics may take.
MOST_BYTES = 64 * 10**6
# Integers have 64 bits; what has more digits than these is not even parsed.
_DIGITS = 20
_REASON = 300


class HugeNumber:
    """Stands for an integer of more than 64 bits, which is none of any schema's."""


class NonFiniteNumber:
    """Stands for a NaN or an infinity where there may be none."""


def decode(
    data: bytes | str,
    kind: type[T],
    where: str,
    error: type[Exception],
    *,
    finite: bool = True,
) -> T:
    """Decodes JSON.

    Args:
      data: the text, UTF-8.
      kind: what it is to become: a dataclass, or another type that msgspec knows.
        Types are strict, and fields that are missing or unknown are refused.
      where: the file, and the place in it, to begin a sentence with.
      error: the class of what is raised.
      finite: whether NaN and the infinities, which Python's JSON has, are refused.

    Returns:
      The value.

    Raises:
      error: the data is anything else; one line that names the field.
    """

    def number(text: str) -> Any:
        value = float(text)
        return value if math.isfinite(value) or not finite else NonFiniteNumber()

    try:
        # Python's parser, as msgspec's has no infinities and no lone surrogates, by
        # which paths that are no UTF-8 are written.
        raw = json.loads(
            data if isinstance(data, str) else data.decode(),
            parse_int=lambda text: HugeNumber() if len(text) > _DIGITS else int(text),
            parse_float=number,
            parse_constant=number,
        )
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} cannot be read ({one_line(reason)}).") from reason
    return convert(raw, kind, where, error)


def convert(raw: object, kind: type[T], where: str, error: type[Exception]) -> T:
    """Holds what JSON was parsed to against a type; see `decode`.

    Args:
      raw: dictionaries, lists, strings and numbers.
      kind: what they are to become.
      where: the file, and the place in it, to begin a sentence with.
      error: the class of what is raised.

    Returns:
      The value.

    Raises:
      error: it is anything else.
    """
    import msgspec

    try:
        value = msgspec.convert(raw, kind)
        _refuse_unknown(raw, value, "$")
    except (ValueError, TypeError, OverflowError, RecursionError) as reason:
        raise error(f"{where} cannot be read ({one_line(reason)}).") from reason
    return value


def decode_file(
    path: Path,
    kind: type[T],
    error: type[Exception],
    *,
    what: str = "the file",
    finite: bool = True,
) -> T:
    """Decodes a file of JSON, regular and of a header's size; see `decode`.

    Args:
      path: the file.
      kind: what it is to become.
      error: the class of what is raised.
      what: what the file is, for messages.
      finite: whether NaN and the infinities are refused.

    Returns:
      The value.

    Raises:
      error: the file cannot be read, is too large, or holds anything else.
    """
    with open_regular(path, error, what) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise error(f"{what} {path} is longer than {readable(MOST_BYTES)}.")
    return decode(data, kind, f"{what} {path}", error, finite=finite)


def _refuse_unknown(raw: Any, value: object, place: str) -> None:
    """Raises `ValueError` at a field that msgspec left out."""
    if isinstance(raw, list | tuple) and isinstance(value, list | tuple):
        for index, (item, made) in enumerate(zip(raw, value, strict=True)):
            if isinstance(item, dict | list | tuple):
                _refuse_unknown(item, made, f"{place}[{index}]")
    elif isinstance(raw, dict):
        fields: Any = (
            {field.name: getattr(value, field.name) for field in _fields(value)}
            if dataclasses.is_dataclass(value)
            else value
        )
        for name, item in raw.items():
            if name not in fields:
                raise ValueError(f"Object has unknown field `{name}` - at `{place}`")
            _refuse_unknown(item, fields[name], f"{place}.{name}")


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def one_line(reason: object) -> str:
    """A text such as an error's, on one line and not longer than one reads."""
    line = " ".join(str(reason).split())
    return line if len(line) <= _REASON else f"{line[:_REASON]}…"
