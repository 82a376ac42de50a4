"""A full softmax layer that is trained on samples of its classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import Reduction
from jaxsoft.nn import arguments
from jaxsoft.nn.softmax_head import SoftmaxHead
from jaxsoft.nn.tables import Tables
from jaxsoft.sampled.loss import Sampler, sampled_softmax_loss

__all__ = ["SampledSoftmaxHead"]


class SampledSoftmaxHead(nnx.Module):
    """A `SoftmaxHead` whose loss in training is over labels and sampled classes.

    `log_prob`, `sample`, `top_k` and the logits are those of the full softmax, and so
    is `loss` after `eval()`.

    Attributes:
      full: the `SoftmaxHead` that has the parameters, and the methods that are not
        here: `statistics`, `log_prob_at`, `call` and more.
      sampler: the sampler's arrays, variables and no parameters;
        `sampler.get_value()` is the sampler.
      num_samples: S.
      deterministic: whether `loss` is that of the full softmax; set by `train()` and
        `eval()`.

    Args:
      in_features: H.
      num_classes: V.
      num_samples: S >= 1, the classes that are sampled for a call of `loss`.
      sampler: what draws them, a pytree such as a `ClassSampler` over V classes.
      use_bias: whether the logits have a bias.
      embedding: an `nnx.Embed` with V rows and H features to tie the head to.
      tied: whether `tied_to` gives it for a call instead, as in `SoftmaxHead`.
      temperature: τ in [0, ∞], a Python float or an array, both constants and no
        parameters; or a module that gives it, such as `LearnableTemperature`.
      remove_accidental_hits: as in `jaxsoft.sampled_softmax_loss`.
      deterministic: see the attribute.
      dtype: dtype of hidden states and kernel in matrix products; None takes theirs.
      param_dtype: dtype of new parameters.
      precision: of the matrix products, as in `jnp.matmul`.
      kernel_init: initialiser of the kernel, of shape (H, V).
      bias_init: initialiser of the bias.
      implementation: as in `jaxsoft.linear_cross_entropy`.
      rngs: source of the parameters' keys, and of the samples' (stream "negatives", or
        "params" where there is neither that nor a default). None in a tied head without
        a bias: then each call of `loss` in training needs a key.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft import ClassSampler
      >>> from jaxsoft.nn import SampledSoftmaxHead
      >>> sampler, zeros = ClassSampler.uniform(1000), nnx.initializers.zeros
      >>> head = SampledSoftmaxHead(
      ...     16, 1000, 64, sampler, kernel_init=zeros, rngs=nnx.Rngs(0)
      ... )
      >>> hidden, labels = jnp.ones((2, 5, 16)), jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{head.loss(hidden, labels):.3f}")
      6.909
      >>> head.eval()
      >>> print(f"{head.loss(hidden, labels):.3f}")
      6.908
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_samples: int,
        sampler: Sampler,
        *,
        use_bias: bool = False,
        embedding: nnx.Embed | None = None,
        tied: bool = False,
        temperature: arguments.Temperature = 1.0,
        remove_accidental_hits: bool = True,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = arguments.KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the parameters; see the class for the arguments."""
        self.num_samples = checks.positive_integer("num_samples", num_samples)
        self.num_classes = checks.positive_integer("num_classes", num_classes)
        self.full = SoftmaxHead(
            in_features,
            num_classes,
            use_bias=use_bias,
            embedding=embedding,
            tied=tied,
            temperature=temperature,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
        )
        self.sampler = Tables(sampler)
        self.remove_accidental_hits = remove_accidental_hits
        self.deterministic = deterministic
        if rngs is None:
            self.rngs = nnx.data(None)
        else:
            # Linen's bridge makes the stream "params" alone.
            named = "negatives" if {"negatives", "default"} & {*rngs} else "params"
            self.rngs = rngs[named].fork()

    def tied_to(self, embedding: nnx.Embed) -> SampledSoftmaxHead:
        """Returns this head with an embedding's table as its kernel, for a call.

        Args:
          embedding: an `nnx.Embed` with V rows and H features.

        Returns:
          A head that shares all other parts with this one, as `SoftmaxHead.tied_to`.
        """
        return _TiedHead(self, embedding)

    def __call__(self, hidden: ArrayLike) -> jax.Array:
        """Returns all logits, not divided by the temperature.

        Args:
          hidden: [..., H] floating.

        Returns:
          [..., V] float32 (float64 if an input is).
        """
        return self.full(hidden)

    def loss(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        key: jax.Array | None = None,
        temperature: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        reduction: Reduction = "mean",
    ) -> jax.Array:
        """Cross-entropy of labels against samples, or the full one after `eval()`.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          key: a JAX random key of the samples; None takes the next of the module's.
          temperature: τ, a scalar or [...]; None takes the module's.
          weights: [...] booleans or reals, one weight a token.
          ignore_label: a label whose tokens have weight 0.
          reduction: "mean", "sum" or "none".

        Returns:
          A scalar, or [...] with reduction "none", float32 (float64 if an input is).

        Raises:
          ValueError: if a key is needed and there is neither one nor a stream.
        """
        if self.deterministic:
            return self.full.loss(
                hidden,
                labels,
                temperature=temperature,
                weights=weights,
                ignore_label=ignore_label,
                reduction=reduction,
            )
        if key is None:
            if self.rngs is None:
                raise ValueError(
                    "`key` must be given where the head has no `rngs`, got None."
                )
            key = self.rngs()
        return self.full.call(
            sampled_softmax_loss,
            key,
            hidden,
            labels,
            self.num_samples,
            sampler=self.sampler.get_value(),
            temperature=temperature,
            remove_accidental_hits=self.remove_accidental_hits,
            weights=weights,
            ignore_label=ignore_label,
            reduction=reduction,
            # The head's own is that of the full softmax.
            implementation=None,
        )

    def log_prob(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
    ) -> jax.Array:
        """Log-probability of labels under the full softmax.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          weights: [...] booleans or reals, one weight a token, which its
            log-probability is multiplied by; a token of weight 0 has log-probability
            0, and gradients of 0, whatever its label and hidden state, NaN included.
          ignore_label: a label whose tokens have weight 0.

        Returns:
          [...] float32 (float64 if an input is), never above 0.
        """
        return self.full.log_prob(
            hidden,
            labels,
            temperature=temperature,
            weights=weights,
            ignore_label=ignore_label,
        )

    def sample(
        self,
        key: jax.Array,
        hidden: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        top_k: ArrayLike | None = None,
        top_p: ArrayLike | None = None,
        min_p: ArrayLike | None = None,
        top_n_sigma: ArrayLike | None = None,
        return_log_prob: bool = False,
    ) -> Any:
        """Draws one class for each token from the full softmax, exactly.

        Args:
          key: a JAX random key.
          hidden: [..., H] floating.
          temperature: τ in [0, ∞], a scalar or [...]; 0 takes the lowest argmax; None
            takes the module's.
          top_k: an integer >= 0: the k first classes stay; 0 keeps all. Like the other
            filters a scalar or [...]; they apply as in `jaxsoft.linear_sample`.
          top_p: in [0, 1], of the probability; 1 keeps all.
          min_p: in [0, 1], the least share of the largest probability; 0 keeps all.
          top_n_sigma: in [0, ∞], how many standard deviations below the largest logit;
            ∞ keeps all.
          return_log_prob: whether to return the log-probabilities of the classes too.

        Returns:
          [...] int32 in [0, V), as `jaxsoft.linear_sample`; with `return_log_prob` a
          `jaxsoft.SampledClasses`.
        """
        return self.full.sample(
            key,
            hidden,
            temperature=temperature,
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
    ) -> tuple[jax.Array, jax.Array]:
        """The k most probable classes of each token, as `SoftmaxHead.top_k`.

        Args:
          hidden: [..., H] floating.
          k: how many classes, in [1, V].
          temperature: τ in [0, ∞], a scalar or [...]; None takes the module's.

        Returns:
          Log-probabilities [..., k], descending, and class ids [..., k] int32.
        """
        return self.full.top_k(hidden, k, temperature=temperature)


class _TiedHead(SampledSoftmaxHead):
    """A head with the parts of another, and an embedding; see that of `SoftmaxHead`."""

    def __init__(self, head: SampledSoftmaxHead, embedding: nnx.Embed):
        """Takes the parts."""
        self.full = head.full.tied_to(embedding)
        self.num_classes = head.num_classes
        self.num_samples = head.num_samples
        self.sampler = head.sampler
        self.remove_accidental_hits = head.remove_accidental_hits
        self.deterministic = head.deterministic
        self.rngs = nnx.data(None) if head.rngs is None else head.rngs
