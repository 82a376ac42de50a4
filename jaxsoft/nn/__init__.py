"""Flax modules over jaxsoft's functions; no arithmetic of their own."""

from jaxsoft.nn.adaptive_head import AdaptiveSoftmaxHead
from jaxsoft.nn.gumbel_softmax import GumbelSoftmax
from jaxsoft.nn.hierarchical_head import HierarchicalSoftmaxHead
from jaxsoft.nn.learnable_temperature import LearnableTemperature
from jaxsoft.nn.sampled_head import SampledSoftmaxHead
from jaxsoft.nn.softmax_head import SoftmaxHead
from jaxsoft.nn.temperature_scaling import TemperatureScaling

__all__ = [
    "AdaptiveSoftmaxHead",
    "GumbelSoftmax",
    "HierarchicalSoftmaxHead",
    "LearnableTemperature",
    "SampledSoftmaxHead",
    "SoftmaxHead",
    "TemperatureScaling",
]
