"""Trees of any form, numbered breadth first."""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from jaxsoft.hierarchical.levels import Tables

__all__ = ["SEPARATOR", "tables_of_paths"]

# What is between the branches of a line of text.
SEPARATOR = ">"

# The branch of an inner node to the class whose path ends at that node.
_ITSELF = object()

# What each branch of an inner node leads to: a class or another inner node.
_Branches = dict[Hashable, "int | _Branches"]
# A class, an inner node, or a group of an inner node's children.
_Child = int | _Branches | list["_Child"]


def tables_of_paths(
    paths: Iterable[Sequence[Hashable] | str], arity: int | None
) -> tuple[Tables, np.ndarray]:
    """Builds a tree of classes' paths.

    Args:
      paths: of each class, the branches from the root to it, or a string of them.
      arity: the most children of a node, or None for any number.

    Returns:
      The tree, and [V] int64, the classes from left to right.

    Raises:
      TypeError: if there is no path, or a branch that cannot be a name.
      ValueError: if two paths are equal, a branch of a string is empty, all are strings
        of one branch, or there are none.
    """
    if not isinstance(paths, Iterable):
        raise TypeError(f"`paths` must be a path for each class, got {paths!r}.")
    root: _Branches = {}
    count, deepest, all_text = 0, 0, True
    for class_id, path in enumerate(paths):
        all_text = all_text and isinstance(path, str)
        path = _branches(class_id, path)
        deepest = max(deepest, len(path))
        _insert(root, class_id, path)
        count += 1
    if not count:
        raise ValueError("`paths` must have at least one class, got none.")
    if all_text and deepest < 2 < count:
        raise ValueError(
            f"`paths` must have a {SEPARATOR!r} where all are strings, got "
            f"{next(iter(root))!r} first. If each character is a branch, give "
            "tuple(path) of each."
        )
    return _number(root, count, arity)


def _branches(class_id: int, path: Sequence[Hashable] | str) -> Sequence[Hashable]:
    """Returns the branches of a path, which may be a line of text."""
    if not isinstance(path, str):
        if isinstance(path, bytes) or not isinstance(path, Iterable):
            raise TypeError(
                "`paths` must be strings or sequences of branches, such as 'tree > oak'"
                f" or ('tree', 'oak'), got {path!r} for class {class_id}."
            )
        branches = tuple(path)
        try:
            hash(branches)
        except TypeError:
            raise TypeError(
                "`paths` must have branches that can be hashed, such as strings, got "
                f"{path!r} for class {class_id}."
            ) from None
        return branches
    names = tuple(name.strip() for name in path.split(SEPARATOR))
    if not all(names):
        raise ValueError(
            f"`paths` must have a name on both sides of every {SEPARATOR!r}, got "
            f"{path!r} for class {class_id}."
        )
    return names


def _insert(root: _Branches, class_id: int, path: Sequence[Hashable]) -> None:
    *inner, last = list(path) or [None]
    node = root
    for branch in inner:
        below = node.setdefault(branch, {})
        if not isinstance(below, dict):
            below = node[branch] = {_ITSELF: below}
        node = below
    at_end = node.get(last)
    if isinstance(at_end, dict):
        node, last = at_end, _ITSELF
        at_end = node.get(last)
    if at_end is not None:
        raise ValueError(
            f"`paths` must lead each class to a place of its own, got {tuple(path)} "
            f"for class {class_id}, where class {at_end} is already."
        )
    node[last] = class_id


def _children(node: _Child, arity: int | None) -> int | list[_Child]:
    """Returns the children of a node, without nodes that have only one."""
    while isinstance(node, dict) and len(node) == 1:
        (node,) = node.values()
    if not isinstance(node, dict):
        return node
    children: list[_Child] = list(node.values())
    if arity is not None:
        while len(children) > arity:
            # As few groups as suffice, all of about a size.
            groups = -(-len(children) // arity)
            ends = [len(children) * (g + 1) // groups for g in range(groups)]
            children = [
                children[begin:end] if end - begin > 1 else children[begin]
                for begin, end in zip([0, *ends[:-1]], ends, strict=True)
            ]
    return children


def _number(
    root: _Branches, count: int, arity: int | None
) -> tuple[Tables, np.ndarray]:
    """Numbers nodes and slots breadth first, and leaves from left to right."""
    slot_nodes: list[int] = []
    node_slots, node_firsts = [], []
    slot_children: list[int] = []
    class_slots = np.full(count, -1, np.int64)
    leaves, nodes = [], []
    level = [(_children(root, arity), -1)]
    while level:
        inner = [(node, slot) for node, slot in level if isinstance(node, list)]
        for class_id, slot in level:
            if not isinstance(class_id, list):
                class_slots[class_id] = slot
        leaves.append(len(level) - len(inner))
        nodes.append(len(inner))
        level = []
        for node, slot in inner:
            if slot >= 0:
                slot_children[slot] = len(node_slots)
            node_slots.append(slot)
            node_firsts.append(len(slot_nodes))
            for child in node:
                level.append((_children(child, arity), len(slot_nodes)))
                slot_nodes.append(len(node_slots) - 1)
                slot_children.append(-1)
    node_firsts.append(len(slot_nodes))
    order = _left_to_right(node_firsts, slot_children, class_slots)
    rank_slots = class_slots[order]
    children = np.array(slot_children, np.int64)
    if len(children):
        children[rank_slots] = -1 - np.arange(count)
    tables = Tables(
        arity=int(max([2, *np.diff(node_firsts)])),
        leaves=tuple(leaves),
        nodes=tuple(nodes),
        rank_slots=rank_slots.astype(np.int32),
        node_slots=np.array(node_slots, np.int32),
        slot_nodes=np.array(slot_nodes, np.int32),
        node_firsts=np.array(node_firsts, np.int32),
        slot_children=children.astype(np.int32),
    )
    return tables, order


def _left_to_right(node_firsts, slot_children, class_slots) -> np.ndarray:
    """Returns the classes in the order of a walk that takes first children first."""
    if not slot_children:
        return np.zeros(1, np.int64)
    class_at = np.full(len(slot_children), -1, np.int64)
    class_at[class_slots] = np.arange(len(class_slots))
    order = []
    waiting = list(range(node_firsts[1] - 1, -1, -1))
    while waiting:
        slot = waiting.pop()
        if class_at[slot] >= 0:
            order.append(class_at[slot])
        else:
            node = slot_children[slot]
            children = range(node_firsts[node], node_firsts[node + 1])
            waiting.extend(reversed(children))
    return np.array(order, np.int64)
