"""The best classes of a tree, by a search that knows when it is done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.registry import Implementation
from jaxsoft.hierarchical.class_tree import ClassTree
from jaxsoft.hierarchical.layer import (
    Layer,
    log_shares,
    logits_of_nodes,
    prepare,
    with_reference,
)
from jaxsoft.hierarchical.softmax import all_log_probs, along_paths

__all__ = ["hierarchical_top_k"]

# Nodes of a level that the first search keeps: this many a class asked for, and how
# many times more the next one does.
_WIDTH = 4
_LEAST_WIDTH = 32
_WIDEN = 16
# A visit gathers a row; computing every class streams them, so much faster a row.
_GATHER_COST = 32
# Numbers that one round over some rows may store at a time.
_BUDGET = 2**23


@mesh_axes.accepts_explicit("hidden")
def hierarchical_top_k(
    hidden: ArrayLike,
    node_kernel: ArrayLike,
    k: int,
    tree: ClassTree,
    *,
    node_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    max_visits: int | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k most probable classes of each token, best first.

    A beam goes down the tree level by level. No class below a node is more probable
    than the node itself, so the classes found are the best ones where the k-th lies
    above every node that was left out. Where it does not, the token is searched again
    with a wider beam, and at last by the log-probabilities of all classes.

    Args:
      hidden: [..., H] floating.
      node_kernel: [tree.num_rows, H] floating.
      k: how many classes, in [1, V].
      tree: the classes.
      node_bias: [tree.num_rows] floating.
      temperature: τ in [0, ∞], a scalar or [...], of every node's softmax; see
        `hierarchical_log_prob`. The order of the classes depends on it.
      max_visits: the most inner nodes that are looked at for a token, at least
        `tree.max_depth`: one beam, as wide as that allows. None: as many as it takes,
        which is O(log V) where a few classes have most of the probability, and O(V)
        where it is spread evenly.
      precision: the precision of the products, as in `jnp.matmul`.
      implementation: None or "xla".

    Returns:
      A triple: log-probabilities [..., k], descending, float32 (float64 if an input
      is); class ids [..., k] int32, equal log-probabilities ordered by id; and [...]
      booleans, whether these are known to be the best: always without `max_visits`.
      A beam that met fewer than k classes leaves the rest at -inf and -1.

    Raises:
      TypeError: if a type or dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Log-probabilities are differentiable as those of `hierarchical_log_prob`. Memory
      is bounded: tokens are searched some at a time.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import ClassTree, hierarchical_top_k
      >>> tree, kernel = ClassTree.balanced(4), jnp.array([[2.0], [0.0], [1.0]])
      >>> log_probs, ids, exact = hierarchical_top_k(jnp.ones((1, 1)), kernel, 2, tree)
      >>> print(ids, np.asarray(log_probs).round(2), exact)
      [[3 2]] [[-0.44 -1.44]] [ True]

    References:
      Morin and Bengio, Hierarchical Probabilistic Neural Network Language Model, 2005;
      Hart, Nilsson and Raphael, A Formal Basis for the Heuristic Determination of
      Minimum Cost Paths, 1968 (an optimistic bound certifies the answer).
    """
    layer = prepare(
        "hierarchical_top_k",
        hidden,
        node_kernel,
        tree,
        node_bias=node_bias,
        temperature=temperature,
        precision=precision,
        implementation=implementation,
    )
    k = checks.positive_integer("k", k)
    if k > tree.num_classes:
        raise ValueError(f"`k` must be at most V = {tree.num_classes}, got {k}.")
    if max_visits is not None:
        least = max(tree.max_depth, 1)
        if checks.positive_integer("max_visits", max_visits) < least:
            raise ValueError(
                f"`max_visits` must be at least tree.max_depth = {least}, got "
                f"{max_visits}."
            )
    top = _top_k(layer, k, max_visits)
    return (
        top.log_probs.reshape(*layer.shape, k),
        top.ids.reshape(*layer.shape, k),
        top.exact.reshape(layer.shape),
    )


class _TopK(NamedTuple):
    """The best classes known of each row: [N, k], [N, k] and [N]."""

    log_probs: jax.Array
    ids: jax.Array
    exact: jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _top_k(layer: Layer, k: int, max_visits: int | None) -> _TopK:
    return _search(layer, k, max_visits)


@_top_k.defjvp
def _top_k_jvp(
    k: int, max_visits: int | None, primals: tuple[Layer], tangents: tuple[Layer]
) -> tuple[_TopK, _TopK]:
    (layer,), (tangent,) = primals, tangents
    top = _top_k(layer, k, max_visits)
    log_probs = functools.partial(_log_probs_at, ids=top.ids)
    _, moved = jax.jvp(log_probs, (layer,), (tangent,))
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jax.dtypes.float0), (top.ids, top.exact)
    )
    return top, _TopK(moved, *zeros)


def _log_probs_at(layer: Layer, ids: jax.Array) -> jax.Array:
    """Returns the log-probabilities of classes [N, k] along their paths."""
    k = ids.shape[1]
    tau = layer.row_tau
    every = dataclasses.replace(
        layer,
        hidden=jnp.repeat(layer.hidden, k, axis=0),
        row_tau=None if tau is None else jnp.repeat(tau, k),
    )
    return along_paths(every, ids.reshape(-1)).reshape(ids.shape)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _search(layer: Layer, k: int, max_visits: int | None) -> _TopK:
    rows, features = layer.hidden.shape
    tree = layer.tree
    top = _TopK(
        jnp.full((rows, k), -jnp.inf, layer.dtype),
        jnp.full((rows, k), -1, jnp.int32),
        jnp.zeros(rows, bool),
    )
    if not rows:
        return top
    classes, inner = tree.num_classes, sum(tree.levels.nodes)
    if max_visits is not None and max_visits < inner:
        widths = [_width_for(tree, max_visits)]
    else:
        widths, width = [], max(_WIDTH * k, _LEAST_WIDTH)
        while _GATHER_COST * width * max(tree.max_depth, 1) * tree.arity <= classes:
            widths.append(width)
            width *= _WIDEN
    chunk = _BUDGET // classes
    if not widths and rows <= chunk:
        return _best_of_all(layer, k=k)
    for width in widths:
        numbers = width * (tree.arity - 1) * features
        search = functools.partial(_beam, k=k, width=width)
        top = _where_not_exact(search, _BUDGET // numbers, layer, top)
    if max_visits is None or max_visits >= inner:
        search = functools.partial(_best_of_all, k=k)
        top = _where_not_exact(search, chunk, layer, top)
    return top


def _width_for(tree: ClassTree, max_visits: int) -> int:
    """Returns the widest beam that looks at no more nodes than that."""

    def fits(width: int) -> bool:
        return sum(min(width, nodes) for nodes in tree.levels.nodes) <= max_visits

    low, high = 1, max(tree.levels.nodes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _where_not_exact(
    search: Callable[[Layer], _TopK], chunk: int, layer: Layer, top: _TopK
) -> _TopK:
    """Searches the rows whose classes are not known yet, some at a time."""
    rows = layer.hidden.shape[0]
    chunk = max(1, min(chunk, rows))
    order = jnp.argsort(top.exact).astype(jnp.int32)
    order = jnp.pad(order, (0, -rows % chunk), constant_values=rows)
    count = jnp.sum(~top.exact, dtype=jnp.int32)

    def search_chunk(index: jax.Array, top: _TopK) -> _TopK:
        # Without the barrier a chunk of all rows is the same in every turn, and XLA
        # searches them before the loop, though no row may be left.
        start, places = lax.optimization_barrier((index * chunk, order))
        which = lax.dynamic_slice_in_dim(places, start, chunk)
        missing = start + jnp.arange(chunk, dtype=jnp.int32) < count
        tau = layer.row_tau
        part = dataclasses.replace(
            layer,
            hidden=layer.hidden.at[which].get(mode="fill", fill_value=0),
            row_tau=(
                None if tau is None else tau.at[which].get(mode="fill", fill_value=1)
            ),
        )
        new = search(part)
        target = jnp.where(missing, which, rows)
        return jax.tree.map(
            lambda old, new: old.at[target].set(new, mode="drop"), top, new
        )

    return lax.fori_loop(0, -(-count // chunk), search_chunk, top)


def _best_of_all(layer: Layer, *, k: int) -> _TopK:
    # Without the barrier XLA carries what the slices below leave out through the loop
    # around them, and sorts all classes instead of selecting some. Each result has its
    # own: one of both ends the process in XLA for CPUs (JAX 0.10) under any mesh.
    best = tuple(map(lax.optimization_barrier, lax.top_k(all_log_probs(layer), k)))
    log_probs, ids = best
    return _TopK(log_probs, ids, jnp.ones(ids.shape[0], bool))


class _Beam(NamedTuple):
    """The nodes that are followed, and the classes found.

    Attributes:
      scores: [C, width] log-probabilities of nodes, -inf where there is none.
      nodes: [C, width].
      log_probs: [C, k] of the best classes so far.
      ranks: [C, k] of these, or -1.
      left: [C], the largest log-probability that was left out.
    """

    scores: jax.Array
    nodes: jax.Array
    log_probs: jax.Array
    ranks: jax.Array
    left: jax.Array


def _beam(layer: Layer, *, k: int, width: int) -> _TopK:
    """Follows the best `width` nodes of each level."""
    tree, rows = layer.tree, layer.hidden.shape[0]
    lowest = jnp.full(rows, -jnp.inf, layer.dtype)
    beam = _Beam(
        jnp.zeros((rows, 1), layer.dtype),
        jnp.zeros((rows, 1), jnp.int32),
        jnp.broadcast_to(lowest[:, None], (rows, k)),
        jnp.full((rows, k), -1, jnp.int32),
        lowest,
    )
    # Level by level while the beam still grows, then all of one width.
    level = 0
    while level < tree.max_depth and beam.nodes.shape[1] < width:
        beam = _descend(layer, beam, min(width, tree.arity ** (level + 1)))
        level += 1
    beam = lax.fori_loop(
        level, tree.max_depth, lambda _, beam: _descend(layer, beam, width), beam
    )
    ids = beam.ranks
    if tree.order is not None:
        ids = jnp.where(ids < 0, -1, jnp.asarray(tree.order)[ids])
    descending, ids = lax.sort((-beam.log_probs, ids), num_keys=2)
    return _TopK(-descending, ids, beam.log_probs[:, -1] > beam.left)


def _descend(layer: Layer, beam: _Beam, width: int) -> _Beam:
    """Goes from nodes to their children: the best classes, the best nodes."""
    levels = layer.tree.levels
    rows, k = beam.ranks.shape
    first = levels.first_slot(beam.nodes)
    number = levels.num_children(beam.nodes) - 1
    logits = logits_of_nodes(layer, first - beam.nodes, number)
    tau = layer.constant_tau if layer.row_tau is None else layer.row_tau[:, None, None]
    shares = log_shares(with_reference(logits), tau)
    scores = (beam.scores[..., None] + shares).reshape(rows, -1)
    child = jnp.arange(levels.arity, dtype=jnp.int32)[None, None]
    live = (child <= number[..., None]) & (beam.scores[..., None] > -jnp.inf)
    slots = jnp.where(live, first[..., None] + child, 0).reshape(rows, -1)
    live = live.reshape(rows, -1)
    is_leaf, below = levels.below(slots)
    leaf_scores = jnp.where(live & is_leaf, scores, -jnp.inf)
    node_scores = jnp.where(live & ~is_leaf, scores, -jnp.inf)
    # One more of each than is kept: the largest that is left out.
    log_probs, ranks, left = _best(
        jnp.concatenate([beam.log_probs, leaf_scores], axis=1),
        jnp.concatenate([beam.ranks, jnp.where(is_leaf, below, -1)], axis=1),
        k,
    )
    scores, nodes, left_nodes = _best(node_scores, below, width)
    nodes = jnp.where(scores > -jnp.inf, nodes, 0)
    left = jnp.maximum(beam.left, jnp.maximum(left, left_nodes))
    return _Beam(scores, nodes, log_probs, ranks, left)


def _best(
    scores: jax.Array, which: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest scores, what they are of, and the largest of the rest."""
    available = scores.shape[1]
    best, places = lax.top_k(scores, min(count + 1, available))
    which = jnp.take_along_axis(which, places, axis=1)
    if available <= count:
        left = jnp.full(scores.shape[0], -jnp.inf, scores.dtype)
        missing = ((0, 0), (0, count - available))
        best = jnp.pad(best, missing, constant_values=-jnp.inf)
        return best, jnp.pad(which, missing, constant_values=-1), left
    return best[:, :count], which[:, :count], best[:, count]
