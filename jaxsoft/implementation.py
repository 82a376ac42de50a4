"""Names of implementations, and which of them an operation has.

A name asks for exactly that implementation or an error. `None` leaves the choice
to jaxsoft, which decides by shape, dtype and platform, never by what happens to be
the default backend.
"""

from typing import Literal

__all__ = ["IMPLEMENTATIONS", "Implementation", "resolve"]

Implementation = Literal["reference", "xla", "mosaic_tpu", "mosaic_gpu"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    "reference",
    "xla",
    "mosaic_tpu",
    "mosaic_gpu",
)


def resolve(
    operation: str,
    implementation: Implementation | None,
    available: tuple[Implementation, ...],
) -> Implementation:
    """Returns the implementation that runs `operation`.

    Args:
      operation: the public function's name, for the error message.
      implementation: what the caller asked for; None takes the default.
      available: the implementations that the operation has, the default first.

    Returns:
      One of `available`.

    Raises:
      ValueError: if `implementation` is no implementation's name.
      NotImplementedError: if the operation lacks that implementation.
    """
    if implementation is None:
        return available[0]
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(
            f"`implementation` must be None or one of {names}, got {implementation!r}."
        )
    if implementation not in available:
        names = " or ".join(map(repr, available))
        raise NotImplementedError(
            f"`implementation` must be {names} for {operation}, "
            f"got {implementation!r}. Leave it None to take the default."
        )
    return implementation
