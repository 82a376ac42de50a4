"""The full softmax layer: logits when asked for, losses without them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax.typing import ArrayLike, DTypeLike

from jaxsoft import checks, dtypes
from jaxsoft.implementation import Implementation
from jaxsoft.linear.losses import linear_cross_entropy
from jaxsoft.linear.statistics import linear_statistics

__all__ = ["SoftmaxHead"]

_KERNEL_INIT = nnx.initializers.lecun_normal()


class SoftmaxHead(nnx.Module):
    """A softmax over many classes on top of hidden states.

    Logits are `u = softcap(hidden @ kernel + bias)`, probabilities `softmax(u / τ)`.
    `loss` and `log_prob` stream over the classes and never store [N, V] logits;
    calling the module does.

    Attributes:
      kernel: the parameter [H, V], or None with a tied embedding.
      bias: the parameter [V], or None.
      embedding: the tied embedding, whose table [V, H] serves as the kernel in place;
        or None.
      temperature: τ, where a method is not given another.

    Args:
      in_features: H.
      num_classes: V.
      use_bias: whether the logits have a bias.
      embedding: an `nnx.Embed` with V rows and H features to tie the head to. The
        two share one parameter: gradients of both uses add up.
      temperature: τ in [0, ∞], a Python float or an array; a constant, not a
        parameter.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None.
      dtype: dtype of hidden states and kernel in matrix products; None takes theirs.
      param_dtype: dtype of new parameters.
      precision: of the matrix products, as in `jnp.matmul`.
      kernel_init: initialiser of the kernel, of shape (H, V).
      bias_init: initialiser of the bias.
      tile_bytes: the most bytes that a tile of logits may take; see
        `jaxsoft.linear_cross_entropy`.
      implementation: as in `jaxsoft.linear_cross_entropy`.
      rngs: source of the parameters' keys.

    Raises:
      ValueError: if the embedding's shape is not [num_classes, in_features], or an
        argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft.nn import SoftmaxHead
      >>> zeros = nnx.initializers.zeros
      >>> head = SoftmaxHead(16, 1000, kernel_init=zeros, rngs=nnx.Rngs(0))
      >>> hidden, labels = jnp.ones((2, 5, 16)), jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{head.loss(hidden, labels):.4f}", head(hidden).shape)
      6.9078 (2, 5, 1000)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        use_bias: bool = False,
        embedding: nnx.Embed | None = None,
        temperature: float | jax.Array = 1.0,
        logit_softcap: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        tile_bytes: int | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters; see the class for the arguments."""
        self.in_features = checks.positive_integer("in_features", in_features)
        self.num_classes = checks.positive_integer("num_classes", num_classes)
        shape = (self.num_classes, self.in_features)
        if embedding is not None:
            checks.shape(
                "embedding",
                embedding.embedding[...],
                shape,
                "[num_classes, in_features]",
            )
        # One assignment each: Flax fixes an attribute's kind by its first value.
        self.kernel = (
            nnx.Param(kernel_init(rngs.params(), shape[::-1], param_dtype))
            if embedding is None
            else None
        )
        self.embedding = embedding
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape[:1], param_dtype))
            if use_bias
            else None
        )
        self.temperature: float | nnx.Variable = (
            temperature
            if isinstance(temperature, (int, float))
            else nnx.Variable(jnp.asarray(temperature))
        )
        self.logit_softcap = logit_softcap
        self.dtype = dtype
        self.precision = precision
        self.tile_bytes = tile_bytes
        self.implementation: Implementation | None = implementation

    def __call__(self, hidden: ArrayLike) -> jax.Array:
        """Returns all logits, soft-capped and not divided by the temperature.

        Args:
          hidden: [..., H] floating.

        Returns:
          [..., V] float32 (float64 if an input is): these are stored.
        """
        hidden, kernel, bias = self._promote(hidden)
        wide = dtypes.compute_dtype(hidden, kernel)
        operand = dtypes.operand_dtype(hidden, kernel)
        axis = 0 if self.embedding is None else 1
        logits = jax.lax.dot_general(
            hidden.astype(operand),
            kernel.astype(operand),
            (((hidden.ndim - 1,), (axis,)), ((), ())),
            precision=self.precision,
            preferred_element_type=wide,
        )
        if bias is not None:
            logits = logits + jnp.expand_dims(bias, range(hidden.ndim - 1)).astype(wide)
        if self.logit_softcap is not None:
            capped = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
            logits = jnp.where(logits == -jnp.inf, logits, capped)
        return logits

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
        reduction: Literal["mean", "sum", "none"] = "mean",
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
        hidden, kernel, bias = self._promote(hidden)
        return linear_cross_entropy(
            hidden,
            kernel,
            labels,
            bias=bias,
            temperature=self._temperature(temperature),
            class_mask=class_mask,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            weights=weights,
            ignore_label=ignore_label,
            reduction=reduction,
            **self._options(),
        )

    def log_prob(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Log-probability of labels, without stored logits.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          class_mask: [V] booleans; False drops a class.

        Returns:
          [...] float32 (float64 if an input is), never above 0.
        """
        hidden, kernel, bias = self._promote(hidden)
        return linear_statistics(
            hidden,
            kernel,
            labels,
            bias=bias,
            temperature=self._temperature(temperature),
            class_mask=class_mask,
            **self._options(),
        ).log_prob

    def _promote(self, hidden: ArrayLike):
        """Returns hidden, kernel and bias in the dtype of matrix products."""
        hidden = checks.floating("hidden", hidden)
        param = self.kernel if self.embedding is None else self.embedding.embedding
        assert param is not None
        kernel = param[...]
        bias = None if self.bias is None else self.bias[...]
        if self.dtype is not None:
            hidden, kernel = flax_dtypes.promote_dtype(
                (hidden, kernel), dtype=self.dtype
            )
        return hidden, kernel, bias

    def _temperature(self, temperature: ArrayLike | None) -> Any:
        if temperature is not None:
            return temperature
        own = self.temperature
        return own[...] if isinstance(own, nnx.Variable) else own

    def _options(self) -> dict[str, Any]:
        """Returns the options that every function of the linear room takes."""
        return {
            "logit_softcap": self.logit_softcap,
            "kernel_layout": "hv" if self.embedding is None else "vh",
            "precision": self.precision,
            "tile_bytes": self.tile_bytes,
            "implementation": self.implementation,
        }
