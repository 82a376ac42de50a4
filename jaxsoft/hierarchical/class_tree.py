"""Trees whose leaves are the classes."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy import typing as npt

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.exporting import (
    Leaf,
    exportable_dataclass,
    exportable_namedtuple,
)
from jaxsoft.hierarchical.clustering import order_by_similarity
from jaxsoft.hierarchical.consistency import check_tree
from jaxsoft.hierarchical.huffman import code_lengths, least_depth
from jaxsoft.hierarchical.levels import Canonical, Tables
from jaxsoft.hierarchical.node_biases import biases_along
from jaxsoft.hierarchical.taxonomy import tables_of_paths

__all__ = ["ClassPath", "ClassTree"]

# By how much a Huffman tree may be deeper than a balanced one, unless told.
_EXTRA_DEPTH = 4


@exportable_namedtuple
class ClassPath(NamedTuple):
    """The inner nodes between the root and some classes, from the root down.

    Attributes:
      first_rows: [..., depth] int32, the first row of each node's parameters.
      num_rows: [..., depth] int32, how many rows the node has, one less than children;
        0 below the class.
      choices: [..., depth] int32, which child leads to the class; the first is 0 and
        has no row.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import ClassTree
      >>> path = ClassTree.balanced(4).paths(jnp.array(3))
      >>> print(path.first_rows, path.choices)
      [0 2] [1 1]
    """

    first_rows: jax.Array
    num_rows: jax.Array
    choices: jax.Array


@exportable_dataclass()
@dataclasses.dataclass(frozen=True)
class ClassTree:
    """A tree whose leaves are the classes 0 … V-1.

    Every inner node is a softmax over its children. It has one row of parameters for
    each child but the first, whose logit is 0: a tree of any form has V - 1 rows, those
    nearest to the root first. A pytree whose tables are leaves: pass it to a compiled
    function as an argument.

    Attributes:
      levels: the form of the tree.
      order: [V] int32, the classes from left to right; None: 0 … V-1.
      ranks: [V] int32, the place of each class in that order, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import ClassTree
      >>> tree = ClassTree.balanced(1000)
      >>> print(tree.num_rows, tree.max_depth)
      999 10
      >>> tree = ClassTree.huffman([50, 30, 10, 10])
      >>> print(tree.depths(jnp.arange(4)))
      [1 2 3 3]
    """

    levels: Canonical | Tables
    order: Leaf | None = None
    ranks: Leaf | None = None

    @classmethod
    def balanced(cls, num_classes: int, arity: int = 2) -> ClassTree:
        """A tree whose paths differ by one at most: arithmetic, without any table.

        Args:
          num_classes: V >= 1.
          arity: children of a node, at least 2.

        Returns:
          A tree of depth ceil(log_arity V), the lower classes nearer to the root.

        Raises:
          TypeError: if an argument is not an int.
          ValueError: if one is out of its range.
        """
        return cls(_balanced(_classes(num_classes), _arity(arity)))

    @classmethod
    def huffman(
        cls, counts: npt.ArrayLike, arity: int = 2, max_depth: int | None = None
    ) -> ClassTree:
        """The tree of least expected path length under a bound on the longest.

        Args:
          counts: [V] finite and not negative, how often each class comes; in any
            order; no traced array. A count of 0 is taken for a very small one.
          arity: children of a node, at least 2.
          max_depth: the longest path, at least ceil(log_arity V); None takes that
            plus 4.

        Returns:
          The tree, by package-merge (Larmore and Hirschberg, 1990).

        Raises:
          TypeError: if a type or dtype is wrong.
          ValueError: if an argument is out of its range.
        """
        arity = _arity(arity)
        weights = checks.counts(counts)
        count = _classes(len(weights))
        least = least_depth(count, arity)
        if max_depth is None:
            max_depth = least + _EXTRA_DEPTH
        if not least <= checks.positive_integer("max_depth", max(max_depth, 1)):
            raise ValueError(
                f"`max_depth` must be at least {least} for {count} classes and arity "
                f"{arity}, got {max_depth}."
            )
        if count == 1:
            return cls.balanced(1, arity)
        # Scaled, so that no sum overflows; none so small that the form is arbitrary.
        weights = weights / max(weights.max(), np.finfo(np.float64).tiny)
        weights = np.maximum(weights, 1e-3 / count * max(weights.min(), 1e-9))
        order = np.argsort(weights, kind="stable")
        lengths = code_lengths(weights[order], arity, max_depth)
        # The most frequent first, classes of one count in their own order.
        order = np.lexsort((np.arange(count), -weights))
        leaves = np.bincount(lengths).tolist()
        nodes = []
        slots = 1
        for number in leaves:
            nodes.append(max(slots - number, 0))
            slots = arity * nodes[-1]
        nodes[-1] = 0
        levels = Canonical(arity, tuple(leaves), tuple(nodes))
        return cls(levels, *_permutation(order))

    @classmethod
    def clustered(
        cls,
        embeddings: npt.ArrayLike,
        arity: int = 2,
        *,
        seed: int = 0,
        progress: Callable[[float], object] | None = None,
    ) -> ClassTree:
        """A balanced tree in which similar classes share paths.

        From the root down, the classes of a node are sorted along their first
        principal component and cut into equal parts.

        Args:
          embeddings: [V, H] finite; no traced array.
          arity: children of a node, at least 2.
          seed: of the estimates of principal components.
          progress: called now and then with the share of the work that is done, such
            as a progress bar's method; None for no call.

        Returns:
          A tree of the form of `balanced`.

        Raises:
          TypeError: if a type or dtype is wrong.
          ValueError: if an argument is out of its range.
        """
        arity = _arity(arity)
        table = checks.concrete("embeddings", embeddings)
        if table.ndim != 2 or not len(table):
            raise ValueError(
                f"`embeddings` must have shape [V, H] with V >= 1, got {table.shape}."
            )
        table = table.astype(np.float32)
        if not np.isfinite(table).all():
            raise ValueError("`embeddings` must be finite, got a NaN or an infinity.")
        levels = _balanced(_classes(len(table)), arity)
        # The division keeps squares from overflowing and vanishing. NumPy's products
        # may note an invalid operation where there is none.
        table = table / max(float(np.abs(table).max(initial=0)), 1e-38)
        with np.errstate(invalid="ignore"):
            order = order_by_similarity(table, _cuts(levels), seed, progress)
        return cls(levels, *_permutation(order))

    @classmethod
    def from_paths(
        cls, paths: Iterable[Sequence[Hashable] | str], arity: int | None = None
    ) -> ClassTree:
        """A tree of one's own, such as a taxonomy.

        Args:
          paths: of each class, the names of the branches from the root to it, as in
            `[("animal", "cat"), ("animal", "dog"), ("plant",)]`. A class may be an
            inner node, as "animal" if there is the path `("animal",)`, too: it is a
            leaf beside the classes below. A string is a line of text, as in
            `"animal > cat"`, whose names are stripped.
          arity: the most children of a node: wider ones get inner nodes of their own.
            None leaves them as they are; every node of a path then costs what the
            widest node does.

        Returns:
          The tree. The children of a node come in the order in which their branches
          first do; the first has no row. Nodes with one child are left out.

        Raises:
          TypeError: if a type is wrong.
          ValueError: if there are no paths, two are equal, a line of text has an empty
            name, or all of more than two are lines of one name, such as codes whose
            characters are meant as branches.
        """
        if arity is not None:
            arity = _arity(arity)
        levels, order = tables_of_paths(paths, arity)
        return cls(levels, *_permutation(order))

    @property
    def num_classes(self) -> int:
        """V."""
        return self.levels.num_classes

    @property
    def num_rows(self) -> int:
        """Rows of the node kernel: V - 1."""
        return self.num_classes - 1

    @property
    def max_depth(self) -> int:
        """Inner nodes on the longest path."""
        return self.levels.depth

    @property
    def arity(self) -> int:
        """The most children that a node has."""
        return self.levels.arity

    def depths(self, class_ids: ArrayLike) -> jax.Array:
        """Returns how many inner nodes there are above classes.

        Args:
          class_ids: [...] integers in [0, V).

        Returns:
          [...] int32; 0 for an id that is no class.
        """
        return jnp.sum(self.paths(class_ids).num_rows > 0, axis=-1, dtype=jnp.int32)

    @mesh_axes.accepts_explicit("class_ids", has_features=False)
    def paths(self, class_ids: ArrayLike, *, axis: int = -1) -> ClassPath:
        """Returns the paths to classes.

        Args:
          class_ids: [...] integers in [0, V).
          axis: where the levels go in the result.

        Returns:
          The path of each; without nodes for an id that is no class.

        Raises:
          TypeError: if the dtype is wrong.
        """
        ids = checks.integer("class_ids", class_ids)
        known = (ids >= 0) & (ids < self.num_classes)
        ids = jnp.where(known, ids, 0).astype(jnp.int32)
        rank = ids if self.ranks is None else jnp.asarray(self.ranks)[ids]
        slot = self.levels.slot_of_rank(rank)
        depth = jnp.where(known, self.levels.level_of_rank(rank), 0)
        if not self.max_depth:
            empty = jnp.expand_dims(ids, axis)
            return ClassPath(*[jax.lax.slice_in_dim(empty, 0, 0, axis=axis)] * 3)
        steps = self.levels.steps_to(slot, depth)
        return ClassPath(*(jnp.moveaxis(field, 0, axis) for field in steps))

    def biases(self, probabilities: npt.ArrayLike) -> np.ndarray:
        """Node biases that give the classes some probabilities where logits are 0.

        A head whose `node_bias` is this and whose kernel is 0 starts there.

        Args:
          probabilities: [V] finite and positive, of any sum; no traced array.

        Returns:
          [num_rows] float32.

        Raises:
          TypeError: if an argument is traced.
          ValueError: if an argument is out of its range.
        """
        probabilities = checks.concrete("probabilities", probabilities)
        # Where a model is made inside a traced function, too.
        with jax.ensure_compile_time_eval():
            paths = self.paths(np.arange(self.num_classes), axis=0)
        return biases_along(paths, probabilities)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tree to a file of NumPy's `.npz` format.

        Args:
          path: the file, replaced if it exists; no suffix is added.
        """
        form = {
            "kind": type(self.levels).__name__,
            "arity": int(self.levels.arity),
            "leaves": self.levels.leaves,
            "nodes": self.levels.nodes,
        }
        arrays = {"order": self.order, "ranks": self.ranks}
        if isinstance(self.levels, Tables):
            arrays |= {
                field.name: getattr(self.levels, field.name)
                for field in dataclasses.fields(self.levels)
                if field.name not in form
            }
        tables: dict[str, Any] = {
            name: np.asarray(array)
            for name, array in arrays.items()
            if array is not None
        }
        with open(path, "wb") as file:
            np.savez(file, form=np.array(json.dumps(form)), **tables)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassTree:
        """Reads a tree that `save` wrote.

        Args:
          path: the file.

        Returns:
          The tree.

        Raises:
          ValueError: if the file holds anything else, or tables that do not fit.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name != "form"}
                form = json.loads(str(file["form"]))
            arity, *levels = (form[name] for name in ("arity", "leaves", "nodes"))
            leaves, nodes = (tuple(map(operator.index, level)) for level in levels)
            permutation = arrays.pop("order", None), arrays.pop("ranks", None)
            kind = {"Canonical": Canonical, "Tables": Tables}[form["kind"]]
            tree = cls(
                kind(operator.index(arity), leaves, nodes, **arrays), *permutation
            )
            check_tree(tree)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as why:
            raise ValueError(f"{path} holds no tree that fits: {why}") from why
        return tree


def _arity(arity: int) -> int:
    if checks.positive_integer("arity", arity) < 2:
        raise ValueError(f"`arity` must be at least 2, got {arity}.")
    return int(arity)


def _classes(num_classes: int) -> int:
    if checks.positive_integer("num_classes", num_classes) >= 2**30:
        raise ValueError(f"`num_classes` must be below 2**30, got {num_classes}.")
    return int(num_classes)


def _balanced(num_classes: int, arity: int) -> Canonical:
    inner = -(-(num_classes - 1) // (arity - 1))
    left, slots = num_classes + inner, 1
    leaves, nodes = [], []
    while left:
        slots = min(slots, left)
        nodes.append(min(slots, inner))
        leaves.append(slots - nodes[-1])
        inner, left = inner - nodes[-1], left - slots
        slots = arity * nodes[-1]
    return Canonical(arity, tuple(leaves), tuple(nodes))


def _cuts(levels: Canonical) -> list[np.ndarray]:
    """Returns the first leaf of each subtree, of each level that can be sorted."""
    depth, arity = levels.depth, levels.arity
    if depth < 2:
        return []
    alone, inner = levels.leaves[depth - 1], levels.nodes[depth - 1]
    places = np.arange(alone + inner)
    firsts = np.minimum(places, alone) + arity * np.maximum(places - alone, 0)
    return [firsts[:: arity ** (depth - 1 - level)] for level in range(depth - 1)]


def _permutation(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order), dtype=np.int32)
    return order.astype(np.int32), ranks
