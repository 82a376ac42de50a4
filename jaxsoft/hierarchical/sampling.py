"""Exact samples of a tree's classes, in O(H·log V)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, noise
from jaxsoft._core.numerics import is_zero
from jaxsoft._core.registry import Implementation
from jaxsoft.hierarchical.class_tree import ClassTree
from jaxsoft.hierarchical.layer import (
    Layer,
    centre,
    logits_of_nodes,
    prepare,
    with_reference,
)

__all__ = ["hierarchical_sample"]


@mesh_axes.accepts_explicit("hidden")
def hierarchical_sample(
    key: jax.Array,
    hidden: ArrayLike,
    node_kernel: ArrayLike,
    tree: ClassTree,
    *,
    node_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Draws classes from the probabilities of `hierarchical_log_probs`.

    From the root down, a child of each node is drawn with its probability, until it is
    a class.

    Args:
      key: a JAX random key.
      hidden: [..., H] floating.
      node_kernel: [tree.num_rows, H] floating.
      tree: the classes.
      node_bias: [tree.num_rows] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every node's softmax; see
        `hierarchical_log_prob`. At 0 the likeliest child is taken, the first of
        several: greedily, which need not end at the likeliest class.
      precision: the precision of the products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      [...] int32 in [0, V); -1 where a NaN was met.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Exact: Gumbel-max among the children of a node. The bits of a token depend on the
      key, the token's place and the level alone. Without a derivative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import ClassTree, hierarchical_sample
      >>> tree, kernel = ClassTree.balanced(4), jnp.array([[60.0], [0.0], [-60.0]])
      >>> print(hierarchical_sample(jax.random.key(0), jnp.ones((3, 1)), kernel, tree))
      [2 2 2]

    References:
      Morin and Bengio, Hierarchical Probabilistic Neural Network Language Model, 2005.
    """
    layer = prepare(
        "hierarchical_sample",
        hidden,
        node_kernel,
        tree,
        node_bias=node_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    return _sample(key, lax.stop_gradient(layer)).reshape(layer.shape)


# The node or the rank that each row has come to, whether that is a rank, and whether a
# NaN was met.
_Descent = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.jit, inline=True)
def _sample(key: jax.Array, layer: Layer) -> jax.Array:
    tree, rows = layer.tree, layer.hidden.shape[0]
    levels, arity = tree.levels, tree.arity
    ids = jnp.zeros(rows, jnp.int32)
    if not tree.max_depth or not rows:
        return ids
    words = noise.row_words(key, rows)
    tau = layer.tau
    children = jnp.arange(arity, dtype=jnp.int32)

    def descend(level: jax.Array, state: _Descent) -> _Descent:
        place, is_leaf, failed = state
        node = jnp.where(is_leaf, 0, place)
        first = levels.first_slot(node)
        number = levels.num_children(node) - 1
        logits = with_reference(logits_of_nodes(layer, first - node, number))
        peak = jnp.max(logits, axis=1, keepdims=True)
        scores = centre(logits, peak, tau)
        bits = noise.gumbel(words, noise.NODES, level * arity + children, layer.dtype)
        scores += jnp.where(is_zero(tau, layer.dtype), 0, bits)
        chosen = jnp.argmax(scores, axis=1).astype(jnp.int32)
        below_is_leaf, below = levels.below(first + chosen)
        failed |= ~is_leaf & jnp.any(jnp.isnan(scores), axis=1)
        place = jnp.where(is_leaf, place, below)
        return place, is_leaf | below_is_leaf, failed

    no = jnp.zeros(rows, bool)
    rank, _, failed = lax.fori_loop(0, tree.max_depth, descend, (ids, no, no))
    if tree.order is not None:
        rank = jnp.asarray(tree.order)[rank]
    return jnp.where(failed, -1, rank)
