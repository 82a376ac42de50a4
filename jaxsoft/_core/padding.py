"""Sizes that blocks divide."""

__all__ = ["round_up"]


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
