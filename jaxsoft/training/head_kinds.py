"""The names of the heads in `jaxsoft.training.heads`, for callers that need no JAX."""

from typing import Literal, get_args

__all__ = ["HEADS", "HeadKind"]

HeadKind = Literal["full", "hierarchical", "adaptive", "sampled"]
HEADS: tuple[HeadKind, ...] = get_args(HeadKind)
