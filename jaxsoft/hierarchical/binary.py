"""Nodes with two children: log(1 + exp(x)), and all classes of a tree of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoft._core.numerics import over_temperature
from jaxsoft.hierarchical.levels import Canonical

__all__ = ["by_rank", "softplus"]

# XLA makes one loop of levels that nothing lies between, which repeats each for every
# one below: for GPUs it compiled 18 of them for minutes.
_FUSED_LEVELS = 2
# Levels near the root whose derivatives are taken at once.
_TOP_LEVELS = 6


def by_rank(levels: Canonical, logits: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns the log-probabilities of all leaves, from left to right.

    From the root down, a node's children get its own log-probability plus
    log σ(±z / τ): one exponential a node, and sums.

    Args:
      levels: a tree of V leaves, V at least 2, of arity 2.
      logits: [N, V - 1], z of each node: that of its second child.
      tau: the temperature, a float or [N, 1].

    Returns:
      [N, V].
    """
    z = _odds(logits, tau)
    least = jnp.exp(_minus_abs(z))
    lost = lax.stop_gradient(_log1p(least))
    small = least / (1 + least)
    return _leaves(levels, z, lost, small)


def _odds(logits: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Returns logits over τ; those of -inf have no derivative by τ."""
    if isinstance(tau, float) and tau == 1.0:
        return logits
    alone = logits == -jnp.inf
    odds = over_temperature(jnp.where(alone, 0, logits), tau)
    return jnp.where(alone, -jnp.inf, odds)


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    """Returns log(1 + exp(x)), whose derivative does not cancel where it is near 0."""
    return jnp.maximum(x, 0) + _log1p(jnp.exp(_minus_abs(x)))


@softplus.defjvp
def _softplus_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (moved,) = primals, tangents
    least = jnp.exp(_minus_abs(x))
    share = jnp.where(x >= 0, 1, least) / (1 + least)
    return softplus(x), share * moved


def _minus_abs(z: jax.Array) -> jax.Array:
    """Returns -|z|, whose derivative at 0 is that from above.

    A function of it that is smooth and right on both sides is then right at 0 too.
    """
    return jnp.where(z >= 0, -z, z)


def _log1p(x: jax.Array) -> jax.Array:
    """Returns log(1 + x) of x in [0, 1], from sums, products and quotients.

    The series in x / (2 + x), which is at most 1/3, of Abramowitz and Stegun, Handbook
    of Mathematical Functions, 1964, 4.1.27. XLA for CPUs takes several times as long
    for a logarithm beside an exponential.
    """
    # So many terms that those left out would not be seen.
    seen = float(jnp.finfo(x.dtype).eps) / 4
    terms = next(n for n in range(1, 99) if 9.0**-n / (2 * n + 1) < seen)
    square = jnp.square(x / (2 + x))
    total = jnp.full_like(x, 1 / (2 * terms - 1))
    for n in reversed(range(terms - 1)):
        total = total * square + 1 / (2 * n + 1)
    # The quotient comes last: XLA for CPUs would repeat a product for every reader.
    return 2 * x * total / (2 + x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _leaves(
    levels: Canonical, z: jax.Array, lost: jax.Array, small: jax.Array
) -> jax.Array:
    """Returns the log-probabilities of all leaves, [N, V].

    Args:
      levels: the tree.
      z: [N, V - 1].
      lost: log(1 + exp(-|z|)), whose derivative is a part of that by z.
      small: the smaller child's share, which the derivative by z takes.
    """
    above, found = jnp.zeros_like(z[:, :1]), []
    parts = [lax.split(each, levels.nodes[:-1], 1) for each in (z, lost)]
    for depth, (own, least) in enumerate(zip(*parts, strict=True), 1):
        larger = above - least
        first = larger + jnp.minimum(-own, 0)
        second = larger + jnp.minimum(own, 0)
        # XLA for CPUs vectorises this choice, but no concatenation.
        is_first = lax.broadcasted_iota(jnp.int32, (1, 1, 2), 2) == 0
        pairs = jnp.where(is_first, first[..., None], second[..., None])
        slots, leaves = _side_by_side(pairs), levels.leaves[depth]
        found.append(slots[:, :leaves])
        above = slots[:, leaves:]
        if _is_kept(levels, depth):
            # XLA for CPUs removes the barrier, but repeats no quotient; it is by 1.
            above = lax.optimization_barrier(above / jnp.maximum(above, 1))
    return _concatenated(found)


@_leaves.defjvp
def _leaves_jvp(
    levels: Canonical, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    z, _, small = primals
    # Both shares by themselves: neither is 1 less the other.
    large, is_second = 1 - small, z >= 0
    first = jnp.where(is_second, small, large)
    second = jnp.where(is_second, large, small)
    # Of the levels near the root all at once: two small products take less to compile.
    top = _complete_levels(levels)
    sizes = (2**top - 1, *levels.nodes[top:-1])
    # The transpose of a split is one concatenation.
    parts = [lax.split(each, sizes, 1) for each in (tangents[0], first, second)]
    own, *shares = (each[0] for each in parts)
    below = [jnp.asarray(each, z.dtype) for each in _below(2**top - 1)]
    above = jnp.matmul(shares[0] * own, below[1], precision="highest")
    above -= jnp.matmul(shares[1] * own, below[0], precision="highest")
    found, above = [above[:, : levels.leaves[top]]], above[:, levels.leaves[top] :]
    rest = zip(*(each[1:] for each in parts), strict=True)
    for depth, (own, *shares) in enumerate(rest, top + 1):
        # That of a stack is two slices, and sums of those: no reduction.
        pairs = [above - shares[1] * own, above + shares[0] * own]
        slots, leaves = _side_by_side(jnp.stack(pairs, axis=2)), levels.leaves[depth]
        found.append(slots[:, :leaves])
        above = slots[:, leaves:]
        if _is_kept(levels, depth):
            above = lax.optimization_barrier(above)
    return _leaves(levels, *primals), _concatenated(found)


def _complete_levels(levels: Canonical) -> int:
    """Returns how many levels have nodes alone above them, `_TOP_LEVELS` at most."""
    most = min(_TOP_LEVELS, levels.depth)
    return next(n for n in range(1, most + 1) if n == most or levels.leaves[n])


def _below(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what lies below nodes' first and second children, each [n, n + 1]."""
    # Nodes are numbered from the root, 1, as in a heap, and leaves after them.
    node = np.arange(1, nodes + 1)[:, None]
    leaf = np.arange(nodes + 1, 2 * nodes + 2)[None]
    levels = np.array([nodes.bit_length() - int(n).bit_length() for n in node[:, 0]])
    child = leaf >> levels[:, None]
    return child == 2 * node, child == 2 * node + 1


def _is_kept(levels: Canonical, depth: int) -> bool:
    """Tells whether a level is computed once for all levels below."""
    return depth < levels.depth and (levels.depth - depth) % _FUSED_LEVELS == 0


def _side_by_side(pairs: jax.Array) -> jax.Array:
    """Returns [N, n, 2] as [N, 2·n]."""
    rows, nodes, _ = pairs.shape
    return pairs.reshape(rows, 2 * nodes)


def _concatenated(parts: list[jax.Array]) -> jax.Array:
    """Returns columns side by side, a single part as it is."""
    parts = [part for part in parts if part.shape[1]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
