"""The check of options that are strings, for callers that need no JAX."""

from collections.abc import Sequence

__all__ = ["one_of"]


def one_of(name: str, value: object, options: Sequence[str]) -> None:
    """Requires `value` to be one of the strings `options`."""
    if value not in options:
        names = ", ".join(map(repr, options))
        raise ValueError(f"`{name}` must be one of {names}, got {value!r}.")
