"""A softmax layer of a shortlist and narrow tails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import Reduction, labelled_tokens
from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.adaptive.decoding import adaptive_sample, adaptive_top_k
from jaxsoft.adaptive.layer import AdaptiveTail
from jaxsoft.adaptive.log_probs import adaptive_log_prob, adaptive_log_probs
from jaxsoft.nn import arguments
from jaxsoft.nn.tables import Tables

__all__ = ["AdaptiveSoftmaxHead"]


class AdaptiveSoftmaxHead(nnx.Module):
    """An adaptive softmax on top of hidden states.

    Common classes have logits of all H features, rare ones of fewer, and are computed
    for the tokens that come to their tail alone. `loss`, `log_prob`, `sample` and
    `top_k` are called as `SoftmaxHead`'s are.

    Attributes:
      kernel: the parameter [H, S + T] of the shortlist and of the tails' entries.
      bias: the parameter [S + T], or None.
      projections: the parameters [H, D] of the tails.
      tail_kernels: the parameters [D, V_i] of the tails.
      tail_biases: the parameters [V_i] of the tails; empty without a bias.
      bands: the arrays of the `ClassBands`, variables and no parameters;
        `bands.get_value()` is the `ClassBands` itself.
      temperature: τ, where a method is not given another.

    Args:
      in_features: H.
      bands: the classes by frequency.
      tail_features: D of each tail; None takes `in_features // tail_factor^(i+1)`.
      tail_factor: by how much each tail is narrower than the one before.
      use_bias: whether all logits have a bias.
      temperature: τ in [0, ∞] of every softmax, a Python float or an array, both
        constants and no parameters; or a module that gives it, such as
        `LearnableTemperature`.
      dtype: dtype of hidden states and kernels in products; None takes theirs.
      param_dtype: dtype of new parameters.
      precision: of the products, as in `jnp.matmul`.
      kernel_init: initialiser of the kernels.
      projection_init: initialiser of the projections.
      bias_init: initialiser of the biases; it makes one [S + T], and one [V_i] a tail.
      implementation: as in `jaxsoft.adaptive_log_prob`.
      rngs: source of the parameters' keys.

    Raises:
      TypeError: if the bands are none.
      ValueError: if an argument is out of its range, or a tail would be 0 wide.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft import ClassBands
      >>> from jaxsoft.nn import AdaptiveSoftmaxHead
      >>> bands = ClassBands.in_order(1000, (100, 400))
      >>> zeros = nnx.initializers.zeros
      >>> head = AdaptiveSoftmaxHead(16, bands, kernel_init=zeros, rngs=nnx.Rngs(0))
      >>> hidden, labels = jnp.ones((2, 5, 16)), jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{head.loss(hidden, labels):.4f}", head(hidden).shape)
      4.6250 (2, 5, 1000)
      >>> print([kernel.shape for kernel in head.tail_kernels])
      [(4, 300), (1, 600)]
    """

    def __init__(
        self,
        in_features: int,
        bands: ClassBands,
        *,
        tail_features: Sequence[int] | None = None,
        tail_factor: float = 4.0,
        use_bias: bool = False,
        temperature: arguments.Temperature = 1.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = arguments.KERNEL_INIT,
        projection_init: nnx.Initializer = arguments.KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters; see the class for the arguments."""
        if not isinstance(bands, ClassBands):
            raise TypeError(
                f"`bands` must be a ClassBands, got {type(bands).__name__}."
            )
        self.in_features = checks.positive_integer("in_features", in_features)
        self.num_classes = bands.num_classes
        self.bands = Tables(bands)
        widths = _widths(self.in_features, len(bands.tails), tail_features, tail_factor)

        def parameters(init, *shapes):
            made = [init(rngs.params(), shape, param_dtype) for shape in shapes]
            return nnx.List([nnx.Param(value) for value in made])

        entries = bands.shortlist + len(bands.tails)
        (self.kernel,) = parameters(kernel_init, (self.in_features, entries))
        self.bias = parameters(bias_init, (entries,))[0] if use_bias else None
        self.projections = parameters(
            projection_init, *((self.in_features, width) for width in widths)
        )
        self.tail_kernels = parameters(
            kernel_init, *zip(widths, bands.tails, strict=True)
        )
        sizes = bands.tails if use_bias else ()
        self.tail_biases = parameters(bias_init, *((size,) for size in sizes))
        self.temperature: arguments.StoredTemperature = arguments.stored(temperature)
        self.dtype = dtype
        self.precision = precision
        self.implementation: Implementation | None = implementation

    def __call__(self, hidden: ArrayLike) -> jax.Array:
        """Returns the log-probabilities of all classes, which are logits, too.

        Args:
          hidden: [..., H] floating.

        Returns:
          [..., V] float32 (float64 if an input is), at temperature 1.
        """
        operands, options = self._operands(hidden, 1.0)
        return adaptive_log_probs(*operands, self._bands(), **options)

    def loss(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        reduction: Reduction = "mean",
    ) -> jax.Array:
        """Cross-entropy of labels.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          weights: [...] booleans or reals, one weight a token.
          ignore_label: a label whose tokens have weight 0.
          reduction: "mean", "sum" or "none".

        Returns:
          A scalar, or [...] with reduction "none", float32 (float64 if an input is).
        """
        hidden, labels, token_weight = labelled_tokens(
            hidden, labels, weights, ignore_label
        )
        loss = -self.log_prob(hidden, labels, temperature=temperature)
        return arguments.reduced(loss, token_weight, reduction)

    def log_prob(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
    ) -> jax.Array:
        """Log-probability of labels.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          weights: [...] booleans or reals, one weight a token, which its
            log-probability is multiplied by; a token of weight 0 has log-probability
            0, and gradients of 0, whatever its label and hidden state, NaN included.
          ignore_label: a label whose tokens have weight 0.

        Returns:
          [...] float32 (float64 if an input is), at most 0.
        """
        operands, options = self._operands(hidden, temperature)
        return adaptive_log_prob(
            *operands,
            labels,
            self._bands(),
            weights=weights,
            ignore_label=ignore_label,
            **options,
        )

    def sample(
        self,
        key: jax.Array,
        hidden: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
    ) -> jax.Array:
        """Draws one class for each token, exactly.

        Args:
          key: a JAX random key.
          hidden: [..., H] floating.
          temperature: τ in [0, ∞], a scalar or [...]; 0 takes the likeliest entry of
            each softmax; None takes the module's.

        Returns:
          [...] int32 in [0, V), as `jaxsoft.adaptive_sample`.
        """
        operands, options = self._operands(hidden, temperature)
        return adaptive_sample(key, *operands, self._bands(), **options)

    def top_k(
        self,
        hidden: ArrayLike,
        k: int,
        *,
        temperature: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The k most probable classes of each token, exactly.

        Args:
          hidden: [..., H] floating.
          k: how many classes, in [1, V].
          temperature: τ in [0, ∞], a scalar or [...]; None takes the module's.

        Returns:
          Log-probabilities [..., k], descending, and class ids [..., k] int32, as
          `jaxsoft.adaptive_top_k`.
        """
        operands, options = self._operands(hidden, temperature)
        return adaptive_top_k(*operands, k, self._bands(), **options)

    def _bands(self) -> ClassBands:
        return self.bands.get_value()

    def _operands(
        self, hidden: ArrayLike, temperature: ArrayLike | None
    ) -> tuple[tuple[jax.Array, jax.Array, list[AdaptiveTail]], dict[str, Any]]:
        """Returns hidden states, kernel and tails, and the options of a call."""
        hidden = checks.floating("hidden", hidden)
        hidden, kernel = arguments.promoted(self.dtype, hidden, self.kernel[...])
        tails = []
        for *pair, bias in itertools.zip_longest(
            self.projections, self.tail_kernels, self.tail_biases
        ):
            projection, own = arguments.promoted(self.dtype, *(p[...] for p in pair))
            bias = None if bias is None else bias[...]
            tails.append(AdaptiveTail(projection, own, bias))
        options = {
            "head_bias": None if self.bias is None else self.bias[...],
            "temperature": arguments.current(self.temperature, temperature),
            "precision": self.precision,
            "implementation": self.implementation,
        }
        return (hidden, kernel, tails), options


def _widths(
    features: int, tails: int, given: Sequence[int] | None, factor: float
) -> tuple[int, ...]:
    """Returns the width of each tail, at least 1."""
    if given is None:
        factor = checks.scalar_in("tail_factor", factor, 1, float("inf"))
        widths = tuple(int(features / factor ** (i + 1)) for i in range(tails))
        if not all(widths):
            raise ValueError(
                f"`tail_factor` must leave each of {tails} tails a feature of "
                f"{features}, got {factor:g}: widths {widths}. Give `tail_features`."
            )
        return widths
    if len(given) != tails:
        raise ValueError(
            f"`tail_features` must be one for each of {tails} tails, got {given}."
        )
    return tuple(checks.positive_integer("tail_features", width) for width in given)
