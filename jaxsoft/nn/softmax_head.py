"""The full softmax layer: logits when asked for, losses without them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks, numerics
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import KernelLayout, MeshAxes
from jaxsoft.linear.log_probs import linear_log_prob
from jaxsoft.linear.losses import linear_cross_entropy
from jaxsoft.linear.sampling import linear_sample
from jaxsoft.linear.top_k import linear_top_k
from jaxsoft.nn import arguments

__all__ = ["ClassOptions", "SoftmaxHead", "StreamOptions"]

# Flax keeps metadata of any type.
_Metadata = Mapping[str, Any]

_NO_METADATA: _Metadata = MappingProxyType({})


class ClassOptions(TypedDict):
    """Options of functions of single classes: parts of the layer and of the call."""

    bias: jax.Array | None
    temperature: ArrayLike
    kernel_layout: KernelLayout
    precision: jax.lax.PrecisionLike


class StreamOptions(TypedDict):
    """Options of functions that stream over the classes: those of the layer."""

    logit_softcap: float | None
    kernel_layout: KernelLayout
    precision: jax.lax.PrecisionLike
    vocab_axis: MeshAxes
    token_axes: MeshAxes
    tile_bytes: int | None
    implementation: Implementation | None


class SoftmaxHead(nnx.Module):
    """A softmax over many classes on top of hidden states.

    Logits are `u = softcap(hidden @ kernel + bias)`, probabilities `softmax(u / τ)`.
    `loss`, `log_prob`, `sample` and `top_k` stream over the classes and never store
    [N, V] logits; calling the module does.

    On many devices, place the parameters and jit: no method gathers `hidden` or the
    kernel. `kernel_metadata` and `bias_metadata` say where a parameter belongs, and
    `nnx.get_named_sharding` reads it. Inside `jax.shard_map`, where the parameters are
    one shard's, `vocab_axis` and `token_axes` name the axes in place of that.

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
        two share one parameter: gradients of both uses add up, and its metadata is
        the embedding's.
      temperature: τ in [0, ∞], a Python float or an array, both constants and no
        parameters; or a module that gives it, such as `LearnableTemperature`.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None.
      dtype: dtype of hidden states and kernel in matrix products; None takes theirs.
      param_dtype: dtype of new parameters.
      precision: of the matrix products, as in `jnp.matmul`.
      kernel_init: initialiser of the kernel, of shape (H, V).
      bias_init: initialiser of the bias.
      kernel_metadata: metadata of the kernel's `nnx.Param`, as in `nnx.Linear`:
        `{"out_sharding": (None, "vocab")}` shards the classes over that mesh axis.
        Flax places the new parameter at once, and needs `jax.set_mesh` for it, unless
        `"eager_sharding": False` is there too.
      bias_metadata: metadata of the bias's `nnx.Param`.
      tile_bytes: the most bytes that a tile of logits may take; see
        `jaxsoft.linear_cross_entropy`.
      vocab_axis: inside `jax.shard_map`, the mesh axis (or axes) that the classes are
        sharded over; None: the classes are all here, or placed by plain jit.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens: losses are those
        of all shards, and every token is drawn with bits of its own.
      implementation: as in `jaxsoft.linear_cross_entropy`.
      rngs: source of the parameters' keys.

    Raises:
      ValueError: if the embedding's shape is not [num_classes, in_features], or an
        argument is out of its range or does nothing with an embedding.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft.nn import SoftmaxHead
      >>> zeros = nnx.initializers.zeros
      >>> head = SoftmaxHead(16, 1000, kernel_init=zeros, rngs=nnx.Rngs(0))
      >>> hidden, labels = jnp.ones((2, 5, 16)), jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{head.loss(hidden, labels):.4f}", head(hidden).shape)
      6.9078 (2, 5, 1000)

      Decoding, with a kernel that prefers class 7:

      >>> import jax
      >>> prefers_7 = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[:, 7].set(9)
      >>> head = SoftmaxHead(16, 1000, kernel_init=prefers_7, rngs=nnx.Rngs(0))
      >>> print(head.sample(jax.random.key(0), hidden[0], temperature=0.5))
      [7 7 7 7 7]
      >>> log_probs, class_ids = head.top_k(hidden[0, 0], 3)
      >>> print(class_ids)
      [7 0 1]

      The loss of GRPO (arXiv:2402.03300) for a group of two answers to one prompt:

      >>> def grpo_loss(head, hidden, tokens, old_log_prob, advantages):
      ...     ratio = jnp.exp(head.log_prob(hidden, tokens) - old_log_prob)
      ...     clipped = jnp.clip(ratio, 0.8, 1.2)
      ...     advantages = advantages[:, None]
      ...     return -jnp.minimum(ratio * advantages, clipped * advantages).mean()
      >>> old_log_prob = head.log_prob(hidden, labels)
      >>> rewards = jnp.array([3.0, 1.0])
      >>> advantages = (rewards - rewards.mean()) / rewards.std()
      >>> loss, gradients = nnx.value_and_grad(grpo_loss)(
      ...     head, hidden, labels, old_log_prob, advantages
      ... )
      >>> print(gradients["kernel"].shape)
      (16, 1000)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        use_bias: bool = False,
        embedding: nnx.Embed | None = None,
        temperature: arguments.Temperature = 1.0,
        logit_softcap: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = arguments.KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        kernel_metadata: _Metadata = _NO_METADATA,
        bias_metadata: _Metadata = _NO_METADATA,
        vocab_axis: MeshAxes = None,
        token_axes: MeshAxes = (),
        tile_bytes: int | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters; see the class for the arguments."""
        self.in_features = checks.positive_integer("in_features", in_features)
        self.num_classes = checks.positive_integer("num_classes", num_classes)
        shape = (self.num_classes, self.in_features)
        if embedding is not None:
            _check_embedding(embedding, shape, kernel_metadata)
        # One assignment each: Flax fixes an attribute's kind by its first value.
        self.kernel = (
            nnx.Param(
                kernel_init(rngs.params(), shape[::-1], param_dtype), **kernel_metadata
            )
            if embedding is None
            else None
        )
        self.embedding = embedding
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape[:1], param_dtype), **bias_metadata)
            if use_bias
            else None
        )
        self.temperature: arguments.StoredTemperature = arguments.stored(temperature)
        self.logit_softcap = logit_softcap
        self.dtype = dtype
        self.precision = precision
        # Flax takes tuples, but no lists, for constants.
        self.vocab_axis = _axes(vocab_axis)
        self.token_axes = _axes(token_axes)
        self.tile_bytes = tile_bytes
        self.implementation: Implementation | None = implementation

    def __call__(self, hidden: ArrayLike) -> jax.Array:
        """Returns all logits, soft-capped and not divided by the temperature.

        Args:
          hidden: [..., H] floating.

        Returns:
          [..., V] float32 (float64 if an input is): these are stored. With a
          `vocab_axis`, the logits of this shard's classes.
        """
        hidden, kernel, bias = self._promote(hidden)
        wide = numerics.compute_dtype(hidden, kernel)
        operand = numerics.operand_dtype(hidden, kernel)
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
        log_prob, _ = linear_log_prob(
            hidden,
            kernel,
            labels,
            bias=bias,
            temperature=self._temperature(temperature),
            class_mask=class_mask,
            **self._options(),
        )
        return log_prob

    def sample(
        self,
        key: jax.Array,
        hidden: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        class_mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Draws one class for each token, exactly, without stored logits.

        Args:
          key: a JAX random key.
          hidden: [..., H] floating.
          temperature: τ in [0, ∞], a scalar or [...]; 0 takes the lowest argmax; None
            takes the module's.
          class_mask: [V] booleans; False drops a class.

        Returns:
          [...] int32 in [0, V), as `jaxsoft.linear_sample`: the same for every tile
          size and sharding, but for ties within rounding; -1 for a row without any kept
          class, or with a NaN.
        """
        hidden, kernel, bias = self._promote(hidden)
        return linear_sample(
            key,
            hidden,
            kernel,
            bias=bias,
            temperature=self._temperature(temperature),
            class_mask=class_mask,
            **self._options(),
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
        hidden, kernel, bias = self._promote(hidden)
        return linear_top_k(
            hidden,
            kernel,
            k,
            bias=bias,
            temperature=self._temperature(temperature),
            class_mask=class_mask,
            **self._options(),
        )

    def operands(
        self, hidden: ArrayLike, temperature: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array, ClassOptions]:
        """Returns what functions of single classes need of this layer.

        Args:
          hidden: [..., H] floating.
          temperature: τ, a scalar or [...]; None takes the module's.

        Returns:
          Hidden states and kernel in the dtype of matrix products, and a dict of the
          options bias, temperature, kernel_layout and precision.

        Raises:
          ValueError: if the layer has what such functions do not know: a soft cap or
            sharded classes.
        """
        if self.logit_softcap is not None or self.vocab_axis is not None:
            raise ValueError(
                "`logit_softcap` and `vocab_axis` must be None, got "
                f"{self.logit_softcap!r} and {self.vocab_axis!r}."
            )
        hidden, kernel, bias = self._promote(hidden)
        return (
            hidden,
            kernel,
            {
                "bias": bias,
                "temperature": self._temperature(temperature),
                "kernel_layout": "hv" if self.embedding is None else "vh",
                "precision": self.precision,
            },
        )

    def _promote(self, hidden: ArrayLike):
        """Returns hidden, kernel and bias in the dtype of matrix products."""
        hidden = checks.floating("hidden", hidden)
        param = self.kernel if self.embedding is None else self.embedding.embedding
        assert param is not None
        kernel = param[...]
        bias = None if self.bias is None else self.bias[...]
        hidden, kernel = arguments.promoted(self.dtype, hidden, kernel)
        return hidden, kernel, bias

    def _temperature(self, temperature: ArrayLike | None) -> ArrayLike:
        return arguments.current(self.temperature, temperature)

    def _options(self) -> StreamOptions:
        """Returns the options that every function of the linear room takes."""
        return {
            "logit_softcap": self.logit_softcap,
            "kernel_layout": "hv" if self.embedding is None else "vh",
            "precision": self.precision,
            "vocab_axis": self.vocab_axis,
            "token_axes": self.token_axes,
            "tile_bytes": self.tile_bytes,
            "implementation": self.implementation,
        }


def _axes(value: MeshAxes) -> str | tuple[str, ...] | None:
    """Returns mesh axes without a list."""
    return value if value is None or isinstance(value, str) else tuple(value)


def _check_embedding(
    embedding: nnx.Embed, shape: tuple[int, int], kernel_metadata: _Metadata
) -> None:
    """Raises unless a tied embedding is a kernel [V, H], with its own metadata."""
    table = embedding.embedding[...]
    checks.shape("embedding", table, shape, "[num_classes, in_features]")
    if kernel_metadata:
        raise ValueError(
            "`kernel_metadata` must be empty with a tied embedding, got "
            f"{dict(kernel_metadata)}. Give nnx.Embed `embedding_metadata`."
        )
