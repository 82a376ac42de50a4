"""Whether the tables of a tree or of bands, which a file may hold, fit each other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsoft.hierarchical.levels import Canonical, Levels, Tables

if TYPE_CHECKING:
    from jaxsoft.adaptive.class_bands import ClassBands
    from jaxsoft.hierarchical.class_tree import ClassTree

__all__ = ["check_bands", "check_tree"]


def check_tree(tree: ClassTree) -> None:
    """Raises `ValueError` unless tables and levels are those of one tree.

    All paths then end at the root, and no table is read out of its bounds.

    Args:
      tree: whose levels hold Python's integers, and whose tables are arrays.
    """
    _check_levels(tree.levels)
    if isinstance(tree.levels, Tables):
        _check_tables(tree.levels)
    _check_order(tree.order, tree.ranks, tree.num_classes)


def check_bands(bands: ClassBands) -> None:
    """Raises `ValueError` unless cutoffs ascend and the tables are permutations.

    Args:
      bands: whose cutoffs are Python's integers, and whose tables are arrays.
    """
    cutoffs = (0, *bands.cutoffs)
    _require(
        len(cutoffs) > 1
        and cutoffs[-1] < 2**30
        and all(start < end for start, end in itertools.pairwise(cutoffs)),
        "`cutoffs` must ascend from 1 on",
    )
    _check_order(bands.order, bands.ranks, bands.num_classes)


def _check_levels(levels: Levels) -> None:
    """Raises unless each level has room for the one below, and needs it."""
    leaves, nodes, arity = levels.leaves, levels.nodes, levels.arity
    _require(2 <= arity < 2**30, "`arity` must be in [2, 2**30)")
    _require(
        len(leaves) == len(nodes) > 0
        and min(*leaves, *nodes) >= 0
        and leaves[0] + nodes[0] == 1
        and nodes[-1] == 0 < min((1, *nodes[:-1]))
        and sum(leaves) < 2**30,
        "`leaves` and `nodes` must be the numbers of each level of a tree",
    )
    last = len(leaves) - 2
    for level in range(last + 1):
        slots, above = leaves[level + 1] + nodes[level + 1], nodes[level]
        least = 2 * above
        if isinstance(levels, Canonical):
            # All nodes are full, but for the very last one.
            least = arity * above if level < last else arity * (above - 1) + 2
        _require(
            least <= slots <= arity * above,
            f"level {level + 1} must have {least} to {arity * above} slots, got "
            f"{slots}: a node has 2 to {arity} children",
        )


def _check_tables(levels: Tables) -> None:
    """Raises unless the tables are inverses of each other, and go by levels."""
    count, inner, slots = levels.num_classes, sum(levels.nodes), levels.num_slots
    rank_slots = _table("rank_slots", levels.rank_slots, count)
    node_slots = _table("node_slots", levels.node_slots, inner)
    slot_nodes = _table("slot_nodes", levels.slot_nodes, slots)
    firsts = _table("node_firsts", levels.node_firsts, inner + 1)
    children = _table("slot_children", levels.slot_children, slots)
    if not slots:
        return  # A single class, whose tables nobody follows.
    numbers = firsts[1:].astype(np.int64) - firsts[:-1]
    _require(
        firsts[0] == 0
        and firsts[-1] == slots
        and (numbers >= 2).all()
        and numbers.max() == levels.arity
        and np.array_equal(slot_nodes, np.repeat(np.arange(inner), numbers)),
        "`node_firsts` and `slot_nodes` must give each node its children",
    )
    _require(
        node_slots[0] == -1
        and _within(rank_slots, slots)
        and _within(node_slots[1:], slots)
        and np.array_equal(children[rank_slots], -1 - np.arange(count))
        and np.array_equal(children[node_slots[1:]], np.arange(1, inner)),
        "`slot_children` must be the inverse of `rank_slots` and `node_slots`",
    )
    # The children of a level's nodes are the slots of the next level, and among the
    # slots of a level are its nodes: a path comes nearer to the root at each step.
    bounds, first_nodes = levels.first_slots, levels.first_nodes
    levels_of_nodes = np.repeat(np.arange(levels.depth + 1), levels.nodes)
    found = np.searchsorted(bounds[:-1], node_slots, side="right") - 1
    _require(
        np.array_equal(firsts[first_nodes[: levels.depth]], bounds[1:-1])
        and np.array_equal(found, levels_of_nodes),
        "`node_firsts` and `node_slots` must go by levels",
    )


def _check_order(order: Any, ranks: Any, num_classes: int) -> None:
    """Raises unless both are missing, or inverse permutations of the classes."""
    if order is None and ranks is None:
        return
    _require(
        order is not None and ranks is not None,
        "`order` and `ranks` must be there together",
    )
    order, ranks = (
        _table(name, table, num_classes)
        for name, table in (("order", order), ("ranks", ranks))
    )
    _require(
        _within(order, num_classes)
        and np.array_equal(ranks[order], np.arange(num_classes)),
        "`order` and `ranks` must be inverse permutations of the classes",
    )


def _table(name: str, table: Any, length: int) -> np.ndarray:
    """Returns a table as NumPy's array, of int32 and the length that it must have."""
    array = np.asarray(table)
    _require(
        array.dtype == np.int32 and array.shape == (length,),
        f"`{name}` must be int32 of shape {(length,)}, got {array.dtype} of shape "
        f"{array.shape}",
    )
    return array


def _within(places: np.ndarray, length: int) -> bool:
    return not len(places) or bool(places.min() >= 0 and places.max() < length)


def _require(holds: bool | np.bool_, rule: str) -> None:
    if not holds:
        raise ValueError(f"{rule}.")
