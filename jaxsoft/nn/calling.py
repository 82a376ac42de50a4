"""How a head calls a function of hidden states and a kernel with its own arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

__all__ = ["Call", "bind"]

# Options that a function must take if a head has them, and their values if not.
_DEFAULTS = {
    "bias": None,
    "logit_softcap": None,
    "kernel_layout": "hv",
    "vocab_axis": None,
    "token_axes": (),
}
# These belong to one of two layers, where a function has two.
_OF_LAYER = ("bias", "logit_softcap", "kernel_layout")
# `over_mesh` names the axes itself, and takes none.
_OF_MESH = ("vocab_axis", "token_axes")


class Call(NamedTuple):
    """A function's arguments, but for a head's.

    Attributes:
      function: the function.
      prefix: what the names of the head's arrays start with: "student_" where a
        function has two layers, else nothing.
      given: the arguments by name.
      names: what the function takes; None for anything.
    """

    function: Callable[..., Any]
    prefix: str
    given: dict[str, Any]
    names: frozenset[str] | None

    def run(self, hidden: jax.Array, kernel: jax.Array, own: Mapping[str, Any]) -> Any:
        """Calls the function.

        Args:
          hidden: what takes the place of the given hidden states.
          kernel: the head's.
          own: the head's options, which the given ones come before.

        Returns:
          What the function returns.

        Raises:
          ValueError: if the function does not take an option that the head has.
        """
        prefix, passed = self.prefix, dict(self.given)
        for option, value in own.items():
            name = f"{prefix}{option}" if option in _OF_LAYER else option
            if name in passed:
                continue
            has_none = _has_none(option, value)
            if has_none and option in _OF_MESH:
                continue
            if self.names is None or name in self.names:
                passed[name] = value
            elif option in _DEFAULTS and not has_none:
                raise ValueError(
                    f"`{option}` must be {_DEFAULTS[option]!r} in a head for "
                    f"{_name(self.function)}, which has no other, got {value!r}."
                )
        passed |= {f"{prefix}hidden": hidden, f"{prefix}kernel": kernel}
        return self.function(**passed)


def bind(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Call:
    """Names the arguments of a function of hidden states and a kernel.

    Args:
      function: the function.
      arguments: those by position, without the kernel.
      options: those by name.

    Returns:
      The call; an argument `temperature` of None is left out.

    Raises:
      TypeError: if the function takes no hidden states or no kernel, lacks an argument
        or does not know one.
    """
    parameters = inspect.signature(function).parameters
    prefix = "student_" if "student_kernel" in parameters else ""
    if not {f"{prefix}hidden", f"{prefix}kernel"} <= parameters.keys():
        raise TypeError(
            "`function` must take `hidden` and `kernel`, as jaxsoft's linear_* "
            f"functions do, got {_name(function)}."
        )
    others = [p for name, p in parameters.items() if name != f"{prefix}kernel"]
    given = dict(inspect.Signature(others).bind(*arguments, **options).arguments)
    rest = [p.name for p in others if p.kind is p.VAR_KEYWORD]
    for name in rest:
        given |= given.pop(name, {})
    if given.get("temperature", 0) is None:
        del given["temperature"]
    return Call(function, prefix, given, None if rest else frozenset(parameters))


def _has_none(option: str, value: object) -> bool:
    """Tells whether a head has nothing of what an option is for."""
    if option not in _DEFAULTS:
        return False
    none = _DEFAULTS[option]
    # An array is of another type, and is not compared.
    return type(value) is type(none) and value == none


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
