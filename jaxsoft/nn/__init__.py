"""Flax modules over jaxsoft's functions; no arithmetic of their own."""

from jaxsoft.nn.adaptive_head import AdaptiveSoftmaxHead
from jaxsoft.nn.hierarchical_head import HierarchicalSoftmaxHead
from jaxsoft.nn.sampled_head import SampledSoftmaxHead
from jaxsoft.nn.softmax_head import SoftmaxHead

__all__ = [
    "AdaptiveSoftmaxHead",
    "HierarchicalSoftmaxHead",
    "SampledSoftmaxHead",
    "SoftmaxHead",
]
