"""Methods of a head that are functions of its hidden states and its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxsoft._core.divergence import Divergence
from jaxsoft._core.listed import Remaining
from jaxsoft._core.temperature_fit import DEFAULT_BOUNDS, TemperatureFit
from jaxsoft._core.tokens import Reduction
from jaxsoft.linear.arguments import MeshAxes
from jaxsoft.linear.calibration import linear_fit_temperature
from jaxsoft.linear.distillation import linear_distillation, linear_distillation_top_k
from jaxsoft.linear.folds.statistics import LogitStatistics
from jaxsoft.linear.log_probs import linear_log_prob, linear_log_prob_at
from jaxsoft.linear.losses import linear_cross_entropy
from jaxsoft.linear.sampling import linear_sample
from jaxsoft.linear.statistics import linear_statistics
from jaxsoft.linear.top_k import linear_top_k

__all__ = ["LinearMethods"]


class LinearMethods(nnx.Module):
    """What has a kernel, and calls functions with it."""

    vocab_axis: MeshAxes

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Calls a function of hidden states and a kernel with this module's."""
        raise NotImplementedError

    def _promoted(self, hidden: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns hidden states and kernel in the dtype of matrix products."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """Returns the options of functions that the module knows."""
        raise NotImplementedError

    def loss(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        reduction: Reduction = "mean",
    ) -> jax.Array:
        """Cross-entropy of labels, without stored logits.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          class_mask: [V] booleans; False drops a class.
          label_smoothing: in [0, 1].
          z_loss: weight >= 0 of the squared log-sum-exp.
          weights: [...] booleans or reals, one weight a token.
          ignore_label: a label whose tokens have weight 0.
          reduction: "mean", "sum" or "none".

        Returns:
          A scalar, or [...] with reduction "none", as `jaxsoft.linear_cross_entropy`.
        """
        return self.call(
            linear_cross_entropy,
            hidden,
            labels,
            temperature=temperature,
            class_mask=class_mask,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            weights=weights,
            ignore_label=ignore_label,
            reduction=reduction,
        )

    @overload
    def log_prob(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        return_entropy: Literal[False] = False,
    ) -> jax.Array: ...

    @overload
    def log_prob(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        return_entropy: bool,
    ) -> Any: ...

    def log_prob(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        return_entropy: bool = False,
    ) -> Any:
        """Log-probability of labels, without stored logits.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          class_mask: [V] booleans; False drops a class.
          weights: [...] booleans or reals, one weight a token, which its numbers are
            multiplied by; a token of weight 0 has log-probability and entropy 0, and
            gradients of 0, whatever its label and hidden state, NaN included.
          ignore_label: a label whose tokens have weight 0.
          return_entropy: whether to return the entropy of each token's softmax, too.

        Returns:
          [...] float32 (float64 if an input is), never above 0; with `return_entropy`
          a pair of it and the entropy [...], as `jaxsoft.linear_log_prob`.
        """
        log_prob, entropy = self.call(
            linear_log_prob,
            hidden,
            labels,
            temperature=temperature,
            class_mask=class_mask,
            weights=weights,
            ignore_label=ignore_label,
        )
        return (log_prob, entropy) if return_entropy else log_prob

    def log_prob_at(
        self,
        hidden: ArrayLike,
        class_ids: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        normalize: bool = False,
    ) -> Any:
        """Log-probabilities of K classes for each token, without stored logits.

        Args:
          hidden: [..., H] floating.
          class_ids: [..., K] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          class_mask: [V] booleans; False drops a class.
          weights: [...] booleans or reals, one weight a token, as in `log_prob`.
          ignore_label: an id whose log-probability is 0.
          normalize: whether the K classes of a token share all of its probability.

        Returns:
          [..., K] float32 (float64 if an input is), and with `normalize` the entropy
          [...] beside it, as `jaxsoft.linear_log_prob_at`.
        """
        return self.call(
            linear_log_prob_at,
            hidden,
            class_ids,
            temperature=temperature,
            class_mask=class_mask,
            weights=weights,
            ignore_label=ignore_label,
            normalize=normalize,
        )

    def statistics(
        self,
        hidden: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        return_argmax: bool = False,
        return_rank: bool = False,
        return_top_k: int | None = None,
    ) -> LogitStatistics:
        """Log-sum-exp, entropy and more of each token, without stored logits.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V), or None.
          temperature: τ, a scalar or [...]; None takes the module's.
          class_mask: [V] booleans; False drops a class.
          return_argmax: whether to compute the likeliest class, at some cost.
          return_rank: whether to compute how many classes beat the label.
          return_top_k: how many of the best classes to compute, or None.

        Returns:
          A `LogitStatistics` of arrays [...], as `jaxsoft.linear_statistics`.
        """
        return self.call(
            linear_statistics,
            hidden,
            labels,
            temperature=temperature,
            class_mask=class_mask,
            return_argmax=return_argmax,
            return_rank=return_rank,
            return_top_k=return_top_k,
        )

    def distillation(
        self,
        hidden: ArrayLike,
        teacher: LinearMethods,
        teacher_hidden: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        alpha: float = 0.0,
        labels: ArrayLike | None = None,
        label_weight: float = 0.5,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        reduction: Reduction = "mean",
        teacher_gradient: bool = False,
    ) -> jax.Array:
        """Divergence from another head's softmax to this one's, times τ².

        Args:
          hidden: [..., H] floating.
          teacher: a `SoftmaxHead` over the same classes and their mesh axes, with
            features, dtype, layout and soft-cap of its own.
          teacher_hidden: [..., G] floating, for the teacher.
          temperature: τ of both, a scalar or [...]; None takes this module's.
          divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
          beta: in [0, 1], of Jensen-Shannon: the weight of the teacher.
          alpha: in [0, 1), the skew of either Kullback-Leibler divergence.
          labels: [...] integers in [0, V), or None; with labels their cross-entropy at
            temperature 1 is added.
          label_weight: in [0, 1], the share of the cross-entropy.
          class_mask: [V] booleans; False drops a class from both.
          weights: [...] booleans or reals, one weight a token.
          ignore_label: a label whose tokens have weight 0.
          reduction: "mean", "sum" or "none".
          teacher_gradient: whether a gradient flows to the teacher as well.

        Returns:
          A scalar, or [...] with reduction "none", as `jaxsoft.linear_distillation`.

        Raises:
          TypeError: if the teacher is no such head.
          ValueError: if the teacher has another number of classes or vocab_axis.
        """
        if not hasattr(teacher, "vocab_axis"):
            raise TypeError(
                "`teacher` must be a SoftmaxHead, such as `full` of a "
                f"SampledSoftmaxHead, got {type(teacher).__name__}."
            )
        if teacher.vocab_axis != self.vocab_axis:
            raise ValueError(
                f"`teacher` must have the vocab_axis {self.vocab_axis!r}, got "
                f"{teacher.vocab_axis!r}."
            )
        teacher_hidden, teacher_kernel = teacher._promoted(teacher_hidden)
        options = teacher._options()
        return self.call(
            linear_distillation,
            hidden,
            teacher_hidden,
            teacher_kernel,
            teacher_bias=options["bias"],
            teacher_logit_softcap=options["logit_softcap"],
            teacher_kernel_layout=options["kernel_layout"],
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            alpha=alpha,
            labels=labels,
            label_weight=label_weight,
            class_mask=class_mask,
            weights=weights,
            ignore_label=ignore_label,
            reduction=reduction,
            teacher_gradient=teacher_gradient,
        )

    def distillation_top_k(
        self,
        hidden: ArrayLike,
        teacher_ids: ArrayLike,
        teacher_log_probs: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        remaining: Remaining = "other",
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        alpha: float = 0.0,
        labels: ArrayLike | None = None,
        label_weight: float = 0.5,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        reduction: Reduction = "mean",
    ) -> jax.Array:
        """Divergence from a teacher known at K classes to this head, times τ².

        Args:
          hidden: [..., H] floating.
          teacher_ids: [..., K] integers in [0, V); -1 pads.
          teacher_log_probs: [..., K] floating, at the temperature τ.
          temperature: τ, a scalar or [...]; None takes this module's.
          remaining: "other", "drop", "renormalize" or "ignore".
          divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
          beta: in [0, 1], of Jensen-Shannon: the weight of the teacher.
          alpha: in [0, 1), the skew of either Kullback-Leibler divergence.
          labels: [...] integers in [0, V), or None; with labels their cross-entropy at
            temperature 1 is added.
          label_weight: in [0, 1], the share of the cross-entropy.
          class_mask: [V] booleans; False drops a class.
          weights: [...] booleans or reals, one weight a token.
          ignore_label: a label whose tokens have weight 0.
          reduction: "mean", "sum" or "none".

        Returns:
          A scalar, or [...] with reduction "none", as
          `jaxsoft.linear_distillation_top_k`.
        """
        return self.call(
            linear_distillation_top_k,
            hidden,
            teacher_ids,
            teacher_log_probs,
            temperature=temperature,
            remaining=remaining,
            divergence=divergence,
            beta=beta,
            alpha=alpha,
            labels=labels,
            label_weight=label_weight,
            class_mask=class_mask,
            weights=weights,
            ignore_label=ignore_label,
            reduction=reduction,
        )

    def fit_temperature(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        class_mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        bounds: tuple[float, float] = DEFAULT_BOUNDS,
    ) -> TemperatureFit:
        """The temperature at which the head fits labels best, its logits streamed.

        Args:
          hidden: [..., H] floating, of held-out examples.
          labels: [...] integers in [0, V).
          class_mask: [V] booleans; False drops a class.
          weights: [...] booleans or reals >= 0, one weight a token.
          bounds: the lowest and the highest temperature.

        Returns:
          A `TemperatureFit`, as `jaxsoft.linear_fit_temperature`: its `temperature` is
          for the methods' arguments. That of the head neither counts nor changes.
        """
        return self.call(
            linear_fit_temperature,
            hidden,
            labels,
            class_mask=class_mask,
            weights=weights,
            bounds=bounds,
        )

    def sample(
        self,
        key: jax.Array,
        hidden: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
        top_k: ArrayLike | None = None,
        top_p: ArrayLike | None = None,
        min_p: ArrayLike | None = None,
        top_n_sigma: ArrayLike | None = None,
        return_log_prob: bool = False,
    ) -> Any:
        """Draws one class for each token, exactly, without stored logits.

        Args:
          key: a JAX random key.
          hidden: [..., H] floating.
          temperature: τ in [0, ∞], a scalar or [...]; 0 takes the lowest argmax; None
            takes the module's.
          class_mask: [V] booleans; False drops a class.
          top_k: an integer >= 0: the k first classes stay; 0 keeps all. Like the other
            filters a scalar or [...]; they apply as in `jaxsoft.linear_sample`.
          top_p: in [0, 1], of the probability; 1 keeps all.
          min_p: in [0, 1], the least share of the largest probability; 0 keeps all.
          top_n_sigma: in [0, ∞], how many standard deviations below the largest logit;
            ∞ keeps all.
          return_log_prob: whether to return the log-probabilities of the classes too.

        Returns:
          [...] int32 in [0, V), as `jaxsoft.linear_sample`: the same for every tile
          size and sharding, but for ties within rounding; -1 for a row without any kept
          class, or with a NaN. With `return_log_prob` a `jaxsoft.SampledClasses`.
        """
        return self.call(
            linear_sample,
            key,
            hidden,
            temperature=temperature,
            class_mask=class_mask,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            top_n_sigma=top_n_sigma,
            return_log_prob=return_log_prob,
        )

    def top_k(
        self,
        hidden: ArrayLike,
        k: int,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The k most probable classes of each token, without stored logits.

        Args:
          hidden: [..., H] floating.
          k: how many classes, in [1, V].
          temperature: τ in [0, ∞], a scalar or [...], of the log-probabilities; None
            takes the module's.
          class_mask: [V] booleans; False drops a class.

        Returns:
          Log-probabilities [..., k], descending, float32 (float64 if an input is), and
          class ids [..., k], int32, as `jaxsoft.linear_top_k`: equal ones ordered by
          id; -inf and id -1 where fewer than k classes are kept.
        """
        return self.call(
            linear_top_k,
            hidden,
            k,
            temperature=temperature,
            class_mask=class_mask,
        )
