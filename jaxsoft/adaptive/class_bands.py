"""Bands of classes by frequency: a shortlist, and tails of rarer classes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy import typing as npt

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.exporting import Leaf, exportable_dataclass

__all__ = ["ClassBands"]

# Cutoffs that are tried, spread evenly over the logarithm of the rank.
_CANDIDATES = 256


@exportable_dataclass("cutoffs")
@dataclasses.dataclass(frozen=True)
class ClassBands:
    """Classes by falling frequency, cut into a shortlist and tails.

    A pytree, whose tables are its leaves: pass it to a compiled function as an
    argument. Class v has rank r; it is in the shortlist where r < cutoffs[0], else in
    the tail i with cutoffs[i] <= r < cutoffs[i + 1].

    Attributes:
      cutoffs: the last one is V.
      order: [V] int32, the class of each rank; None: classes are in order.
      ranks: [V] int32, the rank of each class; None: classes are in order.

    Example:
      >>> from jaxsoft import ClassBands
      >>> bands = ClassBands.in_order(100, (10, 40))
      >>> print(bands.num_classes, bands.shortlist, bands.tails)
      100 10 (30, 60)
      >>> bands = ClassBands.from_counts([1, 5, 0, 9], cutoffs=(2,))
      >>> print(bands.order)
      [3 1 0 2]
    """

    cutoffs: tuple[int, ...]
    order: Leaf | None = None
    ranks: Leaf | None = None

    @classmethod
    def in_order(cls, num_classes: int, cutoffs: Sequence[int]) -> ClassBands:
        """Bands of classes that are numbered by falling frequency.

        Args:
          num_classes: V.
          cutoffs: the first rank of each tail, ascending, in [1, V); none for a
            shortlist alone.

        Returns:
          The bands, without a table.

        Raises:
          TypeError: if an argument is not an int.
          ValueError: if the cutoffs are not ascending in [1, V).
        """
        return cls(_cutoffs(cutoffs, num_classes))

    @classmethod
    def from_counts(
        cls,
        counts: npt.ArrayLike,
        *,
        cutoffs: Sequence[int] | None = None,
        num_tails: int = 2,
        tail_factor: float = 4.0,
    ) -> ClassBands:
        """Bands of classes in any order, by how often they come.

        Args:
          counts: [V] finite and not negative; no traced array.
          cutoffs: the first rank of each tail; None takes those that a token's logits
            cost least with: `S + T + Σ_i p_i·V_i / tail_factor^(i+1)` products of H
            numbers, for a shortlist of S and T tails of V_i classes, which a share
            p_i of the counts falls into.
          num_tails: how many tails to cut, where there are classes for that many.
          tail_factor: by how much each tail is narrower than the one before, >= 1.

        Returns:
          The bands; classes of equal count stay in order.

        Raises:
          TypeError: if a type is wrong.
          ValueError: if an argument is out of its range.

        References:
          Grave et al., Efficient softmax approximation for GPUs, arXiv:1609.04309
          (their cost has the constants of one GPU, too).
        """
        weights = checks.counts(counts)
        order = np.argsort(-weights, kind="stable").astype(np.int32)
        if cutoffs is None:
            tails = checks.positive_integer("num_tails", num_tails)
            factor = checks.scalar_in("tail_factor", tail_factor, 1, float("inf"))
            cutoffs = _cheapest(weights[order], min(tails, len(order) - 1), factor)
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order), dtype=np.int32)
        return cls(_cutoffs(cutoffs, len(order)), order, ranks)

    @property
    def num_classes(self) -> int:
        """V."""
        return self.cutoffs[-1]

    @property
    def shortlist(self) -> int:
        """Classes of the shortlist, at least 1."""
        return self.cutoffs[0]

    @property
    def tails(self) -> tuple[int, ...]:
        """Classes of each tail, at least 1."""
        return tuple(end - start for start, end in itertools.pairwise(self.cutoffs))

    @mesh_axes.accepts_explicit("class_ids", has_features=False)
    def rank_of(self, class_ids: jax.Array) -> jax.Array:
        """Returns the ranks of classes, int32; -1 for one that there is not."""
        known = (class_ids >= 0) & (class_ids < self.num_classes)
        ids = jnp.where(known, class_ids, 0).astype(jnp.int32)
        ranks = ids if self.ranks is None else jnp.asarray(self.ranks)[ids]
        return jnp.where(known, ranks, -1)

    def class_of(self, ranks: jax.Array) -> jax.Array:
        """Returns the classes of ranks; a negative rank stays."""
        if self.order is None:
            return ranks
        return jnp.where(ranks < 0, ranks, jnp.asarray(self.order)[ranks])


def _cutoffs(cutoffs: Sequence[int], num_classes: int) -> tuple[int, ...]:
    classes = checks.positive_integer("num_classes", num_classes)
    given = tuple(checks.positive_integer("cutoffs", cutoff) for cutoff in cutoffs)
    ends = (*given, classes)
    if any(start >= end for start, end in itertools.pairwise(ends)):
        raise ValueError(f"`cutoffs` must ascend and end below {classes}, got {given}.")
    return ends


def _cheapest(weights: np.ndarray, tails: int, factor: float) -> tuple[int, ...]:
    """Returns the cutoffs of least cost, by dynamic programming over candidates."""
    classes = len(weights)
    if not tails:
        return ()
    ends = np.unique(np.geomspace(1, classes, _CANDIDATES).round().astype(np.int64))
    if len(ends) <= tails:
        ends = np.arange(1, classes + 1)
    total = weights.sum()
    mass = np.cumsum(weights)[ends - 1] / (total if total > 0 else 1)
    # The cost of a band from candidate i to candidate j, before it is narrowed.
    between = (mass - mass[:, None]) * (ends - ends[:, None])
    later = np.triu(np.ones_like(between, bool), 1)
    cost = np.where(np.arange(len(ends)) == len(ends) - 1, 0.0, np.inf)
    chosen = []
    for tail in reversed(range(tails)):
        costs = np.where(later, between / factor ** (tail + 1) + cost, np.inf)
        chosen.append(costs.argmin(axis=1))
        cost = costs.min(axis=1)
    place = int((ends + cost).argmin())
    cutoffs = [int(ends[place])]
    for step in reversed(chosen[1:]):
        place = int(step[place])
        cutoffs.append(int(ends[place]))
    return tuple(cutoffs)
