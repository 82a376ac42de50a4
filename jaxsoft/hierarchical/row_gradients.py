"""The loss of a tree's softmax and its gradient in the rows on some paths alone."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.exporting import PyTree, exportable_namedtuple
from jaxsoft._core.numerics import nan_where
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import reduce_losses
from jaxsoft.hierarchical.class_tree import ClassPath, ClassTree
from jaxsoft.hierarchical.layer import (
    Layer,
    logits_with,
    mask_tokens,
    parameters_of,
    prepare,
    rows_of_nodes,
)
from jaxsoft.hierarchical.softmax import log_choice

__all__ = ["RowGradient", "hierarchical_value_and_row_grad"]


@exportable_namedtuple
class RowGradient(NamedTuple):
    """A gradient that is 0 in all rows but some: what `row_sgd` and its like take.

    Row `rows[..., n]` gets `values[..., n]`, or `scales[..., n] · values[n]` where
    there are scales. Rows of equal number add; those that are no row of the parameters
    are left out. Leading axes are groups: no row is in two of them.

    Attributes:
      rows: [..., N] int32, in any order.
      values: [..., N, ...] floating, [N, ...] where there are scales; or a pytree of
        such arrays, of the structure of the parameters.
      scales: [..., N] floating, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import RowGradient
      >>> gradient = RowGradient(jnp.array([2, 0, 2]), jnp.array([[1.0], [2.0], [3.0]]))
      >>> print(gradient.dense(4).ravel())
      [2. 0. 4. 0.]
    """

    rows: jax.Array
    values: PyTree
    scales: jax.Array | None = None

    def dense(self, num_rows: int) -> PyTree:
        """Returns the whole gradient, [num_rows, ...], such as Optax's optimizers take.

        Args:
          num_rows: of the parameters.

        Returns:
          An array, or a pytree of them, of the dtype of values.
        """
        known = (self.rows >= 0) & (self.rows < num_rows)
        rows = jnp.where(known, self.rows, num_rows)

        def leaf(values):
            own = values
            if self.scales is not None:
                axes = values.ndim - 1
                own = self.scales.reshape(*self.scales.shape, *(1,) * axes)
                own = own * values.astype(own.dtype)[(None,) * (rows.ndim - 1)]
            zeros = jnp.zeros((num_rows, *own.shape[rows.ndim :]), own.dtype)
            return zeros.at[rows].add(own, mode="drop").astype(values.dtype)

        return jax.tree.map(leaf, self.values)


@mesh_axes.accepts_explicit("hidden", whole=2)
def hierarchical_value_and_row_grad(
    hidden: ArrayLike,
    node_kernel: ArrayLike,
    labels: ArrayLike,
    tree: ClassTree,
    *,
    node_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, RowGradient]:
    """Loss of a tree's softmax, with its gradient in the rows on the batch's paths.

    The loss is the mean or the sum of `-hierarchical_log_prob`. Its gradient in the
    kernel is not 0 in the rows on some token's path alone: at most log2(V) of them a
    token in a balanced tree. `jax.grad` returns it with all V rows; here, and in an
    update by `row_sgd`, `row_adagrad` or `row_adam`, nothing has V rows but the
    parameters: a training step takes O(N·H·log V).

    Args:
      hidden: [..., H] floating.
      node_kernel: [tree.num_rows, H] floating.
      labels: [...] integers in [0, V).
      tree: the classes.
      node_bias: [tree.num_rows] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every node's softmax; see
        `hierarchical_log_prob`.
      weights: [...] booleans or reals, one weight a token; a token of weight 0
        contributes exactly nothing, whatever its label and hidden state.
      reduction: "mean" (Σ weight · loss / Σ weight, 0 if the weights sum to 0) or "sum"
        (Σ weight · loss).
      precision: the precision of the products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      The loss, a float32 scalar (float64 if an input is), NaN where a label of weight
      other than 0 is outside [0, V); its gradient in `hidden`, of the shape and dtype
      of `hidden`; and its gradient in `node_kernel`, or in `(node_kernel, node_bias)`
      if there is a bias, as a `RowGradient` of max_depth · (arity - 1) groups.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      For a step in place, compile it with its parameters and its optimizer's state
      donated, as in the example. The gradient holds hidden states and one scale for
      each token and row, not a vector for each.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jaxsoft import ClassTree, hierarchical_value_and_row_grad, row_sgd
      >>> tree, optimizer = ClassTree.balanced(1000), row_sgd(0.5)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def step(kernel, state, hidden, labels):
      ...     loss, dhidden, gradient = hierarchical_value_and_row_grad(
      ...         hidden, kernel, labels, tree
      ...     )
      ...     kernel, state = optimizer.update(kernel, gradient, state)
      ...     return kernel, state, loss
      >>> kernel = jnp.zeros((tree.num_rows, 8))
      >>> state = optimizer.init(kernel)
      >>> hidden, labels = jnp.ones((2, 8)), jnp.array([3, 700])
      >>> for _ in range(3):
      ...     kernel, state, loss = step(kernel, state, hidden, labels)
      ...     print(f"{loss:.2f}")
      6.58
      3.36
      2.35

    References:
      Morin and Bengio, Hierarchical Probabilistic Neural Network Language Model, 2005.
    """
    checks.one_of("reduction", reduction, ("mean", "sum"))
    layer = prepare(
        "hierarchical_value_and_row_grad",
        hidden,
        node_kernel,
        tree,
        node_bias=node_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    layer, flat, weight = mask_tokens(layer, labels, weights)
    reduce = functools.partial(reduce_losses, weights=weight, reduction=reduction)
    shares = jax.grad(reduce)(jnp.zeros(flat.shape, layer.dtype))
    losses, dhidden, gradient = _row_gradients(layer, flat, shares)
    known = (flat >= 0) & (flat < tree.num_classes)
    loss = reduce(nan_where(~known, losses))
    dhidden = dhidden.astype(jnp.result_type(hidden)).reshape(jnp.shape(hidden))
    return loss, dhidden, gradient


@functools.partial(jax.jit, inline=True)
def _row_gradients(
    layer: Layer, labels: jax.Array, shares: jax.Array
) -> tuple[jax.Array, jax.Array, RowGradient]:
    """Returns the loss of each token, and gradients of its sum by shares."""
    tree, count = layer.tree, layer.tree.num_rows

    def level(sums, path: ClassPath):
        losses, dhidden = sums
        rows = rows_of_nodes(tree, path.first_rows, path.num_rows, missing=count)
        kernel, bias = parameters_of(layer, jnp.where(rows < count, rows, 0))
        logits = logits_with(layer, path.num_rows, kernel, bias)
        log_probs, pull = jax.vjp(functools.partial(log_choice, layer, path), logits)
        (slopes,) = pull(-shares)
        slopes = jnp.where(rows < count, slopes, 0)
        dhidden += jnp.sum(slopes[..., None] * kernel.astype(layer.dtype), axis=1)
        return (losses - log_probs, dhidden), (rows.T, slopes.T)

    sums = (jnp.zeros(labels.shape, layer.dtype),)
    sums += (jnp.zeros(layer.hidden.shape, layer.dtype),)
    groups = tree.max_depth * (tree.arity - 1)
    rows = jnp.zeros((groups, len(labels)), jnp.int32)
    slopes = jnp.zeros(rows.shape, layer.dtype)
    if groups:
        sums, (rows, slopes) = lax.scan(level, sums, tree.paths(labels, axis=0))
        rows, slopes = rows.reshape(groups, -1), slopes.reshape(groups, -1)
    values = layer.hidden
    if layer.bias is not None:
        values = (layer.hidden, jnp.ones(labels.shape, layer.bias.dtype))
    return *sums, RowGradient(rows, values, slopes)
