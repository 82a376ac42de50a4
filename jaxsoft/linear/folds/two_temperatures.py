"""Statistics at a temperature, and those of one label at temperature 1, in one stream.

Hinton's loss adds the cross-entropy of labels at temperature 1 to a divergence at
another: each logit is computed once for both, and once for the derivative of both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxsoft._core import numerics
from jaxsoft.linear import reference
from jaxsoft.linear.arguments import Operands
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.folds.statistics import Columns, Fields, Saved, Statistics
from jaxsoft.linear.gradients import Into, Share, Wanted, accumulate
from jaxsoft.linear.kept import Kept
from jaxsoft.linear.tiles import Tile

__all__ = ["TwoTemperatures"]


@dataclasses.dataclass(frozen=True)
class TwoTemperatures(
    Fold[Operands, tuple[Columns, Columns], tuple[Saved, Saved], tuple[Fields, Fields]]
):
    """The statistics of each row, and log-sum and last label at temperature 1.

    Attributes:
      config: of the layer.
      wanted: the names of statistics at the call's temperature, of all labels.
    """

    wanted: frozenset[str] = frozenset()

    @property
    def soft(self) -> Statistics:
        """The statistics at the call's temperature."""
        return Statistics(self.config, self.wanted)

    @property
    def hard(self) -> Statistics:
        """The statistics at temperature 1, of the last label alone."""
        config = dataclasses.replace(self.config, static_tau=1.0)
        return Statistics(config, frozenset({"label"}))

    def operands(self, arrays: Operands) -> Operands:
        return arrays

    def local(self, arrays: Operands) -> Operands:
        return arrays.local(self.config)

    def start(self, rows: int, arrays: Operands) -> tuple[Columns, Columns]:
        assert arrays.labels is not None
        dtype = numerics.compute_dtype(arrays.hidden, arrays.kernel)
        labels = arrays.labels.shape[1]
        return self.soft.empty(rows, labels, dtype), self.hard.empty(rows, 1, dtype)

    def step(
        self, carry: tuple[Columns, Columns], tile: Tile, part: Operands
    ) -> tuple[Columns, Columns]:
        soft, hard = carry
        tau = part.temperature(self.config)
        return self.soft.merge(soft, tile, tau), self.hard.merge(hard, _last(tile), 1.0)

    def finish(
        self, carry: tuple[Columns, Columns], arrays: Operands
    ) -> tuple[Saved, Saved]:
        soft, hard = carry
        return self.soft.finish(soft, arrays), self.hard.finish(hard, _at_one(arrays))

    def result(self, saved: tuple[Saved, Saved]) -> tuple[Fields, Fields]:
        soft, hard = saved
        return soft.fields, hard.fields

    def compute(self, arrays: Operands) -> tuple[Fields, Fields]:
        if self.config.implementation != "reference":
            return super().compute(arrays)
        return (
            self.soft.compute(arrays),
            Fields(**reference.statistics(self.hard.config, _at_one(arrays), ())),
        )

    def differentiable(
        self, moving: Operands
    ) -> Callable[[Operands], tuple[Fields, Fields]]:
        if self.config.implementation == "reference":
            return self.compute
        return super().differentiable(moving)

    def gradients(
        self,
        arrays: Operands,
        saved: tuple[Saved, Saved],
        cotangents: tuple[Fields, Fields],
        moving: Operands,
        kept: tuple[Kept, ...] = (),
        into: Into | None = None,
    ) -> Operands:
        operands, wanted = self.local(arrays), Wanted.of(moving)
        soft, hard = self.soft, self.hard
        rows = (
            soft.rows(operands, saved[0], cotangents[0]),
            hard.rows(_at_one(operands), saved[1], cotangents[1]),
        )

        def share(part: Operands, part_rows: Any, tile: Tile, *_: Any) -> Share:
            of_soft, of_hard = (each.columns() for each in part_rows)
            tau = part.temperature(self.config)
            slope, moments = soft.slope(tau, of_soft, tile, wanted.tau)
            # The temperature has no part in what is at 1.
            return Share(
                slope + hard.slope(1.0, of_hard, _last(tile), False)[0], moments
            )

        gradients, moments = accumulate(
            self.config,
            operands,
            wanted,
            share,
            rows,
            kept=kept,
            into=None if into is None else into.of(into.sums),
        )
        return gradients.with_tau(moments).of_operands()


def _last(tile: Tile) -> Tile:
    """Returns a tile with the last label alone."""
    assert tile.labels is not None
    return tile._replace(labels=tile.labels[:, -1:])


def _at_one(arrays: Operands) -> Operands:
    """Returns operands with the last label alone, without a temperature."""
    assert arrays.labels is not None
    return arrays._replace(labels=arrays.labels[:, -1:], tau=None)
