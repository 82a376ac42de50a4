"""Nodes with two children: log(1 + exp(x)), and all classes of a tree of them."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core.numerics import over_temperature
from jaxsoft.hierarchical.levels import Canonical

__all__ = ["by_rank", "softplus"]

# XLA makes one loop of levels that nothing lies between, which repeats each for every
# one below: for GPUs it compiled 18 of them for minutes.
_FUSED_LEVELS = 2


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
    above = jnp.zeros_like(z[:, :1])
    # The gradient of a split is one concatenation.
    parts = [lax.split(each, levels.nodes[:-1], 1) for each in (z, lost, small)]
    found = []
    for depth, nodes in enumerate(zip(*parts, strict=True), 1):
        slots, leaves = _children(above, *nodes), levels.leaves[depth]
        if leaves:
            found.append(slots[:, :leaves])
        above = slots[:, leaves:]
        if depth < levels.depth and (levels.depth - depth) % _FUSED_LEVELS == 0:
            above = _kept(above)
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


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


@jax.custom_jvp
def _children(
    above: jax.Array, z: jax.Array, lost: jax.Array, small: jax.Array
) -> jax.Array:
    """Returns the log-probabilities of nodes' children, side by side.

    Args:
      above: [N, n], the nodes' own.
      z: [N, n].
      lost: log(1 + exp(-|z|)), whose derivative is a part of that by z.
      small: the smaller child's share, which the derivative by z takes.

    Returns:
      [N, 2·n].
    """
    rows, nodes = z.shape
    larger = above - lost
    first = larger + jnp.minimum(-z, 0)
    second = larger + jnp.minimum(z, 0)
    # XLA for CPUs vectorises this choice, but no concatenation.
    is_first = lax.broadcasted_iota(jnp.int32, (1, 1, 2), 2) == 0
    pairs = jnp.where(is_first, first[..., None], second[..., None])
    return pairs.reshape(rows, 2 * nodes)


@_children.defjvp
def _children_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    _, z, _, small = primals
    of_above, of_z, _, _ = tangents
    rows, nodes = z.shape
    large, is_second = 1 - small, z >= 0
    first, second = (
        jnp.where(is_second, small, large),
        jnp.where(is_second, large, small),
    )
    # The transpose of a stack is two slices, and sums of those: no reduction.
    moved = jnp.stack([of_above - second * of_z, of_above + first * of_z], axis=2)
    return _children(*primals), moved.reshape(rows, 2 * nodes)


@jax.custom_jvp
def _kept(log_probs: jax.Array) -> jax.Array:
    """Returns log-probabilities, computed once for all levels below.

    XLA for CPUs removes the barrier, but repeats no quotient; this one is by 1.
    """
    return lax.optimization_barrier(log_probs / jnp.maximum(log_probs, 1))


@_kept.defjvp
def _kept_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _kept(*primals), lax.optimization_barrier(*tangents)
