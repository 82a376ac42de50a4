"""Flax modules over jaxsoft's functions; no arithmetic of their own."""

from jaxsoft.nn.softmax_head import SoftmaxHead

__all__ = ["SoftmaxHead"]
