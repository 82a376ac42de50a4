"""The checked arguments of the functions of a tree, and its nodes' logits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, registry
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    is_zero,
    operand_dtype,
)
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import keep_tokens, token_weights
from jaxsoft.hierarchical.class_tree import ClassTree
from jaxsoft.hierarchical.same_rows import take_rows

__all__ = [
    "Layer",
    "centre",
    "log_shares",
    "logits_of_nodes",
    "logits_with",
    "mask_tokens",
    "parameters_of",
    "prepare",
    "products_of_rows",
    "rows_of_nodes",
    "with_reference",
]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "kernel", "bias", "row_tau", "tree"],
    meta_fields=["constant_tau", "precision", "shape"],
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """A softmax layer over a tree, with leading axes folded into one of N rows.

    Attributes:
      hidden: [N, H].
      kernel: [V - 1, H], of the same dtype.
      bias: [V - 1] of the compute dtype, or None.
      row_tau: the temperatures, [N], or None.
      tree: the classes.
      constant_tau: the temperature of all rows where there are none.
      precision: of the matrix products.
      shape: the leading axes.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    row_tau: jax.Array | None
    tree: ClassTree
    constant_tau: float
    precision: jax.lax.PrecisionLike
    shape: tuple[int, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """In which logits and log-probabilities are computed."""
        return compute_dtype(self.hidden)

    @property
    def tau(self) -> float | jax.Array:
        """The temperature: a float, or [N, 1]."""
        return self.constant_tau if self.row_tau is None else self.row_tau[:, None]


def mask_tokens(
    layer: Layer,
    labels: ArrayLike,
    weights: ArrayLike | None,
    ignore_label: int | None = None,
) -> tuple[Layer, jax.Array, jax.Array | None]:
    """Leaves out tokens without weight, whatever their label and hidden state.

    Args:
      layer: the layer.
      labels: [...] integers.
      weights: [...] booleans or reals, or None.
      ignore_label: the label whose tokens have weight 0, or None.

    Returns:
      The layer with hidden states of 0 and temperatures of 1 there, labels [N] with -1
      there, and weights [N], None if all are 1.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape is not that of the leading axes.
    """
    labels = checks.integer("labels", labels)
    checks.shape("labels", labels, layer.shape, "hidden.shape[:-1]")
    weight = token_weights(layer.shape, weights, labels, ignore_label)
    labels = labels.reshape(-1)
    weight = None if weight is None else weight.reshape(-1)
    row_tau = layer.row_tau
    layer = dataclasses.replace(
        layer,
        hidden=keep_tokens(weight, layer.hidden),
        row_tau=None if row_tau is None else keep_tokens(weight, row_tau, 1),
    )
    return layer, keep_tokens(weight, labels, -1), weight


def prepare(
    name: str,
    hidden: ArrayLike,
    node_kernel: ArrayLike,
    tree: ClassTree,
    *,
    node_bias: ArrayLike | None,
    temperature: ArrayLike,
    precision: jax.lax.PrecisionLike,
    implementation: Implementation | None,
) -> Layer:
    """Checks arguments that all functions of a tree have, and folds their rows."""
    registry.resolve(name, implementation)
    hidden = checks.floating("hidden", hidden)
    kernel = checks.floating("node_kernel", node_kernel)
    if not isinstance(tree, ClassTree):
        raise TypeError(f"`tree` must be a ClassTree, got {type(tree).__name__}.")
    if not hidden.ndim:
        raise ValueError("`hidden` must have shape [..., H], got a scalar.")
    rows, features = tree.num_rows, hidden.shape[-1]
    checks.shape("node_kernel", kernel, (rows, features), "(tree.num_rows, H)")
    bias = None
    if node_bias is not None:
        bias = checks.floating("node_bias", node_bias)
        checks.shape("node_bias", bias, (rows,), "(tree.num_rows,)")
    operand = operand_dtype(hidden, kernel)
    dtype = compute_dtype(hidden, kernel)
    shape = hidden.shape[:-1]
    tau = checks.row_temperature(temperature, dtype, shape)
    constant, row_tau = 1.0, None
    if isinstance(tau, (int, float)):
        constant = float(tau)
    else:
        row_tau = jnp.broadcast_to(tau, shape).reshape(-1)
    return Layer(
        hidden.astype(operand).reshape(math.prod(shape), features),
        kernel.astype(operand),
        None if bias is None else bias.astype(dtype),
        row_tau,
        tree,
        constant,
        precision,
        shape,
    )


def rows_of_nodes(
    tree: ClassTree, first_rows: jax.Array, num_rows: jax.Array, missing: int = 0
) -> jax.Array:
    """Returns the rows of some nodes' children but the first, [..., arity - 1]."""
    child = jnp.arange(tree.arity - 1, dtype=jnp.int32)[(None,) * first_rows.ndim]
    return jnp.where(
        child < num_rows[..., None], first_rows[..., None] + child, missing
    )


def parameters_of(layer: Layer, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns the kernel and the bias at some rows, which must exist."""
    kernel = take_rows(layer.kernel, rows)
    return kernel, None if layer.bias is None else take_rows(layer.bias, rows)


def logits_with(
    layer: Layer, num_rows: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Returns `logits_of_nodes` from the nodes' own parameters.

    Hidden states may be wider than the kernel: the products are the same, and so is
    their gradient but for its dtype.
    """
    logits = products_of_rows(layer.hidden, kernel, layer.dtype, layer.precision)
    if bias is not None:
        logits += bias
    child = jnp.arange(layer.tree.arity - 1, dtype=jnp.int32)[(None,) * num_rows.ndim]
    return jnp.where(child < num_rows[..., None], logits, -jnp.inf)


def products_of_rows(
    hidden: jax.Array,
    kernel: jax.Array,
    dtype: jnp.dtype,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """Returns the products of rows [N, H] with their own vectors [N, ..., H]."""
    return jax.lax.platform_dependent(
        hidden,
        kernel,
        cpu=functools.partial(_products_by_sums, dtype=dtype),
        default=functools.partial(_products, dtype=dtype, precision=precision),
    )


def _products_by_sums(
    hidden: jax.Array, kernel: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """Returns `products_of_rows`.

    XLA adds up in order on CPU, one number after another, but for a matrix product.
    """
    if kernel.ndim > 3:
        rows, *nodes, features = kernel.shape
        vectors = kernel.reshape(rows, math.prod(nodes), features).astype(dtype)
        z = jnp.einsum("nh,ndh->nd", hidden.astype(dtype), vectors, precision="highest")
        return z.reshape(rows, *nodes)
    products = _beside(hidden, kernel).astype(dtype) * kernel.astype(dtype)
    ones = jnp.ones(hidden.shape[-1], dtype)
    return jnp.matmul(products, ones, precision="highest")


@functools.partial(jax.custom_jvp, nondiff_argnames=("dtype", "precision"))
def _products(
    hidden: jax.Array,
    kernel: jax.Array,
    dtype: jnp.dtype,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """Returns `products_of_rows`, by matrix products."""
    return jnp.einsum(
        "nh,n...h->n...",
        hidden.astype(kernel.dtype),
        kernel,
        precision=precision,
        preferred_element_type=dtype,
    )


@_products.defjvp
def _products_jvp(
    dtype: jnp.dtype,
    precision: jax.lax.PrecisionLike,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    # Numbers times rows: no matrix product, whose gradient would be rounded.
    (hidden, kernel), (of_hidden, of_kernel) = primals, tangents
    moved = [
        jnp.sum(_beside(h, k).astype(dtype) * k.astype(dtype), axis=-1)
        for h, k in ((of_hidden, kernel), (hidden, of_kernel))
    ]
    return _products(hidden, kernel, dtype, precision), moved[0] + moved[1]


def _beside(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns hidden states [N, H] in the rank of [N, ..., H]."""
    rows, features = hidden.shape
    return hidden.reshape(rows, *(1,) * (kernel.ndim - 2), features)


def logits_of_nodes(
    layer: Layer, first_rows: jax.Array, num_rows: jax.Array
) -> jax.Array:
    """Returns the logits of some nodes' children but the first, each row its own nodes.

    Args:
      layer: N rows.
      first_rows: [N, ...], the first row of each node's parameters.
      num_rows: [N, ...], how many it has.

    Returns:
      [N, ..., arity - 1], -inf beyond the node's children.
    """
    rows = rows_of_nodes(layer.tree, first_rows, num_rows)
    return logits_with(layer, num_rows, *parameters_of(layer, rows))


def with_reference(logits: jax.Array, axis: int = -1) -> jax.Array:
    """Puts the first child's logit, 0, before the others'."""
    zero = jnp.zeros_like(jax.lax.slice_in_dim(logits, 0, 1, axis=axis))
    return jnp.concatenate([zero, logits], axis=axis)


def centre(logits: jax.Array, peak: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns (logits - peak) / τ, without a derivative at τ = 0."""
    centred = divide_by_temperature(logits, peak, tau)
    if isinstance(tau, float) and tau == 1.0:
        return centred
    cold = is_zero(tau, logits.dtype)
    return jnp.where(cold, jax.lax.stop_gradient(centred), centred)


def log_shares(logits: jax.Array, tau: float | jax.Array, axis: int = -1) -> jax.Array:
    """Returns the log-probabilities of nodes' children, -inf for those that are not."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True))
    centred = centre(logits, peak, tau)
    total = jnp.sum(jnp.exp(centred), axis=axis, keepdims=True)
    return centred - jnp.log(total)
