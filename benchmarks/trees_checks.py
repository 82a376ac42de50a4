"""Is a step over a tree of classes right? Its first call is held against the truth."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import trees_truth
from benchmarks.checks import Subset
from benchmarks.trees_findings import ROW_OPTIMIZERS
from benchmarks.trees_steps import RATES
from benchmarks.truth import Array
from benchmarks.workloads import TreeWorkload

# Rows, or classes, whose new parameters are compared with the truth.
_CHECKED = 48


class StepCheck:
    """What one training step must return, and must leave alone.

    New rows are compared by how far they moved, each relative to its own true movement:
    those near the root move by much more than those near the classes.
    """

    def __init__(
        self,
        workload: TreeWorkload,
        classes: int,
        hidden: jax.Array,
        labels: jax.Array,
    ):
        """Takes the first batch: hidden states `[N, H]` and labels `[N]`."""
        self._workload, self._classes = workload, classes
        self._hidden = np.asarray(hidden).astype(np.float64)
        self._labels = np.asarray(labels)
        # In the tree's kernel: rows that move, and rows that must not.
        self._moving = self._still = np.zeros(0, np.int64)
        self._before_moving = self._before_still = np.zeros(0)
        self._scales: dict[str, Array] = {}
        # In the kernel of all classes.
        rows = Subset.of(workload.tokens, 1, _CHECKED).rows
        spread = Subset.of(1, classes, _CHECKED).classes
        some = np.unique([*self._labels[rows], *spread]).astype(np.int32)
        self._subset = Subset(rows, some)
        self._before_classes = np.zeros(0)

    def truth(self, *, full: bool) -> dict[str, Array]:
        """Computes everything, before any program takes up memory.

        Args:
          full: whether the softmax over all classes takes part.

        Returns:
          What `tree` and `full` should observe.
        """
        found = self._tree_truth()
        return found | self._full_truth() if full else found

    def tree(self, name: str, returned: Any) -> Mapping[str, Any]:
        """Picks the checked numbers of a step with an optimizer of rows.

        Args:
          name: of the optimizer.
          returned: by the first call.

        Returns:
          Arrays, by the truth's names.
        """
        state, outputs = returned
        kernel = state["kernel"]
        moved = _exact(kernel[self._moving]) - self._before_moving
        still = np.asarray(kernel[self._still]) == self._before_still
        found = {f"{name} moved": moved}
        slots = [_exact(slot[self._moving]) for slot in state["slots"].slots]
        if name == "row_adam":
            # Squares of a gradient are too small beside it to be compared with it.
            slots = [*np.split(slots[0], 2, axis=-1), *slots[1:]]
        for number, slot in enumerate(slots):
            found[f"{name} slot {number}"] = slot
        return {
            "tree loss": outputs["loss"],
            "tree dhidden": outputs["dhidden"],
            "untouched rows": still.all(axis=1),
            **{what: array / self._scales[what] for what, array in found.items()},
        }

    def full(self, returned: Any) -> Mapping[str, Any]:
        """Picks the checked numbers of a step over all classes.

        Args:
          returned: by the first call.

        Returns:
          Arrays, by the truth's names.
        """
        state, outputs = returned
        after = _exact(state["kernel"][:, self._subset.classes])
        return {
            "full loss": outputs["loss"],
            "full dhidden": outputs["dhidden"][self._subset.rows],
            "full moved": after - self._before_classes,
        }

    def _tree_truth(self) -> dict[str, Array]:
        kernel = self._workload.kernel(self._classes - 1, "vh")
        known = trees_truth.gradient(
            self._hidden,
            self._labels,
            self._classes,
            lambda rows: np.asarray(kernel[rows]),
        )
        # The whole path of the first token, and rows of all levels.
        path = trees_truth.paths(self._labels[:1], self._classes).nodes[0]
        some = known.rows[Subset.of(len(known.rows), 1, _CHECKED).rows]
        self._moving = np.union1d(path, some)
        self._still = _beside(known.rows, self._classes - 1)
        self._before_moving = _exact(kernel[self._moving])
        self._before_still = np.asarray(kernel[self._still])
        truth = {
            "tree loss": known.loss,
            "tree dhidden": known.dhidden,
            "untouched rows": np.ones(len(self._still)),
        }
        values = known.values[np.searchsorted(known.rows, self._moving)]
        for name in ROW_OPTIMIZERS:
            update = trees_truth.row_update(name, values, RATES[name])
            for what, array in update.items():
                sizes = np.abs(array).max(axis=tuple(range(1, array.ndim)))
                scale = sizes.reshape(-1, *(1,) * (array.ndim - 1))
                self._scales[f"{name} {what}"] = scale
                truth[f"{name} {what}"] = array / scale
        return truth

    def _full_truth(self) -> dict[str, Array]:
        kernel = self._workload.kernel(self._classes, "hv")
        known = trees_truth.full_gradient(
            self._hidden, kernel, self._labels, self._subset
        )
        self._before_classes = _exact(kernel[:, self._subset.classes])
        return {
            "full loss": known["loss"],
            "full dhidden": known["dhidden"],
            "full moved": -RATES["sgd"] * known["dkernel"],
        }


def _beside(rows: trees_truth.Ids, count: int) -> trees_truth.Ids:
    """Rows that are on no path: neighbours of those that are, and some of all."""
    near = np.concatenate([rows - 1, rows + 1, Subset.of(count, 1, 4 * _CHECKED).rows])
    others = np.setdiff1d(near[(near >= 0) & (near < count)], rows)
    return others[Subset.of(len(others), 1, _CHECKED).rows]


def _exact(array: Any) -> Array:
    return np.asarray(array).astype(np.float64)
