"""A softmax layer that goes down a tree of classes."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import Reduction, labelled_tokens
from jaxsoft.hierarchical.class_tree import ClassTree
from jaxsoft.hierarchical.row_gradients import (
    RowGradient,
    hierarchical_value_and_row_grad,
)
from jaxsoft.hierarchical.sampling import hierarchical_sample
from jaxsoft.hierarchical.softmax import (
    hierarchical_log_prob,
    hierarchical_log_probs,
)
from jaxsoft.hierarchical.top_k import hierarchical_top_k
from jaxsoft.nn import arguments
from jaxsoft.nn.tables import Tables

__all__ = ["HierarchicalSoftmaxHead"]


class HierarchicalSoftmaxHead(nnx.Module):
    """A hierarchical softmax on top of hidden states: O(H·log V) a token.

    `loss`, `log_prob`, `sample` and `top_k` are called as `SoftmaxHead`'s are. Their
    gradients are dense, as any Optax optimizer wants them; `value_and_row_grad` has
    those of the rows on the labels' paths alone, for `row_sgd` and its like.

    Attributes:
      node_kernel: the parameter [tree.num_rows, H].
      node_bias: the parameter [tree.num_rows], or None.
      tree: the arrays of the `ClassTree`, variables and no parameters;
        `tree.get_value()` is the `ClassTree` itself.
      temperature: τ, where a method is not given another.

    Args:
      in_features: H.
      tree: the classes.
      use_bias: whether the nodes' logits have a bias.
      temperature: τ in [0, ∞] of every node's softmax, a Python float or an array,
        both constants and no parameters; or a module that gives it, such as
        `LearnableTemperature`.
      dtype: dtype of hidden states and kernel in products; None takes theirs.
      param_dtype: dtype of new parameters.
      precision: of the products, as in `jnp.matmul`.
      kernel_init: initialiser of the kernel; it is given the shape (H, rows), as those
        of `nnx.Linear` are.
      bias_init: initialiser of the bias.
      implementation: as in `jaxsoft.hierarchical_log_prob`.
      rngs: source of the parameters' keys.

    Raises:
      TypeError: if the tree is none.
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft import ClassTree
      >>> from jaxsoft.nn import HierarchicalSoftmaxHead
      >>> tree, zeros = ClassTree.balanced(1024), nnx.initializers.zeros
      >>> head = HierarchicalSoftmaxHead(16, tree, kernel_init=zeros, rngs=nnx.Rngs(0))
      >>> hidden, labels = jnp.ones((2, 5, 16)), jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{head.loss(hidden, labels):.4f}", head(hidden).shape)
      6.9315 (2, 5, 1024)

      A step of SGD that touches the rows of the labels' paths alone:

      >>> from jaxsoft import row_sgd
      >>> optimizer = row_sgd(0.1)
      >>> loss, dhidden, gradient = head.value_and_row_grad(hidden, labels)
      >>> kernel = head.node_kernel[...]
      >>> kernel, _ = optimizer.update(kernel, gradient, optimizer.init(kernel))
      >>> head.node_kernel[...] = kernel
      >>> print(head.loss(hidden, labels) < loss)
      True
    """

    def __init__(
        self,
        in_features: int,
        tree: ClassTree,
        *,
        use_bias: bool = False,
        temperature: arguments.Temperature = 1.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = arguments.KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters; see the class for the arguments."""
        if not isinstance(tree, ClassTree):
            raise TypeError(f"`tree` must be a ClassTree, got {type(tree).__name__}.")
        self.in_features = checks.positive_integer("in_features", in_features)
        self.num_classes = tree.num_classes
        self.tree = Tables(tree)
        rows = tree.num_rows
        kernel = kernel_init(rngs.params(), (self.in_features, rows), param_dtype)
        self.node_kernel = nnx.Param(kernel.T)
        self.node_bias = (
            nnx.Param(bias_init(rngs.params(), (rows,), param_dtype))
            if use_bias
            else None
        )
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
        hidden, kernel, tree, options = self._operands(hidden, 1.0)
        return hierarchical_log_probs(hidden, kernel, tree, **options)

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

    def value_and_row_grad(
        self,
        hidden: ArrayLike,
        labels: ArrayLike,
        *,
        temperature: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        ignore_label: int | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> tuple[jax.Array, jax.Array, RowGradient]:
        """The loss, its gradient in hidden states, and in the rows on labels' paths.

        Args:
          hidden: [..., H] floating.
          labels: [...] integers in [0, V).
          temperature: τ, a scalar or [...]; None takes the module's.
          weights: [...] booleans or reals, one weight a token.
          ignore_label: a label whose tokens have weight 0.
          reduction: "mean" or "sum".

        Returns:
          A triple, as `jaxsoft.hierarchical_value_and_row_grad`: the gradient is in
          `node_kernel`, or in (`node_kernel`, `node_bias`) if there is a bias.
        """
        hidden, labels, token_weight = labelled_tokens(
            hidden, labels, weights, ignore_label
        )
        hidden, kernel, tree, options = self._operands(hidden, temperature)
        return hierarchical_value_and_row_grad(
            hidden,
            kernel,
            labels,
            tree,
            weights=token_weight,
            reduction=reduction,
            **options,
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
        hidden, kernel, tree, options = self._operands(hidden, temperature)
        return hierarchical_log_prob(
            hidden,
            kernel,
            labels,
            tree,
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
          temperature: τ in [0, ∞], a scalar or [...]; 0 takes the likeliest child of
            each node; None takes the module's.

        Returns:
          [...] int32 in [0, V), as `jaxsoft.hierarchical_sample`.
        """
        hidden, kernel, tree, options = self._operands(hidden, temperature)
        return hierarchical_sample(key, hidden, kernel, tree, **options)

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
          `jaxsoft.hierarchical_top_k` without a bound on visits.
        """
        hidden, kernel, tree, options = self._operands(hidden, temperature)
        log_probs, ids, _ = hierarchical_top_k(hidden, kernel, k, tree, **options)
        return log_probs, ids

    def _operands(
        self, hidden: ArrayLike, temperature: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array, ClassTree, dict[str, Any]]:
        """Returns hidden states, kernel, tree and options of a call."""
        hidden = checks.floating("hidden", hidden)
        hidden, kernel = arguments.promoted(self.dtype, hidden, self.node_kernel[...])
        options = {
            "node_bias": None if self.node_bias is None else self.node_bias[...],
            "temperature": arguments.current(self.temperature, temperature),
            "precision": self.precision,
            "implementation": self.implementation,
        }
        return hidden, kernel, self.tree.get_value(), options
