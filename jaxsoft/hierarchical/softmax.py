"""Log-probabilities of classes at the leaves of a tree."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes
from jaxsoft._core.by_platform import by_platform
from jaxsoft._core.numerics import matmul, nan_where, over_temperature
from jaxsoft._core.registry import Implementation
from jaxsoft._core.tokens import weigh_tokens
from jaxsoft.hierarchical import binary
from jaxsoft.hierarchical.class_tree import ClassPath, ClassTree
from jaxsoft.hierarchical.layer import (
    Layer,
    centre,
    log_shares,
    logits_with,
    mask_tokens,
    parameters_of,
    prepare,
    rows_of_nodes,
    with_reference,
)
from jaxsoft.hierarchical.levels import Canonical, Tables

__all__ = [
    "all_log_probs",
    "along_paths",
    "hierarchical_log_prob",
    "hierarchical_log_probs",
    "log_choice",
]

# Numbers of the kernel, for all tokens and levels, that are gathered at once.
_PATHS = 2**20
# XLA for GPUs makes one kernel of levels that nothing lies between, as in a perfect
# tree, which repeats each for every one below: it compiled 18 of them for minutes.
_FUSED_LEVELS = 4


@mesh_axes.accepts_explicit("hidden")
def hierarchical_log_prob(
    hidden: ArrayLike,
    node_kernel: ArrayLike,
    labels: ArrayLike,
    tree: ClassTree,
    *,
    node_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Log-probability of a class, from the inner nodes on its path alone.

    `Σ over the path of log softmax(z / τ)[child]`, where a node with c children has
    the logits `z = [0, rows @ hidden + bias]`. O(H·log V) a token.

    Args:
      hidden: [..., H] floating.
      node_kernel: [tree.num_rows, H] floating.
      labels: [...] integers in [0, V).
      tree: the classes.
      node_bias: [tree.num_rows] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every node's softmax. It is not
        the temperature of the distribution over the classes: that of a tree has no
        such form but at 1.
      weights: [...] booleans or reals, one weight a token, which its log-probability
        is multiplied by; a token of weight 0 has log-probability 0, and gradients of
        0, whatever its label and hidden state, NaN included. None weights all by 1.
      ignore_label: a label whose tokens have weight 0, such as -100; or None.
      precision: the precision of the products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      [...] float32 (float64 if an input is), never above 0; NaN for a label outside
      [0, V).

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Probabilities add up to 1 over the classes of every tree. Differentiable in
      `hidden`, `node_kernel`, `node_bias` and `temperature`, in both modes; the
      gradient of the kernel is dense. At τ = 0 gradients are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import ClassTree, hierarchical_log_prob
      >>> tree = ClassTree.balanced(4)
      >>> kernel, labels = jnp.zeros((tree.num_rows, 3)), jnp.array([0, 3])
      >>> print(hierarchical_log_prob(jnp.ones((2, 3)), kernel, labels, tree))
      [-1.3862944 -1.3862944]

    References:
      Morin and Bengio, Hierarchical Probabilistic Neural Network Language Model, 2005;
      Mnih and Hinton, A Scalable Hierarchical Distributed Language Model, 2008.
    """
    layer = prepare(
        "hierarchical_log_prob",
        hidden,
        node_kernel,
        tree,
        node_bias=node_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    layer, flat, weight = mask_tokens(layer, labels, weights, ignore_label)
    known = (flat >= 0) & (flat < tree.num_classes)
    log_prob = nan_where(~known, along_paths(layer, flat))
    return weigh_tokens(weight, log_prob).reshape(layer.shape)


@functools.partial(jax.jit, inline=True)
def along_paths(layer: Layer, labels: jax.Array) -> jax.Array:
    """Returns the sum of log-probabilities along each path, [N]."""
    total = jnp.zeros(labels.shape, layer.dtype)
    if not layer.tree.max_depth:
        return total
    # So that the levels' gradients are added up in this dtype.
    layer = dataclasses.replace(layer, hidden=layer.hidden.astype(layer.dtype))

    def chosen(path):
        rows = rows_of_nodes(layer.tree, path.first_rows, path.num_rows)
        logits = logits_with(layer, path.num_rows, *parameters_of(layer, rows))
        return log_choice(layer, path, logits)

    if _whole_paths(layer):
        return jnp.sum(chosen(layer.tree.paths(labels)), axis=-1)

    # Rows of the kernel are gathered level by level, and again for derivatives.
    @jax.checkpoint
    def level(total, path):
        return total + chosen(path), None

    # What derivatives need of a level is the sum alone: levels are independent.
    return lax.scan(level, total, layer.tree.paths(labels, axis=0))[0]


def _whole_paths(layer: Layer) -> bool:
    """Whether the rows on all paths are few enough to be gathered at once."""
    tree = layer.tree
    return layer.hidden.size * tree.max_depth * (tree.arity - 1) <= _PATHS


def log_choice(layer: Layer, path: ClassPath, logits: jax.Array) -> jax.Array:
    """Returns the log-probabilities of the choices at nodes.

    Args:
      layer: N rows.
      path: [N, ...], each row's nodes.
      logits: [N, ..., arity - 1], of the nodes.

    Returns:
      [N, ...].
    """
    tau = layer.constant_tau
    if layer.row_tau is not None:
        tau = layer.row_tau.reshape(-1, *(1,) * (path.choices.ndim - 1))
    log_prob = _log_choice(logits, path.choices, tau)
    return jnp.where(path.num_rows > 0, log_prob, 0)


def _log_choice(
    logits: jax.Array, choices: jax.Array, tau: float | jax.Array
) -> jax.Array:
    """Returns log softmax([0, logits] / τ)[choice], [...] from [..., arity - 1].

    As -log(1 + Σ of the others' odds), whose derivative does not cancel where the
    chosen child has nearly all.
    """
    if logits.shape[-1] == 1:
        odds = logits[..., 0]
        odds = jnp.where(choices == 1, -odds, odds)
        # Below a class, or where a bias leaves no other child: the choice is certain.
        alone = odds == -jnp.inf
        odds = over_temperature(jnp.where(alone, 0, odds), tau)
    else:
        children = with_reference(logits)
        child = jnp.arange(children.shape[-1], dtype=jnp.int32)
        is_chosen = child[(None,) * choices.ndim] == choices[..., None]
        chosen = jnp.sum(jnp.where(is_chosen, children, 0), axis=-1, keepdims=True)
        others = jnp.where(is_chosen, -jnp.inf, children)
        peak = jnp.max(others, axis=-1, keepdims=True)
        alone = peak == -jnp.inf
        peak = jnp.where(alone, chosen, peak)
        if isinstance(tau, jax.Array):
            tau = tau[..., None]
        peak = lax.stop_gradient(peak)
        rest = jnp.exp(centre(others, peak, tau))
        odds = over_temperature(peak - chosen, tau)[..., 0]
        # 0 only where the choice is certain.
        total = jnp.sum(rest, axis=-1)
        odds += jnp.log(jnp.where(total == 0, 1, total))
        alone = alone[..., 0]
    return jnp.where(alone, 0, -binary.softplus(odds))


@mesh_axes.accepts_explicit("hidden")
def hierarchical_log_probs(
    hidden: ArrayLike,
    node_kernel: ArrayLike,
    tree: ClassTree,
    *,
    node_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Log-probabilities of all classes of a tree.

    Args:
      hidden: [..., H] floating.
      node_kernel: [tree.num_rows, H] floating.
      tree: the classes.
      node_bias: [tree.num_rows] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every node's softmax; see
        `hierarchical_log_prob`.
      precision: the precision of the matrix product, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      [..., V] float32 (float64 if an input is): these are stored.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      O(V·H) a token. Differentiable in `hidden`, `node_kernel`, `node_bias` and
      `temperature`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import ClassTree, hierarchical_log_probs
      >>> tree = ClassTree.balanced(3)
      >>> log_probs = hierarchical_log_probs(jnp.ones(2), jnp.zeros((2, 2)), tree)
      >>> print(jnp.exp(log_probs))
      [0.5  0.25 0.25]

    References:
      Morin and Bengio, Hierarchical Probabilistic Neural Network Language Model, 2005.
    """
    layer = prepare(
        "hierarchical_log_probs",
        hidden,
        node_kernel,
        tree,
        node_bias=node_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    return all_log_probs(layer).reshape(*layer.shape, tree.num_classes)


@functools.partial(jax.jit, inline=True)
def all_log_probs(layer: Layer) -> jax.Array:
    """Returns the log-probabilities of all classes, [N, V]."""
    if not layer.tree.max_depth:
        return jnp.zeros((layer.hidden.shape[0], 1), layer.dtype)
    levels = layer.tree.levels
    if isinstance(levels, Canonical) and levels.arity == 2:
        return _of_pairs(levels, layer)
    return _of_nodes(layer)


def _of_pairs(levels: Canonical, layer: Layer) -> jax.Array:
    """Returns the log-probabilities of all classes, [N, V], of a tree of arity 2."""
    logits = matmul(layer.hidden, layer.kernel.T, layer.precision, layer.dtype)
    if layer.bias is not None:
        logits += layer.bias[None]

    # The functions live as long as the program: none holds the layer's arrays.
    constant_tau = layer.constant_tau

    def beside(logits, row_tau):
        tau = constant_tau if row_tau is None else row_tau[:, None]
        return binary.by_rank(levels, logits, tau)

    def below(logits, row_tau):
        # A TPU pads pairs of children, which lie beside each other in a row.
        tau = constant_tau if row_tau is None else row_tau[None]
        return _by_level(levels, logits.T, tau).T

    by_rank = by_platform(logits, layer.row_tau, tpu=below, default=beside)
    ranks = layer.tree.ranks
    # Rows are gathered: the derivative adds up rows much faster than columns.
    return by_rank if ranks is None else by_rank.T[jnp.asarray(ranks)].T


def _of_nodes(layer: Layer) -> jax.Array:
    """Returns the log-probabilities of all classes, [N, V], of a tree of any arity."""
    levels = layer.tree.levels
    logits = matmul(layer.kernel, layer.hidden.T, layer.precision, layer.dtype)
    if layer.bias is not None:
        logits += layer.bias[:, None]
    tau = layer.constant_tau if layer.row_tau is None else layer.row_tau[None]
    if isinstance(levels, Canonical):
        by_rank = _by_level(levels, logits, tau)
    else:
        by_rank = _by_table(levels, logits, tau)
    ranks = layer.tree.ranks
    return (by_rank if ranks is None else by_rank[jnp.asarray(ranks)]).T


def _by_level(
    levels: Canonical, logits: jax.Array, tau: float | jax.Array
) -> jax.Array:
    """Returns log-probabilities by rank, [V, N], where children lie side by side."""
    arity, rows = levels.arity, logits.shape[1]
    above = jnp.zeros((1, rows), logits.dtype)
    if isinstance(tau, jax.Array):
        tau = tau[None]
    leaves = []
    for depth in range(1, levels.depth + 1):
        nodes = levels.nodes[depth - 1]
        slots = levels.leaves[depth] + levels.nodes[depth]
        first = int(levels.first_slots[depth] - levels.first_nodes[depth - 1])
        own = logits[first : first + slots - nodes]
        missing = ((0, nodes * arity - slots), (0, 0))
        own = jnp.pad(own, missing, constant_values=-jnp.inf)
        shares = _shares(own.reshape(nodes, arity - 1, rows), tau)
        log_probs = shares + above[:, None]
        log_probs = log_probs.reshape(nodes * arity, rows)[:slots]
        leaves.append(log_probs[: levels.leaves[depth]])
        above = log_probs[levels.leaves[depth] :]
        if depth % _FUSED_LEVELS == 0:
            above = lax.optimization_barrier(above)
    return jnp.concatenate(leaves)


def _shares(logits: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns `log_shares` [M, arity, N] from the logits of all children but the first.

    What the derivative needs of them is computed again: stored, it is several times the
    logits. To divide again by a temperature of each row would take longer.
    """

    def shares(logits):
        return log_shares(with_reference(logits, axis=1), tau, axis=1)

    return (jax.checkpoint(shares) if isinstance(tau, float) else shares)(logits)


def _by_table(levels: Tables, logits: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns log-probabilities by rank, [V, N], of a tree of any form."""
    above = jnp.zeros((1, logits.shape[1]), logits.dtype)
    every = []
    for depth in range(1, levels.depth + 1):
        begin, end = levels.first_slots[depth : depth + 2].tolist()
        first_node = int(levels.first_nodes[depth - 1])
        nodes = jnp.asarray(levels.slot_nodes[begin:end])
        slots = jnp.arange(begin, end, dtype=jnp.int32)
        is_first = slots == levels.first_slot(nodes)
        own = logits[jnp.where(is_first, 0, slots - nodes - 1)]
        own = jnp.where(is_first[:, None], 0, own)
        which = nodes - first_node
        number = levels.nodes[depth - 1]
        peak = jax.ops.segment_max(
            lax.stop_gradient(own), which, number, indices_are_sorted=True
        )
        centred = centre(own, peak[which], tau)
        total = jax.ops.segment_sum(
            jnp.exp(centred), which, number, indices_are_sorted=True
        )
        log_probs = centred - jnp.log(total)[which] + above[which]
        every.append(log_probs)
        inner = slice(
            int(levels.first_nodes[depth]), int(levels.first_nodes[depth + 1])
        )
        above = log_probs[jnp.asarray(levels.node_slots[inner]) - begin]
    return jnp.concatenate(every)[jnp.asarray(levels.rank_slots)]
