"""The shape of a tree of classes, level by level.

Every node but the root hangs from a *slot*: slots are numbered breadth first, so that
the children of a node lie side by side and those of node i begin where node i - 1's
end. A node with c children is a softmax over c logits of which the first is 0, and so
has c - 1 rows of parameters: slot s of node i has row s - i - 1 unless it is the node's
first. A tree over V classes has V - 1 rows, whatever its form, those nearest to the
root first.

*Ranks* number the leaves from left to right. Within a level, nodes that are further
left come first, so that along classes in order of rank the nodes of a level are in
order too.
"""

import abc
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoft._core.exporting import Leaf, exportable_dataclass

__all__ = ["Canonical", "Levels", "Tables"]

# As many numbers are compared one by one: the leaves of a balanced tree are on two
# levels.
_FEW_BOUNDS = 4


@dataclasses.dataclass(frozen=True)
class Levels(abc.ABC):
    """How many leaves and inner nodes each level has.

    Attributes:
      arity: the most children that a node has.
      leaves: leaves of each level, from the root's, level 0, down.
      nodes: inner nodes of each level.
    """

    arity: int
    leaves: tuple[int, ...]
    nodes: tuple[int, ...]

    @property
    def depth(self) -> int:
        """The length of the longest path."""
        return len(self.leaves) - 1

    @property
    def num_classes(self) -> int:
        """V."""
        return sum(self.leaves)

    @property
    def num_slots(self) -> int:
        """One for each leaf and each inner node but the root."""
        return self.num_classes + sum(self.nodes) - 1

    @functools.cached_property
    def first_nodes(self) -> np.ndarray:
        """[depth + 2], the number of the first inner node of each level."""
        return _starts(self.nodes)

    @functools.cached_property
    def first_leaves(self) -> np.ndarray:
        """[depth + 2], how many leaves the levels above have."""
        return _starts(self.leaves)

    @functools.cached_property
    def first_slots(self) -> np.ndarray:
        """[depth + 2], the first slot of each level; the root's is -1."""
        return self.first_nodes + self.first_leaves - 1

    @abc.abstractmethod
    def slot_of_rank(self, rank: jax.Array) -> jax.Array:
        """Returns the slots of leaves."""

    @abc.abstractmethod
    def slot_of_node(self, node: jax.Array) -> jax.Array:
        """Returns the slots of inner nodes; -1 for the root."""

    @abc.abstractmethod
    def node_of_slot(self, slot: jax.Array) -> jax.Array:
        """Returns the inner node that a slot is a child of."""

    @abc.abstractmethod
    def first_slot(self, node: jax.Array) -> jax.Array:
        """Returns the slots of nodes' first children."""

    @abc.abstractmethod
    def below(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns whether a leaf hangs from a slot, and its rank or the node."""

    def level_of_slot(self, slot: jax.Array) -> jax.Array:
        """Returns the levels that slots are on, from 1."""
        return _level(self.first_slots, slot)

    def level_of_rank(self, rank: jax.Array) -> jax.Array:
        """Returns the levels that leaves are on."""
        return self.level_of_slot(self.slot_of_rank(rank))

    def steps_to(
        self, slot: jax.Array, depth: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the steps from the root to some slots.

        Args:
          slot: [...].
          depth: [...], the levels that they are on; 0 for what has no path.

        Returns:
          Each [depth, ...], 0 below the slot: the first row of the node, how many rows
          it has, which child is taken.
        """
        upwards = []
        for level in range(self.depth, 0, -1):
            inside = depth >= level
            here = jnp.where(inside, slot, self.first_slots[level])
            node = self.node_of_slot(here)
            first = self.first_slot(node)
            step = (first - node, self.first_slot(node + 1) - first - 1, here - first)
            upwards.append([jnp.where(inside, a, 0) for a in step])
            # Without the barrier XLA repeats the levels below for each one above.
            above = self.slot_of_node(node)
            slot = lax.optimization_barrier(jnp.where(inside, above, slot))
        first, number, choice = map(jnp.stack, zip(*reversed(upwards), strict=True))
        return first, number, choice

    def num_children(self, node: jax.Array) -> jax.Array:
        """Returns how many children inner nodes have."""
        return self.first_slot(node + 1) - self.first_slot(node)


def _starts(counts: tuple[int, ...]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(counts)], np.int32)


def _level(bounds: np.ndarray, number: jax.Array) -> jax.Array:
    """Returns the last level that begins at or before a number."""
    begins, counts = np.unique(bounds[:-1], return_counts=True)
    if len(begins) > _FEW_BOUNDS:
        found = jnp.searchsorted(
            jnp.asarray(bounds[:-1]), number, side="right", method="compare_all"
        )
        return found.astype(jnp.int32) - 1
    level = jnp.full_like(number, -1, jnp.int32)
    for begin, count in zip(begins, counts, strict=True):
        level += jnp.where(number >= begin, np.int32(count), 0)
    return level


@exportable_dataclass("arity", "leaves", "nodes")
@dataclasses.dataclass(frozen=True)
class Canonical(Levels):
    """A tree that is known by its levels alone, without any table.

    The leaves of a level come before its inner nodes, and every inner node has `arity`
    children, except that the very last one may have fewer.
    """

    def slot_of_rank(self, rank: jax.Array) -> jax.Array:
        """Returns the slots of leaves."""
        level = _level(self.first_leaves, rank)
        return rank + self._at_leaves(self.first_slots - self.first_leaves, level)

    def level_of_rank(self, rank: jax.Array) -> jax.Array:
        """Returns the levels that leaves are on."""
        return _level(self.first_leaves, rank)

    def slot_of_node(self, node: jax.Array) -> jax.Array:
        """Returns the slots of inner nodes; -1 for the root."""
        level = _level(self.first_nodes, node)
        before = self.first_slots[:-1] + np.array(self.leaves, np.int32)
        return node + jnp.asarray(before - self.first_nodes[:-1])[level]

    def node_of_slot(self, slot: jax.Array) -> jax.Array:
        """Returns the inner node that a slot is a child of."""
        level = _level(self.first_slots, slot)
        position = slot - jnp.asarray(self.first_slots)[level]
        return jnp.asarray(self.first_nodes)[level - 1] + position // self.arity

    def steps_to(
        self, slot: jax.Array, depth: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the steps from the root to some slots."""
        if self.arity**self.depth >= 2**31:
            return super().steps_to(slot, depth)
        # In the complete tree, whose leaves all lie on the last level, a slot has all
        # those before it that would hang from leaves further up, and its ancestors
        # are quotients of its place.
        missing = [0]
        for count in self.leaves[:-1]:
            missing.append(self.arity * (missing[-1] + count))
        shape = (-1, *(1,) * slot.ndim)
        levels = np.arange(1, self.depth + 1, dtype=np.int32).reshape(shape)
        powers = np.array([self.arity**n for n in range(self.depth + 1)], np.int32)
        offsets = np.array(missing, np.int32)
        place = slot + self._at_leaves(offsets - self.first_slots[:-1], depth)
        last = place * self._at_leaves(powers[::-1], depth)
        place = self._quotient(last[None], self.depth - levels)
        parent = self._quotient(place, np.ones_like(levels))
        choice = place - self.arity * parent
        # Among the slots that there are.
        inside = levels <= depth[None]
        node = parent - (offsets[1:] // self.arity).reshape(shape)
        node = jnp.where(inside, node, 0)
        first = self.first_slots[1:-1].reshape(shape) + self.arity * node
        number = jnp.minimum(self.num_slots - first, self.arity)
        row = first - self.first_nodes[:-2].reshape(shape) - node
        steps = (row, number - 1, choice)
        row, number, choice = (jnp.where(inside, a, 0) for a in steps)
        return row, number, choice

    def _at_leaves(self, table: np.ndarray, depth: jax.Array) -> jax.Array:
        """Returns numbers of levels with leaves, and any number of other levels."""
        found = [level for level, count in enumerate(self.leaves) if count]
        if len(found) > _FEW_BOUNDS:
            return jnp.asarray(table)[depth]
        number = jnp.full_like(depth, table[found[0]])
        for level in found[1:]:
            number = jnp.where(depth == level, table[level], number)
        return number

    def _quotient(self, number: jax.Array, power: np.ndarray) -> jax.Array:
        """Returns numbers >= 0 over powers of the arity, rounded down."""
        bits = self.arity.bit_length() - 1
        if self.arity == 2**bits:
            return number >> (bits * power)
        return number // np.int32(self.arity) ** power

    def first_slot(self, node: jax.Array) -> jax.Array:
        """Returns the slots of nodes' first children."""
        level = _level(self.first_nodes, node)
        position = node - jnp.asarray(self.first_nodes)[level]
        first = jnp.asarray(self.first_slots)[level + 1] + self.arity * position
        return jnp.minimum(first, self.num_slots)

    def below(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns whether a leaf hangs from a slot, and its rank or the node."""
        level = _level(self.first_slots, slot)
        position = slot - jnp.asarray(self.first_slots)[level]
        leaves = jnp.asarray(self.leaves, jnp.int32)[level]
        rank = jnp.asarray(self.first_leaves)[level] + position
        node = jnp.asarray(self.first_nodes)[level] + position - leaves
        is_leaf = position < leaves
        return is_leaf, jnp.where(is_leaf, rank, node)


@exportable_dataclass("arity", "leaves", "nodes")
@dataclasses.dataclass(frozen=True)
class Tables(Levels):
    """A tree of any form, in tables of about 7·V numbers.

    Attributes:
      rank_slots: [V], the slot of each leaf.
      node_slots: [nodes], the slot of each inner node.
      slot_nodes: [slots], the node that each slot is a child of.
      node_firsts: [nodes + 1], the first slot of each node.
      slot_children: [slots], the inner node below a slot, or -1 - rank of a leaf.
    """

    rank_slots: Leaf
    node_slots: Leaf
    slot_nodes: Leaf
    node_firsts: Leaf
    slot_children: Leaf

    def slot_of_rank(self, rank: jax.Array) -> jax.Array:
        """Returns the slots of leaves."""
        return jnp.asarray(self.rank_slots)[rank]

    def slot_of_node(self, node: jax.Array) -> jax.Array:
        """Returns the slots of inner nodes; -1 for the root."""
        return jnp.asarray(self.node_slots)[node]

    def node_of_slot(self, slot: jax.Array) -> jax.Array:
        """Returns the inner node that a slot is a child of."""
        return jnp.asarray(self.slot_nodes)[slot]

    def first_slot(self, node: jax.Array) -> jax.Array:
        """Returns the slots of nodes' first children."""
        return jnp.asarray(self.node_firsts)[node]

    def below(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns whether a leaf hangs from a slot, and its rank or the node."""
        child = jnp.asarray(self.slot_children)[slot]
        return child < 0, jnp.where(child < 0, -1 - child, child)
