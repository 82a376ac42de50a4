"""The public names of jaxsoft, which the package gives when it is asked for one."""

import jaxsoft.schedules as schedules
from jaxsoft._core.temperature_fit import TemperatureFit
from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.adaptive.decoding import adaptive_sample, adaptive_top_k
from jaxsoft.adaptive.layer import AdaptiveTail
from jaxsoft.adaptive.log_probs import adaptive_log_prob, adaptive_log_probs
from jaxsoft.hierarchical.class_tree import ClassPath, ClassTree
from jaxsoft.hierarchical.row_gradients import (
    RowGradient,
    hierarchical_value_and_row_grad,
)
from jaxsoft.hierarchical.row_optimizers import (
    RowOptimizer,
    row_adagrad,
    row_adam,
    row_sgd,
)
from jaxsoft.hierarchical.sampling import hierarchical_sample
from jaxsoft.hierarchical.softmax import (
    hierarchical_log_prob,
    hierarchical_log_probs,
)
from jaxsoft.hierarchical.top_k import hierarchical_top_k
from jaxsoft.linear.calibration import linear_fit_temperature
from jaxsoft.linear.contrastive import clip_loss, nt_xent, supervised_contrastive
from jaxsoft.linear.distillation import (
    linear_distillation,
    linear_distillation_top_k,
)
from jaxsoft.linear.expected import linear_expected
from jaxsoft.linear.folds.statistics import LogitStatistics
from jaxsoft.linear.log_probs import linear_log_prob, linear_log_prob_at
from jaxsoft.linear.lora import LoRA
from jaxsoft.linear.losses import linear_cross_entropy
from jaxsoft.linear.mesh import over_mesh
from jaxsoft.linear.retrieval import MixedNegatives, in_batch_cross_entropy
from jaxsoft.linear.sampling import linear_sample
from jaxsoft.linear.statistics import linear_statistics
from jaxsoft.linear.top_k import linear_top_k
from jaxsoft.logits.boltzmann import (
    boltzmann_operator,
    boltzmann_policy,
    soft_argmax,
)
from jaxsoft.logits.calibration import expected_calibration_error, fit_temperature
from jaxsoft.logits.codistillation import codistillation_loss
from jaxsoft.logits.concrete import concrete_log_prob
from jaxsoft.logits.distillation import distillation_loss, distillation_loss_top_k
from jaxsoft.logits.gumbel import gumbel_softmax, gumbel_top_k
from jaxsoft.logits.losses import softmax_cross_entropy
from jaxsoft.logits.sampling import SampledClasses, sample
from jaxsoft.logits.softmax import entropy, log_softmax, logsumexp, softmax
from jaxsoft.logits.speculative import SpeculativeSample, speculative_sample
from jaxsoft.logits.straight_through import gumbel_rao, reinmax
from jaxsoft.sampled.loss import ClassSampler, sampled_softmax_loss

__all__ = [
    "AdaptiveTail",
    "ClassBands",
    "ClassPath",
    "ClassSampler",
    "ClassTree",
    "LoRA",
    "LogitStatistics",
    "MixedNegatives",
    "RowGradient",
    "RowOptimizer",
    "SampledClasses",
    "SpeculativeSample",
    "TemperatureFit",
    "adaptive_log_prob",
    "adaptive_log_probs",
    "adaptive_sample",
    "adaptive_top_k",
    "boltzmann_operator",
    "boltzmann_policy",
    "clip_loss",
    "codistillation_loss",
    "concrete_log_prob",
    "distillation_loss",
    "distillation_loss_top_k",
    "entropy",
    "expected_calibration_error",
    "fit_temperature",
    "gumbel_rao",
    "gumbel_softmax",
    "gumbel_top_k",
    "hierarchical_log_prob",
    "hierarchical_log_probs",
    "hierarchical_sample",
    "hierarchical_top_k",
    "hierarchical_value_and_row_grad",
    "in_batch_cross_entropy",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_distillation_top_k",
    "linear_expected",
    "linear_fit_temperature",
    "linear_log_prob",
    "linear_log_prob_at",
    "linear_sample",
    "linear_statistics",
    "linear_top_k",
    "log_softmax",
    "logsumexp",
    "nt_xent",
    "over_mesh",
    "reinmax",
    "row_adagrad",
    "row_adam",
    "row_sgd",
    "sample",
    "sampled_softmax_loss",
    "schedules",
    "soft_argmax",
    "softmax",
    "softmax_cross_entropy",
    "speculative_sample",
    "supervised_contrastive",
]
